// ghost.h owns the memory of what was evicted lately: 16-bit fingerprints in buckets of one cache line, each a FIFO of 31.
// About `entries` additions are remembered, oldest forgotten first. 2.07 bytes an entry; a stranger is taken for one
// remembered with probability 31/65536.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

namespace kvfs {

class Ghost {
 public:
  explicit Ghost(uint64_t entries) : lines_(buckets_for(entries)) {}

  void add(uint64_t hash) {
    Line& l = lines_[bucket(hash)];
    l.fp[l.at] = fingerprint(hash);
    if (++l.at == kWays) l.at = 0;
  }
  bool contains(uint64_t hash) const {
    const Line& l = lines_[bucket(hash)];
    const uint16_t fp = fingerprint(hash);
    bool any = false;
    for (uint32_t i = 0; i < kWays; i++) any |= l.fp[i] == fp;
    return any;
  }
  // Makes room for more; what was remembered stays (in both halves: the wrong copy ages out).
  void grow(uint64_t entries) {
    while (lines_.size() < buckets_for(entries)) {
      const size_t n = lines_.size();
      lines_.resize(n * 2);
      std::memcpy(&lines_[n], &lines_[0], n * sizeof(Line));
    }
  }
  uint64_t entries() const { return lines_.size() * kWays; }
  uint64_t memory_bytes() const { return lines_.size() * sizeof(Line); }

 private:
  static constexpr uint32_t kWays = 31;
  struct alignas(64) Line {
    uint16_t fp[kWays] = {};  // 0 = empty
    uint16_t at = 0;          // the oldest, replaced next
  };
  static uint64_t buckets_for(uint64_t entries) { return std::bit_ceil((entries + kWays - 1) / kWays | 1); }
  static uint16_t fingerprint(uint64_t hash) {
    const auto fp = static_cast<uint16_t>(hash >> 48);
    return fp ? fp : 1;
  }
  uint64_t bucket(uint64_t hash) const { return hash & (lines_.size() - 1); }
  std::vector<Line> lines_;
};

}  // namespace kvfs
