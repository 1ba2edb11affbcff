// store_crash_test.cpp: crashes of a busy store: many requests in flight at once, chunks that are moved and evicted, a
// device that is full. Every image the crash could leave must open and hold what was acknowledged.
#include <gtest/gtest.h>

#include <map>
#include <optional>

#include "../store/layout.h"
#include "sim_device.h"
#include "store_fixture.h"

namespace kvfs {
namespace {

// A value a key may have had from when its change was submitted until a later change was acknowledged as durable.
struct Change {
  size_t started;           // trace length when it was submitted
  size_t acked = SIZE_MAX;  // and when it was acknowledged as durable
  std::optional<uint64_t> seed;
  uint32_t len = 0;
};

// Requests in flight at once, one per key at a time, and the history of every key.
class Crowd {
 public:
  static constexpr unsigned kDepth = 12;
  explicit Crowd(SimDevice& dev) : h_(dev), dev_(dev) {}
  Harness& harness() { return h_; }

  // At most one request per key is in flight, so that the order of a key's changes is known.
  bool idle(uint64_t k) const {
    for (auto& s : slots_)
      if (s.busy && s.key == k) return false;
    return true;
  }
  void start(Request::Op op, uint64_t k, uint32_t len, uint64_t seed, uint8_t flags) {
    Slot* s = free_slot();
    s->busy = true;
    s->key = k;
    s->mem = std::make_unique<Mem>(std::max(len, 1u));
    const Bytes v = pattern(seed, len);
    std::copy(v.begin(), v.end(), s->mem->get());
    s->r = Request{};
    s->r.op = op;
    s->r.key = block_key(k);
    s->r.len = len;
    s->r.mem = {s->mem->get(), -1};
    s->r.flags = flags;
    s->r.owner = s;
    s->r.done = [](Request* r) { static_cast<Slot*>(r->owner)->crowd->finished(*static_cast<Slot*>(r->owner)); };
    s->crowd = this;
    auto& log = history[k];
    s->change = log.size();
    log.push_back({.started = dev_.trace().size(), .seed = {}, .len = len});
    if (op == Request::Op::Put) log.back().seed = seed;
    h_.store->submit(&s->r);
  }
  void drain() {
    for (int i = 0; busy(); i++) {
      ASSERT_LT(i, 200000) << "a request never completed";
      h_.turn();
    }
  }
  bool full() const { return busy() == kDepth; }
  std::map<uint64_t, std::vector<Change>> history;
  uint64_t refused = 0;

