// checksum_avx2.cpp: XXH3 compiled for AVX2, apart from the rest so that nothing else uses such instructions.
// Everything included here is inlined into the one function (no shared inline function may leak out of this file).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define XXH_VECTOR 2  // XXH_AVX2
#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvfs::detail {
uint64_t xxh3_avx2(const void* data, size_t len);
uint64_t xxh3_avx2(const void* data, size_t len) { return XXH3_64bits(data, len); }
}  // namespace kvfs::detail
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#include "checksum.h"
namespace kvfs::detail {
uint64_t xxh3_avx2(const void* data, size_t len) { return xxh3_base(data, len); }
}  // namespace kvfs::detail
#endif
