// memory_tier.cpp: S3-FIFO over page frames; see memory_tier.h.
#include "memory_tier.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>

#include "check.h"

namespace kvfs {

namespace {
constexpr uint64_t kHuge = 2u << 20;
constexpr uint32_t kMinFrames = 16;
}  // namespace

// Zeroed by the kernel when touched.
template <typename T>
T* MemoryTier::map(uint64_t n, bool huge) {
  void* p = mmap(nullptr, n * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  if (huge) madvise(p, n * sizeof(T), MADV_HUGEPAGE);  // where there are none, small pages do
  return static_cast<T*>(p);
}

MemoryTier::MemoryTier(uint64_t bytes, uint64_t ahead) : ghost_(bytes / kFrame >= kMinFrames ? bytes / kFrame : 1) {
  const uint64_t n = std::min<uint64_t>(bytes / kFrame, UINT32_MAX / 2);
  if (n < kMinFrames) return;
  const uint32_t buckets = std::bit_ceil(static_cast<uint32_t>(n));
  mask_ = buckets - 1;
  frames_ = static_cast<uint32_t>(n);
  base_ = map<uint8_t>(n * kFrame, n * kFrame >= kHuge);
  meta_ = map<Meta>(n + 1, false);
  heads_ = map<uint32_t>(buckets, false);
  sums_ = map<RangeSum>(sum_lines(), false);
  if (base_ && meta_ && heads_ && sums_) {
    ahead_ = ahead > 0;
    if (ahead_) pages_.start(base_, n * kFrame, ahead);
    return;
  }
  unmap();
  frames_ = 0;
}

MemoryTier::~MemoryTier() {
  pages_.stop();
  unmap();
}

void MemoryTier::unmap() {
  if (base_) munmap(base_, uint64_t{frames_} * kFrame);
  if (meta_) munmap(meta_, (uint64_t{frames_} + 1) * sizeof(Meta));
  if (heads_) munmap(heads_, (uint64_t{mask_} + 1) * sizeof(uint32_t));
  if (sums_) munmap(sums_, sum_lines() * sizeof(RangeSum));
  base_ = nullptr;
  meta_ = nullptr;
  heads_ = nullptr;
  sums_ = nullptr;
}

uint64_t MemoryTier::overhead_bytes() const {
  if (!on()) return 0;
  return (uint64_t{frames_} + 1) * sizeof(Meta) + (uint64_t{mask_} + 1) * sizeof(uint32_t) +
         sum_lines() * sizeof(RangeSum) + ghost_.memory_bytes();
}

void MemoryTier::push(uint32_t f, uint32_t queue) {
  Queue& q = queue_[queue];
  Meta& m = meta_[f];
  m.queue = queue & 7;
  m.prev = 0;
  m.next = q.newest;
  if (q.newest)
    meta_[q.newest].prev = f;
  else
    q.oldest = f;
  q.newest = f;
  q.count++;
}

void MemoryTier::unlink(uint32_t f) {
  const Meta& m = meta_[f];
  Queue& q = queue_[m.queue];
  (m.prev ? meta_[m.prev].next : q.newest) = m.next;
  (m.next ? meta_[m.next].prev : q.oldest) = m.prev;
  q.count--;
}

void MemoryTier::unhash(uint32_t f) {
  uint32_t* at = &heads_[bucket(meta_[f].id, meta_[f].page)];
  while (*at != f) {
    KVFS_CHECK(*at != 0);
    at = &meta_[*at].chain;
  }
  *at = meta_[f].chain;
}

// Takes a page out and returns its frame. Every page that is moved instead had been read since it was last looked at, or is
// pinned, which half of the frames are at most.
uint32_t MemoryTier::evict() {
  for (uint32_t turns = 0;; turns++) {
    KVFS_CHECK(turns <= 2 * frames_ + kMaxTurns);
    const bool small = queue_[kSmall].count > frames_ / 10 || queue_[kMain].count == 0;
    const uint32_t f = queue_[small ? kSmall : kMain].oldest;
    Meta& m = meta_[f];
    if ((m.freq > 0 && turns < kMaxTurns) || m.pins > 0) {
      m.freq = small || m.freq == 0 ? 0 : (m.freq - 1) & 15;
      unlink(f);
      push(f, kMain);
      continue;
    }
    if (small) ghost_.add(hash(m.id, m.page));
    unlink(f);
    unhash(f);
    return f;
  }
}

uint8_t* MemoryTier::fill(uint32_t id, uint32_t page) {
  KVFS_CHECK(on() && page <= UINT16_MAX);
  uint32_t f = find(id, page);
  if (f == 0) {
    if (free_ != 0) {
      f = free_;
      free_ = meta_[f].chain;
    } else {
      f = fresh_ < frames_ ? ++fresh_ : evict();
      if (ahead_) pages_.used(uint64_t{fresh_} * kFrame);
    }
    uint32_t& head = heads_[bucket(id, page)];
    Meta& m = meta_[f];
    m.id = id;
    m.page = static_cast<uint16_t>(page);
    m.freq = 0;
    m.chain = head;
    head = f;
    push(f, ghost_.contains(hash(id, page)) ? kMain : kSmall);
  }
  return base_ + uint64_t{f - 1} * kFrame;
}

void MemoryTier::drop(uint32_t id, uint32_t page) {
  // Even if the page has left: the sum of a range does not go with its pages, which may come back with the same bytes.
  RangeSum& sum = sums_[sum_line(id, page)];
  if (sum.id == id && sum.off / kFrame == page) sum.id = 0;
  const uint32_t f = find(id, page);
  if (f == 0) return;
  unlink(f);
  unhash(f);
  meta_[f].id = 0;
  if (meta_[f].pins > 0)
    meta_[f].dropped = 1;
  else
    release(f);
}

void MemoryTier::release(uint32_t f) {
  meta_[f].chain = free_;
  free_ = f;
}

bool MemoryTier::pin(uint32_t f) {
  Meta& m = meta_[f];
  if (m.pins == kMaxPins || (m.pins == 0 && pinned_ >= frames_ / 2)) return false;
  if (m.pins++ == 0) pinned_++;
  return true;
}

void MemoryTier::unpin(uint32_t f) {
  Meta& m = meta_[f];
  KVFS_CHECK(m.pins > 0);
  if (--m.pins > 0) return;
  pinned_--;
  if (!m.dropped) return;
  m.dropped = 0;
  release(f);
}

bool MemoryTier::asked_before(uint32_t id, uint32_t page) {
  const uint64_t h = hash(id, 1u << 16 | page);  // no page that was kept has such a number
  if (ghost_.contains(h)) return true;
  ghost_.add(h);
  return false;
}

}  // namespace kvfs
