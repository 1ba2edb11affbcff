// tcp_stream.cpp: receiving and sending over one socket; see tcp_stream.h.
#include "tcp_stream.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>

#include "../store/check.h"

namespace kvfs {

TcpStream::TcpStream(Uring& uring, int fd, uint32_t body) : heard_ns_(monotonic_ns()), uring_(uring), fd_(fd) {
  const int flags = ::fcntl(fd, F_GETFL);
  if (flags >= 0 && (flags & O_NONBLOCK) != 0) ::fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);  // NetIo waits in the kernel
  stage_bytes_ = std::max(kStage, uint32_t{sizeof(wire::FrameHeader)} + body);
  stage_ = std::make_unique_for_overwrite<uint8_t[]>(stage_bytes_);
  meta_ = std::make_unique_for_overwrite<uint8_t[]>(kMetaBytes);
  pieces_.reserve(wire::kMaxBatch);
  recv_.fd = send_.fd = fd;
  recv_.owner = send_.owner = call_.owner = this;
  recv_.done = recv_done;
  send_.done = send_done;
  call_.done = call_done;
  recv_.msg = &recv_msg_;
  recv_.op = NetIo::Op::RecvMsg;
  recv_msg_.msg_iov = recv_iov_.data();
  const int on = 1;  // without it, more calls
  ::setsockopt(fd, IPPROTO_TCP, TCP_INQ, &on, sizeof on);
  send_.op = NetIo::Op::SendMsg;
  send_.msg = &send_msg_;
  send_.flags = MSG_NOSIGNAL | MSG_WAITALL;
}

TcpStream::~TcpStream() {
  KVFS_CHECK(quiet());
  if (fd_ >= 0) ::close(fd_);
}

// ---------------------------------------------------------------- receiving

void TcpStream::receive_frame(uint32_t need) {
  if (broken_) return;
  KVFS_CHECK(!recv_busy_ && have_ < need && need <= stage_bytes_);
  if (at_ != 0) std::memmove(stage_.get(), stage_.get() + at_, have_);
  at_ = 0;
  recv_iov_[0] = {stage_.get() + have_, std::max(need, kStage) - have_};
  expected_ = 0;
  post_receive(1, 0);
}

void TcpStream::post_receive(uint32_t iovs, int flags) {
  recv_msg_.msg_iovlen = iovs;
  const bool all = (flags & MSG_WAITALL) != 0;  // which the kernel ignores if it is to say what is queued, too
  recv_msg_.msg_control = all ? nullptr : queued_;
  recv_msg_.msg_controllen = all ? 0 : sizeof queued_;
  recv_.flags = flags;
  recv_busy_ = true;
  ++counters_.calls;
  uring_.submit(&recv_);
}

// Bytes that were in the socket when the last receive ended, or 0 if the kernel did not say.
uint32_t TcpStream::queued() const {
  const cmsghdr* c = CMSG_FIRSTHDR(&recv_msg_);
  if (c == nullptr || c->cmsg_level != IPPROTO_TCP || c->cmsg_type != TCP_CM_INQ || c->cmsg_len < CMSG_LEN(sizeof(int)))
    return 0;
  int n;
  std::memcpy(&n, CMSG_DATA(c), sizeof n);
  return static_cast<uint32_t>(std::max(n, 0));
}

// n bytes of the pieces have come.
void TcpStream::fill(uint32_t n) {
  while (n > 0) {
    KVFS_CHECK(piece_ < pieces_.size());
    const Piece p = pieces_[piece_];
    const uint32_t part = std::min(n, p.len - piece_done_);
    piece_done_ += part;
    n -= part;
    if (piece_done_ < p.len) break;
    ++piece_;
    piece_done_ = 0;
    on_piece(p);
  }
}

