// checksum.cpp: the baseline XXH3 and the choice between it and the AVX2 one.
#include "checksum.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvfs {
namespace detail {

uint64_t xxh3_base(const void* data, size_t len) { return XXH3_64bits(data, len); }

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

}  // namespace detail

uint64_t xxh3(const void* data, size_t len) {
  static const bool wide = detail::has_avx2();
  // Up to 240 bytes both are the same code.
  return len > 240 && wide ? detail::xxh3_avx2(data, len) : XXH3_64bits(data, len);
}

}  // namespace kvfs
