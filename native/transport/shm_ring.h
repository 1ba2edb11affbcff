// shm_ring.h owns the memory that a server and a client on one host share: its layout, and the two rings in it. Each ring
// has one producer and one consumer and fixed slots, each slot a frame (header and body). Either side treats what the other
// has written as hostile: indices are bounded, and a slot is copied once, then checked, then used.
//
// Who sleeps says so: a consumer that has found its ring empty arms it, a producer that has found it full wants room, and the
// other side then rings the bell (a byte on the connection's socket) once. A side that is at work is not woken.
#pragma once

#include <cerrno>
#include <cstdint>

#include "../ring/queue.h"
#include "../wire/wire.h"

namespace kvfs {

constexpr uint32_t kShmMagic = 0x6d66766bu;  // "kvfm"
constexpr uint32_t kShmWords = 4096;         // bytes of the indices at the segment's start
constexpr uint32_t kShmMaxSlots = 1024;
constexpr uint32_t kShmMaxSlotBytes = 64u << 10;
constexpr uint64_t kShmMaxArena = 1u << 30;

// What the server says of the segment when it hands it over, after its HelloReply.
struct ShmSetup {
  uint32_t magic;
  uint32_t slots;          // of each ring; a power of two
  uint32_t request_bytes;  // of a slot; whole cache lines
  uint32_t result_bytes;
  uint64_t arena_bytes;  // whole pages; at least the largest payload
  uint64_t sum;          // XXH3-64 of this struct with sum = 0
};
static_assert(sizeof(ShmSetup) == 32);

ShmSetup shm_setup(uint32_t max_batch, uint64_t arena_bytes);  // sealed
int check_setup(const ShmSetup& s);                            // 0, -EPROTO, -EBADMSG

// Of a segment: the indices, slots of requests, slots of results, the arena, each from a new page.
struct ShmLayout {
  uint64_t requests, results, arena, bytes;
  explicit ShmLayout(const ShmSetup& s);
};

// One ring's words, each with a cache line of its own.
struct ShmWords {
  alignas(64) uint32_t tail;   // the producer's
  alignas(64) uint32_t head;   // the consumer's
  alignas(64) uint32_t armed;  // the consumer sleeps until the bell
  alignas(64) uint32_t full;   // the producer waits for room until the bell
};
static_assert(2 * sizeof(ShmWords) <= kShmWords);

class ShmProducer {
 public:
  ShmProducer() = default;
  ShmProducer(ShmWords* words, uint8_t* slots, uint32_t count, uint32_t bytes)
      : words_(words), slots_(slots), count_(count), bytes_(bytes) {}

  // The next slot, or null: full, and the consumer rings when there is room; *err: it breaks the rules.
  uint8_t* next(int* err) {
    if (free(err)) return at();
    if (*err != 0) return nullptr;
    store_relaxed(&words_->full, 1);
    full_fence();
    return free(err) ? at() : nullptr;
  }
  // The slot that next() gave is filled.
  void push() { store_release(&words_->tail, ++tail_); }
  // After push(): the bell is to be rung.
  bool asleep() {
    full_fence();
    return load_relaxed(&words_->armed) != 0 && __atomic_exchange_n(&words_->armed, 0, __ATOMIC_RELAXED) != 0;
  }
  uint32_t slot_bytes() const { return bytes_; }

 private:
  bool free(int* err) {
    const uint32_t used = tail_ - load_acquire(&words_->head);
    if (used > count_) *err = -EPROTO;
    return used < count_;
  }
  uint8_t* at() { return slots_ + size_t{tail_ & (count_ - 1)} * bytes_; }

  ShmWords* words_ = nullptr;
  uint8_t* slots_ = nullptr;
  uint32_t count_ = 0, bytes_ = 0;
  uint32_t tail_ = 0;
};

class ShmConsumer {
 public:
  ShmConsumer() = default;
  ShmConsumer(ShmWords* words, uint8_t* slots, uint32_t count, uint32_t bytes)
      : words_(words), slots_(slots), count_(count), bytes_(bytes) {}

  // The oldest slot, or null: none; *err: the producer breaks the rules.
  const uint8_t* front(int* err) const {
    const uint32_t there = load_acquire(&words_->tail) - head_;
    if (there > count_) *err = -EPROTO;
    return there == 0 || there > count_ ? nullptr : slots_ + size_t{head_ & (count_ - 1)} * bytes_;
  }
  void pop() { store_release(&words_->head, ++head_); }
  // After pop(): the bell is to be rung.
  bool wanted() {
    full_fence();
    return load_relaxed(&words_->full) != 0 && __atomic_exchange_n(&words_->full, 0, __ATOMIC_RELAXED) != 0;
  }
  // From now on the producer rings. False: something came meanwhile.
  bool arm() {
    store_relaxed(&words_->armed, 1);
    full_fence();
    return load_acquire(&words_->tail) == head_;
  }
  uint32_t slot_bytes() const { return bytes_; }

 private:
  ShmWords* words_ = nullptr;
  uint8_t* slots_ = nullptr;
  uint32_t count_ = 0, bytes_ = 0;
  uint32_t head_ = 0;
};

}  // namespace kvfs
