// clock.h owns the clock of deadlines.
#pragma once

#include <time.h>

#include <cstdint>

namespace kvfs {

inline uint64_t monotonic_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return uint64_t(ts.tv_sec) * 1'000'000'000u + uint64_t(ts.tv_nsec);
}

}  // namespace kvfs
