// remote_store_test.cpp tests the remote store on a simulated network: what requests become, limits, choice of rails, the
// start, the map. What it does when servers and connections fail is in remote_failure_test.cpp.
#include "../remote/remote_store.h"

#include <algorithm>
#include <set>

#include "../include/kvfs_ring.h"
#include "remote_sim.h"

namespace kvfs {
namespace {

// ---- what requests become

TEST(RemoteStore, BlocksAndFilesSpreadOverAllTargetsAndComeBack) {
  RemoteHarness h(3);
  ASSERT_EQ(h.store->start().err, 0);
  EXPECT_TRUE(h.store->remote());
  for (uint64_t n = 1; n <= 60; ++n) {
    const Bytes v = pattern(n, 100 * n);
    ASSERT_EQ(h.put(block_key(n, kNs), v), 1);
    ASSERT_EQ(h.put(block_key(n, kNs), v), 0);
    ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 7)), -EEXIST);
    ASSERT_EQ(h.write(file_key(9, n), 0, v), int64_t(v.size()));
    Bytes got(v.size());
    ASSERT_EQ(h.run(Request::Op::Get, block_key(n, kNs), got.data(), 0, uint32_t(got.size())), int64_t(v.size()));
    EXPECT_EQ(got, v);
    ASSERT_EQ(h.run(Request::Op::Get, file_key(9, n), got.data(), 10, uint32_t(got.size())), int64_t(v.size() - 10));
    EXPECT_TRUE(std::equal(v.begin() + 10, v.end(), got.begin()));
    EXPECT_EQ(h.run(Request::Op::Lookup, block_key(n, kNs)), int64_t(v.size()));
    EXPECT_EQ(h.run(Request::Op::Get, block_key(n, kNs)), 0) << "a read of no bytes asks for existence";
  }
  for (const auto& s : h.net->servers) EXPECT_GT(s->mem.size(), 10u);
  for (const auto& s : h.net->servers) {
    for (const auto& [name, bytes] : s->mem) {
      const auto* k = reinterpret_cast<const ChunkKey*>(name.data());
      EXPECT_EQ(k->ns, k->kind == Kind::File ? kFileNs : kNs);
    }
  }
  EXPECT_EQ(h.run(Request::Op::Truncate, file_key(9, 5), nullptr, 3), 0);
  Bytes got(10);
  EXPECT_EQ(h.run(Request::Op::Get, file_key(9, 5), got.data(), 0, 10), 3);
  EXPECT_EQ(h.run(Request::Op::Delete, block_key(1, kNs)), 0);
  EXPECT_EQ(h.run(Request::Op::Delete, block_key(1, kNs)), -ENOENT);
  EXPECT_EQ(h.run(Request::Op::Lookup, block_key(1, kNs)), -ENOENT);
  EXPECT_EQ(h.run(Request::Op::Get, block_key(1, kNs), got.data(), 0, 10), -ENOENT);
  EXPECT_EQ(h.store->lookup(block_key(2, kNs), nullptr), -ENOENT);
}

TEST(RemoteStore, WrongRequestsAreRefusedHere) {
  RemoteHarness h(1, 1, 1, [](RemoteOptions* o) { o->file_ns = 0; });
  ASSERT_EQ(h.store->start().err, 0);
  Bytes v(16);
  EXPECT_EQ(h.write(file_key(1, 0), 0, v), -EOPNOTSUPP);
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(1, 0)), -EOPNOTSUPP);
  EXPECT_EQ(h.put(ChunkKey{}, v), -EINVAL);
  EXPECT_EQ(h.run(Request::Op::Scan, block_key(1, kNs), v.data(), 0, 16), -EINVAL);
  EXPECT_EQ(h.run(Request::Op::Checkpoint, ChunkKey{}), 0);
  for (const auto& s : h.net->servers) EXPECT_TRUE(s->mem.empty());
}

