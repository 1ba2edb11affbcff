// index.h owns the in-memory index of a store: every chunk's whole key, place, checksum, version and time in at most
// 64.5 bytes, all included. Linear hashing (one bucket splits per growth step, no rehash stall) over entries that keep
// their id and address while they live. Ids are handed out cyclically, so a sweep 1..capacity() approximates insertion order.
// Single-threaded. Memory: grows with the largest number of live entries ever, never shrinks.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "check.h"
#include "store.h"

namespace kvfs {

// One chunk. `next`, `prefix` and `id` are the index's; everything else is the owner's (zero after insert).
struct __attribute__((packed)) Entry {
  static constexpr uint64_t kMaxLoc = 1ull << 34;  // in 512-byte units: 8 TiB per device
  static constexpr uint64_t kSealed = 1ull << 58, kEvictable = 1ull << 59, kMain = 1ull << 60, kCached = 1ull << 61;

  uint32_t next;
  uint16_t prefix;  // 0 = free
  uint8_t id[32];
  uint64_t csum;
  uint64_t place;  // loc:34, len-1:24, flags:4, freq:2
  uint32_t version;
  uint32_t mtime;

  uint64_t loc() const { return place & (kMaxLoc - 1); }
  void set_loc(uint64_t units) {
    KVFS_CHECK(units < kMaxLoc);
    place = (place & ~(kMaxLoc - 1)) | units;
  }
  uint32_t len() const { return static_cast<uint32_t>((place >> 34) & 0xffffff) + 1; }  // 1..16 MiB
  void set_len(uint32_t bytes) {
    KVFS_CHECK(bytes >= 1 && bytes <= (1u << 24));
    place = (place & ~(0xffffffull << 34)) | (static_cast<uint64_t>(bytes - 1) << 34);
  }
  bool flag(uint64_t f) const { return (place & f) != 0; }
  void set_flag(uint64_t f, bool on) { place = on ? (place | f) : (place & ~f); }
  uint32_t freq() const { return static_cast<uint32_t>(place >> 62); }  // 0..3
  void set_freq(uint32_t n) { place = (place & ~(3ull << 62)) | (static_cast<uint64_t>(n & 3) << 62); }
};
static_assert(sizeof(Entry) == 62);

class Index {
 public:
  static constexpr uint32_t kSlabBits = 12, kSlabEntries = 1u << kSlabBits;

  // seed = 0: random, so that nobody outside can choose keys that collide.
  explicit Index(uint64_t seed = 0);
  Index(const Index&) = delete;
  Index& operator=(const Index&) = delete;

  // Id of the chunk, or 0.
  uint32_t id_of(const ChunkKey& key) const;
  // Valid while the entry lives (its address never changes); nullptr if absent.
  Entry* find(const ChunkKey& key);
  // Adds an entry that must not be there yet (check with id_of/find first). 0: failed, *err = -ENOSPC (more than 65535
  // distinct (kind, key_len, rsv, ns), or 2^32-1 entries) or -ENOMEM.
  uint32_t insert(const ChunkKey& key, int* err = nullptr);
  void erase(uint32_t id);
  Entry& at(uint32_t id) { return slabs_[id >> kSlabBits][id & (kSlabEntries - 1)]; }
  const Entry& at(uint32_t id) const { return slabs_[id >> kSlabBits][id & (kSlabEntries - 1)]; }
  bool live(uint32_t id) const { return id != 0 && id <= high_ && at(id).prefix != 0; }
  ChunkKey key_of(uint32_t id) const;
  // Loads what id_of() of these keys will read, the misses of all of them at the same time. ids: theirs, as far as the
  // first kPrefetchSteps entries of a chain tell and without a look at the keys' namespaces, else 0.
  static constexpr uint32_t kPrefetchSteps = 6;  // most chains are shorter (kLoadFactor)
  void prefetch(const ChunkKey* keys, uint32_t n, uint32_t* ids) const;
  // Highest id ever handed out; ids are 1..capacity().
  uint32_t capacity() const { return high_; }
  uint32_t size() const { return size_; }
  uint64_t memory_bytes() const;

 private:
  static constexpr uint32_t kSegBits = 14, kSegBuckets = 1u << kSegBits;  // bucket heads per allocation
  static constexpr uint32_t kMaxPrefix = 65535;
  // Hands out pieces of large regions, so that the kernel can use huge pages: a lookup is cache and TLB misses only.
  struct Arena {
    static constexpr size_t kRegion = 64u << 20, kHuge = 2u << 20;  // a region is touched, so paid for, as it fills
    std::vector<char*> regions;
    size_t used = kRegion;  // of the last region
    ~Arena();
    void* piece(size_t bytes);  // zeroed; nullptr without memory
  };
  struct Bitmap {
    uint64_t free[kSlabEntries / 64];
    uint32_t count;
  };
  struct Prefix {
    uint64_t value;
    uint32_t refs;
  };

  uint64_t hash(const ChunkKey& key) const;
  uint32_t bucket_of(uint64_t h) const;
  uint32_t& head(uint32_t b) const { return segs_[b >> kSegBits][b & (kSegBuckets - 1)]; }
  uint32_t alloc_id(int* err);
  bool add_slab();
  void free_id(uint32_t id);
  uint16_t intern(uint64_t value, int* err);
  void release(uint16_t prefix);
  void split();

  uint64_t seed_;
  uint32_t size_ = 0;
  uint32_t high_ = 0;
  uint32_t cursor_ = 1;  // where the search for a free id goes on
  uint64_t free_ids_ = 0;
  uint32_t level_mask_;  // 2^level - 1
  uint32_t buckets_;     // 2^level <= buckets_ < 2^(level+1)
  Arena slab_arena_, seg_arena_;
  std::vector<Entry*> slabs_;
  std::vector<std::unique_ptr<Bitmap>> bitmaps_;
  std::vector<uint64_t> slab_free_;  // one bit per slab: it has a free id
  std::vector<uint32_t*> segs_;
  std::vector<Prefix> prefixes_;  // [0] unused
  std::vector<uint16_t> prefix_free_;
  std::unordered_map<uint64_t, uint16_t> prefix_of_;
};

}  // namespace kvfs
