// namespaces.h owns what the native side knows of namespaces (told by the Python daemon) and the queue of questions
// to it. Any thread. Bound: kMaxUpcalls questions about namespaces waiting, further ones are refused with -EAGAIN; of
// those about inodes the reactor has at most one per inode and fsync under way.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "../ffi/kvfs_node.h"

namespace kvfs {

struct NamespaceInfo {
  uint32_t ns_id = 0;
  bool evictable = false;
  uint32_t uid = KVFS_ANY_UID;
};

class Namespaces {
 public:
  void put(const std::string& tenant, const std::string& name, const NamespaceInfo& i) {
    std::lock_guard<std::mutex> g(mu_);
    map_[{tenant, name}] = i;
  }
  bool find(const std::string& tenant, const std::string& name, NamespaceInfo* out) {
    std::lock_guard<std::mutex> g(mu_);
    auto it = map_.find({tenant, name});
    if (it == map_.end()) return false;
    *out = it->second;
    return true;
  }

 private:
  std::mutex mu_;
  std::map<std::pair<std::string, std::string>, NamespaceInfo> map_;
};

class Upcalls {
 public:
  static constexpr size_t kMaxUpcalls = 1024;
  static constexpr uint64_t kInode = uint64_t(1) << 62;
  Upcalls() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}
  ~Upcalls() {
    if (fd_ >= 0) close(fd_);
  }
  Upcalls(const Upcalls&) = delete;
  Upcalls& operator=(const Upcalls&) = delete;

  int fd() const { return fd_; }
  // There are no namespaces but those known already: questions about them are answered here.
  void set_names_known() {
    std::lock_guard<std::mutex> g(mu_);
    names_known_ = true;
  }
  // The question's id (> 0), -EAGAIN, or -ENOENT.
  int64_t ask(uint32_t uid, const char* tenant, const char* name) {
    std::lock_guard<std::mutex> g(mu_);
    if (names_known_) return -ENOENT;
    if (namespaces_ >= kMaxUpcalls) return -EAGAIN;
    ++namespaces_;
    kvfs_upcall u{};
    u.kind = KVFS_UPCALL_NAMESPACE;
    u.uid = uid;
    memcpy(u.tenant, tenant, sizeof u.tenant);
    memcpy(u.name, name, sizeof u.name);
    return push(u);
  }
  // The question's id, which has kInode set.
  int64_t ask_inode(uint32_t kind, uint64_t ino) {
    std::lock_guard<std::mutex> g(mu_);
    kvfs_upcall u{};
    u.id = kInode;
    u.kind = kind;
    u.ino = ino;
    return push(u);
  }
  bool next(kvfs_upcall* out) {
    std::lock_guard<std::mutex> g(mu_);
    if (q_.empty()) {
      uint64_t v;
      ssize_t n = read(fd_, &v, sizeof v);
      (void)n;
      return false;
    }
    *out = q_.front();
    q_.pop_front();
    if (out->kind == KVFS_UPCALL_NAMESPACE) --namespaces_;
    return true;
  }

 private:
  int64_t push(kvfs_upcall& u) {
    u.id |= ++last_id_;
    q_.push_back(u);
    uint64_t one = 1;
    ssize_t n = write(fd_, &one, sizeof one);
    (void)n;
    return int64_t(u.id);
  }

  std::mutex mu_;
  int fd_;
  size_t namespaces_ = 0;
  bool names_known_ = false;
  uint64_t last_id_ = 0;
  std::deque<kvfs_upcall> q_;
};

}  // namespace kvfs
