// store.cpp owns the life of an open store: format, open, close, dispatch of requests, completion, statistics.
#include "store.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>
#include <time.h>

#include <algorithm>
#include <bit>

#include "store_impl.h"

namespace kvfs {

BufferPool::~BufferPool() {
  for (auto& b : bins_)
    for (void* p : b) free(p);
}

uint32_t BufferPool::bin(uint32_t bytes) {
  const uint32_t units = (bytes + 511) / 512;
  return static_cast<uint32_t>(std::bit_width(units - 1));
}

void* BufferPool::get(uint32_t bytes) {
  const uint32_t b = bin(bytes);
  KVFS_CHECK(b < 16);
  if (!bins_[b].empty()) {
    void* p = bins_[b].back();
    bins_[b].pop_back();
    return p;
  }
  void* p = nullptr;
  KVFS_CHECK(posix_memalign(&p, kBlock, 512u << b) == 0);
  return p;
}

void BufferPool::put(void* p, uint32_t bytes) {
  auto& b = bins_[bin(bytes)];
  if (b.size() < kKeep)
    b.push_back(p);
  else
    free(p);
}

Status Store::format(Device& dev, const FormatOptions& opt) {
  const uint64_t size = (opt.size ? std::min(opt.size, dev.size()) : dev.size()) / kBlock * kBlock;
  if (size > Entry::kMaxLoc * 512) return {EFBIG, "a store is limited to 8 TiB"};
  SuperBlock sb{};
  sb.magic = kSuperMagic;
  sb.format_version = kFormatVersion;
  sb.clean = 1;
  if (getrandom(sb.uuid, sizeof sb.uuid, 0) != sizeof sb.uuid) return {EIO, "no random numbers for the store's id"};
  sb.generation = 1;
  sb.size = size;
  uint32_t seg = opt.segment_bytes;
  if (seg == 0) {
    seg = 16u << 20;
    while (seg > (1u << 20) && size / seg < 512) seg /= 2;
    seg = std::max(seg, 2u << 20);
  }
  if (!std::has_single_bit(seg) || seg < (1u << 20) || seg > (64u << 20))
    return {EINVAL, "the segment size must be a power of two between 1 and 64 MiB"};
  uint64_t journal = opt.journal_bytes ? opt.journal_bytes : std::clamp<uint64_t>(size / 64, 4u << 20, 64u << 20);
  journal = journal / kBlock * kBlock;
  if (journal < (1u << 20)) return {EINVAL, "the journal must be at least 1 MiB"};
  sb.segment_bytes = seg;
  sb.journal_bytes = journal;
  const uint64_t stride = seg + seg / 128;
  sb.segments = size > kJournalOff + journal ? static_cast<uint32_t>((size - kJournalOff - journal) / stride) : 0;
  if (sb.segments < 4) return {ENOSPC, "the device is too small: at least four segments must fit"};
  sb.start_seq = 1;
  sb.checksum = xxh3(&sb, offsetof(SuperBlock, checksum));
  // An old journal must not be taken for this store's: the uuid in each group differs. Superblocks last.
  void* buf = nullptr;
  KVFS_CHECK(posix_memalign(&buf, kBlock, kBlock) == 0);
  std::memcpy(buf, &sb, sizeof sb);
  int err = 0;
  for (int i = 0; i < 3 && !err; i++) {
    Io io;
    io.op = i < 2 ? Io::Op::Write : Io::Op::Flush;
    io.mem = {buf, -1};
    io.len = i < 2 ? kBlock : 0;
    io.off = i < 2 ? kSuperOff[i] : 0;
    bool done = false;
    io.owner = &done;
    io.done = [](Io* x) { *static_cast<bool*>(x->owner) = true; };
    dev.submit(&io);
    while (!done) dev.poll(true);
    err = -io.result;
  }
  free(buf);
  if (err) return {err, "writing the superblock failed"};
  return {};
}

Status Store::open(Device& dev, const StoreOptions& opt, std::unique_ptr<Store>* out) {
  auto s = std::make_unique<StoreImpl>(dev, opt);
  Status st = s->recover();
  if (st.err) return st;
  *out = std::move(s);
  return {};
}

StoreImpl::StoreImpl(Device& dev, const StoreOptions& opt)
    : dev_(dev),
      opt_(opt),
      sums_(1u << 16),
      tier_(opt.memory_bytes, opt.memory_ahead),
      copy_(sub_block(kPieceMax)),
      trailer_io_(static_cast<uint32_t>(round_up(kTrailerBytes, dev.align()))) {
  KVFS_CHECK(posix_memalign(&group_buf_, kBlock, kGroupMax + kBlock) == 0);
  for (auto& p : ck_page_) KVFS_CHECK(posix_memalign(&p.buf, kBlock, kCheckpointPage) == 0);
}

StoreImpl::~StoreImpl() {
  // Nothing of ours may still be in flight when the memory goes. A store that was not closed is as after a crash.
  while (dev_.inflight()) dev_.poll(true);
  for (Piece* p : pieces_) delete p;
  for (ReadOp* op : reads_) delete op;
  for (WriteOp* op : writes_) delete op;
  for (auto& p : ck_page_) free(p.buf);
  free(group_buf_);
}

int StoreImpl::sync_io(Io::Op op, void* buf, uint32_t len, uint64_t off) {
  Io io;
  bool done = false;
  io.op = op;
  io.mem = {buf, -1};
  io.len = len;
  io.off = off;
  io.owner = &done;
  io.done = [](Io* x) { *static_cast<bool*>(x->owner) = true; };
  dev_.submit(&io);
  while (!done) dev_.poll(true);
  return io.result;
}

void StoreImpl::complete(Request* r, int64_t result) {
  r->result = result;
  r->next = nullptr;
  if (done_tail_)
    done_tail_->next = r;
  else
    done_head_ = r;
  done_tail_ = r;
}

void StoreImpl::run_completed() {
  while (done_head_) {  // one batch per call chain: a callback may submit more, which completes in the next round
    Request* r = done_head_;
    done_head_ = done_tail_ = nullptr;
    while (r) {
      Request* next = r->next;
      r->next = nullptr;
      r->done(r);
      r = next;
    }
    if (done_head_) break;
  }
}

void StoreImpl::submit(Request* r) {
  std::memset(r->priv, 0, sizeof r->priv);
  start(r);
}

void StoreImpl::start(Request* r) {
  using Op = Request::Op;
  if (r->op == Op::Get) return start_get(r);
  if (opt_.read_only) return complete(r, -EROFS);
  if (failed_) return complete(r, -failed_);
  switch (r->op) {
    case Op::Flush:
    case Op::Sync:
      if (last_seq() <= flushed_seq_) return complete(r, 0);
      return wait_durable(r, last_seq());
    case Op::Checkpoint:
      ck_waiters_.push_back(r);
      ck_wanted_ = true;
      return;
    case Op::Lookup:
    case Op::Scan:
    case Op::Purge:
      return complete(r, -EOPNOTSUPP);
    default:
      break;
  }
  if (needs_stall()) {
    stalled_.push_back(r);
    ck_wanted_ = true;
    return;
  }
  if (!lock(r)) return;
  switch (r->op) {
    case Op::Put:
      return start_put(r);
    case Op::Write:
      return start_write(r);
    case Op::Truncate:
      return start_truncate(r);
    case Op::Delete:
      return start_delete(r);
    default:
      break;
  }
  KVFS_CHECK(!"unknown store operation");
}

void StoreImpl::tick(uint64_t now_ns) {
  now_ns_ = now_ns;
  timespec ts;
  clock_gettime(CLOCK_REALTIME_COARSE, &ts);
  wall_s_ = static_cast<uint32_t>(ts.tv_sec);
  if (!opt_.read_only && !failed_) {
    if (journal_used() > geo_.journal_bytes / 2) ck_wanted_ = true;
    write_group();
    if (lazy_since_ && (now_ns - lazy_since_ >= uint64_t{opt_.lazy_ms} * 500000 || unflushed_bytes_ > (128u << 20)))
      flush_wanted_ = true;
    start_flush();
    if (ck_wanted_ && ck_ == Ck::Idle) {
      // One that found too few segments is tried again when there are more, or when somebody waits for it.
      if (ck_short_ == kEnough || alloc_->free_segments() > ck_short_ || !ck_waiters_.empty() || !stalled_.empty())
        checkpoint_start();
      else
        ck_wanted_ = false;
    }
    checkpoint_step();
    keep_room();
  }
  free_quarantined();
  retry_space_waiters();
  defragment_step();
  if (!stalled_.empty() && !needs_stall()) {
    std::deque<Request*> again;
    again.swap(stalled_);
    for (Request* r : again) start(r);
  }
  if (failed_) fail(failed_);
  run_completed();
}

uint64_t StoreImpl::deadline_ns() const {
  uint64_t at = lazy_since_ ? lazy_since_ + uint64_t{opt_.lazy_ms} * 500000 : UINT64_MAX;
  if (!open_.empty() && !group_busy_) at = std::min(at, std::max(hold_until(), now_ns_));
  return at;
}

bool StoreImpl::busy() const {
  if (done_head_) return true;
  if (failed_ || opt_.read_only) return false;
  return (!open_.empty() && !group_busy_ && now_ns_ >= hold_until()) || (ck_wanted_ && ck_ == Ck::Idle) ||
         (ck_ == Ck::Scan && ck_pages_inflight_ < kCkDepth) ||
         (flush_wanted_ && !flush_busy_ && !group_busy_ && written_seq_ > flushed_seq_) ||
         ((evicting_ || !space_wait_.empty()) && can_evict()) ||
         // The next segment is to be emptied, or the waiting requests are to be told that the device is full.
         (!space_wait_.empty() && !space_may_come() && moves_ == 0) ||
         (drain_ != Allocator::kNone && drain_id_ <= index_.capacity() && moves_ < kMaxMoves && !drain_stuck_) ||
         (!stalled_.empty() && !needs_stall());
}

Status StoreImpl::close() {
  if (opt_.read_only) return {};
  closing_ = true;  // nothing waits for company any more: the journal after the last checkpoint is empty
  auto turn = [&] {
    timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    tick(static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec));
    dev_.poll(!busy() && dev_.inflight() > 0);
  };
  while (ops_ || !stalled_.empty() || !space_wait_.empty() || !durable_.empty() || !logged_.empty() ||
         ck_ != Ck::Idle || done_head_ || (!failed_ && (!open_.empty() || group_busy_)))
    turn();
  if (failed_) return {failed_, "the store had a write error and was left as after a crash"};
  Status st = checkpoint_now();
  if (st.err) return st;
  super_.clean = 1;
  if (int e = write_super()) return {-e, "writing the superblock failed"};
  return {};
}

