// Memory for data on its way: nobody gets what another has, and what comes back fits together again.
#include "server/net_buffers.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "sim_device.h"

namespace kvfs {
namespace {

TEST(NetBuffers, SizesArePowersOfTwoFromFourKilobytes) {
  EXPECT_EQ(NetBuffers::size_for(1), 4096u);
  EXPECT_EQ(NetBuffers::size_for(4096), 4096u);
  EXPECT_EQ(NetBuffers::size_for(4097), 8192u);
  EXPECT_EQ(NetBuffers::size_for(16u << 20), 16u << 20);
  EXPECT_EQ(NetBuffers::size_for((8u << 20) + 1), 16u << 20);
}

TEST(NetBuffers, WhatIsOutNeverOverlapsAndAllFitsTogetherAgain) {
  NetBuffers b;
  ASSERT_EQ(b.init(nullptr, 64u << 20).err, 0);
  EXPECT_EQ(b.bytes(), 64u << 20);
  Rng rng(7);
  struct Out {
    NetBuffers::Buffer buf;
    uint8_t mark;
  };
  std::vector<Out> out;
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 20000; ++i) {
      if (rng.below(5) < 3) {
        const auto len = uint32_t(1 + rng.below(1u << (12 + rng.below(13))));
        NetBuffers::Buffer got;
        const auto side = rng.below(2) != 0 ? NetBuffers::In : NetBuffers::Out;
        if (!b.get(side, len, &got)) continue;
        ASSERT_GE(got.len, len);
        ASSERT_EQ(uintptr_t(got.ptr) % std::min<uint32_t>(got.len, 4096), 0u);
        ASSERT_TRUE(got.ptr >= b.base() && got.ptr + got.len <= b.base() + b.bytes());
        ASSERT_EQ(got.ptr < b.base() + b.side_bytes(), side == NetBuffers::In);
        const auto mark = uint8_t(1 + rng.below(255));
        for (uint32_t at = 0; at < got.len; at += 4096) got.ptr[at] = mark;
        out.push_back({got, mark});
      } else if (!out.empty()) {
        std::swap(out[size_t(rng.below(out.size()))], out.back());
        const Out o = out.back();
        for (uint32_t at = 0; at < o.buf.len; at += 4096) ASSERT_EQ(o.buf.ptr[at], o.mark);
        b.put(o.buf);
        out.pop_back();
      }
    }
    for (const Out& o : out) b.put(o.buf);
    out.clear();
    ASSERT_EQ(b.used(), 0u);
    for (const auto side : {NetBuffers::In, NetBuffers::Out}) {
      NetBuffers::Buffer big[3];
      ASSERT_TRUE(b.get(side, 16u << 20, &big[0]));
      ASSERT_TRUE(b.get(side, 16u << 20, &big[1]));
      ASSERT_FALSE(b.get(side, 1, &big[2])) << "a half has two blocks";
      b.put(big[0]);
      b.put(big[1]);
    }
  }
}

}  // namespace
}  // namespace kvfs
