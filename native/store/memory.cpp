// memory.cpp owns what the store does with its DRAM tier: reads from it, and which verified bytes go into it.
//
// A client can change its memory at any time, and what is kept here is given to others: bytes in a client's memory are
// copied first and verified in the copy. Pages are found by entry id, so every change of an entry's bytes and every
// erased entry drops them; moving a chunk changes no bytes. A read that began before an overwrite keeps nothing: the
// entry's place has changed, and the old slot goes to nobody else before the read has ended. Remembered sums of what was
// lent go with the pages.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>

#include "store_impl.h"

namespace kvfs {

namespace {
constexpr uint32_t kPage = MemoryTier::kFrame;
// Larger chunks are kept at the second read within the ghost's memory: one is a scan more often than not, and copying
// costs as much as the read. What is read of files is kept at the second read of the same place, whatever its size.
constexpr uint32_t kKeepAtOnce = 64u << 10;
// A remembered sum is compared with the bytes once in so many uses: what memory has damaged is not sent for ever.
constexpr uint32_t kSumUses = 64;

uint64_t sum_of(const Lent& lent) {
  if (lent.parts.size() == 1) return xxh3(lent.parts[0].ptr, lent.parts[0].len);
  XXH3_state_t s;
  XXH3_64bits_reset(&s);
  for (const Lent::Part& p : lent.parts) XXH3_64bits_update(&s, p.ptr, p.len);
  return XXH3_64bits_digest(&s);
}
}  // namespace

void StoreImpl::prefetch(const ChunkKey* keys, uint32_t n) {
  KVFS_CHECK(n <= kPrefetch);
  uint32_t ids[kPrefetch];
  index_.prefetch(keys, n, ids);
  if (!tier_.on()) return;
  for (uint32_t i = 0; i < n; i++) {
    if (ids[i] && !index_.at(ids[i]).flag(Entry::kCached)) ids[i] = 0;
    if (ids[i]) tier_.prefetch(ids[i], 0);
  }
  for (uint32_t i = 0; i < n; i++)
    if (ids[i]) tier_.prefetch_meta(ids[i], 0);
  for (uint32_t i = 0; i < n; i++) {
    const uint32_t f = ids[i] ? tier_.find(ids[i], 0) : 0;
    if (!f) continue;
    // The rest follows by the CPU's own prefetching of adjacent lines.
    for (uint32_t line = 0; line < 8; line++) __builtin_prefetch(tier_.data(f) + line * 64);
  }
}

// True if all of it was in memory and is now at dst.
bool StoreImpl::read_cached(uint32_t id, uint32_t off, uint32_t n, uint8_t* dst, bool touch) {
  if (!tier_.on() || !index_.at(id).flag(Entry::kCached)) return false;
  const uint32_t end = off + n;
  if (off / kPage == (end - 1) / kPage && end <= kPieceMax) {
    const uint32_t f = tier_.find(id, off / kPage);
    if (!f) return false;
    if (touch) tier_.touch(f);
    std::memcpy(dst, tier_.data(f) + off % kPage, n);
    return true;
  }
  uint32_t ids[kMaxPieces];
  for (uint32_t k = off / kPieceMax; k <= (end - 1) / kPieceMax; k++) {
    ids[k] = k == 0 ? id : index_.id_of(piece_key(index_.key_of(id), k));
    if (!ids[k]) return false;
  }
  for (uint32_t at = off / kPage; at <= (end - 1) / kPage; at++)
    if (!tier_.find(ids[at * kPage / kPieceMax], at % (kPieceMax / kPage))) return false;
  for (uint32_t at = off; at < end;) {
    const uint32_t f = tier_.find(ids[at / kPieceMax], at % kPieceMax / kPage);
    const uint32_t step = std::min(kPage - at % kPage, end - at);
    if (touch) tier_.touch(f);
    std::memcpy(dst + (at - off), tier_.data(f) + at % kPage, step);
    at += step;
  }
  return true;
}

int64_t StoreImpl::lend(const ChunkKey& key, uint32_t off, uint32_t len, bool touch, bool sum, Lent* out) {
  const uint32_t id = index_.id_of(key);
  if (!id) return -ENOENT;
  Entry& e = index_.at(id);
  out->length = e.len();
  if (off >= e.len() || len == 0) return 0;
  const uint32_t n = std::min(len, e.len() - off), end = off + n;
  if (!tier_.on() || !e.flag(Entry::kCached) || n > Lent::kMaxBytes) return -EAGAIN;
  uint32_t piece = id, first = 0, f = 0;
  for (uint32_t at = off; at < end;) {
    const uint32_t step = std::min(kPage - at % kPage, end - at);
    if (at / kPieceMax != 0 && (at == off || at % kPieceMax == 0)) piece = index_.id_of(piece_key(key, at / kPieceMax));
    f = piece ? tier_.find_next(f, piece, at % kPieceMax / kPage) : 0;
    if (at == off) first = piece;
    if (!f || !tier_.pin(f)) return give_back(out), -EAGAIN;
    out->pins.push_back(f);
    const uint8_t* from = tier_.data(f) + at % kPage;
    if (!out->parts.empty() && out->parts.back().ptr + out->parts.back().len == from) {
      out->parts.back().len += step;
    } else if (out->parts.size() == Lent::kMaxParts) {
      return give_back(out), -EAGAIN;
    } else {
      out->parts.push_back({from, step});
    }
    at += step;
  }
  if (sum && !sum_lent(first, off % kPieceMax, n, out)) {
    st_.checksum_errors++;
    give_back(out);
    for (uint32_t k = off / kPieceMax; k <= (end - 1) / kPieceMax; k++)
      drop_pages(k == 0 ? id : index_.id_of(piece_key(key, k)));
    return -EAGAIN;
  }
  if (touch) {
    for (const uint32_t pin : out->pins) tier_.touch(pin);
    if (e.flag(Entry::kEvictable)) Evictor::touched(e);
  }
  st_.gets++;
  st_.get_hits++;
  st_.mem_hits++;
  st_.mem_bytes += n;
  st_.bytes_read += n;
  return n;
}

// Sets out->sum. What begins at `off` of entry `id` may end in other entries: pieces of a sealed chunk, which change with it
// only. False: the bytes are not what they were when their sum was made.
bool StoreImpl::sum_lent(uint32_t id, uint32_t off, uint32_t n, Lent* out) {
  if (n < MemoryTier::kMinSummed) {
    out->sum = sum_of(*out);
    return true;
  }
  if (MemoryTier::RangeSum* known = tier_.range_sum(id, off, n)) {
    out->sum = known->sum;
    return ++known->uses % kSumUses != 0 || sum_of(*out) == known->sum;
  }
  out->sum = sum_of(*out);
  tier_.remember_sum(id, off, n, out->sum);
  return true;
}

void StoreImpl::give_back(Lent* lent) {
  for (uint32_t f : lent->pins) tier_.unpin(f);
  lent->pins.clear();
  lent->parts.clear();
}

// Whether the bytes of this read go into the tier.
bool StoreImpl::wants_copy(const Piece* p) {
  const Request* r = p->read->r;
  if (!tier_.on() || !r || (r->flags & Request::kNoTouch)) return false;
  if (!opt_.verify && !p->bounce) return false;  // nothing to verify a copy by
  if (!index_.live(p->id) || index_.at(p->id).loc() * 512 != p->off) return false;
  if (r->key.kind == Kind::File) return tier_.asked_before(p->id, p->region / kPage);
  // Nobody waits for memory that has no pages yet: a large read is kept the next time.
  return p->len <= kKeepAtOnce || (tier_.asked_before(p->id) && tier_.ready(p->region_len));
}

// Checks what was read, one sub-block after the other, and keeps it if asked to. sums: of the piece's sub-blocks.
bool StoreImpl::verify_and_keep(const Piece* p, const uint64_t* sums, bool keep) {
  const uint8_t* data = p->bounce ? static_cast<uint8_t*>(p->bounce) : p->user;
  const uint32_t sub = sub_block(p->len);
  for (uint32_t at = 0; at < p->region_len; at += sub) {
    const uint32_t n = std::min(sub, p->region_len - at);
    const uint8_t* src = data + at;
    if (keep && !p->bounce) {
      std::memcpy(copy_.data(), src, n);
      src = copy_.data();
    }
    if (xxh3(src, n) != sums[(p->region + at) / sub]) return false;
    if (keep) keep_pages(p->id, p->len, p->region + at, src, n);
  }
  return true;
}

// [from, from + n) of a piece of `len` bytes: its whole pages, and the piece's last one. What is returned is the sum of the
// copies, if it is asked for and from is a page's start.
uint64_t StoreImpl::keep_pages(uint32_t id, uint32_t len, uint32_t from, const uint8_t* data, uint32_t n, bool sum) {
  XXH3_state_t s;
  if (sum) XXH3_64bits_reset(&s);
  for (auto at = static_cast<uint32_t>(round_up(from, kPage)); at < from + n; at += kPage) {
    const uint32_t want = std::min(kPage, len - at);
    if (at + want > from + n) break;
    uint8_t* page = tier_.fill(id, at / kPage);
    std::memcpy(page, data + (at - from), want);
    if (sum) XXH3_64bits_update(&s, page, want);
    index_.at(id).set_flag(Entry::kCached, true);
  }
  return sum ? XXH3_64bits_digest(&s) : 0;
}

// The bytes of a put or write that is being published. A large block is kept too, for whoever continues what was just
// computed, if that needs no page made first; other large chunks are once they are read twice. No page of the entry is in the
// tier: what is copied before its sum is known goes into no frame that is being sent.
void StoreImpl::keep_written(const WriteOp* op, const Piece* p, uint32_t id) {
  if (!tier_.on() || (op->r && (op->r->flags & Request::kNoTouch))) return;
  if (op->total > kKeepAtOnce && !(op->sealed && tier_.ready(op->total))) {
    tier_.asked_before(id);
    return;
  }
  const bool ours = p->bounce || op->merged;
  const auto* data = static_cast<const uint8_t*>(p->data.mem.ptr);
  const uint64_t* sums = p->tr ? p->tr->sum : &p->csum;
  const uint32_t sub = sub_block(p->len);
  for (uint32_t at = 0; at < p->len; at += sub) {
    const uint32_t n = std::min(sub, p->len - at);
    const uint64_t sum = keep_pages(id, p->len, at, data + at, n, !ours);
    if (!ours && sum != sums[at / sub])
      return drop_pages(id);  // its owner changed it: a read will say what it is worth
  }
}

void StoreImpl::drop_pages(uint32_t id) {
  Entry& e = index_.at(id);
  if (!e.flag(Entry::kCached)) return;
  const uint32_t len = std::min(e.len(), kPieceMax);
  for (uint32_t page = 0; page * kPage < len; page++) tier_.drop(id, page);
  e.set_flag(Entry::kCached, false);
}

}  // namespace kvfs
