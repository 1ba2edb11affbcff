// memory_tier_test.cpp: the DRAM tier alone (contents, bounds, resistance to scans) and under the store, with sizes so tiny
// that everything is evicted and refilled all the time: never old, torn or another chunk's bytes.
#include "../store/memory_tier.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "store_fixture.h"

namespace kvfs {
namespace {

constexpr uint32_t kFrame = MemoryTier::kFrame;

void stamp(uint8_t* p, uint32_t id, uint32_t page) {
  std::memcpy(p, &id, 4);
  std::memcpy(p + kFrame - 4, &page, 4);
}

bool stamped(const uint8_t* p, uint32_t id, uint32_t page) {
  return std::memcmp(p, &id, 4) == 0 && std::memcmp(p + kFrame - 4, &page, 4) == 0;
}

TEST(MemoryTier, FindsWhatWasFilledAndNothingElse) {
  for (uint32_t frames : {16u, 17u, 100u, 1000u}) {
    MemoryTier t(uint64_t{frames} * kFrame);
    ASSERT_TRUE(t.on());
    ASSERT_EQ(t.frames(), frames);
    Rng rng(frames);
    std::set<std::pair<uint32_t, uint32_t>> filled;  // and not dropped: may be there
    for (int i = 0; i < 200000; i++) {
      const auto id = static_cast<uint32_t>(1 + rng.below(frames)), page = static_cast<uint32_t>(rng.below(3));
      const uint64_t what = rng.below(10);
      if (what < 5) {
        const uint32_t f = t.find(id, page);
        ASSERT_EQ(t.find_next(static_cast<uint32_t>(rng.below(frames + 1)), id, page), f);
        ASSERT_EQ(t.find_next(f != 0 ? f - 1 : 0, id, page), f);
        if (!f) continue;
        ASSERT_TRUE(filled.contains({id, page}));
        ASSERT_TRUE(stamped(t.data(f), id, page));
        t.touch(f);
      } else if (what < 9) {
        stamp(t.fill(id, page), id, page);
        filled.insert({id, page});
        ASSERT_TRUE(t.find(id, page));
      } else {
        t.drop(id, page);
        filled.erase({id, page});
        ASSERT_FALSE(t.find(id, page));
      }
      ASSERT_LE(t.resident(), frames);
    }
    EXPECT_GT(t.resident(), frames / 2);
  }
}

TEST(MemoryTier, PinnedFramesKeepTheirBytesWhateverHappensToTheirPages) {
  for (uint32_t frames : {16u, 17u, 300u}) {
    MemoryTier t(uint64_t{frames} * kFrame);
    Rng rng(frames);
    struct Pin {
      uint32_t frame, id, page;
    };
    std::vector<Pin> pins;
    for (int i = 0; i < 100000; i++) {
      const auto id = static_cast<uint32_t>(1 + rng.below(frames)), page = static_cast<uint32_t>(rng.below(3));
      const uint64_t what = rng.below(12);
      const uint32_t f = t.find(id, page);
      if (what < 4) {
        if (f && t.pin(f)) pins.push_back({f, id, page});
        ASSERT_LE(t.pinned(), frames / 2);
      } else if (what < 8) {
        stamp(t.fill(id, page), id, page);
      } else if (what < 9) {
        t.drop(id, page);
        ASSERT_FALSE(t.find(id, page));
      } else if (!pins.empty()) {
        const size_t which = rng.below(pins.size());
        const Pin p = pins[which];
        ASSERT_TRUE(stamped(t.data(p.frame), p.id, p.page));
        t.unpin(p.frame);
        pins[which] = pins.back();
        pins.pop_back();
      }
      ASSERT_LE(t.resident(), frames);
    }
    for (const Pin& p : pins) {
      ASSERT_TRUE(stamped(t.data(p.frame), p.id, p.page));
      t.unpin(p.frame);
    }
    EXPECT_EQ(t.pinned(), 0u);
    for (uint32_t id = 1; id <= frames; id++) stamp(t.fill(id, 0), id, 0);
    EXPECT_EQ(t.resident(), frames);  // none was lost
  }
}

TEST(MemoryTier, TheSumOfARangeIsForgottenWithItsFirstPageOnly) {
  MemoryTier t(64 * kFrame);
  t.remember_sum(7, 100, 65536, 42);
  ASSERT_NE(t.range_sum(7, 100, 65536), nullptr);
  EXPECT_EQ(t.range_sum(7, 100, 65536)->sum, 42u);
  EXPECT_EQ(t.range_sum(7, 101, 65536), nullptr);
  EXPECT_EQ(t.range_sum(7, 100, 65535), nullptr);
  EXPECT_EQ(t.range_sum(8, 100, 65536), nullptr);
  for (uint32_t page = 1; page < 300; page++) t.drop(7, page);
  for (uint32_t id = 8; id < 300; id++) t.drop(id, 0);
  for (uint32_t id = 8; id < 300; id++) t.fill(id, 0);
  ASSERT_NE(t.range_sum(7, 100, 65536), nullptr);
  t.drop(7, 0);  // was never resident
  EXPECT_EQ(t.range_sum(7, 100, 65536), nullptr);
}

// Until its memory has pages, and no longer.
void wait_ready(const MemoryTier& t, uint32_t bytes) {
  while (!t.ready(bytes)) std::this_thread::yield();
}

uint64_t pages_of(const MemoryTier& t) {
  const uint64_t n = uint64_t{t.frames()} * kFrame;
  std::vector<unsigned char> has(n / kFrame);
  EXPECT_EQ(mincore(const_cast<uint8_t*>(t.memory()), n, has.data()), 0);
  return static_cast<uint64_t>(std::ranges::count_if(has, [](unsigned char c) { return (c & 1) != 0; }));
}

TEST(MemoryTier, PagesAreMadeBeforeTheirUseAndNoFurtherThanAskedFor) {
  constexpr uint32_t kAhead = 4u << 20, kFrames = 8192;  // of 32 MiB
  constexpr uint32_t kHugeFrames = 512;                  // what the kernel may give for one page asked for
  MemoryTier t(uint64_t{kFrames} * kFrame, kAhead);
  wait_ready(t, kAhead);
  EXPECT_GE(pages_of(t), kAhead / kFrame);
  EXPECT_FALSE(t.ready(2 * kAhead));
  uint32_t id = 0;
  for (uint32_t part = 0; part < 7; part++) {
    wait_ready(t, kAhead / 2);
    const uint64_t before = pages_of(t);
    EXPECT_GE(before, id + kAhead / 2 / kFrame);
    EXPECT_LE(before, id + kAhead / kFrame + kHugeFrames);
    for (uint32_t i = 0; i < kFrames / 8; i++, id++) stamp(t.fill(id + 1, 0), id + 1, 0);
  }
  for (; id < 3 * kFrames; id++) stamp(t.fill(id + 1, 0), id + 1, 0);
  EXPECT_TRUE(t.ready(1u << 20));  // all are in use: a page goes for each that comes
  EXPECT_EQ(t.resident(), kFrames);
}

TEST(MemoryTier, EndsWhileItsPagesAreBeingMade) {
  for (int i = 0; i < 50; i++) {
    MemoryTier t(64u << 20, 64u << 20);
    if (i % 2) stamp(t.fill(1, 0), 1, 0);
  }
}

TEST(MemoryTier, OffWithoutMemoryAndItsBookkeepingIsBounded) {
  EXPECT_FALSE(MemoryTier(0).on());
  EXPECT_FALSE(MemoryTier(15 * kFrame).on());
  for (uint64_t mib : {1u, 3u, 5u, 64u, 100u, 512u, 4096u}) {
    const MemoryTier t(mib << 20);
    ASSERT_TRUE(t.on());
    EXPECT_LE(t.overhead_bytes(), uint64_t{t.frames()} * 36) << mib << " MiB";
  }
}

// Zipf over 20 times the frames, with scans of never repeated pages in between.
TEST(MemoryTier, ScansDoNotPushOutWhatIsHot) {
  constexpr uint32_t kFrames = 1000, kPages = 20000;
  std::vector<double> cumulative;
  double sum = 0;
  for (uint32_t i = 1; i <= kPages; i++) cumulative.push_back(sum += 1 / std::pow(i, 0.9));
  MemoryTier t(uint64_t{kFrames} * kFrame);
  std::deque<uint32_t> lru;  // newest first
  std::map<uint32_t, bool> in_lru;
  Rng rng(1);
  uint32_t scan = kPages;
  uint64_t asked = 0, hits = 0, lru_hits = 0;
  const auto ask = [&](uint32_t id, bool count) {
    const uint32_t f = t.find(id, 0);
    if (f)
      t.touch(f);
    else
      stamp(t.fill(id, 0), id, 0);
    const bool lru_hit = in_lru[id];
    if (lru_hit) lru.erase(std::find(lru.begin(), lru.end(), id));
    lru.push_front(id);
    in_lru[id] = true;
    if (lru.size() > kFrames) {
      in_lru[lru.back()] = false;
      lru.pop_back();
    }
    if (!count) return;
    asked++;
    hits += f != 0;
    lru_hits += lru_hit;
  };
  for (int round = 0; round < 60; round++) {
    for (int i = 0; i < 2000; i++) {
      const double u = static_cast<double>(rng.next() >> 11) / 9007199254740992.0 * sum;
      const auto at = std::lower_bound(cumulative.begin(), cumulative.end(), u) - cumulative.begin();
      ask(static_cast<uint32_t>(at + 1), round >= 10);
    }
    for (int i = 0; i < 1500; i++) ask(++scan, false);
  }
  const double ours = static_cast<double>(hits) / static_cast<double>(asked);
  const double theirs = static_cast<double>(lru_hits) / static_cast<double>(asked);
  printf("hit rate: %.3f, LRU %.3f\n", ours, theirs);
  EXPECT_GT(ours, theirs + 0.1);
}

StoreOptions with_tier(uint64_t bytes) {
  StoreOptions o;
  o.memory_bytes = bytes;
  return o;
}

TEST(MemoryTier, AResidentGetDoesNoIo) {
  SimDevice dev(sim(1));
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev, with_tier(4u << 20));
  ASSERT_TRUE(h.open());
  for (uint32_t n : {1u, 4095u, 4096u, 4097u, 8192u, 8193u, 20000u, 65536u, 3u << 17, 3u << 19}) {
    const Bytes v = pattern(n, n);
    ASSERT_EQ(h.put(block_key(n), v), 1);
    const uint64_t reads = dev.reads(), hits = h.store->stats().mem_hits;
    Bytes got;
    for (uint32_t off : {0u, n / 3, n - 1}) {
      ASSERT_EQ(h.get(block_key(n), off, n, &got, off % 2), n - off);
      ASSERT_TRUE(std::equal(got.begin(), got.end(), v.begin() + off));
    }
    EXPECT_EQ(dev.reads(), reads) << n;
    EXPECT_EQ(h.store->stats().mem_hits, hits + 3) << n;
  }
  ASSERT_TRUE(h.store->close());
  h.store.reset();
  ASSERT_TRUE(h.open());
  // After a restart nothing is resident: a small block is after its first read, a large one after its second.
  for (const auto& [n, device] : {std::pair{4096u, 1}, {3u << 17, 2}}) {
    for (int i = 0; i < 3; i++) {
      Bytes got;
      const uint64_t reads = dev.reads();
      ASSERT_EQ(h.get(block_key(n), 0, 1u << 20, &got), n);
      EXPECT_TRUE(got == pattern(n, n));
      EXPECT_EQ(dev.reads() > reads, i < device) << n;
    }
  }
  ASSERT_TRUE(h.store->close());
}

// With pages for little more than one block ahead, a block that finds none is stored and read as if there were no tier, and
// kept once there are some.
TEST(MemoryTier, NoLargeGetWaitsForMemory) {
  constexpr uint32_t kValue = 512u << 10, kValues = 40;
  ASSERT_EQ(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0), 0);  // each frame's first touch is a fault
  SimOptions so = sim(6);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  StoreOptions o = with_tier(32u << 20);
  o.memory_ahead = 1u << 20;
  Harness h(dev, o);
  ASSERT_TRUE(h.open());
  Mem mem(kValue);
  std::memset(mem.get(), 0, kValue);
  for (uint32_t k = 0; k < kValues; k++) ASSERT_EQ(h.put(block_key(k), pattern(k, kValue)), 1);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  uint32_t resident = 0;
  int64_t faults = 0;
  while (resident < kValues && std::chrono::steady_clock::now() < deadline) {
    resident = 0;
    for (uint32_t k = 0; k < kValues; k++) {
      const uint64_t hits = h.store->stats().mem_hits;
      rusage before, after;
      ASSERT_EQ(getrusage(RUSAGE_THREAD, &before), 0);
      ASSERT_EQ(h.run(Request::Op::Get, block_key(k), mem.get(), 0, kValue), kValue);
      ASSERT_EQ(getrusage(RUSAGE_THREAD, &after), 0);
      faults += after.ru_minflt - before.ru_minflt;
      const Bytes v = pattern(k, kValue);
      ASSERT_EQ(std::memcmp(mem.get(), v.data(), kValue), 0) << k;
      resident += h.store->stats().mem_hits > hits;
    }
  }
  EXPECT_EQ(resident, kValues);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // whose own memory is touched with ours
  EXPECT_LT(faults, 300);                                            // the bookkeeping's; of 5,120 frames
#endif
  ASSERT_TRUE(h.store->close());
  ASSERT_EQ(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0), 0);
}