TEST(RemoteStore, AScanFindsEveryChunkOfAllTargetsOnce) {
  RemoteHarness h(3);
  ASSERT_EQ(h.store->start().err, 0);
  for (uint64_t n = 1; n <= 50; ++n) ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 20)), 1);
  for (uint64_t n = 1; n <= 20; ++n) ASSERT_EQ(h.write(file_key(4, n), 0, pattern(n, 30)), 30);
  for (const Kind kind : {Kind::Block, Kind::File}) {
    std::set<std::string> found;
    uint64_t cursor = 0;
    for (int step = 0; cursor != UINT64_MAX; ++step) {
      ASSERT_LT(step, 100);
      ChunkKey from;
      from.kind = kind;
      from.ns = kind == Kind::Block ? kNs : 0;
      std::memcpy(from.id, &cursor, sizeof cursor);
      std::vector<kvfs_scan_entry> e(7);
      const int64_t n = h.run(Request::Op::Scan, from, e.data(), 0, uint32_t(e.size() * sizeof e[0]));
      ASSERT_GE(n, 0);
      if (n == 0) break;
      e.resize(size_t(n) / sizeof e[0]);
      for (const auto& x : e) EXPECT_TRUE(found.emplace(reinterpret_cast<const char*>(x.key), 32).second);
      cursor = e.back().cursor;
    }
    EXPECT_EQ(found.size(), kind == Kind::Block ? 50u : 20u);
  }
}

TEST(RemoteStore, PurgeReachesAllTargets) {
  RemoteHarness h(3);
  ASSERT_EQ(h.store->start().err, 0);
  for (uint64_t n = 0; n < 30; ++n) {
    ASSERT_EQ(h.put(block_key(n + 1, kNs), pattern(n, 20)), 1);
    ASSERT_EQ(h.write(file_key(4, n), 0, pattern(n, 30)), 30);
    ASSERT_EQ(h.write(file_key(5, n), 0, pattern(n, 30)), 30);
  }
  ChunkKey range = file_key(4, 10);
  range.key_len = 24;
  const uint64_t end = 20;
  std::memcpy(range.id + 16, &end, 8);
  EXPECT_EQ(h.run(Request::Op::Purge, range), 0);
  for (uint64_t n = 0; n < 30; ++n) {
    EXPECT_EQ(h.run(Request::Op::Lookup, file_key(4, n)), n >= 10 && n < 20 ? -ENOENT : 30);
    EXPECT_EQ(h.run(Request::Op::Lookup, file_key(5, n)), 30);
  }
  ChunkKey all;
  all.ns = kNs;
  EXPECT_EQ(h.run(Request::Op::Purge, all), 0);
  for (uint64_t n = 0; n < 30; ++n) EXPECT_EQ(h.run(Request::Op::Lookup, block_key(n + 1, kNs)), -ENOENT);
}

TEST(RemoteStore, AFlushGoesWhereTheInodeWasWrittenAndASyncEverywhere) {
  RemoteHarness h(4);
  ASSERT_EQ(h.store->start().err, 0);
  const ChunkKey k = file_key(11, 0);
  const auto ops = [&] {
    std::vector<uint64_t> v;
    for (const auto& s : h.net->servers) v.push_back(s->ops);
    return v;
  };
  ASSERT_EQ(h.write(k, 0, pattern(1, 50)), 50);
  auto before = ops();
  ASSERT_EQ(h.run(Request::Op::Flush, file_key(11, 0)), 0);
  auto after = ops();
  int asked = 0;
  for (size_t i = 0; i < after.size(); ++i) asked += after[i] != before[i];
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(h.server_of(k).disk.size(), 1u);
  before = ops();
  ASSERT_EQ(h.run(Request::Op::Flush, file_key(11, 0)), 0);
  EXPECT_EQ(ops(), before) << "nothing was written since";
  ASSERT_EQ(h.write(k, 0, pattern(2, 50), Request::kDurable), 50);
  before = ops();
  ASSERT_EQ(h.run(Request::Op::Flush, file_key(11, 0)), 0);
  EXPECT_EQ(ops(), before) << "nor anything that is not durable";
  for (uint64_t n = 0; n < 20; ++n) ASSERT_EQ(h.put(block_key(n + 1, kNs), pattern(n, 20)), 1);
  ASSERT_EQ(h.run(Request::Op::Sync, ChunkKey{}), 0);
  for (const auto& s : h.net->servers) EXPECT_EQ(s->disk, s->mem);
}

