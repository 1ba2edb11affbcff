// Errors of RDMA devices that none at hand makes: the client's end of a connection on a table of verbs that is made up, for
// its error paths only. rdma_server_fault_test.cpp has the server's. Runs everywhere.
#include "rdma_fake.h"
#include "rdma_fixture.h"

namespace kvfs {
namespace {

using Call = FakeRdma::Call;

class RdmaFault : public ::testing::Test {
 protected:
  void SetUp() override {
    f.stalled = true;
    ASSERT_TRUE(Uring::create({}, &uring));
    ASSERT_TRUE(RdmaDevice::open(verbs, "fake0", RdmaDevice::Role::Client, {}, &device));
    ASSERT_EQ(device->attach(*uring), 0);
  }
  void TearDown() override {
    channel.reset();
    device.reset();
    f.expect_nothing_left();
  }
  int connect(std::unique_ptr<RdmaConnection>* c) {
    RdmaDial d;
    d.device = device.get();
    d.deadline_ns = clock_now() + 1'000'000'000u;
    bool answered = false;
    return rdma_connect(d, c, &answered);
  }
  void open() {
    std::unique_ptr<RdmaConnection> c;
    ASSERT_EQ(connect(&c), 0);
    channel = std::make_unique<RdmaClientChannel>(*uring, std::move(c), ChannelLimits{});
    ops = std::vector<ClientOp>(3);
    for (uint32_t i = 0; i < 3; ++i) make_op(&ops[i], wire::Op::Get, i, memory.p + i * 65536, 65536);
    channel->submit(&ops[0]);
    channel->submit(&ops[1]);
    channel->flush(1);
    channel->submit(&ops[2]);  // has not left
  }
  void expect_all_back(int err) {
    const uint64_t end = clock_now() + 10'000'000'000u;
    while (!channel->closed() && clock_now() < end) uring->submit_and_wait(10'000'000);
    ASSERT_TRUE(channel->closed());
    EXPECT_EQ(channel->error(), err);
    for (const ClientOp& op : ops) {
      EXPECT_EQ(op.times, 1u);
      EXPECT_FALSE(op.answered);
      EXPECT_EQ(op.result, err);
    }
    EXPECT_EQ(channel->bytes_inflight(), 0u);
    ClientOp late;
    make_op(&late, wire::Op::Get, 9, memory.p, 4096);
    channel->submit(&late);
    channel->flush(1);
    EXPECT_EQ(late.times, 1u) << "what comes too late comes back at once";
    EXPECT_EQ(late.result, err);
  }

