// ring.cpp owns libkvfs's data path: prepare, submit, wait, and the blocking batches over them. No system call except
// to wake a sleeping daemon or to sleep.
#include <linux/futex.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstring>

#include "client.h"

using namespace kvfs;  // NOLINT: the C functions below

namespace {
constexpr int kPart = 16;  // operations of a batch that go out together
constexpr uint64_t kSpinNs = 15000, kTrialNs = 60000;
constexpr uint64_t kSliceNs = 50000000;  // the daemon's death is noticed within two slices (100 ms)

int futex_wait(uint32_t* word, uint32_t seen, uint64_t ns) {
  timespec ts{time_t(ns / 1000000000u), long(ns % 1000000000u)};
  return syscall(SYS_futex, word, FUTEX_WAIT, seen, &ts, nullptr, 0) == 0 ? 0 : -errno;
}

// Looks for completions for a short while, if that has paid lately; while some keep coming, for longer. Both sides asleep
// between any two operations is as stable as both awake, and ten times slower: one wait in 32 tries longer than the
// daemon needs to wake.
void spin(kvfs_ring* r, uint32_t min) {
  const bool trial = r->spin_credit <= 0;
  if (trial && (++r->waits & 31) != 0) return;
  uint32_t seen = r->q.ready();
  uint64_t now = now_ns(), end = now + (trial ? kTrialNs : kSpinNs);
  do {
    uint32_t n = seen;
    for (int i = 0; i < 32 && n == seen; ++i) {
      cpu_relax();
      n = r->q.ready();
      if (n >= min) {
        if (r->spin_credit < 16) ++r->spin_credit;
        return;
      }
    }
    now = now_ns();
    if (n != seen) end = now + kSpinNs;  // at most `min` times
    seen = n;
  } while (now < end);
  r->spin_credit = r->spin_credit > 4 ? r->spin_credit - 4 : 0;
}
}  // namespace

kvfs_sqe* kvfs_prep(kvfs_ring* r) {
  if (forked(r->client)) return nullptr;
  return r->q.next();
}

int kvfs_prep_block(kvfs_ring* r, uint8_t opcode, uint8_t flags, int ns, const void* key, uint32_t key_len,
                    uint16_t iov, uint64_t iov_off, uint64_t off, uint32_t len, uint64_t user_data) {
  if (key == nullptr || key_len == 0 || key_len > KVFS_KEY_MAX || ns < 0) return -EINVAL;
  if (forked(r->client)) return -ECHILD;
  kvfs_sqe* s = r->q.next();
  if (s == nullptr) return -EAGAIN;
  s->opcode = opcode;
  s->flags = flags;
  s->iov = iov;
  s->handle = uint32_t(ns);
  s->user_data = user_data;
  s->iov_off = iov_off;
  s->off = off;
  s->len = len;
  s->key_len = uint8_t(key_len);
  memcpy(s->key, key, key_len);
  return 0;
}

int kvfs_submit(kvfs_ring* r) {
  if (forked(r->client)) return -ECHILD;
  int n = int(r->q.unpublished());
  if (r->q.publish()) {
    uint64_t one = 1;
    ssize_t w = write(r->wake_fd, &one, sizeof one);
    (void)w;  // EAGAIN: the counter is full, the wake is pending anyway
  }
  return n;
}

int kvfs_peek(kvfs_ring* r, kvfs_cqe* out, int max) {
  if (forked(r->client)) return -ECHILD;
  if (r->armed) {
    char bytes[64];
    ssize_t n = recv(r->event_fd, bytes, sizeof bytes, MSG_DONTWAIT);
    r->armed = false;
    r->q.disarm();
    if (n == 0 && r->q.ready() == 0) return r->q.broken() != 0 ? -int(r->q.broken()) : -EREMOTEIO;
  }
  if (r->q.ready() == 0) return -int(r->q.broken());
  return max <= 0 ? 0 : r->q.pop(out, max);
}

int kvfs_arm(kvfs_ring* r, int min) {
  if (forked(r->client)) return -ECHILD;
  if (r->event_fd < 0 || min < 1 || uint32_t(min) > r->q.entries()) return -EINVAL;
  r->armed = true;
  uint32_t tail = r->q.arm(uint32_t(min), KVFS_WAKE_EVENT);
  return tail - r->q.cq_head() >= uint32_t(min) || r->q.broken() != 0 ? 1 : 0;
}

