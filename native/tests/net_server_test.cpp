// What a chunk server promises its clients, on connections in memory: rights, answers given once, maps, cancels, ends.
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "net_server_fixture.h"

namespace kvfs::testing_net {
namespace {

using wire::Op;

TEST_F(NetServerTest, WhatIsPutIsRead) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(1, 70000);
  EXPECT_EQ(run(&c, c.get(block_key(1), 4096)), -ENOENT);
  EXPECT_EQ(put(&c, block_key(1), v), 1);
  EXPECT_EQ(put(&c, block_key(1), v), 0);
  EXPECT_EQ(run(&c, Client::desc(Op::Lookup, block_key(1))), 70000);
  EXPECT_EQ(run(&c, c.get(block_key(1), 16u << 20)), 70000);
  EXPECT_EQ(last.bytes, v);
  EXPECT_EQ(last.sum, wire::data_sum(v.data(), v.size()));
  EXPECT_EQ(run(&c, c.get(block_key(1), 4096, 69999)), 1);
  EXPECT_EQ(last.bytes, Bytes(1, v.back()));
  EXPECT_EQ(run(&c, c.get(block_key(1), 4096, 70000)), 0);
  EXPECT_EQ(run(&c, c.change(Op::Delete, block_key(1))), 0);
  EXPECT_EQ(run(&c, Client::desc(Op::Lookup, block_key(1))), -ENOENT);
  EXPECT_EQ(stats().buffers_used, 0u);
}

// What the DRAM tier has is sent from there, with the sum that was made when it was first sent; what it has not, as ever.
TEST_F(NetServerTest, WhatIsInMemoryIsLentWithTheSumOfItsBytes) {
  start({}, 64u << 20, 8u << 20);
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  c.channel->lends = true;
  const auto expect = [&](const wire::Desc& d, const Bytes& want, bool lent) {
    ASSERT_EQ(run(&c, d), int64_t(want.size()));
    EXPECT_TRUE(last.bytes == want);
    EXPECT_EQ(last.sum, wire::data_sum(want.data(), want.size()));
    EXPECT_EQ(last.lent, lent);
  };
  Bytes v = pattern(1, 60000);
  EXPECT_EQ(run(&c, c.get(block_key(1), 4096)), -ENOENT);
  ASSERT_EQ(put(&c, block_key(1), v), 1);
  for (int i = 0; i < 3; ++i) {
    expect(c.get(block_key(1), 16u << 20), v, true);
    expect(c.get(block_key(1), 4096, 59999), Bytes(1, v.back()), true);
    EXPECT_EQ(run(&c, c.get(block_key(1), 4096, 60000)), 0);
  }
  const Bytes large = pattern(2, 1u << 20);
  ASSERT_EQ(put(&c, block_key(2), large), 1);
  for (uint64_t k = 10; k < 20; ++k) ASSERT_EQ(put(&c, block_key(k), large), 1);  // more than there is room for
  for (const bool lent : {false, false, true})
    expect(c.get(block_key(2), 16u << 20), large, lent);  // kept at the second read
  ASSERT_EQ(run(&c, c.change(Op::Write, volume_key(9, 0, 3), 60000), v), 60000);
  expect(c.get(volume_key(9, 0, 3), 65536), v, true);
  v[50000] ^= 1;
  ASSERT_EQ(run(&c, c.change(Op::Write, volume_key(9, 0, 3), 1, 50000), Bytes(1, v[50000])), 1);
  expect(c.get(volume_key(9, 0, 3), 65536), v, true);

  // One that is not read keeps what it was lent, and its session's share of what may be on its way.
  c.channel->unread = true;
  expect(c.get(block_key(1), 16u << 20), pattern(1, 60000), true);
  ASSERT_EQ(run(&c, c.change(Op::Delete, block_key(1))), 0);
  c.channel->read_all();
  EXPECT_EQ(run(&c, c.get(block_key(1), 4096)), -ENOENT);

  // A byte that changes in memory behind everybody's back does not agree with what is sent with it.
  Lent lent;
  ASSERT_EQ(store->store->lend(block_key(2), 0, 1u << 20, true, true, &lent), 1 << 20);
  const_cast<uint8_t*>(lent.parts[0].ptr)[3] ^= 1;
  store->store->give_back(&lent);
  ASSERT_EQ(run(&c, c.get(block_key(2), 1u << 20)), 1 << 20);
  EXPECT_FALSE(last.bytes == large);
  EXPECT_EQ(last.sum, wire::data_sum(large.data(), large.size()));
}

TEST_F(NetServerTest, FileChunksAreWrittenCutAndPurgedInTheirNamespace) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(2, 5000);
  EXPECT_EQ(run(&c, c.change(Op::Write, volume_key(9, 0, 3), 5000, 100), v), 5000);
  EXPECT_EQ(run(&c, c.get(volume_key(9, 0, 3), 65536)), 5100);
  EXPECT_EQ(run(&c, c.get(volume_key(9, 0, 4), 65536)), -ENOENT) << "another namespace's inode 9 is another file";
  wire::Desc cut = c.change(Op::Truncate, volume_key(9, 0, 3));
  cut.off = 200;
  EXPECT_EQ(run(&c, cut), 0);
  EXPECT_EQ(run(&c, c.get(volume_key(9, 0, 3), 65536)), 200);
  EXPECT_EQ(run(&c, Client::desc(Op::Flush, volume_key(9, 0, 3))), 0);
  EXPECT_EQ(run(&c, c.whole(Op::Sync, Kind::File, 0)), 0);
  EXPECT_EQ(run(&c, c.whole(Op::Stat, Kind::Block, 0, sizeof(wire::TargetStat))), int64_t{sizeof(wire::TargetStat)});
  wire::TargetStat st;
  std::memcpy(&st, last.bytes.data(), sizeof st);
  EXPECT_EQ(st.chunks, 1u);
  EXPECT_GT(st.room, 0u);
  EXPECT_EQ(run(&c, c.purge_file(9, 0, UINT64_MAX, 3)), 0);
  EXPECT_EQ(run(&c, c.get(volume_key(9, 0, 3), 65536)), -ENOENT);
}

