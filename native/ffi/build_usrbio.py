"""Writes the C source of kvfs_usrbio._native, the binding of libkvfs: `python build_usrbio.py OUT.c`."""

from __future__ import annotations

import sys

from cdefs import declarations
from cffi import FFI

HELPERS = r"""
#include <errno.h>
#include <string.h>

#include "include/kvfs.h"

/* Blocks for n keys that lie one behind the other: all key_len bytes long, or as `lens` says, where 33 names the 32-byte
 * hash of a longer key. NULL: blocks without keys. Values, where the operation has them, at equal distances. */
static void kvfs_py_fill(struct kvfs_block* b, int n, const char* keys, const uint8_t* lens, int key_len, uint64_t at,
                         uint64_t stride, uint32_t len) {
  for (int i = 0; i < n; ++i) {
    uint32_t k = lens != NULL ? lens[i] : (uint32_t)key_len;
    b[i].key = keys;
    b[i].key_len = k;
    b[i].len = len;
    b[i].value_off = at + (uint64_t)i * stride;
    b[i].off = 0;
    b[i].status = -EINPROGRESS;
    if (keys != NULL) keys += k > KVFS_KEY_MAX ? KVFS_KEY_MAX : k;
  }
}

static uintptr_t kvfs_py_address(const void* p) { return (uintptr_t)p; }

static void kvfs_py_statuses(const struct kvfs_block* b, int n, int64_t* out) {
  for (int i = 0; i < n; ++i) out[i] = b[i].status;
}

/* Runs one batch on a ring with nothing else in flight. After an error operations may still be under way. */
static int kvfs_py_run(kvfs_ring* r, struct kvfs_batch* batch, uint64_t timeout_ns) {
  struct kvfs_batch* done;
  int err = kvfs_batch_submit(r, batch);
  if (err < 0) return err;
  err = kvfs_batch_wait(r, &done, 1, timeout_ns);
  return err < 0 ? err : 0;
}

/* Fill, run and statuses in one call. */
static int kvfs_py_call(kvfs_ring* r, struct kvfs_batch* batch, struct kvfs_block* b, int64_t* statuses, int n,
                        uint8_t opcode, uint8_t flags, int handle, const char* keys, const uint8_t* lens, int key_len,
                        uint16_t iov, uint64_t at, uint64_t stride, uint32_t len, uint64_t timeout_ns) {
  kvfs_py_fill(b, n, keys, lens, key_len, at, stride, len);
  memset(batch, 0, sizeof *batch);
  batch->blocks = b;
  batch->n = n;
  batch->handle = handle;
  batch->iov = iov;
  batch->opcode = opcode;
  batch->flags = flags;
  int err = kvfs_py_run(r, batch, timeout_ns);
  if (err < 0) return err;
  kvfs_py_statuses(b, n, statuses);
  return 0;
}

/* Tags (`user`) of batches that are done. */
static int kvfs_py_poll(kvfs_ring* r, uint64_t* tags, int max) {
  struct kvfs_batch* done[64];
  int n = kvfs_batch_poll(r, done, max < 64 ? max : 64);
  for (int i = 0; i < n; ++i) tags[i] = (uint64_t)(uintptr_t)done[i]->user;
  return n;
}

static int kvfs_py_wait(kvfs_ring* r, uint64_t* tags, int max, uint64_t timeout_ns) {
  struct kvfs_batch* done[64];
  int n = kvfs_batch_wait(r, done, max < 64 ? max : 64, timeout_ns);
  for (int i = 0; i < n; ++i) tags[i] = (uint64_t)(uintptr_t)done[i]->user;
  return n;
}

/* Where an engine keeps one layer of its blocks. */
struct kvfs_py_layer {
  uintptr_t base;
  uint64_t size, stride;
};

/* Copies blocks between `layers` and memory in which the layers of each lie one after the other. */
static void kvfs_py_copy(const struct kvfs_py_layer* layers, int n, const uint32_t* blocks, const uintptr_t* whole,
                         int count, int scatter) {
  for (int i = 0; i < count; ++i) {
    char* at = (char*)whole[i];
    for (int l = 0; l < n; ++l) {
      char* part = (char*)layers[l].base + blocks[i] * layers[l].stride;
      memcpy(scatter ? part : at, scatter ? at : part, layers[l].size);
      at += layers[l].size;
    }
  }
}
"""

CDEF = """
void kvfs_py_fill(struct kvfs_block* b, int n, const char* keys, const uint8_t* lens, int key_len, uint64_t at,
                  uint64_t stride, uint32_t len);
uintptr_t kvfs_py_address(const void* p);
void kvfs_py_statuses(const struct kvfs_block* b, int n, int64_t* out);
int kvfs_py_run(kvfs_ring* r, struct kvfs_batch* batch, uint64_t timeout_ns);
int kvfs_py_call(kvfs_ring* r, struct kvfs_batch* batch, struct kvfs_block* b, int64_t* statuses, int n, uint8_t opcode,
                 uint8_t flags, int handle, const char* keys, const uint8_t* lens, int key_len, uint16_t iov,
                 uint64_t at, uint64_t stride, uint32_t len, uint64_t timeout_ns);
int kvfs_py_poll(kvfs_ring* r, uint64_t* tags, int max);
int kvfs_py_wait(kvfs_ring* r, uint64_t* tags, int max, uint64_t timeout_ns);
struct kvfs_py_layer { uintptr_t base; uint64_t size, stride; };
void kvfs_py_copy(const struct kvfs_py_layer* layers, int n, const uint32_t* blocks, const uintptr_t* whole, int count,
                  int scatter);
"""


def main() -> None:
    ffi = FFI()
    ffi.cdef(declarations("include/kvfs_ring.h", "include/kvfs.h") + CDEF)
    ffi.set_source("kvfs_usrbio._native", HELPERS)
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
