// rdma_connection.cpp: see rdma_connection.h.
#include "rdma_connection.h"

#include <fcntl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

#include "../store/check.h"

namespace kvfs {

namespace {

int last_error() { return errno != 0 ? -errno : -EIO; }

int nonblocking(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0 ? 0 : -errno; }

int error_of(ibv_wc_status s) {
  switch (s) {
    case IBV_WC_RETRY_EXC_ERR:
    case IBV_WC_RNR_RETRY_EXC_ERR:
    case IBV_WC_RESP_TIMEOUT_ERR:
      return -ETIMEDOUT;
    case IBV_WC_WR_FLUSH_ERR:
      return -ECONNRESET;
    case IBV_WC_REM_ACCESS_ERR:  // a key or range that the peer named and that is not its
    case IBV_WC_REM_INV_REQ_ERR:
    case IBV_WC_LOC_LEN_ERR:  // a message longer than any frame
      return -EPROTO;
    case IBV_WC_REM_OP_ERR:
    case IBV_WC_REM_ABORT_ERR:
      return -EREMOTEIO;
    default:
      return -EIO;
  }
}

}  // namespace

RdmaConnection::RdmaConnection(RdmaDevice& device, rdma_cm_id* id, rdma_event_channel* events, const Shape& shape)
    : device_(device), verbs_(device.verbs()), id_(id), events_(events), shape_(shape), port_(id->port_num) {}

std::unique_ptr<RdmaConnection> RdmaConnection::open(RdmaDevice& device, rdma_cm_id* id, rdma_event_channel* events,
                                                     const Shape& shape, int* err) {
  std::unique_ptr<RdmaConnection> c(new RdmaConnection(device, id, events, shape));
  *err = c->init();
  if (*err != 0) c.reset();
  return c;
}

int RdmaConnection::init() {
  timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (timer_ < 0) return -errno;
  errno = 0;
  if (const int err = nonblocking(events_->fd); err != 0) return err;
  channel_ = verbs_.create_comp_channel(device_.context());
  if (channel_ == nullptr) return last_error();
  if (const int err = nonblocking(channel_->fd); err != 0) return err;
  const ibv_device_attr& attr = device_.attr();
  depth_ = kDepth;
  while (depth_ > 16 && int64_t{depth_} > attr.max_qp_wr) depth_ /= 2;
  const uint32_t receives = shape_.receives != 0 ? shape_.receives : RdmaDevice::kSharedReceives;
  cq_ = verbs_.create_cq(device_.context(), int(depth_ + receives + 1), nullptr, channel_, 0);
  if (cq_ == nullptr) return last_error();
  if (const int err = make_queue_pair(); err != 0) return err;

  sent_.resize(depth_);
  chain_.resize(depth_);
  chain_sges_.resize(depth_);
  if (const int err = sends_.open(verbs_, device_.pd(), size_t{shape_.frames} * shape_.frame_bytes, 0); err != 0)
    return err;
  for (uint32_t f = shape_.frames; f-- != 0;) free_frames_.push_back(f);
  if (shape_.receives != 0) {
    const size_t bytes = size_t{shape_.receives} * shape_.receive_bytes;
    if (const int err = receives_.open(verbs_, device_.pd(), bytes, IBV_ACCESS_LOCAL_WRITE); err != 0) return err;
    for (uint32_t slot = 0; slot < shape_.receives; ++slot) repost_.push_back(slot);
    give_receives_back();
    if (failing_) return err_;
  }
  return verbs_.req_notify_cq(cq_, 0) == 0 ? 0 : -EIO;
}

int RdmaConnection::make_queue_pair() {
  // How much goes inline is found by asking: devices say it nowhere else.
  for (const uint32_t inline_bytes : {256u, 128u, 72u, 0u}) {
    ibv_qp_init_attr a{};
    a.send_cq = a.recv_cq = cq_;
    a.srq = shape_.receives == 0 ? device_.srq() : nullptr;
    a.qp_type = IBV_QPT_RC;
    a.cap.max_send_wr = depth_;
    a.cap.max_recv_wr = shape_.receives;
    a.cap.max_send_sge = a.cap.max_recv_sge = 1;
    a.cap.max_inline_data = inline_bytes;
    errno = 0;
    qp_ = verbs_.create_qp(device_.pd(), &a);
    if (qp_ == nullptr) continue;
    inline_bytes_ = inline_bytes;
    break;
  }
  if (qp_ == nullptr) return last_error();
  ibv_qp_attr a{};
  int mask = 0;
  a.qp_state = IBV_QPS_INIT;
  if (verbs_.init_qp_attr(id_, &a, &mask) != 0) return last_error();
  a.qp_access_flags = shape_.reachable ? IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE : 0;
  return -verbs_.modify_qp(qp_, &a, mask);
}

int RdmaConnection::to_ready(uint8_t reads_from_peer, uint8_t reads_by_peer) {
  ibv_qp_attr a{};
  int mask = 0;
  a.qp_state = IBV_QPS_RTR;
  if (verbs_.init_qp_attr(id_, &a, &mask) != 0) return last_error();
  a.max_dest_rd_atomic = reads_by_peer;
  a.min_rnr_timer = kRnrTimer;
  if (const int err = verbs_.modify_qp(qp_, &a, mask); err != 0) return -err;
  a = {};
  mask = 0;
  a.qp_state = IBV_QPS_RTS;
  if (verbs_.init_qp_attr(id_, &a, &mask) != 0) return last_error();
  a.max_rd_atomic = reads_from_peer;
  a.timeout = kTimeout;
  a.retry_cnt = kRetries;
  a.rnr_retry = 7;  // for ever: a peer that is slow is not a peer that is gone
  if (const int err = verbs_.modify_qp(qp_, &a, mask); err != 0) return -err;
  max_reads_ = reads_from_peer;
  return 0;
}

int RdmaConnection::start(Uring& uring, User& user) {
  uring_ = &uring;
  user_ = &user;
  const auto completions = [](void* self, uint32_t) { static_cast<RdmaConnection*>(self)->on_completions(); };
  const auto cm = [](void* self, uint32_t) { static_cast<RdmaConnection*>(self)->on_cm_events(); };
  const auto timer = [](void* self, uint32_t) {
    auto* c = static_cast<RdmaConnection*>(self);
    uint64_t ticks;
    if (::read(c->timer_, &ticks, sizeof ticks) < 0) return;  // an event of an earlier setting
    c->wake_ = UINT64_MAX;
    c->turn();
  };
  device_.add(this);
  nop_.done = on_called;
  nop_.owner = this;
  polls_[0] = uring.add_poll(timer_, timer, this);
  polls_[1] = uring.add_poll(channel_->fd, completions, this);
  polls_[2] = uring.add_poll(events_->fd, cm, this);
  for (const int p : polls_)
    if (p < 0) return p;
  wake_at(0);  // what came before
  if (device_.dead()) return -ENODEV;
  return shape_.receives == 0 ? device_.repost(nullptr, 0) : 0;  // without any nothing would ever come
}

RdmaConnection::~RdmaConnection() {
  KVFS_CHECK(quiet());
  user_ = nullptr;
  if (!gone_) dismantle();
}

void RdmaConnection::fail(int err) {
  if (failing_) return;
  failing_ = true;
  err_ = err;
  wake_at(0);
}

void RdmaConnection::last_receive() {
  last_receive_ = true;
  wake_at(0);
}

void RdmaConnection::wake_at(uint64_t ns) {
  if (timer_ < 0) return;
  if (uring_ != nullptr && polls_[0] < 0) {  // start() fails, and all that is left is the end: turn after turn
    if (!calling_) uring_->submit(&nop_);
    calling_ = true;
    return;
  }
  if (ns >= wake_) return;
  wake_ = ns;
  itimerspec t{};
  t.it_value.tv_sec = time_t(ns / 1'000'000'000u);
  t.it_value.tv_nsec = long(ns % 1'000'000'000u) + (ns == 0 ? 1 : 0);  // zero would disarm it
  KVFS_CHECK(timerfd_settime(timer_, TFD_TIMER_ABSTIME, &t, nullptr) == 0);
}

void RdmaConnection::on_called(NetIo* io) {
  auto* c = static_cast<RdmaConnection*>(io->owner);
  c->calling_ = false;
  if (!c->gone_) c->turn();
}

// ---------------------------------------------------------------- posting

void RdmaConnection::add(ibv_send_wr* wr, void* what, int32_t frame, bool signal) {
  KVFS_CHECK(room(1) && chain_len_ < depth_);
  if (!signal && ++unsignalled_ >= kSignalEvery) signal = true;
  if (signal) {
    wr->send_flags |= IBV_SEND_SIGNALED;
    unsignalled_ = 0;
  }
  wr->wr_id = tail_;
  wr->num_sge = 1;
  wr->sg_list = &chain_sges_[chain_len_];
  sent_[tail_ & (depth_ - 1)] = {what, frame};
  ++tail_;
  if (chain_len_ != 0) chain_[chain_len_ - 1].next = &chain_[chain_len_];
  ++chain_len_;
}

void RdmaConnection::send(uint32_t frame_no, uint32_t len, void* what, bool signal) {
  ibv_send_wr& wr = chain_[chain_len_] = {};
  chain_sges_[chain_len_] = {uintptr_t(frame(frame_no)), len, sends_.mr()->lkey};
  wr.opcode = IBV_WR_SEND;
  if (len <= inline_bytes_) wr.send_flags = IBV_SEND_INLINE;
  add(&wr, what, int32_t(frame_no), signal);
}

void RdmaConnection::read(void* to, uint32_t lkey, uint32_t len, uint64_t from, uint32_t rkey, void* what,
                          bool signal) {
  ibv_send_wr& wr = chain_[chain_len_] = {};
  chain_sges_[chain_len_] = {uintptr_t(to), len, lkey};
  wr.opcode = IBV_WR_RDMA_READ;
  wr.wr.rdma.remote_addr = from;
  wr.wr.rdma.rkey = rkey;
  add(&wr, what, -1, signal);
}

void RdmaConnection::write(const void* from, uint32_t lkey, uint32_t len, uint64_t to, uint32_t rkey, void* what,
                           bool signal) {
  ibv_send_wr& wr = chain_[chain_len_] = {};
  chain_sges_[chain_len_] = {uintptr_t(from), len, lkey};
  wr.opcode = IBV_WR_RDMA_WRITE;
  wr.wr.rdma.remote_addr = to;
  wr.wr.rdma.rkey = rkey;
  add(&wr, what, -1, signal);
}

void RdmaConnection::probe(void* what) {
  ibv_send_wr& wr = chain_[chain_len_] = {};
  chain_sges_[chain_len_] = {uintptr_t(sends_.base()), 0, sends_.mr()->lkey};
  wr.opcode = IBV_WR_RDMA_WRITE;
  add(&wr, what, -1, true);
}

void RdmaConnection::post(bool signal) {
  if (chain_len_ == 0) return;
  if (signal) {
    chain_[chain_len_ - 1].send_flags |= IBV_SEND_SIGNALED;
    unsignalled_ = 0;
  }
  chain_len_ = 0;
  if (failing_) return;  // come back with ok = false at the end
  ibv_send_wr* bad = nullptr;
  ++doorbells_;
  if (const int err = verbs_.post_send(qp_, chain_.data(), &bad); err != 0) fail(-err);
}

void RdmaConnection::give_receives_back() {
  if (repost_.empty()) return;
  int err = 0;
  if (shape_.receives == 0) {
    err = device_.repost(repost_.data(), uint32_t(repost_.size()));
  } else if (!failing_) {
    std::vector<ibv_recv_wr> wrs(repost_.size());
    std::vector<ibv_sge> sges(repost_.size());
    for (size_t i = 0; i < wrs.size(); ++i) {
      sges[i] = {uintptr_t(receive_at(repost_[i])), shape_.receive_bytes, receives_.mr()->lkey};
      wrs[i] = {};
      wrs[i].wr_id = kReceive | repost_[i];
      wrs[i].sg_list = &sges[i];
      wrs[i].num_sge = 1;
      if (i != 0) wrs[i - 1].next = &wrs[i];
    }
    ibv_recv_wr* bad = nullptr;
    err = -verbs_.post_recv(qp_, wrs.data(), &bad);
  }
  repost_.clear();
  if (err != 0) fail(err);
}

// ---------------------------------------------------------------- completions

void RdmaConnection::on_completions() {
  ibv_cq* cq = nullptr;
  void* context = nullptr;
  unsigned events = 0;
  while (verbs_.get_cq_event(channel_, &cq, &context) == 0) ++events;  // one is on its way at most, as one is asked for
  if (events != 0) verbs_.ack_cq_events(cq_, events);
  if (verbs_.req_notify_cq(cq_, 0) != 0) fail(-EIO);
  turn();
}

unsigned RdmaConnection::take_completions(unsigned budget) {
  ibv_wc wc[16];
  unsigned taken = 0;
  while (taken < budget) {
    const int n = verbs_.poll_cq(cq_, int(std::size(wc)), wc);
    if (n < 0) fail(-EIO);
    if (n <= 0) break;
    for (int i = 0; i < n; ++i) completed(wc[i]);
    taken += unsigned(n);
  }
  give_receives_back();
  return taken;
}

void RdmaConnection::completed(const ibv_wc& wc) {
  if ((wc.wr_id & kReceive) == 0) {
    if (wc.status != IBV_WC_SUCCESS) {
      if (!failing_) fail(error_of(wc.status));
    } else if (wc.wr_id - head_ < tail_ - head_) {
      take_sent(wc.wr_id, true);
    } else {
      fail(-EIO);  // of nothing that is under way
    }
    return;
  }
  const auto slot = uint32_t(wc.wr_id & ~kReceive);
  const bool shared = shape_.receives == 0;
  if (slot >= (shared ? RdmaDevice::kSharedReceives : shape_.receives)) return fail(-EIO);
  if (wc.status != IBV_WC_SUCCESS) {
    fail(error_of(wc.status));
  } else if (wc.opcode != IBV_WC_RECV || wc.byte_len > (shared ? RdmaDevice::kRequestBytes : shape_.receive_bytes)) {
    fail(-EPROTO);  // a write with immediate data leaves nothing in the buffer
  } else if (!failing_ && user_ != nullptr) {
    user_->on_received(shared ? device_.received(slot) : receive_at(slot), wc.byte_len);
  }
  repost_.push_back(slot);
}

void RdmaConnection::take_sent(uint64_t last, bool ok) {
  while (head_ <= last) {
    const Sent s = sent_[head_ & (depth_ - 1)];
    ++head_;
    if (s.frame >= 0) free_frames_.push_back(uint32_t(s.frame));
    if (user_ != nullptr && s.what != nullptr) user_->on_sent(s.what, ok);
  }
}

void RdmaConnection::on_cm_events() {
  rdma_cm_event* e = nullptr;
  while (verbs_.get_cm_event(events_, &e) == 0) {  // a handful in a connection's life
    const rdma_cm_event_type type = e->event;
    verbs_.ack_cm_event(e);
    switch (type) {
      case RDMA_CM_EVENT_DISCONNECTED:
        take_completions(depth_ + RdmaDevice::kSharedReceives);  // what came before
        fail(-ECONNRESET);
        break;
      case RDMA_CM_EVENT_DEVICE_REMOVAL:
        fail(-ENODEV);
        break;
      case RDMA_CM_EVENT_CONNECT_ERROR:
      case RDMA_CM_EVENT_UNREACHABLE:
      case RDMA_CM_EVENT_REJECTED:
        fail(-ECONNREFUSED);
        break;
      default:  // established, time-wait, addresses that moved: the queue pair tells if it works
        break;
    }
  }
  turn();
}

void RdmaConnection::turn() {
  const uint64_t now = monotonic_ns();
  if (take_completions(kBudget) >= kBudget) wake_at(0);
  if (user_ != nullptr) user_->on_turn(now);
  if (failing_) step_to_end(now);
}

// ---------------------------------------------------------------- the end

// A queue pair that takes from shared receives has some of them until it has said that it takes no more.
void RdmaConnection::step_to_end(uint64_t now) {
  if (gone_) return;
  if (shape_.receives == 0 && !flushing_) {
    flushing_ = true;
    flush_deadline_ = now + kFlushNs;
    ibv_qp_attr a{};
    a.qp_state = IBV_QPS_ERR;
    if (verbs_.modify_qp(qp_, &a, IBV_QP_STATE) != 0) last_receive_ = true;  // a dead device says nothing more
  }
  if (flushing_ && !last_receive_ && now < flush_deadline_ && !device_.dead()) return wake_at(flush_deadline_);
  User* user = user_;
  dismantle();
  if (user != nullptr) user->on_closed(err_);
}

void RdmaConnection::dismantle() {
  gone_ = true;
  for (int& p : polls_) {
    if (p >= 0) uring_->remove_poll(p);
    p = -1;
  }
  if (timer_ >= 0) ::close(timer_);
  timer_ = -1;
  if (uring_ != nullptr) device_.remove(this);
  failing_ = true;
  const bool bury = connected_ && uring_ != nullptr && !device_.port_active(port_);
  if (connected_ && !bury) verbs_.disconnect(id_);
  if (cq_ != nullptr) take_completions(depth_ + RdmaDevice::kSharedReceives);
  if (qp_ != nullptr) verbs_.destroy_qp(qp_);
  qp_ = nullptr;
  if (cq_ != nullptr) {
    take_completions(depth_ + RdmaDevice::kSharedReceives);
    ibv_cq* cq = nullptr;
    void* context = nullptr;
    while (verbs_.get_cq_event(channel_, &cq, &context) == 0) verbs_.ack_cq_events(cq, 1);
    verbs_.destroy_cq(cq_);
    cq_ = nullptr;
  }
  if (channel_ != nullptr) verbs_.destroy_comp_channel(channel_);
  channel_ = nullptr;
  if (bury) {
    device_.bury(id_, events_);
  } else {
    verbs_.destroy_id(id_);
    verbs_.destroy_event_channel(events_);
  }
  sends_.close();
  receives_.close();
  if (tail_ != head_) take_sent(tail_ - 1, false);
}

}  // namespace kvfs
