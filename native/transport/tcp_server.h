// tcp_server.h owns the server's end of a TCP connection: request frames are checked and become ServerOps, payload is received
// straight into the handler's buffers, and the answers of a turn leave together. One sendmsg and one receive are under way at
// most. Bounds: ServerOps as the limits say, and those of the send under way (answered, for the client, when it begins); a
// client that does not read is not listened to any more when kMaxUnsent bytes of answers wait for it; of pings that came while
// a send was under way the last is answered.
#pragma once

#include <vector>

#include "tcp_stream.h"

namespace kvfs {

struct TcpServerLimits {
  uint32_t max_ops = 1024;               // descriptors that the connection may have unanswered
  uint32_t max_batch = wire::kMaxBatch;  // of one frame
  uint64_t max_in = 2ull * kMaxChunk;    // bytes of payload towards the server of unanswered descriptors
  uint64_t features = wire::kFeatures;   // as agreed on
};

class TcpServerChannel final : public ServerChannel, private TcpStream {
 public:
  static constexpr uint64_t kMaxUnsent = 64ull << 20;
  static constexpr uint32_t kSpareOps = 512;  // ServerOps kept for reuse

  // fd: connected, after the handshake; the channel's from now on.
  TcpServerChannel(Uring& uring, int fd, ChannelHandler& handler, const TcpServerLimits& limits);
  ~TcpServerChannel() override;

  void start() override;
  void reply(ServerOp* op) override;
  void flush() override;
  void resume() override;
  void close(int err = 0) override;
  bool closed() const override { return ended() && quiet() && ops_ == 0; }
  uint32_t ops_inflight() const override { return ops_; }
  bool sending() const override { return TcpStream::sending() || ready_.head != nullptr || replied_.head != nullptr; }
  bool lends() const override { return true; }
  const ChannelCounters& counters() const override { return counters_; }

 private:
  struct List {
    ServerOp* head = nullptr;
    ServerOp** tail = &head;
    void push(ServerOp* op);
    ServerOp* pop();
    void append(List* other);
  };
  // A frame's operation before it is taken.
  struct Coming {
    ServerOp* op;
    int err;
    bool placed;  // its payload has somewhere to go
  };

  void on_received() override { receive_more(); }
  void on_end() override;
  void on_piece(const Piece& p) override;
  void on_sent() override;
  void on_send_halted() override {}
  void on_call() override;
  void on_broken() override;

  void receive_more();
  void place_payload();
  int take_request(const wire::FrameHeader& h, const uint8_t* body);
  int take_frame(const wire::FrameHeader& h, const uint8_t* body);
  void take(ServerOp* op, int err);
  ServerOp* new_op();
  void release(ServerOp* op);
  void release_all(List* l);
  static uint32_t parts_of(const ServerOp* op);
  void send_more();
  void add_pong();
  void add_frame();

  ChannelHandler& handler_;
  const TcpServerLimits limits_;
  uint32_t ops_ = 0;         // taken, not released
  uint32_t unanswered_ = 0;  // descriptors
  uint64_t in_ = 0;          // their payload
  uint64_t unsent_ = 0;      // bytes of answers

  std::vector<Coming> coming_;  // with payload, of the frame that is being received
  size_t next_ = 0;             // the first without a place
  bool in_payload_ = false;
  bool starved_ = false;  // no buffer: until resume()
  bool stalled_ = false;  // too much unsent: until it was sent
  bool resumed_ = false;

  List replied_, ready_, sending_;  // before flush(), after it, in the send
  ServerOp* spare_ = nullptr;
  uint32_t spares_ = 0;
  bool pong_ = false;
  uint64_t pong_no_ = 0;
};

}  // namespace kvfs
