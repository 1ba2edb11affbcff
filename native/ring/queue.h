// queue.h owns the single-producer/single-consumer rules of a ring: who reads and writes which index, in which order.
// ClientRing is used by the process that submits, DaemonRing by the reactor. Layout: native/include/kvfs_ring.h.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "../include/kvfs_ring.h"

namespace kvfs {

inline uint32_t load_relaxed(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
inline uint32_t load_acquire(const uint32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void store_relaxed(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
inline void store_release(uint32_t* p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }

// Orders a store before a later load of another location (the sleeper's flag against the waker's index). A
// sequentially consistent read-modify-write is as strong on every target and, unlike a bare fence, is understood by
// ThreadSanitizer.
inline void full_fence() {
#if defined(__SANITIZE_THREAD__)
  static std::atomic<uint32_t> word{0};
  word.fetch_add(1, std::memory_order_seq_cst);
#else
  std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline bool ring_entries_ok(uint32_t n) {
  return n >= KVFS_RING_MIN_ENTRIES && n <= KVFS_RING_MAX_ENTRIES && (n & (n - 1)) == 0;
}

// Bytes of the mapping, whole 4 KiB pages.
inline uint64_t ring_bytes(uint32_t entries) {
  uint64_t n = sizeof(kvfs_ring_hdr) + uint64_t(entries) * (sizeof(kvfs_sqe) + sizeof(kvfs_cqe));
  return (n + 4095) & ~uint64_t(4095);
}

// Writes a fresh header into zeroed memory of ring_bytes(entries).
inline void ring_format(void* mem, uint32_t entries) {
  auto* h = static_cast<kvfs_ring_hdr*>(mem);
  h->magic = KVFS_RING_MAGIC;
  h->version = KVFS_RING_VERSION;
  h->entries = entries;
  h->sqe_off = sizeof(kvfs_ring_hdr);
  h->cqe_off = uint32_t(sizeof(kvfs_ring_hdr) + entries * sizeof(kvfs_sqe));
}

// The submitting side. Its own indices are private; the shared ones are written for the daemon, or read from it.
class ClientRing {
 public:
  // The client trusts the daemon (it made the memory) but still refuses a layout it does not know.
  int attach(void* mem, uint64_t bytes) {
    auto* h = static_cast<kvfs_ring_hdr*>(mem);
    if (bytes < sizeof *h || h->magic != KVFS_RING_MAGIC || h->version != KVFS_RING_VERSION) return -EPROTO;
    if (!ring_entries_ok(h->entries) || bytes < ring_bytes(h->entries)) return -EPROTO;
    hdr_ = h;
    entries_ = h->entries;
    sqes_ = reinterpret_cast<kvfs_sqe*>(static_cast<char*>(mem) + sizeof *h);
    cqes_ = reinterpret_cast<kvfs_cqe*>(sqes_ + entries_);
    sq_tail_ = published_ = cq_head_ = 0;
    return 0;
  }

  // In flight = taken from next() and not yet popped. Bounding it by `entries` bounds both queues at once, so that
  // sq_head never has to be read: a CQE popped means that its SQE was consumed.
  kvfs_sqe* next() {
    if (sq_tail_ - cq_head_ >= entries_) return nullptr;
    kvfs_sqe* s = &sqes_[sq_tail_++ & (entries_ - 1)];
    memset(s, 0, sizeof *s);
    return s;
  }

  // Returns true if the daemon sleeps and its eventfd must be written.
  bool publish() {
    if (published_ == sq_tail_) return false;
    published_ = sq_tail_;
    store_release(&hdr_->sq_tail, sq_tail_);  // release: the SQE bytes above are visible to who acquires this tail
    full_fence();  // tail before flag; the daemon does flag, fence, tail: one of the two sees the other (no lost wake)
    return load_relaxed(&hdr_->sq_need_wake) != 0;
  }

  // acquire: pairs with the daemon's release of cq_tail; the CQE bytes and the I/O's data are visible after it.
  uint32_t ready() const { return load_acquire(&hdr_->cq_tail) - cq_head_; }

  int pop(kvfs_cqe* out, int max) {
    uint32_t n = ready();
    if (n > uint32_t(max)) n = uint32_t(max);
    if (n == 0) return 0;
    for (uint32_t i = 0; i < n; ++i) out[i] = cqes_[(cq_head_ + i) & (entries_ - 1)];
    cq_head_ += n;
    store_release(&hdr_->cq_head, cq_head_);  // release: our reads of the CQEs are done before the daemon reuses them
    return int(n);
  }

  // Sleep protocol: flag, fence, look again (ready()), then futex-wait on cq_tail with the value returned here. The daemon
  // wakes once `min` completions are there.
  uint32_t arm(uint32_t min = 1, uint32_t how = KVFS_WAKE_FUTEX) {
    store_relaxed(&hdr_->cq_wake_at, cq_head_ + min);
    store_release(&hdr_->cq_need_wake, how);  // release: who sees the flag sees the mark
    full_fence();                             // flag before tail, see DaemonRing::publish
    return load_acquire(&hdr_->cq_tail);
  }
  void disarm() { store_relaxed(&hdr_->cq_need_wake, 0); }  // relaxed: a wake too many does no harm

  uint32_t broken() const { return load_relaxed(&hdr_->broken); }
  uint32_t inflight() const { return sq_tail_ - cq_head_; }
  uint32_t unpublished() const { return sq_tail_ - published_; }
  uint32_t entries() const { return entries_; }
  uint32_t cq_head() const { return cq_head_; }
  uint32_t* futex_word() { return &hdr_->cq_tail; }

 private:
  kvfs_ring_hdr* hdr_ = nullptr;
  kvfs_sqe* sqes_ = nullptr;
  kvfs_cqe* cqes_ = nullptr;
  uint32_t entries_ = 0;
  uint32_t sq_tail_ = 0, published_ = 0, cq_head_ = 0;
};

// The serving side. Trusts nothing in the memory: entries_ and all indices it acts on are private copies; the client's
// two indices are read at most once per turn (refresh) and checked; each SQE is copied once.
class DaemonRing {
 public:
  void attach(void* mem, uint32_t entries) {
    hdr_ = static_cast<kvfs_ring_hdr*>(mem);
    entries_ = entries;
    sqes_ = reinterpret_cast<kvfs_sqe*>(static_cast<char*>(mem) + sizeof(kvfs_ring_hdr));
    cqes_ = reinterpret_cast<kvfs_cqe*>(sqes_ + entries);
  }

  // Once per turn. Returns how many SQEs may be taken now; marks the ring broken if the client's indices are
  // impossible. A CQE slot is reserved for each SQE taken, so the CQ cannot overflow however the client behaves.
  uint32_t refresh() {
    if (broken_) return 0;
    uint32_t tail = load_acquire(&hdr_->sq_tail);  // acquire: the SQEs up to tail are visible
    if (tail == sq_head_) return 0;
    uint32_t chead = load_acquire(&hdr_->cq_head);  // acquire: the client has finished reading the slots before it
    uint32_t avail = tail - sq_head_;
    uint32_t unread = cq_tail_ - chead;  // published or pending in this turn, not yet read by the client
    if (avail > entries_ || unread > entries_) {
      give_up(EPROTO);
      return 0;
    }
    uint32_t room = entries_ - unread;
    room = room > reserved_ ? room - reserved_ : 0;
    return avail < room ? avail : room;
  }

  // Only after refresh() allowed it. Copies through a volatile-free memcpy of 128 bytes; the copy is all that counts.
  void take(kvfs_sqe* copy) {
    memcpy(copy, &sqes_[sq_head_ & (entries_ - 1)], sizeof *copy);
    // The compiler must not go back to shared memory for fields of the copy.
    asm volatile("" : : "r"(copy) : "memory");
    ++sq_head_;
    ++reserved_;
  }

  // Visible to the client at the next publish().
  void complete(uint64_t user_data, int64_t result) {
    kvfs_cqe* c = &cqes_[cq_tail_ & (entries_ - 1)];
    c->user_data = user_data;
    c->result = result;
    ++cq_tail_;
    --reserved_;
  }

  bool dirty() const { return published_ != cq_tail_; }

  // Once per turn. Returns how the client must be woken (KVFS_WAKE_*), 0 if it does not sleep.
  uint32_t publish() {
    store_release(&hdr_->sq_head, sq_head_);  // for diagnostics; clients bound themselves by CQEs
    if (published_ == cq_tail_) return 0;
    published_ = cq_tail_;
    store_release(&hdr_->cq_tail, cq_tail_);  // release: CQE bytes and data before the tail
    full_fence();  // tail before flag; the client does flag, fence, tail: one of the two sees the other
    const uint32_t how = load_acquire(&hdr_->cq_need_wake);  // acquire: cq_wake_at is at least as new
    return how != 0 && static_cast<int32_t>(cq_tail_ - load_relaxed(&hdr_->cq_wake_at)) >= 0 ? how : 0;
  }

  // Sleep protocol of the daemon: set the flag on every ring, one full_fence(), then look for SQEs once more.
  void need_wake(bool on) { store_relaxed(&hdr_->sq_need_wake, on ? 1 : 0); }
  bool has_sqes() const { return !broken_ && load_acquire(&hdr_->sq_tail) != sq_head_; }
  // As has_sqes, but true only if refresh() would let one be taken: a full CQ must not keep the daemon awake.
  bool can_take() const {
    if (!has_sqes()) return false;
    uint32_t unread = cq_tail_ - load_acquire(&hdr_->cq_head);
    return unread > entries_ || unread + reserved_ < entries_;
  }

  // Errno shown to the client; nothing is taken any more, completions in flight still land in their reserved slots.
  void give_up(int err) {
    broken_ = err;
    store_release(&hdr_->broken, uint32_t(err));
  }

  int broken() const { return broken_; }
  uint32_t reserved() const { return reserved_; }
  uint32_t* futex_word() { return &hdr_->cq_tail; }

 private:
  kvfs_ring_hdr* hdr_ = nullptr;
  kvfs_sqe* sqes_ = nullptr;
  kvfs_cqe* cqes_ = nullptr;
  uint32_t entries_ = 0;
  uint32_t sq_head_ = 0, cq_tail_ = 0, published_ = 0;
  uint32_t reserved_ = 0;  // SQEs taken whose CQE has not been written; <= entries_
  int broken_ = 0;
};

}  // namespace kvfs