// A place of a file is kept at its second read, in whatever sizes the others are read.
TEST(MemoryTier, WhatIsReadOfFilesIsKeptAtItsSecondRead) {
  SimDevice dev(sim(4));
  ASSERT_TRUE(Store::format(dev, kSmall));
  const Bytes v = pattern(1, 65536);
  {
    Harness h(dev, with_tier(1u << 20));
    ASSERT_TRUE(h.open());
    ASSERT_EQ(h.write(file_key(1, 1), 0, v), 65536);
    ASSERT_TRUE(h.store->close());
  }
  Harness h(dev, with_tier(1u << 20));
  ASSERT_TRUE(h.open());
  const auto io = [&](uint32_t off, uint32_t len) {
    Bytes got;
    const uint64_t before = dev.reads();
    EXPECT_EQ(h.get(file_key(1, 1), off, len, &got), len);
    EXPECT_TRUE(std::equal(got.begin(), got.end(), v.begin() + off));
    return dev.reads() != before;
  };
  for (const bool expected : {true, true, false}) {
    EXPECT_EQ(io(8192, 4096), expected);
    EXPECT_EQ(io(12288, 4096), expected);
    EXPECT_EQ(io(20480, 16384), expected);
  }
  EXPECT_TRUE(io(4096, 4096));
  ASSERT_TRUE(h.store->close());
}