bool TcpStream::receive_pieces() {
  while (!broken_ && piece_ < pieces_.size() && have_ > 0) {
    const Piece& p = pieces_[piece_];
    const uint32_t part = std::min(have_, p.len - piece_done_);
    if (p.ptr != nullptr) {
      std::memcpy(p.ptr + piece_done_, staged(), part);
      counters_.copied += part;
    }
    consume(part);
    fill(part);
  }
  if (broken_) return false;
  if (piece_ == pieces_.size()) {
    pieces_.clear();
    piece_ = 0;
    single_ = false;
    return true;
  }
  KVFS_CHECK(!recv_busy_);
  uint32_t n = 0;
  expected_ = 0;
  const auto put = [&](uint8_t* p, uint32_t len) {
    if (n > 0 && static_cast<uint8_t*>(recv_iov_[n - 1].iov_base) + recv_iov_[n - 1].iov_len == p) {
      recv_iov_[n - 1].iov_len += len;
    } else {
      recv_iov_[n++] = {p, len};
    }
    expected_ += len;
  };
  const size_t end = single_ ? piece_ + 1 : pieces_.size();
  size_t i = piece_;
  bool whole = true;  // the last of them
  for (; i < end && n < kRecvIov && expected_ < kRecvBytes; ++i) {
    const uint32_t skip = i == piece_ ? piece_done_ : 0;
    uint32_t rest = std::min(pieces_[i].len - skip, kRecvBytes - expected_);
    whole = skip + rest == pieces_[i].len;
    if (pieces_[i].ptr != nullptr) {
      put(pieces_[i].ptr + skip, rest);
      continue;
    }
    if (sink_ == nullptr) sink_ = std::make_unique_for_overwrite<uint8_t[]>(kSinkBytes);
    while (rest > 0 && n < kRecvIov) {
      const uint32_t part = std::min(rest, kSinkBytes);
      recv_iov_[n++] = {sink_.get(), part};
      expected_ += part;
      rest -= part;
    }
  }
  // The next header, too, if all of the pieces and more has come already: the stage is empty.
  const bool more = waiting_ > expected_ && i == end && whole && !single_ && n < kRecvIov;
  if (more) {
    at_ = 0;
    recv_iov_[n++] = {stage_.get(), std::min(waiting_ - expected_, kStage)};
  }
  post_receive(n, more ? 0 : MSG_WAITALL);
  return false;
}

// One of the pieces asked for, which one is known once they are asked for one by one. Nothing of it has come meanwhile.
void TcpStream::find_unwritable() {
  if (!single_) {
    single_ = true;
    return;
  }
  const Piece p = pieces_[piece_];
  pieces_[piece_].ptr = nullptr;
  pieces_[piece_].who = nullptr;
  on_unwritable(p);
}

void TcpStream::recv_done(NetIo* io) {
  auto* s = static_cast<TcpStream*>(io->owner);
  const int32_t n = io->result;
  s->recv_busy_ = false;
  ++s->depth_;
  if (n > 0) {
    s->heard_ns_ = monotonic_ns();
    s->waiting_ = s->queued();
    const uint32_t payload = std::min(static_cast<uint32_t>(n), s->expected_);
    s->have_ += static_cast<uint32_t>(n) - payload;
    s->fill(payload);
  }
  const bool fault = n == -EFAULT && s->expected_ != 0;
  if (fault && !s->broken_) s->find_unwritable();
  if (!s->broken_) {
    if (n == 0) {
      s->on_end();
    } else if (n > 0 || n == -ECANCELED || fault) {
      s->on_received();
    } else {
      s->break_up(n);
    }
  }
  s->end_if_still();
  --s->depth_;
}

// ---------------------------------------------------------------- sending

bool TcpStream::send_room(uint32_t meta, uint32_t iovs) const {
  return kMetaBytes - meta_used_ >= meta && kSendIov - iovs_ >= iovs && payload_ < kSendBytes;
}

void TcpStream::add_meta(uint32_t n) {
  uint8_t* p = meta();
  meta_used_ += n;
  if (iovs_ > 0) {
    iovec& last = send_iov_[iovs_ - 1];
    if (static_cast<uint8_t*>(last.iov_base) + last.iov_len == p) {
      last.iov_len += n;
      return;
    }
  }
  send_iov_[iovs_++] = {p, n};
}

void TcpStream::add_payload(const void* p, uint32_t n) {
  send_iov_[iovs_++] = {const_cast<void*>(p), n};
  payload_ += n;
  counters_.bytes_out += n;
}

void TcpStream::send() {
  if (iovs_ == 0 || broken_) return;
  KVFS_CHECK(!send_busy_);
  first_ = 0;
  post_send();
}

