// checksum_test.cpp checks XXH3 against published values and the implementations against each other.
#include "../store/checksum.h"

#include <gtest/gtest.h>

#include <vector>

#include "sim_device.h"

namespace kvfs {
namespace {

TEST(Checksum, KnownValues) {
  EXPECT_EQ(xxh3("", 0), 0x2d06800538d394c2ull);
  EXPECT_EQ(xxh3("a", 1), 0xe6c632b61e964e1full);
  EXPECT_EQ(xxh3("abc", 3), 0x78af5f94892f3950ull);
}

TEST(Checksum, AllImplementationsAgreeAtEveryLengthAndAlignment) {
  std::vector<uint8_t> data(70'000);
  Rng rng(1);
  for (auto& b : data) b = static_cast<uint8_t>(rng.next());
  for (size_t len = 0; len <= 65'536; len += len < 3000 ? 1 : 509) {
    const uint8_t* p = data.data() + len % 67;
    const uint64_t want = detail::xxh3_base(p, len);
    ASSERT_EQ(xxh3(p, len), want) << len;
    if (detail::has_avx2()) {
      ASSERT_EQ(detail::xxh3_avx2(p, len), want) << len;
    }
  }
}

TEST(Checksum, EveryBitCounts) {
  std::vector<uint8_t> data(4096, 0x5a);
  const uint64_t want = xxh3(data.data(), data.size());
  for (size_t i = 0; i < data.size() * 8; ++i) {
    data[i / 8] ^= static_cast<uint8_t>(1u << (i % 8));
    ASSERT_NE(xxh3(data.data(), data.size()), want);
    data[i / 8] ^= static_cast<uint8_t>(1u << (i % 8));
  }
}

}  // namespace
}  // namespace kvfs
