// Errors of RDMA devices that none at hand makes: the client's end of a connection on a table of verbs that is made up
// here, for its error paths only. Runs everywhere.
#include <sys/eventfd.h>
#include <unistd.h>

#include <deque>

#include "rdma_fixture.h"

namespace kvfs {
namespace {

// One device, one connection; what fails, and what completes, the test says.
struct Fake {
  ibv_device device{};
  ibv_device* list[2] = {&device, nullptr};
  ibv_context context{};
  ibv_pd pd{};
  ibv_comp_channel channel{};
  ibv_cq cq{};
  ibv_qp qp{};
  rdma_event_channel events{};
  rdma_cm_id id{};
  std::deque<rdma_cm_event_type> cm;
  std::deque<ibv_wc> completions;
  std::deque<ibv_async_event> async;
  std::deque<ibv_mr> mrs;
  std::vector<uint64_t> sent;  // ids
  std::vector<uint64_t> receives;
  uint64_t receive_at = 0;
  int regs = 0, fail_reg_at = -1, reg_errno = ENOMEM;
  int qps = 0, fail_qps = 0;
  int post_send = 0, poll = 0, modify_at = -1, modifies = 0;
  int live_mrs = 0, live_qps = 0, live_cqs = 0, live_ids = 0, live_channels = 0;
  ibv_port_state port = IBV_PORT_ACTIVE;

