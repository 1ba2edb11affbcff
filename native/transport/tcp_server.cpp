// tcp_server.cpp: requests in, answers out; see tcp_server.h.
#include "tcp_server.h"

#include <algorithm>
#include <cerrno>

#include "../store/check.h"
#include "op_list.h"

namespace kvfs {

using wire::FrameHeader;
using wire::Type;

namespace {

constexpr uint32_t kHeader = sizeof(FrameHeader);
constexpr uint32_t kMaxFrame = kHeader + wire::kMaxBatch * uint32_t{sizeof(wire::Result)};
constexpr uint32_t kLook = wire::kMaxBatch;  // answers that are looked at for more of the same batch

}  // namespace

void TcpServerChannel::List::push(ServerOp* op) {
  op->next = nullptr;
  *tail = op;
  tail = &op->next;
}

ServerOp* TcpServerChannel::List::pop() {
  ServerOp* op = head;
  head = op->next;
  if (head == nullptr) tail = &head;
  return op;
}

void TcpServerChannel::List::append(List* other) {
  if (other->head == nullptr) return;
  *tail = other->head;
  tail = other->tail;
  other->head = nullptr;
  other->tail = &other->head;
}

TcpServerChannel::TcpServerChannel(Uring& uring, int fd, ChannelHandler& handler, const TcpServerLimits& limits)
    : TcpStream(uring, fd, wire::kMaxBatch * uint32_t{sizeof(wire::Desc)}), handler_(handler), limits_(limits) {
  coming_.reserve(wire::kMaxBatch);
}

TcpServerChannel::~TcpServerChannel() {
  KVFS_CHECK(ops_ == 0);
  while (ServerOp* op = spare_) {
    spare_ = op->next;
    delete op;
  }
}

void TcpServerChannel::start() { receive_frame(kHeader); }

// ---------------------------------------------------------------- requests

void TcpServerChannel::receive_more() {
  while (!broken()) {
    if (in_payload_) {
      place_payload();
      if (!receive_pieces() || next_ < coming_.size()) return;
      in_payload_ = false;
      coming_.clear();
      next_ = 0;
    }
    stalled_ = unsent_ > kMaxUnsent;
    if (stalled_) return;
    FrameHeader h;
    if (staged_bytes() < kHeader) return receive_frame(kHeader);
    std::memcpy(&h, staged(), sizeof h);
    int rc = wire::check_header(h, true);
    const uint32_t need = kHeader + wire::body_bytes(h);
    if (rc == 0 && staged_bytes() < need) return receive_frame(need);
    if (rc == 0) rc = wire::check_sum(h, staged() + kHeader);
    if (rc == 0) rc = take_frame(h, staged() + kHeader);
    if (rc != 0) {
      last_word(rc);
      return break_up(rc);
    }
    consume(need);
  }
}

int TcpServerChannel::take_frame(const FrameHeader& h, const uint8_t* body) {
  switch (Type{h.type}) {
    case Type::Request:
      return take_request(h, body);
    case Type::Cancel:
      handler_.cancel(this, h.batch);
      return 0;
    case Type::Ping:
      pong_ = true;
      pong_no_ = h.batch;
      send_more();
      return 0;
    default:  // Bye: the check of the header has let nothing else pass
      break_up(0);
      return 0;
  }
}

int TcpServerChannel::take_request(const FrameHeader& h, const uint8_t* body) {
  ++counters_.frames_in;
  if (h.count > limits_.max_batch || unanswered_ + h.count > limits_.max_ops) return -EPROTO;
  if (in_ + h.payload > limits_.max_in) return -EPROTO;
  uint64_t total = 0;
  for (uint32_t i = 0; i < h.count; ++i) {
    wire::Desc d;
    std::memcpy(&d, body + i * sizeof d, sizeof d);
    total += payload_in(d);
  }
  if (total != h.payload) return -EPROTO;
  unanswered_ += h.count;
  in_ += total;
  counters_.bytes_in += total;
  for (uint32_t i = 0; i < h.count && !broken(); ++i) {
    ServerOp* op = new_op();
    std::memcpy(&op->desc, body + i * sizeof op->desc, sizeof op->desc);
    op->batch = h.batch;
    op->index = static_cast<uint16_t>(i);
    op->map_version = h.map_version;
    int err = wire::check_desc(op->desc);
    if (err == 0 && (op->desc.addr != 0 || op->desc.rkey != 0)) err = -EINVAL;
    if (payload_in(op->desc) != 0) {
      coming_.push_back({op, err, false});
      in_payload_ = true;
    } else {
      take(op, err);
    }
  }
  return 0;
}

// Gives as many of the frame's payloads a place as the handler has buffers for.
void TcpServerChannel::place_payload() {
  starved_ = false;
  for (; next_ < coming_.size(); ++next_) {
    Coming& c = coming_[next_];
    if (c.err == 0) {
      if (!handler_.buffer(c.op)) {
        starved_ = true;
        return;
      }
      KVFS_CHECK(c.op->buf != nullptr && c.op->buf_len >= c.op->desc.len);
    }
    c.placed = true;
    add_piece(c.err == 0 ? c.op->buf : nullptr, c.op->desc.len, &c);
  }
}

void TcpServerChannel::on_piece(const Piece& p) {
  auto* c = static_cast<Coming*>(p.who);
  ServerOp* op = c->op;
  c->op = nullptr;
  int err = c->err;
  if (err == 0 && (limits_.features & wire::kDataSums) != 0 && wire::data_sum(op->buf, op->desc.len) != op->desc.sum)
    err = -EBADMSG;
  take(op, err);
}

ServerOp* TcpServerChannel::new_op() {
  ServerOp* op = spare_;
  if (op != nullptr) {
    spare_ = op->next;
    --spares_;
    *op = ServerOp{};
  } else {
    op = new ServerOp{};
  }
  op->channel = this;
  return op;
}

void TcpServerChannel::take(ServerOp* op, int err) {
  ++ops_;
  handler_.take(op, err);
}

void TcpServerChannel::resume() {
  if (!starved_ || broken()) return;
  resumed_ = true;
  call_back();
}

// ---------------------------------------------------------------- answers

void TcpServerChannel::reply(ServerOp* op) {
  KVFS_CHECK(op->channel == this && (op->lent != nullptr || op->out_len <= op->buf_len));
  KVFS_CHECK(op->out_len == 0 || op->result > 0);
  unsent_ += op->out_len;
  replied_.push(op);
  if (ended()) call_back();
}

void TcpServerChannel::flush() {
  if (broken()) return;
  ready_.append(&replied_);
  send_more();
}

uint32_t TcpServerChannel::parts_of(const ServerOp* op) {
  if (op->lent != nullptr) return uint32_t(op->lent->parts.size());
  return op->out_len != 0 ? 1 : 0;
}

void TcpServerChannel::send_more() {
  if (broken() || TcpStream::sending()) return;
  if (pong_) add_pong();
  static_assert(Lent::kMaxParts + 1 <= kSendIov);
  while (ready_.head != nullptr && send_room(kMaxFrame, 1 + parts_of(ready_.head))) add_frame();
  send();
}

void TcpServerChannel::add_pong() {
  FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(Type::Pong);
  h.batch = pong_no_;
  wire::seal(&h, nullptr);
  std::memcpy(meta(), &h, sizeof h);
  add_meta(sizeof h);
  pong_ = false;
}

// One response frame: the first answer and those behind it of the same batch.
void TcpServerChannel::add_frame() {
  FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(Type::Response);
  h.batch = ready_.head->batch;
  uint8_t* body = meta() + kHeader;
  ServerOp** frame = sending_.tail;
  ServerOp** at = &ready_.head;
  uint32_t room = send_iovs() - 1;
  for (uint32_t look = 0; *at != nullptr && look < kLook; ++look) {
    ServerOp* op = *at;
    const uint32_t parts = parts_of(op);
    if (op->batch != h.batch || h.payload + op->out_len > wire::kMaxFrameBytes || parts > room) {
      at = &op->next;
      continue;
    }
    *at = op->next;
    room -= parts;
    const wire::Result r{op->index, 0, op->out_len, op->result, op->out_len != 0 ? op->out_sum : 0};
    std::memcpy(body + h.count * sizeof r, &r, sizeof r);
    ++h.count;
    h.payload += op->out_len;
    --unanswered_;
    in_ -= payload_in(op->desc);
    sending_.push(op);
  }
  if (*at == nullptr) ready_.tail = at;
  wire::seal(&h, body);
  std::memcpy(meta(), &h, sizeof h);
  add_meta(kHeader + wire::body_bytes(h));
  for (ServerOp* op = *frame; op != nullptr; op = op->next) {
    if (op->lent != nullptr) {
      for (const Lent::Part& p : op->lent->parts) add_payload(p.ptr, p.len);
    } else if (op->out_len != 0) {
      add_payload(op->buf, op->out_len);
    }
  }
  ++counters_.frames_out;
}

void TcpServerChannel::on_sent() {
  release_all(&sending_);
  send_more();
  if (stalled_ && !broken()) receive_more();
}

void TcpServerChannel::release(ServerOp* op) {
  unsent_ -= op->out_len;
  handler_.released(op);
  --ops_;
  if (spares_ == kSpareOps) {
    delete op;
    return;
  }
  op->next = spare_;
  spare_ = op;
  ++spares_;
}

void TcpServerChannel::release_all(List* l) {
  List all;
  all.append(l);
  while (all.head != nullptr) release(all.pop());
}

// ---------------------------------------------------------------- the end

void TcpServerChannel::on_end() { break_up(in_payload_ || staged_bytes() != 0 ? -ECONNRESET : 0); }

void TcpServerChannel::on_call() {
  if (ended()) return release_all(&replied_);
  if (!resumed_) return;
  resumed_ = false;
  if (starved_ && !receiving()) receive_more();
}

void TcpServerChannel::on_broken() {
  for (Coming& c : coming_) {
    if (c.op == nullptr) continue;
    if (c.placed && c.err == 0) {
      take(c.op, -ECONNRESET);  // has a buffer, which comes back with its answer
    } else {
      delete c.op;
    }
  }
  coming_.clear();
  release_all(&sending_);
  release_all(&ready_);
  release_all(&replied_);
  handler_.ended(this, error());
}

void TcpServerChannel::close(int err) {
  if (broken()) return;
  last_word(err);
  break_up(err);
}

}  // namespace kvfs
