// shm_client.h owns the client's end of a connection through shared memory. Data goes through the arena, of which this side
// gives each operation a piece: the server never sees the caller's memory. A server that has been stopped for a while and
// goes on can so not write to memory that somebody else has got since: nothing takes a shared mapping back from it.
//
// Bounds: kBatches batches that are not answered, and what waits for a slot or a piece of the arena are the owner's
// operations in lists.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "op_list.h"
#include "shm_stream.h"

namespace kvfs {

// First fit in whole pages, so that few are touched again and again.
class ShmArena {
 public:
  static constexpr uint64_t kNone = UINT64_MAX;
  explicit ShmArena(uint64_t bytes) { free_[0] = bytes; }
  uint64_t take(uint32_t len);  // kNone: no room now
  void give(uint64_t at, uint32_t len);

 private:
  std::map<uint64_t, uint64_t> free_;  // where, how much
};

class ShmClientChannel final : public ClientChannel, private ShmStream {
 public:
  static constexpr uint32_t kBatches = 1024;  // unanswered

  ShmClientChannel(Uring& uring, std::unique_ptr<ShmLink> link, const ChannelLimits& limits);
  ~ShmClientChannel() override;

  void submit(NetOp* op) override;
  void flush(uint32_t map_version) override;
  // The server is told once all that is left of a batch is cancelled.
  void cancel(NetOp* op) override;
  void ping() override;

  int error() const override { return failing(); }
  uint64_t heard_ns() const override { return heard_ns_; }
  // Both count an operation that was cancelled until the server has answered it.
  uint64_t bytes_inflight() const override { return bytes_; }
  uint32_t ops_inflight() const override { return ops_; }
  void close() override { fail(-ESHUTDOWN); }
  bool closed() const override { return quiet() && done_head_ == nullptr && fresh_.head == nullptr; }
  const ChannelCounters& counters() const override { return counters_; }

 private:
  enum class State : uint8_t { Fresh, Flushed, Sent, Ended };
  struct Priv {
    uint32_t map_version;
    State state;
  };
  static_assert(sizeof(Priv) <= sizeof(NetOp::priv));
  static Priv& priv(NetOp* op) { return *reinterpret_cast<Priv*>(op->priv); }
  struct Slot {
    NetOp* op;  // null: cancelled
    uint64_t at;
    uint32_t len;
    uint8_t opcode;
    bool open;  // not answered
  };
  struct Batch {
    uint64_t id = 0;  // 0: free
    uint32_t open = 0, live = 0;
    bool told = false;  // of the cancel
    std::vector<Slot> slots;
  };

  int on_frame(const wire::FrameHeader& h, const uint8_t* body) override;
  void on_turn() override;
  void on_ended(int err) override;

  void send_waiting();
  bool send_batch();
  bool place(NetOp* op, Slot* s);
  int take_response(const wire::FrameHeader& h, const uint8_t* body);
  int take_result(Batch* b, const wire::Result& r);
  Batch* find(uint64_t id);
  void tell(Batch* b);
  void settle(uint8_t opcode, uint32_t len);
  void end(NetOp* op, int64_t result, bool answered);
  void end_waiting();
  void deliver();

  ChannelLimits limits_;
  ShmArena free_;
  NetOpList fresh_, flushed_;
  std::vector<Batch> batches_ = std::vector<Batch>(kBatches);
  std::vector<uint32_t> free_batches_;
  std::vector<uint64_t> cancels_;  // batches to be told of
  NetOp* done_head_ = nullptr;
  NetOp** done_tail_ = &done_head_;
  bool delivering_ = false;
  uint64_t batch_no_ = 0;
  uint64_t pings_ = 0, pings_sent_ = 0, ponged_ = 0;
  uint32_t ops_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace kvfs
