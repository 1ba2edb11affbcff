// shared_memory.h owns the making of memory that a client shares with us: sealed memfds, and the thread that gives them
// their pages. A client may ask for gigabytes, and pages come at about 1 GB/s, so nobody else waits for that: the thread
// populates all that is asked for in turns of kPiece, and stops at once when the client is gone.
// Bound: one job per session, since a session has one request under way.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

namespace kvfs {

// A memfd of `bytes` mapped here, without pages. The seals keep the client from shrinking it under our feet (SIGBUS).
// Ordinary shmem and not hugetlbfs: a client may punch holes, and refilling one must never depend on a pool that can be
// empty. 0 or -errno.
int make_shared_memory(const char* name, uint64_t bytes, bool huge, int* fd, void** mem);
// Gives [mem, mem + bytes) its pages. 0 or -errno.
int populate(void* mem, uint64_t bytes);

class Populator {
 public:
  static constexpr uint64_t kPiece = 16u << 20;
  ~Populator() { stop(); }
  void start();
  void stop();  // every job has been answered
  // Populates and calls done(0 or -errno) in the populating thread; -ECANCELED soon after *cancelled became true.
  void add(void* mem, uint64_t bytes, std::shared_ptr<std::atomic<bool>> cancelled, std::function<void(int)> done);

 private:
  struct Job {
    char* at;
    uint64_t left;
    std::shared_ptr<std::atomic<bool>> cancelled;
    std::function<void(int)> done;
  };
  void run();

  std::mutex mu_;
  std::condition_variable cv_;
  std::deque<Job> jobs_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace kvfs
