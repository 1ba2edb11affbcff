// shm_transport.h owns shared memory as a kind of connection of the remote store: to chunk servers on this host.
#pragma once

#include "connector.h"

namespace kvfs {

class ShmTransport final : public Transport {
 public:
  explicit ShmTransport(Uring* uring) : uring_(uring) {}
  wire::Transport kind() const override { return wire::Transport::Shm; }
  // One, if this host has the endpoint's socket.
  std::vector<Route> routes(const wire::MapEndpoint& e) override;
  void dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>& capability, uint64_t deadline_ns) override;
  std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) override;
  void memory(void*, size_t, bool) override {}

 private:
  Uring* uring_;
};

}  // namespace kvfs
