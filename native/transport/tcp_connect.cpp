// tcp_connect.cpp: sockets and handshakes over them; see tcp_connect.h.
#include "tcp_connect.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "../store/check.h"

namespace kvfs {
namespace {

constexpr int kKeepIdle = 15, kKeepInterval = 10, kKeepCount = 3;  // seconds, seconds, probes
constexpr int kUnackedMs = 30'000;

void set(int fd, int level, int name, int value) { ::setsockopt(fd, level, name, &value, sizeof value); }

// 0 when the socket is ready, or has an error that the next call tells of.
int wait_for(int fd, short events, uint64_t deadline_ns) {
  for (;;) {
    const uint64_t now = monotonic_ns();
    if (now >= deadline_ns) return -ETIMEDOUT;
    const uint64_t left = deadline_ns - now;
    timespec ts{static_cast<time_t>(left / 1'000'000'000), static_cast<long>(left % 1'000'000'000)};
    pollfd p{fd, events, 0};
    const int rc = ::ppoll(&p, 1, &ts, nullptr);
    if (rc > 0) return 0;
    if (rc < 0 && errno != EINTR) return -errno;
  }
}

// Receives up to n bytes: > 0, 0: none there now, -errno.
ssize_t take(int fd, void* to, size_t n) {
  for (;;) {
    const ssize_t got = ::recv(fd, to, n, MSG_DONTWAIT);
    if (got > 0) return got;
    if (got == 0) return -ECONNRESET;
    if (errno == EAGAIN || errno == EWOULDBLOCK) return 0;
    if (errno != EINTR) return -errno;
  }
}

ssize_t give(int fd, const void* from, size_t n) {
  for (;;) {
    const ssize_t put = ::send(fd, from, n, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (put > 0) return put;
    if (put == 0 || errno == EAGAIN || errno == EWOULDBLOCK) return 0;
    if (errno != EINTR) return -errno;
  }
}

int take_all(int fd, void* to, size_t n, uint64_t deadline_ns) {
  auto* p = static_cast<uint8_t*>(to);
  while (n > 0) {
    const ssize_t got = take(fd, p, n);
    if (got < 0) return static_cast<int>(got);
    if (got == 0) {
      if (const int rc = wait_for(fd, POLLIN, deadline_ns); rc != 0) return rc;
    }
    p += got;
    n -= static_cast<size_t>(got);
  }
  return 0;
}

int give_all(int fd, const void* from, size_t n, uint64_t deadline_ns) {
  const auto* p = static_cast<const uint8_t*>(from);
  while (n > 0) {
    const ssize_t put = give(fd, p, n);
    if (put < 0) return static_cast<int>(put);
    if (put == 0) {
      if (const int rc = wait_for(fd, POLLOUT, deadline_ns); rc != 0) return rc;
    }
    p += put;
    n -= static_cast<size_t>(put);
  }
  return 0;
}

}  // namespace

void tcp_tune(int fd) {
  set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdle);
  set(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepInterval);
  set(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepCount);
}

int tcp_connect(const sockaddr* addr, socklen_t addr_len, uint64_t deadline_ns) {
  const int fd = ::socket(addr->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  tcp_tune(fd);
  int rc = ::connect(fd, addr, addr_len) == 0 ? 0 : -errno;
  if (rc == -EINPROGRESS || rc == -EINTR) {
    rc = wait_for(fd, POLLOUT, deadline_ns);
    int err = 0;
    socklen_t n = sizeof err;
    if (rc == 0) rc = ::getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &n) == 0 ? -err : -errno;
  }
  if (rc == 0) return fd;
  ::close(fd);
  return rc;
}

int tcp_listen(const sockaddr* addr, socklen_t addr_len, int backlog) {
  const int fd = ::socket(addr->sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  set(fd, SOL_SOCKET, SO_REUSEADDR, 1);
  if (addr->sa_family == AF_INET6) set(fd, IPPROTO_IPV6, IPV6_V6ONLY, 1);
  if (::bind(fd, addr, addr_len) == 0 && ::listen(fd, backlog) == 0) return fd;
  const int err = errno;
  ::close(fd);
  return -err;
}

int tcp_accept(int listener, sockaddr_storage* peer) {
  socklen_t n = sizeof *peer;
  const int fd = ::accept4(listener, reinterpret_cast<sockaddr*>(peer), peer != nullptr ? &n : nullptr,
                           SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return -errno;
  tcp_tune(fd);
  // Nothing is probed while there is unacknowledged data, which the kernel alone would send again for 15 minutes: a client
  // that is gone without a word would keep its session for that long. Clients have pings.
  set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, kUnackedMs);
  return fd;
}

int check_agreement(const wire::Hello& hello, const wire::HelloReply& reply) {
  if (reply.err != 0) return reply.err;
  if (reply.version > hello.version || (reply.features & ~hello.features) != 0) return -EPROTO;
  if (wire::Purpose{hello.purpose} == wire::Purpose::Map) return reply.map_len != 0 ? 0 : -EPROTO;
  const bool limits = reply.max_ops != 0 && reply.max_batch != 0 && reply.max_batch <= wire::kMaxBatch &&
                      reply.max_in >= wire::kMaxOpBytes;
  return limits ? 0 : -EPROTO;
}

int client_handshake(int fd, wire::Hello hello, const void* capability, uint32_t capability_len,
                     wire::HelloReply* reply, std::vector<uint8_t>* map, uint64_t deadline_ns) {
  KVFS_CHECK(capability_len <= wire::kMaxCapability);
  hello.magic = wire::kHelloMagic;
  hello.version = wire::kVersion;
  hello.capability_len = capability_len;
  wire::seal(&hello, capability);
  uint8_t out[sizeof hello + wire::kMaxCapability];
  std::memcpy(out, &hello, sizeof hello);
  if (capability_len != 0) std::memcpy(out + sizeof hello, capability, capability_len);
  int rc = give_all(fd, out, sizeof hello + capability_len, deadline_ns);
  if (rc == 0) rc = take_all(fd, reply, sizeof *reply, deadline_ns);
  if (rc != 0) return rc;
  if (reply->magic != wire::kReplyMagic || reply->map_len > wire::kMaxMap) return -EPROTO;
  std::vector<uint8_t> bytes(reply->map_len);
  rc = take_all(fd, bytes.data(), bytes.size(), deadline_ns);
  if (rc == 0) rc = wire::check_reply(*reply, bytes.data());
  if (rc == 0) rc = check_agreement(hello, *reply);
  if (map != nullptr) *map = std::move(bytes);
  return rc;
}

int ServerHandshake::read() {
  while (got_ < sizeof hello_) {
    const ssize_t n = take(fd_, reinterpret_cast<uint8_t*>(&hello_) + got_, sizeof hello_ - got_);
    if (n <= 0) return static_cast<int>(n);
    got_ += static_cast<size_t>(n);
    // Another protocol is told from its first bytes, not after its first message.
    if (got_ >= sizeof hello_.magic && hello_.magic != wire::kHelloMagic) return -EPROTO;
  }
  if (hello_.capability_len > wire::kMaxCapability) return -EPROTO;
  capability_.resize(hello_.capability_len);
  while (got_ < sizeof hello_ + capability_.size()) {
    const size_t at = got_ - sizeof hello_;
    const ssize_t n = take(fd_, capability_.data() + at, capability_.size() - at);
    if (n <= 0) return static_cast<int>(n);
    got_ += static_cast<size_t>(n);
  }
  const int rc = wire::check_hello(hello_, capability_.data());
  return rc == 0 ? 1 : rc;
}

void ServerHandshake::answer(wire::HelloReply reply, const void* map, uint32_t map_len) {
  KVFS_CHECK(map_len <= wire::kMaxMap);
  reply.magic = wire::kReplyMagic;
  reply.rsv = 0;
  reply.map_len = map_len;
  wire::seal(&reply, map);
  out_.resize(sizeof reply + map_len);
  std::memcpy(out_.data(), &reply, sizeof reply);
  if (map_len != 0) std::memcpy(out_.data() + sizeof reply, map, map_len);
  sent_ = 0;
}

int ServerHandshake::write() {
  while (sent_ < out_.size()) {
    const ssize_t n = give(fd_, out_.data() + sent_, out_.size() - sent_);
    if (n <= 0) return static_cast<int>(n);
    sent_ += static_cast<size_t>(n);
  }
  return 1;
}

}  // namespace kvfs
