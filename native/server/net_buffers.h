// net_buffers.h owns a target's memory for data on its way: one region in two halves, payload from clients (In) and to
// clients (Out), so that neither waits for the other. Each half is a set of buddy systems of kBlock bytes; sizes are powers
// of two from kSmallest to kBlock, and get and put take at most one step per size. Belongs to one reactor thread.
//
// When what a caller asks for is not there, and nobody gets anything smaller meanwhile, it will be there at the latest when
// all that is out has come back: whole blocks fit together again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../store/uring_device.h"

namespace kvfs {

class NetBuffers {
 public:
  static constexpr uint32_t kSmallest = 4u << 10;
  static constexpr uint32_t kBlock = kMaxChunk;  // the largest, too
  static constexpr uint64_t kLeast = 2ull * kBlock;
  enum Side : uint8_t { In = 0, Out = 1 };

  struct Buffer {
    uint8_t* ptr = nullptr;
    uint32_t len = 0;
    int fixed = -1;  // registered buffer that it lies in
  };

  NetBuffers() = default;
  ~NetBuffers();  // everything has been put back
  NetBuffers(const NetBuffers&) = delete;
  NetBuffers& operator=(const NetBuffers&) = delete;
  // `bytes` is rounded up to pairs of blocks. uring null: not registered anywhere. Where memory cannot be pinned, `fixed`
  // stays -1 and transfers are a little slower.
  Status init(Uring* uring, uint64_t bytes);

  // At least `len` bytes (1..kBlock). False: none now.
  bool get(Side side, uint32_t len, Buffer* out);
  void put(const Buffer& b);

  static uint32_t size_for(uint32_t len);  // bytes that a buffer of `len` takes
  uint8_t* base() const { return base_; }
  uint64_t bytes() const { return bytes_; }
  uint64_t used() const { return used_[In] + used_[Out]; }
  uint64_t side_bytes() const { return bytes_ / 2; }

 private:
  static constexpr uint32_t kOrders = 13;  // 4 KiB .. 16 MiB
  static_assert(kSmallest << (kOrders - 1) == kBlock);
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr uint8_t kFree = 0x80, kTaken = 0x40;
  struct Unit {  // of kSmallest bytes; what is said counts for a piece's first
    uint32_t next, prev;
  };
  static uint32_t order_for(uint32_t len);
  Side side_of(uint32_t unit) const { return uint64_t{unit} * kSmallest < bytes_ / 2 ? In : Out; }
  void push(uint32_t unit, uint32_t order);
  void unlink(uint32_t unit, uint32_t order);

  Uring* uring_ = nullptr;
  uint8_t* base_ = nullptr;
  uint64_t bytes_ = 0;
  uint64_t used_[2] = {0, 0};
  std::vector<int> fixed_;       // of each GiB
  std::vector<Unit> units_;      // links of free pieces
  std::vector<uint8_t> orders_;  // of a piece's first unit: kFree or kTaken, and its order; else 0
  uint32_t head_[2][kOrders];
};

}  // namespace kvfs
