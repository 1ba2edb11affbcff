// uring_device.cpp: io_uring and the devices on it; see uring_device.h.
#include "uring_device.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "check.h"

namespace kvfs {
namespace {

constexpr uint32_t kMaxRetries = 64;  // of one operation, after EAGAIN or EINTR
constexpr unsigned kMaxPasses = 16;   // over an overflowing completion queue in one call
constexpr unsigned kBatch = 16;       // completions per call: what they lead to goes out before the rest is looked at
constexpr uint64_t kTagPoll = 1, kTagNone = 2, kTagNet = 3, kTagMask = 3;  // low bits of user_data; 0: an Op
constexpr unsigned kPollBits = 12;                                         // of a poll handle: index; above: generation
constexpr uint32_t kGenMask = (1u << (31 - kPollBits)) - 1;
static_assert(1u << kPollBits == Uring::kPolls);

// Of struct statx, since Linux 6.1; by offset because older headers lack them.
constexpr unsigned kStatxDioAlign = 0x2000;
constexpr size_t kDioMemAlignAt = 152, kDioOffsetAlignAt = 156;

Status fail(int err, const std::string& what) { return {err, what + ": " + std::strerror(err)}; }

bool power_of_two(uint32_t n) { return n != 0 && (n & (n - 1)) == 0; }

unsigned sq_flags(const io_uring& ring) { return __atomic_load_n(ring.sq.kflags, __ATOMIC_RELAXED); }

void sync_parent(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string dir = slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash);
  const int fd = ::open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);
  ::close(fd);
}

}  // namespace

Status Uring::create(const UringOptions& opt, std::unique_ptr<Uring>* out) {
  if (opt.entries == 0 || opt.entries > 16384) return {EINVAL, "io_uring entries must be 1..16384"};
  std::unique_ptr<Uring> u(new Uring());
  const unsigned coop = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG;
  const unsigned defer = IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG | IORING_SETUP_SINGLE_ISSUER;
  std::vector<unsigned> tries;  // newest kernels first
  if (opt.single_issuer && opt.defer_taskrun) tries.push_back(defer);
  if (opt.single_issuer) tries.push_back(coop | IORING_SETUP_SINGLE_ISSUER);
  tries.push_back(coop);
  tries.push_back(0);
  int rc = -EINVAL;
  for (size_t i = 0; i < tries.size() && rc == -EINVAL; ++i) {
    io_uring_params params{};
    params.flags = tries[i] | IORING_SETUP_CQSIZE;
    params.cq_entries = opt.entries * 4;  // operations and polls
    rc = io_uring_queue_init_params(opt.entries, &u->ring_, &params);
  }
  if (rc < 0) {
    return fail(-rc, rc == -ENOSYS || rc == -EPERM ? "io_uring is not available here (kernel, seccomp or sysctl)"
                                                   : "cannot set up io_uring");
  }
  u->ready_ = true;
  u->files_ok_ = io_uring_register_files_sparse(&u->ring_, kFiles) >= 0;
  u->buffers_ok_ = io_uring_register_buffers_sparse(&u->ring_, kBuffers) >= 0;
  u->ops_.resize(opt.entries);
  for (Op& op : u->ops_) {
    op.next = u->free_ops_;
    u->free_ops_ = &op;
  }
  *out = std::move(u);
  return {};
}

Uring::~Uring() {
  for (const UringDevice* d : devs_) KVFS_CHECK(d == nullptr);
  if (ready_) io_uring_queue_exit(&ring_);
}

int Uring::register_buffer(void* p, size_t len) {
  if (!buffers_ok_) return -EOPNOTSUPP;
  if (len == 0 || len > 1ull << 30) return -EINVAL;
  const auto it = std::find(buffers_.begin(), buffers_.end(), false);
  if (it == buffers_.end()) return -ENOSPC;
  const auto idx = static_cast<unsigned>(it - buffers_.begin());
  const iovec iov{p, len};
  const uint64_t no_tag = 0;
  const int rc = io_uring_register_buffers_update_tag(&ring_, idx, &iov, reinterpret_cast<const __u64*>(&no_tag), 1);
  if (rc < 0) return rc;
  *it = true;
  return static_cast<int>(idx);
}

