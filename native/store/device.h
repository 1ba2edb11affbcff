// device.h owns the one interface through which the store touches storage: asynchronous reads, writes and barriers.
// Implementations: UringDevice (io_uring, O_DIRECT) and, for tests, SimDevice (records, injects faults, replays crashes).
// Single-threaded: one reactor thread submits and polls. Nothing here throws or blocks except poll(wait).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvfs {

// Memory for I/O. `fixed` is an io_uring registered-buffer index that covers [ptr, ptr+len), or -1.
struct MemRef {
  void* ptr = nullptr;
  int fixed = -1;
};

struct Io;
using IoDone = void (*)(Io*);

// One device operation, owned by the caller and alive until `done` runs. `done` may submit further operations.
struct Io {
  enum class Op : uint8_t { Read, Write, Flush };
  Op op = Op::Read;
  MemRef mem;
  uint32_t len = 0;  // bytes; multiple of Device::align()
  uint64_t off = 0;  // bytes from the device's start; multiple of Device::align()
  int32_t result =
      0;  // 0 = whole transfer done (short transfers are retried or turned into -EIO by the device), else -errno
  IoDone done = nullptr;
  void* owner = nullptr;
  Io* next = nullptr;  // free for the owner while idle; the device's while in flight
};

class Device {
 public:
  virtual ~Device() = default;
  virtual uint64_t size() const = 0;   // bytes
  virtual uint32_t align() const = 0;  // logical block: 512 or 4096; offsets and lengths are multiples
  // True if memory at `p` can be transferred directly (DMA alignment); otherwise the store bounces it.
  virtual bool mem_ok(const void* p) const = 0;
  // A write is durable once it has completed and a Flush submitted after that completion has completed.
  // Never completes inline: `done` runs from poll().
  virtual void submit(Io* io) = 0;
  // Sends queued submissions to the kernel, runs `done` of finished operations, returns how many.
  // wait: block until at least one operation finishes (used only by open/close/offline tools).
  virtual unsigned poll(bool wait) = 0;
  virtual unsigned inflight() const = 0;
};

}  // namespace kvfs
