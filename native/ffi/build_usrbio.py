"""Writes the C source of kvfs_usrbio._native, the binding of libkvfs: `python build_usrbio.py OUT.c`."""

from __future__ import annotations

import sys

from cdefs import declarations
from cffi import FFI

HELPERS = r"""
#include <errno.h>
#include <string.h>
#include <time.h>

#include "include/kvfs.h"

static uint64_t kvfs_py_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* A blocking batch as kvfs_get and the like, but every block has its own iov, and key_len 33 names the 32-byte hash of
 * a longer key. Ends with n completions, or early with -errno: then operations may still be under way. */
static int kvfs_py_batch(kvfs_ring* r, uint8_t opcode, uint8_t flags, int ns, const uint16_t* iovs,
                         struct kvfs_block* b, int n, uint64_t timeout_ns) {
  struct kvfs_cqe cqe[64];
  int next = 0, pending = 0;
  uint64_t start = kvfs_py_now();
  if (kvfs_inflight(r) != 0) return -EBUSY;
  while (next < n || pending > 0) {
    while (next < n) {
      struct kvfs_block* k = &b[next];
      struct kvfs_sqe* s;
      if (k->key_len == 0 || k->key_len > KVFS_KEY_MAX + 1) return -EINVAL;
      s = kvfs_prep(r);
      if (s == NULL) break;
      s->opcode = opcode;
      s->flags = flags;
      s->handle = (uint32_t)ns;
      s->user_data = (uint64_t)next;
      s->key_len = (uint8_t)k->key_len;
      memcpy(s->key, k->key, k->key_len > KVFS_KEY_MAX ? KVFS_KEY_MAX : k->key_len);
      if (opcode == KVFS_OP_GET || opcode == KVFS_OP_PUT) {
        s->iov = iovs[next];
        s->iov_off = k->value_off;
        s->off = k->off;
        s->len = k->len;
      }
      ++next;
      ++pending;
    }
    int sent = kvfs_submit(r);
    if (sent < 0) return sent;
    uint64_t left = timeout_ns, spent = kvfs_py_now() - start;
    if (timeout_ns != KVFS_NO_TIMEOUT) left = spent < timeout_ns ? timeout_ns - spent : 0;
    int min = pending < 32 ? pending : 32;
    int got = kvfs_wait(r, cqe, next < n ? 1 : min, 64, left);
    if (got < 0) return got;
    for (int i = 0; i < got; ++i) {
      if (cqe[i].user_data >= (uint64_t)n) return -EPROTO;
      b[cqe[i].user_data].status = cqe[i].result;
    }
    pending -= got;
  }
  return 0;
}
"""

CDEF = """
int kvfs_py_batch(kvfs_ring* r, uint8_t opcode, uint8_t flags, int ns, const uint16_t* iovs, struct kvfs_block* b,
                  int n, uint64_t timeout_ns);
"""


def main() -> None:
    ffi = FFI()
    ffi.cdef(declarations("include/kvfs_ring.h", "include/kvfs.h") + CDEF)
    ffi.set_source("kvfs_usrbio._native", HELPERS)
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
