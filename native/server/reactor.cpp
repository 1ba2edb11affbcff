// reactor.cpp owns the reactor's loop, block operations, waking, and the end of rings, iovs and sessions.
#include "reactor.h"

#include <linux/futex.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <climits>
#include <utility>

#include "../store/check.h"
#include "bus_guard.h"
#include "fuse_channel.h"
#include "validate.h"

namespace kvfs {

namespace {
// Of one ring per turn, SQEs and bytes, the last SQE beyond: small, so that disk, client and we work at the same time. The
// index lines of a turn's SQEs are prefetched together.
constexpr unsigned kDrainBudget = 16;
constexpr uint64_t kDrainBytes = 1u << 20;
constexpr uint32_t kMaxNsId = 1u << 20;

void futex_wake(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

ChunkKey block_key(uint32_t ns, const kvfs_sqe& s) {
  ChunkKey k;
  k.kind = Kind::Block;
  k.key_len = s.key_len;
  k.ns = ns;
  memcpy(k.id, s.key, sizeof k.id);
  return k;
}
}  // namespace

Reactor::Reactor(Uring* uring, Device* dev, Store* store, InodeTable* inodes, Upcalls* upcalls, uint64_t dirty_bytes)
    : uring_(uring),
      dev_(dev),
      store_(store),
      inodes_(inodes),
      upcalls_(upcalls),
      write_back_(store, dirty_bytes, {this, landed, moved}) {}

Reactor::~Reactor() {
  KVFS_CHECK(rings_.empty() && jobs_.empty() && ops_live_ == 0);
  if (poll_handle_ >= 0) uring_->remove_poll(poll_handle_);
  std::lock_guard<std::mutex> g(post_mu_);  // who posted the end may still be writing the descriptor
  if (post_fd_ >= 0) close(post_fd_);
}

Status Reactor::init() {
  post_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (post_fd_ < 0) return {errno, "cannot create the reactor's eventfd"};
  poll_handle_ = uring_->add_poll(post_fd_, on_wake, nullptr);
  if (poll_handle_ < 0) return {-poll_handle_, "io_uring cannot watch the reactor's eventfd"};
  return {};
}

// Waking is all that is wanted: each write is an event of its own, so the eventfds are never read, and all rings are
// looked at after any wake.
void Reactor::on_wake(void*, uint32_t) {}

void Reactor::post(std::function<void()> fn) {
  std::lock_guard<std::mutex> g(post_mu_);  // over the write too: what was posted may end the reactor
  posted_.push_back(std::move(fn));
  has_posted_.store(true, std::memory_order_release);
  uint64_t one = 1;
  ssize_t n = write(post_fd_, &one, sizeof one);
  (void)n;  // EAGAIN: the counter is full, so the event is pending anyway
}

void Reactor::stop() {
  post([this] { stop_.store(true, std::memory_order_relaxed); });
}

void Reactor::run_posted() {
  if (!has_posted_.load(std::memory_order_acquire)) return;
  std::vector<std::function<void()>> fns;
  {
    std::lock_guard<std::mutex> g(post_mu_);
    fns.swap(posted_);
    has_posted_.store(false, std::memory_order_relaxed);
  }
  for (auto& f : fns) f();
}

void Reactor::run() {
  bool polled = false;
  for (;;) {
    ++stats_.turns;
    run_posted();
    if (!polled) {
      if (networked()) {
        uring_->submit_and_wait(0);
      } else if (dev_ != nullptr && dev_->inflight() > 0) {
        dev_->poll(false);
      }
    }
    polled = false;
    // Tails first, then posted work: a client that was told of a handle or iov may use it at once, and what it was told of
    // was posted before. SQEs published after this look wait for the next turn.
    for (Ring* r : rings_) look(r);
    run_posted();
    if (!rings_.empty()) {
      // Start with another ring each turn, so that scarce Ops do not always go to the first.
      drain_from_ = (drain_from_ + 1) % uint32_t(rings_.size());
      for (size_t i = 0; i < rings_.size(); ++i) drain(rings_[(drain_from_ + i) % rings_.size()]);
    }
    if (fuse_ != nullptr) fuse_->pump();
    for (Source* src : sources_) src->pump();
    job_ready_ = false;
    advance_landed();
    if (step_jobs()) job_ready_ = true;  // a step may also let an earlier job go on
    const bool stopping = stop_.load(std::memory_order_relaxed);
    if (stopping) write_back_.kick_all();
    const uint64_t now = monotonic_ns();
    write_back_.tick(now);
    space_short_.store(!write_back_.safe(), std::memory_order_relaxed);
    store_->tick(now);
    publish();
    run_closing();
    if (stopping && ops_live_ == 0 && jobs_.empty() && closing_.empty() && write_back_.empty() &&
        std::all_of(sources_.begin(), sources_.end(), [](const Source* src) { return src->idle(); }))
      return;
    if (work_waiting()) continue;
    bool io = dev_ != nullptr && dev_->inflight() > 0;
    // With I/O in flight the kernel wakes us; without, a short look around often saves a sleep and a wake.
    if (!io && (spin_for_mount() || spin())) continue;
    sleep();
    polled = true;
  }
}

void Reactor::wake(Ring* r, uint32_t how) {
  if ((how & KVFS_WAKE_FUTEX) != 0) futex_wake(r->q.futex_word());
  int fd = r->event_fd.load(std::memory_order_acquire);
  if ((how & KVFS_WAKE_EVENT) == 0 || fd < 0) return;
  ssize_t n = send(fd, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL);
  (void)n;  // EAGAIN: it is readable already
}

void Reactor::publish() {
  for (Source* src : sources_) src->publish();
  for (Ring* r : rings_) {
    const bool dirty = r->q.dirty();
    const uint32_t sleeper = r->q.publish();
    if (r->notify_fd >= 0) {
      if (!dirty) continue;
      uint64_t one = 1;
      ssize_t n = write(r->notify_fd, &one, sizeof one);
      (void)n;
    } else if (sleeper != 0) {
      wake(r, sleeper);
    }
  }
}

void Reactor::look(Ring* r) {
  r->ready = 0;
  if (r->closing) return;
  bool was_broken = r->q.broken() != 0;
  r->ready = r->q.refresh();
  if (!was_broken && r->q.broken() != 0) {
    ++stats_.broken_rings;
    wake(r, KVFS_WAKE_FUTEX | KVFS_WAKE_EVENT);
  }
}

// The chunk that an operation will ask for first. One of a wrong namespace costs nothing but the prefetch.
bool Reactor::hint(Ring* r, const kvfs_sqe& s, ChunkKey* out) {
  NsHandle ns;
  if (op_has_key(s.opcode)) {
    if (resolve_ns(r, s, &ns) != 0) return false;
    *out = block_key(ns.ns_id, s);
    return true;
  }
  if (s.opcode != KVFS_OP_READ || r->session == nullptr || s.handle >= r->session->files.size()) return false;
  const InodeRef& inode = r->session->files[s.handle].inode;
  if (!inode) return false;
  *out = file_key(inode->ino, s.off / kFileChunk);
  return true;
}

void Reactor::drain(Ring* r) {
  if (r->closing || r->q.broken() != 0) return;
  uint32_t n = r->ready < kDrainBudget ? r->ready : kDrainBudget;
  if (n > kMaxOps - ops_live_) n = kMaxOps - ops_live_;
  static_assert(kDrainBudget <= Store::kPrefetch);
  kvfs_sqe sqes[kDrainBudget];
  ChunkKey keys[kDrainBudget];
  uint32_t taken = 0, hints = 0;
  for (uint64_t bytes = 0; taken < n && bytes < kDrainBytes; ++taken) {
    r->q.take(&sqes[taken]);
    bytes += sqes[taken].len;
  }
  if (taken > 1) {
    for (uint32_t i = 0; i < taken; ++i) {
      if (hint(r, sqes[i], &keys[hints])) ++hints;
    }
    store_->prefetch(keys, hints);
  }
  for (uint32_t i = 0; i < taken; ++i) dispatch(r, sqes[i]);
  stats_.sqes += taken;
}

void Reactor::finish(Ring* r, uint64_t user_data, int64_t result) {
  if (r->fuse != nullptr) {
    r->fuse->done(user_data, result);
  } else {
    r->q.complete(user_data, result);
  }
}

void Reactor::dispatch(Ring* r, const kvfs_sqe& s) {
  int err = check_sqe(s, r->session == nullptr);
  if (err == 0) {
    switch (s.opcode) {
      case KVFS_OP_NOP:
        finish(r, s.user_data, 0);
        return;
      case KVFS_OP_GET:
      case KVFS_OP_PUT:
      case KVFS_OP_EXISTS:
      case KVFS_OP_EVICT:
        err = start_block(r, s);
        break;
      default:
        err = start_file(r, s);
        break;
    }
  }
  if (err != 0) {
    if (err == -EINVAL || err == -EPERM || err == -EBADF || err == -EFAULT || err == -EOPNOTSUPP) ++stats_.bad_sqes;
    finish(r, s.user_data, err);
  }
}

int Reactor::resolve_ns(Ring* r, const kvfs_sqe& s, NsHandle* out) {
  if (r->session == nullptr) {
    out->ns_id = s.handle;
    out->evictable = s.handle < evictable_.size() && evictable_[s.handle];
    return 0;
  }
  const auto& t = r->session->ns;
  if (s.handle >= t.size() || !t[s.handle].used) return -EBADF;
  *out = t[s.handle];
  return 0;
}

int Reactor::resolve_mem(Ring* r, const kvfs_sqe& s, uint64_t len, Iov** iov, MemRef* mem) {
  *iov = nullptr;
  mem->fixed = -1;
  if (s.iov == KVFS_IOV_INPROC) {  // check_sqe has refused it to everybody else
    if (s.iov_off == 0 && len != 0) return -EFAULT;
    mem->ptr = reinterpret_cast<void*>(uintptr_t(s.iov_off));
    return 0;
  }
  if (r->session == nullptr || s.iov >= kMaxIovs) return -EBADF;
  Iov* v = r->session->iovs[s.iov];
  if (v == nullptr || v->closing) return -EBADF;
  if (v->guard >= 0 && bus_guard_hit(v->guard)) return -EFAULT;
  if (s.iov_off > v->size || len > v->size - s.iov_off) return -EFAULT;
  mem->ptr = v->base + s.iov_off;
  if (len != 0 && s.iov_off / kFixedMax == (s.iov_off + len - 1) / kFixedMax)
    mem->fixed = v->fixed[size_t(s.iov_off / kFixedMax)];
  *iov = v;
  return 0;
}

int Reactor::start_block(Ring* r, const kvfs_sqe& s) {
  NsHandle ns;
  int err = resolve_ns(r, s, &ns);
  if (err != 0) return err;
  if (ns.rdonly && (s.opcode == KVFS_OP_PUT || s.opcode == KVFS_OP_EVICT)) return -EACCES;
  const ChunkKey key = block_key(ns.ns_id, s);
  if (s.opcode == KVFS_OP_EXISTS) return ask_length(r, s, key, false), 0;
  uint32_t len = s.len;
  Iov* iov = nullptr;
  MemRef mem;
  if (op_has_iov(s.opcode)) {
    if (len > KVFS_VALUE_MAX) len = KVFS_VALUE_MAX;  // no value is longer
    err = resolve_mem(r, s, len, &iov, &mem);
    if (err != 0) return err;
  }
  if (s.opcode == KVFS_OP_GET && (s.off >= KVFS_VALUE_MAX || len == 0)) return ask_length(r, s, key, true), 0;
  Op* op = new_op();
  op->ring = r;
  op->iov = iov;
  op->user_data = s.user_data;
  Request& q = op->req;
  q.key = key;
  q.mem = mem;
  q.len = len;
  if (s.flags & KVFS_SQE_DURABLE) q.flags |= Request::kDurable;
  if (s.flags & KVFS_SQE_NOTOUCH) q.flags |= Request::kNoTouch;
  switch (s.opcode) {
    case KVFS_OP_GET:
      q.op = Request::Op::Get;
      q.off = uint32_t(s.off);
      break;
    case KVFS_OP_PUT:
      q.op = Request::Op::Put;
      if (ns.evictable) q.flags |= Request::kEvictable;
      break;
    default:  // KVFS_OP_EVICT
      q.op = Request::Op::Delete;
      q.len = 0;
      break;
  }
  if (iov != nullptr) ++iov->refs;
  store_->submit(&q);
  return 0;
}

// Ends with the chunk's length, or with 0 if only its existence was asked for.
void Reactor::ask_length(Ring* r, const kvfs_sqe& s, const ChunkKey& key, bool only_existence) {
  if (!store_->remote()) {
    ChunkInfo info;
    const int64_t n = store_->lookup(key, &info);
    return finish(r, s.user_data, only_existence && n > 0 ? 0 : n);
  }
  Op* op = new_op();
  op->ring = r;
  op->user_data = s.user_data;
  op->only_existence = only_existence;
  op->req.op = Request::Op::Lookup;
  op->req.key = key;
  store_->submit(&op->req);
}

void Reactor::op_done(Request* req) {
  Op* op = static_cast<Op*>(req->owner);
  Reactor* self = op->reactor;
  self->came_ = true;
  if (self->first_answer_.awaited()) self->first_answer_.came(monotonic_ns());
  if (op->only_existence && req->result > 0) req->result = 0;
  if (op->job != nullptr) {
    self->piece_done(op);
  } else {
    if (op->iov != nullptr) --op->iov->refs;
    self->finish(op->ring, op->user_data, req->result);
  }
  self->free_op(op);
}

Op* Reactor::new_op() {
  if (free_ops_ == nullptr) {
    constexpr unsigned kSlab = 256;
    slabs_.push_back(std::make_unique<Op[]>(kSlab));
    ops_made_ += kSlab;
    for (unsigned i = 0; i < kSlab; ++i) {
      slabs_.back()[i].next = free_ops_;
      free_ops_ = &slabs_.back()[i];
    }
  }
  Op* op = free_ops_;
  free_ops_ = op->next;
  if (ops_live_++ == 0 && store_->remote()) first_answer_.asked(monotonic_ns());
  op->req.flags = 0;
  op->req.off = 0;
  op->req.len = 0;
  op->req.mem = MemRef{};
  op->req.result = 0;
  op->req.done = op_done;
  op->req.owner = op;
  op->req.next = nullptr;
  op->reactor = this;
  op->iov = nullptr;
  op->job = nullptr;
  op->dirty = nullptr;
  op->only_existence = false;
  return op;
}

void Reactor::free_op(Op* op) {
  op->next = free_ops_;
  free_ops_ = op;
  --ops_live_;
}

void Reactor::add_ring(Ring* r) {
  rings_.push_back(r);
  if (r->wake_fd >= 0) {
    // Without a watch (more rings than Uring::kPolls) the client would sleep for ever: it is told instead.
    r->poll_handle = uring_->add_poll(r->wake_fd, on_wake, nullptr);
    if (r->poll_handle < 0) r->q.give_up(-r->poll_handle);
  }
}

bool Reactor::add_iov(Iov* v) {
  bool all = true;
  store_->memory(v->base, v->size, true);
  for (uint64_t off = 0; off < v->size; off += kFixedMax) {
    uint64_t n = v->size - off < kFixedMax ? v->size - off : kFixedMax;
    int idx = dev_ != nullptr ? uring_->register_buffer(v->base + off, n) : -1;
    v->fixed.push_back(idx < 0 ? -1 : idx);  // not registered: same result, a little slower
    all = all && (idx >= 0 || dev_ == nullptr);
  }
  return all;
}

void Reactor::unregister(Iov* v) {
  for (int idx : v->fixed) {
    if (idx >= 0) uring_->unregister_buffer(idx);
  }
  v->fixed.clear();
  store_->memory(v->base, v->size, false);
}

void Reactor::close_ring(Ring* r, std::function<void()> done) {
  r->closing = true;
  closing_.push_back([this, r, done = std::move(done)] {
    if (r->q.reserved() != 0) return false;
    std::erase(rings_, r);
    if (r->poll_handle >= 0) uring_->remove_poll(r->poll_handle);
    done();
    return true;
  });
}

void Reactor::landed(void* self, Job* j, int64_t err) {
  auto* r = static_cast<Reactor*>(self);
  KVFS_CHECK(j->flushes != 0);
  --j->flushes;
  r->job_ready_ = true;
  if (err != 0 && j->err == 0 && (j->type == Job::Type::Fsync || j->type == Job::Type::Sync)) j->err = err;
}

void Reactor::moved(void* self, uint64_t ino) {
  auto* r = static_cast<Reactor*>(self);
  if (InodeRef i = r->inodes_->find(ino)) r->note_landed(i);
}

void Reactor::set_fuse(FuseChannel* f) {
  fuse_ = f;
  fuse_->tell_memory(store_, true);
}

void Reactor::close_fuse(std::function<void()> done) {
  if (fuse_ == nullptr) return done();
  fuse_->stop();
  closing_.push_back([this, done = std::move(done)] {
    if (!fuse_->idle()) return false;
    fuse_->tell_memory(store_, false);
    fuse_ = nullptr;
    done();
    return true;
  });
}

void Reactor::close_iov(Iov* v, std::function<void()> done) {
  v->closing = true;
  closing_.push_back([this, v, done = std::move(done)] {
    if (v->refs != 0) return false;
    unregister(v);
    done();
    return true;
  });
}

void Reactor::close_session(Session* s, std::function<void()> done) {
  for (Ring* r : s->rings) {
    if (r != nullptr) r->closing = true;
  }
  closing_.push_back([this, s, done = std::move(done)] {
    for (Ring* r : s->rings) {
      if (r != nullptr && r->q.reserved() != 0) return false;
    }
    // Rings closed one by one before may still have operations under way in an iov.
    for (Iov* v : s->iovs) {
      if (v != nullptr && v->refs != 0) return false;
    }
    for (Ring* r : s->rings) {
      if (r == nullptr) continue;
      std::erase(rings_, r);
      if (r->poll_handle >= 0) uring_->remove_poll(r->poll_handle);
    }
    for (Iov* v : s->iovs) {
      if (v != nullptr) unregister(v);
    }
    for (FileHandle& f : s->files) {
      if (f.inode) inodes_->close(f.inode->ino);
    }
    s->files.clear();
    done();
    return true;
  });
}

void Reactor::run_closing() {
  if (closing_.empty()) return;
  // `done` may queue further closings: work on a list of our own.
  std::vector<std::function<bool()>> list;
  list.swap(closing_);
  for (auto& f : list) {
    if (!f()) closing_.push_back(std::move(f));
  }
}

void Reactor::set_evictable(uint32_t ns_id, bool on) {
  if (ns_id >= kMaxNsId) return;
  if (ns_id >= evictable_.size()) evictable_.resize(ns_id + 1);
  evictable_[ns_id] = on;
}

}  // namespace kvfs
