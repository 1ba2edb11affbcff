// rdma_client.cpp: see rdma_client.h.
#include "rdma_client.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

#include "../store/check.h"

namespace kvfs {

namespace {

bool has_payload(const NetOp* op) {
  return op->desc.len != 0 && (wire::has_in(wire::Op{op->desc.op}) || wire::has_out(wire::Op{op->desc.op}));
}

uint64_t payload(const NetOp* op) { return has_payload(op) ? op->desc.len : 0; }

}  // namespace

RdmaClientChannel::RdmaClientChannel(Uring& uring, std::unique_ptr<RdmaConnection> connection,
                                     const ChannelLimits& limits)
    : connection_(std::move(connection)), limits_(limits), heard_ns_(monotonic_ns()) {
  limits_.max_batch = std::clamp<uint32_t>(limits_.max_batch, 1, wire::kMaxBatch);
  for (uint32_t i = kBatches; i-- != 0;) free_batches_.push_back(i);
  if (const int err = connection_->start(uring, *this); err != 0) fail(err);
}

RdmaClientChannel::~RdmaClientChannel() {
  KVFS_CHECK(ops_ == 0);
  connection_.reset();
  bounces_.close();
}

const ChannelCounters& RdmaClientChannel::counters() const {
  counters_.calls = connection_->doorbells();
  return counters_;
}

// ---------------------------------------------------------------- requests

void RdmaClientChannel::submit(NetOp* op) {
  priv(op) = {};
  priv(op).bounce = -1;
  op->answered = op->cancelled = op->unreachable = false;
  ++ops_;
  bytes_ += payload(op);
  fresh_.push(op);
}

void RdmaClientChannel::flush(uint32_t map_version) {
  for (NetOp* op = fresh_.head; op != nullptr; op = op->next) {
    priv(op).state = State::Flushed;
    priv(op).map_version = map_version;
  }
  flushed_.append(&fresh_);
  send_waiting();
  if (ended_) end_waiting();
  deliver();
}

void RdmaClientChannel::ping() {
  if (pings_ == pings_sent_) ++pings_;
  if (err_ != 0) return;
  if (send_control(wire::Type::Ping, pings_)) pings_sent_ = pings_;
  connection_->post();
}

int RdmaClientChannel::make_reachable(NetOp* op) {
  wire::Desc& d = op->desc;
  d.addr = 0;
  d.rkey = 0;
  if (!has_payload(op)) return 0;
  const bool in = wire::has_in(wire::Op{d.op});
  RdmaMemory& memory = connection_->device().memory();
  const bool small = d.len <= kBounceBytes;
  int err = 0;
  RdmaRegion* region = memory.acquire(op->mem.ptr, d.len, !in, small, &err);
  if (region != nullptr) {
    priv(op).region = region;
    d.addr = uintptr_t(op->mem.ptr);
    d.rkey = region->mr->rkey;
  } else if (!small) {
    return err;
  } else {
    if (bounces_.base() == nullptr) {
      constexpr int kAccess = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
      const RdmaDevice& device = connection_->device();
      if (bounces_.open(device.verbs(), device.pd(), size_t{kBounces} * kBounceBytes, kAccess) != 0) return -ENOMEM;
      for (int i = kBounces; i-- != 0;) free_bounces_.push_back(int16_t(i));
    }
    if (free_bounces_.empty()) return -EAGAIN;
    priv(op).bounce = free_bounces_.back();
    free_bounces_.pop_back();
    uint8_t* b = bounces_.base() + size_t(priv(op).bounce) * kBounceBytes;
    if (in) {
      std::memcpy(b, op->mem.ptr, d.len);
      counters_.copied += d.len;
    }
    d.addr = uintptr_t(b);
    d.rkey = bounces_.mr()->rkey;
  }
  d.sum = in && (limits_.features & wire::kDataSums) != 0 ? wire::data_sum(op->mem.ptr, d.len) : 0;
  return 0;
}

void RdmaClientChannel::send_waiting() {
  if (err_ != 0) return;
  while (!cancels_.empty() && send_control(wire::Type::Cancel, cancels_.back())) cancels_.pop_back();
  if (pings_sent_ != pings_ && send_control(wire::Type::Ping, pings_)) pings_sent_ = pings_;
  while (flushed_.head != nullptr && send_batch()) {
  }
  connection_->post();
}

// One request frame of what waits. False: no more can be sent now.
bool RdmaClientChannel::send_batch() {
  if (free_batches_.empty() || connection_->free_frames() == 0 || !connection_->room(1)) return false;
  const uint32_t at = free_batches_.back();
  Batch& b = batches_[at];
  wire::Desc descs[wire::kMaxBatch];
  bool more = true;
  const uint32_t map_version = priv(flushed_.head).map_version;
  while (flushed_.head != nullptr && b.ops.size() < limits_.max_batch) {
    NetOp* op = flushed_.head;
    if (priv(op).map_version != map_version) break;
    const int err = make_reachable(op);
    if (err == -EAGAIN) {
      more = false;
      break;
    }
    flushed_.remove(op);
    if (err != 0) {
      op->unreachable = err == -EFAULT || err == -EACCES;  // other errors are the device's
      end(op, err, false);
      continue;
    }
    priv(op).state = State::Sent;
    descs[b.ops.size()] = op->desc;
    op->index = uint32_t(b.ops.size());
    b.ops.push_back(op);
    if (wire::has_in(wire::Op{op->desc.op})) counters_.bytes_out += op->desc.len;
  }
  if (b.ops.empty()) return more;
  free_batches_.pop_back();
  b.id = ++batch_no_ * kBatches + at;
  b.open = b.live = uint32_t(b.ops.size());
  b.told = false;
  for (NetOp* op : b.ops) op->batch = b.id;

  const uint32_t f = connection_->claim();
  uint8_t* p = connection_->frame(f);
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(wire::Type::Request);
  h.count = uint16_t(b.ops.size());
  h.map_version = map_version;
  h.batch = b.id;
  const uint32_t body = wire::body_bytes(h);
  wire::seal(&h, descs);
  std::memcpy(p, &h, sizeof h);
  std::memcpy(p + sizeof h, descs, body);
  connection_->send(f, uint32_t(sizeof h) + body, nullptr, false);
  ++counters_.frames_out;
  return more;
}

bool RdmaClientChannel::send_control(wire::Type type, uint64_t number) {
  if (connection_->free_frames() == 0 || !connection_->room(1)) return false;
  const uint32_t f = connection_->claim();
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(type);
  h.batch = number;
  wire::seal(&h, nullptr);
  std::memcpy(connection_->frame(f), &h, sizeof h);
  connection_->send(f, sizeof h, nullptr, false);
  ++counters_.frames_out;
  return true;
}

void RdmaClientChannel::cancel(NetOp* op) {
  Priv& p = priv(op);
  if (p.cancel_ns != 0 || p.state == State::Ended) return;
  p.cancel_ns = monotonic_ns() + kCancelNs;
  if (p.state != State::Sent) {
    (p.state == State::Fresh ? fresh_ : flushed_).remove(op);
    end(op, -ECANCELED, false);
    connection_->wake_at(0);
    return;
  }
  cancel_check_ns_ = std::min(cancel_check_ns_, p.cancel_ns);
  connection_->wake_at(p.cancel_ns);
  Batch& b = batches_[op->batch % kBatches];
  if (--b.live != 0 || b.told) return;
  b.told = true;
  cancels_.push_back(b.id);
  send_waiting();
}

// ---------------------------------------------------------------- answers

void RdmaClientChannel::on_received(const uint8_t* message, uint32_t len) {
  if (err_ != 0) return;
  heard_ns_ = monotonic_ns();
  wire::FrameHeader h;
  if (const int err = wire::check_message(message, len, false, &h); err != 0) return fail(err);
  const uint8_t* body = message + sizeof h;
  ++counters_.frames_in;
  switch (wire::Type{h.type}) {
    case wire::Type::Response:
      if (const int err = take_response(h, body); err != 0) fail(err);
      return;
    case wire::Type::Bye:
      return fail(h.batch != 0 && h.batch <= 4095 ? -int(h.batch) : -ECONNRESET);
    default:  // Pong: it was heard
      return;
  }
}

int RdmaClientChannel::take_response(const wire::FrameHeader& h, const uint8_t* body) {
  const auto at = uint32_t(h.batch % kBatches);
  Batch& b = batches_[at];
  if (b.id == 0 || b.id != h.batch) return -EPROTO;
  for (uint32_t i = 0; i < h.count; ++i) {
    wire::Result r;
    std::memcpy(&r, body + size_t{i} * sizeof r, sizeof r);
    if (r.rsv != 0 || r.index >= b.ops.size() || b.ops[r.index] == nullptr) return -EPROTO;
    NetOp* op = b.ops[r.index];
    const bool out = wire::has_out(wire::Op{op->desc.op});
    if (r.len != (out && r.result > 0 ? uint64_t(r.result) : 0) || r.len > op->desc.len) return -EPROTO;
    b.ops[r.index] = nullptr;
    --b.open;
    if (priv(op).cancel_ns == 0) --b.live;
    answer(op, r);
  }
  if (b.open == 0) {
    b.id = 0;
    b.ops.clear();
    free_batches_.push_back(at);
  }
  return 0;
}

void RdmaClientChannel::answer(NetOp* op, const wire::Result& r) {
  if (priv(op).cancel_ns != 0 && r.result == -ECANCELED) return end(op, -ECANCELED, false);
  if (r.len != 0) {
    counters_.bytes_in += r.len;
    if (priv(op).bounce >= 0) {
      std::memcpy(op->mem.ptr, bounces_.base() + size_t(priv(op).bounce) * kBounceBytes, r.len);
      counters_.copied += r.len;
    }
    if ((limits_.features & wire::kDataSums) != 0 && wire::data_sum(op->mem.ptr, r.len) != r.sum)
      return end(op, -EBADMSG, false);
  }
  priv(op).cancel_ns = 0;  // it was sooner
  end(op, r.result, true);
}

// Its memory is the caller's again; `done` comes with deliver().
void RdmaClientChannel::end(NetOp* op, int64_t result, bool answered) {
  Priv& p = priv(op);
  if (p.region != nullptr) connection_->device().memory().release(p.region);
  if (p.bounce >= 0) free_bounces_.push_back(p.bounce);
  p.region = nullptr;
  p.bounce = -1;
  p.state = State::Ended;
  op->result = result;
  op->answered = answered;
  op->cancelled = !answered && p.cancel_ns != 0;
  op->next = nullptr;
  *done_tail_ = op;
  done_tail_ = &op->next;
}

void RdmaClientChannel::deliver() {
  if (delivering_) return;
  delivering_ = true;
  while (done_head_ != nullptr) {
    NetOp* op = done_head_;
    done_head_ = op->next;
    if (done_head_ == nullptr) done_tail_ = &done_head_;
    --ops_;
    bytes_ -= payload(op);
    op->done(op);
  }
  delivering_ = false;
}

// ---------------------------------------------------------------- turns and the end

void RdmaClientChannel::on_turn(uint64_t now) {
  if (err_ == 0 && connection_->failing()) err_ = -ECONNRESET;  // of the connection's own; on_closed() says more
  send_waiting();
  check_cancelled(now);
  deliver();
}

void RdmaClientChannel::check_cancelled(uint64_t now) {
  if (cancel_check_ns_ == UINT64_MAX || err_ != 0) return;
  if (now < cancel_check_ns_) return connection_->wake_at(cancel_check_ns_);
  cancel_check_ns_ = UINT64_MAX;
  for (const Batch& b : batches_) {
    for (const NetOp* op : b.ops) {
      if (op == nullptr) continue;
      const uint64_t until = reinterpret_cast<const Priv*>(op->priv)->cancel_ns;
      if (until == 0) continue;
      if (until <= now) return fail(-ETIMEDOUT);
      cancel_check_ns_ = std::min(cancel_check_ns_, until);
    }
  }
  if (cancel_check_ns_ != UINT64_MAX) connection_->wake_at(cancel_check_ns_);
}

void RdmaClientChannel::fail(int err) {
  if (err_ == 0) err_ = err;
  connection_->fail(err);
}

void RdmaClientChannel::close() { fail(-ESHUTDOWN); }

void RdmaClientChannel::on_closed(int err) {
  if (err_ == 0 || err_ == -ECONNRESET) err_ = err != 0 ? err : -ECONNRESET;
  ended_ = true;
  for (Batch& b : batches_) {
    for (NetOp* op : b.ops)
      if (op != nullptr) end(op, priv(op).cancel_ns != 0 ? -ECANCELED : err_, false);
    b.ops.clear();
    b.id = 0;
  }
  end_waiting();
  deliver();
}

void RdmaClientChannel::end_waiting() {
  flushed_.append(&fresh_);
  while (flushed_.head != nullptr) {
    NetOp* op = flushed_.head;
    flushed_.remove(op);
    end(op, err_, false);
  }
}

}  // namespace kvfs
