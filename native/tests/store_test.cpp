// store_test.cpp: what the chunk store promises, on the simulated device: a model in memory, every crash point of generated
// workloads, an I/O error at the n-th operation, bit flips anywhere, a full device.
#include "../store/store.h"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <set>
#include <string>

#include "../store/layout.h"
#include "sim_device.h"
#include "store_fixture.h"

namespace kvfs {
namespace {

TEST(Store, EverySizeComesBackBitExact) {
  for (uint32_t align : {512u, 4096u}) {
    SimDevice dev(sim(1, 256u << 20, align));
    ASSERT_TRUE(Store::format(dev, {.size = 0, .segment_bytes = 4u << 20, .journal_bytes = 0}));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    const uint32_t sizes[] = {1,     511,   512,    513,    4095,    4096,    4097,    8192,     8193,
                              65536, 65537, 229376, 229377, 1048575, 1048576, 1048577, 3u << 20, 16u << 20};
    for (uint32_t n : sizes) {
      const Bytes v = pattern(n, n);
      ASSERT_EQ(h.put(block_key(n), v, 0, n % 3 ? 0 : 8), 1) << n;
      EXPECT_EQ(h.put(block_key(n), v), 0) << n;
      Bytes got;
      ASSERT_EQ(h.get(block_key(n), 0, n, &got), n);
      EXPECT_TRUE(got == v) << n;
      EXPECT_EQ(h.summed, n <= 8192) << "what is read by one sum is not summed again";
      Rng rng(n);
      for (int i = 0; i < 10; i++) {
        const auto off = static_cast<uint32_t>(rng.below(n)), len = static_cast<uint32_t>(1 + rng.below(n));
        const uint32_t want = std::min(len, n - off);
        ASSERT_EQ(h.get(block_key(n), off, len, &got, i % 2 ? 8 : 0), want);
        EXPECT_TRUE(std::equal(got.begin(), got.end(), v.begin() + off));
      }
    }
    ASSERT_TRUE(h.store->close());
    h.store.reset();
    ASSERT_TRUE(h.open());
    for (uint32_t n : sizes) {
      Bytes got;
      ASSERT_EQ(h.get(block_key(n), 0, n, &got), n);
      EXPECT_TRUE(got == pattern(n, n)) << n;
      EXPECT_EQ(h.run(Request::Op::Delete, block_key(n), nullptr, 0, 0), 0);
      EXPECT_EQ(h.get(block_key(n), 0, n, &got), -ENOENT);
    }
    EXPECT_EQ(h.store->stats().chunks, 0u);
    EXPECT_EQ(h.store->stats().data_bytes, 0u);
    ASSERT_TRUE(h.store->close());
  }
}

TEST(Store, PutOfAnotherLengthIsRefused) {
  SimDevice dev(sim(2));
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  EXPECT_EQ(h.put(block_key(1), pattern(1, 100)), 1);
  EXPECT_EQ(h.put(block_key(1), pattern(1, 101)), -EEXIST);
  EXPECT_EQ(h.run(Request::Op::Put, block_key(2), nullptr, 0, 0), -EINVAL);
  ASSERT_TRUE(h.store->close());
}

// Random operations on blocks and file chunks against a map; the store is reopened now and then, cleanly or not.
TEST(Store, BehavesLikeAMap) {
  for (uint64_t seed = 1; seed <= 6; seed++) {
    SimOptions so = sim(seed, 96u << 20, seed % 2 ? 512 : 4096);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    Rng rng(seed * 77);
    std::map<uint64_t, Bytes> blocks, chunks;
    for (int i = 0; i < 1500; i++) {
      const uint64_t k = rng.below(40);
      Bytes got;
      switch (rng.below(8)) {
        case 0:
        case 1: {
          const Bytes v = pattern(rng.next(), 1 + rng.below(rng.below(10) == 0 ? 1500000 : 20000));
          const int64_t want = !blocks.count(k) ? 1 : blocks[k].size() == v.size() ? 0 : -EEXIST;
          ASSERT_EQ(h.put(block_key(k), v, rng.below(2) ? Request::kDurable : 0), want);
          if (want == 1) blocks[k] = v;
          break;
        }
        case 2:
          ASSERT_EQ(h.run(Request::Op::Delete, block_key(k), nullptr, 0, 0), blocks.erase(k) ? 0 : -ENOENT);
          break;
        case 3: {
          const auto off = static_cast<uint32_t>(rng.below(kFileChunk));
          const Bytes v = pattern(rng.next(), 1 + rng.below(kFileChunk - off));
          ASSERT_EQ(h.write(file_key(7, k), off, v), static_cast<int64_t>(v.size()));
          Bytes& c = chunks[k];
          if (c.size() < off + v.size()) c.resize(off + v.size());
          std::copy(v.begin(), v.end(), c.begin() + off);
          break;
        }
        case 4: {
          const auto size = static_cast<uint32_t>(rng.below(kFileChunk));
          ASSERT_EQ(h.run(Request::Op::Truncate, file_key(7, k), nullptr, size, 0), 0);
          if (auto it = chunks.find(k); it != chunks.end() && size < it->second.size()) {
            it->second.resize(size);
            if (size == 0) chunks.erase(it);
          }
          break;
        }
        case 5:
          if (rng.below(20) == 0) {
            if (rng.below(2)) {
              ASSERT_TRUE(h.store->close());
            } else {
              ASSERT_EQ(h.run(Request::Op::Sync, block_key(0), nullptr, 0, 0), 0);
            }
            h.store.reset();
            ASSERT_TRUE(h.open());
          }
          break;
        default: {
          const bool file = rng.below(2);
          auto& map = file ? chunks : blocks;
          const auto off = static_cast<uint32_t>(rng.below(30000));
          const auto len = static_cast<uint32_t>(1 + rng.below(80000));
          const int64_t n = h.get(file ? file_key(7, k) : block_key(k), off, len, &got, rng.below(2) * 8);
          auto it = map.find(k);
          if (it == map.end()) {
            ASSERT_EQ(n, -ENOENT);
          } else {
            const int64_t want = off >= it->second.size() ? 0 : std::min<int64_t>(len, it->second.size() - off);
            ASSERT_EQ(n, want);
            ASSERT_TRUE(std::equal(got.begin(), got.end(), it->second.begin() + (want ? off : 0)));
          }
        }
      }
    }
    EXPECT_EQ(h.store->stats().chunks, blocks.size() + chunks.size());
    EXPECT_EQ(dev.overlapping_writes(), 0u);
    EXPECT_EQ(dev.changed_buffers(), 0u);
    ASSERT_TRUE(h.store->close());
  }
}

// Values of a key over time; a crash may leave any value from the last one known durable to the last one started.
struct Crashing {
  struct Write {
    size_t acked;  // trace length when it was acknowledged as durable; SIZE_MAX = never
    std::optional<Bytes> value;
    size_t started;
  };
  std::map<uint64_t, std::vector<Write>> blocks;
};

// Generates a workload, then recovers from crash points all over its trace and compares with what was acknowledged.
TEST(Store, EveryCrashPointRecoversToWhatWasAcknowledged) {
  for (uint64_t seed = 1; seed <= 8; seed++) {
    const SimOptions so = sim(seed, 24u << 20, seed % 2 ? 512 : 4096);
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    dev.reset_trace();
    Crashing model;
    {
      Harness h(dev);
      ASSERT_TRUE(h.open());
      Rng rng(seed * 13);
      for (int i = 0; i < 120; i++) {
        const uint64_t k = rng.below(12);
        const bool file = k >= 6;
        const ChunkKey key = file ? file_key(3, k) : block_key(k);
        const uint8_t flags = rng.below(2) ? Request::kDurable : 0;
        auto& log = model.blocks[k];
        const std::optional<Bytes> cur = log.empty() ? std::nullopt : log.back().value;
        const size_t started = dev.trace().size();
        std::optional<Bytes> next = cur;
        const uint64_t what = rng.below(8);
        if (what == 0) {
          h.run(Request::Op::Delete, key, nullptr, 0, 0, flags);
          next = std::nullopt;
        } else if (what == 1) {
          h.run(rng.below(3) ? Request::Op::Sync : Request::Op::Checkpoint, key, nullptr, 0, 0);
          const size_t now = dev.trace().size();
          for (auto& [kk, l] : model.blocks)
            for (auto& w : l) w.acked = std::min(w.acked, now);
          continue;
        } else if (file) {
          const auto off = static_cast<uint32_t>(rng.below(20000));
          const Bytes v = pattern(rng.next(), 1 + rng.below(30000));
          h.write(key, off, v, flags);
          if (!next) next = Bytes{};
          if (next->size() < off + v.size()) next->resize(off + v.size());
          std::copy(v.begin(), v.end(), next->begin() + off);
        } else {
          if (cur) continue;
          next = pattern(rng.next(), 1 + rng.below(rng.below(6) ? 12000 : 1300000));
          h.put(key, *next, flags);
        }
        log.push_back({flags ? dev.trace().size() : SIZE_MAX, next, started});
      }
      // The store object dies with the machine: its destructor must not tidy up.
    }
    Rng crash(seed * 999);
    const size_t events = dev.trace().size();
    const size_t step = std::max<size_t>(1, events / 150);
    for (size_t n = 0; n <= events; n += 1 + crash.below(2 * step)) {
      SimDevice after(so, dev.crash_image(n, crash));
      Harness h(after);
      const Status st = h.open();
      ASSERT_TRUE(st) << "seed " << seed << " crash at " << n << ": " << st.message;
      for (auto& [k, log] : model.blocks) {
        Bytes got;
        const int64_t r = h.get(k >= 6 ? file_key(3, k) : block_key(k), 0, 2u << 20, &got);
        ASSERT_TRUE(r >= 0 || r == -ENOENT) << "seed " << seed << " crash at " << n << " key " << k << ": " << r;
        const std::optional<Bytes> found = r >= 0 ? std::optional(got) : std::nullopt;
        size_t first = 0;  // index+1 of the last write acknowledged before the crash
        for (size_t i = 0; i < log.size(); i++)
          if (log[i].acked <= n) first = i + 1;
        bool allowed = first == 0 && !found;
        for (size_t i = first ? first - 1 : 0; i < log.size() && log[i].started <= n; i++)
          allowed = allowed || found == log[i].value;
        ASSERT_TRUE(allowed) << "seed " << seed << " crash at " << n << " key " << k
                             << " has a state nobody acknowledged";
      }
      ASSERT_EQ(h.put(block_key(1000), pattern(5, 5000), Request::kDurable), 1);
      ASSERT_TRUE(h.store->close());
    }
  }
}

// Each change is checked at the very moment of its completion, on what the device has then: as after a kill -9.
TEST(Store, WhatIsLoggedSurvivesTheProcess) {
  SimOptions so = sim(5);
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  Rng rng(5);
  std::map<uint64_t, Bytes> model;
  for (int i = 0; i < 200; i++) {
    const uint64_t k = rng.below(8);
    const ChunkKey key = file_key(1, k);
    const uint64_t what = rng.below(8);
    if (what == 0) {
      const int64_t r = h.run(Request::Op::Delete, key, nullptr, 0, 0, Request::kLogged);
      ASSERT_EQ(r, model.contains(k) ? 0 : -ENOENT);
      model.erase(k);
    } else if (what == 1 && model.contains(k)) {
      const auto n = static_cast<uint32_t>(1 + rng.below(model[k].size()));
      ASSERT_EQ(h.run(Request::Op::Truncate, key, nullptr, n, 0, Request::kLogged), 0);
      model[k].resize(n);
    } else {
      const Bytes v = pattern(rng.next(), 1 + rng.below(20000));
      ASSERT_EQ(h.write(key, 0, v, Request::kLogged), static_cast<int64_t>(v.size()));
      if (model[k].size() < v.size()) model[k].resize(v.size());
      std::copy(v.begin(), v.end(), model[k].begin());
    }
    if (i % 7 != 0) continue;
    SimDevice killed(so, dev.image());
    Harness after(killed);
    ASSERT_TRUE(after.open()) << i;
    for (uint64_t c = 0; c < 8; c++) {
      Bytes got;
      const int64_t r = after.get(file_key(1, c), 0, kFileChunk, &got);
      if (!model.contains(c)) {
        ASSERT_EQ(r, -ENOENT) << i;
      } else {
        ASSERT_TRUE(r == static_cast<int64_t>(model[c].size()) && got == model[c]) << i << " chunk " << c;
      }
    }
    ASSERT_TRUE(after.store->close());
  }
  ASSERT_TRUE(h.store->close());
}

// An error at every n-th operation: the caller is told, the store never crashes, and what it acknowledged survives a
// power loss right after, whatever becomes of the writes that no barrier covered.
TEST(Store, ErrorAtEveryOperation) {
  for (Io::Op op : {Io::Op::Write, Io::Op::Flush, Io::Op::Read}) {
    for (uint64_t n = 0; n < 60; n++) {
      const SimOptions so = sim(n + 1, 24u << 20);
      SimDevice dev(so);
      ASSERT_TRUE(Store::format(dev, kSmall));
      dev.reset_trace();
      std::map<uint64_t, Bytes> acked;
      bool refuses = false;
      {
        Harness h(dev);
        dev.add_fault({.op = op, .skip = n, .count = 1, .err = EIO, .partial = n % 2 == 1});
        if (h.open()) {
          for (uint64_t k = 0; k < 12; k++) {
            const Bytes v = pattern(k, 1 + k * 3000);
            const int64_t r = h.put(block_key(k), v, Request::kDurable);
            ASSERT_TRUE(r == 1 || r == -EIO) << r;
            if (r == 1) acked[k] = v;
            // After a barrier that failed nobody knows what is on stable storage: nothing is accepted any more.
            ASSERT_FALSE(refuses && r == 1) << "put " << k << " after a failed barrier";
            refuses = refuses || (op == Io::Op::Flush && r < 0);
            Bytes got;
            const int64_t g = h.get(block_key(k), 0, 100000, &got);
            ASSERT_TRUE(g == -EIO || g == -ENOENT || got == v);
            if (k == 6) h.run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0);
          }
        }
      }
      const size_t end = dev.trace().size();
      Rng crash(n);
      const std::vector<SimDevice::Fate> lost(dev.open_writes(end).size(), SimDevice::Fate::Lost);
      const SimImage images[] = {dev.image(), dev.crash_image(end, lost, crash), dev.crash_image(end, crash)};
      for (const SimImage& image : images) {
        SimDevice after(so, image);
        Harness h(after);
        const Status st = h.open();
        ASSERT_TRUE(st) << "n " << n << ": " << st.message;
        for (auto& [k, v] : acked) {
          Bytes got;
          ASSERT_EQ(h.get(block_key(k), 0, 100000, &got), static_cast<int64_t>(v.size())) << "n " << n;
          ASSERT_TRUE(got == v);
        }
      }
    }
  }
}

// A flipped bit anywhere: the open is refused with a sentence, or the damaged chunk is an error; never wrong data.
TEST(Store, BitFlipsAreNeverWrongData) {
  const SimOptions so = sim(3);
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  std::map<uint64_t, Bytes> want;
  {
    Harness h(dev);
    ASSERT_TRUE(h.open());
    for (uint64_t k = 0; k < 30; k++) {
      want[k] = pattern(k, 1 + k * 1111);
      ASSERT_EQ(h.put(block_key(k), want[k], Request::kDurable), 1);
      if (k == 15) {
        ASSERT_EQ(h.run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0), 0);
      }
    }
  }
  const SimImage image = dev.image();
  Rng rng(4);
  int refused = 0, lost = 0;
  for (int i = 0; i < 400; i++) {
    SimDevice bad(so, image);
    // Half of the flips in the first 1.2 MiB: superblocks and journal; half in the first megabytes of data.
    const uint64_t off = i % 2 ? rng.below(1200u << 10) : rng.below(8u << 20);
    bad.image().flip_bit(off, static_cast<unsigned>(rng.below(8)));
    Harness h(bad);
    const Status st = h.open();
    if (!st) {
      EXPECT_FALSE(st.message.empty());
      refused++;
      continue;
    }
    for (auto& [k, v] : want) {
      Bytes got;
      const int64_t r = h.get(block_key(k), 0, 100000, &got);
      if (r < 0)
        lost++;
      else
        ASSERT_TRUE(got == v) << "wrong data after a flip at " << off;
    }
  }
  EXPECT_LT(lost, 400);  // a flip costs one chunk at most
}

