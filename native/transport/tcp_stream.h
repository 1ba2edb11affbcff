// tcp_stream.h owns one connected socket on a Uring, as both ends of a channel use it: frames are received into a small
// staging buffer, payload straight to where it belongs, and what is to be sent leaves with one sendmsg at a time.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "channel.h"

namespace kvfs {

class TcpStream {
 public:
  static constexpr uint32_t kStage = 8192;        // bytes received at once while a header is expected
  static constexpr uint32_t kRecvIov = 512;       // pieces of payload received at once
  static constexpr uint32_t kSendIov = 1024;      // IOV_MAX
  static constexpr uint32_t kSinkBytes = 32768;   // where payload goes that nobody wants
  static constexpr uint32_t kMetaBytes = 131072;  // headers and records of one send

 protected:
  // `body`: bytes of the largest body that is received. The socket is the stream's; it must be connected.
  TcpStream(Uring& uring, int fd, uint32_t body);
  ~TcpStream();
  TcpStream(const TcpStream&) = delete;
  TcpStream& operator=(const TcpStream&) = delete;

  // One piece of the payload that is expected next; ptr null: to be thrown away.
  struct Seg {
    uint8_t* ptr;
    uint32_t len;
    void* who;
  };

  // Called from Uring::submit_and_wait.
  virtual void on_received() = 0;        // staged() or payload has grown; receiving() is false
  virtual void on_piece(Seg* s) = 0;     // a piece is complete
  virtual void on_sent() = 0;            // all of the last send has left, or it failed; sending() is false
  virtual void on_send_paused() = 0;     // the send was taken back with stop_send: resume_send() continues it
  virtual void on_receive_paused() = 0;  // the same for stop_receive(): on_received() would follow, had it not stopped
  virtual void on_call() = 0;            // call_back() asked for it
  virtual void on_broken() = 0;          // neither send nor receive is under way any more, and error() is set

  // --- receiving
  const uint8_t* staged() const { return stage_.get() + at_; }
  uint32_t staged_bytes() const { return have_; }
  void consume(uint32_t n);
  void receive_frame(uint32_t need);  // until at least `need` bytes are staged, which they are not yet
  // Adds a piece of payload. They are received in order by receive_payload().
  void add_piece(uint8_t* ptr, uint32_t len, void* who) { segs_.push_back({ptr, len, who}); }
  // Moves what is staged into the pieces, then asks for the rest. True: all pieces are complete and forgotten.
  bool receive_payload();
  bool pieces_left() const { return seg_ < segs_.size(); }
  bool receiving() const { return recv_busy_; }
  bool receiving_payload() const { return recv_busy_ && to_segs_; }
  void stop_receive() { uring_.cancel(&recv_); }
  std::vector<Seg>& pieces() { return segs_; }  // from first_piece() on still to be received
  size_t first_piece() const { return seg_; }

  // --- sending
  uint8_t* meta(uint32_t n);                  // room for n bytes of headers and records in the send that is being made
  bool send_room(uint32_t meta, uint32_t iovs) const;  // there is as much room in it
  void add_meta(const void* p, uint32_t n);   // p: from meta()
  void add_payload(const void* p, uint32_t n);
  void send();                                // what was added
  bool send_empty() const { return iovs_ == 0; }
  bool sending() const { return send_busy_; }
  void stop_send() { uring_.cancel(&send_); pausing_ = true; }
  void resume_send() { post_send(); }
  // Of the send that is paused: the part of [p, p + n) that has not left; 0 bytes: none.
  uint32_t unsent(const void* p, uint32_t n) const;
  void replace_unsent(const void* p, uint32_t n, const uint8_t* by);  // `by`: bytes that go instead of the unsent part

  void call_back();
  // Nothing is sent or received any more; on_broken() follows.
  void break_up(int err);
  // Sends one header now, if nothing is being sent, without waiting: a last word.
  void last_word(uint64_t why);
  int error() const { return error_; }
  bool quiet() const { return fd_ < 0 && !recv_busy_ && !send_busy_ && !called_ && depth_ == 0; }

  ChannelCounters counters_;
  uint64_t heard_ns_ = 0;

 private:
  struct Enter {  // callbacks may not delete the stream
    explicit Enter(TcpStream* s) : s(s) { ++s->depth_; }
    ~Enter() { --s->depth_; }
    TcpStream* s;
  };
  static void recv_done(NetIo* io);
  static void send_done(NetIo* io);
  static void call_done(NetIo* io);
  void post_recv(NetIo::Op op, int flags);
  void post_send();
  void fill(uint32_t n);
  void end_if_quiet();

  Uring& uring_;
  int fd_;
  int error_ = 0;
  bool ended_ = false;
  unsigned depth_ = 0;

  NetIo recv_, send_, call_;
  bool recv_busy_ = false, send_busy_ = false, called_ = false, to_segs_ = false, pausing_ = false;
  std::unique_ptr<uint8_t[]> stage_;
  uint32_t stage_bytes_;
  uint32_t at_ = 0, have_ = 0;
  std::vector<Seg> segs_;
  size_t seg_ = 0;
  uint32_t seg_done_ = 0;  // bytes of segs_[seg_]
  std::unique_ptr<uint8_t[]> sink_;
  std::unique_ptr<iovec[]> recv_iov_;
  msghdr recv_msg_{};

  std::unique_ptr<uint8_t[]> meta_;
  uint32_t meta_used_ = 0;
  std::unique_ptr<iovec[]> send_iov_;
  uint32_t iovs_ = 0, first_iov_ = 0;
  msghdr send_msg_{};
};

}  // namespace kvfs