TEST(RemoteStore, ChangesOfAChunkHappenInTheOrderTheyWereAskedFor) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    RemoteHarness h(2, 2, seed);
    ASSERT_EQ(h.store->start().err, 0);
    h.net->faults.drop_before = h.net->faults.drop_after = 0.02;
    h.net->faults.latency_max_ns = 20 * kMs;
    std::vector<Async> all(60);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i].mem = pattern(seed * 1000 + i, 64);
      start(h, &all[i], Request::Op::Write, file_key(1, i % 3), 0, 64);
    }
    ASSERT_TRUE(h.until([&] { return all_done(all); }));
    for (uint64_t c = 0; c < 3; ++c) {
      Bytes got(64);
      ASSERT_EQ(h.run(Request::Op::Get, file_key(1, c), got.data(), 0, 64), 64);
      EXPECT_EQ(got, all[57 + c].mem) << "seed " << seed;
    }
  }
}

// ---- limits

TEST(RemoteStore, WhatIsSubmittedInOneTurnLeavesTogether) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  ASSERT_TRUE(h.until([&] { return h.store->peers()[0]->stat_known; }));
  const uint64_t before = h.net->frames;
  std::vector<Async> all(64);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].mem.resize(64);
    start(h, &all[i], Request::Op::Get, block_key(i + 1, kNs), 0, 64);
  }
  h.store->tick(h.net->now);
  EXPECT_LE(h.net->frames - before, 64u / 16u);
  EXPECT_TRUE(h.until([&] { return all_done(all); }));
}

// The sessions' limits are checked by the model server; the harness fails if one was exceeded.
TEST(RemoteStore, MoreThanTheLimitsWaitsAndEnds) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    RemoteHarness h(2, 2, seed, [](RemoteOptions* o) { o->peer.deadline_ns = 100 * kSecond; });
    for (auto& s : h.net->servers) s->max_ops = 8;
    ASSERT_EQ(h.store->start().err, 0);
    h.net->faults.drop_before = h.net->faults.drop_after = 0.01;
    std::vector<Async> all(1500);
    for (size_t i = 0; i < all.size(); ++i) {
      const bool put = h.net->random(2) == 0;
      all[i].mem = pattern(i, put && i % 50 == 0 ? 8u << 20 : 64);
      start(h, &all[i], put ? Request::Op::Put : Request::Op::Get, block_key(i + 1, kNs), 0,
            uint32_t(all[i].mem.size()));
    }
    ASSERT_TRUE(h.until([&] { return all_done(all); }, 1000 * kSecond));
    for (const Async& a : all) EXPECT_EQ(a.req.result, a.req.op == Request::Op::Put ? 1 : -ENOENT);
  }
}

TEST(RemoteStore, TheWindowBoundsWhatAllServersTogetherMaySend) {
  RemoteHarness h(16, 1, 1, [](RemoteOptions* o) { o->window = 4u << 20; });
  ASSERT_EQ(h.store->start().err, 0);
  std::vector<Async> all(200);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].mem.resize(1u << 20);
    start(h, &all[i], Request::Op::Get, block_key(i + 1, kNs), 0, 1u << 20);
  }
  ASSERT_TRUE(h.until([&] { return all_done(all); }));
  EXPECT_LE(h.net->gets_max, 4u << 20);
  EXPECT_GE(h.net->gets_max, 3u << 20);
}

TEST(RemoteStore, AReadLargerThanTheWindowGoesAloneAndIsNotOvertakenForEver) {
  RemoteHarness h(4, 1, 1, [](RemoteOptions* o) { o->window = 1u << 20; });
  ASSERT_EQ(h.store->start().err, 0);
  // Small reads that never pause.
  std::vector<Async> small(64);
  const auto refill = [&] {
    for (size_t i = 0; i < small.size(); ++i) {
      if (!small[i].req.done || small[i].done) {
        small[i].mem.resize(64u << 10);
        small[i].done = false;
        start(h, &small[i], Request::Op::Get, block_key(i + 1, kNs), 0, 64u << 10);
      }
    }
  };
  refill();
  Async large;
  large.mem.resize(8u << 20);
  start(h, &large, Request::Op::Get, h.key_on(0), 0, 8u << 20);
  EXPECT_TRUE(h.until(
      [&] {
        if (!large.done) refill();
        return large.done;
      },
      2 * kSecond));
  EXPECT_TRUE(h.until([&] { return all_done(small); }));
}

