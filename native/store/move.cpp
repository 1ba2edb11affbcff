// move.cpp owns defragmentation: when puts wait for space and no whole segment is left, it empties the sparsest segment by
// moving its chunks into free slots of others. A move is a copy, a record and a quarantined old slot, like an overwrite.
#include <errno.h>

#include <algorithm>

#include "store_impl.h"

namespace kvfs {

void StoreImpl::defragment_step() {
  if (failed_ || opt_.read_only) return;
  if (drain_ == Allocator::kNone) {
    if (space_wait_.empty() || defrag_barren_ || !quarantine_.empty()) return;
    if (defrag_fresh_) {
      alloc_->clear_stuck();
      defrag_fresh_ = false;
    }
    drain_ = alloc_->sparsest(0.95);
    if (drain_ == Allocator::kNone) {
      defrag_barren_ = true;
      return;
    }
    alloc_->set_draining(drain_, true);
    drain_id_ = 1;
    drain_stuck_ = drain_skipped_ = false;
  }
  for (uint32_t seen = 0; seen < 8192 && drain_id_ <= index_.capacity() && moves_ < kMaxMoves && !drain_stuck_;
       drain_id_++, seen++) {
    if (needs_stall()) {
      ck_wanted_ = true;
      return;
    }
    if (!index_.live(drain_id_) || alloc_->segment_of(index_.at(drain_id_).loc() * 512) != drain_) continue;
    if (!move_piece(drain_id_)) drain_stuck_ = true;
  }
  if (moves_ == 0 && (drain_stuck_ || drain_id_ > index_.capacity())) end_drain();
}

// An emptied segment is freed by the quarantine; one that could not be emptied takes chunks again.
void StoreImpl::end_drain() {
  if (drain_stuck_ || drain_skipped_) {
    alloc_->set_draining(drain_, false);
    alloc_->set_stuck(drain_);  // the next sparsest may have somewhere to go
  } else {
    alloc_->clear_stuck();
  }
  drain_ = Allocator::kNone;
  flush_wanted_ = true;
}

// False: there is no slot to move to. A chunk that is being changed is left alone: it leaves its slot by itself.
bool StoreImpl::move_piece(uint32_t id) {
  const ChunkKey key = index_.key_of(id);
  ChunkKey base = key;
  base.rsv[0] = 0;
  const uint32_t base_id = index_.id_of(base);
  // Pieces of a larger chunk are published together; recovery could not tell a lone one from a torn put.
  const bool large = key.rsv[0] != 0 || index_.at(id).len() > kPieceMax;
  if (large || !base_id || locks_.contains(base)) {
    drain_skipped_ = true;
    return true;
  }
  const Entry& e = index_.at(id);
  const uint32_t len = e.len();
  const uint64_t off = alloc_->alloc(len, UINT32_MAX);  // never opens a new segment
  if (off == 0) return false;
  lock(base);
  WriteOp* op = write_get(nullptr);
  op->old_id = id;
  op->old_off = e.loc() * 512;
  op->key = key;
  op->total = len;
  op->version = e.version;
  op->merged_len = static_cast<uint32_t>(round_up(len, dev_.align()));
  op->merged = pool_.get(op->merged_len);
  Piece* p = piece_get();
  p->write = op;
  p->off = off;
  p->len = len;
  op->pieces.push_back(p);
  moves_++;
  ReadOp* read = read_get();
  read->owner = op;
  read->done = [](ReadOp* rd) {
    auto* w = static_cast<WriteOp*>(rd->owner);
    StoreImpl* s = rd->store;
    w->err = rd->err;
    s->read_put(rd);
    if (w->err) return s->commit_move(w);
    s->write_piece(w->pieces[0], w->key, static_cast<uint8_t*>(w->merged));
  };
  read_chunk(read, base_id, 0, len, static_cast<uint8_t*>(op->merged), -1);
  return true;
}

// A chunk that can't be read stays where it is: its damage must stay visible, and its segment can't be emptied.
void StoreImpl::commit_move(WriteOp* op) {
  Piece* p = op->pieces[0];
  ChunkKey base = op->key;
  base.rsv[0] = 0;
  if (op->err || failed_) {
    alloc_->release(p->off);
    drain_stuck_ = true;
  } else {
    KVFS_CHECK(index_.live(op->old_id));
    Entry& e = index_.at(op->old_id);
    KVFS_CHECK(e.loc() * 512 == op->old_off);  // the lock kept it
    e.set_loc(p->off / 512);
    e.csum = p->csum;
    if (p->tr) sums_.fill(p->off, *p->tr);
    const Record rec = record_of(op->old_id);
    quarantine(op->old_off, log(&rec, 1));
    unflushed_bytes_ += p->len;
    st_.moves++;
  }
  piece_put(p);
  op->pieces.clear();
  moves_--;
  retire(op);
  unlock(base);
}

}  // namespace kvfs
