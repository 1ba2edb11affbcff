// remote_store.h owns RemoteStore: a Store whose chunks are on chunk servers. It chooses the target of each request by the
// cluster map, gives it a deadline, and sees to it that it ends: with the server's answer, or with an errno that says what
// is known (docs/guarantees.md, "Remote chunks"). Everything runs on the reactor thread.
// Bounds: as many operations as requests were submitted, times the targets for Flush, Sync and Purge; per target one
// question about its space; one fetch of the map.
#pragma once

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "../store/store.h"
#include "peer.h"

namespace kvfs {

struct RemoteOptions {
  wire::ClusterMap map;
  uint32_t file_ns = 0;  // namespace of file chunks; 0: they are refused
  PeerOptions peer;
  uint64_t window = 32u << 20;                          // bytes that all servers together may be sending to us
  uint64_t start_ns = 10'000'000'000;                   // when no target has answered by then, start() fails
  uint64_t others_ns = 2'000'000'000;                   // how long it waits for the others when one has
  uint64_t seed = 0;                                    // of choices between rails
  std::function<void(const wire::ClusterMap&)> on_map;  // there is a newer one
};

class RemoteStore final : public Store, private PeerHost {
 public:
  RemoteStore(std::unique_ptr<Network> network, RemoteOptions opt);
  ~RemoteStore() override;
  // Connects: 0 when a target has answered and all have been tried. Blocks.
  Status start();

  Status close() override;  // nothing is under way but our own; 5 s at most
  void submit(Request* r) override;
  void tick(uint64_t now_ns) override;
  uint64_t deadline_ns() const override;
  bool busy() const override { return incoming_ != nullptr || again_; }
  bool remote() const override { return true; }
  void memory(void* base, size_t len, bool add) override { network_->memory(base, len, add); }
  int64_t lookup(const ChunkKey&, ChunkInfo*) override;
  void prefetch(const ChunkKey*, uint32_t) override {}
  bool scan(uint64_t*, uint32_t, Kind, uint32_t, const std::function<bool(const ChunkInfo&)>&) override {
    return false;
  }
  StoreStats stats() const override;
  uint64_t room() const override { return room_; }
  uint64_t logged() const override { return 0; }
  uint64_t written() const override { return 0; }

  const wire::ClusterMap& map() const { return map_; }
  const std::vector<std::unique_ptr<Peer>>& peers() const { return peers_; }  // in the order of the map's targets
  uint64_t window_used() const { return window_.used(); }
  size_t live_ops() const { return pool_.live(); }

 private:
  void came_back(RemoteOp* op) override;
  void heard_of_map(uint32_t version) override;

  // remote_requests.cpp
  void accept(Request* r);
  int describe(const Request& r, wire::Desc* d) const;
  void fan_out(Request* r);
  RemoteOp* make(const wire::Desc& d);
  void scan_on(RemoteOp* op);
  void scanned(RemoteOp* op, int64_t result);
  void answered(RemoteOp* op, int64_t result);
  int64_t checked(const RemoteOp& op, int64_t result) const;
  void note_lazy(const RemoteOp& op);
  int64_t note_flush(const RemoteOp& op, int64_t result);
  void finish(RemoteOp* op, int64_t result);
  void complete(Request* r, int64_t result);
  bool take_turn(RemoteOp* op);
  void leave_turn(RemoteOp* op);
  RemoteOp** turns_of(const RemoteOp& op);

  // remote_store.cpp
  Peer* peer_of(const wire::Desc& d) const;
  void place(RemoteOp* op, Peer* p, bool first);
  void route(RemoteOp* op);
  void resend(RemoteOp* op);
  void expire();
  void pass();
  void pump();
  void ask_stat(Peer* p);
  void take_stat(RemoteOp* op, int64_t result);
  void count_room();
  void stale(RemoteOp* op);
  void fetch_map();
  void took_map(Dial* d);
  void set_map(wire::ClusterMap map);

  std::unique_ptr<Network> network_;
  RemoteOptions opt_;
  wire::ClusterMap map_;
  std::mt19937_64 random_;
  Window window_;
  OpPool pool_;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<std::unique_ptr<Peer>> retired_;  // no longer in the map; they go when nothing refers to them
  std::vector<Peer*> active_;                   // with something to send
  size_t first_active_ = 0;
  Request* incoming_ = nullptr;
  Request** incoming_end_ = &incoming_;
  OpTimes timed_;  // by deadline
  OpTimes late_;   // cancelled after theirs, by when the channel must give them back
  OpQueue parked_;
  std::vector<RemoteOp*> turns_;  // changes under way by hash of their chunk, each list in order of arrival
  bool again_ = false;            // tick() has more to do
  uint64_t now_ = 0;
  uint64_t next_pass_ = 0;
  bool fetching_ = false, want_map_ = false;
  uint64_t fetch_at_ns_ = 0;
  uint32_t fetch_from_ = 0, fetch_tries_ = 0;  // index of the target that is asked first; attempts since
  uint64_t room_ = 0;
  StoreStats counters_{};
};

}  // namespace kvfs
