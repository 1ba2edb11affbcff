// evict.h owns the choice of which cache block goes next: S3-FIFO on the index itself, without memory per chunk.
//
// A new block is "small" (no kMain flag), one read since it came is promoted to "main" when the hand of the small blocks
// reaches it, one never read goes, and the ghost remembers it: if it comes back soon it is main at once. The hand of the
// main blocks takes one count of use per pass and evicts what has none left. A scan thus pushes out only small blocks,
// which hold three tenths of the bytes (the paper's tenth loses to FIFO on traces of conversations, whose next turn comes
// late; docs/architecture.md has the figures).
// Both queues are sweeps over the ids, which approximate the order of arrival (index.h). Memory: 2.07 bytes per ghost
// entry; one for each id up to 128 Ki, later one for every four to eight ids, which is half a byte per chunk.
#pragma once

#include <cstdint>

#include "checksum.h"
#include "ghost.h"
#include "index.h"

namespace kvfs {

class Evictor {
 public:
  explicit Evictor(Index& index) : index_(index), ghost_(kFirstGhost) {}

  // A chunk that may be evicted (its length is set): a new one, or one found by recovery. Sets kEvictable and kMain.
  void added(uint32_t id, const ChunkKey& key);
  void restored(uint32_t id);
  // Before the entry is erased; any entry.
  void removed(uint32_t id);
  static void touched(Entry& e) {
    if (e.freq() < 3) e.set_freq(e.freq() + 1);
  }
  // The next to go, which the caller drops at once, or 0 after looking at *budget ids (which it counts down).
  // busy(key): the chunk can't go now.
  template <typename Busy>
  uint32_t next(uint32_t* budget, Busy&& busy);

  uint64_t small_bytes() const { return small_bytes_; }
  uint64_t main_bytes() const { return main_bytes_; }
  bool empty() const { return small_bytes_ + main_bytes_ == 0; }
  uint64_t memory_bytes() const { return ghost_.memory_bytes(); }

 private:
  static constexpr uint64_t kFirstGhost = 1u << 10, kFullGhost = 128u << 10;  // entries
  uint64_t hash(const ChunkKey& key) const { return xxh3(&key, sizeof key); }
  bool small_next() const { return small_bytes_ > (small_bytes_ + main_bytes_) / 10 * 3; }

  Index& index_;
  Ghost ghost_;
  uint32_t small_hand_ = 0, main_hand_ = 0;
  uint64_t small_bytes_ = 0, main_bytes_ = 0;
};

template <typename Busy>
uint32_t Evictor::next(uint32_t* budget, Busy&& busy) {
  for (; *budget > 0; --*budget) {
    const bool small = small_next();
    uint32_t& hand = small ? small_hand_ : main_hand_;
    hand = hand >= index_.capacity() ? 1 : hand + 1;
    if (!index_.live(hand)) continue;
    Entry& e = index_.at(hand);
    if (!e.flag(Entry::kEvictable) || e.flag(Entry::kMain) == small) continue;
    const ChunkKey key = index_.key_of(hand);
    if (key.rsv[0] != 0 || busy(key)) continue;
    if (e.freq() > 0) {
      e.set_freq(small ? 0 : e.freq() - 1);
      if (small) {
        e.set_flag(Entry::kMain, true);
        small_bytes_ -= e.len();
        main_bytes_ += e.len();
      }
      continue;
    }
    if (small) ghost_.add(hash(key));
    --*budget;
    return hand;
  }
  return 0;
}

}  // namespace kvfs
