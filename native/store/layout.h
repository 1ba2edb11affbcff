// layout.h owns the bytes on the device: superblock, journal groups, checkpoint pages, chunk trailers, and where they lie.
// docs/on-disk-format.md describes the same to the byte. Little-endian; every structure carries an XXH3-64 of itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "checksum.h"
#include "size_class.h"
#include "store.h"

namespace kvfs {

constexpr uint64_t kSuperMagic = 0x3152505553464b56ULL;  // "VKFSUPR1"
constexpr uint64_t kGroupMagic = 0x314c4e524a46564bULL;  // "KVFJRNL1"
constexpr uint64_t kPageMagic = 0x315450434b46564bULL;   // "KVFKCPT1"
constexpr uint32_t kTrailerMagic = 0x31525454u;          // "TTR1"
constexpr uint32_t kFormatVersion = 1;
constexpr uint32_t kBlock = 4096;                  // alignment of everything but slots
constexpr uint64_t kSuperOff[2] = {0, 64u << 10};  // two copies, written one after the other
constexpr uint64_t kJournalOff = 128u << 10;
constexpr uint32_t kMaxCheckpointSegments = 512;
constexpr uint32_t kPieceMax = kMaxSlotPayload;         // bytes: larger chunks are stored as pieces of this size
constexpr uint32_t kMaxPieces = kMaxChunk / kPieceMax;  // 16
constexpr uint32_t kCheckpointPage = 64u << 10;
constexpr uint32_t kTrailerSums = 56;
constexpr uint32_t kGroupMax = 128u << 10;  // bytes of one journal group
constexpr uint64_t kSeqGap =
    1u << 20;  // added at each recovery, so that groups of a lost tail never continue a new one

struct SuperBlock {  // 4096 bytes
  uint64_t magic;
  uint32_t format_version;
  uint32_t clean;  // 1: closed properly; the journal after the checkpoint is empty
  uint64_t uuid[2];
  uint64_t generation;     // of this superblock and of the checkpoint it names
  uint64_t size;           // bytes of the device in use
  uint32_t segment_bytes;  // nominal; the stride is segment_bytes + segment_bytes / 128
  uint32_t segments;
  uint64_t journal_bytes;
  uint64_t journal_start;  // virtual offset (monotonic; modulo journal_bytes) where replay begins
  uint64_t start_seq;      // sequence number of the group there
  uint64_t checkpoint_records;
  uint32_t checkpoint_pages;
  uint32_t checkpoint_segments;
  uint32_t checkpoint_segment[kMaxCheckpointSegments];
  uint8_t rsv[4096 - 96 - 4 * kMaxCheckpointSegments - 8];
  uint64_t checksum;  // of the bytes before it
};
static_assert(sizeof(SuperBlock) == 4096);

struct Record {  // 72 bytes: a journal or checkpoint record
  enum Type : uint8_t { kPut = 1, kDelete = 2 };
  uint8_t type;
  uint8_t evictable;
  uint8_t slot_class;  // of the slot: the smallest that fits, or a larger one when no segment was free
  uint8_t rsv;
  uint32_t length;    // bytes; of the whole chunk for piece 0, of the piece for others
  ChunkKey key;       // rsv[0] = piece number
  uint64_t loc;       // device offset / 512
  uint64_t checksum;  // of the piece (one sub-block), or of its trailer
  uint32_t version;
  uint32_t mtime;
};
static_assert(sizeof(Record) == 72);

struct GroupHeader {  // 64 bytes, then `records` Records, zero-padded to a multiple of kBlock
  uint64_t magic;
  uint64_t uuid;         // first half of the store's
  uint64_t seq;          // +1 per group
  uint64_t flushed_seq;  // groups up to this one were on stable storage when this one was written
  uint32_t bytes;        // of the whole group, padding included
  uint32_t records;
  uint64_t rsv[2];
  uint64_t checksum;  // of the whole group with this field 0
};
static_assert(sizeof(GroupHeader) == 64);
constexpr uint32_t kGroupRecords = (kGroupMax - sizeof(GroupHeader)) / sizeof(Record);

struct PageHeader {  // 64 bytes, then Records; a checkpoint page is kCheckpointPage bytes
  uint64_t magic;
  uint64_t uuid;
  uint64_t generation;
  uint32_t page;
  uint32_t records;
  uint64_t rsv[3];
  uint64_t checksum;  // of the whole page with this field 0
};
static_assert(sizeof(PageHeader) == 64);
constexpr uint32_t kPageRecords = (kCheckpointPage - sizeof(PageHeader)) / sizeof(Record);

struct Trailer {  // 512 bytes, one per slot of the classes above 8 KiB
  uint32_t magic;
  uint32_t sums;
  ChunkKey key;
  uint32_t length;  // bytes of the piece
  uint32_t version;
  uint64_t rsv;
  uint64_t sum[kTrailerSums];  // XXH3-64 of each sub-block
};
static_assert(sizeof(Trailer) == kTrailerBytes);

// Checksum unit of a piece of `len` bytes.
constexpr uint32_t sub_block(uint32_t len) {
  if (len <= 8192) return 8192;
  uint32_t sub = kSubBlockMin;
  while ((len + sub - 1) / sub > kTrailerSums) sub *= 2;
  return sub;
}

template <typename T>
uint64_t sealed_sum(const void* bytes, size_t n, uint64_t T::*field, T* header) {
  const uint64_t saved = header->*field;
  header->*field = 0;
  const uint64_t sum = xxh3(bytes, n);
  header->*field = saved;
  return sum;
}

constexpr uint64_t round_up(uint64_t v, uint64_t unit) { return (v + unit - 1) / unit * unit; }

// Where things lie, from the superblock's numbers.
struct Geometry {
  uint32_t segment_bytes = 0;
  uint32_t segments = 0;
  uint64_t journal_bytes = 0;
  uint64_t stride() const { return segment_bytes + segment_bytes / 128; }
  uint64_t data_off() const { return kJournalOff + journal_bytes; }
  uint64_t segment_off(uint32_t s) const { return data_off() + s * stride(); }
  uint32_t pages_per_segment() const { return static_cast<uint32_t>(stride() / kCheckpointPage); }
  uint64_t page_off(const uint32_t* segs, uint32_t page) const {
    return segment_off(segs[page / pages_per_segment()]) + uint64_t{page % pages_per_segment()} * kCheckpointPage;
  }
};

}  // namespace kvfs
