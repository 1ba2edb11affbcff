"""Writes the C source of kvfs._node, the daemon's binding of kvfs_node.h: `python build_node.py OUT.c`."""

from __future__ import annotations

import sys

from cdefs import declarations
from cffi import FFI

HELPERS = r"""
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ffi/kvfs_net.h"
#include "ffi/kvfs_remote.h"

/* Memory for direct I/O; NULL when there is none. */
static void* kvfs_py_alloc(size_t bytes) { return aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095); }
static void kvfs_py_free(void* p) { free(p); }

/* Reaps, looking again for up to spin_ns while there is nothing. */
static int kvfs_py_reap(kvfs_node* n, struct kvfs_cqe* out, int max, uint64_t spin_ns) {
  struct timespec t;
  int got = kvfs_node_reap(n, out, max);
  if (got != 0 || spin_ns == 0) return got;
  clock_gettime(CLOCK_MONOTONIC, &t);
  uint64_t end = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec + spin_ns;
  do {
    for (int i = 0; i < 64; ++i) __asm__ volatile("" ::: "memory");
    got = kvfs_node_reap(n, out, max);
    clock_gettime(CLOCK_MONOTONIC, &t);
  } while (got == 0 && (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec < end);
  return got;
}

/* Submits one operation of the in-process ring; 1 = taken, 0 = the ring is full. */
static int kvfs_py_submit(kvfs_node* n, uint8_t opcode, uint8_t flags, uint32_t handle, uint64_t user_data,
                          uintptr_t mem, uint64_t off, uint32_t len, const char* key, uint8_t key_bytes,
                          uint8_t key_len) {
  struct kvfs_sqe s;
  memset(&s, 0, sizeof s);
  s.opcode = opcode;
  s.flags = flags;
  s.iov = KVFS_IOV_INPROC;
  s.handle = handle;
  s.user_data = user_data;
  s.iov_off = mem;
  s.off = off;
  s.len = len;
  s.key_len = key_len;
  if (key_bytes > sizeof s.key) return -EINVAL;
  memcpy(s.key, key, key_bytes);
  return kvfs_node_submit(n, &s, 1);
}
"""

CDEF = """
void* kvfs_py_alloc(size_t bytes);
void kvfs_py_free(void* p);
int kvfs_py_reap(kvfs_node* n, struct kvfs_cqe* out, int max, uint64_t spin_ns);
int kvfs_py_submit(kvfs_node* n, uint8_t opcode, uint8_t flags, uint32_t handle, uint64_t user_data, uintptr_t mem,
                   uint64_t off, uint32_t len, const char* key, uint8_t key_bytes, uint8_t key_len);
"""


def main() -> None:
    ffi = FFI()
    ffi.cdef(declarations("include/kvfs_ring.h", "ffi/kvfs_node.h", "ffi/kvfs_net.h", "ffi/kvfs_remote.h") + CDEF)
    ffi.set_source("kvfs._node", HELPERS)
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
