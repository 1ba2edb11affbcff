// inode_table.h owns the state of open inodes: shared by the Python daemon (through kvfs_node.h) and the reactor.
// The table's methods may be called from any thread. Bound: one entry per inode that the mount or a file handle holds
// open.
#pragma once

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace kvfs {

struct Job;

struct Inode {
  explicit Inode(uint64_t i, uint64_t s) : ino(i), size(s), landed(s) {}
  const uint64_t ino;
  std::atomic<uint64_t> size;           // bytes; changed by the reactor only, after creation
  std::atomic<uint64_t> landed;         // a size whose bytes are in the store and its journal, see note_landed()
  std::atomic<uint64_t> written_ns{0};  // time of the last write, until somebody takes it; 0 = none since
  // The kernel may hold pages or attributes of it. Set before what it is given is looked up; a client's write that finds
  // it set has them dropped before it completes.
  std::atomic<bool> cached{false};
  std::atomic<bool> no_capability{false};  // it has no security.capability, for which the kernel asks before each write
  std::atomic<bool> grown{false};          // since a client's fsync last had the size stored
  uint32_t refs = 0;                       // under the table's mutex

  // Counts the beginnings and ends of writes and truncations: what was read at another count may be out of date.
  uint64_t changes = 0;
  // The reactor's. Writes run side by side, a truncation alone, in order of arrival.
  uint32_t jobs = 0;     // writes and truncations begun or held back
  uint32_t writers = 0;  // begun
  uint32_t cuts = 0;     // truncations
  bool exclusive = false;
  std::deque<Job*> held;
  bool dropping = false;  // the kernel's copies are being dropped for the writes in drop_now
  std::vector<Job*> drop_now, drop_next;
  uint32_t storing = 0;  // fsyncs that wait for the size to be stored

  void wrote(uint64_t end, uint64_t now_ns) {
    if (end > size.load(std::memory_order_relaxed)) {
      size.store(end, std::memory_order_release);
      grown.store(true, std::memory_order_release);
    }
    written_ns.store(now_ns, std::memory_order_release);
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
  // Opens not yet closed, or -ENOENT.
  int refs(uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find(ino);
    return it == map_.end() ? -ENOENT : int(it->second->refs);
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
