// allocator.h owns the use of data space: which segment holds which size class, and which slots are free.
// Purely in memory; rebuilt from the index at open. Freed slots come back only through release(), which the store calls
// once neither the journal nor a reader can need the old bytes.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "layout.h"
#include "size_class.h"

namespace kvfs {

class Allocator {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;
  explicit Allocator(const Geometry& geo, uint32_t align);

  // Device offset of a free slot for `len` bytes, or 0: of the smallest class that fits, or of a larger one when no segment
  // is left to give to that class. Leaves `reserve` segments free (for the next checkpoint).
  uint64_t alloc(uint32_t len, uint32_t reserve);
  void release(uint64_t off);
  // Recovery: marks the slot at `off`, in a segment of class `cls`, used. False if off is no slot of it or is taken.
  bool claim(uint64_t off, uint8_t cls);
  // Whole segments, for checkpoints.
  uint32_t take_segment();
  void give_segment(uint32_t seg);
  bool claim_segment(uint32_t seg);

  uint64_t trailer_off(uint64_t slot_off) const;  // 0: this class has none
  uint8_t class_at(uint64_t slot_off) const { return segs_[segment_of(slot_off)].cls; }
  uint32_t slot_bytes(uint64_t slot_off) const;  // payload plus trailer

  uint32_t free_segments() const { return static_cast<uint32_t>(free_.size()); }
  uint64_t free_slot_bytes() const { return free_slot_bytes_; }
  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t capacity_bytes() const { return uint64_t{geo_.segments} * geo_.stride(); }
  // The segment (of a class with other segments or not) with the fewest used slots, for defragmentation; kNone if none.
  uint32_t sparsest(double max_fill) const;
  uint32_t segment_of(uint64_t off) const { return static_cast<uint32_t>((off - geo_.data_off()) / geo_.stride()); }
  bool draining(uint32_t seg) const { return segs_[seg].draining; }
  void set_draining(uint32_t seg, bool on);
  void set_stuck(uint32_t seg) { segs_[seg].stuck = true; }
  void clear_stuck();

 private:
  static constexpr uint8_t kFree = 255, kCheckpoint = 254;
  struct Segment {
    uint8_t cls = kFree;
    bool stuck = false;     // could not be emptied; not tried again before clear_stuck
    bool draining = false;  // gets no new slots
    uint32_t used = 0, slots = 0, hint = 0;
    uint32_t list_pos = kNone;   // position in partial_[cls]
    std::vector<uint64_t> bits;  // 1 = used
  };
  uint32_t class_slot_bytes(uint8_t c) const;
  void start_class(uint32_t seg, uint8_t c);
  void list_add(uint32_t seg);
  void list_remove(uint32_t seg);
  bool locate(uint64_t off, uint32_t* seg, uint32_t* slot) const;

  Geometry geo_;
  uint32_t align_;
  std::vector<Segment> segs_;
  std::vector<uint32_t> free_;
  std::array<std::vector<uint32_t>, 256> partial_;  // segments of a class with a free slot
  uint64_t free_slot_bytes_ = 0, used_bytes_ = 0;
};

}  // namespace kvfs
