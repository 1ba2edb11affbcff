// ior.cpp owns the calls on iors. See ior.h.
#include "ior.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstring>
#include <new>
#include <utility>

namespace kvfs::compat {

namespace {
constexpr uint64_t kPart = 1u << 30;       // bytes asked of the daemon at once
constexpr int kBurst = 16;                 // operations handed over at once: the daemon works while we go on
constexpr uint64_t kSliceNs = 20'000'000;  // a sleeper looks up that often: for other threads, and for the clock
constexpr uint64_t kProbeNs = 50'000'000;  // who only polls learns of the daemon's end within this time

uint64_t clock_ns(clockid_t clock) {
  timespec ts;
  clock_gettime(clock, &ts);
  return uint64_t(ts.tv_sec) * 1'000'000'000u + uint64_t(ts.tv_nsec);
}

// Of the time CLOCK_REALTIME shows.
uint64_t until_ns(const timespec* until) {
  if (until == nullptr) return UINT64_MAX;
  const timespec& t = *until;
  if (t.tv_sec < 0) return 0;
  if (uint64_t(t.tv_sec) > UINT64_MAX / 1'000'000'000u - 2) return UINT64_MAX;
  return uint64_t(t.tv_sec) * 1'000'000'000u + uint64_t(std::clamp(t.tv_nsec, 0l, 999'999'999l));
}

int64_t told(int64_t result) {
  switch (result) {
    case -EFAULT:  // the memory's file has been made shorter
      return -EACCES;
    case -ENOSPC:
    case -EDQUOT:
    case -EREMOTEIO:
    case -ENODATA:
    case -EFBIG:
      return result;
    default:
      return result < 0 ? -EIO : result;
  }
}
}  // namespace

Ior::Ior(std::shared_ptr<Connection> connection, kvfs_ring* ring, const hf3fs_ior& how, int entries)
    : connection_(std::move(connection)),
      ring_(ring),
      for_read_(how.for_read),
      depth_(how.io_depth),
      sqe_flags_(how.for_read && (how.flags & HF3FS_IOR_FORBID_READ_HOLES) != 0 ? KVFS_SQE_NO_HOLES : 0),
      generation_(generation()),
      slots_(size_t(entries)) {
  for (int i = 0; i < entries; ++i) push(&free_, State::Free, i);
}

Ior::~Ior() {
  if (inherited()) return;
  while (failed_ == 0 && in_flight_ != 0) {
    const int err = kvfs_sleep(ring_, 1, kSliceNs);
    if (err != 0 && err != -ETIMEDOUT) fail(err);
    if (err == 0) reap();
    while (ready_.n != 0) pop(&ready_);  // further parts are not begun
  }
  connection_->give_ring(ring_, failed_ == 0);
}

void Ior::push(Fifo* f, State s, int i) {
  slots_[size_t(i)].state = s;
  slots_[size_t(i)].next = -1;
  (f->n == 0 ? f->first : slots_[size_t(f->last)].next) = i;
  f->last = i;
  ++f->n;
}

int Ior::pop(Fifo* f) {
  const int i = f->first;
  f->first = slots_[size_t(i)].next;
  --f->n;
  return i;
}

int Ior::prepare(const hf3fs_iov& iov, uint8_t* ptr, int fd, uint64_t off, uint64_t len, const void* userdata) {
  std::lock_guard<std::mutex> g(mu_);
  auto file = fd == last_fd_ ? last_file_.lock() : nullptr;
  if (!file || file->retired()) {
    const int err = files().find(fd, connection_, &file);
    if (err != 0) return err;
    last_fd_ = fd;
    last_file_ = file;
  }
  if (for_read_ ? !file->can_read : !file->can_write) return -EACCES;
  if (free_.n == 0) return -EAGAIN;
  auto area = last_area_.lock();
  const auto at = reinterpret_cast<uintptr_t>(ptr);
  if (!area || area->retired() || !area->holds(at, len)) {
    const int err = connection_->share(iov.base, iov.size, &area);
    if (err != 0 && err != -EREMOTEIO) return err == -ENOMEM || err == -EMFILE || err == -EDQUOT ? err : -EINVAL;
    last_area_ = area;
  }
  const int i = pop(&free_);
  Slot& s = slots_[size_t(i)];
  s.iov_off = area ? at - area->base() : 0;  // without one the daemon is gone, and start() will find out
  s.off = off;
  s.left = len;
  s.result = 0;
  s.userdata = userdata;
  s.file = std::move(file);
  s.area = std::move(area);
  if (!s.area) fail(-EREMOTEIO);
  push(&prepared_, State::Prepared, i);
  return i;
}

void Ior::start() {
  for (uint32_t due = depth_ > 0 ? prepared_.n - prepared_.n % uint32_t(depth_) : prepared_.n; due != 0; --due)
    push(&ready_, State::Ready, pop(&prepared_));
  if (failed_ != 0) {
    fail(failed_);
    return;
  }
  const int burst = depth_ < 0 ? int(std::min(int64_t{kBurst}, -int64_t{depth_})) : kBurst;
  for (int n = 0; ready_.n != 0;) {
    kvfs_sqe* q = kvfs_prep(ring_);
    if (q == nullptr) break;
    const int i = pop(&ready_);
    Slot& s = slots_[size_t(i)];
    s.state = State::InFlight;
    s.part = uint32_t(std::min(s.left, kPart));
    q->opcode = for_read_ ? KVFS_OP_READ : KVFS_OP_WRITE;
    q->flags = sqe_flags_;
    q->iov = s.area->id();
    q->handle = s.file->handle();
    q->user_data = uint64_t(i);
    q->iov_off = s.iov_off;
    q->off = s.off;
    q->len = s.part;
    ++in_flight_;
    if (++n % burst == 0) kvfs_submit(ring_);
  }
  kvfs_submit(ring_);
}

void Ior::advance(int i, int64_t result) {
  Slot& s = slots_[size_t(i)];
  if (result < 0) {
    s.result = told(result);
  } else {
    s.result += result;
    s.left -= uint64_t(result);
    s.off += uint64_t(result);
    s.iov_off += uint64_t(result);
    if (s.left != 0 && result == int64_t{s.part}) return push(&ready_, State::Ready, i);
  }
  s.file.reset();
  s.area.reset();
  push(&done_, State::Done, i);
}

void Ior::reap() {
  kvfs_cqe q[64];
  int n;
  do {
    n = kvfs_peek(ring_, q, 64);
    for (int k = 0; k < n; ++k) {
      const uint64_t i = q[k].user_data;
      if (i >= slots_.size() || slots_[i].state != State::InFlight || q[k].result > int64_t{slots_[i].part})
        return fail(-EIO);
      --in_flight_;
      advance(int(i), q[k].result);
    }
  } while (n == 64);
  if (n < 0) fail(n);
}

// The ring is lost: whatever was submitted ends with this error.
void Ior::fail(int err) {
  failed_ = err == -EREMOTEIO ? err : -EIO;
  in_flight_ = 0;
  prepared_ = ready_ = Fifo{};
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].state != State::Free && slots_[i].state != State::Done) advance(int(i), failed_);
  }
  found_.notify_all();
}

