// entry_table.h owns answers to the kernel's LOOKUP that the daemon has left, and keeps right, for entries of directories
// that are being walked. Each is given once: then the kernel has it.
#pragma once

#include <linux/fuse.h>

#include <cstdint>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

namespace kvfs {

class EntryTable {
 public:
  static constexpr size_t kMost = 128 << 10;
  static constexpr size_t kLongestName = 255;

  // `entries` are of directory `parent`, as READDIRPLUS answers (fuse_direntplus). False: they are no such thing, or there
  // is no room for all.
  bool add(uint64_t parent, std::string_view entries) {
    std::lock_guard<std::mutex> g(mu_);
    while (!entries.empty()) {
      fuse_entry_out answer;
      fuse_dirent entry;
      constexpr size_t kHead = sizeof answer + FUSE_NAME_OFFSET;
      if (entries.size() < kHead) return false;
      memcpy(&answer, entries.data(), sizeof answer);
      memcpy(&entry, entries.data() + sizeof answer, FUSE_NAME_OFFSET);
      if (entry.namelen == 0 || entry.namelen > kLongestName) return false;
      const size_t length = sizeof answer + FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + entry.namelen);
      if (entries.size() < length) return false;
      forget_entry(answer.nodeid);
      if (map_.size() >= kMost) return false;
      auto [put, fresh] = map_.try_emplace(key(parent, entries.substr(kHead, entry.namelen)), answer);
      if (!fresh) {  // the name was another inode's
        names_.erase(put->second.nodeid);
        put->second = answer;
      }
      names_[answer.nodeid] = &put->first;
      entries.remove_prefix(length);
    }
    return true;
  }

  // The answer, which is no longer here then; 0 is no inode.
  fuse_entry_out take(uint64_t parent, std::string_view name) {
    std::lock_guard<std::mutex> g(mu_);
    if (map_.empty()) return {};
    auto it = map_.find(key(parent, name));
    if (it == map_.end()) return {};
    const fuse_entry_out answer = it->second;
    names_.erase(answer.nodeid);
    map_.erase(it);
    return answer;
  }

  // The inode or its name has changed.
  void forget(uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    forget_entry(ino);
  }

 private:
  static std::string key(uint64_t parent, std::string_view name) {
    std::string k(reinterpret_cast<const char*>(&parent), sizeof parent);
    return k.append(name);
  }
  void forget_entry(uint64_t ino) {
    auto it = names_.find(ino);
    if (it == names_.end()) return;
    const std::string* name = it->second;
    names_.erase(it);
    map_.erase(*name);
  }

  std::mutex mu_;
  std::unordered_map<std::string, fuse_entry_out> map_;
  std::unordered_map<uint64_t, const std::string*> names_;  // one name of an inode
};

}  // namespace kvfs