int Uring::unregister_buffer(int idx) {
  if (idx < 0 || idx >= static_cast<int>(kBuffers) || !buffers_[static_cast<unsigned>(idx)]) return -EINVAL;
  const iovec none{nullptr, 0};
  const uint64_t no_tag = 0;
  const int rc = io_uring_register_buffers_update_tag(&ring_, static_cast<unsigned>(idx), &none,
                                                      reinterpret_cast<const __u64*>(&no_tag), 1);
  if (rc < 0) return rc;
  buffers_[static_cast<unsigned>(idx)] = false;
  return 0;
}

io_uring_sqe* Uring::sqe() {
  io_uring_sqe* s = io_uring_get_sqe(&ring_);
  if (s == nullptr) {
    io_uring_submit(&ring_);
    s = io_uring_get_sqe(&ring_);
  }
  return s;
}

int Uring::add_poll(int fd, PollReady ready, void* owner, uint32_t events) {
  uint32_t idx;
  if (!free_polls_.empty()) {
    idx = free_polls_.back();
    free_polls_.pop_back();
  } else if (polls_.size() < kPolls) {
    idx = static_cast<uint32_t>(polls_.size());
    polls_.emplace_back();
  } else {
    return -ENOSPC;
  }
  Poll& p = polls_[idx];
  p.fd = fd;
  p.events = events;
  p.live = true;
  p.armed = false;
  p.ready = ready;
  p.owner = owner;
  if (!arm(idx)) rearm_.push_back(idx);
  return static_cast<int>(p.gen << kPollBits | idx);
}

bool Uring::arm(uint32_t idx) {
  io_uring_sqe* s = sqe();
  if (s == nullptr) return false;
  Poll& p = polls_[idx];
  io_uring_prep_poll_multishot(s, p.fd, p.events);
  s->user_data = static_cast<uint64_t>(p.gen) << 32 | static_cast<uint64_t>(idx) << 2 | kTagPoll;
  p.armed = true;
  return true;
}

void Uring::remove_poll(int handle) {
  const uint32_t idx = static_cast<uint32_t>(handle) & (kPolls - 1), gen = static_cast<uint32_t>(handle) >> kPollBits;
  KVFS_CHECK(handle >= 0 && idx < polls_.size() && polls_[idx].live && polls_[idx].gen == gen);
  Poll& p = polls_[idx];
  if (p.armed) end_poll(static_cast<uint64_t>(gen) << 32 | static_cast<uint64_t>(idx) << 2 | kTagPoll);
  p.live = p.armed = false;
  p.gen = (p.gen + 1) & kGenMask;
  free_polls_.push_back(idx);
}

// Without room for the request the kernel's poll stays until its next event or the ring's end.
void Uring::end_poll(uint64_t user_data) {
  if (io_uring_sqe* s = sqe(); s != nullptr) {
    io_uring_prep_poll_remove(s, user_data);
    s->user_data = kTagNone;
  }
}

void Uring::on_poll(uint64_t user_data, int32_t res, uint32_t flags) {
  const auto idx = static_cast<uint32_t>(user_data) >> 2, gen = static_cast<uint32_t>(user_data >> 32);
  Poll& p = polls_[idx];
  if (!p.live || p.gen != gen) {
    // A poll with an event on its way is not removed: the kernel would keep it, and the file, for ever.
    if ((flags & IORING_CQE_F_MORE) != 0) end_poll(user_data);
    return;
  }
  if ((flags & IORING_CQE_F_MORE) == 0) {
    p.armed = false;
    if (res >= 0) rearm_.push_back(idx);  // an error would only come again
  }
  ++events_;
  p.ready(p.owner, res >= 0 ? static_cast<uint32_t>(res) : static_cast<uint32_t>(POLLNVAL));
}

