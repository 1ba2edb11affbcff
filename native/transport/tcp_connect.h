// tcp_connect.h owns how a TCP connection begins: sockets, and the one Hello and HelloReply before the first frame. Nothing
// of it runs on a reactor thread. Every socket it makes is nonblocking and close-on-exec; a channel takes it from there.
// Deadlines are CLOCK_MONOTONIC nanoseconds. Errors are -errno; -ETIMEDOUT: the deadline, -ECONNRESET: the peer ended it.
#pragma once

#include <sys/socket.h>

#include <cstdint>
#include <vector>

#include "../store/clock.h"
#include "../wire/wire.h"

namespace kvfs {

// A connected socket, tuned, or -errno.
int tcp_connect(const sockaddr* addr, socklen_t addr_len, uint64_t deadline_ns);
// A listening socket or -errno (-EADDRINUSE, ...). SO_REUSEADDR; IPv6 sockets take IPv6 only.
int tcp_listen(const sockaddr* addr, socklen_t addr_len, int backlog);
// The next connection, tuned, or -errno; -EAGAIN: none now. peer: room for a sockaddr_storage, or null.
int tcp_accept(int listener, sockaddr_storage* peer);
// No delay of small frames, keepalive so that a half-open connection ends within a minute.
void tcp_tune(int fd);

// Sends `hello` (its magic, version, capability_len and sum are filled in) and the capability, and reads the reply and the
// map behind it. 0; the reply's err; -EPROTO, -EBADMSG: the reply is not well-formed, or agrees on what was not offered
// (features, version), or has limits that nobody can work with. `map` is empty if none came; may be null for a purpose
// other than Map (a map is then read and dropped).
int client_handshake(int fd, wire::Hello hello, const void* capability, uint32_t capability_len,
                     wire::HelloReply* reply, std::vector<uint8_t>* map, uint64_t deadline_ns);
// What client_handshake asks of a reply by itself, for transports that bring it otherwise.
int check_agreement(const wire::Hello& hello, const wire::HelloReply& reply);

// The server's half, step by step, for a thread with many handshakes at once: at most one Hello with its capability
// (64 + kMaxCapability bytes) is read, nothing behind it. The socket stays the caller's.
class ServerHandshake {
 public:
  explicit ServerHandshake(int fd) : fd_(fd) {}
  int fd() const { return fd_; }
  // Call when the socket is readable. 1: hello() is there and well-formed; 0: more must come; -errno.
  int read();
  const wire::Hello& hello() const { return hello_; }
  const std::vector<uint8_t>& capability() const { return capability_; }
  // Sets the answer; magic, map_len and sum are filled in. map_len <= kMaxMap.
  void answer(wire::HelloReply reply, const void* map, uint32_t map_len);
  // Call when the socket is writable. 1: all is sent; 0: later; -errno.
  int write();

 private:
  int fd_;
  wire::Hello hello_{};
  size_t got_ = 0;
  std::vector<uint8_t> capability_;
  std::vector<uint8_t> out_;
  size_t sent_ = 0;
};

}  // namespace kvfs
