// batch.cpp owns libkvfs's asynchronous batches: several under way on one ring, each of any length, handed over in the
// order in which they came. user_data of an operation is its batch's slot and its place in it.
#include <cerrno>
#include <cstring>

#include "client.h"

using namespace kvfs;  // NOLINT: the C functions below

namespace {
constexpr int kReap = 64;         // completions taken at once
constexpr uint32_t kMaxMin = 32;  // completions that one wake stands for, at most

void append(kvfs_batch** first, kvfs_batch** last, kvfs_batch* b) {
  b->after = nullptr;
  (*first == nullptr ? *first : (*last)->after) = b;
  *last = b;
}

kvfs_batch* take(kvfs_batch** first) {
  kvfs_batch* b = *first;
  *first = b->after;
  return b;
}

void finish_if_done(kvfs_ring* r, kvfs_batch* b) {
  if (b->next < b->n || b->pending > 0) return;
  r->batches[b->slot] = nullptr;
  --r->batches_used;
  append(&r->done_first, &r->done_last, b);
}

// -EAGAIN: the ring is full; else 0, or an error that is the block's.
int prepare(kvfs_ring* r, kvfs_batch* b, int i) {
  const kvfs_block& k = b->blocks[i];
  const bool file = b->opcode == KVFS_OP_READ || b->opcode == KVFS_OP_WRITE || b->opcode == KVFS_OP_FSYNC;
  const bool keyed = b->opcode >= KVFS_OP_GET && b->opcode <= KVFS_OP_EVICT;
  if (!keyed && !file && b->opcode != KVFS_OP_SCAN) return -EOPNOTSUPP;
  if (keyed && (k.key == nullptr || k.key_len == 0 || k.key_len > KVFS_KEY_MAX + 1)) return -EINVAL;
  kvfs_sqe* s = r->q.next();
  if (s == nullptr) return -EAGAIN;
  s->opcode = b->opcode;
  s->flags = b->flags;
  s->handle = uint32_t(b->handle);
  s->user_data = uint64_t(b->slot) << 32 | uint32_t(i);
  if (keyed) {
    s->key_len = uint8_t(k.key_len);
    memcpy(s->key, k.key, k.key_len > KVFS_KEY_MAX ? KVFS_KEY_MAX : k.key_len);
  }
  if (b->opcode != KVFS_OP_EXISTS && b->opcode != KVFS_OP_EVICT && b->opcode != KVFS_OP_FSYNC) {
    s->iov = b->iovs != nullptr ? b->iovs[i] : b->iov;
    s->iov_off = k.value_off;
    s->off = k.off;
    s->len = k.len;
  }
  return 0;
}

// Hands over as much as the ring takes.
int issue(kvfs_ring* r) {
  while (r->todo_first != nullptr) {
    kvfs_batch* b = r->todo_first;
    while (b->next < b->n) {
      int err = prepare(r, b, b->next);
      if (err == -EAGAIN) return kvfs_submit(r);
      if (err != 0) {
        b->blocks[b->next].status = err;
      } else {
        ++b->pending;
      }
      ++b->next;
    }
    take(&r->todo_first);
    finish_if_done(r, b);
  }
  return kvfs_submit(r);
}

int settle(kvfs_ring* r, const kvfs_cqe* cqe, int got) {
  for (int i = 0; i < got; ++i) {
    const uint64_t slot = cqe[i].user_data >> 32, at = cqe[i].user_data & UINT32_MAX;
    kvfs_batch* b = slot < KVFS_BATCHES ? r->batches[slot] : nullptr;
    if (b == nullptr || at >= uint64_t(b->n) || b->pending == 0) return -EPROTO;
    b->blocks[at].status = cqe[i].result;
    --b->pending;
    finish_if_done(r, b);
  }
  return 0;
}

int give_back(kvfs_ring* r, kvfs_batch** done, int max) {
  int n = 0;
  while (n < max && r->done_first != nullptr) done[n++] = take(&r->done_first);
  return n;
}

// The next batch can't be done before that many completions.
uint32_t needed(kvfs_ring* r) {
  uint32_t min = kMaxMin;
  for (uint32_t i = 0, seen = 0; seen < r->batches_used && i < KVFS_BATCHES; ++i) {
    const kvfs_batch* b = r->batches[i];
    if (b == nullptr) continue;
    ++seen;
    if (b->pending > 0 && uint32_t(b->pending) < min) min = uint32_t(b->pending);
  }
  const uint32_t half = r->q.entries() / 2;
  return r->todo_first != nullptr && min > half ? half : min;
}
}  // namespace