TEST(RemoteStore, RoomIsThatOfTheFullestTargetLessWhatIsUnderWay) {
  RemoteHarness h(3);
  ASSERT_EQ(h.store->room(), 0u) << "nobody has answered yet";
  h.server(1).room = 10u << 20;
  ASSERT_EQ(h.store->start().err, 0);
  ASSERT_TRUE(h.until([&] { return h.store->room() != 0; }));
  EXPECT_EQ(h.store->room(), 3 * (10u << 20));
  Async a;
  a.mem = pattern(1, 1u << 20);
  start(h, &a, Request::Op::Put, h.key_on(1), 0, 1u << 20);
  h.store->tick(h.net->now);
  EXPECT_EQ(h.store->room(), 3 * (9u << 20));
  h.server(1).room = 9u << 20;
  ASSERT_TRUE(h.until([&] { return a.done; }));
  h.pass(3 * kSecond);
  EXPECT_EQ(h.store->room(), 3 * (9u << 20));
  EXPECT_EQ(h.store->stats().capacity_bytes, uint64_t{3} << 30);
  EXPECT_EQ(h.store->stats().puts, 1u);
}

// ---- rails

TEST(RemoteStore, EqualRailsGetEqualShares) {
  RemoteHarness h(1, 2, 1, [](RemoteOptions* o) {
    for (auto& t : o->map.targets) t.endpoint[0].speed = t.endpoint[1].speed = 10'000;
  });
  h.server(0).max_ops = 1024;
  ASSERT_EQ(h.store->start().err, 0);
  std::vector<Async> all(4000);
  size_t next = 0;
  ASSERT_TRUE(h.until([&] {
    while (next < all.size() && h.store->live_ops() < 200) {
      all[next].mem.resize(64u << 10);
      start(h, &all[next], Request::Op::Get, block_key(next + 1, kNs), 0, 64u << 10);
      ++next;
      h.store->tick(h.net->now);
    }
    return next == all.size() && all_done(all);
  }));
  const double a = double(h.rail(0, 0).ops), b = double(h.rail(0, 1).ops);
  EXPECT_LT(std::abs(a - b) / (a + b), 0.1);
}

TEST(RemoteStore, EqualRailsShareTheLargeGetsOfOneBatchEqually) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    RemoteHarness h(1, 2, seed);
    ASSERT_EQ(h.store->start().err, 0);
    ASSERT_TRUE(h.until([&] { return h.rail(0, 0).live() == 2 && h.rail(0, 1).live() == 2; }));
    std::vector<Async> all(16);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i].mem.resize(1u << 20);
      start(h, &all[i], Request::Op::Get, block_key(i + 1, kNs), 0, 1u << 20);
    }
    h.store->tick(h.net->now);
    EXPECT_EQ(h.rail(0, 0).bytes >> 20, 8u);  // and perhaps a question for space
    EXPECT_EQ(h.rail(0, 1).bytes >> 20, 8u);
    ASSERT_TRUE(h.until([&] { return all_done(all); }));
  }
}

TEST(RemoteStore, AFasterRailGetsMore) {
  RemoteHarness h(1, 2, 1, [](RemoteOptions* o) {
    for (auto& t : o->map.targets) t.endpoint[0].speed = 10'000, t.endpoint[1].speed = 40'000;
  });
  h.server(0).max_ops = 1024;
  ASSERT_EQ(h.store->start().err, 0);
  std::vector<Async> all(4000);
  size_t next = 0;
  ASSERT_TRUE(h.until([&] {
    while (next < all.size() && h.store->live_ops() < 200) {
      all[next].mem.resize(64u << 10);
      start(h, &all[next], Request::Op::Get, block_key(next + 1, kNs), 0, 64u << 10);
      ++next;
      h.store->tick(h.net->now);
    }
    return next == all.size() && all_done(all);
  }));
  EXPECT_GT(h.rail(0, 1).ops, h.rail(0, 0).ops * 3 / 2);
}