// Each operation with each set of rights, in its namespace and another, of its kind and the other.
TEST_F(NetServerTest, NoRequestIsExecutedWithoutItsRight) {
  start();
  Client root;
  ASSERT_EQ(admit(&root, capability({kAll})), 0);
  const Bytes v = pattern(3, 1000);
  struct Case {
    Op op;
    uint8_t right;
    bool file, block;
  };
  const Case cases[] = {{Op::Get, wire::kRead, true, true},        {Op::Lookup, wire::kRead, true, true},
                        {Op::Put, wire::kWrite, false, true},      {Op::Write, wire::kWrite, true, false},
                        {Op::Truncate, wire::kWrite, true, false}, {Op::Flush, wire::kWrite, true, false},
                        {Op::Delete, wire::kDelete, true, true},   {Op::Purge, wire::kDelete, true, true},
                        {Op::Scan, wire::kList, true, true}};
  uint64_t n = 0;
  for (uint8_t rights = 1; rights <= wire::kAllRights; ++rights) {
    for (const uint8_t kinds : {wire::kBlocks, wire::kFiles}) {
      Client c;
      ASSERT_EQ(admit(&c, capability({{5, kinds, rights, 0, 0}})), 0);
      for (const Case& k : cases) {
        for (const bool file : {false, true}) {
          if (!(file ? k.file : k.block)) continue;
          for (const uint32_t ns : {5u, 6u}) {
            const ChunkKey key = file ? volume_key(1000 + ++n, 0, ns) : block_key(1000 + ++n, ns);
            // The chunk is there, but for what makes it.
            if (k.op != Op::Put) {
              ASSERT_GT(file ? run(&root, root.change(Op::Write, key, 1000), v) : put(&root, key, v), 0);
            }
            wire::Desc d = wire::mutates(k.op) ? c.change(k.op, key) : Client::desc(k.op, key);
            if (k.op == Op::Get || k.op == Op::Put || k.op == Op::Write) d.len = 1000;
            if (k.op == Op::Scan) d = c.whole(k.op, key.kind, ns, 4096);
            if (k.op == Op::Purge) d = file ? c.purge_file(1000 + n, 0, 9, ns) : c.whole(k.op, key.kind, ns);
            const bool may = (rights & k.right) != 0 && ns == 5 && file == (kinds == wire::kFiles);
            const int64_t got = run(&c, d, wire::has_in(k.op) ? v : Bytes{});
            if (may)
              EXPECT_GE(got, 0) << int(d.op);
            else
              EXPECT_EQ(got, -EACCES) << int(d.op) << " with rights " << int(rights);
            const bool there = run(&root, Client::desc(Op::Lookup, key)) >= 0;
            const bool removes = k.op == Op::Delete || k.op == Op::Purge || k.op == Op::Truncate;
            EXPECT_EQ(there, k.op == Op::Put ? may : !(may && removes)) << int(d.op);
          }
        }
      }
      leave(&c);
    }
  }
  EXPECT_GT(stats().denied, 100u);
}