  Fake() {
    context.async_fd = eventfd(0, EFD_NONBLOCK);
    channel.fd = eventfd(0, EFD_NONBLOCK);
    events.fd = eventfd(0, EFD_NONBLOCK);
    std::strcpy(device.name, "fake0");
    context.device = &device;
    id.verbs = &context;
    id.port_num = 1;
    qp.qp_num = 5;
  }
  ~Fake() {
    for (const int fd : {context.async_fd, channel.fd, events.fd}) close(fd);
  }
  static void ring(int fd) {
    const uint64_t one = 1;
    EXPECT_EQ(write(fd, &one, sizeof one), ssize_t(sizeof one));
  }
  static bool rung(int fd) {
    uint64_t n;
    return read(fd, &n, sizeof n) > 0;
  }
  void complete(ibv_wc wc) {
    completions.push_back(wc);
    ring(channel.fd);
  }
  void complete_sent(ibv_wc_status status) {
    ibv_wc wc{};
    wc.wr_id = sent.empty() ? 0 : sent.back();
    wc.status = status;
    complete(wc);
  }
  void tell(ibv_event_type type) {
    ibv_async_event e{};
    e.event_type = type;
    if (type == IBV_EVENT_CQ_ERR) {
      e.element.cq = &cq;
    } else if (type == IBV_EVENT_PORT_ERR) {
      e.element.port_num = 1;
    } else {
      e.element.qp = &qp;
    }
    async.push_back(e);
    ring(context.async_fd);
  }
};

Fake* fake = nullptr;  // of the test that runs

int again() {
  errno = EAGAIN;
  return -1;
}

VerbsTable table() {
  VerbsTable t;
  t.get_device_list = [](int* n) {
    *n = 1;
    return fake->list;
  };
  t.free_device_list = [](ibv_device**) {};
  t.get_device_name = [](ibv_device* d) -> const char* { return d->name; };
  t.open_device = [](ibv_device*) { return &fake->context; };
  t.close_device = [](ibv_context*) { return 0; };
  t.query_device = [](ibv_context*, ibv_device_attr* a) {
    *a = {};
    a->max_qp_wr = 1024;
    a->max_qp_rd_atom = 16;
    a->phys_port_cnt = 1;
    return 0;
  };
  t.query_port = [](ibv_context*, uint8_t, ibv_port_attr* a) {
    *a = {};
    a->state = fake->port;
    return 0;
  };
  t.get_async_event = [](ibv_context*, ibv_async_event* e) {
    Fake::rung(fake->context.async_fd);
    if (fake->async.empty()) return again();
    *e = fake->async.front();
    fake->async.pop_front();
    return 0;
  };
  t.ack_async_event = [](ibv_async_event*) {};
  t.alloc_pd = [](ibv_context*) { return &fake->pd; };
  t.dealloc_pd = [](ibv_pd*) { return 0; };
  t.reg_mr = [](ibv_pd*, void* p, size_t n, int) -> ibv_mr* {
    if (fake->regs++ == fake->fail_reg_at) {
      errno = fake->reg_errno;
      return nullptr;
    }
    ++fake->live_mrs;
    fake->mrs.push_back({});
    fake->mrs.back().addr = p;
    fake->mrs.back().length = n;
    return &fake->mrs.back();
  };
  t.dereg_mr = [](ibv_mr*) {
    --fake->live_mrs;
    return 0;
  };
  t.create_comp_channel = [](ibv_context*) {
    ++fake->live_channels;
    return &fake->channel;
  };
  t.destroy_comp_channel = [](ibv_comp_channel*) {
    --fake->live_channels;
    return 0;
  };
  t.create_cq = [](ibv_context*, int, void*, ibv_comp_channel*, int) {
    ++fake->live_cqs;
    return &fake->cq;
  };
  t.destroy_cq = [](ibv_cq*) {
    --fake->live_cqs;
    return 0;
  };
  t.get_cq_event = [](ibv_comp_channel*, ibv_cq** cq, void**) {
    if (!Fake::rung(fake->channel.fd)) return again();
    *cq = &fake->cq;
    return 0;
  };
  t.ack_cq_events = [](ibv_cq*, unsigned) {};
  t.create_qp = [](ibv_pd*, ibv_qp_init_attr*) -> ibv_qp* {
    if (fake->qps++ < fake->fail_qps) {
      errno = ENOMEM;
      return nullptr;
    }
    ++fake->live_qps;
    return &fake->qp;
  };
  t.modify_qp = [](ibv_qp*, ibv_qp_attr*, int) { return fake->modifies++ == fake->modify_at ? EINVAL : 0; };
  t.destroy_qp = [](ibv_qp*) {
    --fake->live_qps;
    return 0;
  };
  t.req_notify_cq = [](ibv_cq*, int) { return 0; };
  t.poll_cq = [](ibv_cq*, int n, ibv_wc* wc) {
    if (fake->poll != 0) return fake->poll;
    int got = 0;
    for (; got < n && !fake->completions.empty(); ++got) {
      wc[got] = fake->completions.front();
      fake->completions.pop_front();
    }
    return got;
  };
  t.post_send = [](ibv_qp*, ibv_send_wr* wr, ibv_send_wr**) {
    if (fake->post_send != 0) return fake->post_send;
    for (; wr != nullptr; wr = wr->next) fake->sent.push_back(wr->wr_id);
    return 0;
  };
  t.post_recv = [](ibv_qp*, ibv_recv_wr* wr, ibv_recv_wr**) {
    for (; wr != nullptr; wr = wr->next) fake->receives.push_back(wr->wr_id);
    return 0;
  };
  t.create_event_channel = [] { return &fake->events; };
  t.destroy_event_channel = [](rdma_event_channel*) {};
  t.create_id = [](rdma_event_channel*, rdma_cm_id** id, void*, rdma_port_space) {
    ++fake->live_ids;
    *id = &fake->id;
    return 0;
  };
  t.destroy_id = [](rdma_cm_id*) {
    --fake->live_ids;
    return 0;
  };
  t.resolve_addr = [](rdma_cm_id*, sockaddr*, sockaddr*, int) {
    fake->cm = {RDMA_CM_EVENT_ADDR_RESOLVED, RDMA_CM_EVENT_ROUTE_RESOLVED, RDMA_CM_EVENT_CONNECT_RESPONSE};
    return 0;
  };
  t.resolve_route = [](rdma_cm_id*, int) { return 0; };
  t.connect = [](rdma_cm_id*, rdma_conn_param*) { return 0; };
  t.establish = [](rdma_cm_id*) { return 0; };
  t.disconnect = [](rdma_cm_id*) { return 0; };
  t.init_qp_attr = [](rdma_cm_id*, ibv_qp_attr*, int*) { return 0; };
  t.get_cm_event = [](rdma_event_channel*, rdma_cm_event** out) {
    static rdma_cm_event e;
    Fake::rung(fake->events.fd);
    if (fake->cm.empty()) return again();
    e = {};
    e.event = fake->cm.front();
    fake->cm.pop_front();
    *out = &e;
    return 0;
  };
  t.ack_cm_event = [](rdma_cm_event*) { return 0; };
  return t;
}

class RdmaFault : public ::testing::Test {
 protected:
  void SetUp() override {
    fake = &f;
    ASSERT_TRUE(Uring::create({}, &uring));
    ASSERT_TRUE(RdmaDevice::open(verbs, "fake0", RdmaDevice::Role::Client, {}, &device));
    ASSERT_EQ(device->attach(*uring), 0);
  }
  void TearDown() override {
    channel.reset();
    device.reset();
    EXPECT_EQ(f.live_mrs, 0) << "nothing stays registered";
    EXPECT_EQ(f.live_qps, 0);
    EXPECT_EQ(f.live_cqs, 0);
    EXPECT_EQ(f.live_ids, 0);
    EXPECT_EQ(f.live_channels, 0);
    fake = nullptr;
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

  Fake f;
  const VerbsTable verbs = table();
  Memory memory{3 * 65536};
  std::unique_ptr<Uring> uring;
  std::unique_ptr<RdmaDevice> device;
  std::unique_ptr<RdmaClientChannel> channel;
  std::vector<ClientOp> ops;
};

TEST_F(RdmaFault, EveryStepOfMakingAConnectionMayFail) {
  std::unique_ptr<RdmaConnection> c;
  f.fail_qps = 4;  // however little is asked for
  EXPECT_EQ(connect(&c), -ENOMEM);
  f.fail_qps = 0;
  for (int i = 0; i < 2; ++i) {
    f.fail_reg_at = f.regs + i;
    EXPECT_EQ(connect(&c), -ENOMEM);
  }
  f.fail_reg_at = -1;
  for (int i = 0; i < 3; ++i) {
    f.modify_at = f.modifies + i;
    EXPECT_EQ(connect(&c), -EINVAL);
  }
  f.modify_at = -1;
  f.port = IBV_PORT_DOWN;
  EXPECT_EQ(connect(&c), -ENETDOWN);
  EXPECT_EQ(c, nullptr);
}

TEST_F(RdmaFault, ADeviceThatGivesLessInlineIsUsed) {
  f.fail_qps = 2;
  std::unique_ptr<RdmaConnection> c;
  EXPECT_EQ(connect(&c), 0);
}

TEST_F(RdmaFault, AFailedRegistrationFailsItsOperationAlone) {
  open();
  f.fail_reg_at = f.regs;
  channel->flush(1);
  EXPECT_EQ(ops[2].times, 1u);
  EXPECT_EQ(ops[2].result, -ENOMEM);
  EXPECT_EQ(channel->error(), 0);
  channel->close();
  ops.resize(2);
  expect_all_back(-ESHUTDOWN);
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
  f.post_send = ENOMEM;
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
    f.complete_sent(status);
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
  f.poll = -1;
  Fake::ring(f.channel.fd);
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
  f.cm.push_back(RDMA_CM_EVENT_DEVICE_REMOVAL);
  Fake::ring(f.events.fd);
  expect_all_back(-ENODEV);
}

TEST_F(RdmaFault, AConnectionOfADownPortGoesWhenItIsUpAgain) {
  open();
  f.port = IBV_PORT_DOWN;
  f.tell(IBV_EVENT_PORT_ERR);
  expect_all_back(-ENETDOWN);
  EXPECT_EQ(f.live_ids, 1) << "no goodbye is sent into a port that is down";
  f.port = IBV_PORT_ACTIVE;
  ibv_async_event e{};
  e.event_type = IBV_EVENT_PORT_ACTIVE;
  e.element.port_num = 1;
  f.async.push_back(e);
  Fake::ring(f.context.async_fd);
  for (int i = 0; i < 5 && f.live_ids != 0; ++i) uring->submit_and_wait(100'000'000);
  EXPECT_EQ(f.live_ids, 0);
}

}  // namespace
}  // namespace kvfs
