// Operations over RDMA between real devices: make test-rdma runs this in a virtual machine that has some.
#include <thread>

#include "rdma_fixture.h"

namespace kvfs {
namespace {

TEST(Verbs, MissingLibrariesAreNamedWithWhatToInstall) {
  VerbsTable table;
  std::string why;
  EXPECT_FALSE(load_verbs_from("libnosuchverbs.so.1", "librdmacm.so.1", &table, &why));
  EXPECT_EQ(why,
            "RDMA is not available: libnosuchverbs.so.1 cannot be loaded (apt install libibverbs1 librdmacm1 "
            "ibverbs-providers)");
  EXPECT_FALSE(load_verbs_from("libc.so.6", "libc.so.6", &table, &why));
  EXPECT_EQ(why, "RDMA is not available: the installed libraries have no ibv_get_device_list");
}

TEST_F(RdmaTest, PortsSayWhatTheyAre) {
  const RdmaPort& p = ports[0];
  EXPECT_TRUE(p.active);
  EXPECT_TRUE(p.ethernet);
  EXPECT_GT(p.speed, 0u);
  ASSERT_FALSE(p.netdevs.empty());
  const auto v4 = [](const RdmaGid& g) {
    return g.type == RdmaGid::Type::RoceV2 && g.text().starts_with("::ffff:10.90.0.");
  };
  EXPECT_TRUE(std::ranges::any_of(p.gids, v4));
  EXPECT_TRUE(rdma_selected(p, p.device));
  EXPECT_TRUE(rdma_selected(p, "nothing," + p.netdevs[0]));
  EXPECT_TRUE(rdma_selected(p, p.device.substr(0, 3) + "*/1"));
  EXPECT_FALSE(rdma_selected(p, "nothing"));
}

TEST_F(RdmaTest, GetsAndPutsOfAllSizesArriveWhole) {
  open();
  Memory memory(16u << 20);
  for (const bool declared : {false, true}) {
    if (declared) {
      ASSERT_EQ(client_device[0]->memory().declare(memory.p, memory.len), 0);
    }
    for (const uint32_t len : {1u, 4096u, 16384u, 16385u, 65536u, 1u << 20, 16u << 20}) {
      std::vector<ClientOp> ops(2);
      make_op(&ops[0], wire::Op::Get, len, memory.p, len);
      std::memset(memory.p, 0, len);
      clients[0]->submit(&ops[0]);
      EXPECT_EQ(clients[0]->bytes_inflight(), len);
      clients[0]->flush(1);
      ASSERT_TRUE(turn_until([&] { return ops[0].times == 1; })) << len;
      EXPECT_TRUE(ops[0].answered);
      EXPECT_EQ(ops[0].result, len);
      EXPECT_TRUE(filled(memory.p, len, len));
      fill(memory.p, len, len + 1);
      make_op(&ops[1], wire::Op::Put, len + 1, memory.p, len);
      clients[0]->submit(&ops[1]);
      clients[0]->flush(1);
      ASSERT_TRUE(turn_until([&] { return ops[1].times == 1; })) << len;
      EXPECT_EQ(ops[1].result, 1);
      EXPECT_TRUE(handler.puts.at(len + 1));
      EXPECT_EQ(clients[0]->bytes_inflight(), 0u);
    }
  }
  EXPECT_EQ(client_device[0]->memory().withdraw(memory.p), 0);
  // Only what was small and not declared was copied.
  EXPECT_EQ(clients[0]->counters().copied, 2u * (1 + 4096 + 16384));
}

TEST_F(RdmaTest, ABatchIsOneMessageEachWay) {
  open();
  Memory memory(64 * 4096);
  ASSERT_EQ(client_device[0]->memory().declare(memory.p, memory.len), 0);
  std::vector<ClientOp> ops(64);
  for (uint32_t i = 0; i < ops.size(); ++i) {
    make_op(&ops[i], wire::Op::Get, 1000 + i, memory.p + i * 4096, 4096);
    clients[0]->submit(&ops[i]);
  }
  clients[0]->flush(1);
  ASSERT_TRUE(turn_until([&] { return all_done(ops); }));
  for (uint32_t i = 0; i < ops.size(); ++i) EXPECT_TRUE(filled(memory.p + i * 4096, 4096, 1000 + i)) << i;
  EXPECT_EQ(clients[0]->counters().frames_out, 1u);
  EXPECT_EQ(clients[0]->counters().calls, 1u);
  EXPECT_EQ(servers[0]->counters().rdma, 64u);
  EXPECT_LE(servers[0]->counters().frames_out, 2u);
  EXPECT_EQ(client_device[0]->memory().counters().registered, 1u);
}

TEST_F(RdmaTest, ManyMixedOperationsComeBackOnceEach) {
  open();
  open();
  Memory memory(256 * 65536);
  ASSERT_EQ(client_device[0]->memory().declare(memory.p, memory.len / 2), 0);  // the other half is not
  std::vector<ClientOp> ops(256);
  uint64_t seed = 1;
  for (int round = 0; round < 4; ++round) {
    for (uint32_t i = 0; i < ops.size(); ++i) {
      seed = seed * 6364136223846793005u + 1442695040888963407u;
      const uint32_t len = 1 + uint32_t(seed >> 40) % 65536;
      ops[i].times = 0;
      uint8_t* mem = memory.p + size_t{i} * 65536;
      const uint64_t key = uint64_t(round) * 1000 + i;
      const bool put = (seed >> 33) % 3 == 0;
      if (put) fill(mem, len, key);
      make_op(&ops[i], put ? wire::Op::Put : wire::Op::Get, key, mem, len);
      clients[i % 2]->submit(&ops[i]);
      if (i % 50 == 49)
        for (auto& c : clients) c->flush(1);
    }
    for (auto& c : clients) c->flush(1);
    ASSERT_TRUE(turn_until([&] { return all_done(ops); }, 60));
    for (ClientOp& op : ops) {
      uint64_t key;
      std::memcpy(&key, op.desc.key, sizeof key);
      EXPECT_EQ(op.times, 1u);
      ASSERT_TRUE(op.answered) << op.result;
      if (wire::Op{op.desc.op} == wire::Op::Put) {
        EXPECT_TRUE(handler.puts.at(key));
      } else {
        EXPECT_TRUE(filled(static_cast<uint8_t*>(op.mem.ptr), op.desc.len, key));
      }
    }
  }
}

TEST_F(RdmaTest, DamagedPayloadIsNoticedByItsReceiver) {
  open();
  Memory memory(65536);
  std::vector<ClientOp> ops(2);
  handler.damage = true;
  make_op(&ops[0], wire::Op::Get, 1, memory.p, 65536);
  clients[0]->submit(&ops[0]);
  clients[0]->flush(1);
  ASSERT_TRUE(turn_until([&] { return ops[0].times == 1; }));
  EXPECT_FALSE(ops[0].answered);
  EXPECT_EQ(ops[0].result, -EBADMSG);
  make_op(&ops[1], wire::Op::Put, 2, memory.p, 65536);
  clients[0]->submit(&ops[1]);
  clients[0]->flush(1);
  memory.p[100] ^= 1;  // before the server has read it
  ASSERT_TRUE(turn_until([&] { return ops[1].times == 1; }));
  EXPECT_TRUE(ops[1].answered);
  EXPECT_EQ(ops[1].result, -EBADMSG);
  EXPECT_EQ(clients[0]->error(), 0);
}

TEST_F(RdmaTest, MemoryThatCannotBeWrittenCanBePutButNotRead) {
  open();
  Memory memory(65536);
  fill(memory.p, 65536, 5);
  ASSERT_EQ(mprotect(memory.p, 65536, PROT_READ), 0);
  ASSERT_EQ(client_device[0]->memory().declare(memory.p, 65536), 0);
  std::vector<ClientOp> ops(2);
  make_op(&ops[0], wire::Op::Put, 5, memory.p, 65536);
  make_op(&ops[1], wire::Op::Get, 6, memory.p, 65536);
  for (ClientOp& op : ops) clients[0]->submit(&op);
  clients[0]->flush(1);
  ASSERT_TRUE(turn_until([&] { return all_done(ops); }));
  EXPECT_EQ(ops[0].result, 1);
  EXPECT_TRUE(handler.puts.at(5));
  EXPECT_FALSE(ops[1].answered);
  EXPECT_EQ(ops[1].result, -EACCES);
  EXPECT_EQ(clients[0]->error(), 0);
}

TEST_F(RdmaTest, CancelledOperationsComeBackCancelled) {
  open();
  handler.hold = true;
  Memory memory(3 * 65536);
  std::vector<ClientOp> ops(3);
  for (uint32_t i = 0; i < 3; ++i) make_op(&ops[i], wire::Op::Get, i, memory.p + i * 65536, 65536);
  clients[0]->submit(&ops[0]);
  clients[0]->submit(&ops[1]);
  clients[0]->flush(1);
  ASSERT_TRUE(turn_until([&] { return handler.held.size() == 2; }));
  clients[0]->submit(&ops[2]);
  clients[0]->cancel(&ops[2]);  // has not left
  clients[0]->cancel(&ops[0]);
  turn();
  EXPECT_TRUE(handler.cancelled.empty()) << "the rest of the batch is wanted";
  clients[0]->cancel(&ops[1]);
  ASSERT_TRUE(turn_until([&] { return all_done(ops); }));
  EXPECT_EQ(handler.cancelled.size(), 1u);
  for (const ClientOp& op : ops) {
    EXPECT_TRUE(op.cancelled);
    EXPECT_FALSE(op.answered);
    EXPECT_EQ(op.times, 1u);
  }
  EXPECT_EQ(clients[0]->error(), 0);
}

TEST_F(RdmaTest, ACancelThatIsNotAnsweredEndsTheConnectionAndTheMemoryIsLeftAlone) {
  open();
  handler.hold = true;
  handler.answers_cancel = false;
  Memory memory(65536);
  std::vector<ClientOp> ops(1);
  make_op(&ops[0], wire::Op::Get, 9, memory.p, 65536);
  clients[0]->submit(&ops[0]);
  clients[0]->flush(1);
  ASSERT_TRUE(turn_until([&] { return handler.held.size() == 1; }));
  clients[0]->cancel(&ops[0]);
  ASSERT_TRUE(turn_until([&] { return ops[0].times == 1; }));
  EXPECT_TRUE(ops[0].cancelled);
  EXPECT_NE(clients[0]->error(), 0);
  handler.hold = false;
  handler.answer_held(0);  // writes, if anything still could
  for (int i = 0; i < 10; ++i) turn();
  EXPECT_TRUE(std::all_of(memory.p, memory.p + 65536, [](uint8_t b) { return b == 0; }));
}

TEST_F(RdmaTest, PingsAreAnswered) {
  open();
  const uint64_t before = clients[0]->heard_ns();
  clients[0]->ping();
  ASSERT_TRUE(turn_until([&] { return clients[0]->heard_ns() != before; }));
}

TEST_F(RdmaTest, APutWaitsForABufferOfTheServers) {
  open();
  std::vector<uint8_t*> away;
  std::swap(away, handler.small);
  Memory memory(65536);
  fill(memory.p, 65536, 3);
  std::vector<ClientOp> ops(1);
  make_op(&ops[0], wire::Op::Put, 3, memory.p, 65536);
  clients[0]->submit(&ops[0]);
  clients[0]->flush(1);
  for (int i = 0; i < 10; ++i) turn();
  EXPECT_EQ(ops[0].times, 0u);
  std::swap(away, handler.small);
  servers[0]->resume();
  ASSERT_TRUE(turn_until([&] { return ops[0].times == 1; }));
  EXPECT_EQ(ops[0].result, 1);
}

}  // namespace
}  // namespace kvfs