 private:
  struct Slot {
    Crowd* crowd = nullptr;
    bool busy = false;
    uint64_t key = 0;
    size_t change = 0;
    std::unique_ptr<Mem> mem;
    Request r;
  };
  unsigned busy() const {
    unsigned n = 0;
    for (auto& s : slots_) n += s.busy;
    return n;
  }
  Slot* free_slot() {
    for (;;) {
      for (auto& s : slots_)
        if (!s.busy) return &s;
      h_.turn();
    }
  }
  void finished(Slot& s) {
    s.busy = false;
    Change& c = history[s.key][s.change];
    const bool changed = s.r.op == Request::Op::Put ? s.r.result == 1 : s.r.result == 0;
    if (!changed) {
      // A put that found the block there, or was refused, and a delete of nothing change nothing.
      c.seed = s.change ? history[s.key][s.change - 1].seed : std::nullopt;
      c.len = s.change ? history[s.key][s.change - 1].len : 0;
      refused += s.r.result == -ENOSPC;
    } else if (s.r.flags & Request::kDurable) {
      c.acked = dev_.trace().size();
    }
  }
  Harness h_;
  SimDevice& dev_;
  Slot slots_[kDepth];
};

void expect_allowed(Harness& h, const std::map<uint64_t, std::vector<Change>>& history, size_t n, bool evictable,
                    const std::string& where) {
  for (auto& [k, log] : history) {
    Bytes got;
    const int64_t r = h.get(block_key(k), 0, 2u << 20, &got);
    ASSERT_TRUE(r >= 0 || r == -ENOENT) << where << " key " << k << ": " << r;
    size_t first = 0;
    for (size_t i = 0; i < log.size(); i++)
      if (log[i].acked <= n) first = i + 1;
    bool allowed = r < 0 && (first == 0 || evictable);
    for (size_t i = first ? first - 1 : 0; i < log.size() && log[i].started <= n; i++) {
      const Change& c = log[i];
      allowed = allowed || (r < 0 ? !c.seed : c.seed && got == pattern(*c.seed, c.len));
    }
    ASSERT_TRUE(allowed) << where << " key " << k << " has a state nobody acknowledged (" << r << ")";
  }
}

// Blocks of drifting sizes on a full device: puts wait, segments are emptied, chunks move while others are written.
TEST(StoreCrash, MovesAndManyRequestsInFlight) {
  uint64_t moves = 0;
  for (uint64_t seed = 1; seed <= 4; seed++) {
    const SimOptions so = sim(seed, 14u << 20, seed % 2 ? 512 : 4096);
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    dev.reset_trace();
    Rng rng(seed * 31);
    Crowd crowd(dev);
    ASSERT_TRUE(crowd.harness().open());
    uint64_t next = 0;
    for (int i = 0; i < 900; i++) {
      const uint8_t flags = rng.below(2) ? Request::kDurable : 0;
      const bool full = crowd.harness().store->stats().slot_bytes > (9u << 20);
      if (next > 20 && (full || rng.below(3) == 0)) {
        const uint64_t k = rng.below(next);
        if (crowd.idle(k)) crowd.start(Request::Op::Delete, k, 0, 0, flags);
      } else {
        const uint64_t top = 4000u << (i / 150);
        crowd.start(Request::Op::Put, next, static_cast<uint32_t>(1 + rng.below(top)), rng.next(), flags);
        next++;
      }
      if (rng.below(3) == 0) crowd.harness().turn();
    }
    crowd.drain();
    moves += crowd.harness().store->stats().moves;
    crowd.harness().store.reset();
    Rng crash(seed * 999);
    const size_t events = dev.trace().size();
    for (size_t n = 0; n <= events; n += 1 + crash.below(events / 25)) {
      SimDevice after(so, dev.crash_image(n, crash));
      Harness h(after);
      const Status st = h.open();
      const std::string where = "seed " + std::to_string(seed) + " crash at " + std::to_string(n);
      ASSERT_TRUE(st) << where << ": " << st.message;
      ASSERT_NO_FATAL_FAILURE(expect_allowed(h, crowd.history, n, false, where));
      ASSERT_TRUE(h.store->close()) << where;
    }
  }
  EXPECT_GT(moves, 100u) << "the workload did not make the store move chunks";
}

// Cache blocks push each other out; one that is gone is gone, one that is there has its bytes.
TEST(StoreCrash, EvictionAndManyRequestsInFlight) {
  uint64_t evictions = 0;
  for (uint64_t seed = 1; seed <= 4; seed++) {
    const SimOptions so = sim(seed, 9u << 20, seed % 2 ? 512 : 4096);
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    dev.reset_trace();
    Rng rng(seed * 37);
    Crowd crowd(dev);
    ASSERT_TRUE(crowd.harness().open());
    for (uint64_t k = 0; k < 500; k++) {
      const uint8_t flags = Request::kEvictable | (rng.below(2) ? Request::kDurable : 0);
      crowd.start(Request::Op::Put, k, static_cast<uint32_t>(1 + rng.below(60000)), rng.next(), flags);
      if (rng.below(3) == 0) crowd.harness().turn();
    }
    crowd.drain();
    evictions += crowd.harness().store->stats().evictions;
    crowd.harness().store.reset();
    Rng crash(seed * 999);
    const size_t events = dev.trace().size();
    for (size_t n = 0; n <= events; n += 1 + crash.below(events / 25)) {
      SimDevice after(so, dev.crash_image(n, crash));
      Harness h(after);
      const Status st = h.open();
      const std::string where = "seed " + std::to_string(seed) + " crash at " + std::to_string(n);
      ASSERT_TRUE(st) << where << ": " << st.message;
      ASSERT_NO_FATAL_FAILURE(expect_allowed(h, crowd.history, n, true, where));
      ASSERT_TRUE(h.store->close()) << where;
    }
  }
  EXPECT_GT(evictions, 100u);
}

// A device filled to the last slot, with so many small blocks that a checkpoint takes several segments: whenever it
// crashes, there is room for the checkpoint that recovery writes, and for the next.
TEST(StoreCrash, FullDeviceOpensAgain) {
  for (uint64_t bytes : {8u << 20, 26u << 20}) {
    const SimOptions so = sim(bytes, bytes);
    SimDevice dev(so);
    ASSERT_TRUE(Store::format(dev, kSmall));
    dev.reset_trace();
    Crowd crowd(dev);
    ASSERT_TRUE(crowd.harness().open());
    uint64_t k = 0;
    for (; crowd.refused < 50; k++) {
      ASSERT_LT(k, 100000u);
      crowd.start(Request::Op::Put, k, 1 + k % 500, k, 0);
      if (k % 7000 == 6999) crowd.start(Request::Op::Checkpoint, 1u << 30, 0, 0, 0);
    }
    crowd.drain();
    EXPECT_GT(k, bytes / 1100) << "too much is kept free";
    if (bytes > (8u << 20)) {
      EXPECT_GT(crowd.harness().store->stats().chunks, 2 * 16 * uint64_t{kPageRecords});
    }
    EXPECT_EQ(crowd.harness().run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0), 0);
    crowd.harness().store.reset();
    Rng crash(bytes);
    const size_t events = dev.trace().size();
    for (size_t n = events; n > events / 2; n -= std::min<size_t>(n, 1 + crash.below(events / 6))) {
      SimOptions quiet = so;
      quiet.record = false;
      SimDevice after(quiet, dev.crash_image(n, crash));
      Harness h(after);
      Status st = h.open();
      ASSERT_TRUE(st) << bytes << " crash at " << n << ": " << st.message;
      for (uint64_t i = 0; i < 200; i++) {
        const int64_t r = h.put(block_key(1u << 20 | i), pattern(i, 300));
        ASSERT_TRUE(r == 1 || r == -ENOSPC) << r;
      }
      h.store.reset();  // and crashes again
      st = h.open();
      ASSERT_TRUE(st) << bytes << " second crash at " << n << ": " << st.message;
      ASSERT_TRUE(h.store->close());
    }
  }
}

// A checkpoint that finds no segment refuses who waits for it. The store goes on, and makes one when there is room.
TEST(StoreCrash, CheckpointWithoutRoomIsNotTheEnd) {
  SimOptions so = sim(1, 24u << 20);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  Harness h(dev);
  ASSERT_TRUE(h.open());
  for (uint64_t k = 0; k < 200; k++) ASSERT_EQ(h.put(block_key(k), pattern(k, 16384)), 1);
  ASSERT_TRUE(h.store->close());
  h.store.reset();
  // Nothing that this program writes has no free segment: forge a superblock whose checkpoint has taken them all.
  SuperBlock sb;
  dev.image().read(0, &sb, sizeof sb);
  const Geometry geo{sb.segment_bytes, sb.segments, sb.journal_bytes};
  std::vector<bool> used(sb.segments);
  for (uint32_t i = 0; i < sb.checkpoint_segments; i++) used[sb.checkpoint_segment[i]] = true;
  std::vector<uint8_t> page(kCheckpointPage);
  dev.image().read(geo.page_off(sb.checkpoint_segment, 0), page.data(), page.size());
  const auto* rec = reinterpret_cast<const Record*>(page.data() + sizeof(PageHeader));
  for (uint32_t i = 0; i < sb.checkpoint_records; i++) used[(rec[i].loc * 512 - geo.data_off()) / geo.stride()] = true;
  for (uint32_t s = 0; s < sb.segments; s++)
    if (!used[s]) sb.checkpoint_segment[sb.checkpoint_segments++] = s;
  sb.checksum = xxh3(&sb, offsetof(SuperBlock, checksum));
  for (uint64_t off : kSuperOff) dev.image().write(off, &sb, sizeof sb);

  ASSERT_TRUE(h.open());
  EXPECT_EQ(h.store->stats().free_segments, 0u);
  EXPECT_EQ(h.run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0), -ENOSPC);
  EXPECT_EQ(h.put(block_key(1000), pattern(1, 100)), -ENOSPC);
  Bytes got;
  EXPECT_EQ(h.get(block_key(7), 0, 20000, &got), 16384);
  for (uint64_t k = 0; k < 150; k++)
    ASSERT_EQ(h.run(Request::Op::Delete, block_key(k), nullptr, 0, 0, Request::kDurable), 0);
  EXPECT_EQ(h.run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0), 0);
  EXPECT_EQ(h.put(block_key(1000), pattern(1, 100)), 1);
  ASSERT_TRUE(h.store->close());
  h.store.reset();
  ASSERT_TRUE(h.open());
  EXPECT_EQ(h.store->stats().chunks, 51u);
  EXPECT_GT(h.store->stats().free_segments, 10u);
}

