// remote_failure_test.cpp tests what the remote store does when servers hang and restart, connections break and payloads are
// damaged on a simulated network: what is answered and when, what is done once, what is told by the next flush or sync.
#include <algorithm>
#include <map>
#include <set>

#include "../remote/lazy_writes.h"
#include "remote_sim.h"

namespace kvfs {
namespace {

TEST(RemoteStore, AHungServerCostsTheDeadlineAndNoMore) {
  RemoteHarness h(2);
  ASSERT_EQ(h.store->start().err, 0);
  const ChunkKey there = h.key_on(0), elsewhere = h.key_on(1);
  ASSERT_EQ(h.put(there, pattern(1, 100)), 1);
  ASSERT_EQ(h.put(elsewhere, pattern(2, 100)), 1);
  h.net->hang(&h.server(0));
  const uint64_t begin = h.net->now;
  Bytes got(100);
  EXPECT_EQ(h.run(Request::Op::Get, there, got.data(), 0, 100), -ETIMEDOUT);
  EXPECT_GE(h.net->now - begin, 10 * kSecond);
  EXPECT_LE(h.net->now - begin, 12 * kSecond);
  EXPECT_EQ(h.run(Request::Op::Get, elsewhere, got.data(), 0, 100), 100);
  h.net->go_on(&h.server(0));
  EXPECT_EQ(h.run(Request::Op::Get, there, got.data(), 0, 100), 100);
  EXPECT_EQ(got, pattern(1, 100));
}

// Its bytes are in the server's socket when it hangs, and nothing ends it there.
TEST(RemoteStore, AChangeThatTimedOutIsNotMadeAfterTheNextOneWas) {
  uint64_t timeouts = 0;
  for (uint64_t seed = 1; seed <= 50; ++seed) {
    // Its connections are given up for their silence, or they are not.
    RemoteHarness h(1, 2, seed, [&](RemoteOptions* o) { o->peer.dead_ns = (seed % 2 == 0 ? 60 : 2) * kSecond; });
    ASSERT_EQ(h.store->start().err, 0);
    const ChunkKey k = file_key(1, 0);
    Bytes value = pattern(seed, 5000);
    ASSERT_EQ(h.write(k, 0, value), 5000);
    Async before;  // in the same session, neither lost nor late
    for (int i = 0; i < 4; ++i) {
      h.net->hang(&h.server(0));
      before.mem = pattern(i, 100);
      before.done = false;
      h.net->at(5 * kSecond, [&, i] { start(h, &before, Request::Op::Write, file_key(2, uint64_t(i)), 0, 100); });
      const int64_t r = h.write(k, 0, pattern(seed * 100 + i, 5000));
      ASSERT_EQ(r, -ETIMEDOUT);
      ++timeouts;
      h.net->go_on(&h.server(0));
      value = pattern(seed * 100 + 50 + i, 5000);
      ASSERT_EQ(h.write(k, 0, value), 5000);
      Bytes got(5000);
      for (int look = 0; look < 4; ++look) {
        ASSERT_EQ(h.run(Request::Op::Get, k, got.data(), 0, 5000), 5000);
        ASSERT_EQ(got, value) << "seed " << seed << ", time " << i << ", look " << look;
        h.pass(kSecond);
      }
      ASSERT_TRUE(h.until([&] { return before.done; }));
      EXPECT_EQ(before.req.result, 100);
    }
  }
  EXPECT_EQ(timeouts, 200u);
}

TEST(RemoteStore, WhatWasNeverSentSaysSo) {
  RemoteHarness h(2);
  h.net->stop(&h.server(0));
  ASSERT_EQ(h.store->start().err, 0) << "one target is enough to begin";
  EXPECT_EQ(h.put(h.key_on(0), pattern(1, 100)), -EREMOTEIO);
  EXPECT_EQ(h.put(h.key_on(1), pattern(1, 100)), 1);
  // It comes up while an operation waits.
  Async a;
  a.mem = pattern(3, 100);
  start(h, &a, Request::Op::Put, h.key_on(0), 0, 100);
  h.pass(4 * kSecond);
  EXPECT_FALSE(a.done);
  h.server(0).up = true;
  ASSERT_TRUE(h.until([&] { return a.done; }, 4 * kSecond));
  EXPECT_EQ(a.req.result, 1);
}

TEST(RemoteStore, WritesThatARestartMayHaveLostAreToldOnceByFlushAndSync) {
  RemoteHarness h(2);
  ASSERT_EQ(h.store->start().err, 0);
  const auto server_of = [&](uint64_t ino) -> SimServer& { return h.server_of(file_key(ino, 0)); };
  uint64_t lost = 1, safe = 2;  // two inodes whose chunk 0 is on the same server
  while (&server_of(safe) != &server_of(lost)) ++safe;
  ASSERT_EQ(h.write(file_key(lost, 0), 0, pattern(1, 64)), 64);
  ASSERT_EQ(h.write(file_key(safe, 0), 0, pattern(2, 64)), 64);
  ASSERT_EQ(h.run(Request::Op::Flush, file_key(safe, 0)), 0);
  h.net->restart(&server_of(lost));
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(lost, 0)), -EIO);
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(lost, 0)), 0);
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(safe, 0)), 0);
  EXPECT_EQ(h.run(Request::Op::Sync, ChunkKey{}), -EIO);
  EXPECT_EQ(h.run(Request::Op::Sync, ChunkKey{}), 0);
  Bytes got(64);
  EXPECT_EQ(h.run(Request::Op::Get, file_key(lost, 0), got.data(), 0, 64), -ENOENT);
  EXPECT_EQ(h.run(Request::Op::Get, file_key(safe, 0), got.data(), 0, 64), 64);
  // Durable, or followed by a sync: nothing to tell.
  ASSERT_EQ(h.write(file_key(lost, 0), 0, pattern(1, 64), Request::kDurable), 64);
  h.net->restart(&server_of(lost));
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(lost, 0)), 0);
  ASSERT_EQ(h.write(file_key(lost, 0), 0, pattern(1, 64)), 64);
  ASSERT_EQ(h.run(Request::Op::Sync, ChunkKey{}), 0);
  h.net->restart(&server_of(lost));
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(lost, 0)), 0);
  EXPECT_EQ(h.run(Request::Op::Sync, ChunkKey{}), 0);
}