int64_t StoreImpl::lookup(const ChunkKey& key, ChunkInfo* info) {
  const Entry* e = index_.find(key);
  if (!e) return -ENOENT;
  if (info) *info = {key, e->len(), e->version, e->mtime};
  return e->len();
}

bool StoreImpl::scan(uint64_t* cursor, uint32_t budget, Kind kind, uint32_t ns,
                     const std::function<bool(const ChunkInfo&)>& fn) {
  uint64_t id = std::max<uint64_t>(*cursor, 1);
  for (; id <= index_.capacity() && budget; id++, budget--) {
    const uint32_t i = static_cast<uint32_t>(id);
    if (!index_.live(i)) continue;
    const ChunkKey key = index_.key_of(i);
    if (key.kind != kind || key.rsv[0] != 0 || (ns != UINT32_MAX && key.ns != ns)) continue;
    const Entry& e = index_.at(i);
    if (!fn({key, e.len(), e.version, e.mtime})) break;
  }
  *cursor = id;
  return id <= index_.capacity();
}

StoreStats StoreImpl::stats() const {
  StoreStats s = st_;
  s.slot_bytes = alloc_->used_bytes() - quarantined_bytes_;
  s.capacity_bytes = alloc_->capacity_bytes();
  s.free_segments = alloc_->free_segments();
  s.total_segments = geo_.segments;
  s.free_bytes = uint64_t{s.free_segments} * geo_.stride() + alloc_->free_slot_bytes();
  s.reserved_bytes = std::min<uint64_t>(s.free_segments, reserve_segments(1)) * geo_.stride();
  s.index_bytes = index_.memory_bytes() + evictor_.memory_bytes();
  return s;
}

}  // namespace kvfs
