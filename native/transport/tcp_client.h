// tcp_client.h owns the client's end of a TCP connection to a target: requests leave as frames, what a Get reads is received
// straight into its memory. One sendmsg and one receive are under way at most. Bounds: frames are made when they can be sent,
// so what waits are the owner's operations in lists; a batch that the server has not answered keeps 16 bytes per operation,
// also of those that were cancelled, and a Cancel leaves once per batch.
#pragma once

#include <memory>
#include <vector>

#include "op_list.h"
#include "tcp_stream.h"

namespace kvfs {

class TcpClientChannel final : public ClientChannel, private TcpStream {
 public:
  // fd: connected, after the handshake; the channel's from now on.
  TcpClientChannel(Uring& uring, int fd, const ChannelLimits& limits);
  ~TcpClientChannel() override;

  void submit(NetOp* op) override;
  void flush(uint32_t map_version) override;
  // The server is told once all that is left of a batch is cancelled: a Cancel concerns a batch as a whole.
  void cancel(NetOp* op) override;
  void ping() override;

  int error() const override;
  uint64_t heard_ns() const override { return heard_ns_; }
  // Both count an operation that was cancelled until the server has answered it: until then it counts against the limits.
  uint64_t bytes_inflight() const override { return bytes_; }
  uint32_t ops_inflight() const override { return ops_; }
  void close() override;
  bool closed() const override { return ended() && quiet(); }
  const ChannelCounters& counters() const override { return counters_; }

 private:
  enum class State : uint8_t {
    New,             // submitted
    Flushed,         // waits for the next send
    Sending,         // has payload in the send that is under way
    Sent,            // waits for the answer
    Receiving,       // its answer's payload is coming
    LeavingSend,     // answered or cancelled, but still in the send
    LeavingReceive,  // cancelled, but the receive must end first
    Done
  };
  struct Priv {
    uint64_t sum;  // of the answer's payload
    uint32_t map_version;
    State state;
    bool unreadable;  // zeros have left in the place of some of it
  };
  static_assert(sizeof(Priv) <= sizeof(NetOp::priv));
  static Priv& priv(NetOp* op) { return *reinterpret_cast<Priv*>(op->priv); }
  struct Slot {  // one operation of a batch
    NetOp* op;   // null: cancelled or answered
    uint32_t len;
    uint8_t opcode;
    bool open;  // not answered
  };
  struct Batch {
    uint64_t id = 0;    // 0: none
    uint32_t open = 0;  // not answered
    uint32_t live = 0;  // of these, not cancelled
    bool told = false;  // a Cancel was queued
    std::vector<Slot> slots;
  };

  void on_received() override;
  void on_end() override { break_up(-ECONNRESET); }
  void on_piece(const Piece& p) override;
  void on_unwritable(const Piece& p) override;
  void on_unreadable(const uint8_t* p) override;
  void on_sent() override;
  void on_send_halted() override;
  void on_call() override { deliver(); }
  void on_broken() override;

  void send_more();
  void add_header(wire::Type type, uint64_t number);
  void add_frame();
  Batch* find(uint64_t id);
  Batch* new_batch(uint32_t* at);
  void receive_more();
  void drop_cancelled_pieces();
  int take_response(const wire::FrameHeader& h, const uint8_t* body);
  int take_frame(const wire::FrameHeader& h, const uint8_t* body);
  void tell(Batch* b);
  void settle(uint8_t opcode, uint32_t len);
  static void give_up(NetOp* op);
  void end(NetOp* op);
  void finish(NetOp* op);
  void fail(NetOp* op);
  void deliver();

  ChannelLimits limits_;
  uint64_t bytes_ = 0;
  uint32_t ops_ = 0;
  NetOpList new_, flushed_;
  NetOp* done_head_ = nullptr;
  NetOp** done_tail_ = &done_head_;
  std::vector<NetOp*> sending_;  // has_in operations of the send that is under way
  std::vector<std::unique_ptr<Batch>> batches_;
  std::vector<uint32_t> free_batches_;
  uint64_t batch_no_ = 0;
  std::vector<uint64_t> cancels_;  // batches to be told of
  bool ping_ = false;
  uint64_t pinged_ = 0, ponged_ = 0;
  bool in_pieces_ = false;  // a response's payload is coming
  bool halted_ = false;     // the receive, for a cancelled operation
};

}  // namespace kvfs
