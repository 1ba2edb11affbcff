// page_maker.cpp: see page_maker.h.
#include "page_maker.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstring>

namespace kvfs {

namespace {
constexpr int kNice = 5;
}

void PageMaker::start(uint8_t* memory, uint64_t bytes, uint64_t ahead) {
  memory_ = memory;
  bytes_ = bytes;
  ahead_ = ahead;
  goal_ = std::min(ahead, bytes);
  thread_ = std::thread([this] { run(); });
}

void PageMaker::stop() {
  if (!thread_.joinable()) return;
  raise(kStop);
  thread_.join();
}

void PageMaker::raise(uint64_t goal) {
  goal_.store(goal == kStop ? kStop : std::min(goal, bytes_), std::memory_order_release);
  goal_.notify_one();
}

void PageMaker::run() {
  cpu_set_t all;  // not only that of a pinned reactor, whose thread began this one
  std::memset(&all, 0xff, sizeof all);
  (void)sched_setaffinity(0, sizeof all, &all);
  (void)setpriority(PRIO_PROCESS, 0, kNice);  // of this thread: a load under way comes first
  uint64_t made = 0;
  while (made < bytes_) {
    const uint64_t goal = goal_.load(std::memory_order_acquire);
    if (goal == kStop) return;
    if (made >= goal) {
      goal_.wait(goal, std::memory_order_acquire);
      continue;
    }
    const uint64_t n = std::min(kPiece, bytes_ - made);
    // No memory, or a kernel before 5.14: pages come when they are touched.
    made = madvise(memory_ + made, n, MADV_POPULATE_WRITE) == 0 ? made + n : bytes_;
    made_.store(made, std::memory_order_release);
  }
}

}  // namespace kvfs