TEST(RemoteStore, AFlushUnderWayAtTheRestartFailsToo) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  ASSERT_EQ(h.write(file_key(1, 0), 0, pattern(1, 64)), 64);
  h.net->hang(&h.server(0));
  Async f;
  start(h, &f, Request::Op::Flush, file_key(1, 0), 0, 0);
  h.pass(100 * kMs);
  h.net->restart(&h.server(0));
  ASSERT_TRUE(h.until([&] { return f.done; }));
  EXPECT_EQ(f.req.result, -EIO);
}

TEST(RemoteStore, AConnectionThatBreaksLosesNothingOfTheSession) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  ASSERT_EQ(h.write(file_key(1, 0), 0, pattern(1, 64)), 64);
  for (int i = 0; i < 20; ++i) {
    h.net->break_connections(&h.server(0), -ECONNRESET);
    ASSERT_EQ(h.write(file_key(1, 0), 0, pattern(uint64_t(i) + 5, 64)), 64);
  }
  EXPECT_EQ(h.server(0).sessions.size(), 1u);
  EXPECT_EQ(h.run(Request::Op::Flush, file_key(1, 0)), 0) << "the target has not restarted";
}

TEST(RemoteStore, ADeletionWhoseAnswerWasLostIsDone) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  const ChunkKey k = block_key(1, kNs);
  ASSERT_EQ(h.put(k, pattern(1, 64), Request::kDurable), 1);
  h.net->faults.drop_after = 1;
  Async a;
  start(h, &a, Request::Op::Delete, k, 0, 0, Request::kDurable);
  ASSERT_TRUE(
      h.until([&] { return !h.server(0).mem.contains(std::string(reinterpret_cast<const char*>(&k), sizeof k)); }));
  h.net->faults.drop_after = 0;
  h.net->restart(&h.server(0));  // who would know the answer is gone
  ASSERT_TRUE(h.until([&] { return a.done; }));
  EXPECT_EQ(a.req.result, 0);
  EXPECT_EQ(h.run(Request::Op::Delete, k), -ENOENT);
}

