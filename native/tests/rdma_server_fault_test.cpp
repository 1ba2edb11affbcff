// Errors of RDMA devices at the server: connections that cannot be made, requests that cannot be posted, completions that say
// no, shared receives that are not there. Whatever it is, the connection ends, what the handler had of it comes back exactly
// once and not before the device is done with its memory, others go on, and nothing is left. Runs everywhere.
#include <set>

#include "rdma_fake.h"
#include "rdma_fixture.h"

namespace kvfs {
namespace {

using Call = FakeRdma::Call;
using Qp = FakeRdma::Qp;
using wire::Op;

// Sees that each operation comes back once.
class CountingHandler : public TestHandler {
 public:
  bool buffer(ServerOp* op) override {
    if (!TestHandler::buffer(op)) return false;
    live.insert(op);
    return true;
  }
  void take(ServerOp* op, int err) override {
    live.insert(op);
    TestHandler::take(op, err);
  }
  void released(ServerOp* op) override {
    EXPECT_EQ(live.erase(op), 1u) << "it came back before";
    if (on_released) on_released(op);
    TestHandler::released(op);
  }
  void ended(ServerChannel* c, int err) override {
    EXPECT_FALSE(ends.contains(c)) << "it has ended before";
    TestHandler::ended(c, err);
  }
  size_t live_of(const ServerChannel* c) const {
    return size_t(std::ranges::count_if(live, [c](const ServerOp* op) { return op->channel == c; }));
  }
  std::set<ServerOp*> live;
  std::function<void(ServerOp*)> on_released;
};

class RdmaServerFault : public ::testing::TestWithParam<bool> {  // with shared receives
 protected:
  struct Client {
    Qp* qp = nullptr;
    FakeRdma::Cq* cq = nullptr;
    std::unique_ptr<RdmaServerChannel> channel;
    uint64_t batch = 0;
    size_t seen = 0;                                           // of the queue pair's messages
    std::map<std::pair<uint64_t, uint16_t>, int64_t> answers;  // by batch and index
    bool pong = false;
  };
  static constexpr uint32_t kBig = 1 << 20;

  void SetUp() override {
    f.attr.max_srq = GetParam() ? 16 : 0;
    ASSERT_TRUE(Uring::create({}, &uring));
    open_device();
    fill(memory.p, memory.len, 1);
  }
  void TearDown() override {
    for (auto& c : clients) c->channel->close();
    EXPECT_TRUE(turn_until([&] { return std::ranges::all_of(clients, [](auto& c) { return c->channel->closed(); }); }));
    EXPECT_TRUE(handler.live.empty());
    EXPECT_EQ(handler.small.size(), TestHandler::kSmalls) << "all buffers are back";
    EXPECT_EQ(handler.large.size(), TestHandler::kLarges);
    if (!f.srqs.empty()) {
      EXPECT_EQ(f.srqs[0]->receives.size(), RdmaDevice::kSharedReceives) << "and all shared receives";
    }
    clients.clear();
    device.reset();
    f.expect_nothing_left();
  }
  void open_device() {
    ASSERT_TRUE(RdmaDevice::open(verbs, "fake0", RdmaDevice::Role::Server, {}, &device));
    ASSERT_EQ(device->srq() != nullptr, GetParam());
    ASSERT_EQ(device->attach(*uring), 0);
    ASSERT_EQ(device->memory().declare(handler.pool.p, handler.pool.len), 0);
  }
  std::unique_ptr<RdmaConnection> accept(int* err) {
    RdmaIncoming incoming(verbs, f.make_id(nullptr), wire::RdmaHello{}, 16);
    return incoming.accept(*device, err);
  }
  Client* open(RdmaServerOptions options = {}) {
    int err = 0;
    auto connection = accept(&err);
    EXPECT_EQ(err, 0);
    if (connection == nullptr) return nullptr;
    auto c = std::make_unique<Client>();
    c->qp = f.qps.back();
    c->cq = f.cqs.back();
    c->channel = std::make_unique<RdmaServerChannel>(*uring, std::move(connection), options, handler);
    c->channel->start();
    clients.push_back(std::move(c));
    return clients.back().get();
  }

