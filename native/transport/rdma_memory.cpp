// rdma_memory.cpp: see rdma_memory.h.
#include "rdma_memory.h"

#include <cerrno>
#include <memory>

#include "../store/check.h"

namespace kvfs {

RdmaMemory::~RdmaMemory() {
  for (auto& [base, r] : declared_) {
    KVFS_CHECK(r.uses == 0);
    unregister(&r);
  }
  KVFS_CHECK(regions_ == 0);
}

int RdmaMemory::declare(void* base, size_t len) {
  std::lock_guard guard(lock_);
  auto* p = static_cast<uint8_t*>(base);
  if (len == 0 || p + len < p) return -EINVAL;
  const auto after = declared_.lower_bound(p);
  if (after != declared_.end() && after->first < p + len) return -EINVAL;
  if (after != declared_.begin()) {
    const RdmaRegion& before = std::prev(after)->second;
    if (before.base + before.len > p) return -EINVAL;
  }
  if (declared_.size() >= limits_.declared) return -ENOSPC;
  RdmaRegion r;
  r.base = p;
  r.len = len;
  r.declared = true;
  declared_.emplace(p, r);
  return 0;
}

int RdmaMemory::prepare(void* base) {
  std::lock_guard guard(lock_);
  const auto it = declared_.find(static_cast<uint8_t*>(base));
  if (it == declared_.end()) return -ENOENT;
  return it->second.mr != nullptr ? 0 : register_region(&it->second, true);
}

int RdmaMemory::withdraw(void* base) {
  std::lock_guard guard(lock_);
  const auto it = declared_.find(static_cast<uint8_t*>(base));
  if (it == declared_.end()) return -ENOENT;
  if (it->second.uses != 0) return -EBUSY;
  unregister(&it->second);
  declared_.erase(it);
  return 0;
}

RdmaRegion* RdmaMemory::find(const uint8_t* p, size_t len) {
  auto it = declared_.upper_bound(p);
  if (it == declared_.begin()) return nullptr;
  RdmaRegion& r = (--it)->second;
  return size_t(p - r.base) < r.len && len <= r.len - size_t(p - r.base) ? &r : nullptr;
}

RdmaRegion* RdmaMemory::acquire(const void* p, size_t len, bool write, bool declared_only, int* err) {
  std::lock_guard guard(lock_);
  RdmaRegion* r = find(static_cast<const uint8_t*>(p), len);
  std::unique_ptr<RdmaRegion> once;
  if (r == nullptr) {
    if (declared_only) {
      *err = -ENOENT;
      return nullptr;
    }
    once = std::make_unique<RdmaRegion>();
    once->base = static_cast<uint8_t*>(const_cast<void*>(p));
    once->len = len;
    r = once.get();
  }
  if (r->mr == nullptr && (*err = register_region(r, write || r->declared)) != 0) {
    if (write || *err != -EFAULT) return nullptr;
    if ((*err = register_region(r, false)) != 0) return nullptr;
  }
  if (write && !r->writable) {
    *err = -EACCES;
    return nullptr;
  }
  ++r->uses;
  r->used = ++clock_;
  *err = 0;
  once.release();
  return r;
}

void RdmaMemory::release(RdmaRegion* r) {
  std::lock_guard guard(lock_);
  KVFS_CHECK(r->uses != 0);
  if (--r->uses != 0 || r->declared) return;
  unregister(r);
  delete r;
}

int RdmaMemory::register_region(RdmaRegion* r, bool write) {
  while (regions_ >= limits_.regions || bytes_ + r->len > limits_.bytes)
    if (!drop_oldest()) return -ENOMEM;
  const int access = write ? access_ : access_ & ~(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
  r->mr = verbs_.reg_mr(pd_, r->base, r->len, access);
  if (r->mr == nullptr && errno == ENOMEM && drop_oldest()) r->mr = verbs_.reg_mr(pd_, r->base, r->len, access);
  if (r->mr == nullptr) return errno != 0 ? -errno : -EIO;
  r->writable = write;
  ++regions_;
  bytes_ += r->len;
  ++counters_.registered;
  return 0;
}

void RdmaMemory::unregister(RdmaRegion* r) {
  if (r->mr == nullptr) return;
  verbs_.dereg_mr(r->mr);
  r->mr = nullptr;
  --regions_;
  bytes_ -= r->len;
}

bool RdmaMemory::drop_oldest() {
  RdmaRegion* oldest = nullptr;
  for (auto& [base, r] : declared_)
    if (r.mr != nullptr && r.uses == 0 && (oldest == nullptr || r.used < oldest->used)) oldest = &r;
  if (oldest == nullptr) return false;
  unregister(oldest);
  ++counters_.dropped;
  return true;
}

RdmaMemory::Counters RdmaMemory::counters() const {
  std::lock_guard guard(lock_);
  return counters_;
}

}  // namespace kvfs
