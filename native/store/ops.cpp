// ops.cpp owns the chunk operations: reads with their checksums, copy-on-write writes, and deletion.
//
// A 4 KiB read: start_get -> read_chunk -> device -> on_read_io -> finish_piece_read -> complete.
#include <errno.h>

#include <algorithm>

#include "store_impl.h"

namespace kvfs {

StoreImpl::Piece* StoreImpl::piece_get() {
  if (pieces_.empty()) return new Piece;
  Piece* p = pieces_.back();
  pieces_.pop_back();
  *p = Piece{};
  return p;
}

void StoreImpl::piece_put(Piece* p) {
  if (p->bounce) pool_.put(p->bounce, p->bounce_len);
  if (p->tr) pool_.put(p->tr, trailer_io_);
  p->bounce = nullptr;
  p->tr = nullptr;
  if (pieces_.size() < kKeepOps)
    pieces_.push_back(p);
  else
    delete p;
}

ReadOp* StoreImpl::read_get() {
  ReadOp* op;
  if (reads_.empty()) {
    op = new ReadOp;
  } else {
    op = reads_.back();
    reads_.pop_back();
    *op = ReadOp{};
  }
  op->store = this;
  return op;
}

void StoreImpl::read_put(ReadOp* op) {
  if (reads_.size() < kKeepOps)
    reads_.push_back(op);
  else
    delete op;
}

// In flight until retire(). r: null for a move.
WriteOp* StoreImpl::write_get(Request* r) {
  WriteOp* op;
  if (writes_.empty()) {
    op = new WriteOp;
  } else {
    op = writes_.back();
    writes_.pop_back();
    auto pieces = std::move(op->pieces);  // empty, but has memory
    *op = WriteOp{};
    op->pieces = std::move(pieces);
  }
  op->r = r;
  op->store = this;
  ops_++;
  writes_in_flight_++;
  return op;
}

// ---- reads

void StoreImpl::start_get(Request* r) {
  st_.gets++;
  r->summed = false;
  const uint32_t id = index_.id_of(r->key);
  if (!id) return complete(r, -ENOENT);
  st_.get_hits++;
  Entry& e = index_.at(id);
  if (e.flag(Entry::kEvictable) && !(r->flags & Request::kNoTouch)) Evictor::touched(e);
  if (r->off >= e.len() || r->len == 0) return complete(r, 0);
  const uint32_t n = std::min(r->len, e.len() - r->off);
  r->result = n;
  if (read_cached(id, r->off, n, static_cast<uint8_t*>(r->mem.ptr), !(r->flags & Request::kNoTouch))) {
    st_.mem_hits++;
    st_.mem_bytes += n;
    st_.bytes_read += n;
    return complete(r, n);
  }
  ReadOp* op = read_get();
  op->r = r;
  read_chunk(op, id, r->off, n, static_cast<uint8_t*>(r->mem.ptr), r->mem.fixed);
}

void StoreImpl::read_chunk(ReadOp* op, uint32_t id, uint32_t off, uint32_t n, uint8_t* dst, int fixed) {
  const ChunkKey key = index_.key_of(id);
  const uint32_t total = index_.at(id).len();
  const uint32_t align = dev_.align();
  op->epoch = epoch_;
  epoch_reads_[epoch_ - epoch_base_]++;
  ops_++;
  op->pending = 1;  // held while submitting
  for (uint32_t k = off / kPieceMax; k <= (off + n - 1) / kPieceMax; k++) {
    const uint32_t piece_id = k == 0 ? id : index_.id_of(piece_key(key, k));
    if (!piece_id) {
      op->err = EIO;
      break;
    }
    const Entry* e = &index_.at(piece_id);
    const uint32_t base = k * kPieceMax;
    Piece* p = piece_get();
    p->read = op;
    p->id = piece_id;
    p->off = e->loc() * 512;
    p->len = k == 0 ? std::min(total, kPieceMax) : e->len();
    p->csum = e->csum;
    p->from = std::max(off, base) - base;
    p->to = std::min(off + n - base, p->len);
    p->user = dst + (base + p->from - off);
    const uint32_t sub = opt_.verify ? sub_block(p->len) : align;
    p->region = p->from / sub * sub;
    p->region_len = std::min(static_cast<uint32_t>(round_up(p->to, sub)), p->len) - p->region;
    const auto io_len = static_cast<uint32_t>(round_up(p->region_len, align));
    if (p->region % align) {  // sub-blocks are multiples of 4096 or the whole piece
      KVFS_CHECK(!"sub-block alignment");
    }
    const bool direct = p->region == p->from && io_len == p->to - p->from && dev_.mem_ok(p->user);
    if (!direct) {
      p->bounce_len = io_len;
      p->bounce = pool_.get(io_len);
    }
    p->data.op = Io::Op::Read;
    p->data.mem = direct ? MemRef{p->user, fixed} : MemRef{p->bounce, -1};
    p->data.len = io_len;
    p->data.off = p->off + p->region;
    p->data.owner = p;
    p->data.done = on_read_io;
    if (opt_.verify && trailer_bytes(class_of(p->len))) {
      p->sums_cached = sums_.find(p->off) != nullptr;
      if (!p->sums_cached) {
        p->tr = static_cast<Trailer*>(pool_.get(trailer_io_));
        p->trailer.op = Io::Op::Read;
        p->trailer.mem = {p->tr, -1};
        p->trailer.len = trailer_io_;
        p->trailer.off = alloc_->trailer_off(p->off);
        p->trailer.owner = p;
        p->trailer.done = on_read_io;
        op->pending++;
        dev_.submit(&p->trailer);
      }
    }
    op->pending++;
    dev_.submit(&p->data);
  }
  if (--op->pending == 0) {  // nothing could be submitted
    epoch_reads_[op->epoch - epoch_base_]--;
    ops_--;
    Request* r = op->r;
    read_put(op);
    KVFS_CHECK(r);
    complete(r, -EIO);
  }
}

void StoreImpl::on_read_io(Io* io) {
  auto* p = static_cast<Piece*>(io->owner);
  ReadOp* op = p->read;
  StoreImpl* s = op->store;
  if (io->result < 0) {
    s->st_.io_errors++;
    op->err = EIO;
  }
  // A piece is finished by the later of its two transfers.
  const bool two = p->tr != nullptr;
  if (two && !p->sums_cached) {
    p->sums_cached = true;  // the first of the two is here
    op->pending--;
    return;
  }
  s->finish_piece_read(p);
}

void StoreImpl::finish_piece_read(Piece* p) {
  ReadOp* op = p->read;
  if (!op->err && opt_.verify) {
    bool good = true;
    const uint64_t* sums = &p->csum;  // of the whole piece
    if (trailer_bytes(class_of(p->len))) {
      if (p->tr) {
        const uint32_t sub = sub_block(p->len);
        good = xxh3(p->tr, sizeof(Trailer)) == p->csum && p->tr->sums == (p->len + sub - 1) / sub;
        if (good) {
          sums_.fill(p->off, *p->tr);
          sums = p->tr->sum;
        }
      } else if (const auto* line = sums_.find(p->off)) {
        sums = line->sum;
      } else {  // pushed out of the cache meanwhile: read the trailer now
        p->tr = static_cast<Trailer*>(pool_.get(trailer_io_));
        p->sums_cached = true;
        p->trailer = Io{};
        p->trailer.op = Io::Op::Read;
        p->trailer.mem = {p->tr, -1};
        p->trailer.len = trailer_io_;
        p->trailer.off = alloc_->trailer_off(p->off);
        p->trailer.owner = p;
        p->trailer.done = on_read_io;
        dev_.submit(&p->trailer);
        return;
      }
    }
    if (!good || !verify_and_keep(p, sums, wants_copy(p))) {
      st_.checksum_errors++;
      op->err = EIO;
    } else if (Request* r = op->r; r && sums == &p->csum && p->from == 0 && r->result == p->len) {
      r->sum = p->csum;  // all of the chunk, which is one piece with one sum
      r->summed = true;
    }
  } else if (!op->err && wants_copy(p)) {
    keep_pages(p->id, p->len, p->region, static_cast<uint8_t*>(p->bounce), p->region_len);
  }
  if (!op->err && p->bounce)
    std::memcpy(p->user, static_cast<uint8_t*>(p->bounce) + (p->from - p->region), p->to - p->from);
  st_.bytes_read += p->to - p->from;
  piece_put(p);
  if (--op->pending) return;
  epoch_reads_[op->epoch - epoch_base_]--;
  ops_--;
  if (op->done) return op->done(op);
  Request* r = op->r;
  const int err = op->err;
  read_put(op);
  complete(r, err ? -err : r->result);
}

// ---- mutations: one at a time per key

bool StoreImpl::lock(Request* r) {
  const auto it = locks_.find(r->key);
  if (it == locks_.end()) {
    lock(r->key);
    return true;
  }
  r->next = nullptr;
  if (it->second.tail)
    it->second.tail->next = r;
  else
    it->second.head = r;
  it->second.tail = r;
  return false;
}

void StoreImpl::lock(const ChunkKey& key) {
  if (lock_nodes_.empty()) {
    locks_.try_emplace(key);
    return;
  }
  Locks::node_type node = std::move(lock_nodes_.back());
  lock_nodes_.pop_back();
  node.key() = key;
  node.mapped() = {};
  locks_.insert(std::move(node));
}

void StoreImpl::unlock(const ChunkKey& key) {
  auto it = locks_.find(key);
  KVFS_CHECK(it != locks_.end());
  Request* r = it->second.head;
  if (lock_nodes_.size() < kKeepOps)
    lock_nodes_.push_back(locks_.extract(it));
  else
    locks_.erase(it);
  while (r) {  // each takes the lock again in order; the rest queue behind the first
    Request* next = r->next;
    r->next = nullptr;
    start(r);
    r = next;
  }
}

bool StoreImpl::needs_stall() const {
  // Room for what is in flight, with a full group of slack per queued group.
  const uint64_t pending =
      uint64_t{writes_in_flight_} * kMaxPieces * 2 * sizeof(Record) + (open_.size() + 2) * 2 * kGroupMax;
  return ck_calm_ || journal_used() + pending > geo_.journal_bytes * 7 / 8;
}

void StoreImpl::start_put(Request* r) {
  if (r->len == 0 || r->len > kMaxChunk) {
    unlock(r->key);
    return complete(r, -EINVAL);
  }
  if (const uint32_t id = index_.id_of(r->key)) {
    const bool same = index_.at(id).len() == r->len;
    st_.puts_existed++;
    unlock(r->key);
    if (!same) return complete(r, -EEXIST);
    return conclude(r, last_seq(), 0);  // the first put may not be on stable storage yet
  }
  WriteOp* op = write_get(r);
  op->total = r->len;
  op->sealed = true;
  op->src = static_cast<const uint8_t*>(r->mem.ptr);
  op->fixed = r->mem.fixed;
  launch_write(op);
}

void StoreImpl::start_write(Request* r) {
  if (r->len == 0 || r->len > kFileChunk || r->off > kFileChunk - r->len) {
    unlock(r->key);
    return complete(r, -EINVAL);
  }
  WriteOp* op = write_get(r);
  op->fixed = r->mem.fixed;
  op->old_id = index_.id_of(r->key);
  const uint32_t old = op->old_id ? index_.at(op->old_id).len() : 0;
  op->version = op->old_id ? index_.at(op->old_id).version + 1 : 1;
  op->total = std::max(old, r->off + r->len);
  if (r->off == 0 && r->len >= old) {  // replaces the whole chunk
    op->src = static_cast<const uint8_t*>(r->mem.ptr);
    return launch_write(op);
  }
  op->merged_len = static_cast<uint32_t>(round_up(op->total, dev_.align()));
  op->merged = pool_.get(op->merged_len);
  write_merged(op);
}

void StoreImpl::start_truncate(Request* r) {
  const uint32_t id = index_.id_of(r->key);
  if (!id || r->off >= index_.at(id).len()) {
    unlock(r->key);
    return complete(r, 0);
  }
  if (r->off == 0) return start_delete(r);
  WriteOp* op = write_get(r);
  op->old_id = id;
  op->version = index_.at(id).version + 1;
  op->total = r->off;
  op->merged_len = static_cast<uint32_t>(round_up(op->total, dev_.align()));
  op->merged = pool_.get(op->merged_len);
  write_merged(op);
}

// Read-modify-write: the old bytes come first, then the new ones over them.
void StoreImpl::write_merged(WriteOp* op) {
  std::memset(op->merged, 0, op->merged_len);
  op->src = static_cast<uint8_t*>(op->merged);
  op->fixed = -1;
  const auto overlay = [](StoreImpl*, WriteOp* w) {
    Request* r = w->r;
    if (r->op == Request::Op::Write) std::memcpy(static_cast<uint8_t*>(w->merged) + r->off, r->mem.ptr, r->len);
  };
  const uint32_t keep = op->old_id ? std::min(index_.at(op->old_id).len(), op->total) : 0;
  if (!keep || read_cached(op->old_id, 0, keep, static_cast<uint8_t*>(op->merged), true)) {
    overlay(this, op);
    return launch_write(op);
  }
  ReadOp* read = read_get();
  read->owner = op;
  read->done = [](ReadOp* rd) {
    auto* w = static_cast<WriteOp*>(rd->owner);
    StoreImpl* s = rd->store;
    const int err = rd->err;
    s->read_put(rd);
    if (err) return s->fail_write(w, err);
    Request* r = w->r;
    if (r->op == Request::Op::Write) std::memcpy(static_cast<uint8_t*>(w->merged) + r->off, r->mem.ptr, r->len);
    s->launch_write(w);
  };
  read_chunk(read, op->old_id, 0, keep, static_cast<uint8_t*>(op->merged), -1);
}

// Allocates, checksums and writes the pieces of the new chunk.
void StoreImpl::launch_write(WriteOp* op) {
  const uint32_t n = pieces_of(op->total);
  const uint32_t reserve = reserve_segments(n);
  for (uint32_t k = 0; k < n; k++) {
    const uint32_t len = std::min(kPieceMax, op->total - k * kPieceMax);
    const uint64_t off = alloc_->free_segments() < reserve ? 0 : alloc_->alloc(len, reserve);
    if (off == 0) {
      for (Piece* p : op->pieces) {
        alloc_->release(p->off);
        piece_put(p);
      }
      op->pieces.clear();
      Request* r = op->r;
      retire(op);
      return wait_for_space(r);
    }
    Piece* p = piece_get();
    p->write = op;
    p->off = off;
    p->len = len;
    op->pieces.push_back(p);
  }
  KVFS_CHECK(alloc_->free_segments() >= reserve);  // the next checkpoint fits, here and after a crash
  op->pending = 1;
  for (uint32_t k = 0; k < n; k++) write_piece(op->pieces[k], piece_key(op->r->key, k), op->src + k * kPieceMax);
  op->pending--;  // never the last: each piece has a transfer that completes from poll()
}

// Checksums one piece and sends it to its slot; p->write->pending counts the transfers.
void StoreImpl::write_piece(Piece* p, const ChunkKey& key, const uint8_t* src) {
  WriteOp* op = p->write;
  const auto io_len = static_cast<uint32_t>(round_up(p->len, dev_.align()));
  const bool direct = io_len == p->len && dev_.mem_ok(src);
  if (!direct) {
    p->bounce_len = io_len;
    p->bounce = pool_.get(io_len);
    std::memcpy(p->bounce, src, p->len);
    std::memset(static_cast<uint8_t*>(p->bounce) + p->len, 0, io_len - p->len);
    src = static_cast<uint8_t*>(p->bounce);
  }
  if (trailer_bytes(class_of(p->len))) {
    p->tr = static_cast<Trailer*>(pool_.get(trailer_io_));
    std::memset(static_cast<void*>(p->tr), 0, trailer_io_);
    const uint32_t sub = sub_block(p->len);
    p->tr->magic = kTrailerMagic;
    p->tr->sums = (p->len + sub - 1) / sub;
    p->tr->key = key;
    p->tr->length = p->len;
    p->tr->version = op->version;
    for (uint32_t i = 0; i < p->tr->sums; i++) p->tr->sum[i] = xxh3(src + i * sub, std::min(sub, p->len - i * sub));
    p->csum = xxh3(p->tr, sizeof(Trailer));
    p->trailer.op = Io::Op::Write;
    p->trailer.mem = {p->tr, -1};
    p->trailer.len = trailer_io_;
    p->trailer.off = alloc_->trailer_off(p->off);
    p->trailer.owner = p;
    p->trailer.done = on_write_io;
    op->pending++;
    dev_.submit(&p->trailer);
  } else {
    p->csum = xxh3(src, p->len);
  }
  p->data.op = Io::Op::Write;
  p->data.mem = {const_cast<uint8_t*>(src), direct ? op->fixed : -1};
  p->data.len = io_len;
  p->data.off = p->off;
  p->data.owner = p;
  p->data.done = on_write_io;
  op->pending++;
  dev_.submit(&p->data);
}

void StoreImpl::on_write_io(Io* io) {
  auto* p = static_cast<Piece*>(io->owner);
  WriteOp* op = p->write;
  StoreImpl* s = op->store;
  if (io->result < 0) {
    s->st_.io_errors++;
    if (!op->err) op->err = -io->result;
  }
  if (--op->pending) return;
  if (!op->r) return s->commit_move(op);
  if (op->err) return s->fail_write(op, op->err);
  s->commit_write(op);
}

// The data is on the device: the index learns of it, the journal too.
void StoreImpl::commit_write(WriteOp* op) {
  if (failed_) return fail_write(op, failed_);
  Request* r = op->r;
  Record recs[kMaxPieces];
  uint64_t old_slot = 0;
  uint32_t n = 0;
  int err = 0;
  for (uint32_t k = static_cast<uint32_t>(op->pieces.size()); k-- > 0;) {  // piece 0 last: it publishes the chunk
    Piece* p = op->pieces[k];
    const ChunkKey key = piece_key(r->key, k);
    uint32_t id = index_.id_of(key);
    if (id) {
      KVFS_CHECK(!op->sealed && id == op->old_id);
      old_slot = index_.at(id).loc() * 512;
    } else if (!(id = index_.insert(key, &err))) {
      for (uint32_t j = k + 1; j < op->pieces.size(); j++) index_.erase(index_.id_of(piece_key(r->key, j)));
      return fail_write(op, err < 0 ? -err : err);
    }
    Entry& e = index_.at(id);
    drop_pages(id);
    const uint32_t before = old_slot && k == 0 ? e.len() : 0;
    e.set_loc(p->off / 512);
    e.set_len(k == 0 ? op->total : p->len);
    e.csum = p->csum;
    e.version = op->version;
    e.mtime = wall_s_;
    e.set_flag(Entry::kSealed, op->sealed);
    const bool evictable = op->sealed && (r->flags & Request::kEvictable);
    e.set_flag(Entry::kEvictable, evictable);
    if (evictable && k == 0) evictor_.added(id, key);
    if (p->tr) sums_.fill(p->off, *p->tr);
    keep_written(op, p, id);
    recs[n++] = record_of(id);
    if (k == 0) {
      st_.data_bytes += op->total - before;
      if (!old_slot) {
        st_.chunks++;
        (op->sealed ? st_.block_chunks : st_.file_chunks)++;
      }
    }
    unflushed_bytes_ += p->len;
  }
  const uint64_t seq = log(recs, n);
  if (!space_wait_.empty()) {  // what is published can be moved out of the way
    defrag_barren_ = false;
    defrag_fresh_ = true;
  }
  if (old_slot) quarantine(old_slot, seq);
  (op->sealed ? st_.puts : st_.writes)++;
  st_.bytes_written += r->len;
  for (Piece* p : op->pieces) piece_put(p);
  op->pieces.clear();
  retire(op);
  conclude(r, seq, r->op == Request::Op::Put ? 1 : r->op == Request::Op::Write ? int64_t{r->len} : 0);
  unlock(r->key);
}

void StoreImpl::fail_write(WriteOp* op, int err) {
  for (Piece* p : op->pieces) {
    alloc_->release(p->off);  // nothing refers to it
    piece_put(p);
  }
  op->pieces.clear();
  Request* r = op->r;
  retire(op);
  complete(r, -err);
  unlock(r->key);
}

void StoreImpl::retire(WriteOp* op) {
  if (op->merged) pool_.put(op->merged, op->merged_len);
  if (writes_.size() < kKeepOps)
    writes_.push_back(op);
  else
    delete op;
  ops_--;
  writes_in_flight_--;
}

uint32_t StoreImpl::drop_chunk(uint32_t id, uint64_t) {
  const ChunkKey key = index_.key_of(id);
  const Entry& e = index_.at(id);
  const uint32_t total = e.len(), n = pieces_of(total);
  st_.chunks--;
  (key.kind == Kind::Block ? st_.block_chunks : st_.file_chunks)--;
  st_.data_bytes -= total;
  evictor_.removed(id);
  Record recs[kMaxPieces];
  uint64_t slots[kMaxPieces];
  uint32_t k = 0;
  for (uint32_t i = 0; i < n; i++) {
    const uint32_t pid = i == 0 ? id : index_.id_of(piece_key(key, i));
    if (!pid) continue;
    slots[k] = index_.at(pid).loc() * 512;
    recs[k] = Record{};
    recs[k].type = Record::kDelete;
    recs[k].key = piece_key(key, i);
    recs[k].version = index_.at(pid).version;
    drop_pages(pid);
    index_.erase(pid);
    k++;
  }
  const uint64_t seq = log(recs, k);
  defrag_barren_ = false;
  defrag_fresh_ = true;
  for (uint32_t i = 0; i < k; i++) quarantine(slots[i], seq);
  return k;
}

void StoreImpl::start_delete(Request* r) {
  const uint32_t id = index_.id_of(r->key);
  if (!id) {
    unlock(r->key);
    return complete(r, -ENOENT);
  }
  drop_chunk(id, 0);
  st_.deletes++;
  conclude(r, last_seq(), 0);
  unlock(r->key);
}

}  // namespace kvfs