bool Uring::prep(NetIo* io) {
  io_uring_sqe* s = sqe();
  if (s == nullptr) return false;
  switch (io->op) {
    case NetIo::Op::RecvMsg:
      io_uring_prep_recvmsg(s, io->fd, io->msg, static_cast<unsigned>(io->flags));
      break;
    case NetIo::Op::SendMsg:
      io_uring_prep_sendmsg(s, io->fd, io->msg, static_cast<unsigned>(io->flags));
      break;
    case NetIo::Op::Nop:
      io_uring_prep_nop(s);
      break;
  }
  s->user_data = reinterpret_cast<uint64_t>(io) | kTagNet;
  io->state = NetIo::State::Kernel;
  return true;
}

void Uring::wait_for_room(NetIo* io) {
  io->state = NetIo::State::Waiting;
  io->next = nullptr;
  *net_tail_ = io;
  net_tail_ = &io->next;
}

void Uring::submit(NetIo* io) {
  KVFS_CHECK(io->done != nullptr && io->state == NetIo::State::Idle);
  io->cancelled = false;
  io->retries = 0;
  if (net_head_ != nullptr || !prep(io)) wait_for_room(io);
}

bool Uring::end_net(NetIo* io) {
  io_uring_sqe* s = sqe();
  if (s == nullptr) return false;
  io_uring_prep_cancel64(s, reinterpret_cast<uint64_t>(io) | kTagNet, 0);
  s->user_data = kTagNone;
  return true;
}

// One that waits ends in pump().
void Uring::cancel(NetIo* io) {
  if (io->state == NetIo::State::Idle || io->cancelled) return;
  io->cancelled = true;
  if (io->state == NetIo::State::Kernel && !end_net(io)) net_cancel_.push_back(io);
}

void Uring::on_net(NetIo* io, int32_t res) {
  if (io->cancelled) std::erase(net_cancel_, io);
  if ((res == -EAGAIN || res == -EINTR) && (io->cancelled || ++io->retries <= kMaxRetries)) {
    if (!io->cancelled) return wait_for_room(io);
    res = -ECANCELED;
  }
  io->state = NetIo::State::Idle;
  ++events_;
  io->result = res;
  io->done(io);
}

// Puts the rest of an operation into the submission queue. False: no room.
bool Uring::prep(Op* op) {
  io_uring_sqe* s = sqe();
  if (s == nullptr) return false;
  const Io& io = *op->io;
  const UringDevice& d = *op->dev;
  const int fd = d.slot_ >= 0 && files_ok_ ? d.slot_ : d.fd_;
  char* ptr = static_cast<char*>(io.mem.ptr) + op->moved;
  const uint32_t len = io.len - op->moved;
  const uint64_t off = io.off + op->moved;
  switch (io.op) {
    case Io::Op::Read:
      if (io.mem.fixed >= 0) {
        io_uring_prep_read_fixed(s, fd, ptr, len, off, io.mem.fixed);
      } else {
        io_uring_prep_read(s, fd, ptr, len, off);
      }
      break;
    case Io::Op::Write:
      if (io.mem.fixed >= 0) {
        io_uring_prep_write_fixed(s, fd, ptr, len, off, io.mem.fixed);
      } else {
        io_uring_prep_write(s, fd, ptr, len, off);
      }
      break;
    case Io::Op::Flush:
      io_uring_prep_fsync(s, fd, IORING_FSYNC_DATASYNC);
      break;
  }
  if (files_ok_) s->flags |= IOSQE_FIXED_FILE;
  s->user_data = reinterpret_cast<uint64_t>(op);
  return true;
}

void Uring::resend(Op* op) {
  op->next = nullptr;
  *resend_tail_ = op;
  resend_tail_ = &op->next;
}

void Uring::start(UringDevice* dev, Io* io) {
  Op* op = free_ops_;
  free_ops_ = op->next;
  *op = Op{io, dev, 0, 0, nullptr};
  if (!prep(op)) resend(op);
}

