// A chunk server with much to do: scans and purges of thousands of chunks, buffers that are short, clients that don't read.
#include <set>

#include "net_server_fixture.h"

namespace kvfs::testing_net {
namespace {

using wire::Op;

class NetServerLoadTest : public NetServerTest {
 protected:
  void put_many(Client* c, uint64_t n, uint32_t ns) {
    const Bytes v = pattern(ns, 100);
    for (uint64_t i = 0; i < n;) {
      std::vector<wire::Desc> descs;
      for (; i < n && descs.size() < 64; ++i) descs.push_back(c->change(Op::Put, block_key(i, ns), 100));
      const uint64_t b = send(c, descs, v);
      for (uint16_t k = 0; k < descs.size(); ++k) ASSERT_EQ(result(c, b, k), 1);
    }
  }
  // All keys that a scan in steps of `room` records gives.
  void scan(Client* c, uint32_t ns, uint32_t room, std::multiset<uint64_t>* out) {
    const auto len = uint32_t(room * sizeof(wire::ScanRecord) + 5);  // some room is no whole record
    for (uint64_t cursor = 0;;) {
      const int64_t n = run(c, c->whole(Op::Scan, Kind::Block, ns, len, cursor));
      ASSERT_GE(n, 0);
      ASSERT_EQ(n % int64_t{sizeof(wire::ScanRecord)}, 0);
      if (n == 0) return;
      wire::ScanRecord r;
      for (int64_t at = 0; at < n; at += int64_t{sizeof r}) {
        std::memcpy(&r, last.bytes.data() + at, sizeof r);
        uint64_t id;
        std::memcpy(&id, r.key, sizeof id);
        out->insert(id);
        ASSERT_EQ(r.length, 100u);
      }
      cursor = r.cursor;
    }
  }
  // Answers so far.
  static size_t done(const Client& c) { return c.channel->answers.size(); }
};

TEST_F(NetServerLoadTest, AScanGivesEachChunkOfItsNamespaceOnce) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  put_many(&c, 3000, 5);
  put_many(&c, 100, 6);
  for (const uint32_t room : {1u, 7u, 1000u, 16000u}) {
    std::multiset<uint64_t> got;
    scan(&c, 5, room, &got);
    if (HasFatalFailure()) return;
    ASSERT_EQ(got.size(), 3000u) << room;
    EXPECT_EQ(std::set<uint64_t>(got.begin(), got.end()).size(), 3000u);
  }
  EXPECT_EQ(stats().buffers_used, 0u);
}

TEST_F(NetServerLoadTest, APurgeLeavesNothingOfItsNamespaceAndAllElse) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  put_many(&c, 4000, 5);
  put_many(&c, 500, 6);
  EXPECT_EQ(run(&c, c.whole(Op::Purge, Kind::Block, 5)), 0);
  EXPECT_EQ(store->store->stats().chunks, 500u);
  for (uint64_t i = 0; i < 500; ++i) ASSERT_EQ(run(&c, Client::desc(Op::Lookup, block_key(i, 6))), 100);
  EXPECT_EQ(run(&c, c.whole(Op::Purge, Kind::Block, 5)), 0) << "of nothing";
}

TEST_F(NetServerLoadTest, APurgeOfAFileTakesItsRangeAndNoOther) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(3, 100);
  for (const uint64_t ino : {9u, 10u})
    for (uint64_t i = 0; i < 600; ++i) ASSERT_EQ(run(&c, c.change(Op::Write, volume_key(ino, i, 3), 100), v), 100);
  EXPECT_EQ(run(&c, c.purge_file(9, 100, 200, 3)), 0);
  for (uint64_t i = 0; i < 600; ++i)
    ASSERT_EQ(run(&c, Client::desc(Op::Lookup, volume_key(9, i, 3))), i >= 100 && i < 200 ? -ENOENT : 100) << i;
  EXPECT_EQ(run(&c, c.purge_file(9, 300, UINT64_MAX, 3)), 0) << "a range that is walked through the index";
  EXPECT_EQ(run(&c, c.purge_file(9, 50, 10, 3)), 0) << "a range of nothing";
  for (uint64_t i = 0; i < 600; ++i)
    ASSERT_EQ(run(&c, Client::desc(Op::Lookup, volume_key(9, i, 3))), i < 100 || (i >= 200 && i < 300) ? 100 : -ENOENT);
  EXPECT_EQ(store->store->stats().chunks, 200u + 600u);
}

