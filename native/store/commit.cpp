// commit.cpp owns durability: the journal with its group commit and barriers, the quarantine of freed slots, and
// checkpoints that run beside traffic.
//
// Order of a durable write: data (and trailer) written -> record in a group -> group written -> barrier -> acknowledged.
// One group is in flight at a time, so the journal on the device has no holes but its tail. The tail after the last
// barrier may lack data; recovery checks the data of records there before it believes them.
#include <errno.h>

#include <algorithm>

#include "store_impl.h"

namespace kvfs {

uint64_t StoreImpl::log(const Record* recs, uint32_t n) {
  KVFS_CHECK(n <= kMaxPieces * 2);
  if (open_.empty()) open_since_ = now_ns_;
  if (open_.empty() || open_.back().size() + n > kGroupRecords) open_.emplace_back();
  open_.back().insert(open_.back().end(), recs, recs + n);
  if (!lazy_since_) lazy_since_ = now_ns_ ? now_ns_ : 1;
  return last_seq();
}

void StoreImpl::wait_durable(Request* r, uint64_t seq) {
  durable_.push_back({r, seq});
  flush_wanted_ = true;
}

// A change that record `seq` tells of is made.
void StoreImpl::conclude(Request* r, uint64_t seq, int64_t result) {
  r->result = result;
  if ((r->flags & Request::kDurable) && seq > flushed_seq_) return wait_durable(r, seq);
  if ((r->flags & Request::kLogged) && seq > written_seq_) {
    logged_.push_back({r, seq});
    return;
  }
  complete(r, result);
}

// A group waits a little for company: for the writes already at the device if somebody waits for a barrier (so that 64
// puts in flight share one), else for more records. How long is part of the stated bound of lazy operations.
uint64_t StoreImpl::hold_until() const {
  if (closing_ || open_.size() != 1 || !space_wait_.empty() || ck_ == Ck::Journal) return 0;
  if (durable_.empty() && logged_.empty() && !flush_wanted_) return open_since_ + kLazyHoldNs;
  return writes_in_flight_ > 0 ? open_since_ + kDurableHoldNs : 0;
}

void StoreImpl::write_group() {
  if (group_busy_ || open_.empty() || now_ns_ < hold_until()) return;
  std::vector<Record> recs = std::move(open_.front());
  open_.pop_front();
  open_since_ = now_ns_;
  const uint32_t used = static_cast<uint32_t>(sizeof(GroupHeader) + recs.size() * sizeof(Record));
  const uint32_t bytes = static_cast<uint32_t>(round_up(used, kBlock));
  const uint64_t at = head_v_ % geo_.journal_bytes;
  if (at + bytes > geo_.journal_bytes) head_v_ += geo_.journal_bytes - at;  // a group never wraps
  KVFS_CHECK(head_v_ + bytes - tail_v_ <= geo_.journal_bytes);
  auto* p = static_cast<uint8_t*>(group_buf_);
  std::memset(p + used, 0, bytes - used);
  GroupHeader h{};
  h.magic = kGroupMagic;
  h.uuid = super_.uuid[0];
  h.seq = next_seq_++;
  h.flushed_seq = flushed_seq_;
  h.bytes = bytes;
  h.records = static_cast<uint32_t>(recs.size());
  std::memcpy(p + sizeof h, recs.data(), recs.size() * sizeof(Record));
  std::memcpy(p, &h, sizeof h);
  h.checksum = xxh3(p, bytes);
  std::memcpy(p, &h, sizeof h);
  group_busy_ = true;
  group_seq_ = h.seq;
  group_v_ = head_v_;
  group_io_ = Io{};
  group_io_.op = Io::Op::Write;
  group_io_.mem = {p, -1};
  group_io_.len = bytes;
  group_io_.off = kJournalOff + head_v_ % geo_.journal_bytes;
  group_io_.owner = this;
  group_io_.done = on_group;
  head_v_ += bytes;
  st_.journal_groups++;
  st_.journal_bytes += bytes;
  dev_.submit(&group_io_);
}

void StoreImpl::on_group(Io* io) {
  auto* s = static_cast<StoreImpl*>(io->owner);
  s->group_busy_ = false;
  if (io->result < 0) return s->fail(-io->result);
  s->written_seq_ = s->group_seq_;
  while (!s->logged_.empty() && s->logged_.front().seq <= s->written_seq_) {
    Request* r = s->logged_.front().r;
    s->logged_.pop_front();
    s->complete(r, r->result);
  }
  s->start_flush();  // the barrier goes out first, the next group joins the queue behind it
  s->write_group();
}

void StoreImpl::start_flush() {
  if (!flush_wanted_ || flush_busy_ || failed_) return;
  if (written_seq_ <= flushed_seq_) {
    if (!group_busy_ && open_.empty()) flush_wanted_ = false;
    return;
  }
  flush_busy_ = true;
  flush_wanted_ = false;
  flush_target_ = written_seq_;
  lazy_since_ = (group_busy_ || !open_.empty()) ? (now_ns_ ? now_ns_ : 1) : 0;
  unflushed_bytes_ = 0;
  flush_io_ = Io{};
  flush_io_.op = Io::Op::Flush;
  flush_io_.owner = this;
  flush_io_.done = on_flush;
  st_.flushes++;
  dev_.submit(&flush_io_);
}

void StoreImpl::on_flush(Io* io) {
  auto* s = static_cast<StoreImpl*>(io->owner);
  s->flush_busy_ = false;
  if (io->result < 0) return s->fail(-io->result);
  s->flushed_seq_ = std::max(s->flushed_seq_, s->flush_target_);
  while (!s->durable_.empty() && s->durable_.front().seq <= s->flushed_seq_) {
    Request* r = s->durable_.front().r;
    s->durable_.pop_front();
    s->complete(r, r->result);
  }
  if (!s->durable_.empty()) s->flush_wanted_ = true;
  s->free_quarantined();
  s->start_flush();
}

// The journal can't be trusted to record more: everything that waits for it fails, and so does every later mutation.
void StoreImpl::fail(int err) {
  failed_ = err;
  for (auto* q : {&durable_, &logged_}) {
    for (; !q->empty(); q->pop_front()) complete(q->front().r, -err);
  }
  for (Request* r : ck_waiters_) complete(r, -err);
  ck_waiters_.clear();
  for (auto* q : {&stalled_, &space_wait_}) {
    while (!q->empty()) {
      Request* r = q->front();
      q->pop_front();
      if (q == &space_wait_) unlock(r->key);
      complete(r, -err);
    }
  }
}

// A freed slot may be used again only when (1) the record that frees it is on stable storage, else a crash would bring
// the old chunk back over new bytes, and (2) every read that began before has ended.
void StoreImpl::quarantine(uint64_t off, uint64_t seq) {
  quarantine_.push_back({off, seq, epoch_});
  quarantined_bytes_ += alloc_->slot_bytes(off);
  sums_.drop(off);
}

void StoreImpl::free_quarantined() {
  if (quarantine_.empty()) return;
  if (quarantine_.back().epoch == epoch_) {
    epoch_++;
    epoch_reads_.push_back(0);
  }
  while (epoch_reads_.size() > 1 && epoch_reads_.front() == 0) {
    epoch_reads_.pop_front();
    epoch_base_++;
  }
  while (!quarantine_.empty() && quarantine_.front().seq <= flushed_seq_ && quarantine_.front().epoch < epoch_base_) {
    const uint64_t off = quarantine_.front().off;
    quarantined_bytes_ -= alloc_->slot_bytes(off);
    alloc_->release(off);
    quarantine_.pop_front();
  }
  if (!quarantine_.empty() && !space_wait_.empty()) flush_wanted_ = true;
}

Record StoreImpl::record_of(uint32_t id) const {
  const Entry& e = index_.at(id);
  Record r{};
  r.type = Record::kPut;
  r.evictable = e.flag(Entry::kEvictable);
  r.slot_class = alloc_->class_at(e.loc() * 512);
  r.length = e.len();
  r.key = index_.key_of(id);
  r.loc = e.loc();
  r.checksum = e.csum;
  r.version = e.version;
  r.mtime = e.mtime;
  return r;
}

// A fuzzy checkpoint: entries are copied a page at a time while traffic goes on. Replay begins at the first group that
// was not yet written when the scan began, so whatever changed during the scan is redone; an entry that did not change
// keeps its id and is met exactly once.
void StoreImpl::checkpoint_start() {
  ck_wanted_ = false;
  ck_ = Ck::Scan;
  ck_err_ = 0;
  ck_id_ = 1;
  ck_fill_ = nullptr;
  ck_from_seq_ = last_seq();
  ck_super_ = super_;
  ck_super_.clean = 0;
  ck_super_.generation++;
  ck_super_.journal_start = group_busy_ ? group_v_ : head_v_;
  ck_super_.start_seq = group_busy_ ? group_seq_ : next_seq_;
  ck_super_.checkpoint_records = 0;
  ck_super_.checkpoint_pages = 0;
  ck_super_.checkpoint_segments = 0;
}

void StoreImpl::checkpoint_step() {
  if (ck_ == Ck::Scan) {
    // Pages are filled to the brim, so that their number follows from the entries'; a turn looks at 8192 ids at most.
    uint32_t seen = 0;
    for (auto& page : ck_page_) {
      if (page.busy || ck_id_ > index_.capacity() || ck_err_) continue;
      if (ck_fill_ && ck_fill_ != &page) continue;
      auto* h = static_cast<PageHeader*>(page.buf);
      if (!ck_fill_) std::memset(page.buf, 0, kCheckpointPage);
      ck_fill_ = &page;
      auto* rec = reinterpret_cast<Record*>(h + 1);
      for (; ck_id_ <= index_.capacity() && h->records < kPageRecords && seen < 8192; ck_id_++, seen++)
        if (index_.live(ck_id_)) rec[h->records++] = record_of(ck_id_);
      if (ck_id_ <= index_.capacity() && h->records < kPageRecords) break;
      ck_fill_ = nullptr;
      if (h->records == 0) continue;
      if (ck_super_.checkpoint_pages % geo_.pages_per_segment() == 0) {
        const uint32_t seg =
            ck_super_.checkpoint_segments < kMaxCheckpointSegments ? alloc_->take_segment() : UINT32_MAX;
        if (seg == UINT32_MAX) {
          ck_err_ = ENOSPC;
          break;
        }
        ck_super_.checkpoint_segment[ck_super_.checkpoint_segments++] = seg;
      }
      h->magic = kPageMagic;
      h->uuid = super_.uuid[0];
      h->generation = ck_super_.generation;
      h->page = ck_super_.checkpoint_pages;
      h->checksum = xxh3(page.buf, kCheckpointPage);
      ck_super_.checkpoint_records += h->records;
      page.busy = true;
      page.io = Io{};
      page.io.op = Io::Op::Write;
      page.io.mem = {page.buf, -1};
      page.io.len = kCheckpointPage;
      page.io.off = geo_.page_off(ck_super_.checkpoint_segment, ck_super_.checkpoint_pages++);
      page.io.owner = this;
      page.io.done = on_checkpoint_page;
      ck_pages_inflight_++;
      dev_.submit(&page.io);
    }
    if ((ck_id_ > index_.capacity() || ck_err_) && ck_pages_inflight_ == 0) {
      if (!ck_err_ && ck_super_.checkpoint_segments > checkpoint_need(0)) ck_err_ = ENOSPC;
      if (ck_err_) {
        for (uint32_t i = 0; i < ck_super_.checkpoint_segments; i++)
          alloc_->give_segment(ck_super_.checkpoint_segment[i]);
        ck_ = Ck::Idle;
        if (ck_err_ != ENOSPC) return fail(ck_err_);
        return checkpoint_no_room();
      }
      ck_ = Ck::Journal;
      ck_seq_ = last_seq();  // everything the pages may have seen
    }
  }
  if (ck_ == Ck::Journal && written_seq_ >= ck_seq_) checkpoint_next();
}

// The old checkpoint and the journal stay in force. Chunks deleted and put again during the scan were met twice: the next
// scan runs while mutations wait. If there were none, waiting is in vain, and who waits is told.
void StoreImpl::checkpoint_no_room() {
  ck_calm_ = last_seq() != ck_from_seq_;
  if (ck_calm_) {
    ck_wanted_ = true;
    return;
  }
  ck_short_ = alloc_->free_segments();
  for (Request* r : ck_waiters_) complete(r, -ENOSPC);
  ck_waiters_.clear();
  std::deque<Request*> refused;
  refused.swap(stalled_);
  for (Request* r : refused) complete(r, -ENOSPC);
}

void StoreImpl::on_checkpoint_page(Io* io) {
  auto* s = static_cast<StoreImpl*>(io->owner);
  for (auto& p : s->ck_page_)
    if (&p.io == io) p.busy = false;
  s->ck_pages_inflight_--;
  if (io->result < 0) s->ck_err_ = -io->result;
}

// Pages and journal -> barrier -> superblock A -> barrier -> B -> barrier. Only then is the old checkpoint free.
void StoreImpl::checkpoint_next() {
  ck_ = static_cast<Ck>(static_cast<int>(ck_) + 1);
  ck_io_ = Io{};
  ck_io_.owner = this;
  ck_io_.done = on_checkpoint_io;
  if (ck_ == Ck::SuperA || ck_ == Ck::SuperB) {
    if (ck_ == Ck::SuperA) {
      ck_super_.checksum = xxh3(&ck_super_, offsetof(SuperBlock, checksum));
      std::memcpy(ck_page_[0].buf, &ck_super_, sizeof ck_super_);
    }
    ck_io_.op = Io::Op::Write;
    ck_io_.mem = {ck_page_[0].buf, -1};
    ck_io_.len = kBlock;
    ck_io_.off = kSuperOff[ck_ == Ck::SuperB];
  } else {
    ck_io_.op = Io::Op::Flush;
  }
  dev_.submit(&ck_io_);
}

void StoreImpl::on_checkpoint_io(Io* io) {
  auto* s = static_cast<StoreImpl*>(io->owner);
  if (io->result < 0) {
    s->ck_ = Ck::Idle;
    return s->fail(-io->result);
  }
  if (s->ck_ != Ck::FlushB) return s->checkpoint_next();
  for (uint32_t i = 0; i < s->super_.checkpoint_segments; i++) s->alloc_->give_segment(s->super_.checkpoint_segment[i]);
  s->super_ = s->ck_super_;
  s->tail_v_ = s->super_.journal_start;
  s->ck_ = Ck::Idle;
  s->st_.checkpoints++;
  s->ck_calm_ = false;
  s->ck_short_ = kEnough;
  for (Request* r : s->ck_waiters_) s->complete(r, 0);
  s->ck_waiters_.clear();
}

}  // namespace kvfs