// Moves what waits into the submission queue, as far as there is room.
void Uring::pump() {
  while (resend_head_ != nullptr) {
    Op* op = resend_head_;
    if (!prep(op)) break;
    resend_head_ = op->next;
    if (resend_head_ == nullptr) resend_tail_ = &resend_head_;
  }
  while (!net_cancel_.empty() && end_net(net_cancel_.back())) net_cancel_.pop_back();
  while (net_head_ != nullptr) {
    NetIo* io = net_head_;
    if (!io->cancelled && !prep(io)) break;
    net_head_ = io->next;
    if (net_head_ == nullptr) net_tail_ = &net_head_;
    if (io->cancelled) on_net(io, -ECANCELED);
  }
  for (size_t n = rearm_.size(); n > 0; --n) {
    const uint32_t idx = rearm_.back();
    rearm_.pop_back();
    const Poll& p = polls_[idx];
    if (p.live && !p.armed && !arm(idx)) {
      rearm_.push_back(idx);
      break;
    }
  }
  for (unsigned idle = 0; free_ops_ != nullptr && idle < kFiles;) {  // one operation per device in turn
    UringDevice* d = devs_[next_dev_];
    next_dev_ = (next_dev_ + 1) % kFiles;
    if (d == nullptr || d->wait_head_ == nullptr) {
      ++idle;
      continue;
    }
    idle = 0;
    Io* io = d->wait_head_;
    d->wait_head_ = io->next;
    if (d->wait_head_ == nullptr) d->wait_tail_ = &d->wait_head_;
    start(d, io);
  }
}

void Uring::finish(Op* op, int32_t result) {
  Io* io = op->io;
  UringDevice* d = op->dev;
  op->io = nullptr;
  op->next = free_ops_;
  free_ops_ = op;
  --d->inflight_;
  ++d->finished_;
  ++events_;
  io->result = result;
  io->done(io);
}

void Uring::on_op(Op* op, int32_t res) {
  if (res == -EAGAIN || res == -EINTR) {
    if (++op->retries > kMaxRetries) return finish(op, res);
    return resend(op);
  }
  if (res < 0) return finish(op, res);
  if (op->io->op == Io::Op::Flush) return finish(op, 0);
  if (res == 0) return finish(op, -EIO);  // the file ends here
  const uint32_t before = op->moved;
  op->moved += std::min(static_cast<uint32_t>(res), op->io->len - op->moved);
  if (op->moved == op->io->len) return finish(op, 0);
  op->moved &= ~(op->dev->align_ - 1);  // the rest must start aligned
  if (op->moved == before && ++op->retries > kMaxRetries) return finish(op, -EIO);
  resend(op);
}

void Uring::reap() {
  struct Done {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
  };
  Done done[kBatch];
  unsigned n = 0, head;
  io_uring_cqe* cqe;
  io_uring_for_each_cqe(&ring_, head, cqe) {  // copied first: callbacks may enter the kernel
    done[n++] = {cqe->user_data, cqe->res, cqe->flags};
    if (n == kBatch) break;
  }
  io_uring_cq_advance(&ring_, n);
  for (unsigned i = 0; i < n; ++i) {
    const Done& d = done[i];
    if ((d.user_data & kTagMask) == 0) {
      on_op(reinterpret_cast<Op*>(d.user_data), d.res);
    } else if ((d.user_data & kTagMask) == kTagPoll) {
      on_poll(d.user_data, d.res, d.flags);
    } else if ((d.user_data & kTagMask) == kTagNet) {
      on_net(reinterpret_cast<NetIo*>(d.user_data & ~kTagMask), d.res);
    }
  }
}

bool Uring::has_events() const { return io_uring_cq_ready(&ring_) != 0 || (sq_flags(ring_) & IORING_SQ_TASKRUN) != 0; }

