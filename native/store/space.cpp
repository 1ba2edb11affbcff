// space.cpp owns room for puts: what the checkpoint needs, eviction of cache blocks by watermarks, and requests that wait.
#include <errno.h>

#include <algorithm>

#include "store_impl.h"

namespace kvfs {

// Segments for a checkpoint of everything that is there and of `more` new pieces. What was deleted without a barrier,
// and so may come back in a crash, is in quarantine.
uint64_t StoreImpl::checkpoint_need(uint32_t more) const {
  const uint64_t per = uint64_t{geo_.pages_per_segment()} * kPageRecords;
  const uint64_t entries =
      uint64_t{index_.size()} + quarantine_.size() + uint64_t{writes_in_flight_} * kMaxPieces + more;
  return (entries + per - 1) / per;
}

// Free segments to leave, so that the next checkpoint fits, here or in the recovery after a crash. Whichever checkpoint
// the crash leaves in force (the current one of C segments, or the next one of up to `need`), `need` others must be free:
// free + C >= 2 * need, and free >= need. UINT32_MAX: no checkpoint holds as many.
uint32_t StoreImpl::reserve_segments(uint32_t more) const {
  const uint64_t need = checkpoint_need(more);
  if (need > kMaxCheckpointSegments) return UINT32_MAX;
  const uint64_t free = need + (need > super_.checkpoint_segments ? need - super_.checkpoint_segments : 0);
  const uint32_t taken = ck_ == Ck::Idle ? 0 : ck_super_.checkpoint_segments;  // by the checkpoint under way
  return static_cast<uint32_t>(free > taken ? free - taken : 0);
}

// Bytes that nothing can be put into: all but free segments, free slots and what the next barrier frees.
uint64_t StoreImpl::taken_bytes() const {
  const uint64_t free = uint64_t{alloc_->free_segments()} * geo_.stride() + alloc_->free_slot_bytes();
  return alloc_->capacity_bytes() - std::min(alloc_->capacity_bytes(), free + quarantined_bytes_);
}

// Eviction begins above this: early enough for puts to find a segment beside those kept for the checkpoint.
uint64_t StoreImpl::high_mark() const {
  const uint64_t capacity = alloc_->capacity_bytes();
  const auto mark = static_cast<uint64_t>(opt_.high_watermark * static_cast<double>(capacity));
  const uint64_t keep = (uint64_t{reserve_segments(kMaxPieces)} + 2) * geo_.stride();
  return keep < capacity / 2 ? std::min(mark, capacity - keep) : mark;
}

uint64_t StoreImpl::room() const {
  if (opt_.read_only || failed_) return 0;
  const uint64_t keep = uint64_t{reserve_segments(kMaxPieces)} + 2, free = alloc_->free_segments();
  return free > keep ? (free - keep) * geo_.stride() : 0;
}

bool StoreImpl::can_evict() const { return !evictor_.empty() && barren_ <= 8 * uint64_t{index_.capacity()} + 4096; }

// Below the watermarks nothing has to wait: blocks go before the space is needed, and their slots come back with a barrier
// of its own accord. Puts that wait nevertheless get what they need evicted at once.
void StoreImpl::keep_room() {
  const uint64_t high = high_mark(), taken = taken_bytes();
  const auto gap =
      static_cast<uint64_t>((opt_.high_watermark - opt_.low_watermark) * static_cast<double>(alloc_->capacity_bytes()));
  low_mark_ = high - std::min(high, gap);
  if (taken > high) evicting_ = true;
  if (evicting_ || !space_wait_.empty()) evict_step(4096);
  if (taken_bytes() <= low_mark_) evicting_ = false;
  if (quarantine_.empty() || taken_bytes() + quarantined_bytes_ <= high) return;
  if (quarantine_.back().seq > (flush_busy_ ? flush_target_ : flushed_seq_)) flush_wanted_ = true;
}

// Looks at `budget` ids at most.
void StoreImpl::evict_step(uint32_t budget) {
  uint64_t waiting = 0;  // bytes; a segment more, since what is freed may have the wrong sizes
  for (const Request* r : space_wait_) waiting += r->len;
  if (waiting) waiting += geo_.stride();
  while (budget && can_evict() && ((evicting_ && taken_bytes() > low_mark_) || quarantined_bytes_ < waiting)) {
    if (needs_stall()) {
      ck_wanted_ = true;
      return;
    }
    const uint32_t before = budget;
    const uint32_t id = evictor_.next(&budget, [this](const ChunkKey& key) { return locks_.contains(key); });
    barren_ = id ? 0 : barren_ + before;
    if (!id) return;
    drop_chunk(id, 0);
    st_.evictions++;
  }
}

void StoreImpl::wait_for_space(Request* r) {
  st_.space_waits++;
  space_wait_.push_back(r);
  flush_wanted_ = true;
  barren_ = 0;
}

// Something under way may free slots, and its end leads to another tick.
bool StoreImpl::space_may_come() const {
  return writes_in_flight_ || !quarantine_.empty() || flush_busy_ || group_busy_ || !open_.empty() || ck_ != Ck::Idle;
}

// Slots come back after a barrier. When nothing can come back any more, the device is full.
void StoreImpl::retry_space_waiters() {
  if (space_wait_.empty() || failed_) return;
  const bool more = space_may_come();
  const bool evictable = can_evict();
  std::deque<Request*> again;
  again.swap(space_wait_);
  for (Request* r : again) {
    const uint32_t len = std::min(r->len, kPieceMax);
    const bool whole = r->op == Request::Op::Put;
    const uint32_t reserve = reserve_segments(whole ? pieces_of(r->len) : 1);
    const uint32_t first = std::max(whole ? len : std::min(r->off + r->len, kPieceMax), 1u);
    const uint64_t probe = alloc_->free_segments() < reserve ? 0 : alloc_->alloc(first, reserve);
    if (probe) {
      alloc_->release(probe);
      uint32_t tries;
      std::memcpy(&tries, r->priv, sizeof tries);
      tries++;
      std::memcpy(r->priv, &tries, sizeof tries);
      if (tries < 64) {
        r->op == Request::Op::Put ? start_put(r) : r->op == Request::Op::Write ? start_write(r) : start_truncate(r);
        continue;
      }
    }
    if (!more && !evictable && !can_defragment()) {
      unlock(r->key);
      complete(r, -ENOSPC);
      continue;
    }
    space_wait_.push_back(r);
  }
}

}  // namespace kvfs
