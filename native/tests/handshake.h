// handshake.h owns the server's half of a handshake for tests, on a thread that waits: ServerHandshake with a poll.
#pragma once

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <vector>

#include "../transport/tcp_connect.h"

namespace kvfs {

// Calls `step` until it says 1, each time the socket is ready: 0, its error, or -ETIMEDOUT.
template <typename Step>
int finish_handshake(int fd, short events, uint64_t deadline_ns, Step step) {
  for (;;) {
    if (const int rc = step(); rc != 0) return std::min(rc, 0);
    const uint64_t now = monotonic_ns();
    if (now >= deadline_ns) return -ETIMEDOUT;
    pollfd p{fd, events, 0};
    ::poll(&p, 1, static_cast<int>((deadline_ns - now) / 1'000'000 + 1));
  }
}

inline int server_read_hello(int fd, wire::Hello* hello, std::vector<uint8_t>* capability, uint64_t deadline_ns) {
  ServerHandshake h(fd);
  const int rc = finish_handshake(fd, POLLIN, deadline_ns, [&] { return h.read(); });
  if (rc != 0) return rc;
  *hello = h.hello();
  *capability = h.capability();
  return 0;
}

inline int send_reply(int fd, const wire::HelloReply& reply, const void* map, uint32_t map_len, uint64_t deadline_ns) {
  ServerHandshake h(fd);
  h.answer(reply, map, map_len);
  return finish_handshake(fd, POLLOUT, deadline_ns, [&] { return h.write(); });
}

}  // namespace kvfs
