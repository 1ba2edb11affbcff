"""Writes the C source of hf3fs_py_usrbio._native, the binding of libhf3fs_api_shared: `python build_hf3fs.py OUT.c`."""

from __future__ import annotations

import sys

from cffi import FFI

HELPERS = r"""
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "include/hf3fs_usrbio.h"

/* A ring and the completions taken from it that Python has not seen yet: a wait may be interrupted by a signal. */
struct hf3fs_py_ring {
  struct hf3fs_ior ior;
  int entries;
  int taken;
  struct hf3fs_cqe* cqes; /* of `entries` */
  uint64_t* sequence;     /* the taken ones by the order in which they were prepared */
  int64_t* results;
};

static void hf3fs_py_ring_destroy(struct hf3fs_py_ring* r) {
  if (r == NULL) return;
  hf3fs_iordestroy(&r->ior);
  free(r->cqes);
  free(r->sequence);
  free(r->results);
  free(r);
}

static int hf3fs_py_ring_create(struct hf3fs_py_ring** out, const char* mount, int entries, bool for_read, int io_depth,
                                int timeout_ms, int numa, uint64_t flags) {
  struct hf3fs_py_ring* r = calloc(1, sizeof *r);
  if (r == NULL) return -ENOMEM;
  int err = hf3fs_iorcreate4(&r->ior, mount, entries, for_read, io_depth, timeout_ms, numa, flags);
  if (err < 0) {
    free(r);
    return err;
  }
  r->entries = hf3fs_io_entries(&r->ior);
  size_t n = (size_t)r->entries;
  r->cqes = malloc(n * sizeof *r->cqes);
  r->sequence = malloc(n * sizeof *r->sequence);
  r->results = malloc(n * sizeof *r->results);
  if (r->cqes == NULL || r->sequence == NULL || r->results == NULL) {
    hf3fs_py_ring_destroy(r);
    return -ENOMEM;
  }
  *out = r;
  return 0;
}

static int hf3fs_py_ring_entries(const struct hf3fs_py_ring* r) { return r->entries; }

static int hf3fs_py_prepare(const struct hf3fs_py_ring* r, const struct hf3fs_iov* iov, bool read, uint64_t at,
                            uint64_t len, int fd, uint64_t off, uint64_t sequence) {
  return hf3fs_prep_io(&r->ior, iov, read, iov->base + at, fd, off, len, (const void*)(uintptr_t)sequence);
}

static int hf3fs_py_submit(const struct hf3fs_py_ring* r) { return hf3fs_submit_ios(&r->ior); }

static int hf3fs_py_by_sequence(const void* a, const void* b) {
  uintptr_t x = (uintptr_t)((const struct hf3fs_cqe*)a)->userdata, y = (uintptr_t)((const struct hf3fs_cqe*)b)->userdata;
  return (x > y) - (x < y);
}

/* Adds completions to those taken until there are `min`, then up to `max` if they are there. How many are taken; fewer
 * than `min` once `until_ns` (CLOCK_REALTIME) has come or an error has ended it; the error if none is. -EAGAIN: to be called
 * again, so that the interpreter may look for signals in between. */
static int hf3fs_py_wait(struct hf3fs_py_ring* r, int min, int max, int64_t until_ns) {
  const int64_t ns = 1000000000;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  int64_t stop = (int64_t)now.tv_sec * ns + now.tv_nsec + ns / 5;
  if (stop > until_ns) stop = until_ns;
  struct timespec until = {.tv_sec = stop / ns, .tv_nsec = stop % ns};
  if (max > r->entries) max = r->entries;
  if (min > max) min = max;
  while (r->taken < max) {
    int n = hf3fs_wait_for_ios(&r->ior, r->cqes + r->taken, max - r->taken, min - r->taken, &until);
    if (n < 0) return r->taken > 0 ? r->taken : n;
    if (n == 0) return r->taken < min && stop < until_ns ? -EAGAIN : r->taken;
    r->taken += n;
  }
  return max;
}

/* The first `n` of those taken into sequence[] and results[], in the order in which they were prepared. */
static void hf3fs_py_reap(struct hf3fs_py_ring* r, int n) {
  for (int i = 1; i < n; ++i) {
    if (hf3fs_py_by_sequence(&r->cqes[i - 1], &r->cqes[i]) > 0) {
      qsort(r->cqes, (size_t)n, sizeof *r->cqes, hf3fs_py_by_sequence);
      break;
    }
  }
  for (int i = 0; i < n; ++i) {
    r->sequence[i] = (uint64_t)(uintptr_t)r->cqes[i].userdata;
    r->results[i] = r->cqes[i].result;
  }
  r->taken -= n;
  memmove(r->cqes, r->cqes + n, (size_t)r->taken * sizeof *r->cqes);
}

static uint64_t* hf3fs_py_sequence(struct hf3fs_py_ring* r) { return r->sequence; }
static int64_t* hf3fs_py_results(struct hf3fs_py_ring* r) { return r->results; }

static int hf3fs_py_wrap(struct hf3fs_iov* iov, uintptr_t base, const uint8_t* id, const char* mount, size_t size,
                         size_t block_size, int numa) {
  return hf3fs_iovwrap(iov, (void*)base, id, mount, size, block_size, numa);
}
"""

CDEF = """
struct hf3fs_iov {
  uint8_t* base;
  size_t size;
  ...;
};
struct hf3fs_py_ring;
int hf3fs_py_ring_create(struct hf3fs_py_ring** out, const char* mount, int entries, bool for_read, int io_depth,
                         int timeout_ms, int numa, uint64_t flags);
void hf3fs_py_ring_destroy(struct hf3fs_py_ring* r);
int hf3fs_py_ring_entries(const struct hf3fs_py_ring* r);
int hf3fs_py_prepare(const struct hf3fs_py_ring* r, const struct hf3fs_iov* iov, bool read, uint64_t at, uint64_t len,
                     int fd, uint64_t off, uint64_t sequence);
int hf3fs_py_submit(const struct hf3fs_py_ring* r);
int hf3fs_py_wait(struct hf3fs_py_ring* r, int min, int max, int64_t until_ns);
void hf3fs_py_reap(struct hf3fs_py_ring* r, int n);
uint64_t* hf3fs_py_sequence(struct hf3fs_py_ring* r);
int64_t* hf3fs_py_results(struct hf3fs_py_ring* r);
int hf3fs_py_wrap(struct hf3fs_iov* iov, uintptr_t base, const uint8_t* id, const char* mount, size_t size,
                  size_t block_size, int numa);
void hf3fs_iovdestroy(struct hf3fs_iov* iov);
size_t hf3fs_ior_size(int entries);
int hf3fs_extract_mount_point(char* mount, int size, const char* path);
int hf3fs_reg_fd(int fd, uint64_t flags);
void hf3fs_dereg_fd(int fd);
int hf3fs_hardlink(const char* target, const char* link_name);
int hf3fs_punchhole(int fd, int n, const size_t* start, const size_t* end, size_t flags);
"""


def main() -> None:
    ffi = FFI()
    ffi.cdef(CDEF)
    ffi.set_source("hf3fs_py_usrbio._native", HELPERS)
    ffi.emit_c_code(sys.argv[1])


if __name__ == "__main__":
    main()
