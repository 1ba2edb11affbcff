// channel.h owns what the two ends of a connection look like to those who use it: ClientChannel, on which requests leave
// and come back answered, and ServerChannel, from which requests arrive and on which they are answered. TCP, RDMA and shared
// memory are implementations; none knows what an operation means. All of a channel runs on the reactor thread of its Uring.
// Callbacks run from Uring::submit_and_wait or from flush(), never from submit() or reply().
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "../store/clock.h"
#include "../store/uring_device.h"
#include "../wire/wire.h"

namespace kvfs {

// ---------------------------------------------------------------- client

// One operation on its way to a target and back. The owner's; from submit() until `done` the channel's.
struct NetOp {
  wire::Desc desc{};  // complete but for `sum`, `addr` and `rkey`, which the channel fills
  MemRef mem;  // has_in: desc.len bytes to send; has_out: room for desc.len bytes, written any time before `done`
  int64_t result = 0;
  // result says what the server said, or -EFAULT: it has said something, but the memory could not be written or read. False:
  // the channel broke, or the payload was damaged (-EBADMSG): nobody knows whether the server has executed it; result =
  // -errno of the channel.
  bool answered = false;
  bool cancelled = false;  // by cancel()
  // Not answered, and nothing of it has left: the memory cannot be used, here or on another connection. result = -errno.
  bool unreachable = false;
  void (*done)(NetOp*) = nullptr;
  void* owner = nullptr;
  NetOp* next = nullptr;        // the owner's while idle, the channel's while submitted
  NetOp* prev = nullptr;        // the channel's
  uint64_t batch = 0;           // the channel's
  uint32_t index = 0;           // the channel's
  alignas(8) uint8_t priv[32];  // the channel's scratch
};

struct ChannelLimits {  // of the session, as the HelloReply says
  uint32_t max_batch = 64;
  uint64_t features = wire::kFeatures;
};

struct ChannelCounters {
  uint64_t frames_out = 0, frames_in = 0, bytes_out = 0, bytes_in = 0;  // payload bytes
  uint64_t calls = 0;   // TCP: io_uring send and receive requests; RDMA: doorbells; shared memory: bells
  uint64_t rdma = 0;    // RDMA READ and WRITE operations
  uint64_t copied = 0;  // payload bytes that were copied in user space
};

class ClientChannel {
 public:
  virtual ~ClientChannel() = default;  // with nothing in flight: after closed() has said true

  // Takes an operation; it leaves at flush(), together with others of the same turn as one request frame of at most
  // max_batch. The owner keeps the session's limits (max_ops, max_in). Fails later through `done` if the channel is broken.
  virtual void submit(NetOp* op) = 0;
  virtual void flush(uint32_t map_version) = 0;
  // `op` comes back soon with cancelled = true and answered = false, or as if it had not been called, if that was sooner. Its
  // memory is not touched after `done`. May break the channel where there is no other way to be sure of that.
  virtual void cancel(NetOp* op) = 0;
  // Asks the server for a sign of life; see heard_ns.
  virtual void ping() = 0;

  virtual int error() const = 0;                // 0, or the -errno that broke it: nothing can be submitted any more
  virtual uint64_t heard_ns() const = 0;        // monotonic time of the last byte or completion from the server
  virtual uint64_t bytes_inflight() const = 0;  // payload, both ways, of operations submitted and not done
  virtual uint32_t ops_inflight() const = 0;
  // Ends it: everything in flight comes back with answered = false. Safe to call twice.
  virtual void close() = 0;
  virtual bool closed() const = 0;  // nothing refers to the channel any more: it may be deleted
  virtual const ChannelCounters& counters() const = 0;
};

// ---------------------------------------------------------------- server

class ServerChannel;

// One operation as the server executes it. Made by the channel; its owner from ChannelHandler::take until released() is the
// handler.
struct ServerOp {
  wire::Desc desc{};
  uint8_t* buf = nullptr;  // has_in: the payload, verified; has_out: what is to be sent; from ChannelHandler::buffer
  uint32_t buf_len = 0;    // room
  int fixed = -1;          // registered buffer of buf
  int64_t result = 0;
  uint32_t out_len = 0;        // has_out: payload bytes that go to the client
  const Lent* lent = nullptr;  // has_out: these are here, not in buf; only where ServerChannel::lends
  uint64_t out_sum = 0;        // their XXH3-64, with kDataSums (the handler computes it)
  ServerChannel* channel = nullptr;
  uint64_t batch = 0;
  uint16_t index = 0;
  uint32_t map_version = 0;  // of its frame
  void* owner = nullptr;     // the handler's
  ServerOp* next = nullptr;  // of whoever has it
  alignas(8) uint8_t priv[32];
};

// What a server does with what arrives. Called on the reactor thread.
class ChannelHandler {
 public:
  virtual ~ChannelHandler() = default;
  // Memory for an operation's payload (has_in: before it is received; has_out: the handler's own business). Sets op->buf,
  // buf_len, fixed. False: none now; the channel stops receiving and asks again in ServerChannel::resume().
  // A client that keeps its limits (max_in) is never told to wait for ever.
  virtual bool buffer(ServerOp* op) = 0;
  // A complete, well-formed operation (wire::check_desc has passed it, its payload is in op->buf and has its sum).
  // Ends in ServerChannel::reply, now or later. err != 0: check_desc's or the payload's error; reply with it.
  virtual void take(ServerOp* op, int err) = 0;
  // The client wants what has not begun of `batch` not to begin.
  virtual void cancel(ServerChannel* c, uint64_t batch) = 0;
  // The answer has left (or cannot any more): op->buf is the handler's again; the channel deletes op after this.
  virtual void released(ServerOp* op) = 0;
  // The channel is at its end; err: 0 (the client closed it) or why, -EPROTO for a hostile or broken peer. Operations that
  // were taken and not yet replied to must still be replied to.
  virtual void ended(ServerChannel* c, int err) = 0;
};

class ServerChannel {
 public:
  virtual ~ServerChannel() = default;
  virtual void start() = 0;                     // begins to receive
  virtual void reply(ServerOp* op) = 0;         // op->result, out_len, out_sum are set; leaves at flush()
  virtual void flush() = 0;                     // what was replied to since the last call goes out
  virtual void resume() = 0;                    // buffers are there again
  virtual void close(int err = 0) = 0;          // the client is told why; ended() follows
  virtual bool closed() const = 0;              // nothing refers to it any more
  virtual uint32_t ops_inflight() const = 0;    // taken and not released
  virtual bool sending() const = 0;             // answers are on their way
  virtual bool lends() const { return false; }  // sends what is in many places: ServerOp::lent
  virtual const ChannelCounters& counters() const = 0;
  void* owner = nullptr;  // the handler's
};

}  // namespace kvfs
