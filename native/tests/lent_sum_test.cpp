// lent_sum_test.cpp: what is lent from the DRAM tier comes with the sum of its bytes, which is remembered, never that of other
// bytes, and shows when memory has lost a bit.
#include <gtest/gtest.h>

#include <array>
#include <map>

#include "../store/checksum.h"
#include "store_fixture.h"

namespace kvfs {
namespace {

class LentSum : public ::testing::Test {
 protected:
  void start(uint64_t memory, uint64_t seed = 1) {
    SimOptions so = sim(seed);
    so.record = false;
    dev = std::make_unique<SimDevice>(so);
    ASSERT_TRUE(Store::format(*dev, kSmall));
    StoreOptions o;
    o.memory_bytes = memory;
    h = std::make_unique<Harness>(*dev, o);
    ASSERT_TRUE(h->open());
  }
  void TearDown() override {
    if (h == nullptr) return;
    EXPECT_TRUE(h->store->close());
    h.reset();
  }
  struct Loan {
    int64_t n;
    uint64_t sum;
    Bytes bytes;
    const uint8_t* at;
  };
  Loan lend(const ChunkKey& key, uint32_t off, uint32_t len, bool touch = true) {
    Lent lent;
    Loan l{h->store->lend(key, off, len, touch, true, &lent), lent.sum, {}, nullptr};
    for (const Lent::Part& p : lent.parts) l.bytes.insert(l.bytes.end(), p.ptr, p.ptr + p.len);
    if (!lent.parts.empty()) l.at = lent.parts[0].ptr;
    h->store->give_back(&lent);
    return l;
  }
  // It is in memory, holds these bytes and has their sum.
  void expect(const ChunkKey& key, uint32_t off, const Bytes& v) {
    const Loan l = lend(key, off, static_cast<uint32_t>(v.size()));
    ASSERT_EQ(l.n, static_cast<int64_t>(v.size()));
    EXPECT_TRUE(l.bytes == v);
    EXPECT_EQ(l.sum, xxh3(v.data(), v.size()));
  }
  void load(const ChunkKey& key, uint32_t len) {
    Bytes got;
    for (int i = 0; lend(key, 0, len).n == -EAGAIN; i++) {
      ASSERT_LT(i, 50);
      ASSERT_EQ(h->get(key, 0, len, &got), len);
    }
  }
  void remove(const ChunkKey& key) { ASSERT_EQ(h->run(Request::Op::Delete, key, nullptr, 0, 0), 0); }

