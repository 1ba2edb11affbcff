// allocator.cpp implements allocator.h: a bitmap per segment, a list of segments with room per class.
#include "allocator.h"

#include <algorithm>

#include "check.h"

namespace kvfs {

Allocator::Allocator(const Geometry& geo, uint32_t align) : geo_(geo), align_(align), segs_(geo.segments) {
  free_.reserve(geo.segments);
  for (uint32_t s = geo.segments; s-- > 0;) free_.push_back(s);  // lowest first
}

uint32_t Allocator::class_slot_bytes(uint8_t c) const {
  return static_cast<uint32_t>(round_up(class_bytes(c), align_) + round_up(trailer_bytes(c), align_));
}

void Allocator::start_class(uint32_t seg, uint8_t c) {
  Segment& s = segs_[seg];
  s.cls = c;
  s.used = 0;
  s.hint = 0;
  s.draining = false;
  s.slots = static_cast<uint32_t>(geo_.stride() / class_slot_bytes(c));
  KVFS_CHECK(s.slots > 0);
  s.bits.assign((s.slots + 63) / 64, 0);
  free_slot_bytes_ += uint64_t{s.slots} * class_slot_bytes(c);
  list_add(seg);
}

void Allocator::list_add(uint32_t seg) {
  Segment& s = segs_[seg];
  if (s.list_pos != kNone) return;
  auto& list = partial_[s.cls];
  s.list_pos = static_cast<uint32_t>(list.size());
  list.push_back(seg);
}

void Allocator::list_remove(uint32_t seg) {
  Segment& s = segs_[seg];
  if (s.list_pos == kNone) return;
  auto& list = partial_[s.cls];
  const uint32_t last = list.back();
  list[s.list_pos] = last;
  segs_[last].list_pos = s.list_pos;
  list.pop_back();
  s.list_pos = kNone;
}

uint64_t Allocator::alloc(uint32_t len, uint32_t reserve) {
  uint8_t c = class_of(len);
  if (partial_[c].empty()) {
    if (free_.size() > reserve) {
      const uint32_t seg = free_.back();
      free_.pop_back();
      start_class(seg, c);
    } else {
      while (c < kSizeClasses && partial_[c].empty()) c++;
      if (c == kSizeClasses) return 0;
    }
  }
  const uint32_t seg = partial_[c].back();
  Segment& s = segs_[seg];
  const uint32_t words = static_cast<uint32_t>(s.bits.size());
  for (uint32_t i = 0; i < words; i++) {
    const uint32_t w = (s.hint + i) % words;
    uint64_t open = ~s.bits[w];
    if (w == words - 1 && s.slots % 64 != 0) open &= (1ULL << (s.slots % 64)) - 1;
    if (open == 0) continue;
    const uint32_t slot = w * 64 + static_cast<uint32_t>(__builtin_ctzll(open));
    s.bits[w] |= 1ULL << (slot % 64);
    s.hint = w;
    s.used++;
    free_slot_bytes_ -= class_slot_bytes(c);
    used_bytes_ += class_slot_bytes(c);
    if (s.used == s.slots) list_remove(seg);
    return geo_.segment_off(seg) + uint64_t{slot} * round_up(class_bytes(c), align_);
  }
  KVFS_CHECK(!"a listed segment has a free slot");
  return 0;
}

bool Allocator::locate(uint64_t off, uint32_t* seg, uint32_t* slot) const {
  if (off < geo_.data_off()) return false;
  const uint64_t s = (off - geo_.data_off()) / geo_.stride();
  if (s >= geo_.segments || segs_[s].cls >= kCheckpoint) return false;
  const uint64_t in = off - geo_.segment_off(static_cast<uint32_t>(s));
  const uint64_t unit = round_up(class_bytes(segs_[s].cls), align_);
  if (in % unit != 0 || in / unit >= segs_[s].slots) return false;
  *seg = static_cast<uint32_t>(s);
  *slot = static_cast<uint32_t>(in / unit);
  return true;
}

void Allocator::release(uint64_t off) {
  uint32_t seg, slot;
  KVFS_CHECK(locate(off, &seg, &slot));
  Segment& s = segs_[seg];
  const uint64_t bit = 1ULL << (slot % 64);
  KVFS_CHECK(s.bits[slot / 64] & bit);
  s.bits[slot / 64] &= ~bit;
  s.used--;
  s.hint = slot / 64;
  const uint32_t bytes = class_slot_bytes(s.cls);
  used_bytes_ -= bytes;
  free_slot_bytes_ += bytes;
  if (s.used == 0) {
    list_remove(seg);
    free_slot_bytes_ -= uint64_t{s.slots} * bytes;
    s = Segment{};
    free_.push_back(seg);
  } else if (!s.draining) {
    list_add(seg);
  }
}

bool Allocator::claim(uint64_t off, uint8_t c) {
  if (off < geo_.data_off() || c >= kSizeClasses) return false;
  const uint64_t n = (off - geo_.data_off()) / geo_.stride();
  if (n >= geo_.segments) return false;
  Segment& s = segs_[n];
  if (s.cls == kFree) {
    auto it = std::find(free_.begin(), free_.end(), static_cast<uint32_t>(n));
    KVFS_CHECK(it != free_.end());
    *it = free_.back();
    free_.pop_back();
    start_class(static_cast<uint32_t>(n), c);
  }
  uint32_t seg, slot;
  if (s.cls != c || !locate(off, &seg, &slot) || (s.bits[slot / 64] >> (slot % 64) & 1)) return false;
  s.bits[slot / 64] |= 1ULL << (slot % 64);
  s.used++;
  free_slot_bytes_ -= class_slot_bytes(c);
  used_bytes_ += class_slot_bytes(c);
  if (s.used == s.slots) list_remove(seg);
  return true;
}

uint32_t Allocator::take_segment() {
  if (free_.empty()) return kNone;
  const uint32_t seg = free_.back();
  free_.pop_back();
  segs_[seg].cls = kCheckpoint;
  return seg;
}

void Allocator::give_segment(uint32_t seg) {
  KVFS_CHECK(segs_[seg].cls == kCheckpoint);
  segs_[seg].cls = kFree;
  free_.push_back(seg);
}

bool Allocator::claim_segment(uint32_t seg) {
  if (seg >= geo_.segments || segs_[seg].cls != kFree) return false;
  auto it = std::find(free_.begin(), free_.end(), seg);
  KVFS_CHECK(it != free_.end());
  *it = free_.back();
  free_.pop_back();
  segs_[seg].cls = kCheckpoint;
  return true;
}

uint64_t Allocator::trailer_off(uint64_t slot_off) const {
  uint32_t seg, slot;
  KVFS_CHECK(locate(slot_off, &seg, &slot));
  const Segment& s = segs_[seg];
  const uint32_t t = trailer_bytes(s.cls);
  if (t == 0) return 0;
  return geo_.segment_off(seg) + uint64_t{s.slots} * round_up(class_bytes(s.cls), align_) +
         uint64_t{slot} * round_up(t, align_);
}

uint32_t Allocator::slot_bytes(uint64_t slot_off) const {
  uint32_t seg, slot;
  KVFS_CHECK(locate(slot_off, &seg, &slot));
  return class_slot_bytes(segs_[seg].cls);
}

uint32_t Allocator::sparsest(double max_fill) const {
  uint32_t best = kNone;
  double best_fill = max_fill;
  for (uint32_t s = 0; s < geo_.segments; s++) {
    const Segment& seg = segs_[s];
    if (seg.cls >= kCheckpoint || seg.draining || seg.stuck || seg.used == 0) continue;
    const double fill = static_cast<double>(seg.used) / seg.slots;
    if (fill < best_fill) {
      best_fill = fill;
      best = s;
    }
  }
  return best;
}

void Allocator::clear_stuck() {
  for (Segment& s : segs_) s.stuck = false;
}

void Allocator::set_draining(uint32_t seg, bool on) {
  Segment& s = segs_[seg];
  if (s.cls >= kCheckpoint) return;
  s.draining = on;
  if (on) {
    list_remove(seg);
  } else if (s.used < s.slots) {
    list_add(seg);
  }
}

}  // namespace kvfs
