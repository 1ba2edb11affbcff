// inode_order.cpp owns what makes operations on one inode agree with each other and with the kernel: the turns of writes
// and truncations, and the questions to the Python daemon that a client's write or fsync waits for. Reactor thread only.
#include <time.h>

#include <algorithm>

#include "reactor.h"

namespace kvfs {

namespace {
bool fits(const Inode& i, const Job* j) { return !i.exclusive && (!j->alone || i.writers == 0); }

void take_turn(Inode* i, Job* j) {
  j->held = false;
  j->in_turn = true;
  if (j->alone) {
    i->exclusive = true;
  } else {
    ++i->writers;
  }
}

uint64_t now_ns() {
  timespec ts;
  clock_gettime(CLOCK_REALTIME, &ts);
  return uint64_t(ts.tv_sec) * 1000000000u + uint64_t(ts.tv_nsec);
}
}  // namespace

// Writes share the inode, a truncation has it to itself. The order is that of arrival, so that neither waits for ever.
void Reactor::enter(Job* j) {
  Inode* i = j->inode.get();
  if (!j->clearing) ++i->jobs;
  ++i->changes;
  if (!i->held.empty() || !fits(*i, j)) {
    j->held = true;
    i->held.push_back(j);
    return;
  }
  take_turn(i, j);
}

void Reactor::leave(Job* j) {
  Inode* i = j->inode.get();
  ++i->changes;
  j->in_turn = false;
  if (j->alone) {
    i->exclusive = false;
  } else {
    --i->writers;
  }
  while (!i->held.empty() && fits(*i, i->held.front())) {
    take_turn(i, i->held.front());
    i->held.pop_front();
    job_ready_ = true;
  }
}

// Only now, with no write under way, is it known how far the data reaches.
void Reactor::begin_alone(Job* j) {
  uint64_t size = j->inode->size.load(std::memory_order_relaxed);
  if (j->clearing) {
    j->pos = j->fail_pos > size ? j->fail_pos : size;  // another write may have made a part of it the file's
  } else if (j->punching) {
    j->end = std::min(j->end, size);
    if (j->pos < j->end) j->inode->wrote(0, now_ns());
  } else {
    j->end = size;
    j->inode->size.store(j->off, std::memory_order_release);
    ++j->inode->cuts;
    if (j->inode->landed.load(std::memory_order_relaxed) > j->off)
      j->inode->landed.store(j->off, std::memory_order_release);
  }
  j->generated = j->pos >= j->end;
  j->begun = true;
}

// A phase of a write is over. True: it has its result; false: it must first remove what it left behind.
bool Reactor::end_write(Job* j) {
  leave(j);
  if (j->clearing) return true;
  uint64_t good = j->err == 0 ? j->end : j->fail_pos;  // everything before the first failure was written
  j->result = j->err;
  if (good > j->off) {
    j->result = int64_t(good - j->off);
    j->inode->wrote(good, now_ns());
    note_landed(j->inode);
  }
  if (j->err == 0 || j->end <= j->inode->size.load(std::memory_order_relaxed)) return true;
  // Pieces after the failed one may be stored beyond the end of the file: growing it would bring them to light.
  j->clearing = true;
  j->alone = true;
  j->generated = false;
  j->err = 0;
  j->type = Job::Type::Truncate;
  enter(j);
  return false;
}

// How far the file may be said to reach, once the journal has what the store has done so far: the daemon stores the size
// elsewhere, and a crash must not leave it without the bytes. Bound: a handful per operation of the time that the journal
// takes, a few milliseconds.
void Reactor::note_landed(const InodeRef& inode) {
  const uint64_t landed = inode->landed.load(std::memory_order_relaxed);
  const uint64_t upto =
      std::min(inode->size.load(std::memory_order_relaxed), write_back_.first_held(inode->ino, landed / kFileChunk));
  if (upto <= landed) return;
  const Landing now{store_->logged(), upto, inode->cuts, inode};
  if (!landing_.empty() && landing_.back().inode == inode && landing_.back().seq == now.seq) {
    landing_.back() = now;
  } else {
    landing_.push_back(now);
  }
}

void Reactor::advance_landed() {
  const uint64_t written = store_->written();
  if (written == UINT64_MAX) return landing_.clear();
  for (; !landing_.empty() && landing_.front().seq <= written; landing_.pop_front()) {
    const Landing& l = landing_.front();
    if (l.cuts != l.inode->cuts || l.upto <= l.inode->landed.load(std::memory_order_relaxed)) continue;
    l.inode->landed.store(l.upto, std::memory_order_release);
  }
}

void Reactor::ask_drop(const InodeRef& inode) {
  inode->dropping = true;
  asked_[uint64_t(upcalls_->ask_inode(KVFS_UPCALL_DROP, inode->ino))] = Asked{inode, nullptr};
}

// What must be so before a client is told of the end. True: it is; false: an upcall sees to it.
//
// Write: whatever the kernel got before the data was stored is dropped. Reads for the kernel set `cached` before they
// look at the data, and while one is under way the kernel keeps its pages locked, which a drop waits for: a drop that
// begins after the write has ended leaves nothing older. One that is under way when `cached` is found clear will do as
// well: it began after the last such read and has not ended.
//
// Fsync: a size that only memory knows is stored.
bool Reactor::settle(Job* j) {
  Inode* i = j->inode.get();
  if (j->ring->session == nullptr || upcalls_ended_) return true;
  if (j->type == Job::Type::Fsync) {
    if (j->err != 0 || (!i->grown.exchange(false) && i->storing == 0)) return true;
    ++i->storing;
    asked_[uint64_t(upcalls_->ask_inode(KVFS_UPCALL_STORE, i->ino))] = Asked{j->inode, j};
  } else {
    const bool cached = i->cached.load() && i->cached.exchange(false);
    if (!cached && !i->dropping) return true;
    if (!i->dropping) {
      i->drop_now.push_back(j);
      ask_drop(j->inode);
    } else if (cached || !i->drop_next.empty()) {
      i->drop_next.push_back(j);
    } else {
      i->drop_now.push_back(j);
    }
  }
  j->asked = true;
  return false;
}

void Reactor::answered(uint64_t upcall, int err) {
  auto it = asked_.find(upcall);
  if (it == asked_.end()) return;
  Asked a = std::move(it->second);
  asked_.erase(it);
  Inode* i = a.inode.get();
  job_ready_ = true;
  auto settled = [](Job* j) {
    j->asked = false;
    j->settled = true;
  };
  if (a.job != nullptr) {
    --i->storing;
    if (err != 0) {
      i->grown.store(true);
      a.job->err = err;
    }
    settled(a.job);
    return;
  }
  for (Job* j : i->drop_now) settled(j);
  i->drop_now.swap(i->drop_next);
  i->drop_next.clear();
  i->dropping = false;
  if (!i->drop_now.empty()) ask_drop(a.inode);
}

void Reactor::end_upcalls() {
  upcalls_ended_ = true;
  while (!asked_.empty()) answered(asked_.begin()->first, asked_.begin()->second.job != nullptr ? -EIO : 0);
}

// A write under way still has to tell the inode's size, which is forgotten with the last reference.
void Reactor::close_file(InodeRef inode) {
  auto close = [this, inode] {
    if (inode->jobs != 0) return false;
    inodes_->close(inode->ino);
    return true;
  };
  if (!close()) closing_.push_back(close);
}

}  // namespace kvfs