  std::unique_ptr<SimDevice> dev;
  std::unique_ptr<Harness> h;
};

constexpr uint32_t kLen = 65536;

// The sum is the first one although the bytes are others: it was not made again.
TEST_F(LentSum, ABitThatMemoryLosesIsSeenAndNotLentForEver) {
  start(4u << 20);
  const Bytes v = pattern(1, kLen);
  ASSERT_EQ(h->put(block_key(1), v), 1);
  const uint64_t sum = xxh3(v.data(), kLen);
  const Loan first = lend(block_key(1), 0, kLen);
  ASSERT_EQ(first.n, kLen);
  EXPECT_EQ(first.sum, sum);
  const_cast<uint8_t*>(first.at)[5000] ^= 4;
  int wrong = 0;
  for (;; wrong++) {
    ASSERT_LT(wrong, 100);
    const Loan l = lend(block_key(1), 0, kLen);
    if (l.n == -EAGAIN) break;
    ASSERT_EQ(l.n, kLen);
    ASSERT_EQ(l.sum, sum);
    ASSERT_NE(xxh3(l.bytes.data(), kLen), sum);
  }
  EXPECT_GT(wrong, 0);
  EXPECT_EQ(h->store->stats().checksum_errors, 1u);
  Bytes got;
  ASSERT_EQ(h->get(block_key(1), 0, kLen, &got), kLen);
  EXPECT_TRUE(got == v);
  for (int i = 0; i < 200; i++) expect(block_key(1), 0, v);
  EXPECT_EQ(h->store->stats().checksum_errors, 1u);
}

TEST_F(LentSum, EachRangeHasItsOwn) {
  start(4u << 20);
  const Bytes v = pattern(2, kLen);
  ASSERT_EQ(h->put(block_key(1), v), 1);
  for (int round = 0; round < 3; round++) {
    for (const uint32_t off : {0u, 1u, 4095u, 4096u, 20000u, 65535u}) {
      for (const uint32_t len : {1u, 4096u, 16383u, 16384u, 16385u, 40000u, kLen}) {
        const Bytes want(v.begin() + off, v.begin() + std::min(kLen, off + len));
        expect(block_key(1), off, want);
        const Loan l = lend(block_key(1), off, len);
        EXPECT_EQ(l.n, static_cast<int64_t>(want.size()));
        EXPECT_EQ(l.sum, xxh3(want.data(), want.size()));
      }
    }
  }
}

TEST_F(LentSum, EveryChangeOfAFilesChunkEndsIt) {
  start(4u << 20);
  const ChunkKey key = file_key(1, 1);
  Bytes v = pattern(1, kLen);
  ASSERT_EQ(h->write(key, 0, v), kLen);
  expect(key, 0, v);
  v = pattern(2, kLen);  // all of it
  ASSERT_EQ(h->write(key, 0, v), kLen);
  expect(key, 0, v);
  std::fill(v.begin() + 60000, v.begin() + 60010, uint8_t{7});  // a few bytes, far from the first page
  ASSERT_EQ(h->write(key, 60000, Bytes(10, 7)), 10);
  expect(key, 0, v);
  ASSERT_EQ(h->run(Request::Op::Truncate, key, nullptr, 50000, 0), 0);
  const Bytes cut(v.begin(), v.begin() + 50000);
  expect(key, 0, cut);
  ASSERT_EQ(h->write(key, kLen - 1, Bytes(1, 9)), 1);  // as long as it was; zeros between
  std::fill(v.begin() + 50000, v.end(), uint8_t{0});
  v.back() = 9;
  expect(key, 0, v);
  remove(key);
  EXPECT_EQ(lend(key, 0, kLen).n, -ENOENT);
  v = pattern(3, kLen);
  ASSERT_EQ(h->write(key, 0, v), kLen);
  expect(key, 0, v);
}

// The range begins in a piece that has the same bytes again and ends in one that has not; at last they have the same ids in the
// index, of which there are 4095.
TEST_F(LentSum, DeletedAndPutAgainALargeBlockHasASumOfItsOwn) {
  start(16u << 20);
  constexpr uint32_t n = 2u << 20;
  Bytes v = pattern(1, n);
  for (uint32_t round = 0; round < 3; round++) {
    v[n - 1 - round] ^= 1;
    ASSERT_EQ(h->put(block_key(1), v), 1);
    load(block_key(1), n);
    expect(block_key(1), 0, v);
    expect(block_key(1), 1000000, Bytes(v.begin() + 1000000, v.end()));
    expect(block_key(1), 1u << 20, Bytes(v.begin() + (1 << 20), v.end()));
    remove(block_key(1));
    for (uint64_t k = 2; round == 1 && k < 2 + 4095 - 2; k++) {
      ASSERT_EQ(h->put(block_key(k), Bytes(1)), 1);
      remove(block_key(k));
    }
  }
}

// Its pages leave the tier, the chunk changes while none is there, and they come back.
TEST_F(LentSum, WhatLeftTheTierAndCameBackHasTheSumOfItsBytes) {
  start(64 * 4096);
  Bytes v = pattern(1, kLen);
  const ChunkKey key = file_key(1, 1);
  ASSERT_EQ(h->write(key, 0, v), kLen);
  uint64_t other = 100;
  const auto push_out = [&] {
    while (lend(key, 0, 1, false).n != -EAGAIN) {
      ASSERT_LT(++other, 1000u);
      ASSERT_EQ(h->put(block_key(other), pattern(other, 4096)), 1);
      expect(block_key(other), 0, pattern(other, 4096));  // read again, so kept
    }
  };
  expect(key, 0, v);
  push_out();
  load(key, kLen);
  expect(key, 0, v);
  push_out();
  v[70] ^= 1;
  {
    Mem m(1);  // kNoTouch: the written bytes stay out of the tier
    m.get()[0] = v[70];
    ASSERT_EQ(h->run(Request::Op::Write, key, m.get(), 70, 1, Request::kNoTouch), 1);
  }
  ASSERT_EQ(lend(key, 0, kLen).n, -EAGAIN);
  load(key, kLen);
  expect(key, 0, v);
}

// Random changes and loans of few chunks in few ranges, in tiers that hold all of them or push them out all the time: every
// sum is that of the bytes the chunk has now.
TEST_F(LentSum, IsThatOfTheBytesWhateverHappens) {
  constexpr uint32_t kBig = 3u << 19;
  constexpr std::array<std::array<uint32_t, 2>, 6> kRanges{
      {{0, kLen}, {0, 4096}, {4096, 32768}, {100, 20000}, {0, kBig}, {1u << 20, 1u << 19}}};
  for (const uint64_t frames : {64u, 500u, 900u, 4000u}) {
    start(frames * 4096, frames);
    Rng rng(frames);
    std::map<uint64_t, Bytes> model;
    std::map<std::array<uint64_t, 2>, bool> lent;  // (chunk, range) since the chunk changed
    uint64_t loans = 0, again = 0;
    const auto changed = [&](uint64_t k) {
      for (uint64_t r = 0; r < kRanges.size(); r++) lent.erase({k, r});
    };
    for (int i = 0; i < 6000; i++) {
      const uint64_t k = rng.below(14);
      const bool file = k < 6;
      const ChunkKey key = file ? file_key(1, k) : block_key(k);
      const auto it = model.find(k);
      const uint64_t what = rng.below(40);
      if (what == 0 && it != model.end()) {
        remove(key);
        model.erase(it);
        changed(k);
      } else if (what <= 2 && file) {
        const auto off = static_cast<uint32_t>(rng.below(2) * rng.below(kLen - 1));
        const Bytes v = pattern(rng.next(), rng.below(2) != 0 ? kLen - off : 1 + rng.below(kLen - off));
        ASSERT_EQ(h->write(key, off, v, rng.below(4) == 0 ? Request::kNoTouch : 0), static_cast<int64_t>(v.size()));
        Bytes& b = model[k];
        if (b.size() < off + v.size()) b.resize(off + v.size());
        std::copy(v.begin(), v.end(), b.begin() + off);
        changed(k);
      } else if (what == 3 && file && it != model.end()) {
        const auto n = static_cast<uint32_t>(1 + rng.below(it->second.size()));
        ASSERT_EQ(h->run(Request::Op::Truncate, key, nullptr, n, 0), 0);
        it->second.resize(n);
        changed(k);
      } else if (it == model.end()) {
        if (file) continue;
        const Bytes v = pattern(rng.below(3), k % 3 == 0 ? kBig : kLen);
        ASSERT_EQ(h->put(key, v), 1);
        model[k] = v;
        changed(k);
      } else {
        const uint64_t r = rng.below(kRanges.size());
        const auto [off, len] = kRanges[r];
        if (off >= it->second.size()) continue;
        const Loan l = lend(key, off, len);
        const auto n = std::min<size_t>(len, it->second.size() - off);
        if (l.n == -EAGAIN) {
          Bytes got;
          ASSERT_EQ(h->get(key, off, len, &got), static_cast<int64_t>(n));
          continue;
        }
        ASSERT_EQ(l.n, static_cast<int64_t>(n));
        ASSERT_EQ(l.sum, xxh3(&it->second[off], n)) << "frames " << frames << " step " << i;
        loans++;
        again += lent[{k, r}] && n >= 16384;
        lent[{k, r}] = true;
      }
    }
    EXPECT_GT(loans, 200u) << frames;
    EXPECT_GT(again, 50u) << frames;
    EXPECT_EQ(h->store->stats().checksum_errors, 0u);
    TearDown();
  }
}

}  // namespace
}  // namespace kvfs
