// client.h owns what the files of libkvfs share: the client and ring objects behind kvfs.h.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../include/kvfs.h"
#include "../ring/control.h"

struct ClientIov {
  kvfs_iov iov{};
  bool own = false;  // mapped by us
};

struct kvfs_client {
  std::mutex mu;  // control calls: one request outstanding
  int sock = -1;
  pid_t pid = 0;
  std::string path;
  uint8_t token[16] = {};
  std::atomic<bool> dead{false};  // a reply was lost, or the daemon given up: no further control calls
  std::vector<kvfs_ring*> rings;  // <= 256
  std::vector<ClientIov> iovs;    // <= 256
  std::mutex descriptor_mu;       // one descriptor and its answer at a time
  std::mutex descriptor_sock_mu;  // held to make and close it, with descriptor_mu, and to shut it down
  int descriptor_sock = -1;       // kept from one to the next
};

struct kvfs_ring {
  kvfs_client* client = nullptr;
  kvfs::ClientRing q;
  void* mem = nullptr;
  uint64_t bytes = 0;
  int wake_fd = -1;
  uint32_t id = 0;
  int spin_credit = 4;
  uint32_t waits = 0;
  int event_fd = -1;  // made by kvfs_ring_event_fd
  bool armed = false;
  // Batches under way (batch.cpp), by slot; those with blocks to hand over; those that are done and not yet given back.
  std::array<kvfs_batch*, KVFS_BATCHES> batches{};
  uint32_t batches_used = 0;
  kvfs_batch *todo_first = nullptr, *todo_last = nullptr, *done_first = nullptr, *done_last = nullptr;
};

namespace kvfs {

// getpid() without a system call: libkvfs keeps a counter that a fork handler bumps in the child.
bool forked(const kvfs_client* c);
// Sends one request with a descriptor over the client's second connection, to the thread that takes descriptors (it may block
// in a file system; the other must not). The reply's id or -errno.
int descriptor_call(kvfs_client* c, CtlRequest* q, int fd);
void init_request(CtlRequest* q, Ctl type);
// One request and its reply (fds: up to 2, -1 where none came). 0 or -errno of either side.
int control_call(kvfs_client* c, CtlRequest* q, CtlReply* r, int fds[2]);
bool peer_gone(const kvfs_client* c);
uint64_t now_ns();

}  // namespace kvfs
