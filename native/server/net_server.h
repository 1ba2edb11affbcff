// net_server.h owns a target's network side on its reactor thread: sessions and their connections, and the execution of
// what arrives on them on the store. Connections are admitted for the listener thread (net_listener.h) by Reactor::post.
//
// Bounds: max_sessions sessions of at most wire::kMaxConnections connections, kMaxTargetConnections together; per connection
// max_ops operations and max_in bytes of payload from it unanswered, per session kHeldFactor * max_ops operations (a client
// asks again on another connection before the server knows that the first is dead), max_in bytes of incoming buffers (what
// is more waits) and a quarter of the outgoing ones (at least one buffer); kMaxStoreOps requests in the store, kMaxJobs scans and purges under way,
// each with at most kJobWidth deletes. What exceeds a bound that the client was told of ends its connection.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "../ffi/kvfs_net.h"
#include "net_session.h"
#include "source.h"

namespace kvfs {

constexpr uint32_t kMaxTargetConnections = 4096;
constexpr uint32_t kHeldFactor = 4;
constexpr uint32_t kMaxStoreOps = 4096;
constexpr uint32_t kMaxJobs = 8;           // scans and purges under way
constexpr uint32_t kMaxSessionJobs = 4;    // of one session
constexpr uint32_t kPurgeWidth = 64;       // deletes of one purge under way
constexpr uint32_t kJobBudget = 4096;      // index entries that all jobs together look at in one turn
constexpr uint32_t kTurnOps = 256;         // operations begun in one turn
constexpr uint32_t kTurnStoreOps = 16;     // of those that wait for a device, which begins with them when the turn ends
constexpr uint32_t kQuantum = 1u << 20;    // bytes of a session's turn
constexpr uint32_t kOpCost = 4096;         // bytes that an operation counts for besides its payload
constexpr uint64_t kStopNs = 5000000000u;  // until connections are ended at the end, whatever they do

struct NetServerOptions {
  uint64_t buffer_bytes = 256u << 20;
  uint32_t max_sessions = 256;
  uint32_t keep_ms = 30000;
  uint32_t stall_ms = 30000;  // a connection on which nothing moves that should is ended after this
  uint32_t max_ops = 1024;
  uint32_t max_batch = 64;
  uint64_t features = wire::kFeatures;
  std::array<uint8_t, 16> boot{};
};

class NetServer final : public Source, public ChannelHandler {
 public:
  NetServer(Uring* uring, Store* store, const NetServerOptions& opt);
  ~NetServer() override;  // idle
  Status init();

  // A client's Hello, Session or Attach, already checked; the capability as the listener has verified it (Session). Fills
  // the reply but for what seal() sets. The connection's channel follows with connect(), or abandon(). Null: reply->err.
  NetConn* admit(const wire::Hello& hello, const wire::Capability* capability, wire::HelloReply* reply);
  void connect(NetConn* c, std::unique_ptr<ServerChannel> channel);
  void abandon(NetConn* c);

  // Clients that chose by an older map are told so. cache: namespaces whose puts are evictable, ascending.
  void set_map(uint32_t version, std::vector<uint32_t> cache);
  // Admits nobody any more and ends all connections, at once where nothing is under way, after kStopNs everywhere. `done`
  // runs when nothing is left: the server is idle then.
  void stop(std::function<void()> done);
  void add_stats(kvfs_net_stats* out) const;
  uint64_t max_in() const { return max_in_; }
  NetBuffers& buffers() { return buffers_; }
  Uring* uring() { return uring_; }

  // Source
  void pump() override;
  void publish() override;
  bool ready() const override;
  bool idle() const override { return sessions_.empty(); }
  uint64_t deadline_ns() const override;

  // ChannelHandler
  bool buffer(ServerOp* op) override;
  void take(ServerOp* op, int err) override;
  void cancel(ServerChannel* c, uint64_t batch) override;
  void released(ServerOp* op) override;
  void ended(ServerChannel* c, int err) override;

