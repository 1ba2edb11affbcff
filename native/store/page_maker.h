// page_maker.h owns the thread that gives memory its pages before they are needed: the first touch of memory costs up to
// ten times a copy into it, on whichever thread touches it. It works from the front, `ahead` bytes beyond what is used, and
// wakes up for an eighth of that; so most of `ahead` is there whenever a load begins.
// Bound: at most `ahead` bytes have pages without being used.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace kvfs {

class PageMaker {
 public:
  static constexpr uint64_t kPiece = 2u << 20;  // of one call to the kernel: others who map memory wait that long

  PageMaker() = default;
  ~PageMaker() { stop(); }
  PageMaker(const PageMaker&) = delete;
  PageMaker& operator=(const PageMaker&) = delete;

  // Not called: made() is 0. The memory stays until stop().
  void start(uint8_t* memory, uint64_t bytes, uint64_t ahead);
  void stop();

  // The first of them are in use. One thread.
  void used(uint64_t bytes) {
    const uint64_t goal = goal_.load(std::memory_order_relaxed);
    if (bytes + ahead_ / 8 * 7 > goal && goal < bytes_) raise(bytes + ahead_);
  }
  // That many have pages, or will get none ahead of their use.
  uint64_t made() const { return made_.load(std::memory_order_acquire); }

 private:
  static constexpr uint64_t kStop = UINT64_MAX;
  void raise(uint64_t goal);
  void run();

  uint8_t* memory_ = nullptr;
  uint64_t bytes_ = 0, ahead_ = 0;
  std::atomic<uint64_t> goal_{0}, made_{0};
  std::thread thread_;
};

}  // namespace kvfs
