// memory_tier.h owns the DRAM tier: verified 4 KiB pages of hot chunks, found by (index entry id, page of the entry's data).
// S3-FIFO: a page enters the small queue (a tenth of the frames), is promoted to the main queue if it was read again
// before it leaves it, and goes straight to main if it comes back while the ghost remembers it. One scan thus replaces
// only the small queue. It knows nothing of chunks: the store drops pages before their id gets other bytes.
// A pinned frame keeps its bytes until it is unpinned, though its page may be dropped meanwhile. At most half of the frames are.
// Sums of ranges are remembered beside them: one for each first page, until that page is dropped or another needs the place.
// Memory: the frames, plus at most 36 bytes a frame (0.9 %). Nothing is touched before it is used, but for the frames that a
// thread gives their pages ahead (page_maker.h); nothing is allocated after construction.
#pragma once

#include <cstdint>
#include <memory>

#include "ghost.h"
#include "page_maker.h"

namespace kvfs {

class MemoryTier {
 public:
  static constexpr uint32_t kFrame = 4096;

  // Fewer than 16 frames, or no memory: the tier is off. ahead: bytes that have pages before they are used; 0: no thread.
  explicit MemoryTier(uint64_t bytes, uint64_t ahead = 0);
  ~MemoryTier();
  MemoryTier(const MemoryTier&) = delete;
  MemoryTier& operator=(const MemoryTier&) = delete;

  bool on() const { return frames_ != 0; }
  uint32_t frames() const { return frames_; }
  uint32_t resident() const { return queue_[kSmall].count + queue_[kMain].count; }
  uint64_t overhead_bytes() const;

  // The frame that holds the page, or 0.
  uint32_t find(uint32_t id, uint32_t page) const {
    uint32_t f = heads_[bucket(id, page)];
    while (f != 0 && !(meta_[f].id == id && meta_[f].page == page)) f = meta_[f].chain;
    return f;
  }
  // The same, and quicker where the pages of an entry were filled one after the other: `before` is the frame of the page
  // before it, or 0.
  uint32_t find_next(uint32_t before, uint32_t id, uint32_t page) const {
    const uint32_t f = before + 1;
    return f <= frames_ && meta_[f].id == id && meta_[f].page == page ? f : find(id, page);
  }
  const uint8_t* data(uint32_t frame) const { return base_ + uint64_t{frame - 1} * kFrame; }
  void touch(uint32_t frame) {
    if (meta_[frame].freq < 3) meta_[frame].freq++;
  }
  // The frame for the page's bytes, which the caller writes at once; another page may go. page < 65536.
  uint8_t* fill(uint32_t id, uint32_t page);
  void drop(uint32_t id, uint32_t page);
  // Whether `n` bytes can be filled in without waiting for the kernel to make pages; always true without the thread.
  bool ready(uint32_t n) const {
    if (!ahead_ || fresh_ == frames_) return true;
    const uint64_t made = pages_.made();
    return made == uint64_t{frames_} * kFrame || uint64_t{fresh_} * kFrame + n <= made;
  }

  // One more who reads the frame's bytes later; false: too many do. Each is unpinned once.
  bool pin(uint32_t frame);
  void unpin(uint32_t frame);
  uint32_t pinned() const { return pinned_; }
  const uint8_t* memory() const { return base_; }

  // The sum of [off, off + len) of the entry's data, and maybe of others' behind it, which are dropped with it.
  struct RangeSum {
    uint64_t sum;
    uint32_t id, off, len;
    uint32_t uses;
  };
  static constexpr uint32_t kMinSummed = 4 * kFrame;  // a shorter range is summed as fast as its sum is found
  // What is remembered of exactly this range, or null. Valid until the next call that is not const.
  RangeSum* range_sum(uint32_t id, uint32_t off, uint32_t len) {
    RangeSum* s = &sums_[sum_line(id, off / kFrame)];
    return s->id == id && s->off == off && s->len == len ? s : nullptr;
  }
  // len >= kMinSummed; off / kFrame < 65536, and dropping that page forgets the sum.
  void remember_sum(uint32_t id, uint32_t off, uint32_t len, uint64_t sum) {
    sums_[sum_line(id, off / kFrame)] = {sum, id, off, len, 0};
  }

  // For what is not worth a copy at its first read: whether this id, or one page of it, was asked for before, and remembers
  // that it was. page < 65536.
  bool asked_before(uint32_t id, uint32_t page = 0);

  // First the one for all of a batch, then the other.
  void prefetch(uint32_t id, uint32_t page) const { __builtin_prefetch(&heads_[bucket(id, page)]); }
  void prefetch_meta(uint32_t id, uint32_t page) const { __builtin_prefetch(&meta_[heads_[bucket(id, page)]]); }

 private:
  static constexpr uint32_t kSmall = 0, kMain = 1;
  static constexpr uint8_t kMaxPins = UINT8_MAX;
  static constexpr uint32_t kMaxTurns = 64;  // pages of main given another round in one eviction
  struct Meta {
    uint32_t id;
    uint32_t chain;       // next frame in the hash bucket, or the free list
    uint32_t prev, next;  // in the queue, towards its newest / its oldest page
    uint16_t page;
    uint8_t freq : 4;
    uint8_t queue : 3;
    uint8_t dropped : 1;  // holds no page any more, but is pinned
    uint8_t pins;
  };
  static_assert(sizeof(Meta) == 20);
  struct Queue {
    uint32_t newest = 0, oldest = 0, count = 0;
  };

  static uint64_t hash(uint32_t id, uint32_t page) {
    uint64_t h = (uint64_t{id} << 17 | page) * 0x9e3779b97f4a7c15ull;
    h ^= h >> 32;
    return h * 0xd6e8feb86659fd93ull;
  }
  uint32_t bucket(uint32_t id, uint32_t page) const { return static_cast<uint32_t>(hash(id, page) >> 32) & mask_; }
  uint32_t sum_lines() const { return (mask_ >> 4) + 1; }
  uint32_t sum_line(uint32_t id, uint32_t page) const { return bucket(id, page) >> 4; }
  void push(uint32_t f, uint32_t queue);
  void unlink(uint32_t f);
  void unhash(uint32_t f);
  void release(uint32_t f);
  uint32_t evict();
  void unmap();
  template <typename T>
  static T* map(uint64_t n, bool huge);

  bool ahead_ = false;
  uint32_t frames_ = 0;
  uint32_t fresh_ = 0;  // frames ever used
  uint32_t free_ = 0;   // list of dropped ones
  uint32_t pinned_ = 0;
  uint32_t mask_ = 0;
  uint8_t* base_ = nullptr;
  Meta* meta_ = nullptr;  // [1..frames_]
  uint32_t* heads_ = nullptr;
  RangeSum* sums_ = nullptr;  // id 0: free
  Queue queue_[2];
  Ghost ghost_;
  PageMaker pages_;
};

}  // namespace kvfs
