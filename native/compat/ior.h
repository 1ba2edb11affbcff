// ior.h owns Ior, what stands behind an hf3fs_ior: numbered operations that wait for their batch, go through a kvfs_ring, and
// wait to be taken.
//
// Threads: every call takes the lock. Who waits for completions sleeps without it, one thread at a time ("the sleeper", the
// only one that reaps then); others wait for what the sleeper finds. Bound: `entries` operations prepared and not yet
// taken.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "../include/hf3fs_usrbio.h"
#include "connection.h"
#include "files.h"

namespace kvfs::compat {

class Ior {
 public:
  static constexpr int kMaxEntries = 65536;

  Ior(std::shared_ptr<Connection> connection, kvfs_ring* ring, const hf3fs_ior& how, int entries);
  // Returns when nothing is in flight.
  ~Ior();
  Ior(const Ior&) = delete;
  Ior& operator=(const Ior&) = delete;

  int entries() const { return int(slots_.size()); }
  // The calls of hf3fs_usrbio.h, whose arguments have been looked at.
  int prepare(const hf3fs_iov& iov, uint8_t* ptr, int fd, uint64_t off, uint64_t len, const void* userdata);
  int submit();
  int wait(hf3fs_cqe* out, int room, int min, const timespec* until);
  // Of a parent process, whose ring it shares: not for us.
  bool inherited() const { return generation_ != generation(); }

 private:
  enum class State : uint8_t { Free, Prepared, Ready, InFlight, Done };
  struct Slot {
    std::shared_ptr<OpenFile> file;
    std::shared_ptr<Area> area;
    uint64_t iov_off = 0, off = 0, left = 0;  // of what is still to be asked for
    int64_t result = 0;
    const void* userdata = nullptr;
    uint32_t part = 0;  // bytes asked for now
    int next = -1;
    State state = State::Free;
  };
  struct Fifo {
    int first = -1, last = -1;
    uint32_t n = 0;
  };

  void push(Fifo* f, State s, int i);
  int pop(Fifo* f);
  void start();  // what is due
  void reap();
  void advance(int i, int64_t result);
  void fail(int err);
  void probe();
  void sleep(std::unique_lock<std::mutex>* lock, uint32_t need, uint64_t left_ns);

  const std::shared_ptr<Connection> connection_;
  kvfs_ring* const ring_;
  const bool for_read_;
  const int depth_;
  const uint8_t sqe_flags_;
  const uint32_t generation_;

  std::mutex mu_;
  std::condition_variable found_;
  std::vector<Slot> slots_;
  Fifo free_, prepared_, ready_, done_;
  uint32_t in_flight_ = 0;
  uint32_t waiting_ = 0;  // threads in wait()
  bool sleeper_ = false;
  int failed_ = 0;  // -errno: the ring is lost
  uint64_t probed_ns_ = 0;
  // What the last operation used; the next one's is likely the same.
  int last_fd_ = -1;
  std::weak_ptr<OpenFile> last_file_;
  std::weak_ptr<Area> last_area_;
};

}  // namespace kvfs::compat