TEST(RemoteStore, AChangeThatMayHaveBeenMadeDoesNotSayThatNothingHappened) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  ASSERT_EQ(h.put(block_key(3, kNs), pattern(3, 64), Request::kDurable), 1);
  h.net->faults.drop_after = 1;
  Async a;
  a.mem = pattern(1, 64);
  start(h, &a, Request::Op::Put, block_key(1, kNs), 0, 64, Request::kDurable);
  ASSERT_TRUE(h.until([&] { return h.server(0).mem.size() == 2; }));
  h.net->faults.drop_after = 0;
  h.net->restart(&h.server(0));
  h.server(0).map_version = 2;  // which nobody has
  ASSERT_TRUE(h.until([&] { return a.done; }));
  EXPECT_EQ(a.req.result, -ETIMEDOUT);
  EXPECT_EQ(h.put(block_key(2, kNs), pattern(2, 64)), -EREMOTEIO) << "never made";
  EXPECT_EQ(h.server(0).mem.size(), 2u);
}

TEST(RemoteStore, DamagedPayloadsAreAskedForAgainAndThenAnError) {
  RemoteHarness h(1);
  ASSERT_EQ(h.store->start().err, 0);
  for (uint64_t n = 1; n <= 100; ++n) ASSERT_EQ(h.put(block_key(n, kNs), pattern(n, 100)), 1);
  h.net->faults.damage = h.net->faults.damage_in = 0.05;
  int errors = 0;
  for (uint64_t n = 1; n <= 100; ++n) {
    Bytes got(100);
    const int64_t r = h.run(Request::Op::Get, block_key(n, kNs), got.data(), 0, 100);
    if (r == 100) {
      EXPECT_EQ(got, pattern(n, 100));
    }
    errors += r != 100;
    EXPECT_EQ(h.put(block_key(n + 1000, kNs), pattern(n, 100)), 1);
  }
  EXPECT_LE(errors, 2);
  h.net->faults.damage = h.net->faults.damage_in = 1;
  Bytes got(100);
  const uint64_t before = h.server(0).ops;
  EXPECT_EQ(h.run(Request::Op::Get, block_key(1, kNs), got.data(), 0, 100), -EIO);
  EXPECT_GE(h.server(0).ops - before, 4u);
  EXPECT_EQ(h.put(block_key(5000, kNs), pattern(1, 100)), -EIO);
  h.net->faults.damage = h.net->faults.damage_in = 0;
  EXPECT_EQ(h.run(Request::Op::Lookup, block_key(5000, kNs)), -ENOENT);
}

// ---- everything at once

