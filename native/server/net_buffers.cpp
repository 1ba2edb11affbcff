// net_buffers.cpp: see net_buffers.h.
#include "net_buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "../store/check.h"

namespace kvfs {

namespace {
constexpr uint64_t kFixedPart = 1ull << 30;  // a registered buffer is at most this long
static_assert(kFixedPart % NetBuffers::kBlock == 0, "no buffer lies in two registered parts");
constexpr uint64_t kMost = 1ull << 40;
}  // namespace

uint32_t NetBuffers::order_for(uint32_t len) {
  KVFS_CHECK(len != 0 && len <= kBlock);
  return uint32_t(std::bit_width((len - 1) / kSmallest));
}

uint32_t NetBuffers::size_for(uint32_t len) { return kSmallest << order_for(len); }

Status NetBuffers::init(Uring* uring, uint64_t bytes) {
  if (bytes > kMost) return {EINVAL, "too many bytes of buffers"};
  bytes_ = (std::max(bytes, kLeast) + kLeast - 1) / kLeast * kLeast;
  // Aligned to blocks, so that huge pages fit and pieces are aligned to their sizes.
  const uint64_t room = bytes_ + kBlock;
  void* p = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return {errno, "no memory for network buffers"};
  auto* from = static_cast<uint8_t*>(p);
  base_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(from) + kBlock - 1) / kBlock * kBlock);
  if (base_ != from) munmap(from, size_t(base_ - from));
  if (base_ + bytes_ != from + room) munmap(base_ + bytes_, size_t(from + room - (base_ + bytes_)));
  (void)madvise(base_, bytes_, MADV_HUGEPAGE);  // a hint
  uring_ = uring;
  for (uint64_t at = 0; at < bytes_; at += kFixedPart)
    fixed_.push_back(uring != nullptr ? uring->register_buffer(base_ + at, std::min(kFixedPart, bytes_ - at)) : -1);
  const auto n = uint32_t(bytes_ / kSmallest);
  units_.resize(n);
  orders_.resize(n);
  for (auto& side : head_) std::fill(std::begin(side), std::end(side), kNone);
  for (uint32_t u = n; u != 0;) {  // the lowest addresses first
    u -= kBlock / kSmallest;
    push(u, kOrders - 1);
  }
  return {};
}

NetBuffers::~NetBuffers() {
  KVFS_CHECK(used() == 0);
  for (const int f : fixed_)
    if (f >= 0) uring_->unregister_buffer(f);
  if (base_ != nullptr) munmap(base_, bytes_);
}

void NetBuffers::push(uint32_t unit, uint32_t order) {
  uint32_t& head = head_[side_of(unit)][order];
  units_[unit] = {head, kNone};
  if (head != kNone) units_[head].prev = unit;
  head = unit;
  orders_[unit] = uint8_t(kFree | order);
}

void NetBuffers::unlink(uint32_t unit, uint32_t order) {
  const Unit& u = units_[unit];
  if (u.next != kNone) units_[u.next].prev = u.prev;
  (u.prev != kNone ? units_[u.prev].next : head_[side_of(unit)][order]) = u.next;
  orders_[unit] = 0;
}

bool NetBuffers::get(Side side, uint32_t len, Buffer* out) {
  const uint32_t want = order_for(len);
  uint32_t order = want;
  while (order < kOrders && head_[side][order] == kNone) ++order;
  if (order == kOrders) return false;
  const uint32_t unit = head_[side][order];
  unlink(unit, order);
  while (order > want) {
    --order;
    push(unit + (1u << order), order);
  }
  orders_[unit] = uint8_t(kTaken | want);
  const uint64_t off = uint64_t{unit} * kSmallest;
  *out = {base_ + off, kSmallest << want, fixed_[size_t(off / kFixedPart)]};
  used_[side] += out->len;
  return true;
}

void NetBuffers::put(const Buffer& b) {
  const auto off = uint64_t(b.ptr - base_);
  KVFS_CHECK(b.ptr >= base_ && off < bytes_ && off % kSmallest == 0);
  auto unit = uint32_t(off / kSmallest);
  KVFS_CHECK((orders_[unit] & kTaken) != 0);
  uint32_t order = orders_[unit] & ~uint32_t{kTaken};
  KVFS_CHECK(b.len == kSmallest << order);
  used_[side_of(unit)] -= b.len;
  while (order + 1 < kOrders) {
    const uint32_t buddy = unit ^ (1u << order);
    if (orders_[buddy] != uint8_t(kFree | order)) break;
    unlink(buddy, order);
    orders_[unit] = 0;
    unit &= ~(1u << order);
    ++order;
  }
  push(unit, order);
}

}  // namespace kvfs
