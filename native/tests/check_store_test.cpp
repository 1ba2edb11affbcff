// check_store_test.cpp: the offline check finds each kind of damage, made on purpose, and a repair mends it without
// touching what is sound.
#include "../store/check_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>

#include "../store/layout.h"
#include "sim_device.h"
#include "store_fixture.h"

namespace kvfs {
namespace {

constexpr uint64_t kBytes = 24u << 20;

// A store with blocks of all shapes and a file of three chunks; `close` or crash.
class CheckStore : public ::testing::TestWithParam<uint32_t> {
 protected:
  void make(bool close) {
    SimDevice dev(options());
    ASSERT_TRUE(Store::format(dev, kSmall));
    Harness h(dev);
    ASSERT_TRUE(h.open());
    for (uint64_t k = 0; k < 40; k++) {
      blocks[k] = pattern(k, k == 7 ? (2u << 20) + 77 : 300 + k * 1500);
      ASSERT_EQ(h.put(block_key(k), blocks[k], Request::kDurable), 1);
      if (k == 20) {
        ASSERT_EQ(h.run(Request::Op::Checkpoint, block_key(0), nullptr, 0, 0), 0);
      }
    }
    for (uint64_t c = 0; c < 3; c++) {
      chunks[c] = pattern(c + 1000, kFileChunk);
      ASSERT_EQ(h.write(file_key(20, c), 0, chunks[c], Request::kDurable), int64_t{kFileChunk});
    }
    if (close) {
      ASSERT_TRUE(h.store->close());
    }
    h.store.reset();
    image = dev.image();
    load();
  }
  SimOptions options() const {
    SimOptions o = sim(3, kBytes, GetParam());
    o.record = false;
    return o;
  }
  void load() {
    image.read(0, &super, sizeof super);
    geo = {super.segment_bytes, super.segments, super.journal_bytes};
  }
  static CheckOptions everything(bool repair) {
    CheckOptions o;
    o.data = true;
    o.repair = repair;
    o.orphans = true;
    o.namespaces = {1};
    o.files = {{20, 3 * kFileChunk}};
    return o;
  }
  CheckReport check(const CheckOptions& o, int err = 0) {
    SimDevice dev(options(), image);
    CheckReport r;
    const Status st = check_store(dev, o, &r);
    EXPECT_EQ(st.err, err) << st.message;
    if (!o.repair) {
      EXPECT_TRUE(dev.image() == image) << "a check wrote";
    }
    image = dev.image();
    return r;
  }
  static uint64_t found(const CheckReport& r) {
    uint64_t n = 0;
    for (uint64_t c : r.counts) n += c;
    return n;
  }
  static uint64_t count(const CheckReport& r, Problem p) { return r.counts[static_cast<uint32_t>(p)]; }
  // Repairs, and what is then there: everything but `gone`, bit-exact; and a second check finds nothing.
  void repair_loses(const std::vector<uint64_t>& gone, const std::vector<uint64_t>& gone_chunks = {}) {
    EXPECT_TRUE(check(everything(true)).repaired);
    const CheckReport again = check(everything(false));
    EXPECT_EQ(found(again), 0u);
    SimDevice dev(options(), image);
    Harness h(dev);
    const Status st = h.open();
    ASSERT_TRUE(st) << st.message;
    for (auto& [k, v] : blocks) {
      Bytes got;
      const int64_t n = h.get(block_key(k), 0, 3u << 20, &got);
      if (std::find(gone.begin(), gone.end(), k) != gone.end()) {
        EXPECT_EQ(n, -ENOENT) << k;
      } else {
        ASSERT_EQ(n, static_cast<int64_t>(v.size())) << k;
        EXPECT_TRUE(got == v) << k;
      }
    }
    for (auto& [c, v] : chunks) {
      Bytes got;
      const int64_t n = h.get(file_key(20, c), 0, kFileChunk, &got);
      if (std::find(gone_chunks.begin(), gone_chunks.end(), c) != gone_chunks.end()) {
        EXPECT_EQ(n, -ENOENT) << c;
      } else {
        ASSERT_EQ(n, int64_t{kFileChunk}) << c;
        EXPECT_TRUE(got == v) << c;
      }
    }
    EXPECT_EQ(h.put(block_key(9999), pattern(1, 5000), Request::kDurable), 1);
    ASSERT_TRUE(h.store->close());
  }
  // Changes records of the checkpoint, which gets right checksums again.
  void forge_page(const std::function<void(Record*, uint32_t)>& fn) {
    std::vector<uint8_t> page(kCheckpointPage);
    const uint64_t off = geo.page_off(super.checkpoint_segment, 0);
    image.read(off, page.data(), page.size());
    auto* h = reinterpret_cast<PageHeader*>(page.data());
    ASSERT_EQ(h->magic, kPageMagic);
    fn(reinterpret_cast<Record*>(h + 1), h->records);
    h->checksum = sealed_sum(h, kCheckpointPage, &PageHeader::checksum, h);
    image.write(off, page.data(), page.size());
  }
  Record record_of(const ChunkKey& key) {
    Record found{};
    forge_page([&](Record* r, uint32_t n) {
      for (uint32_t i = 0; i < n; i++)
        if (r[i].key == key) found = r[i];
    });
    return found;
  }
  SimImage image;
  SuperBlock super{};
  Geometry geo;
  std::map<uint64_t, Bytes> blocks, chunks;
};

INSTANTIATE_TEST_SUITE_P(Align, CheckStore, ::testing::Values(512u, 4096u));

TEST_P(CheckStore, SoundStoresHaveNoFindings) {
  for (bool close : {true, false}) {
    ASSERT_NO_FATAL_FAILURE(make(close));
    const SimImage before = image;
    CheckReport r = check(everything(false));
    EXPECT_EQ(found(r), 0u);
    EXPECT_EQ(r.closed, close);
    EXPECT_EQ(r.block_chunks, blocks.size());
    EXPECT_EQ(r.file_chunks, chunks.size());
    EXPECT_EQ(r.verified_bytes, r.data_bytes);
    r = check(everything(true));
    EXPECT_FALSE(r.repaired);
    EXPECT_TRUE(image == before) << "a repair of a sound store wrote";
  }
}

TEST_P(CheckStore, SuperblockCopyComesFromTheOther) {
  for (int copy : {0, 1}) {
    ASSERT_NO_FATAL_FAILURE(make(copy == 0));
    const SimImage before = image;
    image.flip_bit(kSuperOff[copy] + 50, 3);
    EXPECT_EQ(count(check(everything(false)), Problem::SuperDamaged), 1u);
    check(everything(true));
    EXPECT_TRUE(image == before) << "more than the damaged copy was written";
  }
}

TEST_P(CheckStore, RefusesWhatIsNoStore) {
  check(everything(true), EMEDIUMTYPE);
  ASSERT_NO_FATAL_FAILURE(make(true));
  image.flip_bit(kSuperOff[0] + 50, 3);
  image.flip_bit(kSuperOff[1] + 50, 3);
  const SimImage before = image;
  check(everything(true), EUCLEAN);
  EXPECT_TRUE(image == before);
  for (uint64_t off : kSuperOff) {
    super.format_version = 2;
    super.checksum = xxh3(&super, offsetof(SuperBlock, checksum));
    image.write(off, &super, sizeof super);
  }
  check(everything(true), EPROTO);
}

TEST_P(CheckStore, DamagedDataIsDropped) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  for (const ChunkKey& key : {block_key(3), block_key(30), file_key(20, 1)})
    image.flip_bit(record_of(key).loc * 512 + 9, 1);
  CheckOptions quick = everything(false);
  quick.data = false;
  EXPECT_EQ(found(check(quick)), 0u);
  const CheckReport r = check(everything(false));
  EXPECT_EQ(count(r, Problem::DataDamaged), 3u);
  EXPECT_EQ(found(r), 3u);
  repair_loses({3, 30}, {1});
}

TEST_P(CheckStore, DamagedPieceTakesItsBlock) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  ChunkKey piece = block_key(7);
  piece.rsv[0] = 2;
  image.flip_bit(record_of(piece).loc * 512, 1);
  EXPECT_EQ(count(check(everything(false)), Problem::DataDamaged), 1u);
  repair_loses({7});
}

