// tcp_client.cpp: requests out, answers in; see tcp_client.h.
#include "tcp_client.h"

#include <algorithm>
#include <cerrno>

#include "../store/check.h"

namespace kvfs {

using wire::FrameHeader;
using wire::Type;

namespace {

constexpr uint32_t kBatchBits = 16;  // of a batch's number: where it is kept; above: a count
constexpr uint32_t kHeader = sizeof(FrameHeader);
constexpr uint32_t kMaxFrame = kHeader + wire::kMaxBatch * uint32_t{sizeof(wire::Desc)};

bool has_memory(wire::Op op) { return wire::has_in(op) || wire::has_out(op); }

// What a server may say to an operation, whatever it does.
bool consistent(wire::Op op, uint32_t asked, const wire::Result& r) {
  if (r.result < -4095) return false;
  if (!wire::has_out(op) || r.result <= 0) {
    if (r.len != 0) return false;
  } else if (static_cast<uint64_t>(r.result) != r.len || r.len > asked) {
    return false;
  }
  switch (op) {
    case wire::Op::Get:
      return true;
    case wire::Op::Scan:
      return r.len % sizeof(wire::ScanRecord) == 0;
    case wire::Op::Stat:
      return r.result < 0 || r.len == sizeof(wire::TargetStat);
    case wire::Op::Put:
      return r.result <= 1;
    case wire::Op::Write:
      return r.result < 0 || static_cast<uint64_t>(r.result) == asked;
    case wire::Op::Lookup:
      return r.result <= int64_t{kMaxChunk};
    default:
      return r.result <= 0;
  }
}

}  // namespace

TcpClientChannel::TcpClientChannel(Uring& uring, int fd, const ChannelLimits& limits)
    : TcpStream(uring, fd, wire::kMaxBatch * uint32_t{sizeof(wire::Result)}), limits_(limits) {
  limits_.max_batch = std::clamp(limits_.max_batch, 1u, wire::kMaxBatch);
  receive_frame(kHeader);
}

TcpClientChannel::~TcpClientChannel() { KVFS_CHECK(ops_ == 0); }

int TcpClientChannel::error() const { return TcpStream::error(); }

// ---------------------------------------------------------------- requests

void TcpClientChannel::submit(NetOp* op) {
  KVFS_CHECK(op->done != nullptr);
  const wire::Op code{op->desc.op};
  KVFS_CHECK(!has_memory(code) || (op->mem.ptr != nullptr && op->desc.len <= wire::kMaxOpBytes));
  op->answered = op->cancelled = false;
  op->result = 0;
  priv(op) = Priv{0, 0, State::New, false};
  ++ops_;
  if (has_memory(code)) bytes_ += op->desc.len;
  if (broken()) {
    settle(op->desc.op, op->desc.len);
    return fail(op);
  }
  new_.push(op);
}

void TcpClientChannel::flush(uint32_t map_version) {
  while (NetOp* op = new_.head) {
    new_.remove(op);
    priv(op).map_version = map_version;
    priv(op).state = State::Flushed;
    flushed_.push(op);
  }
  send_more();
}

void TcpClientChannel::ping() {
  ping_ = true;
  send_more();
}

void TcpClientChannel::add_header(Type type, uint64_t number) {
  FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(type);
  h.batch = number;
  wire::seal(&h, nullptr);
  std::memcpy(meta(), &h, sizeof h);
  add_meta(sizeof h);
}

void TcpClientChannel::send_more() {
  if (broken() || sending()) return;
  while (!cancels_.empty() && send_room(kHeader, 1)) {
    if (find(cancels_.back()) != nullptr) add_header(Type::Cancel, cancels_.back());
    cancels_.pop_back();
  }
  if (ping_ && send_room(kHeader, 1)) {
    ping_ = false;
    add_header(Type::Ping, ++pinged_);
  }
  while (flushed_.head != nullptr && send_room(kMaxFrame, 1 + wire::kMaxBatch)) add_frame();
  send();
}

TcpClientChannel::Batch* TcpClientChannel::new_batch(uint32_t* at) {
  if (free_batches_.empty()) {
    KVFS_CHECK(batches_.size() < 1u << kBatchBits);  // no session is allowed as many operations
    free_batches_.push_back(static_cast<uint32_t>(batches_.size()));
    batches_.push_back(std::make_unique<Batch>());
  }
  *at = free_batches_.back();
  free_batches_.pop_back();
  return batches_[*at].get();
}

TcpClientChannel::Batch* TcpClientChannel::find(uint64_t id) {
  const auto at = static_cast<size_t>(id & ((1u << kBatchBits) - 1));
  return at < batches_.size() && id != 0 && batches_[at]->id == id ? batches_[at].get() : nullptr;
}

// One request frame of what is flushed.
void TcpClientChannel::add_frame() {
  uint32_t at;
  Batch* b = new_batch(&at);
  b->id = ++batch_no_ << kBatchBits | at;
  b->told = false;
  b->slots.clear();

  FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(Type::Request);
  h.map_version = priv(flushed_.head).map_version;
  h.batch = b->id;
  uint8_t* body = meta() + kHeader;
  while (NetOp* op = flushed_.head) {
    const wire::Op code{op->desc.op};
    const uint32_t payload = wire::has_in(code) ? op->desc.len : 0;
    if (b->slots.size() == limits_.max_batch || priv(op).map_version != h.map_version) break;
    if (h.payload + payload > wire::kMaxFrameBytes) break;
    flushed_.remove(op);
    op->desc.addr = 0;
    op->desc.rkey = 0;
    op->desc.sum = 0;
    if (wire::has_in(code) && (limits_.features & wire::kDataSums) != 0)
      op->desc.sum = wire::data_sum(op->mem.ptr, op->desc.len);
    op->batch = b->id;
    op->index = static_cast<uint32_t>(b->slots.size());
    std::memcpy(body + op->index * sizeof(wire::Desc), &op->desc, sizeof(wire::Desc));
    b->slots.push_back({op, op->desc.len, op->desc.op, true});
    priv(op).state = State::Sent;
    h.payload += payload;
  }
  h.count = static_cast<uint16_t>(b->slots.size());
  b->open = b->live = h.count;
  wire::seal(&h, body);
  std::memcpy(meta(), &h, sizeof h);
  add_meta(kHeader + wire::body_bytes(h));
  if (h.payload != 0) {
    for (const Slot& s : b->slots) {
      if (!wire::has_in(wire::Op{s.opcode}) || s.len == 0) continue;
      add_payload(s.op->mem.ptr, s.len);
      priv(s.op).state = State::Sending;
      sending_.push_back(s.op);
    }
  }
  ++counters_.frames_out;
}

void TcpClientChannel::on_sent() {
  for (NetOp* op : sending_) {
    if (priv(op).state == State::Sending) {
      priv(op).state = State::Sent;
    } else if (op->cancelled) {
      end(op);
    } else {
      finish(op);
    }
  }
  sending_.clear();
  send_more();
  deliver();
}

// The payload of cancelled operations goes on from copies: at most what the session may send unanswered.
void TcpClientChannel::on_send_halted() {
  bool room = true;
  std::erase_if(sending_, [&](NetOp* op) {
    if (!room || priv(op).state != State::LeavingSend || !op->cancelled) return false;
    room = detach(op->mem.ptr, op->desc.len);
    if (room) end(op);
    return room;
  });
  if (!room) break_up(-ENOMEM);
  deliver();
}

// ---------------------------------------------------------------- answers

void TcpClientChannel::on_received() {
  if (halted_) drop_cancelled_pieces();
  receive_more();
  deliver();
}

void TcpClientChannel::receive_more() {
  while (!broken()) {
    if (in_pieces_) {
      if (!receive_pieces()) return;
      in_pieces_ = false;
    }
    FrameHeader h;
    if (staged_bytes() < kHeader) return receive_frame(kHeader);
    std::memcpy(&h, staged(), sizeof h);
    int rc = wire::check_header(h, false);
    const uint32_t need = kHeader + wire::body_bytes(h);
    if (rc == 0 && staged_bytes() < need) return receive_frame(need);
    if (rc == 0) rc = wire::check_sum(h, staged() + kHeader);
    if (rc == 0) rc = take_frame(h, staged() + kHeader);
    if (rc != 0) {
      last_word(-EPROTO);
      return break_up(rc);
    }
    consume(need);
  }
}

int TcpClientChannel::take_frame(const FrameHeader& h, const uint8_t* body) {
  switch (Type{h.type}) {
    case Type::Response:
      return take_response(h, body);
    case Type::Pong:
      if (h.batch <= ponged_ || h.batch > pinged_) return -EPROTO;
      ponged_ = h.batch;
      return 0;
    default:  // Bye: the check of the header has let nothing else pass
      break_up(h.batch > 0 && h.batch < 4096 ? -static_cast<int>(h.batch) : -ECONNRESET);
      return 0;
  }
}

int TcpClientChannel::take_response(const FrameHeader& h, const uint8_t* body) {
  Batch* b = find(h.batch);
  if (b == nullptr) return -EPROTO;
  uint64_t total = 0;
  for (uint32_t i = 0; i < h.count; ++i) {
    wire::Result r;
    std::memcpy(&r, body + i * sizeof r, sizeof r);
    if (r.rsv != 0 || r.index >= b->slots.size()) return -EPROTO;
    Slot& s = b->slots[r.index];
    if (!s.open || !consistent(wire::Op{s.opcode}, s.len, r)) return -EPROTO;
    s.open = false;
    --b->open;
    total += r.len;
    NetOp* op = s.op;
    if (op == nullptr) {
      settle(s.opcode, s.len);
      if (r.len != 0) add_piece(nullptr, r.len, nullptr);
      continue;
    }
    s.op = nullptr;
    --b->live;
    op->answered = true;
    op->result = priv(op).unreadable && r.result >= 0 ? -EFAULT : r.result;
    if (r.len != 0) {
      priv(op).state = State::Receiving;
      priv(op).sum = r.sum;
      add_piece(static_cast<uint8_t*>(op->mem.ptr), r.len, op);
    } else if (priv(op).state == State::Sending) {
      priv(op).state = State::LeavingSend;  // before all of it was sent, as far as we know
    } else {
      finish(op);
    }
  }
  if (total != h.payload) return -EPROTO;
  in_pieces_ = pieces_left() != 0;
  ++counters_.frames_in;
  counters_.bytes_in += total;
  if (b->open == 0) {
    const uint64_t at = b->id & ((1u << kBatchBits) - 1);
    b->id = 0;
    free_batches_.push_back(static_cast<uint32_t>(at));
  } else {
    tell(b);
  }
  return 0;
}

void TcpClientChannel::on_piece(const Piece& p) {
  if (p.who == nullptr) return;
  auto* op = static_cast<NetOp*>(p.who);
  if ((limits_.features & wire::kDataSums) != 0 && wire::data_sum(p.ptr, p.len) != priv(op).sum) {
    op->answered = false;
    op->result = -EBADMSG;
  }
  finish(op);
}

// Its memory is its owner's alone: the others of the connection go on.
void TcpClientChannel::on_unwritable(const Piece& p) {
  auto* op = static_cast<NetOp*>(p.who);
  op->result = -EFAULT;
  finish(op);
}

// The server makes the change, of zeros for what is missing, and its answer says that nothing is on its way any more.
void TcpClientChannel::on_unreadable(const uint8_t* p) {
  for (NetOp* op : sending_) {
    const auto* mem = static_cast<const uint8_t*>(op->mem.ptr);
    if (p >= mem && p < mem + op->desc.len) priv(op).unreadable = true;
  }
}

// ---------------------------------------------------------------- cancel and the end

void TcpClientChannel::cancel(NetOp* op) {
  if (broken()) return;  // it is on its way back
  Priv& p = priv(op);
  switch (p.state) {
    case State::New:
    case State::Flushed:
      (p.state == State::New ? new_ : flushed_).remove(op);
      give_up(op);
      return finish(op);
    case State::Sending:
    case State::Sent: {
      Batch* b = find(op->batch);
      b->slots[op->index].op = nullptr;
      --b->live;
      give_up(op);
      if (p.state == State::Sent) {
        end(op);
      } else {
        p.state = State::LeavingSend;
        halt_send();
      }
      return tell(b);
    }
    case State::Receiving:
      p.state = State::LeavingReceive;
      halted_ = true;
      return halt_receive();
    case State::LeavingSend:
      if (op->cancelled) return;
      give_up(op);
      settle(op->desc.op, op->desc.len);
      return halt_send();
    case State::LeavingReceive:
    case State::Done:
      return;
  }
}

void TcpClientChannel::give_up(NetOp* op) {
  op->cancelled = true;
  op->answered = false;
  op->result = -ECANCELED;
}

// The receive is over: the rest of their payload goes elsewhere.
void TcpClientChannel::drop_cancelled_pieces() {
  halted_ = false;
  Piece* p = pieces();
  for (size_t i = 0, n = pieces_left(); i < n; ++i) {
    auto* op = static_cast<NetOp*>(p[i].who);
    if (op == nullptr || priv(op).state != State::LeavingReceive) continue;
    p[i].ptr = nullptr;
    p[i].who = nullptr;
    give_up(op);
    finish(op);
  }
}

void TcpClientChannel::tell(Batch* b) {
  if (b->live != 0 || b->open == 0 || b->told) return;
  b->told = true;
  cancels_.push_back(b->id);
  send_more();
}

void TcpClientChannel::settle(uint8_t opcode, uint32_t len) {
  --ops_;
  if (has_memory(wire::Op{opcode})) bytes_ -= len;
}

// It is on nobody's list any more. One that was cancelled after it was sent is settled when the server has answered it.
void TcpClientChannel::end(NetOp* op) {
  priv(op).state = State::Done;
  op->next = nullptr;
  *done_tail_ = op;
  done_tail_ = &op->next;
  if (!called_in()) call_back();
}

void TcpClientChannel::finish(NetOp* op) {
  settle(op->desc.op, op->desc.len);
  end(op);
}

void TcpClientChannel::fail(NetOp* op) {
  op->answered = false;
  op->result = error();
  end(op);
}

// What ends meanwhile comes back at the next call: an owner that submits again and again to a broken channel stops nobody.
void TcpClientChannel::deliver() {
  NetOp* op = done_head_;
  done_head_ = nullptr;
  done_tail_ = &done_head_;
  while (op != nullptr) {
    NetOp* next = op->next;
    op->done(op);
    op = next;
  }
  if (done_head_ != nullptr) call_back();
}

void TcpClientChannel::on_broken() {
  for (NetOp* op : sending_)
    if (priv(op).state == State::LeavingSend) end(op);
  sending_.clear();
  for (size_t i = 0; i < pieces_left(); ++i)
    if (pieces()[i].who != nullptr) fail(static_cast<NetOp*>(pieces()[i].who));
  for (auto& b : batches_) {
    if (b->id == 0) continue;
    for (const Slot& s : b->slots)
      if (s.op != nullptr) fail(s.op);
  }
  for (NetOpList* l : {&flushed_, &new_}) {
    while (NetOp* op = l->head) {
      l->remove(op);
      fail(op);
    }
  }
  batches_.clear();
  ops_ = 0;
  bytes_ = 0;
  deliver();
}

void TcpClientChannel::close() {
  if (broken()) return;
  last_word(0);
  break_up(-ESHUTDOWN);
}

}  // namespace kvfs
