// rail.h owns one way to one target: its connections, whether it can be used, and when it is tried again.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "network.h"
#include "op.h"

namespace kvfs {

struct Rail;

struct Connection {
  std::unique_ptr<ClientChannel> channel;
  Rail* rail = nullptr;
  uint32_t ops = 0;    // submitted and not back
  uint64_t bytes = 0;  // their payloads
  uint64_t made_ns = 0;
  uint64_t since_ns = 0;    // since when it has had something to do without a break
  uint64_t pinged_ns = 0;   // last
  bool proven = false;      // the server has said something on it
  bool ending = false;      // broken or closed: it goes when nothing refers to it
  bool memoryless = false;  // it can't get at the memory of an operation: no more can be locked
  bool touched = false;     // something was submitted since the last flush
};

struct Rail {
  static constexpr uint64_t kBackoffMin = 20'000'000, kBackoffMax = 2'000'000'000;
  static constexpr uint32_t kDownAfter = 3;  // failures in a row

  Peer* peer = nullptr;
  wire::MapEndpoint endpoint{};
  Route route;
  uint32_t number = 0;  // of the target's rails
  std::string name;
  std::vector<std::unique_ptr<Connection>> connections;
  bool dialing = false;
  bool down = false;  // no new work while others are up
  bool gone = false;  // no longer in the map
  uint32_t in_row = 0;
  uint64_t backoff_ns = 0;  // 0: the next attempt may be at once
  uint64_t dial_at_ns = 0;
  uint64_t bytes = 0;  // payloads in flight
  uint64_t ops = 0, failures = 0, made = 0;
  uint64_t in_before = 0, out_before = 0;  // of connections that are gone

  wire::Transport kind() const { return wire::Transport{endpoint.transport}; }
  bool tcp() const { return kind() == wire::Transport::Tcp; }
  uint32_t speed() const;  // Mbit/s of its slower end; 0 = unknown
  uint32_t live() const;   // connections that can be used
  // An attempt failed or a connection broke.
  void failed(uint64_t now, std::mt19937_64& random);
  void works() {
    in_row = 0;
    backoff_ns = 0;
  }
};

// "tcp://10.0.0.1:7000", with "@device" if the route has one; "shm://NAME".
std::string rail_name(const wire::MapEndpoint& e, const std::string& device);

}  // namespace kvfs