TEST_F(NetServerTest, RightsEndWithTheCapabilityThoughTheSessionGoesOn) {
  start();
  Client c, more;
  ASSERT_EQ(admit(&c, capability({kAll}, uint64_t(time(nullptr)) + 2)), 0);
  EXPECT_EQ(run(&c, c.get(block_key(1), 100)), -ENOENT);
  until([&] { return run(&c, c.get(block_key(1), 100)) == -EACCES; });
  EXPECT_EQ(admit(&more, {}, &c), -EACCES);
}

TEST_F(NetServerTest, AChangeThatComesAgainIsAnsweredAndNotMadeAgain) {
  start();
  Client c, again;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&again, {}, &c), 0);
  const Bytes v = pattern(4, 3000);
  const wire::Desc put1 = c.change(Op::Put, block_key(1), 3000);
  EXPECT_EQ(run(&c, put1, v), 1);
  EXPECT_EQ(run(&again, put1, v), 1) << "made twice it would be 0";
  const wire::Desc gone = c.change(Op::Delete, block_key(1));
  EXPECT_EQ(run(&c, gone), 0);
  EXPECT_EQ(run(&again, gone), 0) << "made twice it would be -ENOENT";
  EXPECT_EQ(run(&again, put1, v), 1);
  EXPECT_EQ(run(&c, Client::desc(Op::Lookup, block_key(1))), -ENOENT) << "and it has not come back";
  wire::Desc other = gone;
  other.ns = 2;
  EXPECT_EQ(run(&c, other), -EINVAL) << "a number is one operation's";
  EXPECT_EQ(stats().replayed, 3u);
}

TEST_F(NetServerTest, AChangeThatComesWhileTheFirstIsUnderWayIsAnsweredWithIt) {
  start();
  Client c, again;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&again, {}, &c), 0);
  const Bytes v = pattern(5, 200000);
  const wire::Desc d = c.change(Op::Put, block_key(1), uint32_t(v.size()));
  const uint64_t a = send(&c, {d}, v), b = send(&again, {d}, v), e = send(&again, {d}, v);
  EXPECT_EQ(result(&c, a), 1);
  EXPECT_EQ(result(&again, b), 1);
  EXPECT_EQ(result(&again, e), 1);
  EXPECT_EQ(stats().replayed, 2u);
  EXPECT_EQ(store->store->stats().puts, 1u);
  EXPECT_EQ(stats().buffers_used, 0u);
}

TEST_F(NetServerTest, WhatABrokenConnectionAskedForIsAnsweredOnAnother) {
  start();
  Client c, again;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(6, 100000);
  const wire::Desc d = c.change(Op::Put, block_key(1), uint32_t(v.size()));
  send(&c, {d}, v);
  turn();  // it is in the store now
  const auto first = c;
  leave(&c, -ECONNRESET);
  ASSERT_EQ(admit(&again, {}, &first), 0);
  again.batch = 100;
  EXPECT_EQ(run(&again, d, v), 1);
  EXPECT_EQ(store->store->stats().puts, 1u);
}