// Random operations while connections break, payloads are damaged, links are cut and servers hang, but none restarts: each
// change that is acknowledged was executed once, none twice, and reads see what was written last.
TEST(RemoteStore, EveryChangeHappensOnceWhateverTheNetworkDoes) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    RemoteHarness h(3, 2, seed, [](RemoteOptions* o) { o->window = 256u << 10; });
    for (auto& s : h.net->servers) s->max_ops = 16;
    ASSERT_EQ(h.store->start().err, 0);
    h.net->faults.drop_before = h.net->faults.drop_after = 0.01;
    h.net->faults.damage = h.net->faults.damage_in = 0.01;
    constexpr size_t kChunks = 40;
    struct Chunk {
      Async a;
      Bytes value;  // as far as it is known
      bool known = true, busy = false;
      Bytes next;
    };
    std::vector<Chunk> chunks(kChunks);
    std::set<uint64_t> acked;
    uint64_t id = seed << 32;
    size_t done = 0;
    const auto reap = [&] {
      for (size_t i = 0; i < kChunks; ++i) {
        Chunk& c = chunks[i];
        if (!c.busy || !c.a.done) continue;
        c.busy = false;
        ++done;
        const int64_t r = c.a.req.result;
        if (c.a.req.op == Request::Op::Write) {
          if (r == int64_t(c.next.size())) {
            uint64_t w;
            std::memcpy(&w, c.next.data(), 8);
            acked.insert(w);
            if (c.value.size() < c.next.size()) c.value.resize(c.next.size());
            std::copy(c.next.begin(), c.next.end(), c.value.begin());
          } else {
            ASSERT_TRUE(r == -ETIMEDOUT || r == -EREMOTEIO || r == -EIO) << r;
            if (r == -ETIMEDOUT) c.known = false;
          }
        } else if (c.known && r >= 0) {
          ASSERT_EQ(Bytes(c.a.mem.begin(), c.a.mem.begin() + r), c.value) << "seed " << seed;
        } else if (c.known) {
          ASSERT_TRUE((r == -ENOENT && c.value.empty()) || r == -ETIMEDOUT || r == -EREMOTEIO || r == -EIO) << r;
        }
      }
    };
    uint64_t next_fault = h.net->now + kSecond;
    ASSERT_TRUE(h.until(
        [&] {
          reap();
          if (h.net->now > next_fault) {
            next_fault = h.net->now + 200 * kMs + h.net->random(2 * kSecond);
            SimServer& s = h.server(h.net->random(3));
            switch (h.net->random(4)) {
              case 0:
                h.net->hang(&s);
                h.net->at(h.net->random(4 * kSecond), [&h, &s] { h.net->go_on(&s); });
                break;
              case 1: {
                const auto port = uint16_t(s.id * 1000 + h.net->random(2));
                s.cut.insert(port);
                h.net->at(h.net->random(6 * kSecond), [&s, port] { s.cut.erase(port); });
                break;
              }
              default:
                h.net->break_connections(&s, -ECONNRESET);
                break;
            }
          }
          for (size_t i = 0; i < kChunks && done < 3000; ++i) {
            Chunk& c = chunks[i];
            if (c.busy || !c.known || h.net->random(4) != 0) continue;
            c.busy = true;
            c.a.done = false;
            if (h.net->random(2) == 0) {
              ++id;
              c.next = pattern(id, 8 + h.net->random(5000));
              std::memcpy(c.next.data(), &id, sizeof id);
              c.a.mem = c.next;
              start(h, &c.a, Request::Op::Write, file_key(1, i), 0, uint32_t(c.next.size()));
            } else {
              c.a.mem.assign(kFileChunk, 0xee);
              start(h, &c.a, Request::Op::Get, file_key(1, i), 0, kFileChunk);
            }
          }
          return done >= 3000 && std::none_of(chunks.begin(), chunks.end(), [](const Chunk& c) { return c.busy; });
        },
        2000 * kSecond))
        << "seed " << seed << ": " << done << " done";
    std::map<uint64_t, int> executed;
    for (auto& s : h.net->servers) {
      for (const auto& [w, n] : s->executed) executed[w] += n;
    }
    for (const auto& [w, n] : executed) EXPECT_EQ(n, 1) << "a change was executed more than once, seed " << seed;
    for (const uint64_t w : acked) EXPECT_TRUE(executed.contains(w)) << "acknowledged and not executed";
    EXPECT_LE(h.net->gets_max, 256u << 10);
  }
}

