// tcp_transport.cpp: see tcp_transport.h.
#include "tcp_transport.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <string_view>
#include <utility>

#include "../transport/tcp_client.h"
#include "../transport/tcp_connect.h"

namespace kvfs {

namespace {
struct Socket {
  explicit Socket(int f) : fd(f) {}
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  ~Socket() {
    if (fd >= 0) close(fd);
  }
  int fd;
};
}  // namespace

socklen_t address_of(const wire::MapEndpoint& e, sockaddr_storage* out) {
  *out = {};
  if (e.family == 6) {
    auto* a = reinterpret_cast<sockaddr_in6*>(out);
    a->sin6_family = AF_INET6;
    a->sin6_port = htons(e.port);
    std::memcpy(&a->sin6_addr, e.address, sizeof a->sin6_addr);
    return sizeof *a;
  }
  auto* a = reinterpret_cast<sockaddr_in*>(out);
  a->sin_family = AF_INET;
  a->sin_port = htons(e.port);
  std::memcpy(&a->sin_addr, e.address, sizeof a->sin_addr);
  return sizeof *a;
}

bool parse_tcp_url(const char* url, wire::MapEndpoint* out) {
  constexpr std::string_view kScheme = "tcp://";
  std::string_view s(url);
  if (!s.starts_with(kScheme)) return false;
  s.remove_prefix(kScheme.size());
  const size_t colon = s.rfind(':');
  if (colon == std::string_view::npos) return false;
  std::string host(s.substr(0, colon));
  const std::string_view port = s.substr(colon + 1);
  *out = {};
  out->transport = uint8_t(wire::Transport::Tcp);
  out->family = 4;
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    out->family = 6;
  }
  const auto [end, err] = std::from_chars(port.data(), port.data() + port.size(), out->port);
  if (err != std::errc{} || end != port.data() + port.size() || out->port == 0) return false;
  return inet_pton(out->family == 6 ? AF_INET6 : AF_INET, host.c_str(), out->address) == 1;
}

std::vector<Route> TcpTransport::routes(const wire::MapEndpoint&) { return {Route{}}; }

void TcpTransport::dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>& capability,
                        uint64_t deadline_ns) {
  sockaddr_storage addr;
  const socklen_t len = address_of(d->endpoint, &addr);
  auto s = std::make_shared<Socket>(tcp_connect(reinterpret_cast<const sockaddr*>(&addr), len, deadline_ns));
  if (s->fd < 0) {
    d->err = std::exchange(s->fd, -1);
    return;
  }
  d->reply = {};
  d->err =
      client_handshake(s->fd, hello, capability.data(), uint32_t(capability.size()), &d->reply, &d->map, deadline_ns);
  d->answered = d->err == 0 || (d->reply.magic == wire::kReplyMagic && d->reply.err == d->err);
  if (d->err == 0) d->link = std::move(s);
}

std::unique_ptr<ClientChannel> TcpTransport::channel(Dial* d, const ChannelLimits& limits) {
  auto* s = static_cast<Socket*>(d->link.get());
  return std::make_unique<TcpClientChannel>(*uring_, std::exchange(s->fd, -1), limits);
}

}  // namespace kvfs
