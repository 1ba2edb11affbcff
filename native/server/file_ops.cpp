// file_ops.cpp owns the reactor's operations that take many store requests or steps: byte ranges of files split into
// chunks of kFileChunk, truncation, deletion and scans. Each is a Job, advanced once per turn within stated budgets.
#include <cstddef>

#include "../store/check.h"
#include "reactor.h"
#include "validate.h"

namespace kvfs {

namespace {
constexpr uint32_t kLookupsPerStep = 1024;  // chunks looked up per job and turn
constexpr uint32_t kHolesPerStep = 64;      // missing chunks zero-filled per job and turn

uint64_t key_u64(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}
}  // namespace

Job* Reactor::new_job(Ring* r, const kvfs_sqe& s, Job::Type t) {
  Job* j = new Job;
  j->type = t;
  j->ring = r;
  j->user_data = s.user_data;
  if (s.flags & KVFS_SQE_DURABLE) j->flags |= Request::kDurable;
  if (s.flags & KVFS_SQE_NOTOUCH) j->flags |= Request::kNoTouch;
  return j;
}

// Takes file, range and scan operations. 0: a CQE was or will be posted; else -errno.
int Reactor::start_file(Ring* r, const kvfs_sqe& s) {
  const uint64_t ino = key_u64(s.key);
  InodeRef inode;
  bool can_read = true, can_write = true;
  switch (s.opcode) {
    case KVFS_OP_READ:
    case KVFS_OP_WRITE:
    case KVFS_OP_PUNCH:
    case KVFS_OP_FSYNC: {
      if (r->session == nullptr || s.handle >= r->session->files.size()) return -EBADF;
      const FileHandle& f = r->session->files[s.handle];
      if (!f.inode) return -EBADF;
      inode = f.inode;
      can_read = f.can_read;
      can_write = f.can_write;
      break;
    }
    case KVFS_OP_INODE_READ:
    case KVFS_OP_INODE_WRITE:
    case KVFS_OP_INODE_TRUNCATE:
      inode = inodes_->find(ino);
      if (!inode) return -EBADF;
      break;
    default:
      break;
  }
  Iov* iov = nullptr;
  MemRef mem;
  switch (s.opcode) {
    case KVFS_OP_READ:
    case KVFS_OP_INODE_READ: {
      if (!can_read) return -EBADF;
      if (s.flags & KVFS_SQE_FUSE) inode->cached.store(true);  // before anything is read, see settle()
      uint64_t size = inode->size.load(std::memory_order_acquire);
      uint64_t len = s.off >= size ? 0 : size - s.off < s.len ? size - s.off : s.len;
      int err = resolve_mem(r, s, s.len, &iov, &mem);
      if (err != 0) return err;
      if (len == 0) {
        finish(r, s.user_data, 0);
        return 0;
      }
      Job* j = new_job(r, s, Job::Type::Read);
      j->inode = inode;
      j->ino = inode->ino;
      j->iov = iov;
      j->mem = static_cast<char*>(mem.ptr);
      j->off = j->pos = s.off;
      j->end = s.off + len;
      j->no_holes = (s.flags & KVFS_SQE_NO_HOLES) != 0;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_WRITE:
    case KVFS_OP_INODE_WRITE: {
      if (!can_write) return -EBADF;
      int err = resolve_mem(r, s, s.len, &iov, &mem);
      if (err != 0) return err;
      if (s.len == 0) {
        finish(r, s.user_data, 0);
        return 0;
      }
      if (s.flags & KVFS_SQE_FUSE) inode->cached.store(true);
      Job* j = new_job(r, s, Job::Type::Write);
      j->is_write = true;
      j->inode = inode;
      j->ino = inode->ino;
      j->iov = iov;
      j->mem = static_cast<char*>(mem.ptr);
      j->off = j->pos = s.off;
      j->end = s.off + s.len;
      j->lender = lender_;
      jobs_.push_back(j);
      enter(j);
      break;
    }
    case KVFS_OP_FSYNC: {
      Job* j = new_job(r, s, Job::Type::Fsync);
      j->inode = inode;
      j->ino = inode->ino;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_INODE_FSYNC:
    case KVFS_OP_INODE_LAND: {
      Job* j = new_job(r, s, s.opcode == KVFS_OP_INODE_FSYNC ? Job::Type::Fsync : Job::Type::Land);
      j->ino = ino;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_SYNC:
    case KVFS_OP_CHECKPOINT: {
      Job* j = new_job(r, s, Job::Type::Sync);
      j->last = s.opcode == KVFS_OP_SYNC ? Request::Op::Sync : Request::Op::Checkpoint;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_INODE_TRUNCATE: {
      Job* j = new_job(r, s, Job::Type::Truncate);
      j->inode = inode;
      j->ino = ino;
      j->off = j->pos = s.off;
      j->alone = true;
      jobs_.push_back(j);
      enter(j);
      break;
    }
    case KVFS_OP_PUNCH: {
      if (!can_write) return -EBADF;
      Job* j = new_job(r, s, Job::Type::Punch);
      j->inode = inode;
      j->ino = inode->ino;
      j->off = j->pos = s.off;
      j->end = s.off + s.iov_off;
      j->alone = j->punching = true;
      jobs_.push_back(j);
      enter(j);
      break;
    }
    case KVFS_OP_INODE_DELETE: {
      Job* j = new_job(r, s, Job::Type::Delete);
      j->ino = ino;
      j->end = s.off;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_NS_DELETE: {
      if (s.handle == UINT32_MAX) return -EINVAL;
      Job* j = new_job(r, s, Job::Type::NsDelete);
      j->kind = Kind::Block;
      j->ns = s.handle;
      jobs_.push_back(j);
      break;
    }
    case KVFS_OP_SCAN:
    case KVFS_OP_INODE_SCAN: {
      NsHandle ns;
      if (s.opcode == KVFS_OP_SCAN) {
        int err = resolve_ns(r, s, &ns);
        if (err != 0) return err;
        if (ns.ns_id == UINT32_MAX) return -EINVAL;
      }
      if (s.len < sizeof(kvfs_scan_entry)) return -EINVAL;
      int err = resolve_mem(r, s, s.len, &iov, &mem);
      if (err != 0) return err;
      if (s.off == UINT64_MAX) {  // the cursor of a finished scan
        finish(r, s.user_data, 0);
        return 0;
      }
      Job* j = new_job(r, s, Job::Type::Scan);
      j->kind = s.opcode == KVFS_OP_SCAN ? Kind::Block : Kind::File;
      j->ns = s.opcode == KVFS_OP_SCAN ? ns.ns_id : UINT32_MAX;
      j->iov = iov;
      j->mem = static_cast<char*>(mem.ptr);
      j->room = s.len - s.len % uint32_t(sizeof(kvfs_scan_entry));
      j->cursor = s.off;
      jobs_.push_back(j);
      break;
    }
    default:
      return -EOPNOTSUPP;
  }
  Job* j = jobs_.back();
  if (j->iov != nullptr) ++j->iov->refs;
  return 0;
}

bool Reactor::issue(Job* j, Request::Op op, const ChunkKey& key, uint32_t off, uint32_t len, char* mem,
                    DirtyChunk* dirty) {
  if (ops_live_ >= kMaxOps) return false;
  Op* o = new_op();
  o->job = j;
  o->ring = j->ring;
  o->dirty = dirty;
  if (dirty != nullptr) WriteBack::pin(dirty);
  Request& q = o->req;
  q.op = op;
  q.flags = j->flags;
  q.key = key;
  q.off = off;
  q.len = len;
  q.mem.ptr = mem;
  if (j->iov != nullptr && len != 0) {
    uint64_t at = uint64_t(mem - j->iov->base);
    if (at / kFixedMax == (at + len - 1) / kFixedMax) q.mem.fixed = j->iov->fixed[size_t(at / kFixedMax)];
  }
  ++j->pending;
  store_->submit(&q);
  return true;
}

void Reactor::piece_done(Op* op) {
  Job* j = op->job;
  Request& q = op->req;
  --j->pending;
  job_ready_ = true;  // may run after this turn's step_jobs: go round again
  switch (j->type) {
    case Job::Type::Read: {
      int64_t n = q.result == -ENOENT ? 0 : q.result;
      if (n >= 0 && n < int64_t(q.len) && j->no_holes && op->dirty == nullptr) n = -ENODATA;
      if (n < 0) {
        if (j->err == 0) j->err = n;
      } else if (n < int64_t(q.len)) {
        memset(static_cast<char*>(q.mem.ptr) + n, 0, size_t(q.len - n));  // a hole, or the chunk is shorter
      }
      if (op->dirty != nullptr) {
        WriteBack::overlay(*op->dirty, q.off, q.len, static_cast<char*>(q.mem.ptr));
        write_back_.unpin(op->dirty);
      }
      break;
    }
    case Job::Type::Write:
      if (q.result < 0) {
        uint64_t at = key_u64(q.key.id + 8) * kFileChunk + q.off;
        if (at < j->fail_pos) {
          j->fail_pos = at;
          j->err = q.result;
        }
      }
      break;
    case Job::Type::Scan:
      if (q.result > 0) j->packed = uint32_t(q.result);
      [[fallthrough]];
    default:
      if (q.result < 0 && q.result != -ENOENT && j->err == 0) j->err = q.result;
      break;
  }
}

bool Reactor::read_piece(Job* j, uint64_t index, uint32_t in, uint32_t len, char* mem, uint32_t* holes) {
  DirtyChunk* dirty = write_back_.find_newer(j->ino, index);
  if (dirty != nullptr && WriteBack::covers(*dirty, in, len)) {
    WriteBack::overlay(*dirty, in, len, mem);
    return true;
  }
  const ChunkKey key = file_key(j->ino, index);
  if (store_->remote()) return issue(j, Request::Op::Get, key, in, len, mem, dirty);
  ChunkInfo info;
  const int64_t stored = store_->lookup(key, &info);
  if (j->no_holes) {
    const int64_t end = dirty != nullptr ? WriteBack::end_of(*dirty) : 0;
    if (std::max(stored, end) < int64_t{in} + len) {
      j->err = -ENODATA;
      return false;
    }
  }
  if (stored != -ENOENT) return issue(j, Request::Op::Get, key, in, len, mem, dirty);
  if (++*holes > kHolesPerStep) return false;
  memset(mem, 0, len);
  if (dirty != nullptr) WriteBack::overlay(*dirty, in, len, mem);
  return true;
}

// A whole chunk in a client's memory goes straight to the device; everything else is taken into memory, unless it must be
// durable or space is short, so that an error can still be told.
bool Reactor::write_piece(Job* j, uint64_t index, uint32_t in, uint32_t len, char* mem) {
  const bool whole = len == kFileChunk && j->ring->session != nullptr;
  DirtyChunk* dirty = write_back_.find(j->ino, index);
  const bool safe = write_back_.safe();
  if (j->lender != nullptr && dirty == nullptr && len == kFileChunk && uintptr_t(mem) % kDirtyPage == 0 && safe) {
    write_back_.adopt(j->ino, index, mem, j->lender);
    return true;
  }
  if ((j->flags & Request::kDurable) == 0 && !whole && safe) {
    switch (write_back_.take(j->ino, index, in, len, mem, monotonic_ns())) {
      case WriteBack::Taken::Yes:
        return true;
      case WriteBack::Taken::NoRoom:
        write_back_.await_room(j);
        return false;
      case WriteBack::Taken::Gap:
        break;
    }
  }
  if (dirty != nullptr) write_back_.await_chunk(dirty, j);  // in the order of acknowledgement
  if (!safe && j->flushes == 0) write_back_.await_all(j);   // what was acknowledged gets its space first
  if (j->flushes != 0) return false;
  return issue(j, Request::Op::Write, file_key(j->ino, index), in, len, mem);
}

// Waits for what of the inode is on its way to the store; more of it may set out meanwhile, but nothing is added. True:
// nothing is on its way.
bool Reactor::drain_flights(Job* j) {
  const uint64_t from = j->clearing ? j->fail_pos : j->pos;
  write_back_.await_flights(j->ino, from / kFileChunk, j);
  return j->flushes == 0;
}

void Reactor::step_range(Job* j) {
  uint32_t holes = 0;
  while (j->pos < j->end && j->pending < kJobWidth && j->err == 0) {
    uint64_t index = j->pos / kFileChunk;
    uint32_t in = uint32_t(j->pos % kFileChunk);
    uint64_t left = j->end - j->pos;
    uint32_t len = left < kFileChunk - in ? uint32_t(left) : kFileChunk - in;
    char* mem = j->mem + (j->pos - j->off);
    const bool went =
        j->type == Job::Type::Read ? read_piece(j, index, in, len, mem, &holes) : write_piece(j, index, in, len, mem);
    if (!went) return;
    j->pos += len;
  }
  j->generated = j->pos == j->end || j->err != 0;
}

// Writes zeros to a part of one chunk, if it has anything there. False: try again later.
bool Reactor::zero_piece(Job* j, uint64_t at, uint32_t len) {
  static char zeros[kFileChunk];
  const uint64_t index = at / kFileChunk;
  ChunkInfo info;
  if (write_back_.find(j->ino, index) == nullptr && !store_->remote() &&
      store_->lookup(file_key(j->ino, index), &info) == -ENOENT)
    return true;
  return write_piece(j, index, uint32_t(at % kFileChunk), len, zeros);
}

// Zeros for the parts of chunks at the edges of [pos, end); then pos and end are those of the whole chunks between, which
// go. What the last chunk has up to the end of the file is all of it.
void Reactor::step_punch(Job* j) {
  const uint64_t size = j->inode->size.load(std::memory_order_relaxed);
  const uint32_t head = uint32_t(j->pos % kFileChunk), tail = uint32_t(j->end % kFileChunk);
  if (head != 0) {
    const uint32_t len = uint32_t(std::min<uint64_t>(kFileChunk - head, j->end - j->pos));
    if (!zero_piece(j, j->pos, len)) return;
    j->pos += len;
  } else if (tail != 0 && j->end != size) {
    const uint32_t len = uint32_t(std::min<uint64_t>(tail, j->end - j->pos));
    if (!zero_piece(j, j->end - len, len)) return;
    j->end -= len;
  } else {
    if (!drain_flights(j)) return;  // what set out since may be of these chunks
    write_back_.drop(j->ino, j->pos / kFileChunk, (j->end + kFileChunk - 1) / kFileChunk);
    j->type = Job::Type::Truncate;
    return;
  }
  j->generated = j->pos >= j->end;
}

// Deletes the chunks of [pos, end), after cutting the first one if pos lies inside it.
void Reactor::step_chunks(Job* j) {
  uint32_t in = uint32_t(j->pos % kFileChunk);
  if (in != 0) {
    if (!drain_flights(j)) return;  // more may have set out if this waited for an Op
    if (!issue(j, Request::Op::Truncate, file_key(j->ino, j->pos / kFileChunk), in, 0, nullptr)) return;
    j->pos += kFileChunk - in;  // cannot overflow: pos <= INT64_MAX
  }
  if (j->pos >= j->end) {
    j->generated = true;
    return;
  }
  uint64_t chunks = (j->end - j->pos + kFileChunk - 1) / kFileChunk;
  if (store_->remote() && chunks > kJobWidth) {
    j->generated = issue_purge(j);
    return;
  }
  if (chunks > kLookupsPerStep && chunks / 4 > store_->stats().file_chunks) {
    j->type = Job::Type::InodeDelete;  // sparse: walking the index costs less than asking for each chunk
    step_scan_delete(j);
    return;
  }
  for (uint32_t i = 0; i < kLookupsPerStep && j->pos < j->end; ++i) {
    if (j->pending >= kJobWidth) return;
    ChunkKey key = file_key(j->ino, j->pos / kFileChunk);
    ChunkInfo info;
    if ((store_->remote() || store_->lookup(key, &info) >= 0) && !issue(j, Request::Op::Delete, key, 0, 0, nullptr))
      return;
    j->pos += kFileChunk;
  }
  j->generated = j->pos >= j->end;
}

// Has the servers remove what step_scan_delete would find. False: try again later.
bool Reactor::issue_purge(Job* j) {
  ChunkKey range;
  range.kind = j->type == Job::Type::NsDelete ? Kind::Block : Kind::File;
  if (range.kind == Kind::Block) {
    range.ns = j->ns;
  } else {
    const uint64_t part[3] = {
        j->ino, j->pos / kFileChunk,
        j->punching || j->type == Job::Type::Truncate ? (j->end + kFileChunk - 1) / kFileChunk : UINT64_MAX};
    range.key_len = sizeof part;
    memcpy(range.id, part, sizeof part);
  }
  return issue(j, Request::Op::Purge, range, 0, 0, nullptr);
}

void Reactor::step_scan_delete(Job* j) {
  if (store_->remote()) {
    j->generated = issue_purge(j);
    return;
  }
  // Collected first: the index must not change under the walk.
  ChunkKey keys[kJobWidth];
  uint32_t n = 0, room = kJobWidth - j->pending;
  if (room == 0 || kMaxOps - ops_live_ < room) return;
  const bool file = j->type == Job::Type::InodeDelete;
  bool more = store_->scan(&j->cursor, kScanBudget, file ? Kind::File : Kind::Block, file ? UINT32_MAX : j->ns,
                           [&](const ChunkInfo& c) {
                             if (n == room) return false;
                             const uint64_t index = key_u64(c.key.id + 8);
                             if (file && (key_u64(c.key.id) != j->ino || index < j->pos / kFileChunk ||
                                          (j->punching && index * kFileChunk >= j->end)))
                               return true;
                             keys[n++] = c.key;
                             return true;
                           });
  for (uint32_t i = 0; i < n; ++i) issue(j, Request::Op::Delete, keys[i], 0, 0, nullptr);
  j->generated = !more;
}

void Reactor::step_scan(Job* j) {
  if (store_->remote()) {
    ChunkKey from;
    from.kind = j->kind;
    from.ns = j->ns;
    memcpy(from.id, &j->cursor, sizeof j->cursor);
    j->generated = issue(j, Request::Op::Scan, from, 0, j->room, j->mem);
    return;
  }
  const uint64_t start = j->cursor;
  bool full = false;
  bool more = store_->scan(&j->cursor, kScanBudget, j->kind, j->ns, [&](const ChunkInfo& c) {
    if (j->packed == j->room) {
      full = true;
      return false;
    }
    kvfs_scan_entry e{};
    e.cursor = start;  // going on from here repeats entries, but never misses one
    e.length = c.length;
    e.mtime = c.mtime;
    e.version = c.version;
    e.key_len = c.key.key_len;
    memcpy(e.key, c.key.id, sizeof e.key);
    memcpy(j->mem + j->packed, &e, sizeof e);
    j->packed += uint32_t(sizeof e);
    return true;
  });
  if (!more) j->cursor = UINT64_MAX;
  if (!more || full || j->packed == j->room) {
    if (j->packed != 0) {
      char* last = j->mem + j->packed - sizeof(kvfs_scan_entry);
      memcpy(last + offsetof(kvfs_scan_entry, cursor), &j->cursor, sizeof j->cursor);
    }
    j->generated = true;
  }
}

// What is dirty goes first, then what the operation asks of the store.
void Reactor::step_settling(Job* j) {
  if (!j->drained) {
    j->drained = true;
    if (j->type == Job::Type::Sync) {
      write_back_.await_all(j);
    } else {
      write_back_.await_inode(j->ino, j);
    }
    if (j->type == Job::Type::Fsync) j->err = write_back_.take_error(j->ino);
    if (j->flushes != 0) return;
  }
  if (j->type == Job::Type::Land) {
    if (!j->logging) j->cursor = store_->logged();
    j->logging = store_->written() < j->cursor;
    j->generated = !j->logging;
  } else if (j->err == 0) {
    const bool file = j->type == Job::Type::Fsync;
    j->generated = issue(j, j->last, file ? file_key(j->ino, 0) : ChunkKey{}, 0, 0, nullptr);
  }
}

bool Reactor::step(Job* j) {
  if (j->held || j->asked || j->flushes != 0) return false;
  if (j->alone && !j->begun) {
    if (!drain_flights(j)) return false;
    begin_alone(j);
    if (!j->punching) write_back_.cut(j->ino, j->pos);
  }
  if (!j->generated) {
    switch (j->type) {
      case Job::Type::Read:
      case Job::Type::Write:
        step_range(j);
        break;
      case Job::Type::Delete:
        if (!drain_flights(j)) return false;
        write_back_.cut(j->ino, j->pos);
        write_back_.take_error(j->ino);
        step_chunks(j);
        break;
      case Job::Type::Truncate:
        step_chunks(j);
        break;
      case Job::Type::Punch:
        step_punch(j);
        if (j->flushes != 0) return false;
        break;
      case Job::Type::NsDelete:
      case Job::Type::InodeDelete:
        step_scan_delete(j);
        break;
      case Job::Type::Scan:
        step_scan(j);
        break;
      case Job::Type::Fsync:
      case Job::Type::Land:
      case Job::Type::Sync:
        step_settling(j);
        if (j->flushes != 0) return false;  // whatever has failed already: they still point here
        break;
    }
  }
  if (j->err != 0) j->generated = true;
  if (!j->generated || j->pending != 0) return false;
  if (j->is_write) {
    if (j->in_turn && !end_write(j)) return false;
  } else if (j->in_turn) {
    note_landed(j->inode);
    leave(j);
  }
  if ((j->is_write || j->punching || j->type == Job::Type::Fsync) && !j->settled && !settle(j)) return false;
  int64_t result = j->is_write ? j->result : j->err;
  if (j->type == Job::Type::Read && result == 0) {
    result = int64_t(j->end - j->off);
  } else if (j->type == Job::Type::Scan && result == 0) {
    result = j->packed;
  }
  if (j->is_write || j->alone) --j->inode->jobs;
  if (j->iov != nullptr) --j->iov->refs;
  finish(j->ring, j->user_data, result);
  delete j;
  return true;
}

// Returns true if a job could go on at once.
bool Reactor::step_jobs() {
  bool ready = false;
  for (size_t i = 0; i < jobs_.size();) {
    Job* j = jobs_[i];
    if (step(j)) {
      jobs_[i] = jobs_.back();
      jobs_.pop_back();
      continue;
    }
    if (j->held || j->asked || j->flushes != 0 || j->logging) {
      ++i;
      continue;
    }
    // With no request under way nothing but another turn moves it.
    if (j->pending == 0 || (!j->generated && j->pending < kJobWidth && ops_live_ < kMaxOps)) ready = true;
    ++i;
  }
  return ready;
}

}  // namespace kvfs
