// evict_test.cpp: the eviction of cache blocks against LRU, FIFO and a textbook S3-FIFO, on synthetic traces and, where the
// environment names one (KVFS_TEST_TRACE, a Mooncake trace), on the references of real requests.
#include "../store/evict.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <list>
#include <string>
#include <unordered_map>

#include "store_fixture.h"

namespace kvfs {
namespace {

using Trace = std::vector<uint32_t>;

double lru(const Trace& trace, size_t capacity, bool fifo) {
  std::list<uint32_t> order;  // newest first
  std::unordered_map<uint32_t, std::list<uint32_t>::iterator> where;
  uint64_t hits = 0;
  for (uint32_t k : trace) {
    const auto it = where.find(k);
    if (it != where.end()) {
      hits++;
      if (!fifo) order.splice(order.begin(), order, it->second);
      continue;
    }
    order.push_front(k);
    where[k] = order.begin();
    if (order.size() <= capacity) continue;
    where.erase(order.back());
    order.pop_back();
  }
  return static_cast<double>(hits) / static_cast<double>(trace.size());
}

// Algorithm 1 of "FIFO queues are all you need for cache eviction" (SOSP '23), promotion at the first re-reference, and a
// small queue of three tenths.
double reference(const Trace& trace, size_t capacity) {
  struct Node {
    uint32_t freq = 0;
    bool there = false;
  };
  std::unordered_map<uint32_t, Node> nodes;
  std::list<uint32_t> small, main, ghost;  // newest first
  std::unordered_map<uint32_t, uint32_t> in_ghost;
  uint64_t hits = 0;
  const auto evict = [&] {
    for (;;) {
      if (small.size() > capacity * 3 / 10 || main.empty()) {
        const uint32_t k = small.back();
        small.pop_back();
        Node& n = nodes[k];
        if (n.freq > 0) {
          n.freq = 0;
          main.push_front(k);
          continue;
        }
        n.there = false;
        ghost.push_front(k);
        in_ghost[k]++;
        if (ghost.size() > capacity) {
          if (--in_ghost[ghost.back()] == 0) in_ghost.erase(ghost.back());
          ghost.pop_back();
        }
        return;
      }
      const uint32_t k = main.back();
      main.pop_back();
      Node& n = nodes[k];
      if (n.freq > 0) {
        n.freq--;
        main.push_front(k);
        continue;
      }
      n.there = false;
      return;
    }
  };
  for (uint32_t k : trace) {
    Node& n = nodes[k];
    if (n.there) {
      hits++;
      n.freq = std::min(n.freq + 1, 3u);
      continue;
    }
    if (small.size() + main.size() >= capacity) evict();
    n = {0, true};
    (in_ghost.contains(k) ? main : small).push_front(k);
  }
  return static_cast<double>(hits) / static_cast<double>(trace.size());
}

// batch: how far below the capacity one eviction goes, as the watermarks of the store do.
double ours(const Trace& trace, size_t capacity, size_t batch) {
  Index index(1);
  Evictor evictor(index);
  uint64_t hits = 0;
  for (uint32_t k : trace) {
    const ChunkKey key = block_key(k);
    if (Entry* e = index.find(key)) {
      hits++;
      Evictor::touched(*e);
      continue;
    }
    if (index.size() >= capacity) {
      while (index.size() + batch >= capacity && index.size() > 0) {
        uint32_t budget = 1u << 24;
        const uint32_t id = evictor.next(&budget, [](const ChunkKey&) { return false; });
        if (id == 0) {
          ADD_FAILURE() << "nothing to evict";
          return 0;
        }
        evictor.removed(id);
        index.erase(id);
      }
    }
    const uint32_t id = index.insert(key);
    index.at(id).set_len(1);
    evictor.added(id, key);
  }
  EXPECT_EQ(evictor.small_bytes() + evictor.main_bytes(), index.size());
  return static_cast<double>(hits) / static_cast<double>(trace.size());
}

struct Rates {
  double lru, fifo, reference, one, batched;
};

Rates compare(const char* name, const Trace& trace, size_t capacity) {
  const Rates r{lru(trace, capacity, false), lru(trace, capacity, true), reference(trace, capacity),
                ours(trace, capacity, 1), ours(trace, capacity, std::max<size_t>(1, capacity * 3 / 100))};
  printf("%-28s %7zu blocks: LRU %.4f  FIFO %.4f  S3-FIFO %.4f  ours one by one %.4f, in batches %.4f\n", name,
         capacity, r.lru, r.fifo, r.reference, r.one, r.batched);
  return r;
}

// Zipf over `keys`, with a scan of new keys after every 2000 (0: none).
Trace zipf(uint32_t keys, double skew, size_t n, size_t scan, uint64_t seed) {
  std::vector<double> cumulative;
  double sum = 0;
  for (uint32_t i = 1; i <= keys; i++) cumulative.push_back(sum += 1 / std::pow(i, skew));
  Rng rng(seed);
  Trace t;
  uint32_t fresh = keys;
  while (t.size() < n) {
    for (int i = 0; i < 2000; i++) {
      const double u = static_cast<double>(rng.next() >> 11) / 9007199254740992.0 * sum;
      t.push_back(
          static_cast<uint32_t>(std::lower_bound(cumulative.begin(), cumulative.end(), u) - cumulative.begin()));
    }
    for (size_t i = 0; i < scan; i++) t.push_back(fresh++);
  }
  return t;
}

TEST(Evict, AsGoodAsTheReferenceOnSyntheticTraces) {
  struct Case {
    const char* name;
    double skew;
    size_t scan;
  };
  for (const Case& c :
       {Case{"zipf 0.9", 0.9, 0}, Case{"zipf 0.9 and scans", 0.9, 1500}, Case{"zipf 0.6 and scans", 0.6, 500}}) {
    const Trace t = zipf(30000, c.skew, 300000, c.scan, 7);
    for (size_t capacity : {3000u, 9000u}) {
      const Rates r = compare(c.name, t, capacity);
      EXPECT_GT(r.one, r.reference * 0.97) << c.name;
      EXPECT_GT(r.batched, r.reference * 0.95) << c.name;
      EXPECT_GT(r.batched, r.fifo) << c.name;
      if (c.scan) {
        EXPECT_GT(r.batched, r.lru) << c.name;
      }
    }
  }
}

TEST(Evict, ARealTrace) {
  const char* path = getenv("KVFS_TEST_TRACE");
  if (!path) GTEST_SKIP() << "KVFS_TEST_TRACE names no trace";
  std::ifstream in(path);
  ASSERT_TRUE(in) << path;
  Trace t;
  uint32_t distinct = 0;
  for (std::string line; std::getline(in, line);) {
    const size_t at = line.find("\"hash_ids\": [");
    ASSERT_NE(at, std::string::npos);
    const char* p = line.c_str() + at + 13;
    while (*p != ']') {
      char* end;
      t.push_back(static_cast<uint32_t>(strtoul(p, &end, 10)));
      distinct = std::max(distinct, t.back() + 1);
      p = *end == ',' ? end + 1 : end;
    }
  }
  printf("%zu references, %u blocks\n", t.size(), distinct);
  for (size_t percent : {10u, 30u}) {
    const Rates r = compare(percent == 10 ? "trace, 10 %" : "trace, 30 %", t, distinct * percent / 100);
    EXPECT_GT(r.batched, r.fifo);
    EXPECT_GT(r.batched, r.lru * 0.95);
    EXPECT_GT(r.batched, r.reference * 0.95);
  }
}

// In a store full of cache blocks room is made before it is needed: puts of blocks of one size never wait, and of mixed
// sizes one in a thousand at most does (for a segment to be emptied by moving).
TEST(Evict, PutsIntoAFullStoreDoNotWait) {
  for (uint32_t bytes : {4096u, 16384u, 100000u, 600000u, 0u}) {
    SimOptions so = sim(1, 128u << 20);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    Rng rng(bytes);
    uint64_t most = 0;
    const uint64_t total = 512u << 20;
    for (uint64_t put = 0, k = 0; put < total; k++) {
      const uint64_t n = bytes ? bytes : 4096 << rng.below(6);
      const Bytes v(n, static_cast<uint8_t>(k));
      const uint64_t before = dev.flushes(), waits = h.store->stats().space_waits;
      ASSERT_EQ(h.put(block_key(k), v, Request::kEvictable), 1) << bytes << " " << k;
      if (h.store->stats().space_waits > waits) most = std::max(most, dev.flushes() - before);
      put += n;
    }
    const StoreStats st = h.store->stats();
    printf("%6u bytes: %lu puts, %lu evictions, %lu waits, at most %lu barriers in one, %.1f %% full\n", bytes, st.puts,
           st.evictions, st.space_waits, most,
           100.0 * static_cast<double>(st.slot_bytes) / static_cast<double>(st.capacity_bytes));
    EXPECT_LE(st.space_waits, bytes ? 0 : st.puts / 1000);
    EXPECT_GT(st.slot_bytes, st.capacity_bytes / 2);
    ASSERT_TRUE(h.store->close());
  }
}

// More sizes than segments, all in flight together: those that wait find room once the others can be moved.
TEST(Evict, ManySizesAtOnceWaitForEachOther) {
  for (uint64_t seed = 1; seed <= 5; seed++) {
    SimOptions so = sim(seed, 36u << 20);
    so.record = false;
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    std::vector<Request> reqs(200);
    std::vector<std::unique_ptr<Mem>> mem;
    size_t done = 0;
    for (uint32_t i = 0; i < 200; i++) {
      Request& r = reqs[i];
      r.op = Request::Op::Put;
      r.key = block_key(i);
      r.len = 1000 + 317 * i;
      mem.push_back(std::make_unique<Mem>(r.len));
      std::memset(mem.back()->get(), static_cast<int>(i), r.len);
      r.mem = {mem.back()->get(), -1};
      r.owner = &done;
      r.done = [](Request* x) { ++*static_cast<size_t*>(x->owner); };
      h.store->submit(&r);
    }
    for (int i = 0; done < 200 && i < 200000; i++) h.turn();
    ASSERT_EQ(done, 200u);
    for (const Request& r : reqs) ASSERT_EQ(r.result, 1) << "seed " << seed << ", " << r.len << " bytes";
    ASSERT_TRUE(h.store->close());
  }
}

}  // namespace
}  // namespace kvfs
