// net_shm.cpp: see net_shm.h.
#include "net_shm.h"

#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "../transport/shm_connect.h"
#include "../transport/shm_server.h"
#include "../transport/tcp_connect.h"
#include "shared_memory.h"

namespace kvfs {

namespace {

std::atomic<uint32_t> g_segments{0};

// A link that counts.
struct Segment {
  std::unique_ptr<ShmLink> link;
  int memory = -1;
  ~Segment() {
    if (memory >= 0) close(memory);
  }
};

class CountedLink final : public ShmLink {
 public:
  using ShmLink::ShmLink;
  ~CountedLink() override { g_segments.fetch_sub(1); }
};

int make_segment(int fd, uint32_t max_batch, Segment* out) {
  if (g_segments.fetch_add(1) >= kMaxShmSegments) {
    g_segments.fetch_sub(1);
    return -EBUSY;
  }
  const ShmSetup setup = shm_setup(max_batch, kShmArena);
  void* mem = nullptr;
  if (const int err = make_shared_memory("kvfs-shm", ShmLayout(setup).bytes, true, &out->memory, &mem); err != 0) {
    g_segments.fetch_sub(1);
    return err;
  }
  out->link = std::make_unique<CountedLink>(fd, mem, setup);
  return 0;
}

}  // namespace

void admit_shm(NetServer* server, int fd, const wire::Hello& hello) {
  wire::HelloReply reply;
  NetConn* c = server->admit(hello, nullptr, &reply);
  Segment segment;
  if (c != nullptr && make_segment(fd, reply.max_batch, &segment) != 0) {
    server->abandon(c);
    c = nullptr;
    reply.err = -EBUSY;
  }
  // Two messages to an empty socket: they never wait.
  ServerHandshake answer(fd);
  answer.answer(reply, nullptr, 0);
  const bool sent = answer.write() == 1;
  if (c == nullptr) {
    close(fd);
  } else if (!sent || send_segment(fd, segment.link->setup(), segment.memory) != 0) {
    server->abandon(c);  // the link closes the socket
  } else {
    const ShmServerLimits limits{reply.max_ops, reply.max_batch, reply.max_in, reply.features};
    server->connect(c, std::make_unique<ShmServerChannel>(*server->uring(), std::move(segment.link), *server, limits));
  }
}

}  // namespace kvfs
