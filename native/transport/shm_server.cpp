// shm_server.cpp: see shm_server.h.
#include "shm_server.h"

#include <cerrno>
#include <utility>

#include "../store/check.h"

namespace kvfs {

ShmServerChannel::ShmServerChannel(Uring& uring, std::unique_ptr<ShmLink> link, ChannelHandler& handler,
                                   const ShmServerLimits& limits)
    : ShmStream(uring, std::move(link), true), handler_(handler), limits_(limits) {}

ShmServerChannel::~ShmServerChannel() { KVFS_CHECK(ops_ == 0); }

// ---------------------------------------------------------------- requests

int ShmServerChannel::on_frame(const wire::FrameHeader& h, const uint8_t* body) {
  switch (wire::Type{h.type}) {
    case wire::Type::Request:
      return take_request(h, body);
    case wire::Type::Cancel:
      cancel_batch(h.batch);
      return 0;
    case wire::Type::Ping:
      pong_ = true;
      pong_no_ = h.batch;
      return 0;
    default:  // Bye
      return -ECONNRESET;
  }
}

// What it names of the arena is there.
bool ShmServerChannel::reaches(const wire::Desc& d) const {
  const bool payload = wire::has_in(wire::Op{d.op}) || wire::has_out(wire::Op{d.op});
  if (d.rkey != 0 || (!payload && d.addr != 0)) return false;
  return !payload || (d.len <= arena_bytes() && d.addr <= arena_bytes() - d.len);
}

int ShmServerChannel::take_request(const wire::FrameHeader& h, const uint8_t* body) {
  if (h.count > limits_.max_batch || unanswered_ + h.count > limits_.max_ops) return -EPROTO;
  for (uint32_t i = 0; i < h.count && failing() == 0; ++i) {
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
    int err = wire::check_desc(op->desc);
    if (err == 0 && !reaches(op->desc)) err = -EINVAL;
    if (in_bytes_ > limits_.max_in) {
      drop(op);
      return -EPROTO;
    }
    if (err != 0 || payload_in(op->desc) == 0) {
      give(op, err);
    } else {
      waiting_.push(op);
    }
  }
  receive_waiting();
  return 0;
}

void ShmServerChannel::give(ServerOp* op, int err) {
  priv(op).taken = true;
  handler_.take(op, err);
}

void ShmServerChannel::cancel_batch(uint64_t batch) {
  ServerOpList keep;
  while (waiting_.head != nullptr) {
    ServerOp* op = waiting_.pop();
    if (op->batch != batch) {
      keep.push(op);
    } else {
      give(op, -ECANCELED);
    }
  }
  waiting_ = keep;
  handler_.cancel(this, batch);
}

// Copied once: what is checked is what is used.
void ShmServerChannel::receive_waiting() {
  while (waiting_.head != nullptr && !starved_ && failing() == 0) {
    ServerOp* op = waiting_.head;
    if (!handler_.buffer(op)) {
      starved_ = true;
      return;
    }
    KVFS_CHECK(op->buf_len >= op->desc.len);
    waiting_.pop();
    std::memcpy(op->buf, arena() + op->desc.addr, op->desc.len);
    counters_.copied += op->desc.len;
    counters_.bytes_in += op->desc.len;
    const bool sums = (limits_.features & wire::kDataSums) != 0;
    give(op, sums && wire::data_sum(op->buf, op->desc.len) != op->desc.sum ? -EBADMSG : 0);
  }
}

void ShmServerChannel::resume() {
  starved_ = false;
  if (waiting_.head != nullptr) call_back();
}

void ShmServerChannel::on_turn() {
  receive_waiting();
  send_replies();
}

// ---------------------------------------------------------------- answers

void ShmServerChannel::reply(ServerOp* op) {
  const bool out = wire::has_out(wire::Op{op->desc.op}) && op->result > 0;
  KVFS_CHECK(priv(op).taken && op->out_len <= op->desc.len && op->out_len == (out ? uint64_t(op->result) : 0));
  if (op->out_len != 0) copy_out(op);  // while a cache has what its sum was made of
  replies_.push(op);
  ready_ += op->out_len;
  if (ready_ < kFrameBytes) return;
  publish();  // the client copies while the next ones are made
  post();
}

void ShmServerChannel::flush() {
  if (ended()) {
    drop_all(&sent_);
    return drop_all(&replies_);
  }
  send_replies();
  post();
}

void ShmServerChannel::copy_out(const ServerOp* op) {
  uint8_t* to = arena() + op->desc.addr;
  if (op->lent == nullptr) {
    std::memcpy(to, op->buf, op->out_len);
  } else {
    for (const Lent::Part& p : op->lent->parts) {
      std::memcpy(to, p.ptr, p.len);
      to += p.len;
    }
  }
  counters_.copied += op->out_len;
  counters_.bytes_out += op->out_len;
}

// Answers of one batch that follow each other leave as one frame.
void ShmServerChannel::publish() {
  uint32_t room;
  ready_ = 0;
  while (replies_.head != nullptr) {
    uint8_t* to = body(&room);
    if (to == nullptr) return;
    const uint32_t most = room / uint32_t{sizeof(wire::Result)};
    const uint64_t batch = replies_.head->batch;
    uint32_t n = 0;
    for (; n < most && replies_.head != nullptr && replies_.head->batch == batch; ++n) {
      ServerOp* op = replies_.pop();
      wire::Result r{};
      r.index = op->index;
      r.len = op->out_len;
      r.result = op->result;
      r.sum = op->out_sum;
      std::memcpy(to + size_t{n} * sizeof r, &r, sizeof r);
      settle(op);
      sent_.push(op);
    }
    send(wire::Type::Response, n, batch, 0);
  }
}

void ShmServerChannel::send_replies() {
  if (pong_ && control(wire::Type::Pong, pong_no_)) pong_ = false;
  publish();
  drop_all(&sent_);
}

void ShmServerChannel::settle(ServerOp* op) {
  if (std::exchange(priv(op).answered, true)) return;
  --unanswered_;
  in_bytes_ -= payload_in(op->desc);
}

// The channel has no more to do with it.
void ShmServerChannel::drop(ServerOp* op) {
  settle(op);
  --ops_;
  if (priv(op).taken || op->buf != nullptr) handler_.released(op);
  delete op;
}

void ShmServerChannel::drop_all(ServerOpList* l) {
  while (l->head != nullptr) drop(l->pop());
}

void ShmServerChannel::on_ended(int err) {
  for (ServerOpList* l : {&waiting_, &replies_, &sent_}) drop_all(l);
  handler_.ended(this, err == -ECONNRESET || err == -ESHUTDOWN ? 0 : err);
}

}  // namespace kvfs