TEST_F(NetServerTest, ANumberOlderThanTheMemoryIsRefused) {
  NetServerOptions o;
  o.max_ops = 8;
  start(o);
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const wire::Desc first = c.change(Op::Delete, block_key(0));
  EXPECT_EQ(run(&c, first), -ENOENT);
  for (uint64_t i = 1; i < 16; ++i) EXPECT_EQ(run(&c, c.change(Op::Delete, block_key(i))), -ENOENT);
  EXPECT_EQ(run(&c, first), -ENOENT) << "sixteen numbers are kept";
  EXPECT_EQ(run(&c, c.change(Op::Delete, block_key(16))), -ENOENT);
  EXPECT_EQ(run(&c, first), -EALREADY);
}

TEST_F(NetServerTest, WhoChoseByAnOldMapIsToldSoButNotAboutWhatIsDone) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(7, 100);
  const wire::Desc d = c.change(Op::Put, block_key(1), 100);
  EXPECT_EQ(run(&c, d, v, 1), 1);
  server->set_map(2, {});
  EXPECT_EQ(run(&c, c.get(block_key(1), 100), {}, 1), -ESTALE);
  const wire::Desc late = c.change(Op::Delete, block_key(1));
  EXPECT_EQ(run(&c, late, {}, 1), -ESTALE);
  EXPECT_EQ(run(&c, d, v, 1), 1) << "done before, so answered";
  EXPECT_EQ(run(&c, late, {}, 2), 0) << "not done before, so done now, under the same number";
  EXPECT_EQ(run(&c, c.get(block_key(1), 100), {}, 3), -ENOENT) << "a newer map than ours is no fault";
  EXPECT_EQ(stats().stale_maps, 2u);
  Client next;
  ASSERT_EQ(admit(&next, capability({kAll})), 0);
  EXPECT_EQ(next.reply.map_version, 2u);
}

TEST_F(NetServerTest, WhatIsDamagedOrMalformedIsAnsweredAndNotMade) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  wire::Desc d = c.change(Op::Put, block_key(1), 100);
  d.seq = 0;
  EXPECT_EQ(run(&c, d, pattern(1, 100)), -EINVAL);
  d = c.get(block_key(1), 100);
  d.op = 77;
  EXPECT_EQ(run(&c, d), -EOPNOTSUPP);
  d = c.get(block_key(1, wire::kAnyNamespace), 100);
  EXPECT_EQ(run(&c, d), -EINVAL);
  EXPECT_EQ(run(&c, c.whole(Op::Scan, Kind::Block, 1, 4096, 1ull << 48)), -EINVAL);
  EXPECT_EQ(run(&c, c.whole(Op::Scan, Kind::Block, 1, 4096, UINT64_MAX)), 0);
  EXPECT_EQ(store->store->stats().chunks, 0u);
}

TEST_F(NetServerTest, WhatHasNotBegunIsCancelled) {
  NetServerOptions o;
  o.buffer_bytes = 32u << 20;  // one block for answers
  start(o);
  Client c, holder;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&holder, capability({kAll})), 0);
  const Bytes v = pattern(8, 9u << 20);
  ASSERT_EQ(put(&holder, block_key(1), v), 1);
  holder.channel->unread = true;  // has the only buffer there is
  EXPECT_EQ(run(&holder, holder.get(block_key(1), 16u << 20)), 9 << 20);
  const uint64_t a = send(&c, {c.get(block_key(1), 16u << 20)});
  const wire::Desc gone = c.change(Op::Delete, block_key(1));
  const uint64_t b = send(&c, {gone});
  turn();
  turn();
  EXPECT_FALSE(answered(&c, a));
  c.channel->cancel(b);
  EXPECT_EQ(result(&c, b), -ECANCELED);
  EXPECT_EQ(run(&holder, Client::desc(Op::Lookup, block_key(1))), 9 << 20);
  EXPECT_FALSE(answered(&c, a));
  c.channel->cancel(a);
  EXPECT_EQ(result(&c, a), -ECANCELED);
  EXPECT_EQ(run(&c, gone), 0) << "not done, so done when it comes again";
  holder.channel->read_all();
  EXPECT_EQ(stats().cancelled, 2u);
}

