// client.h owns what the files of libkvfs share: the client and ring objects behind kvfs.h.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../include/kvfs.h"
#include "../ring/control.h"

struct kvfs_client {
  std::mutex mu;  // control calls: one request outstanding
  int sock = -1;
  pid_t pid = 0;
  std::string path;
  uint8_t token[16] = {};
  bool dead = false;              // a reply was lost: no further control calls
  std::vector<kvfs_ring*> rings;  // <= 16
  std::vector<kvfs_iov> iovs;     // <= 64
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
};

namespace kvfs {

// getpid() without a system call: libkvfs keeps a counter that a fork handler bumps in the child.
bool forked(const kvfs_client* c);
// One request and its reply (fds: up to 2, -1 where none came). 0 or -errno of either side.
int control_call(kvfs_client* c, CtlRequest* q, CtlReply* r, int fds[2]);
bool peer_gone(const kvfs_client* c);
uint64_t now_ns();

}  // namespace kvfs