// The memory of a put or write changes between its checksum and its end: others never see the changed bytes, nor the old.
TEST(MemoryTier, AClientThatChangesItsMemoryPoisonsNothing) {
  SimDevice dev(sim(2));
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev, with_tier(4u << 20));
  ASSERT_TRUE(h.open());
  for (Request::Op op : {Request::Op::Put, Request::Op::Write}) {
    for (uint32_t n : {4096u, 8192u, 40960u, 3u << 17, 3u << 19}) {
      if (op == Request::Op::Write && n > kFileChunk) continue;
      const ChunkKey key = op == Request::Op::Put ? block_key(n) : file_key(1, n);
      if (op == Request::Op::Write) {
        ASSERT_EQ(h.write(key, 0, pattern(1, n)), n);
      }
      const Bytes v = pattern(n, n);
      Mem m(n);
      std::memcpy(m.get(), v.data(), n);
      Request r;
      r.op = op;
      r.key = key;
      r.len = n;
      r.mem = {m.get(), -1};
      bool done = false;
      r.owner = &done;
      r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
      h.store->submit(&r);
      m.get()[n - 1] ^= 1;
      while (!done) h.turn();
      ASSERT_EQ(r.result, op == Request::Op::Put ? 1 : n);
      Bytes got;
      const int64_t g = h.get(key, 0, n, &got);
      ASSERT_TRUE(g == -EIO || (g == n && got == v)) << g;
    }
  }
  ASSERT_TRUE(h.store->close());
}