  bool frame(Client* c, wire::Type type, const std::vector<wire::Desc>& descs = {}) {
    wire::FrameHeader h{};
    h.magic = wire::kFrameMagic;
    h.type = uint8_t(type);
    h.count = uint16_t(descs.size());
    h.batch = ++c->batch;
    wire::seal(&h, descs.data());
    std::vector<uint8_t> bytes(sizeof h + descs.size() * sizeof(wire::Desc));
    std::memcpy(bytes.data(), &h, sizeof h);
    if (!descs.empty()) std::memcpy(bytes.data() + sizeof h, descs.data(), descs.size() * sizeof(wire::Desc));
    return f.deliver(c->qp, bytes.data(), bytes.size());
  }
  bool ping(Client* c) { return frame(c, wire::Type::Ping); }
  // The i-th megabyte of the client's memory.
  wire::Desc desc(Op op, uint64_t seed, uint32_t len, uint32_t i = 0) {
    ClientOp o;
    make_op(&o, op, seed, nullptr, len);
    o.desc.addr = uintptr_t(memory.p + size_t{i} * kBig);
    o.desc.rkey = 1;
    if (op == Op::Put) {
      fill(memory.p + size_t{i} * kBig, len, seed);
      o.desc.sum = wire::data_sum(memory.p + size_t{i} * kBig, len);
    }
    return o.desc;
  }
  void request(Client* c, const std::vector<wire::Desc>& descs) { ASSERT_TRUE(frame(c, wire::Type::Request, descs)); }

  void turn() {
    ASSERT_GE(uring->submit_and_wait(20'000'000), 0);
    if (std::exchange(handler.freed, false))
      for (auto& c : clients)
        if (!c->channel->closed()) c->channel->resume();
    for (ServerChannel* c : std::exchange(handler.dirty, {})) c->flush();
    for (auto& c : clients) read(c.get());
  }
  bool turn_until(const std::function<bool()>& done, uint64_t seconds = 10) {
    const uint64_t end = clock_now() + seconds * 1'000'000'000u;
    while (!done()) {
      if (clock_now() > end) return false;
      turn();
    }
    return true;
  }
  void read(Client* c) {
    if (!f.alive(c->qp)) return;
    for (; c->seen < c->qp->messages.size(); ++c->seen) {
      const std::vector<uint8_t>& m = c->qp->messages[c->seen];
      wire::FrameHeader h;
      ASSERT_EQ(wire::check_message(m.data(), m.size(), false, &h), 0);
      c->pong |= h.type == uint8_t(wire::Type::Pong);
      if (h.type != uint8_t(wire::Type::Response)) continue;
      for (uint16_t i = 0; i < h.count; ++i) {
        wire::Result r;
        std::memcpy(&r, m.data() + sizeof h + i * sizeof r, sizeof r);
        EXPECT_FALSE(c->answers.contains({h.batch, r.index})) << "answered twice";
        c->answers[{h.batch, r.index}] = r.result;
      }
    }
  }
  // Both ways.
  void works(Client* c) {
    std::memset(memory.p, 0, 65536);
    request(c, {desc(Op::Get, 77, 65536), desc(Op::Put, 78, 8192, 1)});
    const uint64_t b = c->batch;
    ASSERT_TRUE(turn_until([&] { return c->answers.contains({b, 0}) && c->answers.contains({b, 1}); }));
    EXPECT_EQ((c->answers[{b, 0}]), 65536);
    EXPECT_TRUE(filled(memory.p, 65536, 77));
    EXPECT_EQ((c->answers[{b, 1}]), 1);
    EXPECT_TRUE(handler.puts[78]);
  }
  // Operations in every state: one answered and on its way, one at the handler, four whose payload is being read, one that
  // waits for a buffer.
  void make_busy(Client* c) {
    c->qp->stalled = true;
    request(c, {desc(Op::Get, 1, 4096)});
    ASSERT_TRUE(turn_until([&] { return c->qp->requests.size() == 2; })) << "a write and an answer";
    handler.hold = true;
    request(c, {desc(Op::Get, 2, 4096)});
    std::vector<wire::Desc> puts;
    for (uint32_t i = 0; i < TestHandler::kLarges + 1; ++i) puts.push_back(desc(Op::Put, 10 + i, kBig, i));
    request(c, puts);
    ASSERT_TRUE(turn_until([&] { return c->qp->requests.size() == 2 + TestHandler::kLarges; }));
    ASSERT_TRUE(turn_until([&] { return handler.held.size() == 1; }));
    ASSERT_EQ(c->channel->ops_inflight(), 3 + TestHandler::kLarges);
    handler.hold = false;
    // The device may write into these until the queue pair is gone.
    std::set<ServerOp*> reading;
    for (ServerOp* op : handler.live)
      if (Op{op->desc.op} == Op::Put && op->buf != nullptr) reading.insert(op);
    EXPECT_EQ(reading.size(), TestHandler::kLarges);
    handler.on_released = [this, qp = c->qp, reading](ServerOp* op) {
      if (reading.contains(op)) {
        EXPECT_FALSE(f.alive(qp)) << "its memory is given back too early";
      }
    };
  }
  void expect_ended(Client* c, int err) {
    ASSERT_TRUE(turn_until([&] { return handler.ends.contains(c->channel.get()) && c->channel->closed(); }));
    EXPECT_EQ(handler.ends.at(c->channel.get()), err);
    EXPECT_EQ(c->channel->ops_inflight(), 0u);
    EXPECT_EQ(handler.live_of(c->channel.get()), 0u);
    EXPECT_FALSE(f.alive(c->qp));
  }
  // `breaks` a connection that is busy beside one that is not; `err`: what the handler hears.
  void breaks_one(const std::function<void(Client*)>& break_it, int err) {
    Client* other = open();
    Client* c = open();
    ASSERT_NE(other, nullptr);
    ASSERT_NE(c, nullptr);
    works(other);
    make_busy(c);
    if (HasFatalFailure()) return;
    break_it(c);
    expect_ended(c, err);
    handler.on_released = nullptr;
    EXPECT_FALSE(handler.ends.contains(other->channel.get()));
    works(other);
    Client* later = open();
    ASSERT_NE(later, nullptr);
    works(later);
  }

