// shm_fixture.h owns both ends of a segment and of its socket, for tests.
#pragma once

#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <memory>

#include "../server/shared_memory.h"
#include "../store/check.h"
#include "../transport/shm_client.h"
#include "../transport/shm_server.h"

namespace kvfs {

constexpr uint64_t kTestArena = 16u << 20;  // the least

struct ShmPair {
  int fd[2] = {-1, -1};
  int memory = -1;
  void* mem[2] = {nullptr, nullptr};  // the server's mapping, the client's
  ShmSetup setup;

  explicit ShmPair(uint32_t max_batch = 64) : setup(shm_setup(max_batch, kTestArena)) {
    const uint64_t bytes = ShmLayout(setup).bytes;
    KVFS_CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fd) == 0);
    KVFS_CHECK(make_shared_memory("kvfs-test", bytes, false, &memory, &mem[0]) == 0);
    mem[1] = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    KVFS_CHECK(mem[1] != MAP_FAILED);
    close(memory);
  }
  std::unique_ptr<ShmLink> link(int side) const { return std::make_unique<ShmLink>(fd[side], mem[side], setup); }
  ShmWords* words(int side) const { return static_cast<ShmWords*>(mem[side]); }
  uint8_t* at(int side, uint64_t off) const { return static_cast<uint8_t*>(mem[side]) + off; }
};

}  // namespace kvfs
