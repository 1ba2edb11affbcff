// rdma_fake.h: RDMA devices whose errors a test chooses: FakeRdma is one device behind a table of verbs that is made up here.
// What a connection posts is done at once, by copying, or when the test says. Runs everywhere, in one thread.
#pragma once

#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "transport/verbs.h"

namespace kvfs {

class FakeRdma;
inline FakeRdma* fake = nullptr;  // of the test that runs

class FakeRdma {
 public:
  // What can be made to fail: see fail().
  enum class Call {
    OpenDevice,
    QueryDevice,
    AllocPd,
    RegMr,
    CreateChannel,
    CreateCq,
    NotifyCq,
    CreateSrq,
    PostSrqRecv,
    CreateQp,
    ModifyQp,
    CreateEvents,
    CreateId,
    MigrateId,
    InitQpAttr,
    Accept
  };
  struct Receive {
    uint64_t id;
    ibv_sge sge;
  };
  struct Events : rdma_event_channel {
    std::deque<rdma_cm_event_type> queue;
  };
  struct Cq : ibv_cq {
    std::deque<ibv_wc> completions;
    bool broken = false;
  };
  struct Srq : ibv_srq {
    std::deque<Receive> receives;
  };
  struct Request {  // to send, posted and not complete
    ibv_send_wr wr;
    ibv_sge sge;
  };
  struct Qp : ibv_qp {
    std::deque<Receive> receives;
    std::deque<Request> requests;
    std::vector<std::vector<uint8_t>> messages;  // that have left
    bool stalled = false;                        // what is posted is done when the test says
    bool mute = false;                           // it does not tell that it has taken its last shared receive
    int post_send = 0, post_recv = 0;            // errno
  };

  FakeRdma() {
    fake = this;
    context.async_fd = eventfd(0, EFD_NONBLOCK);
    std::strcpy(device.name, "fake0");
    context.device = &device;
    attr.max_qp_wr = 1024;
    attr.max_qp_rd_atom = attr.max_qp_init_rd_atom = 16;
    attr.max_srq = 16;
    attr.max_srq_wr = 1024;
    attr.phys_port_cnt = 1;
  }
  ~FakeRdma() {
    close(context.async_fd);
    fake = nullptr;
  }

  ibv_device device{};
  ibv_device* list[2] = {&device, nullptr};
  ibv_context context{};
  ibv_pd pd{};
  ibv_device_attr attr{};
  ibv_port_state port = IBV_PORT_ACTIVE;
  bool stalled = false;  // new queue pairs are
  std::deque<ibv_async_event> async;
  // What there is, the newest last.
  std::vector<Qp*> qps;
  std::vector<Cq*> cqs;
  std::vector<Srq*> srqs;
  std::vector<rdma_cm_id*> ids;
  std::vector<Events*> events;
  std::vector<ibv_comp_channel*> channels;
  std::vector<ibv_mr*> mrs;
  int contexts = 0, pds = 0;
  uint32_t keys = 0;

  // After `skip` more calls of it, `times` fail with `err`.
  void fail(Call c, int err, int skip = 0, int times = 1) { faults_[c] = {err, skip, times}; }
  int failing(Call c) {
    const auto at = faults_.find(c);
    if (at == faults_.end() || at->second.times == 0) return 0;
    if (at->second.skip > 0) {
      --at->second.skip;
      return 0;
    }
    --at->second.times;
    errno = at->second.err;
    return at->second.err;
  }
  bool pending(Call c) const {
    const auto at = faults_.find(c);
    return at != faults_.end() && at->second.times != 0;
  }

  static void ring(int fd) {
    const uint64_t one = 1;
    EXPECT_EQ(write(fd, &one, sizeof one), ssize_t(sizeof one));
  }
  static bool rung(int fd) {
    uint64_t n;
    return read(fd, &n, sizeof n) > 0;
  }