  FakeRdma f;
  const VerbsTable verbs = FakeRdma::table();
  Memory memory{8 * kBig};  // the clients'
  CountingHandler handler;
  std::unique_ptr<Uring> uring;
  std::unique_ptr<RdmaDevice> device;
  std::vector<std::unique_ptr<Client>> clients;
};

INSTANTIATE_TEST_SUITE_P(Receives, RdmaServerFault, ::testing::Bool(),
                         [](const auto& p) { return p.param ? "Shared" : "Own"; });

class RdmaServerOwnReceives : public RdmaServerFault {};
INSTANTIATE_TEST_SUITE_P(Receives, RdmaServerOwnReceives, ::testing::Values(false));
class RdmaServerSharedReceives : public RdmaServerFault {};
INSTANTIATE_TEST_SUITE_P(Receives, RdmaServerSharedReceives, ::testing::Values(true));

TEST_P(RdmaServerFault, ServesManyRequestsAndKeepsItsReceives) {
  Client* c = open();
  ASSERT_NE(c, nullptr);
  const auto receives = [&] { return GetParam() ? f.srqs[0]->receives.size() : c->qp->receives.size(); };
  const size_t posted = receives();
  EXPECT_EQ(posted, GetParam() ? size_t{RdmaDevice::kSharedReceives} : 64u);
  for (int i = 0; i < 300; ++i) {
    works(c);
    if (HasFatalFailure()) return;
  }
  ASSERT_TRUE(ping(c));
  EXPECT_TRUE(turn_until([&] { return c->pong; }));
  EXPECT_EQ(receives(), posted);
  while (ping(c)) continue;
  EXPECT_EQ(receives(), 0u) << "a client that sends more than there are receives has to wait";
  EXPECT_TRUE(turn_until([&] { return receives() == posted; }));
  works(c);
}

TEST_P(RdmaServerFault, EveryStepOfAcceptingMayFail) {
  struct Step {
    Call call;
    int times, steps;  // how often it has to fail, and in how many places it may
  };
  const int own = GetParam() ? 0 : 1;  // receives of its own have memory, too
  const Step steps[] = {{Call::CreateEvents, 1, 1}, {Call::MigrateId, 1, 1}, {Call::CreateChannel, 1, 1},
                        {Call::CreateCq, 1, 1},     {Call::CreateQp, 4, 1},  {Call::RegMr, 1, 1 + own},
                        {Call::InitQpAttr, 1, 3},   {Call::ModifyQp, 1, 3},  {Call::NotifyCq, 1, 1},
                        {Call::Accept, 1, 1}};
  Client* other = open();
  ASSERT_NE(other, nullptr);
  works(other);
  const size_t ids = f.ids.size(), mrs = f.mrs.size(), events = f.events.size();
  for (const Step& s : steps) {
    for (int i = 0; i < s.steps; ++i) {
      SCOPED_TRACE(int(s.call) * 10 + i);
      f.fail(s.call, EINVAL, i, s.times);
      int err = 0;
      EXPECT_EQ(accept(&err), nullptr);
      EXPECT_LT(err, 0);
      EXPECT_FALSE(f.pending(s.call)) << "it did not come to that";
      EXPECT_EQ(f.qps.size(), 1u);
      EXPECT_EQ(f.cqs.size(), 1u);
      EXPECT_EQ(f.channels.size(), 1u);
      EXPECT_EQ(f.ids.size(), ids);
      EXPECT_EQ(f.events.size(), events);
      EXPECT_EQ(f.mrs.size(), mrs);
    }
  }
  works(other);
  Client* later = open();
  ASSERT_NE(later, nullptr);
  works(later);
}

TEST_P(RdmaServerOwnReceives, FirstOnesThatCannotBePostedFailTheConnection) {
  VerbsTable broken = verbs;
  broken.post_recv = [](ibv_qp*, ibv_recv_wr*, ibv_recv_wr**) { return ENOMEM; };
  std::unique_ptr<RdmaDevice> other;
  ASSERT_TRUE(RdmaDevice::open(broken, "fake0", RdmaDevice::Role::Server, {}, &other));
  int err = 0;
  RdmaIncoming incoming(broken, f.make_id(nullptr), wire::RdmaHello{}, 16);
  EXPECT_EQ(incoming.accept(*other, &err), nullptr);
  EXPECT_EQ(err, -ENOMEM);
}

TEST_P(RdmaServerFault, ARequestThatCannotBePostedEndsItsConnection) {
  breaks_one(
      [&](Client* c) {
        c->qp->post_send = ENOMEM;
        EXPECT_TRUE(ping(c));
      },
      -ENOMEM);
}

TEST_P(RdmaServerFault, AReadThatCannotBePostedEndsItsConnection) {
  Client* other = open();
  Client* c = open();
  c->qp->post_send = EINVAL;
  request(c, {desc(Op::Put, 5, 8192), desc(Op::Put, 6, kBig, 1)});
  expect_ended(c, -EINVAL);
  EXPECT_FALSE(handler.puts.contains(5)) << "what never came was not executed";
  EXPECT_FALSE(handler.puts.contains(6));
  works(other);
}

TEST_P(RdmaServerFault, AReceiveThatCannotBePostedEndsItsConnection) {
  breaks_one(
      [&](Client* c) {
        c->qp->post_recv = ENOMEM;
        f.fail(Call::PostSrqRecv, ENOMEM);
        EXPECT_TRUE(ping(c));
      },
      -ENOMEM);
}

TEST_P(RdmaServerSharedReceives, ThoseThatCouldNotBePostedAreNotLost) {
  Client* idle = open();
  while (!f.srqs[0]->receives.empty()) {
    Client* c = open();
    ASSERT_TRUE(ping(c));
    for (int i = 0; i < 40 && ping(c); ++i) continue;
    f.fail(Call::PostSrqRecv, ENOMEM, 0, 2);  // when they are taken, and at the end
    expect_ended(c, -ENOMEM);
  }
  EXPECT_FALSE(ping(idle));
  f.fail(Call::PostSrqRecv, ENOMEM);
  expect_ended(open(), -ENOMEM);
  works(open());
  works(idle);
}

TEST_P(RdmaServerFault, ABrokenCompletionQueueEndsItsConnection) {
  breaks_one(
      [&](Client* c) {
        c->cq->broken = true;
        FakeRdma::ring(c->cq->channel->fd);
      },
      -EIO);
}

TEST_P(RdmaServerFault, ACompletionQueueThatTellsNothingMoreEndsItsConnection) {
  breaks_one(
      [&](Client* c) {
        f.fail(Call::NotifyCq, EINVAL);
        FakeRdma::ring(c->cq->channel->fd);
      },
      -EIO);
}

TEST_P(RdmaServerFault, RequestsThatEndWithErrorsEndTheirConnection) {
  const std::pair<ibv_wc_status, int> cases[] = {{IBV_WC_RETRY_EXC_ERR, -ETIMEDOUT},
                                                 {IBV_WC_LOC_PROT_ERR, -EIO},
                                                 {IBV_WC_REM_ACCESS_ERR, -EPROTO},
                                                 {IBV_WC_FATAL_ERR, -EIO},
                                                 {IBV_WC_REM_OP_ERR, -EREMOTEIO},
                                                 {ibv_wc_status(31), -EIO},
                                                 {IBV_WC_WR_FLUSH_ERR, 0}};  // 0: the client said goodbye
  for (const auto& [status, err] : cases) {
    SCOPED_TRACE(int(status));
    breaks_one([&, s = status](Client* c) { f.finish(c->qp, s); }, err);
    if (HasFatalFailure()) return;
  }
}

TEST_P(RdmaServerFault, AReadThatEndsWithAnErrorExecutesNothing) {
  Client* c = open();
  c->qp->stalled = true;
  request(c, {desc(Op::Put, 5, 8192), desc(Op::Put, 6, 8192, 1)});
  ASSERT_TRUE(turn_until([&] { return c->qp->requests.size() == 2; }));
  f.finish(c->qp);
  f.finish(c->qp, IBV_WC_REM_ACCESS_ERR);
  expect_ended(c, -EPROTO);
  EXPECT_FALSE(handler.puts.contains(6));
}

TEST_P(RdmaServerFault, MessagesThatDoNotArriveWholeEndTheirConnection) {
  const uint8_t byte = 0;
  breaks_one([&](Client* c) { f.deliver(c->qp, &byte, 1, IBV_WC_LOC_LEN_ERR); }, -EPROTO);
  breaks_one([&](Client* c) { f.deliver(c->qp, &byte, 1, IBV_WC_LOC_PROT_ERR); }, -EIO);
  breaks_one([&](Client* c) { f.deliver(c->qp, &byte, 1, IBV_WC_SUCCESS, IBV_WC_RECV_RDMA_WITH_IMM); }, -EPROTO);
  breaks_one([&](Client* c) { f.deliver(c->qp, nullptr, RdmaDevice::kRequestBytes + 1); }, -EPROTO);
}

TEST_P(RdmaServerFault, CompletionsOfNothingEndTheirConnection) {
  ibv_wc wc{};
  wc.wr_id = 12345;
  breaks_one([&](Client* c) { f.complete(c->cq, wc); }, -EIO);
  wc.wr_id = RdmaConnection::kReceive | 70000;
  breaks_one([&](Client* c) { f.complete(c->cq, wc); }, -EIO);
}

TEST_P(RdmaServerFault, EventsOfAQueuePairEndItsConnection) {
  const std::pair<ibv_event_type, int> cases[] = {{IBV_EVENT_QP_FATAL, -EIO},
                                                  {IBV_EVENT_QP_REQ_ERR, -EIO},
                                                  {IBV_EVENT_QP_ACCESS_ERR, -EPROTO},
                                                  {IBV_EVENT_CQ_ERR, -EIO}};
  for (const auto& [type, err] : cases) {
    SCOPED_TRACE(int(type));
    breaks_one([&, t = type](Client* c) { f.tell(t, c->qp); }, err);
    if (HasFatalFailure()) return;
  }
}

TEST_P(RdmaServerFault, EventsOfTheConnectionManagerEndTheConnection) {
  const std::pair<rdma_cm_event_type, int> cases[] = {{RDMA_CM_EVENT_DISCONNECTED, 0},
                                                      {RDMA_CM_EVENT_DEVICE_REMOVAL, -ENODEV},
                                                      {RDMA_CM_EVENT_UNREACHABLE, -ECONNREFUSED}};
  for (const auto& [type, err] : cases) {
    SCOPED_TRACE(int(type));
    breaks_one([&, t = type](Client*) { f.tell(f.events.back(), t); }, err);
    if (HasFatalFailure()) return;
  }
}

TEST_P(RdmaServerFault, SeveralErrorsAtOnceEndItOnce) {
  breaks_one(
      [&](Client* c) {
        f.finish(c->qp, IBV_WC_RETRY_EXC_ERR);
        f.tell(IBV_EVENT_QP_FATAL, c->qp);
        f.tell(f.events.back(), RDMA_CM_EVENT_DISCONNECTED);
        c->qp->post_send = EIO;
        c->channel->close();
        for (int i = 0; i < 4; ++i) EXPECT_TRUE(ping(c));
      },
      0);  // close() came first
}

TEST_P(RdmaServerFault, EventsOfTheDeviceEndAllItsConnections) {
  std::vector<std::pair<ibv_event_type, int>> cases = {{IBV_EVENT_PORT_ERR, -ENETDOWN},
                                                       {IBV_EVENT_DEVICE_FATAL, -ENODEV}};
  if (GetParam()) cases.insert(cases.begin() + 1, {IBV_EVENT_SRQ_ERR, -EIO});
  for (const auto& [type, err] : cases) {
    SCOPED_TRACE(int(type));
    Client* one = open();
    Client* two = open();
    make_busy(one);
    if (HasFatalFailure()) return;
    f.tell(type);
    expect_ended(one, err);
    expect_ended(two, err);
    handler.on_released = nullptr;
    EXPECT_EQ(device->dead(), type != IBV_EVENT_PORT_ERR);
    if (!device->dead()) continue;
    clients.clear();
    handler.ends.clear();
    device.reset();
    open_device();
    works(open());
    for (auto& c : clients) c->channel->close();
    ASSERT_TRUE(turn_until([&] { return clients[0]->channel->closed(); }));
  }
}

TEST_P(RdmaServerFault, AQueuePairThatDoesNotSayThatItHasTakenItsLastReceiveIsNotWaitedForForEver) {
  breaks_one(
      [&](Client* c) {
        c->qp->mute = true;
        f.finish(c->qp, IBV_WC_RETRY_EXC_ERR);
      },
      -ETIMEDOUT);
}

TEST_P(RdmaServerFault, AStateThatCannotBeChangedEndsTheConnectionAllTheSame) {
  breaks_one(
      [&](Client* c) {
        if (GetParam()) f.fail(Call::ModifyQp, EINVAL);  // nobody else has to change it
        f.finish(c->qp, IBV_WC_RETRY_EXC_ERR);
      },
      -ETIMEDOUT);
  EXPECT_FALSE(f.pending(Call::ModifyQp));
}

TEST_P(RdmaServerFault, MemoryThatCannotBeRegisteredFailsItsOperationsAlone) {
  Client* c = open();
  f.fail(Call::RegMr, ENOMEM, 0, 2);
  request(c, {desc(Op::Get, 1, 4096), desc(Op::Put, 2, 4096, 1)});
  ASSERT_TRUE(turn_until([&] { return c->answers.size() == 2; }));
  EXPECT_EQ((c->answers[{c->batch, 0}]), -ENOMEM);
  EXPECT_EQ((c->answers[{c->batch, 1}]), -ENOMEM);
  EXPECT_FALSE(handler.puts[2]);
  works(c);
}

// ---- the device

class RdmaServerDevice : public ::testing::Test {
 protected:
  Status open() { return RdmaDevice::open(verbs, "fake0", RdmaDevice::Role::Server, {}, &device); }
  FakeRdma f;
  const VerbsTable verbs = FakeRdma::table();
  std::unique_ptr<RdmaDevice> device;
};

TEST_F(RdmaServerDevice, EveryStepOfOpeningItMayFail) {
  struct Step {
    Call call;
    int skip, err;
  };
  const Step steps[] = {{Call::OpenDevice, 0, EACCES}, {Call::QueryDevice, 0, EIO},     {Call::AllocPd, 0, ENOMEM},
                        {Call::CreateSrq, 0, EINVAL},  {Call::RegMr, 0, ENOMEM},        {Call::PostSrqRecv, 0, ENOMEM},
                        {Call::PostSrqRecv, 100, EIO}, {Call::PostSrqRecv, 255, EINVAL}};
  for (const Step& s : steps) {
    SCOPED_TRACE(int(s.call) * 1000 + s.skip);
    f.fail(s.call, s.err, s.skip);
    const Status status = open();
    EXPECT_EQ(status.err, s.err);
    EXPECT_NE(status.message.find("fake0"), std::string::npos) << status.message;
    EXPECT_EQ(device, nullptr);
    f.expect_nothing_left();
  }
  EXPECT_TRUE(open());
  EXPECT_NE(device->srq(), nullptr);
  device.reset();
  f.expect_nothing_left();
}

TEST_F(RdmaServerDevice, WithoutSharedReceivesConnectionsHaveTheirOwn) {
  for (const int err : {ENOMEM, EOPNOTSUPP, ENOSYS}) {  // it promises them and has none
    f.fail(Call::CreateSrq, err);
    ASSERT_TRUE(open());
    EXPECT_EQ(device->srq(), nullptr);
  }
  f.attr.max_srq_wr = int(RdmaDevice::kSharedReceives) - 1;
  ASSERT_TRUE(open());
  EXPECT_EQ(device->srq(), nullptr) << "too few";
  f.attr.max_srq = 0;
  ASSERT_TRUE(open());
  EXPECT_EQ(device->srq(), nullptr);
  int err = 0;
  RdmaIncoming incoming(verbs, f.make_id(nullptr), wire::RdmaHello{}, 16);
  EXPECT_NE(incoming.accept(*device, &err), nullptr);
  device.reset();
  f.expect_nothing_left();
}

}  // namespace
}  // namespace kvfs
