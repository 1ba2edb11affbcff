// shm_stream.h owns what both ends of a connection through shared memory have in common: the segment, the socket beside it
// (bells, and the end: who dies closes it), frames out and in, and turns on the reactor.
//
// Bounds: kBudget frames and kBells bells per turn, then the reactor's other work comes first.
#pragma once

#include <memory>

#include "channel.h"
#include "shm_ring.h"

namespace kvfs {

// The segment as mapped here and the connection's socket; ends both.
class ShmLink {
 public:
  // fd: a connected Unix SEQPACKET socket, nonblocking; mem: ShmLayout(setup).bytes bytes.
  ShmLink(int fd, void* mem, const ShmSetup& setup) : fd_(fd), mem_(static_cast<uint8_t*>(mem)), setup_(setup) {}
  virtual ~ShmLink();
  ShmLink(const ShmLink&) = delete;
  ShmLink& operator=(const ShmLink&) = delete;
  int fd() const { return fd_; }
  uint8_t* mem() const { return mem_; }
  const ShmSetup& setup() const { return setup_; }
  void hang_up();  // the peer sees the end

 private:
  int fd_;
  uint8_t* mem_;
  ShmSetup setup_;
};

class ShmStream {
 protected:
  static constexpr uint32_t kBudget = 32;
  static constexpr uint32_t kBells = 64;

  ShmStream(Uring& uring, std::unique_ptr<ShmLink> link, bool server);
  virtual ~ShmStream();

  // A frame, well-formed; it is gone after this. Not 0: the connection ends with it.
  virtual int on_frame(const wire::FrameHeader& h, const uint8_t* body) = 0;
  virtual void on_turn() = 0;          // after frames, when there may be room again, and when call_back() asked for it
  virtual void on_ended(int err) = 0;  // once; nothing arrives or leaves any more

  void start();  // from the next turn of the reactor on
  void call_back();
  // Ends it with the next turn; the first reason counts. A peer that breaks the rules is told so.
  void fail(int err);
  int failing() const { return err_; }
  bool quiet() const { return ended_ && !calling_; }
  bool ended() const { return ended_; }

  // The next frame to send: fill its body, at most `room` bytes, then send() it. Null: no room now (on_turn() comes then).
  uint8_t* body(uint32_t* room);
  void send(wire::Type type, uint32_t count, uint64_t batch, uint32_t map_version);
  bool control(wire::Type type, uint64_t number);  // false: no room now
  void post();                                     // what was sent since the last call is known to the peer

  uint8_t* arena() const { return arena_; }
  uint64_t arena_bytes() const { return link_->setup().arena_bytes; }

  uint64_t heard_ns_ = 0;
  ChannelCounters counters_;

 private:
  static void on_poll(void* self, uint32_t events);
  static void on_called(NetIo* io);
  void turn();
  void listen();
  void take_frames();
  void bell();
  void end();

  Uring& uring_;
  std::unique_ptr<ShmLink> link_;
  const bool server_;
  uint8_t* arena_;
  ShmProducer out_;
  ShmConsumer in_;
  uint8_t* slot_ = nullptr;  // body() gave
  std::unique_ptr<uint8_t[]> copy_;
  NetIo nop_;
  int poll_ = -1;
  int err_ = 0;
  bool calling_ = false, hung_up_ = false, sent_ = false, ended_ = false, in_turn_ = false;
};

}  // namespace kvfs
