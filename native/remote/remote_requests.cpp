// remote_requests.cpp owns what requests are on the wire: one operation each, several for those that concern all targets,
// one after the other for scans; and what becomes of their answers.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../include/kvfs_ring.h"
#include "../store/check.h"
#include "remote_store.h"

namespace kvfs {

namespace {
constexpr uint64_t kCursorBits = 48;
constexpr uint64_t kCursorMask = (uint64_t{1} << kCursorBits) - 1;
constexpr uint32_t kScanBytes = 1u << 20;  // of one answer

static_assert(sizeof(kvfs_scan_entry) == sizeof(wire::ScanRecord));
static_assert(offsetof(kvfs_scan_entry, cursor) == offsetof(wire::ScanRecord, cursor));
static_assert(offsetof(kvfs_scan_entry, length) == offsetof(wire::ScanRecord, length));
static_assert(offsetof(kvfs_scan_entry, mtime) == offsetof(wire::ScanRecord, mtime));
static_assert(offsetof(kvfs_scan_entry, version) == offsetof(wire::ScanRecord, version));
static_assert(offsetof(kvfs_scan_entry, key_len) == offsetof(wire::ScanRecord, key_len));
static_assert(offsetof(kvfs_scan_entry, key) == offsetof(wire::ScanRecord, key));

wire::Op wire_op(Request::Op op) {
  switch (op) {
    case Request::Op::Get:
      return wire::Op::Get;
    case Request::Op::Put:
      return wire::Op::Put;
    case Request::Op::Write:
      return wire::Op::Write;
    case Request::Op::Truncate:
      return wire::Op::Truncate;
    case Request::Op::Delete:
      return wire::Op::Delete;
    case Request::Op::Lookup:
      return wire::Op::Lookup;
    case Request::Op::Flush:
      return wire::Op::Flush;
    case Request::Op::Scan:
      return wire::Op::Scan;
    case Request::Op::Purge:
      return wire::Op::Purge;
    case Request::Op::Sync:
    case Request::Op::Checkpoint:
      break;
  }
  return wire::Op::Sync;
}

uint64_t inode_of(const wire::Desc& d) {
  uint64_t ino;
  std::memcpy(&ino, d.key, sizeof ino);
  return ino;
}

bool same_chunk(const wire::Desc& a, const wire::Desc& b) {
  return a.kind == b.kind && a.ns == b.ns && a.key_len == b.key_len && std::memcmp(a.key, b.key, sizeof a.key) == 0;
}
}  // namespace

void RemoteStore::complete(Request* r, int64_t result) {
  r->result = result;
  r->done(r);
}

// 0 or -errno; complete but for seq and cursor.
int RemoteStore::describe(const Request& r, wire::Desc* d) const {
  *d = {};
  wire::Op op = wire_op(r.op);
  if (op == wire::Op::Get && r.len == 0) op = wire::Op::Lookup;
  d->op = uint8_t(op);
  d->flags = r.flags & wire::kFlagsMask;
  d->kind = uint8_t(op == wire::Op::Sync ? Kind::Block : r.key.kind);
  if (op == wire::Op::Sync) return 0;
  if (r.key.kind == Kind::File) {
    if (opt_.file_ns == 0) return -EOPNOTSUPP;
    d->ns = opt_.file_ns;
  } else {
    d->ns = r.key.ns;
  }
  if (op == wire::Op::Scan) {
    d->len = std::min(r.len, kScanBytes) / sizeof(wire::ScanRecord) * sizeof(wire::ScanRecord);
    return wire::check_desc(*d);
  }
  if (op != wire::Op::Lookup) {
    d->off = r.off;
    d->len = op == wire::Op::Get ? std::min(r.len, wire::kMaxOpBytes) : r.len;
  }
  if (op == wire::Op::Flush) {
    d->key_len = 16;
    std::memcpy(d->key, r.key.id, sizeof(uint64_t));
  } else if (op != wire::Op::Purge || r.key.kind == Kind::File) {
    d->key_len = r.key.key_len;
    std::memcpy(d->key, r.key.id, sizeof d->key);
  }
  d->seq = wire::mutates(op) ? 1 : 0;  // any: that of its session follows when it is sent
  const int err = wire::check_desc(*d);
  d->seq = 0;
  return err;
}

RemoteOp* RemoteStore::make(const wire::Desc& d) {
  RemoteOp* op = pool_.get();
  op->net.desc = d;
  op->deadline = now_ + opt_.peer.deadline_ns;
  timed_.push_back(op);
  return op;
}

void RemoteStore::accept(Request* r) {
  if (r->op == Request::Op::Checkpoint) return complete(r, 0);
  wire::Desc d;
  if (const int err = describe(*r, &d); err != 0) return complete(r, err);
  if (r->op == Request::Op::Flush || r->op == Request::Op::Sync || r->op == Request::Op::Purge) return fan_out(r);
  RemoteOp* op = make(d);
  op->req = r;
  op->net.mem = r->mem;
  op->existence = r->op == Request::Op::Get && wire::Op{d.op} == wire::Op::Lookup;
  if (r->op == Request::Op::Scan) {
    uint64_t cursor;
    std::memcpy(&cursor, r->key.id, sizeof cursor);
    op->target = uint32_t(std::min<uint64_t>(cursor >> kCursorBits, UINT32_MAX));
    op->net.desc.cursor = cursor & kCursorMask;
    return scan_on(op);
  }
  if (wire::mutates(wire::Op{d.op}) && !take_turn(op)) return;
  route(op);
}

// ---- changes of one chunk, which take turns in the order of their arrival, as in a store of our own

RemoteOp** RemoteStore::turns_of(const RemoteOp& op) {
  const ChunkKey key = wire::key_of(op.net.desc);
  return &turns_[wire::data_sum(&key, sizeof key) & (turns_.size() - 1)];
}

bool RemoteStore::take_turn(RemoteOp* op) {
  RemoteOp** at = turns_of(*op);
  bool first = true;
  for (; *at != nullptr; at = &(*at)->turn) first &= !same_chunk((*at)->net.desc, op->net.desc);
  *at = op;
  op->in_turn = true;
  return first;
}

void RemoteStore::leave_turn(RemoteOp* op) {
  RemoteOp** head = turns_of(*op);
  RemoteOp** at = head;
  while (*at != op) at = &(*at)->turn;
  *at = op->turn;
  op->in_turn = false;
  for (RemoteOp* next = *head; next != nullptr; next = next->turn) {
    if (!same_chunk(next->net.desc, op->net.desc)) continue;
    if (next->state == RemoteOp::State::Turn) route(next);
    return;
  }
}

// ---- requests for several targets

void RemoteStore::fan_out(Request* r) {
  wire::Desc d;
  KVFS_CHECK(describe(*r, &d) == 0);
  auto* all = new FanOut{r, 1, 0};  // one for ourselves, so that it doesn't end before all have begun
  for (const auto& p : peers_) {
    if (r->op == Request::Op::Flush && !p->lazy.wants_flush(inode_of(d))) continue;
    ++all->left;
    RemoteOp* op = make(d);
    op->all = all;
    op->mark = p->lazy.mark();
    place(op, p.get(), false);
  }
  if (--all->left != 0) return;
  delete all;
  complete(r, 0);
}

// Asks the target that it is at, or ends.
void RemoteStore::scan_on(RemoteOp* op) {
  if (op->target >= peers_.size()) return finish(op, 0);
  op->stale = op->damaged = 0;
  place(op, peers_[op->target].get(), false);
}

// Records say where to go on, at their target: the whole scan's cursor has the target too.
void RemoteStore::scanned(RemoteOp* op, int64_t result) {
  if (result == 0) {
    ++op->target;
    op->net.desc.cursor = 0;
    return op->expired ? finish(op, -ETIMEDOUT) : scan_on(op);
  }
  if (result > 0) {
    auto* mem = static_cast<uint8_t*>(op->net.mem.ptr);
    const uint64_t here = uint64_t{op->target} << kCursorBits;
    const bool last_target = op->target + 1 >= peers_.size();
    const uint64_t next = last_target ? UINT64_MAX : (uint64_t{op->target} + 1) << kCursorBits;
    for (int64_t at = 0; at < result; at += int64_t{sizeof(wire::ScanRecord)}) {
      uint64_t cursor;
      std::memcpy(&cursor, mem + at, sizeof cursor);
      const bool last = at + int64_t{sizeof(wire::ScanRecord)} == result;
      if (cursor == UINT64_MAX && last) {
        cursor = next;
      } else if (cursor > kCursorMask) {
        return finish(op, -EIO);
      } else {
        cursor |= here;
      }
      std::memcpy(mem + at, &cursor, sizeof cursor);
    }
  }
  finish(op, result);
}

// ---- answers

// What a server may say to an operation; anything else is -EIO.
int64_t RemoteStore::checked(const RemoteOp& op, int64_t result) const {
  if (result < 0) return result >= -4095 ? result : -EIO;
  const wire::Desc& d = op.net.desc;
  bool ok = result == 0;
  switch (wire::Op{d.op}) {
    case wire::Op::Get:
      ok = result <= int64_t{d.len};
      break;
    case wire::Op::Put:
      ok = result <= 1;
      break;
    case wire::Op::Write:
      ok = result == int64_t{d.len};
      break;
    case wire::Op::Lookup:
      ok = result <= int64_t{kMaxChunk};
      break;
    case wire::Op::Scan:
      ok = result <= int64_t{d.len} && result % int64_t{sizeof(wire::ScanRecord)} == 0;
      break;
    case wire::Op::Stat:
      ok = result == int64_t{d.len};
      break;
    default:
      break;
  }
  return ok ? result : -EIO;
}

void RemoteStore::answered(RemoteOp* op, int64_t result) {
  result = checked(*op, result);
  const wire::Op what{op->net.desc.op};
  // It was there when it was sent first, or it was not: either way it is gone.
  if (what == wire::Op::Delete && result == -ENOENT && op->again) result = 0;
  if (what == wire::Op::Lookup && op->existence && result > 0) result = 0;
  if (wire::mutates(what) && result >= 0) note_lazy(*op);
  if (what == wire::Op::Flush || what == wire::Op::Sync) result = note_flush(*op, result);
  if (what == wire::Op::Scan) return scanned(op, result);
  finish(op, result);
}

void RemoteStore::note_lazy(const RemoteOp& op) {
  const wire::Desc& d = op.net.desc;
  if ((d.flags & wire::kDurable) != 0) return;
  if (d.kind == uint8_t(Kind::File)) {
    op.peer->lazy.file(inode_of(d));
  } else {
    op.peer->lazy.other();
  }
}

// What the target lost with an earlier process is told by the first that ask for it to be durable.
int64_t RemoteStore::note_flush(const RemoteOp& op, int64_t result) {
  if (result != 0) return result;
  LazyWrites& lazy = op.peer->lazy;
  if (wire::Op{op.net.desc.op} == wire::Op::Sync) {
    lazy.synced(op.mark);
    return lazy.tell_sync() ? -EIO : 0;
  }
  lazy.flushed(inode_of(op.net.desc), op.mark);
  return lazy.tell_flush(inode_of(op.net.desc)) ? -EIO : 0;
}

// It is in no list any more but that of deadlines and that of turns.
void RemoteStore::finish(RemoteOp* op, int64_t result) {
  (op->expired ? late_ : timed_).erase(op);
  const wire::Desc& d = op->net.desc;
  const wire::Op what{d.op};
  const bool in = wire::has_in(what);
  if (in && op->peer != nullptr) {
    op->peer->pending -= d.len;
    op->peer->written += d.len;
  }
  if (op->peer != nullptr) op->peer->settle(op);
  if (op->in_turn) leave_turn(op);
  Request* r = op->req;
  FanOut* all = op->all;
  if (r == nullptr && all == nullptr) take_stat(op, result);
  pool_.put(op);
  again_ = true;
  if (r != nullptr) {
    StoreStats& c = counters_;
    c.gets += what == wire::Op::Get;
    c.get_hits += what == wire::Op::Get && result >= 0;
    c.puts += what == wire::Op::Put;
    c.puts_existed += what == wire::Op::Put && result == 0;
    c.writes += what == wire::Op::Write;
    c.deletes += what == wire::Op::Delete && result == 0;
    c.io_errors += result == -EIO || result == -ETIMEDOUT || result == -EREMOTEIO;
    if (what == wire::Op::Get && result > 0) c.bytes_read += uint64_t(result);
    if (in && result >= 0) c.bytes_written += d.len;
    return complete(r, result);
  }
  if (all == nullptr) return;
  if (result < 0 && all->result == 0) all->result = result;
  if (--all->left != 0) return;
  r = all->req;
  result = all->result;
  delete all;
  complete(r, result);
}

}  // namespace kvfs
