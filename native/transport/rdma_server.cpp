// rdma_server.cpp: see rdma_server.h.
#include "rdma_server.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <utility>

#include "../store/check.h"

namespace kvfs {

RdmaServerChannel::RdmaServerChannel(Uring& uring, std::unique_ptr<RdmaConnection> connection,
                                     const RdmaServerOptions& options, ChannelHandler& handler)
    : uring_(uring), connection_(std::move(connection)), options_(options), handler_(handler) {
  options_.max_batch = std::clamp<uint32_t>(options_.max_batch, 1, wire::kMaxBatch);
}

RdmaServerChannel::~RdmaServerChannel() {
  KVFS_CHECK(ops_ == 0);
  connection_.reset();
  while (free_sent_ != nullptr) delete std::exchange(free_sent_, free_sent_->next);
}

void RdmaServerChannel::start() {
  started_ = true;
  heard_ = true;
  if (const int err = connection_->start(uring_, *this); err != 0) connection_->fail(err);
}

const ChannelCounters& RdmaServerChannel::counters() const {
  counters_.calls = connection_->doorbells();
  return counters_;
}

// ---------------------------------------------------------------- requests

void RdmaServerChannel::on_received(const uint8_t* message, uint32_t len) {
  heard_ = true;
  if (finishing_) return;
  wire::FrameHeader h;
  if (const int err = wire::check_message(message, len, true, &h); err != 0) return finish(err);
  const uint8_t* body = message + sizeof h;
  ++counters_.frames_in;
  switch (wire::Type{h.type}) {
    case wire::Type::Request:
      if (const int err = take_request(h, body); err != 0) finish(err);
      return;
    case wire::Type::Cancel:
      return cancel_batch(h.batch);
    case wire::Type::Ping:
      pong_ = h.batch;
      pong_waits_ = true;
      return;
    default:  // Bye
      return finish(0);
  }
}

int RdmaServerChannel::take_request(const wire::FrameHeader& h, const uint8_t* body) {
  if (h.count > options_.max_batch || unanswered_ + h.count > options_.max_ops) return -EPROTO;
  for (uint32_t i = 0; i < h.count && !finishing_; ++i) {
    auto* op = new ServerOp;
    std::memcpy(&op->desc, body + size_t{i} * sizeof op->desc, sizeof op->desc);
    op->channel = this;
    op->batch = h.batch;
    op->index = uint16_t(i);
    op->map_version = h.map_version;
    priv(op) = {};
    ++ops_;
    ++unanswered_;
    in_bytes_ += payload_in(op->desc);
    if (in_bytes_ > options_.max_in) {
      drop(op);
      return -EPROTO;
    }
    const wire::Desc& d = op->desc;
    int err = wire::check_desc(d);
    const bool payload = wire::has_in(wire::Op{d.op}) || wire::has_out(wire::Op{d.op});
    if (err == 0 && (payload ? d.addr + d.len < d.addr : d.addr != 0 || d.rkey != 0)) err = -EINVAL;
    if (err != 0 || payload_in(op->desc) == 0) {
      give(op, err);
    } else {
      waiting_.push(op);
    }
  }
  start_reads();
  return 0;
}

void RdmaServerChannel::give(ServerOp* op, int err) {
  priv(op).taken = true;
  handler_.take(op, err);
}

void RdmaServerChannel::cancel_batch(uint64_t batch) {
  ServerOpList keep;
  while (waiting_.head != nullptr) {
    ServerOp* op = waiting_.pop();
    if (op->batch != batch) {
      keep.push(op);
    } else {
      give(op, -ECANCELED);
    }
  }
  while (keep.head != nullptr) waiting_.push(keep.pop());
  handler_.cancel(this, batch);
}

void RdmaServerChannel::start_reads() {
  RdmaMemory& memory = connection_->device().memory();
  while (waiting_.head != nullptr && !starved_ && !finishing_ && reads_ < connection_->max_reads() &&
         connection_->room(kOpen + 2)) {
    ServerOp* op = waiting_.head;
    if (op->buf == nullptr && !handler_.buffer(op)) {
      starved_ = true;
      break;
    }
    KVFS_CHECK(op->buf_len >= op->desc.len);
    waiting_.pop();
    int err = 0;
    priv(op).region = memory.acquire(op->buf, op->desc.len, true, true, &err);
    if (priv(op).region == nullptr) {
      give(op, err);
      continue;
    }
    ++reads_;
    Sent* s = new_sent(Sent::Kind::Read);
    s->op = op;
    ++counters_.rdma;
    connection_->read(op->buf, priv(op).region->mr->lkey, op->desc.len, op->desc.addr, op->desc.rkey, s,
                      op->desc.len >= kFrameBytes);
  }
  connection_->post(true);  // of a group of small reads the last one says that they are done
}

void RdmaServerChannel::read_done(ServerOp* op, bool ok) {
  --reads_;
  connection_->device().memory().release(priv(op).region);
  priv(op).region = nullptr;
  if (!ok) return drop(op);
  counters_.bytes_in += op->desc.len;
  const bool sums = (options_.features & wire::kDataSums) != 0;
  give(op, sums && wire::data_sum(op->buf, op->desc.len) != op->desc.sum ? -EBADMSG : 0);
}

void RdmaServerChannel::resume() {
  starved_ = false;
  start_reads();
}

// ---------------------------------------------------------------- answers

void RdmaServerChannel::reply(ServerOp* op) {
  const bool out = wire::has_out(wire::Op{op->desc.op}) && op->result > 0;
  KVFS_CHECK(priv(op).taken && op->out_len <= op->desc.len && op->out_len == (out ? uint64_t(op->result) : 0));
  replies_.push(op);
}

void RdmaServerChannel::flush() {
  send_replies();
  if (ended_) drop_replies();
}

RdmaServerChannel::Open* RdmaServerChannel::open_for(uint64_t batch) {
  for (Open& o : open_)
    if (o.batch == batch) return &o;
  if (open_.size() == kOpen) close_frame(&open_.front());
  if (connection_->free_frames() == 0) return nullptr;
  Open o;
  o.batch = batch;
  o.frame = connection_->claim();
  o.sent = new_sent(Sent::Kind::Frame);
  open_.push_back(o);
  ++frames_out_;
  return &open_.back();
}

void RdmaServerChannel::close_frame(Open* o) {
  uint8_t* p = connection_->frame(o->frame);
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(wire::Type::Response);
  h.count = uint16_t(o->count);
  h.batch = o->batch;
  wire::seal(&h, p + sizeof h);
  std::memcpy(p, &h, sizeof h);
  connection_->send(o->frame, uint32_t(sizeof h) + wire::body_bytes(h), o->sent, true);
  ++counters_.frames_out;
  open_.erase(open_.begin() + (o - open_.data()));
}

// Writes leave before the answer that speaks of them, and arrive so.
void RdmaServerChannel::send_replies() {
  if (connection_->failing() || ended_) return;
  if (pong_waits_ && control(wire::Type::Pong, pong_)) pong_waits_ = false;
  RdmaMemory& memory = connection_->device().memory();
  while (replies_.head != nullptr && connection_->room(kOpen + 2)) {
    ServerOp* op = replies_.head;
    Open* o = open_for(op->batch);
    if (o == nullptr) break;
    replies_.pop();
    if (op->out_len != 0) {
      int err = 0;
      priv(op).region = memory.acquire(op->buf, op->out_len, false, true, &err);
      if (priv(op).region == nullptr) {
        op->result = err;
        op->out_len = 0;
        op->out_sum = 0;
      } else {
        connection_->write(op->buf, priv(op).region->mr->lkey, op->out_len, op->desc.addr, op->desc.rkey, nullptr,
                           false);
        ++counters_.rdma;
        counters_.bytes_out += op->out_len;
      }
    }
    wire::Result r{};
    r.index = op->index;
    r.len = op->out_len;
    r.result = op->result;
    r.sum = op->out_sum;
    std::memcpy(connection_->frame(o->frame) + sizeof(wire::FrameHeader) + o->count * sizeof r, &r, sizeof r);
    ++o->count;
    o->bytes += op->out_len;
    o->sent->ops.push(op);
    settle(op);
    if (o->count == RdmaConnection::kServerResults || o->bytes >= kFrameBytes) close_frame(o);
  }
  while (!open_.empty()) close_frame(&open_.front());
  connection_->post();
}

bool RdmaServerChannel::control(wire::Type type, uint64_t number) {
  if (connection_->free_frames() == 0 || !connection_->room(1)) return false;
  const uint32_t f = connection_->claim();
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(type);
  h.batch = number;
  wire::seal(&h, nullptr);
  std::memcpy(connection_->frame(f), &h, sizeof h);
  ++frames_out_;
  connection_->send(f, sizeof h, new_sent(Sent::Kind::Control), true);
  ++counters_.frames_out;
  return true;
}

RdmaServerChannel::Sent* RdmaServerChannel::new_sent(Sent::Kind kind) {
  Sent* s = free_sent_;
  if (s != nullptr) {
    free_sent_ = s->next;
  } else {
    s = new Sent;
  }
  s->kind = kind;
  s->op = nullptr;
  s->ops = {};
  return s;
}

void RdmaServerChannel::on_sent(void* what, bool ok) {
  auto* s = static_cast<Sent*>(what);
  heard_ |= ok;
  if (s->kind == Sent::Kind::Read) {
    read_done(s->op, ok);
  } else if (s->kind == Sent::Kind::Probe) {
    probing_ = false;
  } else {
    --frames_out_;
    while (s->ops.head != nullptr) drop(s->ops.pop());
  }
  s->next = free_sent_;
  free_sent_ = s;
}

// The client no longer waits for it.
void RdmaServerChannel::settle(ServerOp* op) {
  if (std::exchange(priv(op).answered, true)) return;
  --unanswered_;
  in_bytes_ -= payload_in(op->desc);
}

// The channel has no more to do with it.
void RdmaServerChannel::drop(ServerOp* op) {
  if (priv(op).region != nullptr) connection_->device().memory().release(priv(op).region);
  settle(op);
  --ops_;
  if (priv(op).taken || op->buf != nullptr) handler_.released(op);
  delete op;
}

// ---------------------------------------------------------------- turns and the end

void RdmaServerChannel::on_turn(uint64_t now) {
  start_reads();
  send_replies();
  probe_silent(now);
  if (!finishing_ || connection_->failing()) return;
  // A peer that breaks the rules is told why, and what was answered before gets its time to leave.
  if (finish_err_ != 0 && !bye_sent_ && control(wire::Type::Bye, uint64_t(-finish_err_))) {
    bye_sent_ = true;
    connection_->post();
  }
  if (!sending() || now >= finish_ns_) return connection_->fail(finish_err_);
  connection_->wake_at(finish_ns_);
}

void RdmaServerChannel::probe_silent(uint64_t now) {
  if (std::exchange(heard_, false)) heard_ns_ = now;
  if (probing_ || finishing_ || connection_->failing()) return;
  if (now < heard_ns_ + kProbeNs) return connection_->wake_at(heard_ns_ + kProbeNs);
  if (!connection_->room(1)) return;  // what is under way says as much
  probing_ = true;
  connection_->probe(new_sent(Sent::Kind::Probe));
  connection_->post();
}

void RdmaServerChannel::finish(int err) {
  if (finishing_ || ended_) return;
  finishing_ = true;
  finish_err_ = err;
  finish_ns_ = monotonic_ns() + kByeNs;
  connection_->wake_at(0);
}

void RdmaServerChannel::on_closed(int err) {
  ended_ = true;
  while (waiting_.head != nullptr) drop(waiting_.pop());
  drop_replies();
  if (finishing_) err = finish_err_;
  handler_.ended(this, err == -ECONNRESET ? 0 : err);
}

void RdmaServerChannel::drop_replies() {
  while (replies_.head != nullptr) drop(replies_.pop());
}

}  // namespace kvfs
