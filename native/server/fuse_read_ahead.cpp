// fuse_read_ahead.cpp owns reading ahead for those who read a file of the mount in order: with O_DIRECT the kernel asks for one
// piece after the other, and the disk would idle in between.
#include "../store/check.h"
#include "fuse_channel.h"

namespace kvfs {

bool FuseChannel::read(Slot* s) {
  const uint64_t ino = s->head.in.nodeid, fh = s->head.read.fh, off = s->head.read.offset;
  const uint32_t len = s->head.read.size;  // the slot may be gone after it is served
  if (!from_ahead(s) && !serve(s, KVFS_OP_INODE_READ, off, len)) return false;
  if (len >= kStreamIo && len <= kMaxIo) follow(ino, fh, off, len);
  return true;
}

FuseChannel::Ahead* FuseChannel::find_ahead(uint64_t ino, uint64_t off) {
  for (Ahead& a : aheads_) {
    if (a.slot != nullptr && !a.dropped && a.off == off && a.inode->ino == ino) return &a;
  }
  return nullptr;
}

// False: there is none for this request.
bool FuseChannel::from_ahead(Slot* s) {
  Ahead* a = find_ahead(s->head.in.nodeid, s->head.read.offset);
  if (a == nullptr) return false;
  if (a->waiter != nullptr) return false;
  if (a->len != s->head.read.size || a->inode->changes != a->changes || inodes_->find(a->inode->ino) != a->inode) {
    drop(a);
    return false;
  }
  if (a->ready) {
    give(a, s);
  } else {
    a->waiter = s;
  }
  return true;
}

// Who read the piece before this one gets the next ones read.
void FuseChannel::follow(uint64_t ino, uint64_t fh, uint64_t off, uint32_t len) {
  Stream* oldest = &streams_[0];
  Stream* found = nullptr;
  for (Stream& t : streams_) {
    if (t.ino == ino && t.fh == fh) found = &t;
    if (t.since < oldest->since) oldest = &t;
  }
  const bool in_order = found != nullptr && found->next == off;
  if (found == nullptr) found = oldest;
  *found = {ino, fh, off + len, ++clock_};
  if (!in_order) return;
  InodeRef inode = inodes_->find(ino);
  for (unsigned i = 1; inode && i <= kAheadDepth; ++i) {
    const uint64_t next = off + uint64_t{len} * i;
    if (next >= inode->size.load(std::memory_order_acquire)) return;
    if (find_ahead(ino, next) == nullptr) read_ahead(inode, next, len);
  }
}

// One that is unused, or the oldest that nobody waits for; null: none.
FuseChannel::Ahead* FuseChannel::new_ahead() {
  Ahead* oldest = nullptr;
  for (Ahead& a : aheads_) {
    if (a.slot == nullptr) return &a;
    if (a.ready && (oldest == nullptr || a.since < oldest->since)) oldest = &a;
  }
  if (oldest != nullptr) end(oldest);
  return oldest;
}

void FuseChannel::read_ahead(const InodeRef& inode, uint64_t off, uint32_t len) {
  if (used_ >= kSlots / 2) return;
  Ahead* a = new_ahead();
  if (a == nullptr) return;
  a->slot = new_slot();
  a->slot->ahead = a;
  a->inode = inode;
  a->off = off;
  a->len = len;
  a->changes = inode->changes;
  a->since = ++clock_;
  send(a->slot, KVFS_OP_INODE_READ, KVFS_SQE_NOTOUCH, inode->ino, off, len);
}

void FuseChannel::ahead_done(Ahead* a, int64_t result) {
  a->ready = true;
  a->result = result;
  Slot* s = a->waiter;
  if (s == nullptr) {
    if (a->dropped || result < 0) end(a);
    return;
  }
  if (result >= 0 && a->inode->changes == a->changes) return give(a, s);
  end(a);
  if (!serve(s, KVFS_OP_INODE_READ, s->head.read.offset, s->head.read.size)) pass_on(s);
}

// The kernel may keep what it gets: said before the bytes are judged to be current, as for any read.
void FuseChannel::give(Ahead* a, Slot* s) {
  a->inode->cached.store(true);
  const int64_t result = a->result;
  KVFS_CHECK(result >= 0 && a->inode->changes == a->changes);
  reply(s, 0, a->slot->data, size_t(result));
  end(a);
}

void FuseChannel::drop(Ahead* a) {
  if (a->ready) {
    end(a);
  } else {
    a->dropped = true;
  }
}

void FuseChannel::end(Ahead* a) {
  a->slot->ahead = nullptr;
  release(a->slot);
  *a = Ahead{};
}

}  // namespace kvfs
