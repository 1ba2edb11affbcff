// peer.h owns one target: its session, the rails and connections to it, the operations that wait to be sent there, and
// what the session's limits still allow. What to do with an operation that comes back is the host's.
#pragma once

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "lazy_writes.h"
#include "network.h"
#include "op.h"
#include "rail.h"

namespace kvfs {

struct PeerOptions {
  uint32_t transport = 0;    // as in kvfs_remote_config
  uint32_t connections = 2;  // per rail
  uint64_t deadline_ns = 30'000'000'000;
  uint64_t dead_ns = 5'000'000'000;  // of silence with operations outstanding; a ping asks after a fifth of it
  uint64_t ping_ns() const { return dead_ns / 5; }
  uint64_t connect_ns() const { return std::clamp<uint64_t>(deadline_ns / 4, 100'000'000, 3'000'000'000); }
};

class PeerHost {
 public:
  // An operation is no longer the channel's. It is in no list but that of deadlines.
  virtual void came_back(RemoteOp* op) = 0;
  virtual void heard_of_map(uint32_t version) = 0;  // a server has it

 protected:
  ~PeerHost() = default;
};

class Peer {
 public:
  Peer(PeerHost* host, Network* network, Window* window, std::mt19937_64* random, const PeerOptions& opt,
       const wire::MapTarget& target);
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  uint32_t id() const { return target_.id; }
  const wire::MapTarget& target() const { return target_; }
  // Other endpoints: connections to those that are gone end, and their operations come back.
  void update(const wire::MapTarget& target);

  void queue(RemoteOp* op);
  void queue_again(RemoteOp* op);  // it was sent once: before all others
  void unqueue(RemoteOp* op);
  RemoteOp* unqueue_any();
  void settle(RemoteOp* op);  // it has ended, or goes elsewhere: what number it had is free
  bool numbered(const RemoteOp* op) const { return op->session != 0 && op->session == session_.number; }
  bool waiting() const { return !gets_.empty() || !others_.empty(); }
  // Hands a batch to a connection. False: nothing can be sent now.
  bool send_batch(uint64_t now);
  void flush(uint32_t map_version);
  void cancel(RemoteOp* op) { op->conn->channel->cancel(&op->net); }
  void give_up(Connection* c) { end(c); }  // its operations come back
  // It was sent and will not be asked for again, and nobody knows whether it was executed. If it is a change the session ends:
  // at the target, its successor keeps what is still on its way from being made later.
  void disown(const RemoteOp* op);

  // Pings, silent connections, those that are over, those to be made. When it must be called again.
  uint64_t step(uint64_t now);
  bool attention() const { return attention_; }  // step() has something to do
  void dialed(Dial* d, uint64_t now);            // of one of our rails
  void close();                                  // connections end, none is made any more
  bool closing() const { return closing_; }
  bool closed() const;  // nothing refers to it
  bool idle() const;    // no connection is left

  bool up() const;
  bool tried() const { return tried_; }           // an attempt at a session has ended
  int last_error() const { return last_error_; }  // of the last attempt that failed
  bool refused() const { return refused_; }       // it was the server that said so
  const std::vector<std::unique_ptr<Rail>>& rails() const { return rails_; }
  uint32_t inflight() const { return ops_; }

  LazyWrites lazy;
  wire::TargetStat stat{};  // last heard
  bool stat_known = false;
  bool stat_asked = false;      // an answer is due
  uint64_t stat_at_ns = 0;      // when to ask next
  uint64_t pending = 0;         // bytes of puts and writes under way
  uint64_t written = 0;         // of those that have ended since that answer was asked for
  uint64_t written_before = 0;  // of these, before the question under way
  wire::TargetStat answer{};    // memory for it
  bool active = false;          // in the host's list of peers with something to send

 private:
  struct Session {
    bool valid = false;
    uint64_t number = 0;
    uint8_t id[16] = {};
    uint32_t max_ops = 0;
    uint64_t max_in = 0;
    ChannelLimits limits;
  };
  static void net_done(NetOp* n);
  RemoteOp* next_op();
  void count_cancelled();
  Connection* pick();
  void sort_rails();
  void send(RemoteOp* op, Connection* c, uint64_t now);
  void broke(Connection* c, uint64_t now);
  void end(Connection* c);
  void end_session();
  uint64_t step_connections(Rail* r, uint64_t now);
  uint64_t step_dials(uint64_t now);
  void dial(Rail* r, wire::Purpose purpose);
  void took_session(Dial* d);
  void add_connection(Rail* r, Dial* d, uint64_t now);
  void find_rails();
  uint32_t wanted(const Rail& r) const;
  bool has(wire::Transport kind) const;

  PeerHost* host_;
  Network* network_;
  Window* window_;
  Window::Place place_;
  std::mt19937_64* random_;
  PeerOptions opt_;
  wire::MapTarget target_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<Rail*> usable_;  // to choose from; each has a connection that can be used
  bool sort_ = true;           // usable_ is out of date
  Session session_;
  bool booted_ = false;
  uint8_t boot_[16] = {};  // of the last session
  uint32_t ops_ = 0;       // in flight, all connections
  uint64_t in_ = 0;        // bytes towards the server of these
  // Of cancelled operations, which are no longer ours but which the server has yet to answer; counted with each batch.
  uint32_t cancelled_ops_ = 0;
  uint64_t cancelled_in_ = 0;
  // Numbers of changes: the server remembers the answers to as many of the last ones as it lets be unanswered, so a new one
  // is given only while the first that is not settled is among these.
  uint64_t next_seq_ = 1, first_seq_ = 1;
  std::vector<bool> settled_;  // by number, modulo its size
  OpQueue gets_, others_;      // with payload to us, and the rest
  bool gets_next_ = false;
  bool attention_ = true;
  bool closing_ = false;
  bool dialing_session_ = false;
  bool disowned_ = false;   // its connections are to be ended
  uint32_t next_rail_ = 0;  // first to be asked for a session
  bool tried_ = false, refused_ = false;
  int last_error_ = 0;
  uint64_t now_ = 0;
};

}  // namespace kvfs