// Entry ids are handed out again, after 4095 others in a small store: nothing of a deleted chunk may be left under its id.
TEST(MemoryTier, AnIdUsedAgainHasNoOldPages) {
  SimOptions so = sim(3);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev, with_tier(64u << 20));
  ASSERT_TRUE(h.open());
  for (uint64_t k = 0; k < 4095; k++) ASSERT_EQ(h.put(block_key(k), pattern(k, 4096)), 1);
  for (uint64_t k = 0; k < 4095; k++) ASSERT_EQ(h.run(Request::Op::Delete, block_key(k), nullptr, 0, 0), 0);
  for (uint64_t k = 5000; k < 5100; k++) {
    const Bytes v = pattern(k, 70000);  // too large to be kept at once
    ASSERT_EQ(h.put(block_key(k), v), 1);
    Bytes got;
    for (uint32_t off : {8192u, 8192u, 0u}) {
      ASSERT_EQ(h.get(block_key(k), off, 4096, &got), 4096);
      ASSERT_TRUE(std::equal(got.begin(), got.end(), v.begin() + off)) << k << " at " << off;
    }
  }
  ASSERT_TRUE(h.store->close());
}

// Random operations against a map; with few frames everything is evicted and refilled constantly.
TEST(MemoryTier, StoreMatchesAModel) {
  const uint64_t sizes[] = {16 * kFrame, 17 * kFrame, 40 * kFrame, 300 * kFrame};
  for (uint64_t seed = 1; seed <= 8; seed++) {
    SimOptions so = sim(seed, 64u << 20, seed % 2 ? 512 : 4096);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    StoreOptions opt = with_tier(sizes[seed % 4]);
    opt.verify = seed != 5;
    Harness h(dev, opt);
    ASSERT_TRUE(h.open());
    Rng rng(seed * 77);
    std::map<uint64_t, Bytes> model;
    uint64_t hits = 0, lends = 0;
    struct Loan {
      Lent lent;
      Bytes bytes;
    };
    std::vector<Loan> loans;  // each shows what it showed when it was made
    auto settle = [&](size_t keep) {
      while (loans.size() > keep) {
        const size_t which = rng.below(loans.size());
        Bytes now;
        for (const Lent::Part& p : loans[which].lent.parts) now.insert(now.end(), p.ptr, p.ptr + p.len);
        ASSERT_TRUE(now == loans[which].bytes);
        h.store->give_back(&loans[which].lent);
        loans[which] = std::move(loans.back());
        loans.pop_back();
      }
    };
    for (int i = 0; i < 6000; i++) {
      const uint64_t k = rng.below(40);
      const bool file = k >= 25;
      const ChunkKey key = file ? file_key(3, k) : block_key(k);
      const auto it = model.find(k);
      const uint64_t what = rng.below(12);
      if (what == 0) {
        ASSERT_EQ(h.run(Request::Op::Delete, key, nullptr, 0, 0), it == model.end() ? -ENOENT : 0);
        model.erase(k);
      } else if (what <= 2 && file) {
        const auto off = static_cast<uint32_t>(rng.below(30000));
        const Bytes v = pattern(rng.next(), 1 + rng.below(30000));
        ASSERT_EQ(h.write(key, off, v), static_cast<int64_t>(v.size()));
        Bytes& b = model[k];
        if (b.size() < off + v.size()) b.resize(off + v.size());
        std::copy(v.begin(), v.end(), b.begin() + off);
      } else if (what == 3 && file && it != model.end()) {
        const auto n = static_cast<uint32_t>(1 + rng.below(it->second.size()));
        ASSERT_EQ(h.run(Request::Op::Truncate, key, nullptr, n, 0), 0);
        it->second.resize(n);
      } else if (what <= 4 && !file) {
        if (it != model.end()) continue;
        const Bytes v = pattern(rng.next(), 1 + rng.below(rng.below(8) ? 90000 : 1300000));
        ASSERT_EQ(h.put(key, v, 0, rng.below(2) * 8), 1);
        model[k] = v;
      } else if (what == 5 && rng.below(100) == 0) {
        hits += h.store->stats().mem_hits;
        settle(0);
        ASSERT_TRUE(h.store->close());
        h.store.reset();
        ASSERT_TRUE(h.open());
      } else if (what >= 9) {
        settle(4);
        const auto off = static_cast<uint32_t>(it != model.end() ? rng.below(it->second.size() + 1) : 0);
        const auto len = static_cast<uint32_t>(1 + rng.below(rng.below(2) ? 6000 : 1400000));
        Loan loan;
        const int64_t r = h.store->lend(key, off, len, rng.below(2) != 0, false, &loan.lent);
        if (r == -EAGAIN) continue;
        if (it == model.end()) {
          ASSERT_EQ(r, -ENOENT);
          continue;
        }
        const auto want = std::min<size_t>(len, it->second.size() - off);
        ASSERT_EQ(r, static_cast<int64_t>(want));
        loan.bytes.assign(it->second.begin() + off, it->second.begin() + off + static_cast<long>(want));
        loans.push_back(std::move(loan));
        lends += want != 0;
      } else {
        const auto off = static_cast<uint32_t>(it != model.end() && rng.below(2) ? rng.below(it->second.size()) : 0);
        const auto len = static_cast<uint32_t>(1 + rng.below(rng.below(2) ? 6000 : 1400000));
        Bytes got;
        const int64_t r = h.get(key, off, len, &got, rng.below(2) * 8);
        if (it == model.end()) {
          ASSERT_EQ(r, -ENOENT);
          continue;
        }
        const auto want = static_cast<int64_t>(std::min<size_t>(len, it->second.size() - off));
        ASSERT_EQ(r, want) << "seed " << seed << " step " << i;
        ASSERT_TRUE(std::equal(got.begin(), got.end(), it->second.begin() + off)) << "seed " << seed << " step " << i;
      }
    }
    hits += h.store->stats().mem_hits;
    EXPECT_GT(hits, 50u) << "seed " << seed;
    EXPECT_GT(lends, 20u) << "seed " << seed;
    settle(0);
    ASSERT_TRUE(h.store->close());
  }
}