TEST_P(CheckStore, SlotClaimedTwice) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  const Record right = record_of(block_key(11));
  forge_page([&](Record* r, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
      if (r[i].key == block_key(12))
        r[i].loc = right.loc, r[i].slot_class = right.slot_class, r[i].length = right.length;
  });
  CheckOptions quick = everything(false);
  quick.data = false;
  EXPECT_EQ(count(check(quick), Problem::SlotTwice), 1u);
  repair_loses({12});
}

TEST_P(CheckStore, MissingAndStrayPieces) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  const SimImage before = image;
  ChunkKey piece = block_key(7);
  piece.rsv[0] = 1;
  for (const ChunkKey& lost : {piece, block_key(7)}) {  // one piece, or the first, without which the others are strays
    image = before;
    forge_page([&](Record* r, uint32_t n) {
      for (uint32_t i = 0; i < n; i++)
        if (r[i].key == lost) r[i].key = block_key(500), r[i].key.rsv[0] = 3;
    });
    const CheckReport r = check(everything(false));
    EXPECT_EQ(count(r, Problem::PieceMissing), lost == piece ? 1u : 0u);
    EXPECT_EQ(count(r, Problem::PieceStray), lost == piece ? 1u : 3u);
    repair_loses({7});
  }
}

TEST_P(CheckStore, ImpossibleRecord) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  forge_page([&](Record* r, uint32_t n) {
    for (uint32_t i = 0; i < n; i++)
      if (r[i].key == file_key(20, 2)) r[i].loc = UINT64_MAX;
  });
  EXPECT_EQ(count(check(everything(false)), Problem::RecordImpossible), 1u);
  repair_loses({}, {2});
}

