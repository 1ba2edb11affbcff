// recovery.cpp owns opening: newest superblock, checkpoint, journal replay, checks of what no barrier covered, and the
// rebuild of the allocator. Everything read is hostile until its checksum and ranges are checked.
#include <errno.h>
#include <stdlib.h>

#include <algorithm>
#include <bit>

#include "store_impl.h"

namespace kvfs {

bool sane(const Record& r, const Geometry& geo) {
  if (r.type != Record::kPut && r.type != Record::kDelete) return false;
  if (r.key.kind != Kind::Block && r.key.kind != Kind::File) return false;
  if (r.type == Record::kDelete) return true;
  const uint64_t off = r.loc * 512;
  if (r.key.kind == Kind::File && (r.length > kFileChunk || r.key.rsv[0] != 0)) return false;
  return r.length >= 1 && r.length <= kMaxChunk && r.loc < Entry::kMaxLoc && off >= geo.data_off() &&
         off < geo.segment_off(geo.segments) && r.key.rsv[0] < kMaxPieces && r.slot_class < kSizeClasses &&
         class_bytes(r.slot_class) >= std::min(r.length, kPieceMax);
}

Status StoreImpl::load_super() {
  AlignedBuf b(kBlock);
  bool found = false, other = false;
  uint32_t other_version = 0;
  int io_err = 0;
  for (uint64_t off : kSuperOff) {
    if (dev_.size() < off + kBlock) continue;
    if (int e = sync_io(Io::Op::Read, b.p, kBlock, off); e < 0) {
      io_err = -e;
      continue;
    }
    const auto* sb = b.as<SuperBlock>();
    if (sb->magic != kSuperMagic || sb->checksum != xxh3(sb, offsetof(SuperBlock, checksum))) continue;
    if (sb->format_version != kFormatVersion) {
      other = true;
      other_version = sb->format_version;
      continue;
    }
    if (!found || sb->generation > super_.generation) super_ = *sb;
    found = true;
  }
  if (!found) {
    if (io_err) return {io_err, "the superblocks can't be read"};
    if (other)
      return {EPROTO, "the store has format version " + std::to_string(other_version) +
                          ", this program reads version " + std::to_string(kFormatVersion)};
    return {EUCLEAN, "no valid superblock: this is not a kvfs store, or both copies are damaged"};
  }
  geo_.segment_bytes = super_.segment_bytes;
  geo_.segments = super_.segments;
  geo_.journal_bytes = super_.journal_bytes;
  const bool sane =
      super_.segment_bytes >= (1u << 20) && super_.segment_bytes <= (64u << 20) &&
      std::has_single_bit(super_.segment_bytes) && super_.segments >= 4 && super_.segments <= (1u << 23) &&
      super_.journal_bytes >= (1u << 20) && super_.journal_bytes <= (1u << 30) && super_.journal_bytes % kBlock == 0 &&
      super_.journal_start % kBlock == 0 && super_.journal_start < UINT64_MAX / 2 && super_.start_seq >= 1 &&
      super_.start_seq < UINT64_MAX / 2 && super_.checkpoint_segments <= kMaxCheckpointSegments &&
      super_.checkpoint_pages <= uint64_t{super_.checkpoint_segments} * geo_.pages_per_segment() &&
      geo_.segment_off(super_.segments) <= super_.size;
  if (!sane) return {EUCLEAN, "the superblock's numbers contradict each other"};
  if (super_.size > dev_.size())
    return {EUCLEAN,
            "the device has " + std::to_string(dev_.size()) + " bytes, the store needs " + std::to_string(super_.size)};
  alloc_ = std::make_unique<Allocator>(geo_, dev_.align());
  segment_class_.assign(super_.segments, 0);
  for (uint32_t i = 0; i < super_.checkpoint_segments; i++)
    if (!alloc_->claim_segment(super_.checkpoint_segment[i]))
      return {EUCLEAN, "the superblock names an impossible checkpoint segment"};
  return {};
}

Status StoreImpl::load_checkpoint() {
  constexpr uint32_t kBatch = 16;
  AlignedBuf b(kBatch * kCheckpointPage);
  uint64_t records = 0;
  for (uint32_t page = 0; page < super_.checkpoint_pages;) {
    // Pages of one segment are adjacent: read several at once.
    const uint32_t n =
        std::min({kBatch, super_.checkpoint_pages - page, geo_.pages_per_segment() - page % geo_.pages_per_segment()});
    if (int e = sync_io(Io::Op::Read, b.p, n * kCheckpointPage, geo_.page_off(super_.checkpoint_segment, page)); e < 0)
      return {-e, "the checkpoint can't be read"};
    for (uint32_t i = 0; i < n; i++, page++) {
      auto* h = reinterpret_cast<PageHeader*>(b.as<uint8_t>() + i * kCheckpointPage);
      if (!valid_page(h, page)) return {EUCLEAN, "page " + std::to_string(page) + " of the checkpoint is damaged"};
      const auto* rec = reinterpret_cast<const Record*>(h + 1);
      for (uint32_t k = 0; k < h->records; k++) {
        if (!sane(rec[k], geo_) || rec[k].type != Record::kPut)
          return {EUCLEAN, "the checkpoint has an impossible record"};
        apply(rec[k]);
      }
      records += h->records;
    }
  }
  if (Status s = applied(); s.err) return s;
  if (records != super_.checkpoint_records) return {EUCLEAN, "the checkpoint lacks records"};
  return {};
}

void StoreImpl::apply(const Record& rec) {
  uint32_t id = index_.id_of(rec.key);
  if (rec.type == Record::kDelete) {
    if (id) index_.erase(id);
    return;
  }
  int err = 0;
  if (!id) id = index_.insert(rec.key, &err);
  if (!id) {
    if (!apply_err_) apply_err_ = -err;
    return;
  }
  segment_class_[alloc_->segment_of(rec.loc * 512)] = rec.slot_class;
  Entry& e = index_.at(id);
  e.set_loc(rec.loc);
  e.set_len(rec.length);
  e.csum = rec.checksum;
  e.version = rec.version;
  e.mtime = rec.mtime;
  e.set_flag(Entry::kSealed, rec.key.kind == Kind::Block);
  e.set_flag(Entry::kEvictable, rec.evictable != 0);
}

// What the index could not take, in words.
Status StoreImpl::applied() const {
  if (!apply_err_) return {};
  if (apply_err_ == ENOSPC) return {EUCLEAN, "the records name more namespaces than a store can have"};
  return {apply_err_, "no memory for the index"};
}

// The slot's segment may have no class yet: the place follows from the record's class. 0: no such slot.
uint64_t StoreImpl::trailer_place(const Record& rec) const {
  const uint64_t off = rec.loc * 512;
  const uint64_t payload = round_up(class_bytes(rec.slot_class), dev_.align());
  const uint64_t base = geo_.segment_off(alloc_->segment_of(off));
  const uint64_t slots = geo_.stride() / (payload + trailer_io_);
  const uint64_t slot = (off - base) / payload;
  return slot < slots ? base + slots * payload + slot * trailer_io_ : 0;
}

// Whether these bytes, and for a piece above 8 KiB this trailer, are what the record speaks of.
bool StoreImpl::content_matches(const Record& rec, const uint8_t* data, const Trailer* tr) {
  const uint32_t len = std::min(rec.length, kPieceMax);
  if (trailer_bytes(class_of(len)) == 0) return xxh3(data, len) == rec.checksum;
  if (!tr || xxh3(tr, sizeof *tr) != rec.checksum || tr->length != len || !(tr->key == rec.key)) return false;
  const uint32_t sub = sub_block(len);
  for (uint32_t i = 0; i * sub < len; i++)
    if (xxh3(data + i * sub, std::min(sub, len - i * sub)) != tr->sum[i]) return false;
  return true;
}

bool StoreImpl::data_matches(const Record& rec) {
  const uint32_t len = std::min(rec.length, kPieceMax);
  const uint32_t n = static_cast<uint32_t>(round_up(len, dev_.align()));
  const uint64_t off = rec.loc * 512;
  if (off % dev_.align() || off + n > super_.size || off < geo_.data_off()) return false;
  AlignedBuf b(n + trailer_io_);
  if (sync_io(Io::Op::Read, b.p, n, off) < 0) return false;
  Trailer* tr = nullptr;
  if (trailer_bytes(class_of(len)) != 0) {
    const uint64_t place = trailer_place(rec);
    if (place == 0) return false;
    tr = reinterpret_cast<Trailer*>(b.as<uint8_t>() + n);
    if (sync_io(Io::Op::Read, tr, trailer_io_, place) < 0) return false;
  }
  return content_matches(rec, b.as<uint8_t>(), tr);
}

bool StoreImpl::valid_page(PageHeader* h, uint32_t page) const {
  return h->magic == kPageMagic && h->uuid == super_.uuid[0] && h->generation == super_.generation && h->page == page &&
         h->records <= kPageRecords && h->checksum == sealed_sum(h, kCheckpointPage, &PageHeader::checksum, h);
}

// The group at `at` of the journal's bytes, or nullptr.
GroupHeader* StoreImpl::valid_group(uint8_t* journal, uint64_t at) const {
  if (at + kBlock > geo_.journal_bytes) return nullptr;
  auto* h = reinterpret_cast<GroupHeader*>(journal + at);
  if (h->magic != kGroupMagic || h->uuid != super_.uuid[0] || h->bytes % kBlock != 0 || h->bytes == 0 ||
      h->bytes > kGroupMax + kBlock || h->bytes > geo_.journal_bytes - at ||
      uint64_t{h->records} * sizeof(Record) + sizeof *h > h->bytes)
    return nullptr;
  return h->checksum == sealed_sum(h, h->bytes, &GroupHeader::checksum, h) ? h : nullptr;
}

// A group that no barrier covered: its records are good, its data may be missing.
void StoreImpl::apply_unflushed(const GroupHeader* h) {
  const auto* rec = reinterpret_cast<const Record*>(h + 1);
  for (uint32_t i = 0; i < h->records;) {
    // All pieces of one put stand together: piece n-1 .. 0. All are good, or none is applied.
    uint32_t end = i + 1;
    while (end < h->records && rec[i].type == Record::kPut && rec[end - 1].key.rsv[0] != 0 &&
           rec[end].type == Record::kPut)
      end++;
    bool good = true;
    for (uint32_t k = i; k < end && good; k++) good = rec[k].type == Record::kDelete || data_matches(rec[k]);
    for (uint32_t k = i; k < end && good; k++) apply(rec[k]);
    i = end;
  }
}

Status StoreImpl::replay() {
  AlignedBuf j(geo_.journal_bytes);
  constexpr uint64_t kStep = 1u << 20;
  for (uint64_t at = 0; at < geo_.journal_bytes; at += kStep) {
    const auto n = static_cast<uint32_t>(std::min(kStep, geo_.journal_bytes - at));
    if (int e = sync_io(Io::Op::Read, j.as<uint8_t>() + at, n, kJournalOff + at); e < 0)
      return {-e, "the journal can't be read"};
  }
  auto valid = [&](uint64_t at) { return valid_group(j.as<uint8_t>(), at); };
  // First the chain of groups, then what a barrier covered, then the rest with its data checked.
  std::vector<GroupHeader*> chain;
  uint64_t v = super_.journal_start, seq = super_.start_seq, flushed = super_.start_seq - 1;
  while (v - super_.journal_start < geo_.journal_bytes) {
    uint64_t at = v % geo_.journal_bytes;
    GroupHeader* h = valid(at);
    if (!(h && h->seq == seq)) {  // a group that did not fit before the end begins at the start
      h = valid(0);
      if (at == 0 || !(h && h->seq == seq)) break;
      v += geo_.journal_bytes - at;
    }
    chain.push_back(h);
    flushed = std::max(flushed, h->flushed_seq);
    v += h->bytes;
    seq++;
  }
  // A group beyond the end that says the missing one was on stable storage: this is damage, not a lost tail.
  for (uint64_t at = 0; at < geo_.journal_bytes; at += kBlock) {
    const GroupHeader* h = valid(at);
    if (h && h->seq > seq && h->seq < seq + kSeqGap / 2 && h->flushed_seq >= seq && h->flushed_seq < h->seq)
      return {EUCLEAN, "the journal is damaged at group " + std::to_string(seq) + ", which had been acknowledged"};
  }
  if (flushed >= seq) return {EUCLEAN, "the journal ends before a group that had been acknowledged"};
  for (const GroupHeader* h : chain) {
    const auto* rec = reinterpret_cast<const Record*>(h + 1);
    for (uint32_t i = 0; i < h->records; i++)
      if (!sane(rec[i], geo_)) return {EUCLEAN, "the journal has an impossible record"};
    if (h->seq <= flushed) {
      for (uint32_t i = 0; i < h->records; i++) apply(rec[i]);
      continue;
    }
    apply_unflushed(h);
  }
  if (Status s = applied(); s.err) return s;
  recovered_ = !chain.empty() || !super_.clean;
  head_v_ = v;
  tail_v_ = super_.journal_start;
  next_seq_ = seq + kSeqGap;
  written_seq_ = flushed_seq_ = next_seq_ - 1;
  return {};
}

Status StoreImpl::claim_all() {
  for (uint32_t id = 1; id <= index_.capacity(); id++) {
    if (!index_.live(id)) continue;
    const Entry& e = index_.at(id);
    const ChunkKey key = index_.key_of(id);
    const uint32_t len = key.rsv[0] == 0 ? std::min(e.len(), kPieceMax) : e.len();
    const uint64_t off = e.loc() * 512;
    const uint8_t cls = segment_class_[alloc_->segment_of(off)];
    if (len > class_bytes(cls) || !alloc_->claim(off, cls))
      return {EUCLEAN, "two chunks claim the same space, or one lies outside the data area"};
    // A chunk's pieces are all there, each of its full length, and none is without its chunk.
    ChunkKey other = key;
    if (key.rsv[0] != 0) {
      other.rsv[0] = 0;
      const Entry* head = index_.find(other);
      const uint64_t at = uint64_t{key.rsv[0]} * kPieceMax;
      if (!head || head->len() <= at || e.len() != std::min<uint64_t>(head->len() - at, kPieceMax))
        return {EUCLEAN, "a piece of a chunk has no chunk or the wrong length"};
      continue;
    }
    for (uint32_t k = 1; k * kPieceMax < e.len(); k++) {
      other.rsv[0] = static_cast<uint8_t>(k);
      if (!index_.find(other)) return {EUCLEAN, "a chunk lacks a piece"};
    }
    st_.chunks++;
    (key.kind == Kind::Block ? st_.block_chunks : st_.file_chunks)++;
    st_.data_bytes += e.len();
    if (e.flag(Entry::kEvictable)) evictor_.restored(id);
  }
  return {};
}

int StoreImpl::write_super() {
  super_.checksum = xxh3(&super_, offsetof(SuperBlock, checksum));
  AlignedBuf b(kBlock);
  std::memcpy(b.p, &super_, sizeof super_);
  for (uint64_t off : kSuperOff) {
    if (int e = sync_io(Io::Op::Flush, nullptr, 0, 0); e < 0) return e;
    if (int e = sync_io(Io::Op::Write, b.p, kBlock, off); e < 0) return e;
  }
  return sync_io(Io::Op::Flush, nullptr, 0, 0);
}

Status StoreImpl::checkpoint_now() {
  const uint64_t before = st_.checkpoints;
  ck_wanted_ = true;
  ck_short_ = kEnough;
  while (st_.checkpoints == before && !failed_ && ck_short_ == kEnough) {
    tick(now_ns_ + 1);
    dev_.poll(dev_.inflight() > 0);
  }
  if (failed_) return {failed_, "writing the checkpoint failed"};
  if (ck_short_ != kEnough) return {ENOSPC, "no segment is free for the checkpoint"};
  return {};
}

Status StoreImpl::recover() {
  if (Status s = load_super(); s.err) return s;
  if (Status s = load_checkpoint(); s.err) return s;
  if (Status s = replay(); s.err) return s;
  if (Status s = claim_all(); s.err) return s;
  if (opt_.read_only) return {};
  super_.clean = 0;
  if (recovered_) return checkpoint_now();  // what was skipped must never be replayed
  next_seq_ = super_.start_seq;
  written_seq_ = flushed_seq_ = next_seq_ - 1;
  if (int e = write_super(); e < 0) return {-e, "writing the superblock failed"};
  return {};
}

}  // namespace kvfs
