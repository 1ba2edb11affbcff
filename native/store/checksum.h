// checksum.h owns the checksum of everything on a device: XXH3, 64 bits, seed 0. The widest implementation the
// processor has is chosen once at run time; all give the same result.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfs {

uint64_t xxh3(const void* data, size_t len);

namespace detail {  // for the test that compares them
uint64_t xxh3_base(const void* data, size_t len);
uint64_t xxh3_avx2(const void* data, size_t len);  // only if has_avx2()
bool has_avx2();
}  // namespace detail

}  // namespace kvfs
