// Peers that break the rules, cables that are pulled, connections that are refused; between real devices, as rdma_test.cpp.
#include <cstdlib>
#include <thread>

#include "rdma_fixture.h"

namespace kvfs {
namespace {

// The end of a connection that says what it likes.
struct RawEnd : RdmaConnection::User {
  void on_sent(void*, bool ok) override { failed |= !ok; }
  void on_received(const uint8_t* message, uint32_t len) override { messages.emplace_back(message, message + len); }
  void on_turn(uint64_t) override {}
  void on_closed(int err) override {
    closed = true;
    error = err;
  }
  std::unique_ptr<RdmaConnection> connection;
  std::vector<std::vector<uint8_t>> messages;
  bool closed = false, failed = false;
  int error = 0;

  void send(const void* bytes, uint32_t len) {
    const uint32_t f = connection->claim();
    std::memcpy(connection->frame(f), bytes, len);
    connection->send(f, len, nullptr, true);
    connection->post();
  }
  void request(std::vector<wire::Desc> descs) {
    wire::FrameHeader h{};
    h.magic = wire::kFrameMagic;
    h.type = uint8_t(wire::Type::Request);
    h.count = uint16_t(descs.size());
    h.batch = 1;
    wire::seal(&h, descs.data());
    std::vector<uint8_t> bytes(sizeof h + descs.size() * sizeof(wire::Desc));
    std::memcpy(bytes.data(), &h, sizeof h);
    std::memcpy(bytes.data() + sizeof h, descs.data(), descs.size() * sizeof(wire::Desc));
    send(bytes.data(), uint32_t(bytes.size()));
  }
};

class RdmaFailureTest : public RdmaTest {
 protected:
  void SetUp() override {
    RdmaTest::SetUp();
    if (IsSkipped() || HasFatalFailure()) return;
    open();  // a client that keeps the rules, on the same devices
  }
  void TearDown() override {
    if (!clients.empty()) {
      good_still_works();
      raw.connection.reset();
    }
    RdmaTest::TearDown();
  }
  // A hostile client and the server's channel for it, servers.back().
  void open_hostile(RdmaServerOptions options = {}) {
    std::unique_ptr<RdmaConnection> s;
    ASSERT_EQ(connect(0, &raw.connection, &s), 0);
    ASSERT_EQ(raw.connection->start(*uring, raw), 0);
    servers.push_back(std::make_unique<RdmaServerChannel>(*uring, std::move(s), options, handler));
    servers.back()->start();
  }
  // err 1: for whatever reason it saw first. Its own queue pair breaks too, so it may have said goodbye before.
  void expect_thrown_out(int err = -EPROTO) {
    ServerChannel* c = servers.back().get();
    ASSERT_TRUE(turn_until([&] { return handler.ends.contains(c); }));
    if (err <= 0) {
      EXPECT_EQ(handler.ends.at(c), err);
    }
    EXPECT_EQ(handler.ends.size(), 1u) << "nobody else";
    ASSERT_TRUE(turn_until([&] { return raw.closed; })) << "the client sees the end";
  }
  void good_still_works() {
    if (clients[0]->error() != 0) return;
    Memory memory(65536);
    std::vector<ClientOp> ops(1);
    make_op(&ops[0], wire::Op::Get, 77, memory.p, 65536);
    clients[0]->submit(&ops[0]);
    clients[0]->flush(1);
    EXPECT_TRUE(turn_until([&] { return ops[0].times == 1; }));
    EXPECT_EQ(ops[0].result, 65536);
    EXPECT_TRUE(filled(memory.p, 65536, 77));
  }
  static wire::Desc get(uint64_t addr, uint32_t rkey, wire::Op what = wire::Op::Get) {
    ClientOp op;
    make_op(&op, what, 1, nullptr, 4096);
    op.desc.addr = addr;
    op.desc.rkey = rkey;
    return op.desc;
  }
  RawEnd raw;
};

TEST_F(RdmaFailureTest, GarbageEndsTheConnection) {
  open_hostile();
  raw.send("these are not the bytes of any frame of the protocol, although as many", 60);
  expect_thrown_out();
}

TEST_F(RdmaFailureTest, AFrameOfTheWrongLengthEndsTheConnection) {
  open_hostile();
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(wire::Type::Request);
  h.count = 2;
  uint8_t bytes[sizeof h + sizeof(wire::Desc)] = {};
  std::memcpy(bytes, &h, sizeof h);
  raw.send(bytes, sizeof bytes);
  expect_thrown_out();
}

TEST_F(RdmaFailureTest, ADamagedFrameEndsTheConnection) {
  open_hostile();
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(wire::Type::Ping);
  wire::seal(&h, nullptr);
  h.batch ^= 4;
  raw.send(&h, sizeof h);
  expect_thrown_out(-EBADMSG);
}

TEST_F(RdmaFailureTest, AKeyThatIsNotTheClientsEndsTheConnection) {
  open_hostile();
  raw.request({get(0x10000, 0xdead)});  // the server writes to where nothing is
  expect_thrown_out(1);
}

TEST_F(RdmaFailureTest, AKeyThatIsNotTheClientsForAPutEndsTheConnection) {
  open_hostile();
  wire::Desc d = get(0x10000, 0xdead, wire::Op::Put);
  raw.request({d});
  expect_thrown_out(1);
}

TEST_F(RdmaFailureTest, MoreThanTheSessionAllowsEndsTheConnection) {
  handler.hold = true;
  open_hostile({.max_ops = 8, .max_batch = 8});
  std::vector<wire::Desc> descs(8, get(0, 0, wire::Op::Get));
  raw.request(descs);
  raw.request({descs[0]});
  expect_thrown_out();
  handler.hold = false;
}

TEST_F(RdmaFailureTest, RequestsThatMakeNoSenseAreRefusedOneByOne) {
  open_hostile();
  wire::Desc unknown = get(0, 0);
  unknown.op = 99;
  wire::Desc wraps = get(UINT64_MAX - 10, 1);
  wire::Desc pointless = get(0x1000, 1, wire::Op::Delete);
  pointless.len = 0;
  raw.request({unknown, wraps, pointless});
  ASSERT_TRUE(turn_until([&] { return raw.messages.size() == 1; }));
  wire::FrameHeader h;
  std::memcpy(&h, raw.messages[0].data(), sizeof h);
  ASSERT_EQ(h.count, 3);
  const int64_t expected[] = {-EOPNOTSUPP, -EINVAL, -EINVAL};
  for (int i = 0; i < 3; ++i) {
    wire::Result r;
    std::memcpy(&r, raw.messages[0].data() + sizeof h + size_t(i) * sizeof r, sizeof r);
    EXPECT_EQ(r.result, expected[r.index]);
  }
}

TEST_F(RdmaFailureTest, NobodyReachesTheServersMemory) {
  open_hostile();
  int err = 0;
  RdmaRegion* theirs = server_device[0]->memory().acquire(handler.pool.p, 4096, true, true, &err);
  ASSERT_NE(theirs, nullptr);
  const uint32_t key = theirs->mr->rkey;
  server_device[0]->memory().release(theirs);
  handler.pool.p[0] = 42;
  Memory mine(4096);
  RdmaRegion* local = client_device[0]->memory().acquire(mine.p, 4096, true, false, &err);
  ASSERT_NE(local, nullptr);
  raw.connection->write(mine.p, local->mr->lkey, 4096, uintptr_t(handler.pool.p), key, nullptr, true);
  raw.connection->post();
  ASSERT_TRUE(turn_until([&] { return raw.closed; }));
  EXPECT_EQ(handler.pool.p[0], 42);
  client_device[0]->memory().release(local);
  ServerChannel* c = servers.back().get();
  ASSERT_TRUE(turn_until([&] { return handler.ends.contains(c); }));
}

TEST_F(RdmaFailureTest, AnswersToWhatWasNotAskedEndTheClientsChannel) {
  struct Case {
    const char* name;
    wire::Result result;
    uint64_t batch_xor;
  };
  const Case cases[] = {{"unknown batch", {0, 0, 4096, 4096, 0}, 1},
                        {"index", {5, 0, 4096, 4096, 0}, 0},
                        {"more than asked for", {0, 0, 8192, 8192, 0}, 0},
                        {"length is not the result", {0, 0, 0, 4096, 0}, 0},
                        {"reserved", {0, 1, 4096, 4096, 0}, 0}};
  for (const Case& k : cases) {
    SCOPED_TRACE(k.name);
    RawEnd server;
    std::unique_ptr<RdmaConnection> c;
    ASSERT_EQ(connect(0, &c, &server.connection), 0);
    ASSERT_EQ(server.connection->start(*uring, server), 0);
    RdmaClientChannel channel(*uring, std::move(c), {});
    Memory memory(8192);
    std::vector<ClientOp> ops(1);
    make_op(&ops[0], wire::Op::Get, 1, memory.p, 4096);
    channel.submit(&ops[0]);
    channel.flush(1);
    ASSERT_TRUE(turn_until([&] { return !server.messages.empty(); }));
    wire::FrameHeader h;
    std::memcpy(&h, server.messages[0].data(), sizeof h);
    h.type = uint8_t(wire::Type::Response);
    h.batch ^= k.batch_xor;
    wire::seal(&h, &k.result);
    uint8_t bytes[sizeof h + sizeof k.result];
    std::memcpy(bytes, &h, sizeof h);
    std::memcpy(bytes + sizeof h, &k.result, sizeof k.result);
    server.send(bytes, sizeof bytes);
    EXPECT_TRUE(turn_until([&] { return channel.closed() && server.closed; }));
    EXPECT_EQ(ops[0].times, 1u);
    EXPECT_FALSE(ops[0].answered);
    EXPECT_EQ(channel.error(), -EPROTO);
  }
}

TEST_F(RdmaFailureTest, RefusalsAreTheServers) {
  const RdmaDial d = dial(0);
  std::unique_ptr<RdmaConnection> c;
  bool answered = false;
  std::atomic<int> result = 1;
  std::thread t([&] { result = rdma_connect(d, &c, &answered); });
  while (result == 1) {
    pollfd p{listener[0]->fd(), POLLIN, 0};
    poll(&p, 1, 20);
    listener[0]->take([&](RdmaIncoming in) { in.reject(-ESTALE); });
  }
  t.join();
  EXPECT_EQ(result, -ESTALE);
  EXPECT_TRUE(answered);
}

TEST_F(RdmaFailureTest, WhereNobodyListensTheConnectionIsRefused) {
  RdmaDial d = dial(0);
  reinterpret_cast<sockaddr_in*>(&d.destination)->sin_port = htons(1);
  std::unique_ptr<RdmaConnection> c;
  bool answered = true;
  EXPECT_EQ(rdma_connect(d, &c, &answered), -ECONNREFUSED);
  EXPECT_FALSE(answered);
}

TEST_F(RdmaFailureTest, AnAddressOfAnotherDeviceIsNotUsed) {
  RdmaDial d = dial(0);
  d.source = *ipv4(ports[1]);
  std::unique_ptr<RdmaConnection> c;
  bool answered = true;
  EXPECT_EQ(rdma_connect(d, &c, &answered), -EADDRNOTAVAIL);
}

TEST_F(RdmaFailureTest, AClientThatIsGoneGivesEverythingBack) {
  handler.hold = true;
  open_hostile();
  raw.request({get(0x1000, 1), get(0x1000, 1)});
  ASSERT_TRUE(turn_until([&] { return handler.held.size() == 2; }));
  raw.connection.reset();  // as when its process is killed
  ServerChannel* c = servers.back().get();
  ASSERT_TRUE(turn_until([&] { return handler.ends.contains(c) && c->closed(); }));
  EXPECT_EQ(handler.ends.at(c), 0);
  handler.hold = false;
}

TEST_F(RdmaFailureTest, ManyShortConnectionsLeaveNothingBehind) {
  // More than there are shared receives: if each kept one, none would be left.
  for (int i = 0; i < 270; ++i) {
    RawEnd client;
    std::unique_ptr<RdmaConnection> s;
    ASSERT_EQ(connect(0, &client.connection, &s), 0) << i;
    ASSERT_EQ(client.connection->start(*uring, client), 0);
    RdmaServerChannel channel(*uring, std::move(s), {}, handler);
    channel.start();
    client.send("x", 1);
    client.send("y", 1);
    ASSERT_TRUE(turn_until([&] { return channel.closed(); })) << i;
    handler.ends.clear();
    handler.dirty.clear();
  }
}

// Four devices on one switch; rail 0 is from device 0 to 2, rail 1 from 1 to 3.
int cable(int port, const char* state) {
  return std::system(("ip -n fabric link set port" + std::to_string(port) + " " + state).c_str());
}

TEST_F(RdmaFailureTest, APulledCableEndsItsRailAndNotTheOther) {
  for (const int pulled : {0, 2}) {  // the client's own, the server's
    SCOPED_TRACE(pulled);
    open(0);
    open(1);
    RdmaClientChannel& cut = *clients[clients.size() - 2];
    RdmaClientChannel& whole = *clients.back();
    Memory memory(2 * 32 * 65536);
    std::vector<ClientOp> ops(64);
    for (uint32_t i = 0; i < 64; ++i) make_op(&ops[i], wire::Op::Get, i, memory.p + i * 65536, 65536);
    bool down = false;
    uint64_t rounds = 0;
    const auto keep_going = [&](RdmaClientChannel& c, uint32_t from) {
      for (uint32_t i = from; i < from + 32; ++i) {
        if (ops[i].times == 0 && rounds != 0) continue;
        ops[i].times = 0;
        c.submit(&ops[i]);
      }
      c.flush(1);
    };
    keep_going(cut, 0);
    keep_going(whole, 32);
    rounds = 1;
    ASSERT_TRUE(turn_until([&] {
      if (cut.error() == 0) keep_going(cut, 0);
      keep_going(whole, 32);
      if (++rounds == 5) {
        EXPECT_EQ(cable(pulled, "down"), 0);
        down = true;
      }
      return down && cut.closed();
    }));
    for (uint32_t i = 0; i < 32; ++i) EXPECT_EQ(ops[i].times, 1u) << "each operation comes back once";
    EXPECT_EQ(whole.error(), 0);
    const uint64_t before = whole.counters().frames_in;
    ASSERT_TRUE(turn_until([&] {
      keep_going(whole, 32);
      return whole.counters().frames_in > before + 10;
    }));
    ASSERT_TRUE(turn_until(
        [&] { return std::all_of(ops.begin() + 32, ops.end(), [](const ClientOp& o) { return o.times != 0; }); }));
    for (uint32_t i = 32; i < 64; ++i) EXPECT_TRUE(filled(memory.p + i * 65536, 65536, i));
    EXPECT_EQ(cable(pulled, "up"), 0);
    // A new connection works as soon as the port does.
    uint64_t tries = 0;
    std::unique_ptr<RdmaConnection> c, s;
    while (connect(0, &c, &s) != 0 && ++tries < 20) {
      for (int i = 0; i < 5; ++i) turn();
    }
    ASSERT_NE(c, nullptr);
  }
}

TEST_F(RdmaFailureTest, AClientThatIsGoneWithoutAWordIsNoticed) {
  ServerChannel* idle = servers.back().get();
  ASSERT_EQ(cable(0, "down"), 0);
  const bool ended = turn_until([&] { return handler.ends.contains(idle); }, 60);
  EXPECT_EQ(cable(0, "up"), 0);
  ASSERT_TRUE(turn_until([&] { return client_device[0]->port_active(1); }));
  ASSERT_TRUE(ended);
  EXPECT_EQ(handler.ends.at(idle), -ETIMEDOUT);
}

TEST_F(RdmaFailureTest, AClientThatOnlyWaitsIsNotTakenForGone) {
  const uint64_t until = clock_now() + RdmaServerChannel::kProbeNs * 5 / 4;
  ASSERT_TRUE(turn_until([&] { return clock_now() > until; }, 60));
  EXPECT_TRUE(handler.ends.empty());
  EXPECT_EQ(clients[0]->error(), 0);
}

}  // namespace
}  // namespace kvfs
