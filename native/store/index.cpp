// index.cpp: linear hashing over slab-allocated entries; see index.h.
#include "index.h"

#include <sys/mman.h>
#include <sys/random.h>

#include <bit>
#include <cerrno>
#include <cstring>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace kvfs {
namespace {

constexpr uint32_t kFirstBuckets = 1024;
constexpr uint32_t kLoadFactor = 3;  // entries per bucket: 62 + 4/3 bytes a chunk keeps the whole index within 64

uint64_t prefix_of_key(const ChunkKey& key) {
  uint64_t v;
  std::memcpy(&v, &key, sizeof v);
  return v;
}

}  // namespace

Index::Arena::~Arena() {
  for (char* r : regions) munmap(r, kRegion);
}

void* Index::Arena::piece(size_t bytes) {
  if (kRegion - used < bytes) {
    void* p =
        mmap(nullptr, kRegion + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    char* at = static_cast<char*>(p);
    const size_t skip = (kHuge - reinterpret_cast<uintptr_t>(at) % kHuge) % kHuge;  // keep an aligned region only
    if (skip > 0) munmap(at, skip);
    munmap(at + skip + kRegion, kHuge - skip);
    regions.push_back(at + skip);
    used = 0;
  }
  // What is full may become huge pages in the background. Asking before it is touched would make one insert in tens of
  // thousands wait milliseconds for the kernel to clear 2 MiB.
  if (const size_t full = used & ~(kHuge - 1); full > 0) madvise(regions.back(), full, MADV_HUGEPAGE);
  void* out = regions.back() + used;
  used += bytes;
  return out;
}

Index::Index(uint64_t seed) : seed_(seed), level_mask_(kFirstBuckets - 1), buckets_(kFirstBuckets), prefixes_(1) {
  while (seed_ == 0) KVFS_CHECK(getrandom(&seed_, sizeof seed_, 0) == sizeof seed_);
  auto* seg = static_cast<uint32_t*>(seg_arena_.piece(kSegBuckets * sizeof(uint32_t)));
  KVFS_CHECK(seg != nullptr);
  segs_.push_back(seg);
}

uint64_t Index::hash(const ChunkKey& key) const { return XXH3_64bits_withSeed(&key, sizeof key, seed_); }

uint32_t Index::bucket_of(uint64_t h) const {
  const uint32_t next_mask = level_mask_ * 2 + 1;
  const uint32_t b = static_cast<uint32_t>(h) & next_mask;
  return b < buckets_ ? b : b & level_mask_;
}

uint32_t Index::id_of(const ChunkKey& key) const {
  const uint64_t prefix = prefix_of_key(key);
  for (uint32_t id = head(bucket_of(hash(key))); id != 0;) {
    const Entry& e = at(id);
    if (std::memcmp(e.id, key.id, sizeof e.id) == 0 && prefixes_[e.prefix].value == prefix) return id;
    id = e.next;
  }
  return 0;
}

Entry* Index::find(const ChunkKey& key) {
  const uint32_t id = id_of(key);
  return id == 0 ? nullptr : &at(id);
}

void Index::prefetch(const ChunkKey* keys, uint32_t n, uint32_t* ids) const {
  const auto load = [this](uint32_t id) {
    if (id == 0) return;
    const char* e = reinterpret_cast<const char*>(&at(id));
    __builtin_prefetch(e);
    __builtin_prefetch(e + sizeof(Entry) - 1);
  };
  for (uint32_t i = 0; i < n; i++) {
    ids[i] = bucket_of(hash(keys[i]));
    __builtin_prefetch(&head(ids[i]));
  }
  for (uint32_t i = 0; i < n; i++) load(ids[i] = head(ids[i]));
  for (uint32_t step = 1; step <= kPrefetchSteps; step++) {
    for (uint32_t i = 0; i < n; i++) {
      if (ids[i] == 0) continue;
      const Entry& e = at(ids[i]);
      if (std::memcmp(e.id, keys[i].id, sizeof e.id) == 0) continue;
      ids[i] = step < kPrefetchSteps ? e.next : 0;
      load(ids[i]);
    }
  }
}

ChunkKey Index::key_of(uint32_t id) const {
  const Entry& e = at(id);
  ChunkKey key;
  std::memcpy(static_cast<void*>(&key), &prefixes_[e.prefix].value, 8);
  std::memcpy(key.id, e.id, sizeof e.id);
  return key;
}

uint32_t Index::insert(const ChunkKey& key, int* err) {
  int ignored;
  if (err == nullptr) err = &ignored;
  *err = 0;
  const uint16_t prefix = intern(prefix_of_key(key), err);
  if (prefix == 0) return 0;
  const uint32_t id = alloc_id(err);
  if (id == 0) {
    release(prefix);
    return 0;
  }
  Entry& e = at(id);
  e = Entry{};
  e.prefix = prefix;
  std::memcpy(e.id, key.id, sizeof e.id);
  uint32_t& h = head(bucket_of(hash(key)));
  e.next = h;
  h = id;
  ++size_;
  if (size_ / kLoadFactor >= buckets_) split();
  return id;
}

void Index::erase(uint32_t id) {
  KVFS_CHECK(live(id));
  Entry& gone = at(id);
  uint32_t& h = head(bucket_of(hash(key_of(id))));
  if (h == id) {
    h = gone.next;
  } else {
    uint32_t prev = h;
    while (prev != 0 && at(prev).next != id) prev = at(prev).next;
    KVFS_CHECK(prev != 0);
    at(prev).next = gone.next;
  }
  release(gone.prefix);
  gone = Entry{};
  free_id(id);
  --size_;
}

// One bucket's chain is divided between it and the new last bucket. Without memory the chains just get longer.
void Index::split() {
  if (buckets_ == 1u << 31) return;
  if (buckets_ >> kSegBits == segs_.size()) {
    auto* seg = static_cast<uint32_t*>(seg_arena_.piece(kSegBuckets * sizeof(uint32_t)));
    if (seg == nullptr) return;
    segs_.push_back(seg);
  }
  const uint32_t from = buckets_ & level_mask_, to = buckets_;
  uint32_t id = head(from), stay = 0, go = 0;
  ++buckets_;
  while (id != 0) {
    Entry& e = at(id);
    const uint32_t next = e.next;
    uint32_t& list = bucket_of(hash(key_of(id))) == to ? go : stay;
    e.next = list;
    list = id;
    id = next;
  }
  head(from) = stay;
  head(to) = go;
  if (buckets_ == (level_mask_ + 1) * 2) level_mask_ = level_mask_ * 2 + 1;
}

bool Index::add_slab() {
  auto* slab = static_cast<Entry*>(slab_arena_.piece(kSlabEntries * sizeof(Entry)));
  if (slab == nullptr) return false;
  auto bits = std::make_unique<Bitmap>();
  std::memset(bits->free, 0xff, sizeof bits->free);
  bits->count = kSlabEntries;
  const size_t n = slabs_.size();
  if (n == 0) {  // id 0 means none
    bits->free[0] &= ~1ull;
    --bits->count;
  }
  free_ids_ += bits->count;
  slabs_.push_back(slab);
  bitmaps_.push_back(std::move(bits));
  if (n % 64 == 0) slab_free_.push_back(0);
  slab_free_[n / 64] |= 1ull << (n % 64);
  cursor_ = n == 0 ? 1 : static_cast<uint32_t>(n << kSlabBits);
  return true;
}

uint32_t Index::alloc_id(int* err) {
  if (free_ids_ == 0) {
    if (slabs_.size() == 1ull << (32 - kSlabBits)) {
      *err = -ENOSPC;
      return 0;
    }
    if (!add_slab()) {
      *err = -ENOMEM;
      return 0;
    }
  }
  // The rest of the cursor's slab, then the next slab with a free id, from its start.
  uint32_t slab = cursor_ >> kSlabBits, bit = cursor_ & (kSlabEntries - 1), found = kSlabEntries;
  for (uint32_t w = bit / 64; w < kSlabEntries / 64; ++w) {
    uint64_t word = bitmaps_[slab]->free[w];
    if (w == bit / 64) word &= ~0ull << (bit % 64);
    if (word == 0) continue;
    found = w * 64 + static_cast<uint32_t>(std::countr_zero(word));
    break;
  }
  if (found == kSlabEntries) {
    const size_t words = slab_free_.size();
    size_t w = (slab + 1) / 64 % words;
    uint64_t word = slab_free_[w];
    if ((slab + 1) / 64 == w) word &= ~0ull << ((slab + 1) % 64);
    for (size_t tried = 0; word == 0; ++tried) {
      KVFS_CHECK(tried <= words);
      w = w + 1 == words ? 0 : w + 1;
      word = slab_free_[w];
    }
    slab = static_cast<uint32_t>(w * 64) + static_cast<uint32_t>(std::countr_zero(word));
    for (w = 0; bitmaps_[slab]->free[w] == 0;) KVFS_CHECK(++w < kSlabEntries / 64);
    found = static_cast<uint32_t>(w * 64) + static_cast<uint32_t>(std::countr_zero(bitmaps_[slab]->free[w]));
  }
  Bitmap& bits = *bitmaps_[slab];
  bits.free[found / 64] &= ~(1ull << (found % 64));
  if (--bits.count == 0) slab_free_[slab / 64] &= ~(1ull << (slab % 64));
  --free_ids_;
  const uint32_t id = slab << kSlabBits | found;
  cursor_ = id + 1 == slabs_.size() << kSlabBits ? 1 : id + 1;
  if (id > high_) high_ = id;
  return id;
}

void Index::free_id(uint32_t id) {
  const uint32_t slab = id >> kSlabBits, bit = id & (kSlabEntries - 1);
  Bitmap& bits = *bitmaps_[slab];
  bits.free[bit / 64] |= 1ull << (bit % 64);
  ++bits.count;
  slab_free_[slab / 64] |= 1ull << (slab % 64);
  ++free_ids_;
}

uint16_t Index::intern(uint64_t value, int* err) {
  if (auto it = prefix_of_.find(value); it != prefix_of_.end()) {
    ++prefixes_[it->second].refs;
    return it->second;
  }
  uint16_t p;
  if (!prefix_free_.empty()) {
    p = prefix_free_.back();
    prefix_free_.pop_back();
    prefixes_[p] = {value, 1};
  } else if (prefixes_.size() <= kMaxPrefix) {
    p = static_cast<uint16_t>(prefixes_.size());
    prefixes_.push_back({value, 1});
  } else {
    *err = -ENOSPC;
    return 0;
  }
  prefix_of_.emplace(value, p);
  return p;
}

void Index::release(uint16_t prefix) {
  if (--prefixes_[prefix].refs > 0) return;
  prefix_of_.erase(prefixes_[prefix].value);
  prefix_free_.push_back(prefix);
}

uint64_t Index::memory_bytes() const {
  return sizeof *this + slabs_.size() * kSlabEntries * sizeof(Entry) + bitmaps_.size() * (sizeof(Bitmap) + 16) +
         segs_.size() * kSegBuckets * sizeof(uint32_t) + slabs_.capacity() * sizeof(Entry*) +
         bitmaps_.capacity() * sizeof(void*) + slab_free_.capacity() * 8 + segs_.capacity() * sizeof(uint32_t*) +
         prefixes_.capacity() * sizeof(Prefix) + prefix_free_.capacity() * 2 + prefix_of_.size() * 32 +
         prefix_of_.bucket_count() * 8;
}

}  // namespace kvfs
