// rdma_connection.h owns one reliable connected queue pair: making it, the requests that are posted to it, its completions
// and its end. What the messages mean is its User's. It is made on any thread, and belongs to a reactor's from start() on.
//
// Requests to send complete in order, so only some ask for a completion: it stands for all before it. Bounds: at most depth()
// requests are posted, the completion queue has room for every request and receive there can be, and one turn handles
// kBudget completions.
#pragma once

#include <memory>
#include <vector>

#include "../store/clock.h"
#include "rdma_device.h"

namespace kvfs {

class RdmaConnection {
 public:
  static constexpr uint64_t kReceive = 1ull << 63;  // of a work request's id: a receive; the rest is its slot
  static constexpr uint32_t kDepth = 512;           // requests to send; a power of two
  static constexpr uint32_t kBudget = 128;
  static constexpr uint32_t kSignalEvery = 8;  // of requests that need no completion themselves
  static constexpr uint8_t kTimeout = 16;   // 4.096 us * 2^16 = 268 ms, and 6 retries: a dead peer is known after 2 s
  static constexpr uint8_t kRetries = 6;    // soft-RoCE takes 7 as "for ever"
  static constexpr uint8_t kRnrTimer = 12;  // 0.64 ms until a peer without receives is asked again
  static constexpr uint64_t kFlushNs = 1'000'000'000;  // for receives of a shared queue to come back

  static constexpr uint32_t kServerResults = 64;  // of one response frame

  // What it is made for.
  struct Shape {
    uint32_t frames = 0;         // to send, at once
    uint32_t frame_bytes = 0;    // of each
    uint32_t receives = 0;       // 0: the device's shared ones
    uint32_t receive_bytes = 0;  // of each
    bool reachable = false;      // the peer may read and write our registered memory
  };

  class User {
   public:
    // The request that was posted with `what` is done; ok = false: it may not have been. In order.
    virtual void on_sent(void* what, bool ok) = 0;
    virtual void on_received(const uint8_t* message, uint32_t len) = 0;  // the message is gone after this
    virtual void on_turn(uint64_t now_ns) = 0;                           // after completions, and when wake_at() said
    virtual void on_closed(int err) = 0;  // once: nothing of it is left, the device touches no memory for it any more

   protected:
    ~User() = default;
  };

  // `id` has a device and is the connection's from now on, its event channel too. Null: *err.
  static std::unique_ptr<RdmaConnection> open(RdmaDevice& device, rdma_cm_id* id, rdma_event_channel* events,
                                              const Shape& shape, int* err);
  ~RdmaConnection();
  RdmaConnection(const RdmaConnection&) = delete;
  RdmaConnection& operator=(const RdmaConnection&) = delete;

  // Steps of connecting (rdma_connect.cpp); 0 or -errno.
  int to_ready(uint8_t reads_from_peer, uint8_t reads_by_peer);
  void connected() { connected_ = true; }
  rdma_cm_id* id() const { return id_; }
  rdma_event_channel* events() const { return events_; }

  int start(Uring& uring, User& user);
  // Ends it with the next turn: err 0, or why. The first reason counts.
  void fail(int err);
  bool failing() const { return failing_; }
  bool quiet() const { return !calling_; }  // the Uring holds nothing of it
  void wake_at(uint64_t ns);                // on_turn() by then; the earliest counts
  void last_receive();                      // the queue pair takes nothing from the shared receives any more

  // Posting: claims of frames and requests are gathered, post() rings the doorbell once.
  bool room(uint32_t requests) const { return depth_ - uint32_t(tail_ - head_) >= requests; }
  uint32_t depth() const { return depth_; }
  uint32_t free_frames() const { return uint32_t(free_frames_.size()); }
  uint32_t claim() {
    const uint32_t f = free_frames_.back();
    free_frames_.pop_back();
    return f;
  }
  uint8_t* frame(uint32_t f) { return sends_.base() + size_t{f} * shape_.frame_bytes; }
  void send(uint32_t frame, uint32_t len, void* what, bool signal);
  void read(void* to, uint32_t lkey, uint32_t len, uint64_t from, uint32_t rkey, void* what, bool signal);
  void write(const void* from, uint32_t lkey, uint32_t len, uint64_t to, uint32_t rkey, void* what, bool signal);
  // Nothing, written to nowhere: the peer's device answers, or `what` is not done and the connection ends.
  void probe(void* what);
  void post(bool signal = false);  // signal: the last of them asks for a completion

  RdmaDevice& device() { return device_; }
  ibv_qp* qp() const { return qp_; }
  ibv_cq* cq() const { return cq_; }
  uint8_t port() const { return port_; }
  uint32_t max_reads() const { return max_reads_; }  // that we may have under way
  uint64_t doorbells() const { return doorbells_; }

 private:
  struct Sent {
    void* what;
    int32_t frame;  // -1: none
  };

  RdmaConnection(RdmaDevice& device, rdma_cm_id* id, rdma_event_channel* events, const Shape& shape);
  int init();
  int make_queue_pair();
  uint8_t* receive_at(uint32_t slot) { return receives_.base() + size_t{slot} * shape_.receive_bytes; }
  void add(ibv_send_wr* wr, void* what, int32_t frame, bool signal);
  static void on_called(NetIo* io);
  void on_completions();
  void on_cm_events();
  void turn();
  unsigned take_completions(unsigned budget);
  void completed(const ibv_wc& wc);
  void give_receives_back();
  void take_sent(uint64_t last, bool ok);
  void step_to_end(uint64_t now);
  void dismantle();

  RdmaDevice& device_;
  const VerbsTable& verbs_;
  rdma_cm_id* id_;
  rdma_event_channel* events_;
  Shape shape_;
  uint8_t port_ = 1;
  bool connected_ = false;
  ibv_comp_channel* channel_ = nullptr;
  ibv_cq* cq_ = nullptr;
  ibv_qp* qp_ = nullptr;
  uint32_t inline_bytes_ = 0;
  uint32_t max_reads_ = 0;
  RdmaBuffer sends_, receives_;
  std::vector<uint32_t> free_frames_;
  std::vector<uint32_t> repost_;  // receives to be posted again

  uint32_t depth_ = 0;
  std::vector<Sent> sent_;        // ring of depth_: requests head_..tail_
  uint64_t head_ = 0, tail_ = 0;  // numbers of requests; their ids
  uint32_t unsignalled_ = 0;
  std::vector<ibv_send_wr> chain_;  // gathered
  std::vector<ibv_sge> chain_sges_;
  uint32_t chain_len_ = 0;
  uint64_t doorbells_ = 0;

  Uring* uring_ = nullptr;
  User* user_ = nullptr;
  int timer_ = -1;
  int polls_[3] = {-1, -1, -1};
  uint64_t wake_ = UINT64_MAX;
  NetIo nop_;  // in place of the timer, where there is no poll left for that
  bool calling_ = false;
  bool failing_ = false, flushing_ = false, last_receive_ = false, gone_ = false;
  int err_ = 0;
  uint64_t flush_deadline_ = 0;
};

}  // namespace kvfs