  FakeRdma f;
  const VerbsTable verbs = FakeRdma::table();
  Memory memory{3 * 65536};
  std::unique_ptr<Uring> uring;
  std::unique_ptr<RdmaDevice> device;
  std::unique_ptr<RdmaClientChannel> channel;
  std::vector<ClientOp> ops;
};

TEST_F(RdmaFault, EveryStepOfMakingAConnectionMayFail) {
  std::unique_ptr<RdmaConnection> c;
  f.fail(Call::CreateQp, ENOMEM, 0, 4);  // however little is asked for
  EXPECT_EQ(connect(&c), -ENOMEM);
  for (int i = 0; i < 2; ++i) {
    f.fail(Call::RegMr, ENOMEM, i);
    EXPECT_EQ(connect(&c), -ENOMEM);
  }
  for (int i = 0; i < 3; ++i) {
    f.fail(Call::ModifyQp, EINVAL, i);
    EXPECT_EQ(connect(&c), -EINVAL);
  }
  f.port = IBV_PORT_DOWN;
  EXPECT_EQ(connect(&c), -ENETDOWN);
  EXPECT_EQ(c, nullptr);
}

TEST_F(RdmaFault, ADeviceThatGivesLessInlineIsUsed) {
  f.fail(Call::CreateQp, ENOMEM, 0, 2);
  std::unique_ptr<RdmaConnection> c;
  EXPECT_EQ(connect(&c), 0);
}

TEST_F(RdmaFault, AFailedRegistrationFailsItsOperationAlone) {
  open();
  f.fail(Call::RegMr, ENOMEM);
  channel->flush(1);
  EXPECT_EQ(ops[2].times, 1u);
  EXPECT_EQ(ops[2].result, -ENOMEM);
  EXPECT_EQ(channel->error(), 0);
  channel->close();
  ops.resize(2);
  expect_all_back(-ESHUTDOWN);
}

TEST_F(RdmaFault, MemoryThatIsNotThereIsItsOperationsFault) {
  open();
  f.fail(Call::RegMr, EFAULT);
  channel->flush(1);
  EXPECT_EQ(ops[2].times, 1u);
  EXPECT_EQ(ops[2].result, -EFAULT);
  EXPECT_TRUE(ops[2].unreachable);
  for (const int device : {ENOMEM, EIO}) {
    ClientOp op;
    make_op(&op, wire::Op::Get, 9, memory.p, 65536);
    channel->submit(&op);
    f.fail(Call::RegMr, device);
    channel->flush(1);
    EXPECT_EQ(op.times, 1u);
    EXPECT_EQ(op.result, -device);
    EXPECT_FALSE(op.unreachable);
  }
  channel->close();
  ops.resize(2);
  expect_all_back(-ESHUTDOWN);
}

TEST_F(RdmaFault, AConnectionForWhichNoPollIsLeftEnds) {
  std::vector<int> polls;
  const int fd = eventfd(0, EFD_NONBLOCK);
  int handle = 0;
  while ((handle = uring->add_poll(
              fd, [](void*, uint32_t) {}, nullptr)) >= 0)
    polls.push_back(handle);
  EXPECT_GT(polls.size(), 4000u);
  open();
  expect_all_back(handle);
  for (const int p : polls) uring->remove_poll(p);
  ::close(fd);
}

TEST_F(RdmaFault, AnUnusedRegistrationMakesRoomForANewOne) {
  RdmaMemory::Limits limits;
  limits.bytes = 100'000;
  RdmaMemory m(verbs, &f.pd, IBV_ACCESS_LOCAL_WRITE, limits);
  ASSERT_EQ(m.declare(memory.p, 65536), 0);
  ASSERT_EQ(m.declare(memory.p + 65536, 65536), 0);
  EXPECT_EQ(m.declare(memory.p + 1000, 65536), -EINVAL);
  int err = 0;
  RdmaRegion* first = m.acquire(memory.p + 10, 100, true, true, &err);
  ASSERT_NE(first, nullptr);
  EXPECT_EQ(m.acquire(memory.p + 65536, 100, true, true, &err), nullptr);
  EXPECT_EQ(err, -ENOMEM);
  EXPECT_EQ(m.withdraw(memory.p), -EBUSY);
  m.release(first);
  RdmaRegion* second = m.acquire(memory.p + 65536, 65536, true, true, &err);
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(m.counters().dropped, 1u);
  m.release(second);
  EXPECT_EQ(m.acquire(memory.p + 65536, 65537, true, true, &err), nullptr) << "beyond the end";
  EXPECT_EQ(m.withdraw(memory.p), 0);
  EXPECT_EQ(m.withdraw(memory.p), -ENOENT);
}

TEST_F(RdmaFault, APostThatFailsEndsTheChannel) {
  open();
  f.qps.back()->post_send = ENOMEM;
  channel->flush(1);
  expect_all_back(-ENOMEM);
}

TEST_F(RdmaFault, CompletionsWithErrorsEndTheChannel) {
  const std::pair<ibv_wc_status, int> cases[] = {
      {IBV_WC_RETRY_EXC_ERR, -ETIMEDOUT}, {IBV_WC_RNR_RETRY_EXC_ERR, -ETIMEDOUT},
      {IBV_WC_LOC_PROT_ERR, -EIO},        {IBV_WC_REM_ACCESS_ERR, -EPROTO},
      {IBV_WC_FATAL_ERR, -EIO},           {IBV_WC_GENERAL_ERR, -EIO},
      {ibv_wc_status(31), -EIO},          {IBV_WC_REM_OP_ERR, -EREMOTEIO},
      {IBV_WC_WR_FLUSH_ERR, -ECONNRESET}};
  for (const auto& [status, err] : cases) {
    SCOPED_TRACE(int(status));
    open();
    f.finish(f.qps.back(), status);
    expect_all_back(err);
    channel.reset();
  }
}

TEST_F(RdmaFault, ACompletionOfNothingEndsTheChannel) {
  open();
  ibv_wc wc{};
  wc.wr_id = 12345;
  f.complete(wc);
  expect_all_back(-EIO);
  channel.reset();
  open();
  wc.wr_id = RdmaConnection::kReceive | 70000;
  f.complete(wc);
  expect_all_back(-EIO);
}

TEST_F(RdmaFault, AMessageThatIsNoMessageEndsTheChannel) {
  open();
  ibv_wc wc{};
  wc.wr_id = RdmaConnection::kReceive;
  wc.opcode = IBV_WC_RECV_RDMA_WITH_IMM;
  f.complete(wc);
  expect_all_back(-EPROTO);
}

TEST_F(RdmaFault, ABrokenCompletionQueueEndsTheChannel) {
  open();
  f.cqs.back()->broken = true;
  FakeRdma::ring(f.channels.back()->fd);
  expect_all_back(-EIO);
}

TEST_F(RdmaFault, EventsOfTheDeviceEndTheChannel) {
  const std::pair<ibv_event_type, int> cases[] = {{IBV_EVENT_PORT_ERR, -ENETDOWN},
                                                  {IBV_EVENT_CQ_ERR, -EIO},
                                                  {IBV_EVENT_QP_FATAL, -EIO},
                                                  {IBV_EVENT_QP_ACCESS_ERR, -EPROTO},
                                                  {IBV_EVENT_DEVICE_FATAL, -ENODEV}};
  for (const auto& [type, err] : cases) {
    SCOPED_TRACE(int(type));
    open();
    f.tell(type);
    expect_all_back(err);
    channel.reset();
  }
  EXPECT_TRUE(device->dead());
}

TEST_F(RdmaFault, TheDevicesRemovalEndsTheChannel) {
  open();
  f.tell(f.events.back(), RDMA_CM_EVENT_DEVICE_REMOVAL);
  expect_all_back(-ENODEV);
}

TEST_F(RdmaFault, AConnectionOfADownPortGoesWhenItIsUpAgain) {
  open();
  f.port = IBV_PORT_DOWN;
  f.tell(IBV_EVENT_PORT_ERR);
  expect_all_back(-ENETDOWN);
  EXPECT_EQ(f.ids.size(), 1u) << "no goodbye is sent into a port that is down";
  f.port = IBV_PORT_ACTIVE;
  f.tell(IBV_EVENT_PORT_ACTIVE);
  for (int i = 0; i < 5 && !f.ids.empty(); ++i) uring->submit_and_wait(100'000'000);
  EXPECT_TRUE(f.ids.empty());
}

}  // namespace
}  // namespace kvfs