int kvfs_batch_submit(kvfs_ring* r, kvfs_batch* b) {
  if (r == nullptr || b == nullptr || b->n < 0 || b->handle < 0 || (b->n > 0 && b->blocks == nullptr)) return -EINVAL;
  if (forked(r->client)) return -ECHILD;
  if (r->batches_used == 0 && r->q.inflight() != 0) return -EBUSY;
  if (r->batches_used == KVFS_BATCHES) return -EAGAIN;
  uint32_t slot = 0;
  while (r->batches[slot] != nullptr) ++slot;
  r->batches[slot] = b;
  ++r->batches_used;
  b->slot = slot;
  b->next = b->pending = 0;
  append(&r->todo_first, &r->todo_last, b);
  int err = issue(r);
  return err < 0 ? err : 0;
}

int kvfs_batch_poll(kvfs_ring* r, kvfs_batch** done, int max) {
  if (r == nullptr || done == nullptr || max < 1) return -EINVAL;
  kvfs_cqe cqe[kReap];
  // Bounded: what is handed over meanwhile may complete meanwhile, but not more than a ring full is looked at.
  for (uint32_t seen = 0; seen <= r->q.entries();) {
    int got = kvfs_peek(r, cqe, kReap);
    if (got < 0) return r->done_first != nullptr ? give_back(r, done, max) : got;
    int err = settle(r, cqe, got);
    if (err == 0) err = issue(r);
    if (err < 0) return err;
    if (got < kReap) break;
    seen += uint32_t(got);
  }
  return give_back(r, done, max);
}

int kvfs_batch_wait(kvfs_ring* r, kvfs_batch** done, int max, uint64_t timeout_ns) {
  if (r == nullptr || done == nullptr || max < 1) return -EINVAL;
  uint64_t deadline = UINT64_MAX;
  if (timeout_ns != KVFS_NO_TIMEOUT) {
    uint64_t now = now_ns();
    if (timeout_ns < UINT64_MAX - now) deadline = now + timeout_ns;
  }
  kvfs_cqe cqe[kReap];
  while (r->done_first == nullptr) {
    uint64_t now = deadline == UINT64_MAX ? 0 : now_ns();
    int got = kvfs_wait(r, cqe, int(needed(r)), kReap,
                        deadline == UINT64_MAX ? deadline
                        : deadline > now       ? deadline - now
                                               : 0);
    if (got < 0) return got;
    int err = settle(r, cqe, got);
    if (err == 0) err = issue(r);
    if (err < 0) return err;
  }
  return give_back(r, done, max);
}

int kvfs_match_prefix(kvfs_ring* r, int ns, const kvfs_block* b, int n, uint64_t timeout_ns) {
  if (r == nullptr || n < 0 || (n > 0 && b == nullptr)) return -EINVAL;
  if (forked(r->client)) return -ECHILD;
  if (r->q.inflight() != 0) return -EBUSY;
  kvfs_batch ask{};  // never submitted: prepare() is all that is used of it
  ask.blocks = const_cast<kvfs_block*>(b);
  ask.handle = ns;
  ask.opcode = KVFS_OP_EXISTS;
  uint64_t start = now_ns();
  int next = 0, end = n, pending = 0;  // end: the first that is missing, as far as is known
  kvfs_cqe cqe[kReap];
  while (next < end || pending > 0) {
    while (next < end) {
      int err = prepare(r, &ask, next);
      if (err == -EAGAIN) break;
      if (err != 0) {
        end = next;  // no such key can be
        break;
      }
      ++next;
      ++pending;
    }
    kvfs_submit(r);
    if (pending == 0) break;
    uint64_t left = timeout_ns, spent = now_ns() - start;
    if (timeout_ns != KVFS_NO_TIMEOUT) left = spent < timeout_ns ? timeout_ns - spent : 0;
    int min = next < end ? int(r->q.entries() / 2) : pending;
    int got = kvfs_wait(r, cqe, min < kReap ? min : kReap, kReap, left);
    if (got < 0) return got;
    for (int i = 0; i < got; ++i) {
      if (cqe[i].result < 0 && cqe[i].user_data < uint64_t(end)) end = int(cqe[i].user_data);
    }
    pending -= got;
  }
  return end;
}
