// evict.cpp: the bookkeeping of evict.h.
#include "evict.h"

#include <algorithm>

#include "checksum.h"

namespace kvfs {

void Evictor::added(uint32_t id, const ChunkKey& key) {
  Entry& e = index_.at(id);
  e.set_flag(Entry::kEvictable, true);
  e.set_flag(Entry::kMain, ghost_.contains(hash(key)));
  (e.flag(Entry::kMain) ? main_bytes_ : small_bytes_) += e.len();
  const uint64_t ids = index_.capacity();
  ghost_.grow(std::max(std::min(ids, kFullGhost), ids / 8));
}

void Evictor::restored(uint32_t id) {
  Entry& e = index_.at(id);
  e.set_flag(Entry::kMain, false);
  small_bytes_ += e.len();
}

void Evictor::removed(uint32_t id) {
  const Entry& e = index_.at(id);
  if (e.flag(Entry::kEvictable)) (e.flag(Entry::kMain) ? main_bytes_ : small_bytes_) -= e.len();
}

}  // namespace kvfs
