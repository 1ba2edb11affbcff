// network.h owns the seam between the remote store and the networks that carry its connections: making a connection
// blocks and is done elsewhere, what comes of it is a ClientChannel on the reactor thread. All calls are on the reactor
// thread.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../transport/channel.h"
#include "../wire/map.h"

namespace kvfs {

// One attempt to reach a chunk server. It ends, with whatever became of it, in Network::taken().
struct Dial {
  // What is asked for.
  wire::Purpose purpose = wire::Purpose::Session;
  wire::MapEndpoint endpoint{};
  std::string device;        // of the Route
  uint32_t target = 0;       // Hello::target
  uint8_t session[16] = {};  // Attach
  uint64_t timeout_ns = 0;   // of the whole attempt
  // What came of it.
  int err = 0;            // 0 or -errno
  bool answered = false;  // by the server: err is its
  wire::HelloReply reply{};
  std::vector<uint8_t> map;    // the reply's, if it has one
  std::shared_ptr<void> link;  // the transport's: what its channel is made of; ends the connection if none is
  void* owner = nullptr;       // the asker's
};

// One way from this machine to an endpoint; each is a rail.
struct Route {
  std::string device;  // RDMA device and port; TCP: empty, the kernel chooses
  uint32_t speed = 0;  // Mbit/s of this end; 0 = unknown
};

class Network {
 public:
  virtual ~Network() = default;
  virtual std::vector<Route> routes(const wire::MapEndpoint& e) = 0;
  virtual void dial(std::unique_ptr<Dial> d) = 0;
  virtual std::unique_ptr<Dial> taken() = 0;  // a finished one, null: none now
  // Of a finished attempt with err 0. Null: not possible; the connection is closed.
  virtual std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) = 0;
  // [base, base+len) is memory for operations, or is no longer.
  virtual void memory(void* base, size_t len, bool add) = 0;
  // For who starts and ends a store outside of a reactor's loop: lets connections work until something has happened, for
  // timeout_ns at most.
  virtual void wait(uint64_t timeout_ns) = 0;
  virtual uint64_t now_ns() = 0;  // CLOCK_MONOTONIC, where it is real
};

}  // namespace kvfs
