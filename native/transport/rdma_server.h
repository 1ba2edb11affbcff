// rdma_server.h owns the server's end of an RDMA connection: requests arrive as messages, payload is read from and written
// to the client's memory, and one message answers what is ready of a batch, behind the writes that it speaks of.
//
// Bounds: operations and payload bytes of a connection as its session allows, RdmaConnection::max_reads() reads under way,
// and whatever can't be posted at once waits in lists of operations.
#pragma once

#include <memory>
#include <vector>

#include "op_list.h"
#include "rdma_connection.h"

namespace kvfs {

struct RdmaServerOptions {  // of the session
  uint32_t max_ops = 256;
  uint32_t max_batch = 64;
  uint64_t max_in = 64u << 20;
  uint64_t features = wire::kFeatures;
};

class RdmaServerChannel final : public ServerChannel, private RdmaConnection::User {
 public:
  static constexpr uint32_t kFrameBytes = 256u << 10;  // payload after which an answer leaves, though more is ready
  static constexpr uint64_t kByeNs = 200'000'000;      // for the last answers to leave
  // Of silence until the client's device is asked for a sign: who is gone without a word would keep its session for ever.
  static constexpr uint64_t kProbeNs = 10'000'000'000;

  // The connection is fresh from RdmaIncoming::accept. What ChannelHandler::buffer gives, and what is replied from, lies in
  // ranges that are declared to the connection's device.
  RdmaServerChannel(Uring& uring, std::unique_ptr<RdmaConnection> connection, const RdmaServerOptions& options,
                    ChannelHandler& handler);
  ~RdmaServerChannel() override;

  void start() override;
  void reply(ServerOp* op) override;
  void flush() override;
  void resume() override;
  void close(int err = 0) override { finish(err); }
  bool closed() const override { return ended_ && ops_ == 0 && connection_->quiet(); }
  uint32_t ops_inflight() const override { return ops_; }
  bool sending() const override { return replies_.head != nullptr || frames_out_ != 0; }
  const ChannelCounters& counters() const override;

 private:
  struct Priv {
    RdmaRegion* region;
    bool taken;
    bool answered;  // its result is in a frame: the client may ask for more as soon as that arrives
  };
  static_assert(sizeof(Priv) <= sizeof(ServerOp::priv));
  static Priv& priv(ServerOp* op) { return *reinterpret_cast<Priv*>(op->priv); }
  // A request that was posted; what on_sent() is told of.
  struct Sent {
    enum class Kind : uint8_t { Read, Frame, Control, Probe } kind = Kind::Control;
    ServerOp* op = nullptr;  // Read
    ServerOpList ops;        // Frame: those that it answers
    Sent* next = nullptr;    // free list
  };
  struct Open {  // a response frame that is being filled
    uint64_t batch = 0;
    uint32_t frame = 0, count = 0;
    uint64_t bytes = 0;
    Sent* sent = nullptr;
  };
  static constexpr uint32_t kOpen = 8;

  void on_sent(void* what, bool ok) override;
  void on_received(const uint8_t* message, uint32_t len) override;
  void on_turn(uint64_t now_ns) override;
  void on_closed(int err) override;

  int take_request(const wire::FrameHeader& h, const uint8_t* body);
  void cancel_batch(uint64_t batch);
  void start_reads();
  void read_done(ServerOp* op, bool ok);
  void give(ServerOp* op, int err);
  void send_replies();
  Open* open_for(uint64_t batch);
  void close_frame(Open* o);
  bool control(wire::Type type, uint64_t number);
  void settle(ServerOp* op);
  void drop(ServerOp* op);
  void probe_silent(uint64_t now);
  void finish(int err);
  void drop_replies();
  Sent* new_sent(Sent::Kind kind);

  Uring& uring_;
  std::unique_ptr<RdmaConnection> connection_;
  RdmaServerOptions options_;
  ChannelHandler& handler_;
  bool started_ = false;
  ServerOpList waiting_;  // has_in, without a buffer or a read
  ServerOpList replies_;
  uint32_t ops_ = 0;         // exist
  uint32_t unanswered_ = 0;  // of these
  uint64_t in_bytes_ = 0;    // payload towards us of those unanswered
  uint32_t reads_ = 0;       // under way
  uint32_t frames_out_ = 0;
  bool starved_ = false;  // the handler has no buffer for waiting_.head
  std::vector<Open> open_;
  Sent* free_sent_ = nullptr;
  uint64_t pong_ = 0;
  uint64_t heard_ns_ = 0;  // when the client, or its device, last gave a sign
  bool heard_ = false;     // since that was set
  bool probing_ = false;
  bool pong_waits_ = false;
  bool finishing_ = false, bye_sent_ = false, ended_ = false;
  int finish_err_ = 0;
  uint64_t finish_ns_ = 0;
  mutable ChannelCounters counters_;
};

}  // namespace kvfs
