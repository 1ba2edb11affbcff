// shm_server.h owns the server's end of a connection through shared memory: payload is copied out of the arena before it is
// looked at, and answers are copied into it, from where the store keeps them where it can.
//
// Bounds: operations and payload bytes of a connection as its session allows; whatever finds no room waits in lists of
// operations.
#pragma once

#include <memory>

#include "op_list.h"
#include "shm_stream.h"

namespace kvfs {

struct ShmServerLimits {  // of the session
  uint32_t max_ops = 1024;
  uint32_t max_batch = 64;
  uint64_t max_in = 2ull * kMaxChunk;
  uint64_t features = wire::kFeatures;
};

class ShmServerChannel final : public ServerChannel, private ShmStream {
 public:
  static constexpr uint32_t kFrameBytes = 256u << 10;  // payload after which answers leave, though more are made

  ShmServerChannel(Uring& uring, std::unique_ptr<ShmLink> link, ChannelHandler& handler, const ShmServerLimits& limits);
  ~ShmServerChannel() override;

  void start() override { ShmStream::start(); }
  void reply(ServerOp* op) override;
  void flush() override;
  void resume() override;
  void close(int err = 0) override { fail(err != 0 ? err : -ESHUTDOWN); }
  bool closed() const override { return quiet() && ops_ == 0; }
  uint32_t ops_inflight() const override { return ops_; }
  bool sending() const override { return replies_.head != nullptr || sent_.head != nullptr; }
  bool lends() const override { return true; }
  const ChannelCounters& counters() const override { return counters_; }

 private:
  struct Priv {
    bool taken;
    bool answered;  // its result is in the ring: the client may ask for more
  };
  static_assert(sizeof(Priv) <= sizeof(ServerOp::priv));
  static Priv& priv(ServerOp* op) { return *reinterpret_cast<Priv*>(op->priv); }

  int on_frame(const wire::FrameHeader& h, const uint8_t* body) override;
  void on_turn() override;
  void on_ended(int err) override;

  int take_request(const wire::FrameHeader& h, const uint8_t* body);
  bool reaches(const wire::Desc& d) const;
  void cancel_batch(uint64_t batch);
  void receive_waiting();
  void give(ServerOp* op, int err);
  void send_replies();
  void publish();
  void copy_out(const ServerOp* op);
  void settle(ServerOp* op);
  void drop(ServerOp* op);
  void drop_all(ServerOpList* l);

  ChannelHandler& handler_;
  const ShmServerLimits limits_;
  ServerOpList waiting_;         // with payload, without a buffer
  ServerOpList replies_, sent_;  // sent_: until the handler is told, by flush()
  uint64_t ready_ = 0;           // bytes of payload of replies_
  uint32_t ops_ = 0;             // exist
  uint32_t unanswered_ = 0;      // of these
  uint64_t in_bytes_ = 0;        // payload towards us of those
  bool starved_ = false;         // the handler has no buffer for waiting_.head
  bool pong_ = false;
  uint64_t pong_no_ = 0;
};

}  // namespace kvfs
