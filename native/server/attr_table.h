// attr_table.h owns answers to the kernel's GETATTR that the daemon has left, and keeps right, for directories: the kernel
// asks after each change in one.
#pragma once

#include <linux/fuse.h>

#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace kvfs {

class AttrTable {
 public:
  static constexpr size_t kMost = 4096;

  // nullptr: forget it. False: no room for another.
  bool set(uint64_t ino, const fuse_attr_out* answer) {
    std::lock_guard<std::mutex> g(mu_);
    if (answer == nullptr) {
      map_.erase(ino);
      return true;
    }
    if (map_.size() >= kMost && map_.count(ino) == 0) return false;
    map_[ino] = *answer;
    return true;
  }
  bool get(uint64_t ino, fuse_attr_out* answer) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find(ino);
    if (it == map_.end()) return false;
    *answer = it->second;
    return true;
  }

 private:
  std::mutex mu_;
  std::unordered_map<uint64_t, fuse_attr_out> map_;
};

}  // namespace kvfs
