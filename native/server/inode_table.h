// inode_table.h owns the sizes of open inodes: shared by the Python daemon (through kvfs_node.h) and the reactor.
// Every method may be called from any thread. Bound: one entry per inode that the mount or a file handle holds open.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace kvfs {

struct Inode {
  explicit Inode(uint64_t i, uint64_t s) : ino(i), size(s) {}
  const uint64_t ino;
  std::atomic<uint64_t> size;  // bytes; changed by the reactor only, after creation
  std::atomic<bool> dirty{false};
  uint32_t refs = 0;  // under the table's mutex

  void grow(uint64_t to) {
    if (to > size.load(std::memory_order_relaxed)) size.store(to, std::memory_order_release);
    dirty.store(true, std::memory_order_release);
  }
};
using InodeRef = std::shared_ptr<Inode>;

class InodeTable {
 public:
  InodeRef open(uint64_t ino, uint64_t size) {
    std::lock_guard<std::mutex> g(mu_);
    InodeRef& i = map_[ino];
    if (!i) i = std::make_shared<Inode>(ino, size);
    ++i->refs;
    return i;
  }
  // One more reference to an inode that is open already; null if it is not.
  InodeRef ref(uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find(ino);
    if (it == map_.end()) return nullptr;
    ++it->second->refs;
    return it->second;
  }
  // References left, or -ENOENT.
  int close(uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find(ino);
    if (it == map_.end()) return -ENOENT;
    int left = int(--it->second->refs);
    if (left == 0) map_.erase(it);
    return left;
  }
  InodeRef find(uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find(ino);
    return it == map_.end() ? nullptr : it->second;
  }

 private:
  std::mutex mu_;
  std::unordered_map<uint64_t, InodeRef> map_;
};

}  // namespace kvfs
