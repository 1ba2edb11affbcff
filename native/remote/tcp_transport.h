// tcp_transport.h owns TCP as a kind of connection of the remote store.
#pragma once

#include <sys/socket.h>

#include "connector.h"

namespace kvfs {

class TcpTransport final : public Transport {
 public:
  explicit TcpTransport(Uring* uring) : uring_(uring) {}
  wire::Transport kind() const override { return wire::Transport::Tcp; }
  std::vector<Route> routes(const wire::MapEndpoint& e) override;
  void dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>& capability, uint64_t deadline_ns) override;
  std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) override;
  void memory(void*, size_t, bool) override {}

 private:
  Uring* uring_;
};

// The socket address of an endpoint; its length.
socklen_t address_of(const wire::MapEndpoint& e, sockaddr_storage* out);
// "tcp://HOST:PORT" with a numeric address, IPv6 in brackets. False: it is none.
bool parse_tcp_url(const char* url, wire::MapEndpoint* out);

}  // namespace kvfs