TEST(Store, FullDeviceRefusesThenTakesAgain) {
  SimOptions so = sim(5, 24u << 20);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  std::set<uint64_t> there;
  int64_t r = 0;
  for (uint64_t k = 0; k < 10000; k++) {
    if ((r = h.put(block_key(k), pattern(k, 16384))) != 1) break;
    there.insert(k);
  }
  EXPECT_EQ(r, -ENOSPC);
  EXPECT_GT(there.size(), 1000u);
  for (uint64_t k = 0; k < 100; k++) EXPECT_EQ(h.run(Request::Op::Delete, block_key(k), nullptr, 0, 0), 0);
  for (uint64_t k = 20000; k < 20100; k++) EXPECT_EQ(h.put(block_key(k), pattern(k, 16384)), 1);
  ASSERT_TRUE(h.store->close());
}

// Several writes at once find the device full, with nothing else going on: each gets its answer.
TEST(Store, WritesThatFillTheDeviceAllEnd) {
  for (uint64_t seed = 0; seed < 20; seed++) {
    SimOptions so = sim(seed, (24u << 20) + (seed % 8 << 20));
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev, {.memory_bytes = 0, .lazy_ms = 1});
    ASSERT_TRUE(h.open());
    constexpr int kAtOnce = 16;
    constexpr uint32_t kLen = 65536;
    Mem m(kLen);
    std::memset(m.get(), int(seed), kLen);
    uint64_t key = 0;
    for (bool full = false; !full;) {
      Request r[kAtOnce];
      int left = kAtOnce;
      for (Request& q : r) {
        q.op = Request::Op::Write;
        q.key = block_key(key++);
        q.len = seed % 2 ? kLen : kLen - uint32_t(key % 13) * 4096;
        q.mem = {m.get(), -1};
        q.owner = &left;
        q.done = [](Request* x) { --*static_cast<int*>(x->owner); };
        h.store->submit(&q);
      }
      SCOPED_TRACE(testing::Message() << "seed " << seed << ", key " << key);
      h.until([&] { return left == 0; });
      for (Request& q : r) full = full || q.result == -ENOSPC;
    }
    ASSERT_TRUE(h.store->close());
  }
}

