// write_back_test.cpp tests WriteBack alone, over a store on the simulated device: what is acknowledged is read, reaches the
// store, and everyone who waits is told.
#include "../server/write_back.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <map>
#include <set>

#include "../server/reactor.h"
#include "store_fixture.h"

namespace kvfs {
namespace {

constexpr uint64_t kPages = 64;  // of the budget
constexpr int kPatience = 200000;

Job waiter(Job::Type type = Job::Type::Write) {
  Job j;
  j.type = type;
  return j;
}

// Drives a WriteBack, its store and its device as the reactor does, but by hand.
struct Driver {
  explicit Driver(uint64_t seed, uint64_t pages = kPages, uint64_t bytes = 64u << 20) : dev(sim(seed, bytes)), h(dev) {
    EXPECT_TRUE(Store::format(dev, kSmall));
    EXPECT_TRUE(h.open());
    wb = std::make_unique<WriteBack>(h.store.get(), pages * kDirtyPage, WriteBack::Listener{this, landed, moved});
  }
  ~Driver() {
    Job all = waiter();
    wb->await_all(&all);
    wait([&] { return wb->empty(); });
    EXPECT_EQ(wb->dirty_bytes(), 0u);
    EXPECT_EQ(dev.changed_buffers(), 0u);
    EXPECT_EQ(dev.overlapping_writes(), 0u);
  }
  static void landed(void* self, Job* j, int64_t err) {
    ASSERT_NE(j->flushes, 0u);
    --j->flushes;
    if (err != 0) j->err = err;
    ++static_cast<Driver*>(self)->told;
  }
  static void moved(void* self, uint64_t ino) {
    auto* d = static_cast<Driver*>(self);
    d->first[ino] = d->wb->first_held(ino);
  }
  void turn() {
    wb->tick(h.now);
    h.turn();
  }
  template <typename F>
  void wait(F ended) {
    for (int i = 0; !ended(); ++i) {
      turn();
      if (i > kPatience) {
        ADD_FAILURE() << "it never ended";
        std::abort();
      }
    }
  }
  void wait_for(const Job& j) {
    wait([&] { return j.flushes == 0; });
  }
  WriteBack::Taken take(uint64_t ino, uint64_t index, uint32_t off, const Bytes& b) {
    return wb->take(ino, index, off, uint32_t(b.size()), reinterpret_cast<const char*>(b.data()), h.now);
  }
  // To the store. The error.
  int64_t flush(uint64_t ino, Job::Type type = Job::Type::Fsync) {
    Job j = waiter(type);
    wb->await_inode(ino, &j);
    wait_for(j);
    return j.err;
  }
  Bytes stored(uint64_t ino, uint64_t index) {
    Bytes b;
    h.get(file_key(ino, index), 0, kFileChunk, &b);
    return b;
  }
  SimDevice dev;
  Harness h;
  std::unique_ptr<WriteBack> wb;
  std::map<uint64_t, uint64_t> first;
  int told = 0;
};

Bytes held(const DirtyChunk& c, uint32_t off, uint32_t len) {
  Bytes b(len);
  WriteBack::overlay(c, off, len, reinterpret_cast<char*>(b.data()));
  return b;
}

Bytes slice(const Bytes& b, size_t from, size_t to) { return Bytes(b.begin() + long(from), b.begin() + long(to)); }

TEST(WriteBack, PagesGrowByWhatTouches) {
  Driver d(1);
  const Bytes b = pattern(1, 3 * kDirtyPage);
  EXPECT_EQ(d.take(1, 0, 1000, slice(b, 1000, 1100)), WriteBack::Taken::Yes);
  EXPECT_EQ(d.take(1, 0, 1100, slice(b, 1100, 1200)), WriteBack::Taken::Yes);
  EXPECT_EQ(d.take(1, 0, 900, slice(b, 900, 1000)), WriteBack::Taken::Yes);
  EXPECT_EQ(d.take(1, 0, 1201, slice(b, 1201, 1300)), WriteBack::Taken::Gap);
  EXPECT_EQ(d.take(1, 0, 800, slice(b, 800, 899)), WriteBack::Taken::Gap);
  EXPECT_EQ(d.take(1, 0, 2000, slice(b, 2000, 9000)), WriteBack::Taken::Gap) << "nothing of it is taken";
  const DirtyChunk* c = d.wb->find(1, 0);
  ASSERT_NE(c, nullptr);
  EXPECT_EQ(c->held, 1u);
  EXPECT_TRUE(WriteBack::covers(*c, 900, 300));
  EXPECT_FALSE(WriteBack::covers(*c, 899, 2));
  EXPECT_FALSE(WriteBack::covers(*c, 1199, 2));
  EXPECT_EQ(d.take(1, 0, 1200, slice(b, 1200, 9000)), WriteBack::Taken::Yes);
  EXPECT_TRUE(WriteBack::covers(*c, 900, 8100));
  EXPECT_FALSE(WriteBack::covers(*c, 900, 8101));
  EXPECT_EQ(held(*c, 900, 8100), slice(b, 900, 9000));
  Bytes around(kFileChunk, 7);
  WriteBack::overlay(*c, 0, kFileChunk, reinterpret_cast<char*>(around.data()));
  EXPECT_EQ(std::count(around.begin(), around.begin() + 900, 7), 900);
  EXPECT_EQ(std::count(around.begin() + 9000, around.end(), 7), long(kFileChunk) - 9000);
  EXPECT_EQ(d.wb->dirty_bytes(), 3u * kDirtyPage);
  EXPECT_EQ(d.flush(1), 0);
  EXPECT_EQ(d.wb->find(1, 0), nullptr);
  EXPECT_EQ(slice(d.stored(1, 0), 900, 9000), slice(b, 900, 9000));
}

TEST(WriteBack, ManyRangesGoAsOneWriteOverWhatTheStoreHas) {
  Driver d(2);
  Bytes model = pattern(2, 50000);
  ASSERT_EQ(d.h.write(file_key(1, 3), 0, model), 50000);
  model.resize(kFileChunk);
  for (const auto& [off, len] : {std::pair<uint32_t, uint32_t>{10, 20}, {8192, 4096}, {20000, 9}, {60000, 5000}}) {
    const Bytes b = pattern(off, len);
    ASSERT_EQ(d.take(1, 3, off, b), WriteBack::Taken::Yes);
    std::copy(b.begin(), b.end(), model.begin() + off);
  }
  model.resize(65000);
  const uint64_t before = d.h.store->stats().writes;
  EXPECT_EQ(d.flush(1), 0);
  EXPECT_EQ(d.h.store->stats().writes, before + 1);
  EXPECT_EQ(d.stored(1, 3), model);
}

TEST(WriteBack, AFullChunkGoesAtOnceTheRestByAge) {
  Driver d(3);
  const Bytes whole = pattern(3, kFileChunk), part = pattern(4, 100);
  ASSERT_EQ(d.take(1, 0, 0, whole), WriteBack::Taken::Yes);
  ASSERT_EQ(d.take(1, 1, 0, part), WriteBack::Taken::Yes);
  const uint64_t began = d.h.now;
  EXPECT_TRUE(d.wb->busy());
  EXPECT_EQ(d.wb->deadline_ns(), began + WriteBack::kMaxAgeNs);
  d.wait([&] { return d.wb->find(1, 0) == nullptr; });
  ASSERT_LT(d.h.now, began + WriteBack::kMaxAgeNs);
  EXPECT_EQ(d.first[1], kFileChunk);
  while (d.h.now < began + WriteBack::kMaxAgeNs) {
    EXPECT_NE(d.wb->find(1, 1), nullptr);
    EXPECT_FALSE(d.wb->find(1, 1)->flushing);
    d.turn();
  }
  d.wait([&] { return d.wb->find(1, 1) == nullptr; });
  EXPECT_EQ(d.first[1], UINT64_MAX);
  EXPECT_EQ(d.stored(1, 0), whole);
  EXPECT_EQ(d.stored(1, 1), part);
  EXPECT_EQ(d.wb->deadline_ns(), UINT64_MAX);
}

TEST(WriteBack, FirstHeldIsTheLowestChunk) {
  Driver d(4);
  const Bytes b = pattern(5, 10);
  EXPECT_EQ(d.wb->first_held(1), UINT64_MAX);
  for (uint64_t index : {5, 2, 9}) ASSERT_EQ(d.take(1, index, 0, b), WriteBack::Taken::Yes);
  ASSERT_EQ(d.take(2, 1, 0, b), WriteBack::Taken::Yes);
  EXPECT_EQ(d.wb->first_held(1), 2u * kFileChunk);
  Job j = waiter();
  d.wb->await_chunk(d.wb->find(1, 2), &j);
  d.wait_for(j);
  EXPECT_EQ(d.first[1], 5u * kFileChunk);
  EXPECT_EQ(d.first.count(2), 0u);
  d.wb->cut(1, 5 * kFileChunk + 3);
  EXPECT_EQ(d.wb->first_held(1), 5u * kFileChunk);
  EXPECT_EQ(d.wb->find(1, 9), nullptr);
  d.wb->cut(1, 0);
  EXPECT_EQ(d.first[1], UINT64_MAX);
}

// The bytes that came while the flush was under way go with another, and whoever waits for them waits for that one.
TEST(WriteBack, TheLaterBytesWin) {
  Driver d(5);
  const Bytes old = pattern(6, 6000), fresh = pattern(7, 3000);
  ASSERT_EQ(d.take(1, 0, 0, old), WriteBack::Taken::Yes);
  Job first = waiter(), second = waiter();
  d.wb->await_inode(1, &first);
  d.dev.hold(true);
  for (int i = 0; i < 5; ++i) d.turn();
  ASSERT_TRUE(d.wb->find(1, 0)->flushing);
  ASSERT_EQ(d.take(1, 0, 1000, fresh), WriteBack::Taken::Yes);
  d.wb->await_inode(1, &second);
  EXPECT_EQ(first.flushes, 1u);
  EXPECT_EQ(second.flushes, 1u);
  d.dev.hold(false);
  d.wait_for(first);
  EXPECT_EQ(second.flushes, 1u);
  d.wait_for(second);
  Bytes both = old;
  std::copy(fresh.begin(), fresh.end(), both.begin() + 1000);
  EXPECT_EQ(d.stored(1, 0), both);
}

TEST(WriteBack, AReaderKeepsWhatIsLaidOverItsBytes) {
  Driver d(6);
  const Bytes old = pattern(8, 20000), fresh = pattern(9, 5000);
  ASSERT_EQ(d.h.write(file_key(1, 0), 0, old), 20000);
  ASSERT_EQ(d.take(1, 0, 3000, fresh), WriteBack::Taken::Yes);
  DirtyChunk* c = d.wb->find(1, 0);
  WriteBack::pin(c);
  WriteBack::pin(c);
  EXPECT_EQ(d.flush(1), 0);
  ASSERT_EQ(d.wb->find(1, 0), c);
  EXPECT_EQ(held(*c, 3000, 5000), fresh);
  d.wb->unpin(c);
  ASSERT_EQ(d.wb->find(1, 0), c);
  EXPECT_EQ(held(*c, 3000, 5000), fresh);
  d.wb->unpin(c);
  EXPECT_EQ(d.wb->find(1, 0), nullptr);
  EXPECT_EQ(d.wb->dirty_bytes(), 0u);
}

// Once a chunk's bytes are in the store it may be changed there: what is kept for a reader is nobody else's any more.
TEST(WriteBack, NothingIsTakenIntoWhatIsKeptForAReader) {
  Driver d(7);
  ASSERT_EQ(d.take(1, 0, 0, pattern(10, 5000)), WriteBack::Taken::Yes);
  DirtyChunk* c = d.wb->find_newer(1, 0);
  ASSERT_NE(c, nullptr);
  WriteBack::pin(c);
  EXPECT_EQ(d.flush(1), 0);
  EXPECT_EQ(d.wb->find_newer(1, 0), nullptr) << "a read is the store's alone";
  Bytes direct = pattern(11, kFileChunk);
  ASSERT_EQ(d.h.write(file_key(1, 0), 0, direct), int64_t(kFileChunk));
  const Bytes late = pattern(12, 10);
  EXPECT_EQ(d.take(1, 0, 100, late), WriteBack::Taken::Gap);
  EXPECT_EQ(d.take(1, 0, 50000, late), WriteBack::Taken::Gap);
  d.wb->unpin(c);
  EXPECT_EQ(d.take(1, 0, 100, late), WriteBack::Taken::Yes);
  EXPECT_EQ(d.flush(1), 0);
  std::copy(late.begin(), late.end(), direct.begin() + 100);
  EXPECT_EQ(d.stored(1, 0), direct);
}

// A flush with holes is made over the store's bytes: a write or a truncation that is under way there comes first.
TEST(WriteBack, AFlushWithHolesUndoesNothing) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Driver d(100 + seed);
    Bytes model = pattern(seed, kFileChunk);
    ASSERT_EQ(d.h.write(file_key(1, 0), 0, model), int64_t(kFileChunk));
    Request r;
    Mem m(kFileChunk);
    Bytes direct = pattern(seed + 1000, 20000);
    memcpy(m.get(), direct.data(), direct.size());
    r.key = file_key(1, 0);
    bool done = false;
    r.owner = &done;
    r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
    if (seed % 2 == 0) {
      r.op = Request::Op::Write;
      r.off = 30000;
      r.len = 20000;
      r.mem = {m.get(), -1};
      std::copy(direct.begin(), direct.end(), model.begin() + 30000);
    } else {
      r.op = Request::Op::Truncate;
      r.off = 30000;
      model.resize(30000);
    }
    d.h.store->submit(&r);
    for (uint32_t off : {100, 10000}) {
      const Bytes b = pattern(off, 50);
      ASSERT_EQ(d.take(1, 0, off, b), WriteBack::Taken::Yes);
      std::copy(b.begin(), b.end(), model.begin() + off);
    }
    Job j = waiter(Job::Type::Fsync);
    d.wb->await_inode(1, &j);
    d.wait([&] { return done && j.flushes == 0; });
    ASSERT_GE(r.result, 0);
    ASSERT_EQ(j.err, 0);
    ASSERT_EQ(d.stored(1, 0), model) << seed;
  }
}

