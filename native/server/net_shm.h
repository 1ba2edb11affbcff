// net_shm.h owns the shared-memory side of a chunk server: who attaches to a session at a Unix socket is given a segment that
// this server has made. What comes to the socket is looked at by the listener thread as over TCP (net_listener.h).
//
// Bounds: kMaxShmSegments segments of a process, of kShmArena bytes and some indices each; who finds none is told -EBUSY and
// has its TCP connections.
#pragma once

#include "net_server.h"

namespace kvfs {

constexpr uint32_t kMaxShmSegments = 128;
constexpr uint64_t kShmArena = 32ull << 20;

// On the reactor of the target that `hello` asks for. fd: an accepted Unix socket, this function's from now on.
void admit_shm(NetServer* server, int fd, const wire::Hello& hello);

}  // namespace kvfs