void Ior::probe() {
  const uint64_t now = clock_ns(CLOCK_MONOTONIC_COARSE);
  if (failed_ != 0 || sleeper_ || now < probed_ns_ + kProbeNs) return;
  probed_ns_ = now;
  const int err = in_flight_ != 0 ? kvfs_sleep(ring_, 1, 0) : connection_->alive() ? 0 : -EREMOTEIO;
  if (err != 0 && err != -ETIMEDOUT) fail(err);
}

// Until there may be something new: at most a slice.
void Ior::sleep(std::unique_lock<std::mutex>* lock, uint32_t need, uint64_t left_ns) {
  const uint64_t slice = std::min(left_ns, kSliceNs);
  if (sleeper_ || in_flight_ == 0) {
    found_.wait_until(*lock, std::chrono::system_clock::now() + std::chrono::nanoseconds(slice));
    return;
  }
  // With more to hand over, or with others who wait, every completion counts.
  const uint32_t min = ready_.n != 0 || waiting_ > 1 ? 1 : std::min(need, in_flight_);
  sleeper_ = true;
  lock->unlock();
  const int err = kvfs_sleep(ring_, int(min), slice);
  lock->lock();
  sleeper_ = false;
  if (err != 0 && err != -ETIMEDOUT && failed_ == 0) fail(err);
}

int Ior::submit() {
  std::lock_guard<std::mutex> g(mu_);
  start();
  if (waiting_ != 0) found_.notify_all();
  return 0;
}

int Ior::wait(hf3fs_cqe* out, int room, int min, const timespec* until) {
  const uint64_t deadline = until_ns(until);
  std::unique_lock<std::mutex> lock(mu_);
  ++waiting_;
  int filled = 0;
  for (;;) {
    if (!sleeper_ && failed_ == 0) reap();
    start();
    for (; done_.n != 0 && filled < room; ++filled) {
      const int i = pop(&done_);
      out[filled] = {i, 0, slots_[size_t(i)].result, slots_[size_t(i)].userdata};
      push(&free_, State::Free, i);
    }
    if (filled == room || filled >= min) break;
    if (failed_ != 0) break;  // nothing more will come
    const uint64_t now = deadline == UINT64_MAX ? 0 : clock_ns(CLOCK_REALTIME);
    if (now >= deadline) break;
    sleep(&lock, uint32_t(min - filled), deadline - now);
    probe();
  }
  if (filled < min || filled == 0) probe();
  if (--waiting_ != 0) found_.notify_all();
  return filled == 0 && failed_ != 0 && done_.n == 0 ? failed_ : filled;
}