TEST_P(CheckStore, OrphansBothWays) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  CheckOptions o = everything(false);
  o.namespaces = {2};
  EXPECT_EQ(count(check(o), Problem::NamespaceUnknown), blocks.size());
  o = everything(false);
  o.files = {{19, 1u << 30}, {21, 1u << 30}};
  EXPECT_EQ(count(check(o), Problem::InodeUnknown), 3u);
  o = everything(true);
  o.files = {{20, kFileChunk + 1}};
  CheckReport r = check(o);
  EXPECT_EQ(count(r, Problem::BeyondSize), 1u);
  ASSERT_EQ(r.findings.size(), 1u);
  EXPECT_TRUE(r.findings[0].key == file_key(20, 2));
  o.orphans = false;
  EXPECT_EQ(found(check(o)), 0u);
}

// A damaged checkpoint: blocks come back through older records, files' chunks through the journal only.
TEST_P(CheckStore, DamagedPageIsRebuilt) {
  ASSERT_NO_FATAL_FAILURE(make(true));
  image.flip_bit(geo.page_off(super.checkpoint_segment, 0) + 500, 1);
  {
    SimDevice dev(options(), image);
    Harness h(dev);
    EXPECT_EQ(h.open().err, EUCLEAN);
  }
  EXPECT_EQ(count(check(everything(false)), Problem::PageDamaged), 1u);
  repair_loses({}, {0, 1, 2});
}

// A journal group in the middle is damaged; what later groups say still counts.
TEST_P(CheckStore, DamagedGroupCostsWhatItRecorded) {
  ASSERT_NO_FATAL_FAILURE(make(false));
  uint64_t at = 0, lost = 0;
  for (uint64_t j = 0; j < geo.journal_bytes && !at; j += kBlock) {
    GroupHeader h;
    Record r;
    image.read(kJournalOff + j, &h, sizeof h);
    image.read(kJournalOff + j + sizeof h, &r, sizeof r);
    if (h.magic == kGroupMagic && h.seq == super.start_seq + 4) at = kJournalOff + j, std::memcpy(&lost, r.key.id, 8);
  }
  ASSERT_NE(at, 0u);
  image.flip_bit(at + 100, 1);
  {
    SimDevice dev(options(), image);
    Harness h(dev);
    EXPECT_EQ(h.open().err, EUCLEAN);
  }
  const CheckReport r = check(everything(false));
  EXPECT_EQ(count(r, Problem::GroupDamaged), 1u);
  EXPECT_EQ(r.findings[0].where, super.start_seq + 4);
  repair_loses({lost});
}

// Flips anywhere: the check always ends, and after a repair everything that is there has the right bytes.
TEST_P(CheckStore, AnyFlipIsMendedOrRefused) {
  ASSERT_NO_FATAL_FAILURE(make(false));
  const SimImage sound = image;
  Rng rng(5);
  for (int i = 0; i < 60; i++) {
    image = sound;
    for (int f = 0; f < 3; f++)
      image.flip_bit(i % 2 ? rng.below(1200u << 10) : rng.below(8u << 20), static_cast<unsigned>(rng.below(8)));
    SimDevice dev(options(), image);
    CheckReport r;
    if (!check_store(dev, everything(true), &r)) continue;
    CheckReport again;
    ASSERT_TRUE(check_store(dev, everything(false), &again));
    ASSERT_EQ(found(again), 0u) << i;
    Harness h(dev);
    const Status st = h.open();
    ASSERT_TRUE(st) << st.message;
    for (auto& [k, v] : blocks) {
      Bytes got;
      const int64_t n = h.get(block_key(k), 0, 3u << 20, &got);
      ASSERT_TRUE(n == -ENOENT || got == v) << i << " block " << k << ": " << n;
    }
  }
}

}  // namespace
}  // namespace kvfs