// The device begins when a turn ends: a few reads a turn, while what waits for no device is not held back.
TEST_F(NetServerTest, ATurnBeginsAFewReadsOfTheDeviceAndAllThatNeedsNone) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(put(&c, block_key(1), pattern(1, 100)), 1);
  const uint64_t lookups = send(&c, std::vector<wire::Desc>(64, Client::desc(Op::Lookup, block_key(1))));
  const uint64_t reads = send(&c, std::vector<wire::Desc>(64, c.get(block_key(1), 100)));
  for (uint32_t begun = kTurnStoreOps - 4; begun < 64; begun += kTurnStoreOps) {  // 64 lookups are worth 4 of them
    c.channel->receive();
    server->pump();  // the store stands still
    server->publish();
    EXPECT_EQ(stats().buffers_used, uint64_t{begun} * 4096);
    for (uint16_t i = 0; i < 64; ++i) EXPECT_TRUE(answered(&c, lookups, i));
  }
  for (uint16_t i = 0; i < 64; ++i) EXPECT_EQ(result(&c, reads, i), 100);
}

TEST_F(NetServerTest, CancellingTheFirstOfTwoLeavesTheSecond) {
  NetServerOptions o;
  o.buffer_bytes = 32u << 20;
  start(o);
  Client c, again, holder;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&again, {}, &c), 0);
  ASSERT_EQ(admit(&holder, capability({kAll})), 0);
  ASSERT_EQ(put(&holder, block_key(1), pattern(8, 9u << 20)), 1);
  holder.channel->unread = true;
  EXPECT_EQ(run(&holder, holder.get(block_key(1), 16u << 20)), 9 << 20);
  send(&c, {c.get(block_key(1), 16u << 20)});  // waits, and what is behind it too
  const wire::Desc gone = c.change(Op::Delete, block_key(1));
  const uint64_t a = send(&c, {gone}), b = send(&again, {gone});
  turn();
  turn();
  c.channel->cancel(a);
  EXPECT_EQ(result(&c, a), -ECANCELED);
  EXPECT_FALSE(answered(&again, b));
  holder.channel->read_all();
  EXPECT_EQ(result(&again, b), 0);
}

TEST_F(NetServerTest, WhoAsksForMoreThanItWasToldIsShutOut) {
  NetServerOptions o;
  o.max_ops = 8;
  o.buffer_bytes = 128u << 20;
  start(o);
  Client many, large, fine;
  ASSERT_EQ(admit(&fine, capability({kAll})), 0);
  ASSERT_EQ(admit(&many, capability({kAll})), 0);
  send(&many, std::vector<wire::Desc>(9, many.get(block_key(1), 100)));
  until([&] { return many.channel->ended(); });
  EXPECT_EQ(many.channel->why, -EPROTO) << "and is told so";
  ASSERT_EQ(admit(&large, capability({kAll})), 0);
  EXPECT_EQ(large.reply.max_in, 32u << 20);
  const Bytes v = pattern(1, 16u << 20);
  for (uint64_t i = 0; i < 3; ++i) send(&large, {large.change(Op::Put, block_key(i), uint32_t(v.size()))}, v);
  until([&] { return large.channel->ended(); });
  EXPECT_EQ(stats().protocol_errors, 2u);
  EXPECT_EQ(run(&fine, fine.get(block_key(7), 100)), -ENOENT);
  until([&] { return stats().connections == 1; });
  EXPECT_EQ(stats().buffers_used, 0u);
}

TEST_F(NetServerTest, AsMuchAsWasToldIsFineOnEachOfTwoConnections) {
  NetServerOptions o;
  o.max_ops = 8;
  start(o);
  Client c, more;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&more, {}, &c), 0);
  const auto eight = std::vector<wire::Desc>(8, c.get(block_key(1), 100));
  const uint64_t a = send(&c, eight), b = send(&more, eight);
  for (uint16_t i = 0; i < 8; ++i) {
    EXPECT_EQ(result(&c, a, i), -ENOENT);
    EXPECT_EQ(result(&more, b, i), -ENOENT);
  }
}