TEST(Store, CacheBlocksMakeRoomDurableOnesStay) {
  SimOptions so = sim(6, 24u << 20);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  for (uint64_t k = 0; k < 200; k++) ASSERT_EQ(h.put(block_key(k, 2), pattern(k, 16384)), 1);
  const uint64_t hot = 5;
  for (uint64_t k = 0; k < 5000; k++) {
    ASSERT_EQ(h.put(block_key(k, 1), pattern(k, 16384), Request::kEvictable), 1) << k;
    Bytes got;
    if (k >= hot) {
      ASSERT_EQ(h.get(block_key(hot, 1), 0, 16384, &got), 16384)
          << "a block read all the time was evicted by a scan at " << k;
    }
  }
  EXPECT_GT(h.store->stats().evictions, 3000u);
  for (uint64_t k = 0; k < 200; k++) {
    Bytes got;
    ASSERT_EQ(h.get(block_key(k, 2), 0, 16384, &got), 16384);
  }
  ASSERT_TRUE(h.store->close());
}

// A store that is nine tenths full of chunks of many sizes goes on taking puts as long as it has free space.
TEST(Store, FragmentationDoesNotRefuseWrites) {
  SimOptions so = sim(8, 192u << 20);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  Rng rng(8);
  std::vector<uint64_t> there;
  uint64_t next = 0, refused = 0;
  for (int i = 0; i < 30000; i++) {
    const StoreStats st = h.store->stats();
    const bool full = st.slot_bytes > st.capacity_bytes * 9 / 10;
    if (full || (!there.empty() && rng.below(3) == 0)) {
      const size_t at = rng.below(there.size());
      ASSERT_EQ(h.run(Request::Op::Delete, block_key(there[at]), nullptr, 0, 0), 0);
      there[at] = there.back();
      there.pop_back();
      continue;
    }
    // The sizes drift, so that old segments hold the wrong classes.
    const uint64_t top = 2000u << (i / 5000);
    const int64_t r = h.put(block_key(next), pattern(next, 1 + rng.below(top)));
    if (r == 1) there.push_back(next);
    refused += r == -ENOSPC;
    next++;
  }
  EXPECT_EQ(refused, 0u) << "moves: " << h.store->stats().moves;
  ASSERT_TRUE(h.store->close());
}

// More size classes than segments: a put finds room by emptying a segment, whichever order the sizes come in.
TEST(Store, MoreSizesThanSegments) {
  for (int order = 0; order < 3; order++) {
    SimOptions so = sim(9, 36u << 20);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    std::map<uint64_t, Bytes> want;
    for (uint64_t i = 0; i < 200; i++) {
      const uint64_t k = order == 0 ? i : order == 1 ? 199 - i : i * 67 % 200;
      want[k] = pattern(k, 1000 + 317 * k);
      ASSERT_EQ(h.put(block_key(k), want[k]), 1) << "order " << order << ", put " << i;
    }
    for (auto& [k, v] : want) {
      Bytes got;
      ASSERT_EQ(h.get(block_key(k), 0, 1u << 20, &got), static_cast<int64_t>(v.size()));
      ASSERT_TRUE(got == v);
    }
    ASSERT_TRUE(h.store->close());
  }
}

}  // namespace
}  // namespace kvfs
