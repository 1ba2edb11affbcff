// index_test.cpp checks the in-memory index against a model, its id order and its memory.
#include "../store/index.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <vector>

#include "sim_device.h"

namespace kvfs {
namespace {

ChunkKey key_for(uint64_t n, uint32_t ns = 7) {
  ChunkKey k;
  k.key_len = 32;
  k.ns = ns;
  Rng rng(n);
  for (int i = 0; i < 4; ++i) {
    const uint64_t v = rng.next();
    std::memcpy(k.id + i * 8, &v, 8);
  }
  return k;
}

TEST(Index, RandomOperationsMatchAModel) {
  struct Hash {
    size_t operator()(const ChunkKey& k) const {
      uint64_t a, b;
      std::memcpy(&a, k.id, 8);
      std::memcpy(&b, k.id + 8, 8);
      return a * 31 + b + k.ns;
    }
  };
  struct Model {
    uint32_t id;
    uint64_t csum;
    Entry* address;
  };
  Rng rng(1);
  Index index;
  std::unordered_map<ChunkKey, Model, Hash> model;
  uint64_t universe = 20000;
  for (int step = 0; step < 1'500'000; ++step) {
    if (step == 500'000) universe = 200'000;  // grow over many splits
    if (step == 1'000'000) universe = 3'000;  // then mostly the same few keys
    const uint64_t n = rng.below(universe);
    const ChunkKey key = n % 3 == 0 ? file_key(n / 100, n % 100) : key_for(n, static_cast<uint32_t>(n % 50));
    const auto it = model.find(key);
    Entry* e = index.find(key);
    ASSERT_EQ(e != nullptr, it != model.end());
    if (e != nullptr) {
      ASSERT_EQ(index.id_of(key), it->second.id);
      ASSERT_EQ(e->csum, it->second.csum);
      ASSERT_EQ(e, it->second.address);
      ASSERT_TRUE(index.live(it->second.id));
      ASSERT_EQ(index.key_of(it->second.id), key);
      if (rng.below(3) != 0) {
        const uint32_t id = it->second.id;
        index.erase(id);
        ASSERT_FALSE(index.live(id));
        model.erase(it);
      }
    } else if (rng.below(4) != 0) {
      const uint32_t id = index.insert(key);
      ASSERT_NE(id, 0u);
      Entry& added = index.at(id);
      ASSERT_EQ(added.csum, 0u);
      ASSERT_EQ(added.place, 0u);
      added.csum = rng.next();
      model[key] = {id, added.csum, &added};
    }
    ASSERT_EQ(index.size(), model.size());
  }
  uint32_t live = 0;
  for (uint32_t id = 1; id <= index.capacity(); ++id) {
    if (!index.live(id)) continue;
    ++live;
    ASSERT_EQ(model.at(index.key_of(id)).id, id);
  }
  EXPECT_EQ(live, model.size());
}

// Chains are as long as kLoadFactor makes them: nearly all of what is there is found, and nothing that is not.
TEST(Index, PrefetchingTellsTheIdsThatLookupsFind) {
  Index index(1);
  std::vector<ChunkKey> keys;
  for (uint64_t n = 0; n < 40'000; ++n) {
    keys.push_back(n % 2 == 0 ? file_key(n / 100, n % 100) : key_for(n));
    if (n % 3 == 0) continue;
    ASSERT_NE(index.insert(keys.back()), 0u);
  }
  uint32_t there = 0, told = 0;
  for (size_t at = 0; at < keys.size(); at += 16) {
    uint32_t ids[16];
    index.prefetch(&keys[at], 16, ids);
    for (size_t i = 0; i < 16; ++i) {
      const uint32_t id = index.id_of(keys[at + i]);
      there += id != 0;
      told += ids[i] != 0;
      if (ids[i] == 0) continue;
      ASSERT_EQ(ids[i], id);
    }
  }
  EXPECT_EQ(there, index.size());
  EXPECT_GT(told, there * 9 / 10);
}

TEST(Index, MillionEntriesFitInTheStatedMemory) {
  Index index;
  for (const uint32_t n : {1'000'000u, 1'500'000u}) {
    while (index.size() < n) ASSERT_NE(index.insert(key_for(index.size())), 0u);
    EXPECT_LE(static_cast<double>(index.memory_bytes()) / n, 64.5) << n;
  }
  for (uint32_t i = 0; i < 1'500'000; i += 977) ASSERT_NE(index.id_of(key_for(i)), 0u);
}

TEST(Index, IdsFollowInsertionOrderCyclically) {
  Index index;
  for (uint32_t i = 1; i <= 10'000; ++i) ASSERT_EQ(index.insert(key_for(i)), i);
  EXPECT_EQ(index.capacity(), 10'000u);
  index.erase(5);
  index.erase(6000);
  EXPECT_EQ(index.insert(key_for(1'000'000)), 10'001u);  // goes on behind the last one
  for (uint32_t i = 10'002; i < 3 * Index::kSlabEntries; ++i) ASSERT_EQ(index.insert(key_for(i)), i);
  EXPECT_EQ(index.insert(key_for(2'000'000)), 5u);  // then around, before growing
  EXPECT_EQ(index.insert(key_for(2'000'001)), 6000u);
  EXPECT_EQ(index.insert(key_for(2'000'002)), 3 * Index::kSlabEntries);
}

// Many slabs, almost all full: the search must find the few holes wherever the cursor is.
TEST(Index, FindsTheOnlyHoleFromEverywhere) {
  Index index;
  const uint32_t n = 70 * Index::kSlabEntries - 1;
  for (uint32_t i = 1; i <= n; ++i) ASSERT_EQ(index.insert(key_for(i)), i);
  Rng rng(3);
  for (int i = 0; i < 20'000; ++i) {
    const uint32_t id = 1 + static_cast<uint32_t>(rng.below(n));
    index.erase(id);
    ASSERT_EQ(index.insert(key_for(n + 1 + static_cast<uint64_t>(i))), id);
  }
  EXPECT_EQ(index.capacity(), n);
}

TEST(Index, PrefixesAreBoundedAndReused) {
  Index index;
  for (uint32_t ns = 0; ns < 65535; ++ns) ASSERT_NE(index.insert(key_for(1, ns)), 0u);
  int err = 0;
  EXPECT_EQ(index.insert(key_for(1, 70'000), &err), 0u);
  EXPECT_EQ(err, -ENOSPC);
  EXPECT_EQ(index.size(), 65535u);
  EXPECT_NE(index.insert(key_for(2, 9), &err), 0u);  // a known prefix still works
  index.erase(index.id_of(key_for(1, 123)));
  EXPECT_NE(index.insert(key_for(1, 70'000), &err), 0u);
  EXPECT_EQ(index.id_of(key_for(1, 123)), 0u);
  EXPECT_EQ(index.key_of(index.id_of(key_for(1, 70'000))).ns, 70'000u);
}

TEST(Index, EntryFieldsDoNotDisturbEachOther) {
  Entry e{};
  Rng rng(5);
  uint64_t loc = 0;
  uint32_t len = 1, freq = 0;
  bool flags[4] = {};
  const uint64_t masks[4] = {Entry::kSealed, Entry::kEvictable, Entry::kMain, Entry::kCached};
  for (int i = 0; i < 100'000; ++i) {
    switch (rng.below(4)) {
      case 0:
        e.set_loc(loc = rng.below(Entry::kMaxLoc));
        break;
      case 1:
        e.set_len(len = 1 + static_cast<uint32_t>(rng.below(1u << 24)));
        break;
      case 2:
        e.set_freq(freq = static_cast<uint32_t>(rng.below(4)));
        break;
      default: {
        const size_t f = rng.below(4);
        e.set_flag(masks[f], flags[f] = rng.below(2) == 1);
      }
    }
    ASSERT_EQ(e.loc(), loc);
    ASSERT_EQ(e.len(), len);
    ASSERT_EQ(e.freq(), freq);
    for (size_t f = 0; f < 4; ++f) ASSERT_EQ(e.flag(masks[f]), flags[f]);
  }
}

}  // namespace
}  // namespace kvfs