 private:
  enum class Serve { Done, More, Parked, NoBuffer, NoSlot };
  struct Child {  // a delete of a purge
    Request req;
    NetTask* purge = nullptr;
    Child* next = nullptr;
  };

  // net_server.cpp: sessions, connections, buffers
  NetSession* open_session(const wire::Hello& hello, const wire::Capability& capability, int* err);
  void supersede(const wire::Hello& hello, const wire::Capability& capability);
  void end_session(NetSession* s);
  void doom(NetConn* c, int err);
  void close_doomed();
  void sweep();
  void look_at_clocks();
  void unlist(NetSession* s);
  void end_waiting(NetConn* c);
  void give_waiting_buffers();
  NetTask* new_task(ServerOp* op, NetConn* c);
  void free_task(NetTask* t);
  void out_freed(NetSession* s);
  void uncount(NetTask* t);

  // net_exec.cpp: what becomes of an operation
  int permit(const NetTask* t) const;
  void enqueue(NetTask* t);
  void schedule();
  Serve serve(NetSession* s, bool alone, bool no_buffer, uint32_t* budget);
  Serve start(NetTask* t, bool no_buffer);
  Serve out_buffer(NetTask* t, uint32_t len, bool no_buffer);
  int64_t lend(NetTask* t);
  bool has_share(const NetSession& s, uint32_t len) const {
    return s.out_bytes == 0 || s.out_bytes + NetBuffers::size_for(len) <= out_share_;
  }
  void submit(NetTask* t, Request::Op op, uint32_t off, uint32_t len);
  void finish(NetTask* t, int64_t result);
  void answer(NetTask* t, int64_t result);
  void refuse(NetTask* t, int err);  // has not been executed, and may come again
  void run_cancels();
  void drop(NetConn* c, TaskList* from);
  static void store_done(Request* r);

  // net_jobs.cpp: scans and purges
  void start_jobs();
  void step_jobs();
  void give_up_job(NetTask* t);
  void step_scan(NetTask* t, uint32_t budget);
  void step_purge(NetTask* t, uint32_t budget);
  void delete_chunk(NetTask* t, const ChunkKey& key);
  static void child_done(Request* r);

  Uring* uring_;
  Store* store_;
  const NetServerOptions opt_;
  NetBuffers buffers_;
  uint64_t max_in_ = 0, out_share_ = 0;
  uint32_t map_version_ = 0;
  std::vector<uint32_t> cache_;
  std::map<std::array<uint8_t, 16>, std::unique_ptr<NetSession>> sessions_;
  std::vector<std::unique_ptr<NetConn>> conns_;
  std::vector<NetConn*> dirty_;
  std::vector<NetConn*> cancelling_;
  std::deque<NetSession*> in_wait_;   // sessions with connections that wait for a buffer; each once
  uint64_t asked_ns_ = 0;             // when the first of them was told; 0: not yet, or it has asked
  std::vector<NetSession*> ring_;     // sessions with operations that may begin
  bool more_ = false;                 // schedule() stopped without waiting for anything
  std::deque<NetSession*> job_wait_;  // sessions with jobs that wait; each once
  std::vector<NetTask*> jobs_;        // under way
  bool jobs_ready_ = false;           // a step of one waits for nothing
  bool in_freed_ = false, sweep_ = false, doomed_ = false;
  uint32_t store_ops_ = 0;
  uint64_t now_ns_ = 0;  // of this turn
  uint64_t next_clock_ns_ = 0;
  uint64_t wall_s_ = 0;
  uint64_t stop_at_ns_ = 0;  // 0: nobody wants it to stop
  std::function<void()> stopped_;
  std::vector<std::unique_ptr<NetTask[]>> slabs_;
  NetTask* free_tasks_ = nullptr;
  std::unique_ptr<Child[]> children_;
  Child* free_children_ = nullptr;
  ChannelCounters past_;  // of connections that are gone
  kvfs_net_stats stats_{};
};

}  // namespace kvfs
