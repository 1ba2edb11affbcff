// check.h owns KVFS_CHECK: an invariant that is checked in every build. A false one prints where and aborts, because a
// store that goes on after a broken invariant can lose more than a process.
#pragma once

#include <cstdio>
#include <cstdlib>

#define KVFS_CHECK(cond)                                                                  \
  do {                                                                                    \
    if (__builtin_expect(!(cond), 0)) {                                                   \
      std::fprintf(stderr, "kvfs: %s:%d: check failed: %s\n", __FILE__, __LINE__, #cond); \
      std::abort();                                                                       \
    }                                                                                     \
  } while (0)
