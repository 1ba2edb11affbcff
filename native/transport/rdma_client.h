// rdma_client.h owns the client's end of an RDMA connection to a target. Requests leave as messages that name the caller's
// memory; the server reads and writes it, and one message answers any number of requests of a batch. Memory that was
// declared to the device (RdmaMemory) is used as it is; of other memory, what is small goes through buffers of the
// connection, and the rest is registered for the one operation.
#pragma once

#include <memory>
#include <vector>

#include "op_list.h"
#include "rdma_connection.h"

namespace kvfs {

class RdmaClientChannel final : public ClientChannel, private RdmaConnection::User {
 public:
  static constexpr uint32_t kBatches = 1024;           // unanswered
  static constexpr uint32_t kBounces = 128;            // buffers for small memory that was not declared
  static constexpr uint32_t kBounceBytes = 16u << 10;  // of each
  static constexpr uint64_t kCancelNs = 500'000'000;   // that a server has to answer what was cancelled

  // The connection is fresh from rdma_connect.
  RdmaClientChannel(Uring& uring, std::unique_ptr<RdmaConnection> connection, const ChannelLimits& limits);
  ~RdmaClientChannel() override;

  void submit(NetOp* op) override;
  void flush(uint32_t map_version) override;
  // The server is told once all that is left of a batch is cancelled. What it has not answered in kCancelNs ends the
  // connection: nothing else keeps it from writing to the memory.
  void cancel(NetOp* op) override;
  void ping() override;

  int error() const override { return err_; }
  uint64_t heard_ns() const override { return heard_ns_; }
  uint64_t bytes_inflight() const override { return bytes_; }
  uint32_t ops_inflight() const override { return ops_; }
  void close() override;
  bool closed() const override { return ended_ && ops_ == 0 && connection_->quiet(); }
  const ChannelCounters& counters() const override;

 private:
  enum class State : uint8_t { Fresh, Flushed, Sent, Ended };
  struct Priv {
    RdmaRegion* region;
    uint64_t cancel_ns;  // 0: not cancelled; until when it is waited for
    int16_t bounce;      // -1: none
    State state;
    uint32_t map_version;
  };
  static_assert(sizeof(Priv) <= sizeof(NetOp::priv));
  static Priv& priv(NetOp* op) { return *reinterpret_cast<Priv*>(op->priv); }
  struct Batch {
    uint64_t id = 0;          // 0: free
    uint32_t open = 0;        // not answered
    uint32_t live = 0;        // of these, not cancelled
    bool told = false;        // a Cancel was sent or waits to be
    std::vector<NetOp*> ops;  // null: answered
  };

  void on_sent(void*, bool) override {}
  void on_received(const uint8_t* message, uint32_t len) override;
  void on_turn(uint64_t now_ns) override;
  void on_closed(int err) override;

  int make_reachable(NetOp* op);  // 0; -EAGAIN: when buffers are free again; -errno
  void send_waiting();
  bool send_batch();
  bool send_control(wire::Type type, uint64_t number);
  int take_response(const wire::FrameHeader& h, const uint8_t* body);
  void answer(NetOp* op, const wire::Result& r);
  void end(NetOp* op, int64_t result, bool answered);
  void deliver();
  void fail(int err);
  void check_cancelled(uint64_t now_ns);
  void end_waiting();

  std::unique_ptr<RdmaConnection> connection_;
  ChannelLimits limits_;
  RdmaBuffer bounces_;  // opened at first need
  std::vector<int16_t> free_bounces_;
  int err_ = 0;
  bool ended_ = false;
  bool delivering_ = false;
  NetOpList fresh_, flushed_;  // submitted; flushed, but not sent yet
  NetOp* done_head_ = nullptr;
  NetOp** done_tail_ = &done_head_;
  std::vector<Batch> batches_ = std::vector<Batch>(kBatches);
  std::vector<uint32_t> free_batches_;
  std::vector<uint64_t> cancels_;  // batches to be told of
  uint64_t batch_no_ = 0;
  uint64_t pings_ = 0, pings_sent_ = 0;
  uint64_t cancel_check_ns_ = UINT64_MAX;
  uint32_t ops_ = 0;
  uint64_t bytes_ = 0;
  uint64_t heard_ns_ = 0;
  mutable ChannelCounters counters_;
};

}  // namespace kvfs