TEST(WriteBack, CutForgetsAndTellsWhoWaits) {
  Driver d(8);
  const Bytes b = pattern(13, 20000);
  ASSERT_EQ(d.take(1, 0, 0, b), WriteBack::Taken::Yes);
  ASSERT_EQ(d.take(1, 1, 0, b), WriteBack::Taken::Yes);
  Job all = waiter(Job::Type::Fsync);
  d.wb->await_inode(1, &all);
  EXPECT_EQ(all.flushes, 2u);
  d.wb->cut(1, 5000);
  EXPECT_EQ(all.flushes, 1u) << "nothing is left of the second chunk";
  EXPECT_EQ(d.wb->dirty_bytes(), 2u * kDirtyPage);
  d.wait_for(all);
  EXPECT_EQ(all.err, 0);
  EXPECT_EQ(d.stored(1, 0), slice(b, 0, 5000));
  EXPECT_TRUE(d.stored(1, 1).empty());
  ASSERT_EQ(d.take(1, 0, 0, b), WriteBack::Taken::Yes);
  d.wb->cut(1, 0);
  EXPECT_TRUE(d.wb->empty());
  EXPECT_EQ(d.wb->deadline_ns(), UINT64_MAX);
}

TEST(WriteBack, AWriteWithoutRoomIsWoken) {
  Driver d(9);
  const Bytes b = pattern(14, kDirtyPage);
  for (uint64_t i = 0; i < kPages; ++i) ASSERT_EQ(d.take(i, 0, 0, b), WriteBack::Taken::Yes);
  EXPECT_EQ(d.wb->dirty_bytes(), kPages * kDirtyPage);
  EXPECT_EQ(d.take(1000, 0, 0, b), WriteBack::Taken::NoRoom);
  EXPECT_EQ(d.wb->find(1000, 0), nullptr);
  EXPECT_EQ(d.take(3, 0, 10, slice(b, 0, 100)), WriteBack::Taken::Yes) << "needs none";
  Job one = waiter(), two = waiter();
  d.wb->await_room(&one);
  d.wb->await_room(&two);
  const uint64_t began = d.h.now;
  d.wait_for(one);
  d.wait_for(two);
  EXPECT_LT(d.h.now, began + WriteBack::kMaxAgeNs) << "memory that runs short is reason enough";
  EXPECT_EQ(d.take(1000, 0, 0, b), WriteBack::Taken::Yes);
}

