// rdma_memory.h owns which memory an RDMA device can reach: RdmaMemory, the registrations of one protection domain.
// Ranges that are declared are registered whole, at first use, and stay so until they are withdrawn or, while nothing uses
// them, until others need the room. Other memory is registered for one use: once it is freed, the same addresses may be other
// pages, which a registration kept for longer would miss.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>

#include "verbs.h"

namespace kvfs {

struct RdmaRegion {
  uint8_t* base = nullptr;
  size_t len = 0;
  ibv_mr* mr = nullptr;   // null: declared, not registered
  bool writable = true;   // else: registered for reading, because its pages can't be written
  bool declared = false;  // else it goes with its last use
  uint32_t uses = 0;
  uint64_t used = 0;  // when last, in uses of all
};

class RdmaMemory {
 public:
  struct Limits {
    uint32_t regions = 1024;        // registered at once
    uint64_t bytes = 256ull << 30;  // of these together
    uint32_t declared = 4096;       // ranges
  };
  struct Counters {
    uint64_t registered = 0, dropped = 0;  // registrations made, and given up for others
  };

  // access: IBV_ACCESS_* of all registrations.
  RdmaMemory(const VerbsTable& verbs, ibv_pd* pd, int access, const Limits& limits)
      : verbs_(verbs), pd_(pd), access_(access), limits_(limits) {}
  ~RdmaMemory();  // nothing is in use
  RdmaMemory(const RdmaMemory&) = delete;
  RdmaMemory& operator=(const RdmaMemory&) = delete;

  // 0, -EINVAL (overlaps another range), -ENOSPC (too many).
  int declare(void* base, size_t len);
  // Registers a declared range now: pinning much memory takes its time. 0 or -errno.
  int prepare(void* base);
  // 0, -ENOENT, -EBUSY: in use.
  int withdraw(void* base);

  // The registration that [p, p+len) lies in. With `write` the device may write there. Null: *err says why (-ENOMEM, -EFAULT,
  // -EACCES: not writable); with declared_only also where the range is not declared (-ENOENT).
  RdmaRegion* acquire(const void* p, size_t len, bool write, bool declared_only, int* err);
  void release(RdmaRegion* r);

  Counters counters() const;

 private:
  int register_region(RdmaRegion* r, bool write);
  void unregister(RdmaRegion* r);
  bool drop_oldest();
  RdmaRegion* find(const uint8_t* p, size_t len);

  const VerbsTable& verbs_;
  ibv_pd* pd_;
  int access_;
  Limits limits_;
  mutable std::mutex lock_;  // declared and prepared by other threads than the reactor's
  std::map<const uint8_t*, RdmaRegion> declared_;
  uint32_t regions_ = 0;
  uint64_t bytes_ = 0;
  uint64_t clock_ = 0;
  Counters counters_;
};

}  // namespace kvfs
