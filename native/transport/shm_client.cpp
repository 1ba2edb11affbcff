// shm_client.cpp: see shm_client.h.
#include "shm_client.h"

#include <algorithm>
#include <cerrno>
#include <iterator>

#include "../store/check.h"

namespace kvfs {

namespace {

constexpr uint32_t kPage = 4096;

uint64_t pages(uint32_t n) { return (uint64_t{n} + kPage - 1) / kPage * kPage; }
bool has_memory(uint8_t opcode) { return wire::has_in(wire::Op{opcode}) || wire::has_out(wire::Op{opcode}); }

}  // namespace

uint64_t ShmArena::take(uint32_t len) {
  const uint64_t want = pages(len);
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < want) continue;
    const auto [at, n] = *it;
    free_.erase(it);
    if (n != want) free_[at + want] = n - want;
    return at;
  }
  return kNone;
}

void ShmArena::give(uint64_t at, uint32_t len) {
  uint64_t n = pages(len);
  auto after = free_.lower_bound(at);
  if (after != free_.end() && after->first == at + n) {
    n += after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == at) {
      before->second += n;
      return;
    }
  }
  free_[at] = n;
}

ShmClientChannel::ShmClientChannel(Uring& uring, std::unique_ptr<ShmLink> link, const ChannelLimits& limits)
    : ShmStream(uring, std::move(link), false), limits_(limits), free_(arena_bytes()) {
  limits_.max_batch = std::clamp(limits_.max_batch, 1u, wire::kMaxBatch);
  for (uint32_t i = kBatches; i-- != 0;) free_batches_.push_back(i);
  start();
}

ShmClientChannel::~ShmClientChannel() { KVFS_CHECK(ops_ == 0); }

// ---------------------------------------------------------------- requests

void ShmClientChannel::submit(NetOp* op) {
  KVFS_CHECK(op->done != nullptr);
  KVFS_CHECK(!has_memory(op->desc.op) || (op->mem.ptr != nullptr && op->desc.len <= wire::kMaxOpBytes));
  op->answered = op->cancelled = false;
  op->result = 0;
  priv(op) = Priv{0, State::Fresh};
  ++ops_;
  if (has_memory(op->desc.op)) bytes_ += op->desc.len;
  fresh_.push(op);
}

void ShmClientChannel::flush(uint32_t map_version) {
  while (NetOp* op = fresh_.head) {
    fresh_.remove(op);
    priv(op).map_version = map_version;
    priv(op).state = State::Flushed;
    flushed_.push(op);
  }
  if (ended()) {
    end_waiting();
  } else {
    send_waiting();
    post();
  }
  deliver();
}

void ShmClientChannel::ping() {
  if (pings_ == pings_sent_) ++pings_;
  call_back();
}

void ShmClientChannel::send_waiting() {
  while (!cancels_.empty()) {
    if (find(cancels_.back()) != nullptr && !control(wire::Type::Cancel, cancels_.back())) return;
    cancels_.pop_back();
  }
  if (pings_sent_ != pings_ && control(wire::Type::Ping, pings_)) pings_sent_ = pings_;
  while (flushed_.head != nullptr && send_batch()) {
  }
}

// A piece of the arena, with what is to be sent. False: no room now.
bool ShmClientChannel::place(NetOp* op, Slot* s) {
  wire::Desc& d = op->desc;
  *s = {op, 0, d.len, d.op, true};
  d.addr = d.sum = d.rkey = 0;
  if (!has_memory(d.op) || d.len == 0) return true;
  s->at = free_.take(d.len);
  if (s->at == ShmArena::kNone) return false;
  d.addr = s->at;
  if (!wire::has_in(wire::Op{d.op})) return true;
  std::memcpy(arena() + s->at, op->mem.ptr, d.len);
  counters_.copied += d.len;
  counters_.bytes_out += d.len;
  if ((limits_.features & wire::kDataSums) != 0) d.sum = wire::data_sum(op->mem.ptr, d.len);
  return true;
}

// One request frame of what waits. False: no more can be sent now.
bool ShmClientChannel::send_batch() {
  uint32_t room;
  uint8_t* to = free_batches_.empty() ? nullptr : body(&room);
  if (to == nullptr) return false;
  const uint32_t at = free_batches_.back();
  Batch& b = batches_[at];
  const uint64_t id = (batch_no_ + 1) * kBatches + at;
  const uint32_t map_version = priv(flushed_.head).map_version;
  const uint32_t most = std::min(limits_.max_batch, room / uint32_t{sizeof(wire::Desc)});
  bool placed = true;
  while (flushed_.head != nullptr && b.slots.size() < most) {
    NetOp* op = flushed_.head;
    Slot s;
    if (priv(op).map_version != map_version) break;
    if (placed = place(op, &s); !placed) break;
    flushed_.remove(op);
    priv(op).state = State::Sent;
    op->batch = id;
    op->index = uint32_t(b.slots.size());
    std::memcpy(to + b.slots.size() * sizeof op->desc, &op->desc, sizeof op->desc);
    b.slots.push_back(s);
  }
  if (b.slots.empty()) return false;
  ++batch_no_;
  free_batches_.pop_back();
  b.id = id;
  b.open = b.live = uint32_t(b.slots.size());
  b.told = false;
  send(wire::Type::Request, b.open, id, map_version);
  return placed;
}