TEST_F(NetServerTest, AnEndedConnectionFreesAllItHad) {
  start();
  Client c;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Bytes v = pattern(9, 1u << 20);
  for (uint64_t i = 0; i < 10; ++i) send(&c, {c.change(Op::Put, block_key(i), uint32_t(v.size()))}, v);
  turn();
  c.channel->stall_payload = true;
  send(&c, {c.change(Op::Put, block_key(99), uint32_t(v.size()))}, v);
  turn();
  EXPECT_GT(stats().buffers_used, 0u);
  leave(&c, -ECONNRESET);
  until([&] { return stats().connections == 0; });
  EXPECT_EQ(stats().buffers_used, 0u);
  EXPECT_EQ(stats().sessions, 1u) << "it may come back";
}

TEST_F(NetServerTest, ASessionOutlivesItsConnectionsAWhileAndThenIsGone) {
  NetServerOptions o;
  o.keep_ms = 300;
  start(o);
  Client c, back, late;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  const Client was = c;
  const wire::Desc d = c.change(Op::Delete, block_key(1));
  EXPECT_EQ(run(&c, d), -ENOENT);
  leave(&c);
  ASSERT_EQ(admit(&back, {}, &was), 0);
  EXPECT_EQ(run(&back, d), -ENOENT);
  EXPECT_EQ(stats().replayed, 1u) << "with what it remembers";
  leave(&back);
  until([&] { return stats().sessions == 0; });
  EXPECT_EQ(admit(&late, {}, &was), -ESTALE);
}

TEST_F(NetServerTest, WhatAClientsLastSessionAskedForIsNotMadeAfterItsNextBegan) {
  NetServerOptions o;
  o.buffer_bytes = 32u << 20;  // one block for answers
  start(o);
  Client holder, old, second, next, other;
  ASSERT_EQ(admit(&holder, capability({kAll})), 0);
  client_number = 2;
  ASSERT_EQ(admit(&other, capability({kAll})), 0);
  client_number = 1;
  ASSERT_EQ(admit(&old, capability({kAll})), 0);
  ASSERT_EQ(admit(&second, {}, &old), 0);
  ASSERT_EQ(put(&holder, block_key(1), pattern(8, 9u << 20)), 1);
  holder.channel->unread = true;
  EXPECT_EQ(run(&holder, holder.get(block_key(1), 16u << 20)), 9 << 20);
  send(&old, {old.get(block_key(1), 16u << 20)});  // waits for the only buffer there is, and what is behind it too
  const wire::Desc gone = old.change(Op::Delete, block_key(1));
  send(&old, {gone});
  second.batch = 100;
  send(&second, {gone});  // the same once more
  turn();
  turn();
  send(&old, {old.change(Op::Write, file_key(1, 0), 100)}, pattern(1, 100));  // not yet read by the server
  const Client was = old;
  ASSERT_EQ(admit(&next, capability({kAll})), 0);
  EXPECT_EQ(run(&next, next.change(Op::Write, file_key(1, 0), 100), pattern(2, 100)), 100);
  holder.channel->read_all();
  until([&] { return stats().connections == 3; });
  EXPECT_EQ(run(&next, Client::desc(Op::Lookup, block_key(1))), 9 << 20) << "not deleted";
  EXPECT_EQ(run(&next, next.get(file_key(1, 0), 100)), 100);
  EXPECT_EQ(last.bytes, pattern(2, 100)) << "what came late is not made";
  Client late;
  EXPECT_EQ(admit(&late, {}, &was), -ESTALE);
  EXPECT_EQ(put(&other, block_key(3), pattern(1, 10)), 1) << "other clients have theirs";
  until([&] { return stats().sessions == 3; });
  EXPECT_EQ(stats().sessions_superseded, 1u);
}

