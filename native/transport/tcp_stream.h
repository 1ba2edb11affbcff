// tcp_stream.h owns one connected socket on a Uring, as both ends of a channel use it: frames are received into a small
// staging buffer, payload straight to where it belongs, and what is to be sent leaves with one sendmsg at a time. Memory of
// its own: the staging buffer, kMetaBytes for headers being sent, two arrays of iovecs, kSinkBytes once something was thrown
// away, and what detach() copied.
// The kernel says what is left in the socket (TCP_INQ): payload that is there already is received together with the header
// behind it, one call for each of several frames.
// Not used: zero-copy sending (on loopback the kernel copies all the same, and elsewhere each send needs a second completion
// before its buffers are free), and multishot receive (the calls that are left are submitted by the system call that waits).
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <vector>

#include "channel.h"

namespace kvfs {

class TcpStream {
 public:
  static constexpr uint32_t kStage = 8192;         // bytes received at once while a header is expected
  static constexpr uint32_t kRecvIov = 512;        // pieces of payload received at once
  static constexpr uint32_t kRecvBytes = 1 << 20;  // of them: what is checked next should still be in the CPU's cache
  static constexpr uint32_t kSendIov = 1024;       // IOV_MAX
  static constexpr uint32_t kSinkBytes = 32768;    // where payload goes that nobody wants
  static constexpr uint32_t kMetaBytes = 131072;   // headers and records of one send
  static constexpr uint64_t kSendBytes = 8 << 20;  // payload after which nothing more is added to a send

 protected:
  // body: bytes of the largest body that is received. The connected socket is the stream's from now on.
  TcpStream(Uring& uring, int fd, uint32_t body);
  ~TcpStream();
  TcpStream(const TcpStream&) = delete;
  TcpStream& operator=(const TcpStream&) = delete;

  // One piece of the payload that comes next. ptr null: nobody wants it.
  struct Piece {
    uint8_t* ptr;
    uint32_t len;
    void* who;
  };

  // All called from Uring::submit_and_wait.
  virtual void on_received() = 0;             // something has come, or halt_receive() did its work
  virtual void on_end() = 0;                  // the peer sends nothing more: break_up()
  virtual void on_piece(const Piece& p) = 0;  // it is complete
  // The kernel cannot write to it, or not read what begins at p of what was to be sent. What is still to come of it goes
  // nowhere, and zeros leave in the place of the other; unless on_unwritable() or on_unreadable() ends the connection.
  virtual void on_unwritable(const Piece&) { break_up(-EFAULT); }
  virtual void on_unreadable(const uint8_t*) { break_up(-EFAULT); }
  virtual void on_sent() = 0;         // all of the send has left
  virtual void on_send_halted() = 0;  // halt_send() did its work; afterwards the rest goes on its way
  virtual void on_call() = 0;         // call_back() asked for it
  virtual void on_broken() = 0;       // after break_up(): the kernel has no memory of ours any more

  // --- receiving; one thing at a time
  const uint8_t* staged() const { return stage_.get() + at_; }
  uint32_t staged_bytes() const { return have_; }
  void consume(uint32_t n) { at_ += n, have_ -= n; }
  void receive_frame(uint32_t need);  // need: bytes that must be staged to go on, more than there are
  void add_piece(uint8_t* ptr, uint32_t len, void* who) { pieces_.push_back({ptr, len, who}); }
  // Moves what is staged into the pieces and asks for the rest. True: all pieces are complete.
  bool receive_pieces();
  // Pieces that are still to come, the first maybe in part. Those may be changed while receiving() is false.
  Piece* pieces() { return pieces_.data() + piece_; }
  size_t pieces_left() const { return pieces_.size() - piece_; }
  bool receiving() const { return recv_busy_; }
  void halt_receive() { uring_.cancel(&recv_); }

  // --- sending; one sendmsg at a time
  bool send_room(uint32_t meta, uint32_t iovs) const;
  uint32_t send_iovs() const { return kSendIov - iovs_; }
  uint8_t* meta() { return meta_.get() + meta_used_; }  // where headers and records are made
  void add_meta(uint32_t n);                            // the next n bytes there, behind what was added before
  void add_payload(const void* p, uint32_t n);
  void send();  // what was added, if anything
  bool sending() const { return send_busy_; }
  void halt_send();
  // While halted: what has not left of [p, p + n) leaves from a copy. False: no memory for it.
  bool detach(const void* p, uint32_t n);

  void call_back();
  bool called_in() const { return depth_ != 0; }  // within one of the calls above
  void break_up(int err);
  void last_word(int err);  // a Bye, if it can be sent at once and between frames
  bool broken() const { return broken_; }
  int error() const { return error_; }
  bool ended() const { return ended_; }
  bool quiet() const { return !recv_busy_ && !send_busy_ && !call_busy_ && depth_ == 0; }

  ChannelCounters counters_;
  uint64_t heard_ns_;

 private:
  static void recv_done(NetIo* io);
  static void send_done(NetIo* io);
  static void call_done(NetIo* io);
  void post_receive(uint32_t iovs, int flags);
  uint32_t queued() const;
  void fill(uint32_t n);
  void find_unwritable();
  void post_send();
  void find_unreadable();
  void end_if_still();

  Uring& uring_;
  int fd_;
  int error_ = 0;
  bool broken_ = false, ended_ = false;
  unsigned depth_ = 0;

  NetIo recv_, send_, call_;
  bool recv_busy_ = false, send_busy_ = false, call_busy_ = false;
  bool single_ = false;   // pieces one by one, since the kernel could not write to one of several
  bool halting_ = false;  // the send
  std::unique_ptr<uint8_t[]> stage_;
  uint32_t stage_bytes_;
  uint32_t at_ = 0, have_ = 0;
  std::vector<Piece> pieces_;
  size_t piece_ = 0;
  uint32_t piece_done_ = 0;  // bytes of the first
  std::unique_ptr<uint8_t[]> sink_;
  std::vector<iovec> recv_iov_ = std::vector<iovec>(kRecvIov);
  msghdr recv_msg_{};
  alignas(cmsghdr) char queued_[CMSG_SPACE(sizeof(int))] = {};  // what recvmsg says with TCP_INQ
  uint32_t expected_ = 0;  // bytes of pieces that are being received; what comes behind them is staged
  uint32_t waiting_ = 0;   // bytes known to be in the socket

  std::unique_ptr<uint8_t[]> meta_;
  uint32_t meta_used_ = 0;
  uint64_t payload_ = 0;
  std::vector<iovec> send_iov_ = std::vector<iovec>(kSendIov);
  uint32_t iovs_ = 0, first_ = 0;
  bool send_single_ = false;  // likewise
  std::vector<std::unique_ptr<uint8_t[]>> copies_;
  msghdr send_msg_{};
};

}  // namespace kvfs