void TcpStream::post_send() {
  send_msg_.msg_iov = send_iov_.data() + first_;
  send_msg_.msg_iovlen = send_single_ ? 1 : iovs_ - first_;
  send_busy_ = true;
  halting_ = false;
  ++counters_.calls;
  uring_.submit(&send_);
}

void TcpStream::halt_send() {
  halting_ = true;
  uring_.cancel(&send_);
}

void TcpStream::find_unreadable() {
  if (!send_single_) {
    send_single_ = true;
    return;
  }
  iovec& v = send_iov_[first_];
  on_unreadable(static_cast<const uint8_t*>(v.iov_base));
  if (broken_) return;
  std::unique_ptr<uint8_t[]> zeros(new (std::nothrow) uint8_t[v.iov_len]());
  if (zeros == nullptr) return break_up(-ENOMEM);
  v.iov_base = zeros.get();
  copies_.push_back(std::move(zeros));
}

bool TcpStream::detach(const void* p, uint32_t n) {
  const auto from = reinterpret_cast<uintptr_t>(p), to = from + n;
  for (uint32_t i = first_; i < iovs_; ++i) {
    iovec& v = send_iov_[i];
    const auto at = reinterpret_cast<uintptr_t>(v.iov_base);
    if (at >= to || at + v.iov_len <= from) continue;
    std::unique_ptr<uint8_t[]> copy(new (std::nothrow) uint8_t[v.iov_len]);
    if (copy == nullptr) return false;
    std::memcpy(copy.get(), v.iov_base, v.iov_len);
    counters_.copied += v.iov_len;
    v.iov_base = copy.get();
    copies_.push_back(std::move(copy));
  }
  return true;
}

void TcpStream::send_done(NetIo* io) {
  auto* s = static_cast<TcpStream*>(io->owner);
  ++s->depth_;
  s->send_busy_ = false;
  auto n = static_cast<size_t>(std::max(io->result, 0));
  while (n > 0 && s->first_ < s->iovs_) {
    iovec& v = s->send_iov_[s->first_];
    const size_t part = std::min(n, v.iov_len);
    v.iov_base = static_cast<uint8_t*>(v.iov_base) + part;
    v.iov_len -= part;
    n -= part;
    if (v.iov_len == 0) ++s->first_;
  }
  const bool fault = io->result == -EFAULT;
  if (fault && !s->broken_) s->find_unreadable();
  if (s->broken_) {
    // Ends below.
  } else if (io->result <= 0 && !fault && !(io->result == -ECANCELED && s->halting_)) {
    s->break_up(io->result == 0 ? -EPIPE : io->result);
  } else if (s->first_ < s->iovs_) {
    if (s->halting_) s->on_send_halted();
    if (!s->broken_) s->post_send();
  } else {
    s->iovs_ = s->meta_used_ = 0;
    s->payload_ = 0;
    s->send_single_ = false;
    s->copies_.clear();
    s->on_sent();
  }
  s->end_if_still();
  --s->depth_;
}

// ---------------------------------------------------------------- the end

void TcpStream::call_back() {
  if (call_busy_) return;
  call_busy_ = true;
  uring_.submit(&call_);
}

void TcpStream::call_done(NetIo* io) {
  auto* s = static_cast<TcpStream*>(io->owner);
  s->call_busy_ = false;
  ++s->depth_;
  s->on_call();
  s->end_if_still();
  --s->depth_;
}

void TcpStream::break_up(int err) {
  if (broken_) return;
  broken_ = true;
  error_ = err;
  ::shutdown(fd_, SHUT_RDWR);
  if (recv_busy_) uring_.cancel(&recv_);
  if (send_busy_) uring_.cancel(&send_);
  if (!recv_busy_ && !send_busy_ && !called_in()) call_back();
}

void TcpStream::end_if_still() {
  if (!broken_ || ended_ || recv_busy_ || send_busy_) return;
  ended_ = true;
  ::close(fd_);
  fd_ = -1;
  on_broken();
}

void TcpStream::last_word(int err) {
  if (broken_ || send_busy_) return;
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(wire::Type::Bye);
  h.batch = static_cast<uint64_t>(-err);
  wire::seal(&h, nullptr);
  [[maybe_unused]] const ssize_t n = ::send(fd_, &h, sizeof h, MSG_DONTWAIT | MSG_NOSIGNAL);
}

}  // namespace kvfs