TEST(WriteBack, WithLessMemoryThanAChunkNothingIsTaken) {
  Driver d(10, kChunkPages - 1);
  EXPECT_FALSE(d.wb->safe());
  Driver enough(11, kChunkPages);
  EXPECT_TRUE(enough.wb->safe());
  EXPECT_EQ(enough.take(1, 0, 0, pattern(1, kFileChunk)), WriteBack::Taken::Yes);
}

TEST(WriteBack, AnErrorIsToldOnce) {
  for (const bool base : {false, true}) {
    Driver d(12);
    ASSERT_EQ(d.h.write(file_key(1, 0), 0, pattern(15, kFileChunk)), int64_t(kFileChunk));
    auto dirty = [&] {
      ASSERT_EQ(d.take(1, 0, 0, pattern(16, 100)), WriteBack::Taken::Yes);
      ASSERT_EQ(d.take(1, 0, 9000, pattern(16, 100)), WriteBack::Taken::Yes);
      d.dev.add_fault({.op = base ? Io::Op::Read : Io::Op::Write, .count = 1, .err = EIO});
    };
    dirty();
    EXPECT_EQ(d.flush(1), -EIO) << "to the fsync that waits";
    EXPECT_EQ(d.wb->take_error(1), 0);
    EXPECT_TRUE(d.wb->empty()) << "the pages are free";
    dirty();
    EXPECT_EQ(d.flush(1, Job::Type::Land), -EIO);
    EXPECT_EQ(d.wb->take_error(2), 0);
    EXPECT_EQ(d.wb->take_error(1), -EIO) << "or to the next one";
    EXPECT_EQ(d.wb->take_error(1), 0);
    EXPECT_EQ(d.wb->lost(), 2u);
    EXPECT_EQ(d.flush(1), 0);
  }
}