int Uring::submit_and_wait(uint64_t timeout_ns, unsigned min) {
  const unsigned before = events_;
  pump();
  if (events_ != before) timeout_ns = 0;
  int rc = 0;
  const unsigned queued = io_uring_sq_ready(&ring_);
  const bool pending = (sq_flags(ring_) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) != 0;
  if (timeout_ns == 0 || io_uring_cq_ready(&ring_) > 0) {
    if (queued > 0 || pending) rc = io_uring_submit_and_get_events(&ring_);
  } else if (timeout_ns == UINT64_MAX) {
    rc = io_uring_submit_and_wait(&ring_, min);
  } else {
    __kernel_timespec ts{};
    ts.tv_sec = static_cast<int64_t>(timeout_ns / 1'000'000'000);
    ts.tv_nsec = static_cast<int64_t>(timeout_ns % 1'000'000'000);
    io_uring_cqe* cqe;
    rc = io_uring_submit_and_wait_timeout(&ring_, &cqe, min, &ts, nullptr);
  }
  reap();
  for (unsigned i = 0; i < kMaxPasses && (sq_flags(ring_) & IORING_SQ_CQ_OVERFLOW) != 0; ++i) {
    io_uring_get_events(&ring_);  // what the kernel kept back while the completion queue was full
    reap();
  }
  // Nothing to report: a signal, the timeout, or a kernel short of memory or of completion room, which reap() has made.
  if (rc < 0 && rc != -EINTR && rc != -ETIME && rc != -EAGAIN && rc != -EBUSY) return rc;
  return static_cast<int>(events_ - before);
}

Status UringDevice::open(Uring& ring, const std::string& path, const DeviceOptions& opt,
                         std::unique_ptr<UringDevice>* out) {
  struct stat st;
  const bool exists = ::stat(path.c_str(), &st) == 0;
  if (!exists && errno != ENOENT) return fail(errno, "cannot open " + path);
  if (exists && !S_ISBLK(st.st_mode) && !S_ISREG(st.st_mode)) {
    return {EINVAL, path + " is neither a block device nor a regular file"};
  }
  const bool block = exists && S_ISBLK(st.st_mode);
  int flags = O_CLOEXEC | O_DIRECT | (opt.read_only ? O_RDONLY : O_RDWR);
  if (!block && opt.create_bytes > 0 && !opt.read_only) flags |= O_CREAT;
  if (block && !opt.read_only) flags |= O_EXCL;  // fails while it is mounted

  std::unique_ptr<UringDevice> d(new UringDevice(ring));
  d->fd_ = ::open(path.c_str(), flags, 0600);
  if (d->fd_ < 0 && errno == EINVAL) {  // no O_DIRECT
    if (!opt.allow_buffered) {
      if (!exists) ::unlink(path.c_str());
      return {EOPNOTSUPP, path + ": this file system has no O_DIRECT; use a disk file system or a block device"};
    }
    d->direct_ = false;
    d->fd_ = ::open(path.c_str(), flags & ~O_DIRECT, 0600);
  }
  if (d->fd_ < 0) {
    return errno == EBUSY ? Status{EBUSY, path + " is in use (mounted, or held by another program)"}
                          : fail(errno, "cannot open " + path);
  }
  if (::flock(d->fd_, (opt.read_only ? LOCK_SH : LOCK_EX) | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return {EBUSY, path + " is in use by another process"};
    return fail(errno, "cannot lock " + path);
  }

  if (block) {
    int sector = 0;
    if (::ioctl(d->fd_, BLKGETSIZE64, &d->size_) != 0 || ::ioctl(d->fd_, BLKSSZGET, &sector) != 0) {
      return fail(errno, "cannot read the size of " + path);
    }
    d->align_ = d->mem_align_ = static_cast<uint32_t>(std::max(sector, 512));
  } else {
    if (::fstat(d->fd_, &st) != 0) return fail(errno, "cannot stat " + path);
    const bool fresh = st.st_size == 0 && opt.create_bytes > 0;
    const off_t want = fresh ? static_cast<off_t>(opt.create_bytes) : st.st_size;
    // No holes: a write must not find the disk full.
    if (!opt.read_only && want > 0 && (fresh || st.st_blocks * 512 < want)) {
      int rc;
      do rc = ::fallocate(d->fd_, 0, 0, want);
      while (rc != 0 && errno == EINTR);
      if (rc != 0) {
        const int err = errno;
        if (fresh && ::ftruncate(d->fd_, 0) == 0 && !exists) ::unlink(path.c_str());
        return fail(err, "cannot allocate " + std::to_string(want) + " bytes for " + path);
      }
      if (::fsync(d->fd_) != 0) return fail(errno, "cannot sync " + path);
      if (!exists) sync_parent(path);
    }
    d->size_ = static_cast<uint64_t>(want) & ~4095ull;
    d->align_ = d->mem_align_ = 512;
    struct statx sx;
    static_assert(sizeof sx >= kDioOffsetAlignAt + 4);
    if (d->direct_ && ::statx(d->fd_, "", AT_EMPTY_PATH, kStatxDioAlign, &sx) == 0 && (sx.stx_mask & kStatxDioAlign)) {
      uint32_t mem, off;
      std::memcpy(&mem, reinterpret_cast<const char*>(&sx) + kDioMemAlignAt, 4);
      std::memcpy(&off, reinterpret_cast<const char*>(&sx) + kDioOffsetAlignAt, 4);
      if (off == 0) return {EOPNOTSUPP, path + " cannot be read and written directly (O_DIRECT)"};
      d->align_ = std::max(off, 512u);
      d->mem_align_ = std::max(mem, 4u);
    } else if (d->direct_) {
      d->align_ = d->mem_align_ = 4096;  // unknown: what every device accepts
    }
  }
  if (!power_of_two(d->align_) || d->align_ > 4096 || !power_of_two(d->mem_align_) || d->mem_align_ > 4096) {
    return {EINVAL, path + ": blocks of " + std::to_string(d->align_) + " bytes are not supported"};
  }
  if (d->size_ == 0) return {EINVAL, path + " is empty"};

  const auto place = std::find(ring.devs_.begin(), ring.devs_.end(), nullptr);
  if (place == ring.devs_.end()) return {EMFILE, "too many devices on one reactor"};
  const auto slot = static_cast<int>(place - ring.devs_.begin());
  if (ring.files_ok_) {
    const int rc = io_uring_register_files_update(&ring.ring_, static_cast<unsigned>(slot), &d->fd_, 1);
    if (rc < 0) return fail(-rc, "cannot register " + path + " with io_uring");
  }
  d->slot_ = slot;
  *place = d.get();
  *out = std::move(d);
  return {};
}

UringDevice::~UringDevice() {
  KVFS_CHECK(inflight_ == 0);
  if (slot_ >= 0) {
    ring_.devs_[static_cast<size_t>(slot_)] = nullptr;
    int none = -1;
    if (ring_.files_ok_) io_uring_register_files_update(&ring_.ring_, static_cast<unsigned>(slot_), &none, 1);
  }
  if (fd_ >= 0) {
    ::flock(fd_, LOCK_UN);  // now, not when the ring lets go of the file
    ::close(fd_);
  }
}

void UringDevice::submit(Io* io) {
  KVFS_CHECK(io->done != nullptr);
  if (io->op != Io::Op::Flush) {
    KVFS_CHECK(io->len > 0 && (io->len & (align_ - 1)) == 0 && (io->off & (align_ - 1)) == 0);
    KVFS_CHECK(io->off <= size_ && io->len <= size_ - io->off);
  }
  ++inflight_;
  if (ring_.free_ops_ != nullptr && wait_head_ == nullptr) return ring_.start(this, io);
  io->next = nullptr;
  *wait_tail_ = io;
  wait_tail_ = &io->next;
}

unsigned UringDevice::poll(bool wait) {
  const uint64_t before = finished_;
  do {
    const int rc = ring_.submit_and_wait(wait && inflight_ > 0 ? UINT64_MAX : 0);
    KVFS_CHECK(rc >= 0);  // the ring itself is unusable: used by another thread than its own, or closed
  } while (wait && finished_ == before && inflight_ > 0);
  return static_cast<unsigned>(finished_ - before);
}

}  // namespace kvfs