  bool alive(const Qp* qp) const { return std::ranges::find(qps, qp) != qps.end(); }
  void complete(Cq* cq, const ibv_wc& wc) {
    cq->completions.push_back(wc);
    ring(cq->channel->fd);
  }
  // A completion of the newest connection's that says this.
  void complete(const ibv_wc& wc) { complete(cqs.back(), wc); }
  // The oldest request of a queue pair is done, or, with an error, is not.
  void finish(Qp* qp, ibv_wc_status status = IBV_WC_SUCCESS) {
    ASSERT_FALSE(qp->requests.empty());
    const Request r = qp->requests.front();
    qp->requests.pop_front();
    if (status == IBV_WC_SUCCESS) carry_out(qp, r);
    if (status == IBV_WC_SUCCESS && (r.wr.send_flags & IBV_SEND_SIGNALED) == 0) return;
    ibv_wc wc{};
    wc.wr_id = r.wr.wr_id;
    wc.status = status;
    complete(static_cast<Cq*>(qp->send_cq), wc);
  }
  void finish_all(Qp* qp) {
    qp->stalled = false;
    while (!qp->requests.empty()) finish(qp);
  }
  // A message arrives. False: there is no receive for it.
  bool deliver(Qp* qp, const void* bytes, size_t n, ibv_wc_status status = IBV_WC_SUCCESS,
               ibv_wc_opcode opcode = IBV_WC_RECV) {
    auto& from = qp->srq != nullptr ? static_cast<Srq*>(qp->srq)->receives : qp->receives;
    if (from.empty()) return false;
    const Receive r = from.front();
    from.pop_front();
    if (bytes != nullptr && n <= r.sge.length) std::memcpy(reinterpret_cast<void*>(r.sge.addr), bytes, n);
    ibv_wc wc{};
    wc.wr_id = r.id;
    wc.status = status;
    wc.opcode = opcode;
    wc.byte_len = uint32_t(n);
    complete(static_cast<Cq*>(qp->recv_cq), wc);
    return true;
  }
  void tell(ibv_event_type type, Qp* qp = nullptr) {
    if (qp == nullptr && !qps.empty()) qp = qps.back();
    ibv_async_event e{};
    e.event_type = type;
    if (type == IBV_EVENT_CQ_ERR) {
      e.element.cq = qp->send_cq;
    } else if (type == IBV_EVENT_PORT_ERR || type == IBV_EVENT_PORT_ACTIVE) {
      e.element.port_num = 1;
    } else if (type == IBV_EVENT_SRQ_ERR) {
      e.element.srq = srqs.back();
    } else {
      e.element.qp = qp;
    }
    async.push_back(e);
    ring(context.async_fd);
  }
  void tell(Events* to, rdma_cm_event_type type) {
    to->queue.push_back(type);
    ring(to->fd);
  }
  rdma_cm_id* make_id(rdma_event_channel* channel) {
    auto* id = new rdma_cm_id{};
    id->verbs = &context;
    id->port_num = 1;
    id->channel = channel;
    ids.push_back(id);
    return id;
  }
  // Its sge lies in memory that is registered.
  bool registered(const ibv_sge& s) const {
    return std::ranges::any_of(mrs, [&](const ibv_mr* m) {
      const auto base = uintptr_t(m->addr);
      return m->lkey == s.lkey && s.addr >= base && s.addr + s.length <= base + m->length;
    });
  }
  void expect_nothing_left() const {
    EXPECT_TRUE(mrs.empty()) << "nothing stays registered";
    EXPECT_TRUE(qps.empty());
    EXPECT_TRUE(cqs.empty());
    EXPECT_TRUE(srqs.empty());
    EXPECT_TRUE(ids.empty());
    EXPECT_TRUE(events.empty());
    EXPECT_TRUE(channels.empty());
    EXPECT_EQ(contexts, 0);
    EXPECT_EQ(pds, 0);
  }

  static VerbsTable table();