TEST(WriteBack, BytesThatCameMeanwhileOutliveAFailedFlush) {
  Driver d(13);
  const Bytes old = pattern(17, 200), fresh = pattern(18, 100);
  ASSERT_EQ(d.take(1, 0, 0, old), WriteBack::Taken::Yes);
  d.dev.add_fault({.op = Io::Op::Write, .count = 1, .err = EIO});
  Job first = waiter(Job::Type::Fsync), second = waiter(Job::Type::Fsync);
  d.wb->await_inode(1, &first);
  d.dev.hold(true);
  for (int i = 0; i < 5; ++i) d.turn();
  ASSERT_EQ(d.take(1, 0, 100, fresh), WriteBack::Taken::Yes);
  d.wb->await_inode(1, &second);
  d.dev.hold(false);
  d.wait_for(first);
  d.wait_for(second);
  EXPECT_EQ(first.err, -EIO);
  EXPECT_EQ(second.err, 0);
  EXPECT_EQ(slice(d.stored(1, 0), 100, 200), fresh);
}

TEST(WriteBack, AFullDeviceIsToldAndNothingHangs) {
  Driver d(14);
  EXPECT_TRUE(d.wb->safe());
  uint64_t n = 0;
  const Bytes large = pattern(1, 256 << 10), small = pattern(2, 4 << 10);
  while (d.h.put(block_key(++n), large) == 1) {
  }
  EXPECT_FALSE(d.wb->safe());
  while (d.h.put(block_key(++n), small) == 1) {
  }
  const Bytes b = pattern(19, kFileChunk);
  Job room = waiter();
  bool waits = false;
  for (uint64_t i = 0; i < 40 && !waits; ++i) {
    const auto taken = d.take(1, i, 0, b);
    ASSERT_NE(taken, WriteBack::Taken::Gap);
    if (taken == WriteBack::Taken::NoRoom) {
      d.wb->await_room(&room);
      waits = true;
    }
  }
  ASSERT_TRUE(waits);
  d.wait_for(room);
  d.flush(1);
  EXPECT_NE(d.wb->lost(), 0u);
  EXPECT_TRUE(d.wb->empty());
  ASSERT_EQ(d.take(2, 0, 0, b), WriteBack::Taken::Yes);
  EXPECT_EQ(d.flush(2), -ENOSPC);
}