TEST(RemoteStore, ARailThatGoesSilentIsLeftAndUsedAgainWhenItIsBack) {
  RemoteHarness h(1, 2);
  ASSERT_EQ(h.store->start().err, 0);
  for (uint64_t n = 1; n <= 40; ++n) ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 100)), 1);
  h.pass(kSecond);
  ASSERT_EQ(h.rail(0, 0).live(), 2u);
  ASSERT_EQ(h.rail(0, 1).live(), 2u);
  h.server(0).cut.insert(1000);
  std::vector<Async> all(40);
  const uint64_t begin = h.net->now;
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].mem.resize(100);
    start(h, &all[i], Request::Op::Get, block_key(i + 1, kNs), 0, 100);
    h.store->tick(h.net->now);
  }
  ASSERT_TRUE(h.until([&] { return all_done(all); }));
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i].mem, pattern(i + 1, 100));
  EXPECT_LT(h.net->now - begin, 3 * kSecond) << "long before the deadline";
  h.pass(20 * kSecond);
  EXPECT_TRUE(h.rail(0, 0).down);
  EXPECT_FALSE(h.rail(0, 1).down);
  const uint64_t used = h.rail(0, 0).ops;
  for (uint64_t n = 1; n <= 40; ++n) ASSERT_EQ(h.run(Request::Op::Lookup, block_key(n, kNs)), 100);
  EXPECT_EQ(h.rail(0, 0).ops, used) << "a rail that is down has work";
  h.server(0).cut.clear();
  h.pass(10 * kSecond);
  EXPECT_FALSE(h.rail(0, 0).down);
  for (uint64_t n = 1; n <= 40; ++n) ASSERT_EQ(h.run(Request::Op::Lookup, block_key(n, kNs)), 100);
  EXPECT_GT(h.rail(0, 0).ops, used);
}

TEST(RemoteStore, AConnectionThatCannotReachMemoryIsLeftForOthers) {
  RemoteHarness h(1, 2);
  ASSERT_EQ(h.store->start().err, 0);
  h.pass(kSecond);
  h.server(0).memoryless.insert(1000);
  const uint64_t begin = h.net->now;
  for (uint64_t n = 1; n <= 40; ++n) ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 5000)), 1);
  EXPECT_LT(h.net->now - begin, 5 * kSecond) << "long before the deadline";
  EXPECT_GT(h.rail(0, 0).failures, 0u);
  h.server(0).memoryless.clear();
  h.pass(10 * kSecond);
  EXPECT_EQ(h.rail(0, 0).live(), 2u);
}

TEST(RemoteStore, MemoryThatCannotBeReachedFailsItsOperationAtOnceAndNothingElse) {
  RemoteHarness h(1, 2);
  ASSERT_EQ(h.store->start().err, 0);
  h.pass(kSecond);
  Bytes bad = pattern(1, 5000);
  h.server(0).missing.insert(bad.data());
  const uint64_t begin = h.net->now, dials = h.net->dials;
  EXPECT_EQ(h.run(Request::Op::Put, block_key(1, kNs), bad.data(), 0, 5000), -EFAULT);
  EXPECT_EQ(h.run(Request::Op::Get, block_key(1, kNs), bad.data(), 0, 5000), -EFAULT);
  EXPECT_LT(h.net->now - begin, kSecond);
  for (uint64_t n = 1; n <= 40; ++n) ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 5000)), 1);
  h.pass(10 * kSecond);
  EXPECT_EQ(h.net->dials, dials) << "no connection ended, and no session";
  // But where it had left before, and nobody knows what became of it, the session ends with it.
  const uint64_t session = h.server(0).sessions.begin()->first;
  h.server(0).missing.clear();
  h.net->faults.drop_after = 1;
  Async a;
  a.mem = pattern(2, 5000);
  start(h, &a, Request::Op::Put, block_key(100, kNs), 0, 5000);
  ASSERT_TRUE(h.until([&] { return h.server(0).mem.size() == 41; }));
  h.server(0).missing.insert(a.mem.data());
  h.net->faults.drop_after = 0;
  ASSERT_TRUE(h.until([&] { return a.done; }));
  EXPECT_EQ(a.req.result, -EFAULT);
  EXPECT_EQ(h.put(block_key(101, kNs), pattern(1, 100)), 1);
  EXPECT_NE(h.server(0).sessions.begin()->first, session);
}

// ---- start

TEST(RemoteStore, ARefusedCapabilityIsSaidAtTheStart) {
  RemoteHarness h(2);
  h.server(1).refuse = -EACCES;
  const Status s = h.store->start();
  EXPECT_EQ(s.err, EACCES);
  EXPECT_NE(s.message.find("capability"), std::string::npos) << s.message;
}