 private:
  struct Fault {
    int err = 0, skip = 0, times = 0;
  };
  template <class T>
  static int destroy(std::vector<T*>* all, void* what) {
    const auto at = std::ranges::find_if(*all, [what](T* t) { return static_cast<void*>(t) == what; });
    EXPECT_NE(at, all->end()) << "there is none like that, or no more";
    if (at == all->end()) return EINVAL;
    delete *at;
    all->erase(at);
    return 0;
  }
  static int again() {
    errno = EAGAIN;
    return -1;
  }
  void carry_out(Qp* qp, const Request& r) {
    auto* here = reinterpret_cast<uint8_t*>(r.sge.addr);
    auto* there = reinterpret_cast<uint8_t*>(r.wr.wr.rdma.remote_addr);
    switch (r.wr.opcode) {
      case IBV_WR_SEND:
        qp->messages.emplace_back(here, here + r.sge.length);
        break;
      case IBV_WR_RDMA_READ:
        std::memcpy(here, there, r.sge.length);
        break;
      default:
        if (r.sge.length != 0) std::memcpy(there, here, r.sge.length);
    }
  }
  // All that it still has comes back undone.
  void flush(Qp* qp) {
    while (!qp->requests.empty()) finish(qp, IBV_WC_WR_FLUSH_ERR);
    while (!qp->receives.empty()) deliver(qp, nullptr, 0, IBV_WC_WR_FLUSH_ERR);
    if (qp->srq != nullptr && !qp->mute) tell(IBV_EVENT_QP_LAST_WQE_REACHED, qp);
  }
  int post(Qp* qp, ibv_send_wr* wr) {
    if (qp->post_send != 0) return qp->post_send;
    for (; wr != nullptr; wr = wr->next) {
      const Request r{*wr, *wr->sg_list};
      EXPECT_TRUE(registered(r.sge)) << "memory that the device may not reach";
      qp->requests.push_back(r);
      if (qp->state == IBV_QPS_ERR) {
        finish(qp, IBV_WC_WR_FLUSH_ERR);
      } else if (!qp->stalled) {
        finish(qp);
      }
    }
    return 0;
  }
  static int receive(std::deque<Receive>* to, ibv_recv_wr* wr) {
    for (; wr != nullptr; wr = wr->next) {
      EXPECT_TRUE(fake->registered(*wr->sg_list));
      to->push_back({wr->wr_id, *wr->sg_list});
    }
    return 0;
  }
  std::map<Call, Fault> faults_;
};

inline VerbsTable FakeRdma::table() {
  VerbsTable t;
  t.get_device_list = [](int* n) {
    *n = 1;
    return fake->list;
  };
  t.free_device_list = [](ibv_device**) {};
  t.get_device_name = [](ibv_device* d) -> const char* { return d->name; };
  t.open_device = [](ibv_device*) -> ibv_context* {
    if (fake->failing(Call::OpenDevice) != 0) return nullptr;
    ++fake->contexts;
    return &fake->context;
  };
  t.close_device = [](ibv_context*) {
    --fake->contexts;
    return 0;
  };
  t.query_device = [](ibv_context*, ibv_device_attr* a) {
    *a = fake->attr;
    return fake->failing(Call::QueryDevice);
  };
  t.query_port = [](ibv_context*, uint8_t, ibv_port_attr* a) {
    *a = {};
    a->state = fake->port;
    return 0;
  };
  t.query_gid_ex = [](ibv_context*, uint32_t, uint32_t, ibv_gid_entry*, uint32_t, size_t) { return ENODATA; };
  t.get_async_event = [](ibv_context*, ibv_async_event* e) {
    rung(fake->context.async_fd);
    if (fake->async.empty()) return again();
    *e = fake->async.front();
    fake->async.pop_front();
    return 0;
  };
  t.ack_async_event = [](ibv_async_event*) {};
  t.alloc_pd = [](ibv_context*) -> ibv_pd* {
    if (fake->failing(Call::AllocPd) != 0) return nullptr;
    ++fake->pds;
    return &fake->pd;
  };
  t.dealloc_pd = [](ibv_pd*) {
    --fake->pds;
    return 0;
  };
  t.reg_mr = [](ibv_pd*, void* p, size_t n, int) -> ibv_mr* {
    if (fake->failing(Call::RegMr) != 0) return nullptr;
    auto* m = new ibv_mr{};
    m->addr = p;
    m->length = n;
    m->lkey = m->rkey = ++fake->keys;
    fake->mrs.push_back(m);
    return m;
  };
  t.dereg_mr = [](ibv_mr* m) { return destroy(&fake->mrs, m); };
  t.create_comp_channel = [](ibv_context*) -> ibv_comp_channel* {
    if (fake->failing(Call::CreateChannel) != 0) return nullptr;
    auto* c = new ibv_comp_channel{};
    c->fd = eventfd(0, EFD_NONBLOCK);
    fake->channels.push_back(c);
    return c;
  };
  t.destroy_comp_channel = [](ibv_comp_channel* c) {
    close(c->fd);
    return destroy(&fake->channels, c);
  };
  t.create_cq = [](ibv_context*, int, void*, ibv_comp_channel* channel, int) -> ibv_cq* {
    if (fake->failing(Call::CreateCq) != 0) return nullptr;
    auto* cq = new Cq{};
    cq->channel = channel;
    fake->cqs.push_back(cq);
    return cq;
  };
  t.destroy_cq = [](ibv_cq* cq) { return destroy(&fake->cqs, static_cast<Cq*>(cq)); };
  t.get_cq_event = [](ibv_comp_channel* channel, ibv_cq** cq, void**) {
    if (!rung(channel->fd)) return again();
    const auto at = std::ranges::find(fake->cqs, channel, &ibv_cq::channel);
    EXPECT_NE(at, fake->cqs.end());
    *cq = at != fake->cqs.end() ? *at : nullptr;
    return 0;
  };
  t.ack_cq_events = [](ibv_cq*, unsigned) {};
  t.req_notify_cq = [](ibv_cq*, int) { return fake->failing(Call::NotifyCq); };
  t.poll_cq = [](ibv_cq* cq, int n, ibv_wc* wc) {
    auto* c = static_cast<Cq*>(cq);
    if (c->broken) return -1;
    int got = 0;
    for (; got < n && !c->completions.empty(); ++got) {
      wc[got] = c->completions.front();
      c->completions.pop_front();
    }
    return got;
  };
  t.create_srq = [](ibv_pd*, ibv_srq_init_attr*) -> ibv_srq* {
    if (fake->failing(Call::CreateSrq) != 0) return nullptr;
    fake->srqs.push_back(new Srq{});
    return fake->srqs.back();
  };
  t.destroy_srq = [](ibv_srq* s) {
    EXPECT_TRUE(std::ranges::none_of(fake->qps, [s](const Qp* q) { return q->srq == s; })) << "still in use";
    return destroy(&fake->srqs, static_cast<Srq*>(s));
  };
  t.post_srq_recv = [](ibv_srq* s, ibv_recv_wr* wr, ibv_recv_wr**) {
    if (const int err = fake->failing(Call::PostSrqRecv); err != 0) return err;
    return receive(&static_cast<Srq*>(s)->receives, wr);
  };
  t.create_qp = [](ibv_pd*, ibv_qp_init_attr* a) -> ibv_qp* {
    if (fake->failing(Call::CreateQp) != 0) return nullptr;
    auto* qp = new Qp{};
    qp->send_cq = a->send_cq;
    qp->recv_cq = a->recv_cq;
    qp->srq = a->srq;
    qp->qp_num = ++fake->keys;
    qp->stalled = fake->stalled;
    fake->qps.push_back(qp);
    return qp;
  };
  t.modify_qp = [](ibv_qp* qp, ibv_qp_attr* a, int mask) {
    if (const int err = fake->failing(Call::ModifyQp); err != 0) return err;
    if ((mask & IBV_QP_STATE) != 0) qp->state = a->qp_state;
    if (qp->state == IBV_QPS_ERR) fake->flush(static_cast<Qp*>(qp));
    return 0;
  };
  t.destroy_qp = [](ibv_qp* qp) { return destroy(&fake->qps, static_cast<Qp*>(qp)); };
  t.post_send = [](ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr**) { return fake->post(static_cast<Qp*>(qp), wr); };
  t.post_recv = [](ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr**) {
    auto* q = static_cast<Qp*>(qp);
    return q->post_recv != 0 ? q->post_recv : receive(&q->receives, wr);
  };
  t.create_event_channel = []() -> rdma_event_channel* {
    if (fake->failing(Call::CreateEvents) != 0) return nullptr;
    auto* e = new Events{};
    e->fd = eventfd(0, EFD_NONBLOCK);
    fake->events.push_back(e);
    return e;
  };
  t.destroy_event_channel = [](rdma_event_channel* e) {
    close(e->fd);
    destroy(&fake->events, static_cast<Events*>(e));
  };
  t.create_id = [](rdma_event_channel* channel, rdma_cm_id** id, void*, rdma_port_space) {
    if (fake->failing(Call::CreateId) != 0) return -1;
    *id = fake->make_id(channel);
    return 0;
  };
  t.destroy_id = [](rdma_cm_id* id) { return destroy(&fake->ids, id); };
  t.migrate_id = [](rdma_cm_id* id, rdma_event_channel* channel) {
    if (fake->failing(Call::MigrateId) != 0) return -1;
    id->channel = channel;
    return 0;
  };
  t.resolve_addr = [](rdma_cm_id* id, sockaddr*, sockaddr*, int) {
    static_cast<Events*>(id->channel)->queue = {RDMA_CM_EVENT_ADDR_RESOLVED, RDMA_CM_EVENT_ROUTE_RESOLVED,
                                                RDMA_CM_EVENT_CONNECT_RESPONSE};
    return 0;
  };
  t.resolve_route = [](rdma_cm_id*, int) { return 0; };
  t.connect = [](rdma_cm_id*, rdma_conn_param*) { return 0; };
  t.establish = [](rdma_cm_id*) { return 0; };
  t.accept = [](rdma_cm_id*, rdma_conn_param*) { return fake->failing(Call::Accept) != 0 ? -1 : 0; };
  t.reject = [](rdma_cm_id*, const void*, uint8_t) { return 0; };
  t.disconnect = [](rdma_cm_id*) { return 0; };
  t.init_qp_attr = [](rdma_cm_id*, ibv_qp_attr*, int* mask) {
    *mask = IBV_QP_STATE;
    return fake->failing(Call::InitQpAttr) != 0 ? -1 : 0;
  };
  t.get_cm_event = [](rdma_event_channel* channel, rdma_cm_event** out) {
    static rdma_cm_event e;
    auto* from = static_cast<Events*>(channel);
    rung(from->fd);
    if (from->queue.empty()) return again();
    e = {};
    e.event = from->queue.front();
    from->queue.pop_front();
    *out = &e;
    return 0;
  };
  t.ack_cm_event = [](rdma_cm_event*) { return 0; };
  return t;
}

}  // namespace kvfs
