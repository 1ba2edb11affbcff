// remote_sim.h owns a simulated network of chunk servers for the remote store's tests: deterministic, with a clock of its
// own. Servers are models that execute operations on maps in memory; connections deliver late, break, go silent, damage
// payloads; servers hang, restart and forget what was not durable. Whatever a client may not do is counted.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <queue>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../remote/remote_store.h"
#include "store_fixture.h"

namespace kvfs {

constexpr uint64_t kMs = 1'000'000, kSecond = 1'000'000'000;

// The bytes of a map, as servers send them.
Bytes map_bytes(const wire::ClusterMap& m);
// `targets` targets with ids 1.., `rails` tcp endpoints each; their ports are 1000 * id + rail.
wire::ClusterMap sim_map(uint32_t targets, uint32_t rails, uint32_t version = 1);

class SimNetwork;
class SimChannel;

struct SimSession {
  uint64_t id = 0;
  bool over = false;                    // its client has a newer one
  std::map<uint64_t, int64_t> answers;  // by seq
  uint64_t top = 0;                     // highest seq
  uint32_t unanswered = 0;
  uint64_t in = 0;
};

struct SimServer {
  uint32_t id = 0;
  bool up = true, hung = false;
  uint64_t boot = 1;
  uint32_t map_version = 1;
  uint32_t max_ops = 64, max_batch = 16;
  uint64_t max_in = 16u << 20;
  int refuse = 0;                 // -errno for whoever says hello
  std::set<uint16_t> cut;         // ports behind which nothing passes any more
  std::set<uint16_t> memoryless;  // ports whose connections can't get at the memory of operations
  std::set<const void*> missing;  // memory that no connection can get at
  std::map<uint64_t, std::shared_ptr<SimSession>> sessions;
  std::map<std::string, Bytes> mem, disk;  // chunks: now, and after a restart
  std::map<uint64_t, int> executed;        // writes by their first eight bytes, of this boot
  uint64_t ops = 0;
  uint64_t room = 1u << 30;
  std::vector<std::function<void()>> stalled;
  int64_t execute(const wire::Desc& d, void* in_out);
};

struct SimFaults {                         // probabilities per operation
  double drop_before = 0, drop_after = 0;  // the connection breaks before or after it is executed
  double damage = 0;                       // of the answer's payload
  double damage_in = 0;                    // of a put's: the server says so and does nothing
  uint64_t latency_max_ns = 2 * kMs;
};

class SimNetwork final : public Network {
 public:
  SimNetwork(uint32_t servers, uint64_t seed);
  std::vector<Route> routes(const wire::MapEndpoint&) override { return {Route{}}; }
  void dial(std::unique_ptr<Dial> d) override;
  std::unique_ptr<Dial> taken() override;
  std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) override;
  void memory(void*, size_t, bool) override {}
  void wait(uint64_t timeout_ns) override;
  uint64_t now_ns() override { return now; }

  void at(uint64_t delay_ns, std::function<void()> f) { events_.push({now + delay_ns, ++order_, std::move(f)}); }
  uint64_t random(uint64_t n) { return rng() % n; }
  bool chance(double p) { return double(rng() % 1'000'000) < p * 1e6; }
  uint64_t latency() { return 10'000 + random(faults.latency_max_ns); }
  void break_connections(SimServer* s, int err);
  void stop(SimServer* s);     // its process ends
  void restart(SimServer* s);  // and another begins
  void hang(SimServer* s) { s->hung = true; }
  void go_on(SimServer* s);
  bool passes(const SimServer& s, uint16_t port) const { return !s.cut.contains(port); }

  std::vector<std::unique_ptr<SimServer>> servers;
  std::vector<SimChannel*> channels;
  wire::ClusterMap map;  // what servers have
  SimFaults faults;
  std::mt19937_64 rng;
  uint64_t now = kSecond;
  uint64_t gets_inflight = 0, gets_max = 0;  // bytes
  uint64_t violations = 0;                   // of limits
  uint64_t dials = 0, maps_sent = 0, frames = 0, largest_frame = 0;
  bool maps_blocked = false;

 private:
  struct Event {
    uint64_t at, order;
    std::function<void()> f;
    bool operator<(const Event& o) const { return at != o.at ? at > o.at : order > o.order; }
  };
  std::priority_queue<Event> events_;
  uint64_t order_ = 0;
  std::deque<std::unique_ptr<Dial>> dialed_;
};

class SimChannel final : public ClientChannel {
 public:
  SimChannel(SimNetwork* net, SimServer* s, std::shared_ptr<SimSession> session, uint16_t port, uint32_t max_batch);
  ~SimChannel() override;
  void submit(NetOp* op) override;
  void flush(uint32_t map_version) override;
  void cancel(NetOp* op) override;
  void ping() override;
  int error() const override { return error_; }
  uint64_t heard_ns() const override { return heard_; }
  uint64_t bytes_inflight() const override { return bytes_; }
  uint32_t ops_inflight() const override { return ops_; }
  void close() override { fail(-ESHUTDOWN); }
  bool closed() const override { return error_ != 0 && live_.empty() && ending_ == 0; }
  const ChannelCounters& counters() const override { return counters_; }
  void fail(int err);