// ---- everything at once, against a model

constexpr uint64_t kInos = 2, kChunks = 3;

class Random {
 public:
  explicit Random(uint64_t seed) : d_(seed), rng_(seed * 77) {
    for (auto& chunk : model_) chunk.resize(kFileChunk);
  }
  void run(int steps) {
    for (int i = 0; i < steps && !::testing::Test::HasFailure(); ++i) {
      const uint64_t what = rng_.below(100);
      if (what < 40) {
        write();
      } else if (what < 60) {
        start_read();
      } else if (what < 68) {
        start_direct();
      } else if (what < 71) {
        truncate();
      } else if (what < 74) {
        sync();
      } else if (what < 76) {
        d_.dev.hold(rng_.below(2) == 0);
      } else {
        turn();
      }
    }
    d_.dev.hold(false);
    sync();
  }

 private:
  struct Async {
    Random* self;
    uint64_t n, index;  // which chunk of the model
    Request req;
    std::unique_ptr<Mem> mem;
    DirtyChunk* pinned = nullptr;
    std::vector<Bytes> versions;  // of its bytes, since it began
    uint32_t checked = kFileChunk;
    bool done = false;
  };
  Bytes& chunk(uint64_t ino, uint64_t index) { return model_[ino * kChunks + index]; }
  void turn() {
    d_.turn();
    for (auto i = reads_.begin(); i != reads_.end();) i = i->done ? reads_.erase(i) : std::next(i);
    for (auto i = directs_.begin(); i != directs_.end();) i = i->done ? directs_.erase(i) : std::next(i);
  }
  template <typename F>
  void until(F ended) {
    d_.dev.hold(false);
    for (int i = 0; !ended(); ++i) {
      turn();
      ASSERT_LT(i, kPatience);
    }
  }
  bool direct_on(uint64_t n, uint32_t off, uint32_t len) {
    return std::any_of(directs_.begin(), directs_.end(), [&](const Async& a) {
      return a.n == n && off < a.req.off + a.req.len && a.req.off < off + len;
    });
  }
  void changed(uint64_t n) {
    for (Async& a : reads_) {
      if (a.n == n) a.versions.push_back(slice(model_[n], a.req.off, a.req.off + a.req.len));
    }
  }
  void range(uint32_t* off, uint32_t* len) {
    static constexpr uint32_t kSizes[] = {1, 40, 4095, 4096, 4097, 9000, kFileChunk};
    *len = kSizes[rng_.below(7)];
    *off = rng_.below(3) == 0 ? uint32_t(rng_.below(kChunkPages)) * kDirtyPage : uint32_t(rng_.below(kFileChunk));
    if (*off + *len > kFileChunk) *off = kFileChunk - *len;
  }
  void write() {
    const uint64_t ino = rng_.below(kInos), index = rng_.below(kChunks), n = ino * kChunks + index;
    uint32_t off, len;
    range(&off, &len);
    if (direct_on(n, off, len)) return;  // which of the two wins is open
    const Bytes b = pattern(rng_.next(), len);
    for (;;) {
      const auto taken = d_.take(ino, index, off, b);
      if (taken == WriteBack::Taken::Yes) break;
      Job j = waiter();
      if (taken == WriteBack::Taken::NoRoom) {
        d_.wb->await_room(&j);
      } else {
        d_.wb->await_chunk(d_.wb->find(ino, index), &j);
        if (j.flushes == 0) {  // kept for readers only
          ASSERT_EQ(d_.h.write(file_key(ino, index), off, b), int64_t(len));
          break;
        }
      }
      until([&] { return j.flushes == 0; });
    }
    std::copy(b.begin(), b.end(), chunk(ino, index).begin() + off);
    changed(n);
  }
  // Straight to the store, as a whole chunk or a durable write goes.
  void start_direct() {
    const uint64_t ino = rng_.below(kInos), index = rng_.below(kChunks), n = ino * kChunks + index;
    uint32_t off, len;
    range(&off, &len);
    if (direct_on(n, off, len)) return;
    for (DirtyChunk* c; (c = d_.wb->find(ino, index)) != nullptr;) {
      Job j = waiter();
      d_.wb->await_chunk(c, &j);
      if (j.flushes == 0) break;
      until([&] { return j.flushes == 0; });
    }
    Async& a = directs_.emplace_back();
    begin(&a, n, Request::Op::Write, ino, index, off, len);
    const Bytes b = pattern(rng_.next(), len);
    memcpy(a.mem->get(), b.data(), len);
    a.versions.push_back(b);
    a.req.done = [](Request* r) {
      auto* a = static_cast<Async*>(r->owner);
      a->done = true;
      ASSERT_EQ(r->result, int64_t(r->len));
      // Readers may have seen it before: they accept both.
      std::copy(a->versions[0].begin(), a->versions[0].end(), a->self->model_[a->n].begin() + r->off);
      a->self->changed(a->n);
    };
    for (Async& r : reads_) {
      if (r.n == n) with_direct(&r, a);
    }
    d_.h.store->submit(&a.req);
  }
  static void with_direct(Async* read, const Async& direct) {
    Bytes b = read->versions.back();
    for (uint32_t i = 0; i < read->req.len; ++i) {
      const uint32_t at = read->req.off + i;
      if (at >= direct.req.off && at < direct.req.off + direct.req.len) b[i] = direct.versions[0][at - direct.req.off];
    }
    read->versions.push_back(b);
  }
  void begin(Async* a, uint64_t n, Request::Op op, uint64_t ino, uint64_t index, uint32_t off, uint32_t len) {
    a->self = this;
    a->n = n;
    a->index = index;
    a->mem = std::make_unique<Mem>(len);
    a->req.op = op;
    a->req.key = file_key(ino, index);
    a->req.off = off;
    a->req.len = len;
    a->req.mem = {a->mem->get(), -1};
    a->req.owner = a;
  }
  // As the reactor reads: from what is held, or from the store with what is held laid over it.
  void start_read() {
    const uint64_t ino = rng_.below(kInos), index = rng_.below(kChunks), n = ino * kChunks + index;
    uint32_t off, len;
    range(&off, &len);
    DirtyChunk* c = d_.wb->find_newer(ino, index);
    if (c != nullptr && WriteBack::covers(*c, off, len)) {
      if (!direct_on(n, off, len)) {
        ASSERT_EQ(held(*c, off, len), slice(chunk(ino, index), off, off + len));
      }
      return;
    }
    if (reads_.size() >= 8) return;
    Async& a = reads_.emplace_back();
    begin(&a, n, Request::Op::Get, ino, index, off, len);
    a.versions.push_back(slice(chunk(ino, index), off, off + len));
    for (const Async& w : directs_) {
      if (w.n == n) with_direct(&a, w);
    }
    memset(a.mem->get(), 0, len);
    a.pinned = c;
    if (c != nullptr) WriteBack::pin(c);
    a.req.done = [](Request* r) {
      auto* a = static_cast<Async*>(r->owner);
      a->done = true;
      ASSERT_TRUE(r->result >= 0 || r->result == -ENOENT) << r->result;
      if (a->pinned != nullptr) {
        WriteBack::overlay(*a->pinned, r->off, r->len, reinterpret_cast<char*>(a->mem->get()));
        a->self->d_.wb->unpin(a->pinned);
      }
      for (uint32_t i = 0; i < r->len && r->off + i < a->checked; ++i) {
        ASSERT_TRUE(std::any_of(a->versions.begin(), a->versions.end(),
                                [&](const Bytes& v) { return v[i] == a->mem->get()[i]; }))
            << "byte " << r->off + i << " is older than the read";
      }
    };
    d_.h.store->submit(&a.req);
  }
  // As the reactor does, with flushes of what stays under way meanwhile.
  void truncate() {
    until([&] { return directs_.empty(); });
    const uint64_t ino = rng_.below(kInos), size = rng_.below(kChunks * kFileChunk);
    for (;;) {
      Job j = waiter();
      d_.wb->await_flights(ino, size / kFileChunk, &j);
      if (j.flushes == 0) break;
      until([&] { return j.flushes == 0; });
    }
    d_.wb->cut(ino, size);
    for (uint64_t index = size / kFileChunk; index < kChunks; ++index) {
      const uint32_t from = index == size / kFileChunk ? uint32_t(size % kFileChunk) : 0;
      Async& a = directs_.emplace_back();
      begin(&a, ino * kChunks + index, from == 0 ? Request::Op::Delete : Request::Op::Truncate, ino, index, from, 0);
      a.req.mem = MemRef{};
      a.req.done = [](Request* r) {
        static_cast<Async*>(r->owner)->done = true;
        ASSERT_TRUE(r->result == 0 || r->result == -ENOENT) << r->result;
      };
      std::fill(chunk(ino, index).begin() + from, chunk(ino, index).end(), uint8_t(0));
      for (Async& r : reads_) {
        if (r.n == a.n) r.checked = std::min(r.checked, from);  // the reader raced the truncation
      }
      d_.h.store->submit(&a.req);
    }
    if (rng_.below(2) == 0) d_.wb->kick(ino);
    until([&] { return directs_.empty(); });
  }
  void sync() {
    until([&] { return directs_.empty() && reads_.empty(); });
    Job j = waiter(Job::Type::Sync);
    d_.wb->await_all(&j);
    until([&] { return j.flushes == 0; });
    ASSERT_EQ(j.err, 0);
    ASSERT_TRUE(d_.wb->empty());
    for (uint64_t ino = 0; ino < kInos; ++ino) {
      for (uint64_t index = 0; index < kChunks; ++index) {
        Bytes b = d_.stored(ino, index);
        b.resize(kFileChunk);
        ASSERT_EQ(b, chunk(ino, index)) << ino << "/" << index;
      }
    }
  }

  Driver d_;
  Rng rng_;
  std::array<Bytes, kInos * kChunks> model_;
  std::list<Async> reads_, directs_;
};

TEST(WriteBack, AgainstAModel) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(seed);
    Random(seed).run(600);
    if (HasFailure()) return;
  }
}

}  // namespace
}  // namespace kvfs