// The same with restarts that forget everything that is not durable: every request ends in time, and what was durable is there.
TEST(RemoteStore, RestartsLoseNothingThatIsDurableAndHangNothing) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    RemoteHarness h(3, 2, seed);
    ASSERT_EQ(h.store->start().err, 0);
    h.net->faults.drop_before = h.net->faults.drop_after = 0.01;
    std::vector<Async> all(1000);
    std::vector<uint64_t> begun(all.size());
    size_t next = 0;
    uint64_t next_fault = h.net->now + 300 * kMs;
    ASSERT_TRUE(h.until(
        [&] {
          if (h.net->now > next_fault) {
            next_fault = h.net->now + h.net->random(3 * kSecond);
            SimServer& s = h.server(h.net->random(3));
            if (h.net->random(3) == 0) {
              h.net->stop(&s);
              h.net->at(h.net->random(5 * kSecond), [&h, &s] { h.net->restart(&s); });
            } else if (s.up) {
              h.net->restart(&s);
            }
          }
          for (int i = 0; i < 4 && next < all.size() && h.store->live_ops() < 100; ++i, ++next) {
            all[next].mem = pattern(seed * 10'000 + next, 200);
            begun[next] = h.net->now;
            start(h, &all[next], Request::Op::Put, block_key(next + 1, kNs), 0, 200, Request::kDurable);
          }
          return next == all.size() && all_done(all);
        },
        2000 * kSecond));
    for (auto& s : h.net->servers) {
      if (!s->up) h.net->restart(s.get());
    }
    h.pass(5 * kSecond);
    for (size_t i = 0; i < all.size(); ++i) {
      const int64_t r = all[i].req.result;
      ASSERT_TRUE(r == 0 || r == 1 || r == -ETIMEDOUT || r == -EREMOTEIO) << r;
      EXPECT_LE(all[i].ended_ns - begun[i], 12 * kSecond);
      if (r < 0) continue;
      Bytes got(200);
      ASSERT_EQ(h.run(Request::Op::Get, block_key(i + 1, kNs), got.data(), 0, 200), 200) << "seed " << seed;
      EXPECT_EQ(got, pattern(seed * 10'000 + i, 200));
    }
  }
}

// ---- lazy writes

TEST(LazyWrites, MoreInodesThanCanBeRememberedAreAllTold) {
  LazyWrites w;
  for (uint64_t i = 0; i < 3 * LazyWrites::kMax; ++i) w.file(i);
  EXPECT_TRUE(w.wants_flush(1'000'000));
  w.lose();
  int told = 0;
  for (uint64_t i = 0; i < 3 * LazyWrites::kMax; ++i) told += w.tell_flush(i);
  EXPECT_EQ(told, int(3 * LazyWrites::kMax));
  EXPECT_FALSE(w.tell_flush(0)) << "once";
  EXPECT_TRUE(w.tell_sync());
  EXPECT_FALSE(w.tell_sync());
  EXPECT_FALSE(w.tell_flush(3 * LazyWrites::kMax - 1)) << "a sync ends it";
  EXPECT_FALSE(w.wants_flush(1));
}

TEST(LazyWrites, AProcessThatRestartsLosesBlocksOnly) {
  LazyWrites w;
  w.file(1);
  w.lose_blocks();
  EXPECT_FALSE(w.tell_sync());
  EXPECT_FALSE(w.tell_flush(1));
  EXPECT_TRUE(w.wants_flush(1)) << "it is not durable";
  w.other();
  w.lose_blocks();
  EXPECT_FALSE(w.tell_flush(1));
  EXPECT_TRUE(w.tell_sync());
  EXPECT_FALSE(w.tell_sync());
  w.lose();
  EXPECT_TRUE(w.tell_flush(1));
}

TEST(LazyWrites, AFlushCoversWhatWasAcknowledgedBeforeItOnly) {
  LazyWrites w;
  w.file(1);
  const uint64_t mark = w.mark();
  w.file(1);
  w.flushed(1, mark);
  EXPECT_TRUE(w.wants_flush(1));
  w.flushed(1, w.mark());
  EXPECT_FALSE(w.wants_flush(1));
  w.lose();
  EXPECT_FALSE(w.tell_flush(1));
}

}  // namespace
}  // namespace kvfs