int kvfs_sleep(kvfs_ring* r, int min, uint64_t timeout_ns) {
  if (forked(r->client)) return -ECHILD;
  if (min < 1 || uint32_t(min) > r->q.entries()) return -EINVAL;
  if (r->armed) {
    r->armed = false;
    r->q.disarm();
  }
  if (r->q.ready() >= uint32_t(min)) return 0;
  if (timeout_ns != 0) spin(r, uint32_t(min));
  uint64_t deadline = UINT64_MAX;
  if (timeout_ns != KVFS_NO_TIMEOUT) {
    uint64_t now = now_ns();
    if (timeout_ns < UINT64_MAX - now) deadline = now + timeout_ns;
  }
  int result = 0;
  bool armed = false;
  while (r->q.ready() < uint32_t(min)) {
    if (r->q.broken() != 0) {
      result = -int(r->q.broken());
      break;
    }
    armed = true;
    uint32_t tail = r->q.arm(uint32_t(min));
    if (tail - r->q.cq_head() >= uint32_t(min)) break;
    uint64_t now = now_ns();
    if (now >= deadline) {
      result = peer_gone(r->client) && r->q.ready() < uint32_t(min) ? -EREMOTEIO : -ETIMEDOUT;
      break;
    }
    uint64_t slice = deadline - now < kSliceNs ? deadline - now : kSliceNs;
    if (futex_wait(r->q.futex_word(), tail, slice) == -ETIMEDOUT && peer_gone(r->client)) {
      if (r->q.ready() < uint32_t(min)) result = -EREMOTEIO;
      break;
    }
  }
  if (armed) r->q.disarm();
  return result;
}

int kvfs_wait(kvfs_ring* r, kvfs_cqe* out, int min, int max, uint64_t timeout_ns) {
  if (forked(r->client)) return -ECHILD;
  if (min < 1 || max < min || uint32_t(min) > r->q.entries()) return -EINVAL;
  if (uint32_t(min) > r->q.inflight() - r->q.unpublished()) return -EDEADLK;  // would never come
  const int err = kvfs_sleep(r, min, timeout_ns);
  return err != 0 ? err : r->q.pop(out, max);
}

int kvfs_inflight(const kvfs_ring* r) { return int(r->q.inflight()); }

// One pass over n blocks with at most half a ring prepared at a time, so that the daemon works while we refill.
static int batch(kvfs_ring* r, uint8_t opcode, uint8_t flags, int ns, const kvfs_iov* iov, kvfs_block* b, int n,
                 uint64_t timeout_ns) {
  if (r == nullptr || n < 0 || (n > 0 && b == nullptr)) return -EINVAL;
  if (forked(r->client)) return -ECHILD;
  if (r->q.inflight() != 0) return -EBUSY;
  uint64_t deadline = UINT64_MAX;
  if (timeout_ns != KVFS_NO_TIMEOUT) {
    uint64_t now = now_ns();
    if (timeout_ns < UINT64_MAX - now) deadline = now + timeout_ns;
  }
  int next = 0, good = 0, pending = 0;
  kvfs_cqe cqe[64];
  for (int i = 0; i < n; ++i) b[i].status = -EINPROGRESS;
  while (next < n || pending > 0) {
    while (next < n) {
      kvfs_block& k = b[next];
      int err = kvfs_prep_block(r, opcode, flags, ns, k.key, k.key_len, iov != nullptr ? iov->id : 0, k.value_off,
                                k.off, k.len, uint64_t(next));
      if (err == -EAGAIN) break;
      if (err != 0) {
        k.status = err;
      } else {
        ++pending;
      }
      if (++next % kPart == 0) kvfs_submit(r);  // the daemon works while we go on
    }
    kvfs_submit(r);
    if (pending == 0) continue;
    uint64_t now = deadline == UINT64_MAX ? 0 : now_ns();
    uint64_t left = deadline == UINT64_MAX ? KVFS_NO_TIMEOUT : deadline > now ? deadline - now : 0;
    // One wake per half ring or for the rest, not one per completion.
    int half = int(r->q.entries() / 2);
    int min = pending < 64 ? pending : 64;
    if (next < n && min > half) min = half;
    int got = kvfs_wait(r, cqe, min, 64, left);
    if (got < 0) return got;
    for (int i = 0; i < got; ++i) {
      if (cqe[i].user_data >= uint64_t(n)) return -EPROTO;
      kvfs_block& k = b[cqe[i].user_data];
      k.status = cqe[i].result;
      if (k.status >= 0) ++good;
    }
    pending -= got;
  }
  return good;
}

int kvfs_get(kvfs_ring* r, int ns, const kvfs_iov* iov, kvfs_block* b, int n, uint64_t timeout_ns) {
  if (iov == nullptr) return -EINVAL;
  return batch(r, KVFS_OP_GET, 0, ns, iov, b, n, timeout_ns);
}

int kvfs_put(kvfs_ring* r, int ns, const kvfs_iov* iov, kvfs_block* b, int n, uint8_t flags, uint64_t timeout_ns) {
  if (iov == nullptr) return -EINVAL;
  for (int i = 0; i < n; ++i) b[i].off = 0;
  return batch(r, KVFS_OP_PUT, flags, ns, iov, b, n, timeout_ns);
}

int kvfs_exists(kvfs_ring* r, int ns, kvfs_block* b, int n, uint64_t timeout_ns) {
  return batch(r, KVFS_OP_EXISTS, 0, ns, nullptr, b, n, timeout_ns);
}

int kvfs_evict(kvfs_ring* r, int ns, kvfs_block* b, int n, uint64_t timeout_ns) {
  return batch(r, KVFS_OP_EVICT, 0, ns, nullptr, b, n, timeout_ns);
}