// Reads, overwrites and deletions of the same chunks in flight together. A chunk of version v holds v in each 8 bytes: a
// read sees one version, none older than what was acknowledged before it began.
TEST(MemoryTier, ReadsThatRaceWithOverwrites) {
  constexpr uint32_t kChunks = 6, kSlots = 24, kLen = 12288;
  for (uint64_t seed = 1; seed <= 6; seed++) {
    SimOptions so = sim(seed);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev, with_tier(16 * kFrame));
    ASSERT_TRUE(h.open());
    struct Slot {
      Request r;
      std::unique_ptr<Mem> mem = std::make_unique<Mem>(12288);
      bool busy = false, done = false;
      uint64_t version = 0, floor = 0;
      uint32_t chunk = 0;
    };
    std::vector<Slot> slots(kSlots);
    uint64_t issued[kChunks] = {}, acked[kChunks] = {};
    Rng rng(seed);
    uint64_t reads = 0;
    for (int i = 0; i < 30000; i++) {
      Slot& s = slots[rng.below(kSlots)];
      if (s.busy && s.done) {
        s.busy = false;
        if (s.r.op == Request::Op::Write) {
          ASSERT_EQ(s.r.result, kLen);
          acked[s.chunk] = std::max(acked[s.chunk], s.version);
        } else if (s.r.result != -ENOENT) {
          ASSERT_EQ(s.r.result, s.r.len);
          uint64_t first;
          std::memcpy(&first, s.mem->get(), 8);
          for (uint32_t at = 0; at < s.r.len; at += 8) ASSERT_EQ(std::memcmp(s.mem->get() + at, &first, 8), 0);
          ASSERT_GE(first, s.floor) << "seed " << seed << " step " << i;
          ASSERT_LE(first, issued[s.chunk]);
          reads++;
        } else {
          ASSERT_EQ(s.floor, 0u);
        }
      }
      if (!s.busy) {
        s.busy = true;
        s.done = false;
        s.chunk = static_cast<uint32_t>(rng.below(kChunks));
        s.r = Request{};
        s.r.key = file_key(1, s.chunk);
        s.r.mem = {s.mem->get(), -1};
        s.r.owner = &s;
        s.r.done = [](Request* x) { static_cast<Slot*>(x->owner)->done = true; };
        s.floor = acked[s.chunk];
        // One write per chunk at a time: the order of two in flight is the store's.
        if (rng.below(4) == 0 && acked[s.chunk] == issued[s.chunk]) {
          s.r.op = Request::Op::Write;
          s.r.len = kLen;
          s.version = ++issued[s.chunk];
          for (uint32_t at = 0; at < kLen; at += 8) std::memcpy(s.mem->get() + at, &s.version, 8);
        } else {
          s.r.op = Request::Op::Get;
          s.r.off = static_cast<uint32_t>(rng.below(3) * kFrame);
          s.r.len = kFrame;
        }
        h.store->submit(&s.r);
      }
      if (rng.below(3) == 0) h.turn();
    }
    for (Slot& s : slots)
      while (s.busy && !s.done) h.turn();
    for (uint32_t c = 0; c < kChunks; c++) {
      Bytes got;
      ASSERT_EQ(h.get(file_key(1, c), 0, kLen, &got), kLen);
      ASSERT_EQ(std::memcmp(got.data(), &issued[c], 8), 0);
    }
    EXPECT_GT(reads, 1000u);
    EXPECT_GT(h.store->stats().mem_hits, 100u);
    ASSERT_TRUE(h.store->close());
  }
}

}  // namespace
}  // namespace kvfs