// The store has as much to do as it may have, so that nobody behind the first who waits for it has a turn: a session of
// which nothing is left is still listed for one.
TEST_F(NetServerTest, ASessionEndsThoughItsTurnHasNotCome) {
  start();
  Client busy[4], waits, old, next;
  ASSERT_EQ(admit(&busy[0], capability({kAll})), 0);
  for (int i = 1; i < 4; ++i) ASSERT_EQ(admit(&busy[i], {}, &busy[0]), 0);
  ASSERT_EQ(admit(&waits, capability({kAll})), 0);
  client_number = 1;
  ASSERT_EQ(admit(&old, capability({kAll})), 0);
  ASSERT_EQ(put(&waits, block_key(1), pattern(1, 100)), 1);
  const auto step = [&] {  // the store stands still
    for (Client* c : clients) c->channel->receive();
    server->pump();
    server->publish();
  };
  for (Client& c : busy) send(&c, std::vector<wire::Desc>(opt.max_ops, c.get(block_key(1), 100)));
  for (uint32_t i = 0; i < 2 * kMaxStoreOps / kTurnStoreOps; ++i) step();
  ASSERT_EQ(stats().buffers_used, uint64_t{kMaxStoreOps} * 4096);
  const uint64_t b = send(&waits, {waits.get(block_key(1), 100)});
  step();
  send(&old, {old.change(Op::Delete, block_key(1))});
  step();
  ASSERT_EQ(admit(&next, capability({kAll})), 0);
  for (int i = 0; i < 10; ++i) step();
  EXPECT_EQ(stats().sessions, 3u) << "the old one is gone";
  EXPECT_EQ(stats().sessions_superseded, 1u);
  EXPECT_EQ(result(&waits, b), 100);
  EXPECT_EQ(run(&next, next.get(block_key(1), 100)), 100) << "what the old one asked for is not made";
}

// Its client begins anew after it was let in and before its transport is ready.
TEST_F(NetServerTest, AConnectionThatIsOutdatedBeforeItBeginsIsEnded) {
  start();
  client_number = 1;
  Client old, next;
  const wire::Hello h = hello(wire::Purpose::Session);
  const wire::Capability cap = capability({kAll});
  NetConn* conn = server->admit(h, &cap, &old.reply);
  ASSERT_NE(conn, nullptr);
  ASSERT_EQ(admit(&next, cap), 0);
  turn();
  turn();
  channels.push_back(std::make_unique<MemoryChannel>(server.get()));
  server->connect(conn, channels.back()->server_end());
  for (int i = 0; i < 5; ++i) turn();
  EXPECT_TRUE(channels.back()->ended());
  until([&] { return stats().sessions == 1; });
  EXPECT_EQ(put(&next, block_key(1), pattern(1, 10)), 1);
}

TEST_F(NetServerTest, AClientIsOneOfItsTenant) {
  start();
  client_number = 1;
  Client mine, theirs;
  wire::Capability cap = capability({kAll});
  cap.tenant[0] = 'a';
  ASSERT_EQ(admit(&mine, cap), 0);
  cap.tenant[0] = 'b';
  ASSERT_EQ(admit(&theirs, cap), 0);
  EXPECT_EQ(put(&mine, block_key(1), pattern(1, 10)), 1);
  EXPECT_EQ(stats().sessions_superseded, 0u);
}

TEST_F(NetServerTest, OnlyTheNumberOfASessionAttachesToIt) {
  start();
  Client c, wrong;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  for (size_t bit = 0; bit < 128; ++bit) {
    Client guess = c;
    guess.reply.session[bit / 8] ^= uint8_t(1u << (bit % 8));
    EXPECT_EQ(admit(&wrong, {}, &guess), -ESTALE);
  }
  EXPECT_EQ(stats().connections, 1u);
}