// What no program of ours writes: records of more namespaces than the index can tell apart.
TEST(StoreCrash, HostileRecordsDoNotAbort) {
  // 66,000 blocks, each in a namespace of its own: more than the index can tell apart.
  SimOptions so = sim(1, 24u << 20);
  so.record = false;
  SimDevice dev(so);
  ASSERT_TRUE(Store::format(dev, kSmall));
  SuperBlock sb;
  dev.image().read(0, &sb, sizeof sb);
  const Geometry geo{sb.segment_bytes, sb.segments, sb.journal_bytes};
  constexpr uint32_t kRecords = 66000;
  sb.checkpoint_records = kRecords;
  sb.checkpoint_pages = (kRecords + kPageRecords - 1) / kPageRecords;
  sb.checkpoint_segments = (sb.checkpoint_pages + geo.pages_per_segment() - 1) / geo.pages_per_segment();
  for (uint32_t i = 0; i < sb.checkpoint_segments; i++) sb.checkpoint_segment[i] = i;
  std::vector<uint8_t> page(kCheckpointPage);
  uint32_t made = 0;
  for (uint32_t p = 0; p < sb.checkpoint_pages; p++) {
    std::fill(page.begin(), page.end(), 0);
    auto* h = reinterpret_cast<PageHeader*>(page.data());
    h->magic = kPageMagic;
    h->uuid = sb.uuid[0];
    h->generation = sb.generation;
    h->page = p;
    auto* rec = reinterpret_cast<Record*>(h + 1);
    for (; h->records < kPageRecords && made < kRecords; made++) {
      Record& r = rec[h->records++];
      r.type = Record::kPut;
      r.length = 100;
      r.key = block_key(made, made);
      r.loc = geo.segment_off(10) / 512 + made % 2000;
    }
    h->checksum = sealed_sum(h, kCheckpointPage, &PageHeader::checksum, h);
    dev.image().write(geo.page_off(sb.checkpoint_segment, p), page.data(), page.size());
  }
  sb.checksum = xxh3(&sb, offsetof(SuperBlock, checksum));
  for (uint64_t off : kSuperOff) dev.image().write(off, &sb, sizeof sb);
  Harness h(dev);
  const Status st = h.open();
  EXPECT_EQ(st.err, EUCLEAN);
  EXPECT_FALSE(st.message.empty());
}

}  // namespace
}  // namespace kvfs