TEST(RemoteStore, NobodyAtAllFailsTheStartInTime) {
  RemoteHarness h(2);
  for (auto& s : h.net->servers) h.net->stop(s.get());
  const uint64_t begin = h.net->now;
  const Status s = h.store->start();
  EXPECT_EQ(s.err, ECONNREFUSED);
  EXPECT_NE(s.message.find("tcp://127.0.0.0:"), std::string::npos) << s.message;
  EXPECT_GE(h.net->now - begin, 10 * kSecond);
  EXPECT_LE(h.net->now - begin, 12 * kSecond);
}

TEST(RemoteStore, AttemptsBackOff) {
  RemoteHarness h(2);
  h.net->stop(&h.server(0));
  ASSERT_EQ(h.store->start().err, 0);
  h.pass(20 * kSecond);
  const uint64_t before = h.net->dials;
  h.pass(60 * kSecond);
  const uint64_t dials = h.net->dials - before;
  EXPECT_GE(dials, 30u) << "at least one in two seconds";
  EXPECT_LE(dials, 70u);
}

// ---- the map

TEST(RemoteStore, AStaleMapIsFetchedAndChosenByAgain) {
  RemoteHarness h(3, 1, 1, [](RemoteOptions* o) { o->map = sim_map(2, 1); });
  h.net->map = sim_map(2, 1);
  ASSERT_EQ(h.store->start().err, 0);
  wire::ClusterMap newer = sim_map(3, 1, 2);
  h.net->map = newer;
  for (auto& s : h.net->servers) s->map_version = 2;
  std::vector<Async> all(300);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].mem = pattern(i, 64);
    start(h, &all[i], Request::Op::Put, block_key(i + 1, kNs), 0, 64);
  }
  ASSERT_TRUE(h.until([&] { return all_done(all); }, 5 * kSecond));
  for (const Async& a : all) EXPECT_EQ(a.req.result, 1);
  EXPECT_EQ(h.store->map().version, 2u);
  EXPECT_EQ(h.net->maps_sent, 1u);
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_GT(h.server(i).mem.size(), 50u);
    for (const auto& [name, bytes] : h.server(i).mem)
      EXPECT_EQ(newer.target_of(*reinterpret_cast<const ChunkKey*>(name.data())), i);
  }
}

TEST(RemoteStore, AMapThatNeverComesEndsOperationsInTime) {
  RemoteHarness h(2);
  ASSERT_EQ(h.store->start().err, 0);
  for (auto& s : h.net->servers) s->map_version = 2;  // which nobody has
  EXPECT_EQ(h.put(block_key(1, kNs), pattern(1, 64)), -EREMOTEIO);
  h.net->maps_blocked = true;
  const uint64_t begin = h.net->now;
  EXPECT_EQ(h.put(block_key(1, kNs), pattern(1, 64)), -ETIMEDOUT);
  EXPECT_LE(h.net->now - begin, 12 * kSecond);
  h.net->maps_blocked = false;
  h.net->map.version = 2;
  EXPECT_EQ(h.put(block_key(1, kNs), pattern(1, 64)), 1);
}

TEST(RemoteStore, ATargetThatLeavesTheMapIsLeftWithWhatItHadUnderWay) {
  RemoteHarness h(3);
  ASSERT_EQ(h.store->start().err, 0);
  h.net->hang(&h.server(2));
  std::vector<Async> all(100);
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].mem = pattern(i, 64);
    start(h, &all[i], Request::Op::Put, block_key(i + 1, kNs), 0, 64);
  }
  h.pass(50 * kMs);
  h.net->map = sim_map(2, 1, 2);
  h.server(0).map_version = h.server(1).map_version = 2;
  Async one;
  one.mem = pattern(7, 64);
  start(h, &one, Request::Op::Put, h.key_on(0, 9), 0, 64);
  ASSERT_TRUE(h.until([&] { return one.done && all_done(all); }, 5 * kSecond));
  for (const Async& a : all) EXPECT_GE(a.req.result, 0);
  EXPECT_EQ(h.store->peers().size(), 2u);
  h.pass(5 * kSecond);
  for (const SimChannel* c : h.net->channels) EXPECT_NE(c->server, &h.server(2));
}

}  // namespace
}  // namespace kvfs