TEST_F(NetServerTest, ConnectionsAndSessionsAreBounded) {
  NetServerOptions o;
  o.max_sessions = 3;
  start(o);
  std::vector<Client> conns(wire::kMaxConnections + 1), others(4);
  ASSERT_EQ(admit(&conns[0], capability({kAll})), 0);
  for (size_t i = 1; i < wire::kMaxConnections; ++i) ASSERT_EQ(admit(&conns[i], {}, &conns[0]), 0);
  EXPECT_EQ(admit(&conns.back(), {}, &conns[0]), -EMFILE);
  ASSERT_EQ(admit(&others[0], capability({kAll})), 0);
  ASSERT_EQ(admit(&others[1], capability({kAll})), 0);
  EXPECT_EQ(admit(&others[2], capability({kAll})), -EBUSY);
  const Client left = others[0];
  leave(&others[0]);
  until([&] { return stats().connections == wire::kMaxConnections + 1; });
  ASSERT_EQ(admit(&others[2], capability({kAll})), 0) << "a session without connections makes room";
  EXPECT_EQ(admit(&others[3], {}, &left), -ESTALE);
}

TEST_F(NetServerTest, PutsOfACacheNamespaceMakeRoomForEachOther) {
  start({}, 32u << 20);
  Client cache, durable, mapped;
  ASSERT_EQ(admit(&cache, capability({{5, wire::kBlocks, wire::kAllRights, wire::kCache, 0}})), 0);
  const Bytes v = pattern(10, 900000);
  for (uint64_t i = 0; i < 60; ++i) ASSERT_EQ(put(&cache, block_key(i, 5), v), 1) << i;
  EXPECT_GT(store->store->stats().evictions, 0u);
  server->set_map(1, {7});
  ASSERT_EQ(admit(&mapped, capability({kAll})), 0);
  for (uint64_t i = 0; i < 60; ++i) ASSERT_EQ(put(&mapped, block_key(i, 7), v), 1) << i;
  ASSERT_EQ(admit(&durable, capability({{6, wire::kBlocks, wire::kAllRights, 0, 0}})), 0);
  int64_t r = 1;
  for (uint64_t i = 0; i < 60 && r == 1; ++i) r = put(&durable, block_key(i, 6), v);
  EXPECT_EQ(r, -ENOSPC) << "what is durable is not thrown away";
}

TEST_F(NetServerTest, TheEndWaitsForWhatIsUnderWayAndAdmitsNobody) {
  start();
  Client c, idle, late;
  ASSERT_EQ(admit(&c, capability({kAll})), 0);
  ASSERT_EQ(admit(&idle, capability({kAll})), 0);
  const Bytes v = pattern(11, 1u << 20);
  const uint64_t b = send(&c, {c.change(Op::Put, block_key(1), uint32_t(v.size()))}, v);
  c.channel->receive();
  bool gone = false;
  server->stop([&] { gone = true; });
  MemoryChannel* ch = c.channel;
  for (int i = 0; i < 100000 && !ch->answers.contains({b, uint16_t{0}}); ++i) turn();
  ASSERT_TRUE(ch->answers.contains({b, uint16_t{0}}));
  EXPECT_EQ((ch->answers[{b, uint16_t{0}}].result), 1);
  EXPECT_EQ(admit(&late, capability({kAll})), -EBUSY);
  until([&] { return gone; });
  EXPECT_TRUE(server->idle());
}

TEST(AnswerMemory, ANumberThatWasGivenUpIsFreeAgainAndThoseBeforeItAreNot) {
  AnswerMemory m(4);
  ServerOp op;
  NetTask t;
  t.op = &op;
  int64_t r = 0;
  op.desc.seq = 3;
  m.begin(&t, 11);
  EXPECT_EQ(m.end(&t, 5), nullptr);
  EXPECT_EQ(m.find(3, 11, &r), AnswerMemory::Found::Answered);
  EXPECT_EQ(r, 5);
  op.desc.seq = 7;  // takes the place of 3
  m.begin(&t, 12);
  EXPECT_EQ(m.find(7, 12, &r), AnswerMemory::Found::UnderWay);
  EXPECT_EQ(m.find(11, 13, &r), AnswerMemory::Found::Busy);
  EXPECT_EQ(m.give_up(&t), nullptr);
  EXPECT_EQ(m.find(7, 12, &r), AnswerMemory::Found::New);
  EXPECT_EQ(m.find(3, 11, &r), AnswerMemory::Found::Forgotten) << "it was executed: never again";
}

}  // namespace
}  // namespace kvfs::testing_net