  SimServer* server;
  uint16_t port;

 private:
  struct Flight {
    NetOp* op = nullptr;  // null: given back
    wire::Desc desc{};
    Bytes in;
    uint32_t map_version = 0;
  };
  void arrive(uint64_t no);
  void answer(uint64_t no, int64_t result, Bytes out, bool damaged);
  void settle(uint64_t no);
  void give_back(NetOp* op, int64_t result, bool answered, bool cancelled);
  static void call(const std::shared_ptr<SimChannel*>& self, const std::function<void(SimChannel*)>& f) {
    if (*self != nullptr) f(*self);
  }

  SimNetwork* net_;
  std::shared_ptr<SimSession> session_;
  uint32_t max_batch_;
  std::shared_ptr<SimChannel*> self_;
  int error_ = 0;
  uint64_t heard_;
  uint64_t bytes_ = 0;
  uint32_t ops_ = 0, ending_ = 0;
  std::vector<NetOp*> submitted_;
  std::map<uint64_t, Flight> flights_;
  std::set<NetOp*> live_;  // the owner's, not given back
  uint64_t next_ = 0;
  ChannelCounters counters_;
};

// A remote store on such a network, and whoever drives it.
struct RemoteHarness {
  explicit RemoteHarness(uint32_t targets, uint32_t rails = 1, uint64_t seed = 1,
                         const std::function<void(RemoteOptions*)>& change = {});
  ~RemoteHarness();
  void turn();
  // Until `ended`, for `limit_ns` of the network's time at most; false: it has not.
  bool until(const std::function<bool()>& ended, uint64_t limit_ns = 120 * kSecond);
  void pass(uint64_t ns);
  int64_t run(Request::Op op, const ChunkKey& key, void* mem = nullptr, uint32_t off = 0, uint32_t len = 0,
              uint8_t flags = 0);
  int64_t put(const ChunkKey& k, const Bytes& v, uint8_t flags = 0) {
    return run(Request::Op::Put, k, const_cast<uint8_t*>(v.data()), 0, uint32_t(v.size()), flags);
  }
  int64_t write(const ChunkKey& k, uint32_t off, const Bytes& v, uint8_t flags = 0) {
    return run(Request::Op::Write, k, const_cast<uint8_t*>(v.data()), off, uint32_t(v.size()), flags);
  }
  SimServer& server(size_t i) { return *net->servers[i]; }
  SimServer& server_of(const ChunkKey& key);  // which has it by the store's map
  Rail& rail(size_t target, size_t number) { return *store->peers()[target]->rails()[number]; }
  // A block's key that this target has; another for each salt.
  ChunkKey key_on(uint32_t target, uint64_t salt = 0) const;

  SimNetwork* net = nullptr;
  std::unique_ptr<RemoteStore> store;
};

constexpr uint32_t kNs = 3, kFileNs = 7;

// A request that nobody waits for, with its memory.
struct Async {
  Request req;
  Bytes mem;
  bool done = false;
  uint64_t ended_ns = 0;
  RemoteHarness* h = nullptr;
};
void start(RemoteHarness& h, Async* a, Request::Op op, const ChunkKey& key, uint32_t off, uint32_t len,
           uint8_t flags = 0);
bool all_done(const std::vector<Async>& v);

}  // namespace kvfs
