// lazy_writes.h owns what is known of the changes that a target has acknowledged and may lose with its process: which
// inodes an fsync must still go there for, and whose fsync must fail because the target has restarted since.
// Bound: kMax inodes by name, beyond that "any".
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <unordered_set>

namespace kvfs {

class LazyWrites {
 public:
  static constexpr size_t kMax = 4096;

  // A change was acknowledged without being durable.
  void file(uint64_t ino) {
    any_ = ++count_;
    if (!all_ && (dirty_.size() < kMax || dirty_.contains(ino))) {
      dirty_[ino] = count_;
    } else {
      all_ = true;
      all_at_ = count_;
      dirty_.clear();
    }
  }
  void other() { any_ = other_ = ++count_; }

  // A flush or sync covers what was acknowledged before it set out.
  uint64_t mark() const { return count_; }
  bool wants_flush(uint64_t ino) const { return all_ || lost_all_ || dirty_.contains(ino) || lost_.contains(ino); }
  void flushed(uint64_t ino, uint64_t mark) {
    const auto i = dirty_.find(ino);
    if (i != dirty_.end() && i->second <= mark) dirty_.erase(i);
  }
  void synced(uint64_t mark) {
    std::erase_if(dirty_, [&](const auto& i) { return i.second <= mark; });
    if (all_ && all_at_ <= mark) all_ = false;
    if (any_ <= mark) any_ = 0;
    if (other_ <= mark) other_ = 0;
  }

  // The target's process has restarted: changes of files outlive it, those of blocks may not.
  void lose_blocks() {
    if (other_ != 0) lost_any_ = true;
    other_ = 0;
  }
  // The target's machine has.
  void lose() {
    if (any_ != 0) lost_any_ = true;
    if (all_ || lost_.size() + dirty_.size() > kMax) {
      lost_all_ = true;
      told_.clear();
    } else {
      for (const auto& i : dirty_) lost_.insert(i.first);
    }
    dirty_.clear();
    all_ = false;
    any_ = other_ = 0;
  }
  // Whether a flush of the inode must fail: once. Where it isn't known which inodes they were, each is told once; those that
  // can't be remembered as told, until the next sync.
  bool tell_flush(uint64_t ino) {
    bool tell = lost_.erase(ino) != 0;
    if (lost_all_) tell |= told_.size() < kMax ? told_.insert(ino).second : !told_.contains(ino);
    return tell;
  }
  bool tell_sync() {
    const bool tell = lost_any_;
    lost_any_ = lost_all_ = false;
    told_.clear();
    return tell;
  }

 private:
  uint64_t count_ = 0;                            // changes ever
  uint64_t any_ = 0;                              // of the last one, 0: none
  uint64_t other_ = 0;                            // of the last one that is not a file's
  std::unordered_map<uint64_t, uint64_t> dirty_;  // inode: its last change
  bool all_ = false;
  uint64_t all_at_ = 0;
  std::unordered_set<uint64_t> lost_, told_;
  bool lost_all_ = false, lost_any_ = false;
};

}  // namespace kvfs