// ---------------------------------------------------------------- answers

int ShmClientChannel::on_frame(const wire::FrameHeader& h, const uint8_t* body) {
  switch (wire::Type{h.type}) {
    case wire::Type::Response:
      return take_response(h, body);
    case wire::Type::Pong:
      if (h.batch <= ponged_ || h.batch > pings_sent_) return -EPROTO;
      ponged_ = h.batch;
      return 0;
    default:  // Bye
      return h.batch > 0 && h.batch < 4096 ? -static_cast<int>(h.batch) : -ECONNRESET;
  }
}

ShmClientChannel::Batch* ShmClientChannel::find(uint64_t id) {
  Batch& b = batches_[id % kBatches];
  return id != 0 && b.id == id ? &b : nullptr;
}

int ShmClientChannel::take_response(const wire::FrameHeader& h, const uint8_t* body) {
  Batch* b = find(h.batch);
  if (b == nullptr) return -EPROTO;
  for (uint32_t i = 0; i < h.count; ++i) {
    wire::Result r;
    std::memcpy(&r, body + size_t{i} * sizeof r, sizeof r);
    if (const int err = take_result(b, r); err != 0) return err;
  }
  if (b->open != 0) {
    tell(b);
    return 0;
  }
  b->id = 0;
  b->slots.clear();
  free_batches_.push_back(uint32_t(b - batches_.data()));
  return 0;
}

int ShmClientChannel::take_result(Batch* b, const wire::Result& r) {
  if (r.rsv != 0 || r.result < -4095 || r.index >= b->slots.size() || !b->slots[r.index].open) return -EPROTO;
  Slot& s = b->slots[r.index];
  const bool out = wire::has_out(wire::Op{s.opcode}) && r.result > 0;
  if (r.len > s.len || r.len != (out ? uint64_t(r.result) : 0)) return -EPROTO;
  s.open = false;
  --b->open;
  settle(s.opcode, s.len);
  NetOp* op = s.op;
  s.op = nullptr;
  int64_t result = r.result;
  bool answered = true;
  if (op != nullptr && r.len != 0) {
    std::memcpy(op->mem.ptr, arena() + s.at, r.len);
    counters_.copied += r.len;
    counters_.bytes_in += r.len;
    if ((limits_.features & wire::kDataSums) != 0 && wire::data_sum(op->mem.ptr, r.len) != r.sum) {
      result = -EBADMSG;
      answered = false;
    }
  }
  if (has_memory(s.opcode) && s.len != 0) free_.give(s.at, s.len);
  if (op == nullptr) return 0;
  --b->live;
  end(op, result, answered);
  return 0;
}

void ShmClientChannel::on_turn() {
  send_waiting();
  deliver();
}

// ---------------------------------------------------------------- cancel and the end

// Its piece of the arena stays the server's until that has answered.
void ShmClientChannel::cancel(NetOp* op) {
  if (failing() != 0) return;  // it is on its way back
  const State was = priv(op).state;
  if (was == State::Ended) return;
  op->cancelled = true;
  if (was == State::Sent) {
    Batch* b = find(op->batch);
    b->slots[op->index].op = nullptr;
    --b->live;
    tell(b);
  } else {
    (was == State::Fresh ? fresh_ : flushed_).remove(op);
    settle(op->desc.op, op->desc.len);
  }
  end(op, -ECANCELED, false);
  call_back();
}

void ShmClientChannel::tell(Batch* b) {
  if (b->live != 0 || b->open == 0 || b->told) return;
  b->told = true;
  cancels_.push_back(b->id);
}

void ShmClientChannel::settle(uint8_t opcode, uint32_t len) {
  --ops_;
  if (has_memory(opcode)) bytes_ -= len;
}

void ShmClientChannel::end(NetOp* op, int64_t result, bool answered) {
  priv(op).state = State::Ended;
  op->result = result;
  op->answered = answered;
  op->next = nullptr;
  *done_tail_ = op;
  done_tail_ = &op->next;
}

void ShmClientChannel::deliver() {
  if (delivering_) return;
  delivering_ = true;
  while (NetOp* op = done_head_) {
    done_head_ = op->next;
    if (done_head_ == nullptr) done_tail_ = &done_head_;
    op->done(op);
  }
  delivering_ = false;
}

void ShmClientChannel::on_ended(int) {
  for (Batch& b : batches_) {
    if (b.id == 0) continue;
    for (const Slot& s : b.slots) {
      if (!s.open) continue;
      settle(s.opcode, s.len);
      if (s.op != nullptr) end(s.op, failing(), false);
    }
    b.id = 0;
    b.slots.clear();
  }
  end_waiting();
  deliver();
}

// Those that were submitted since the last flush() come back with the next.
void ShmClientChannel::end_waiting() {
  for (NetOpList* l : {&flushed_, &fresh_}) {
    while (NetOp* op = l->head) {
      l->remove(op);
      settle(op->desc.op, op->desc.len);
      end(op, failing(), false);
    }
  }
}

}  // namespace kvfs