TEST_F(NetServerLoadTest, OthersAreServedWhileManyPurgesAndScansRun) {
  start();
  Client c, other;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&other, capability({kAll})), 0);
  put_many(&c, 3000, 5);
  put_many(&c, 3000, 6);
  put_many(&other, 10, 7);
  std::vector<wire::Desc> jobs;
  for (int i = 0; i < 20; ++i) jobs.push_back(c.whole(Op::Purge, Kind::Block, i % 2 == 0 ? 5 : 6));
  for (int i = 0; i < 20; ++i) jobs.push_back(c.whole(Op::Scan, Kind::Block, 5, 4096));
  const uint64_t b = send(&c, jobs);
  turn();
  const uint64_t scan = send(&other, {other.whole(Op::Scan, Kind::Block, 7, 4096)});
  const size_t before = done(c);
  EXPECT_EQ(run(&other, other.get(block_key(1, 7), 100)), 100);
  EXPECT_EQ(result(&other, scan), 10 * int64_t{sizeof(wire::ScanRecord)});
  EXPECT_LT(done(c), before + 40) << "it waited for all of them";
  for (uint16_t i = 0; i < 40; ++i) EXPECT_GE(result(&c, b, i), 0);
  EXPECT_EQ(store->store->stats().chunks, 10u);
}

TEST_F(NetServerLoadTest, TwoSessionsBothGoOnWhenBuffersAreShort) {
  NetServerOptions o;
  o.buffer_bytes = 32u << 20;  // one of the largest each way
  start(o, 256u << 20);
  Client big, small;
  ASSERT_EQ(admit(&big, capability({kAll})), 0);
  ASSERT_EQ(admit(&small, capability({kAll})), 0);
  const Bytes v = pattern(1, 9u << 20), w = pattern(2, 1000);
  ASSERT_EQ(put(&big, block_key(1), v), 1);
  ASSERT_EQ(put(&small, block_key(2), w), 1);
  // Many small ones each turn, and one that needs the whole pool: it must come to its turn, and they must go on.
  size_t bigs = 0;
  uint64_t at = send(&big, {big.get(block_key(1), 16u << 20)});
  for (int i = 0; i < 3000 && bigs < 5; ++i) {
    send(&small, std::vector<wire::Desc>(8, small.get(block_key(2), 1000)));
    turn();
    if (!answered(&big, at)) continue;
    ASSERT_EQ((big.channel->answers[{at, uint16_t{0}}].bytes), v);
    ++bigs;
    at = send(&big, {big.get(block_key(1), 16u << 20)});
  }
  EXPECT_EQ(bigs, 5u);
  EXPECT_GT(done(small), 20u);
  // The same with what is put.
  bigs = 0;
  Bytes u = v;
  uint64_t key = 100;
  at = send(&big, {big.change(Op::Put, block_key(key++), uint32_t(u.size()))}, u);
  const size_t before = done(small);
  for (int i = 0; i < 3000 && bigs < 5; ++i) {
    for (int k = 0; k < 4; ++k) send(&small, {small.change(Op::Put, block_key(1000 + key++), 1000)}, w);
    turn();
    if (!answered(&big, at)) continue;
    ASSERT_EQ((big.channel->answers[{at, uint16_t{0}}].result), 1);
    ++bigs;
    at = send(&big, {big.change(Op::Put, block_key(key++), uint32_t(u.size()))}, u);
  }
  EXPECT_EQ(bigs, 5u);
  EXPECT_GT(done(small), before + 10);
}