namespace {
int make(hf3fs_ior* ior, const char* mount_point, int entries, bool for_read, int io_depth, int priority, int timeout,
         int numa, uint64_t flags) {
  constexpr uint64_t kFlags = HF3FS_IOR_ALLOW_READ_UNCOMMITTED | HF3FS_IOR_FORBID_READ_HOLES;
  if (ior == nullptr || mount_point == nullptr || *mount_point == 0 || entries <= 0 || entries > Ior::kMaxEntries ||
      io_depth > entries || timeout < 0 || (flags & ~kFlags) != 0 || strlen(mount_point) >= sizeof ior->mount_point)
    return -EINVAL;
  hf3fs_ior made{};
  made.iov.size = hf3fs_ior_size(entries);
  made.iov.numa = numa;
  memcpy(made.mount_point, mount_point, strlen(mount_point));
  memcpy(made.iov.mount_point, mount_point, strlen(mount_point));
  made.for_read = for_read;
  made.io_depth = io_depth;
  made.priority = priority;
  made.timeout = timeout;
  made.flags = flags;
  std::shared_ptr<Connection> c;
  kvfs_ring* ring = nullptr;
  int err = registry().connect(mount_point, &c);
  if (err == 0) err = c->take_ring(uint32_t(entries), &ring);
  if (err != 0) return err;
  made.iorh = new (std::nothrow) Ior(c, ring, made, entries);
  if (made.iorh == nullptr) {
    c->give_ring(ring, true);
    return -ENOMEM;
  }
  *ior = made;
  return 0;
}

// Null if it is none; *err then says why.
Ior* usable(const hf3fs_ior* ior, int* err) {
  auto* i = ior == nullptr ? nullptr : static_cast<Ior*>(ior->iorh);
  *err = i == nullptr ? -EINVAL : i->inherited() ? -ECHILD : 0;
  return *err == 0 ? i : nullptr;
}
}  // namespace
}  // namespace kvfs::compat

using namespace kvfs::compat;  // NOLINT: the C functions below

size_t hf3fs_ior_size(int entries) {
  constexpr size_t kHeader = 4096, kEntry = sizeof(kvfs_sqe) + sizeof(kvfs_cqe);
  return entries <= 0 ? 0 : (kHeader + size_t(entries) * kEntry + 4095) / 4096 * 4096;
}

int hf3fs_iorcreate(hf3fs_ior* ior, const char* mount_point, int entries, bool for_read, int io_depth, int numa) {
  return make(ior, mount_point, entries, for_read, io_depth, 0, 0, numa, 0);
}

int hf3fs_iorcreate2(hf3fs_ior* ior, const char* mount_point, int entries, bool for_read, int io_depth, int priority,
                     int numa) {
  return make(ior, mount_point, entries, for_read, io_depth, priority, 0, numa, 0);
}

int hf3fs_iorcreate3(hf3fs_ior* ior, const char* mount_point, int entries, bool for_read, int io_depth, int priority,
                     int timeout, int numa) {
  return make(ior, mount_point, entries, for_read, io_depth, priority, timeout, numa, 0);
}

int hf3fs_iorcreate4(hf3fs_ior* ior, const char* mount_point, int entries, bool for_read, int io_depth, int timeout,
                     int numa, uint64_t flags) {
  return make(ior, mount_point, entries, for_read, io_depth, 0, timeout, numa, flags);
}

void hf3fs_iordestroy(hf3fs_ior* ior) {
  if (ior == nullptr) return;
  delete static_cast<Ior*>(ior->iorh);
  ior->iorh = nullptr;
}

int hf3fs_io_entries(const hf3fs_ior* ior) {
  return ior == nullptr || ior->iorh == nullptr ? -EINVAL : static_cast<const Ior*>(ior->iorh)->entries();
}

int hf3fs_prep_io(const hf3fs_ior* ior, const hf3fs_iov* iov, bool read, void* ptr, int fd, size_t off, uint64_t len,
                  const void* userdata) {
  int err;
  Ior* i = usable(ior, &err);
  if (i == nullptr) return err;
  auto* p = static_cast<uint8_t*>(ptr);
  if (iov == nullptr || iov->base == nullptr || read != ior->for_read || len == 0 || fd == INT_MIN) return -EINVAL;
  if (p < iov->base || len > iov->size || size_t(p - iov->base) > iov->size - len) return -EINVAL;
  if (off > size_t{INT64_MAX} - len) return -EINVAL;
  return i->prepare(*iov, p, fd < 0 ? -fd : fd, off, len, userdata);
}

int hf3fs_submit_ios(const hf3fs_ior* ior) {
  int err;
  Ior* i = usable(ior, &err);
  return i == nullptr ? err : i->submit();
}

int hf3fs_wait_for_ios(const hf3fs_ior* ior, hf3fs_cqe* cqes, int cqec, int min_results, const timespec* abs_timeout) {
  int err;
  Ior* i = usable(ior, &err);
  if (i == nullptr) return err;
  if (cqes == nullptr || cqec <= 0) return -EINVAL;
  return i->wait(cqes, cqec, std::min(min_results, cqec), abs_timeout);
}