TEST_F(NetServerLoadTest, AClientThatDoesNotReadHoldsItsShareAndNoMore) {
  NetServerOptions o;
  o.buffer_bytes = 256u << 20;
  start(o, 256u << 20);
  Client deaf, fine;
  ASSERT_EQ(admit(&deaf, capability({kAll})), 0);
  ASSERT_EQ(admit(&fine, capability({kAll})), 0);
  const Bytes v = pattern(1, 1u << 20);
  ASSERT_EQ(put(&fine, block_key(1), v), 1);
  deaf.channel->unread = true;
  for (int i = 0; i < 10; ++i) send(&deaf, std::vector<wire::Desc>(50, deaf.get(block_key(1), 1u << 20)));
  for (int i = 0; i < 200; ++i) turn();
  EXPECT_EQ(stats().buffers_used, 32u << 20) << "a quarter of what there is towards clients";
  for (int i = 0; i < 100; ++i) ASSERT_EQ(run(&fine, fine.get(block_key(1), 1u << 20)), 1 << 20);
  deaf.channel->read_all();
  until([&] { return done(deaf) == 500; });
  EXPECT_EQ(stats().buffers_used, 0u);
}

TEST_F(NetServerLoadTest, SessionsWithEqualNeedsGetEqualShares) {
  NetServerOptions o;
  o.buffer_bytes = 32u << 20;
  start(o);
  Client a, b;
  ASSERT_EQ(admit(&a, capability({kAll})), 0);
  ASSERT_EQ(admit(&b, capability({kAll})), 0);
  const Bytes v = pattern(1, 256u << 10);
  ASSERT_EQ(put(&a, block_key(1), v), 1);
  // One asks for ten times as much as the other.
  for (int i = 0; i < 10; ++i) send(&a, std::vector<wire::Desc>(50, a.get(block_key(1), 256u << 10)));
  send(&b, std::vector<wire::Desc>(50, b.get(block_key(1), 256u << 10)));
  until([&] { return done(b) == 50; });
  EXPECT_LT(done(a), 200u) << "the other waited behind all of it";
  until([&] { return done(a) == 501; });
}

TEST_F(NetServerLoadTest, APayloadThatNeverComesStopsNobodyElse) {
  NetServerOptions o;
  o.buffer_bytes = 64u << 20;
  start(o);
  Client slow, fine;
  ASSERT_EQ(admit(&slow, capability({kAll})), 0);
  ASSERT_EQ(admit(&fine, capability({kAll})), 0);
  slow.channel->stall_payload = true;
  const Bytes v = pattern(1, 16u << 20);
  send(&slow, {slow.change(Op::Put, block_key(1), uint32_t(v.size()))}, v);
  turn();
  EXPECT_EQ(stats().buffers_used, 16u << 20);
  for (uint64_t i = 0; i < 20; ++i) ASSERT_EQ(put(&fine, block_key(100 + i), pattern(i, 1u << 20)), 1);
}

TEST_F(NetServerLoadTest, AConnectionOnWhichNothingMovesIsEndedAndAllItHadIsFree) {
  NetServerOptions o;
  o.stall_ms = 300;
  start(o);
  Client deaf, slow, idle;
  ASSERT_EQ(admit(&deaf, capability({kAll})), 0);
  ASSERT_EQ(admit(&slow, capability({kAll})), 0);
  ASSERT_EQ(admit(&idle, capability({kAll})), 0);
  const Bytes v = pattern(1, 1u << 20);
  ASSERT_EQ(put(&idle, block_key(1), v), 1);
  deaf.channel->unread = true;
  send(&deaf, {deaf.get(block_key(1), 1u << 20)});
  slow.channel->stall_payload = true;
  send(&slow, {slow.change(Op::Put, block_key(2), uint32_t(v.size()))}, v);
  turn();
  EXPECT_EQ(stats().buffers_used, 2u << 20);
  until([&] { return deaf.channel->ended() && slow.channel->ended(); });
  until([&] { return stats().connections == 1; });
  EXPECT_EQ(stats().buffers_used, 0u);
  EXPECT_EQ(run(&idle, idle.get(block_key(1), 100)), 100) << "who has nothing under way may wait as long as it likes";
}

}  // namespace
}  // namespace kvfs::testing_net
