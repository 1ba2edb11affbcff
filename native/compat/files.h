// files.h owns the registered descriptors of the process: hf3fs_reg_fd's table, known by descriptor number.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "connection.h"

namespace kvfs::compat {

// A file that the daemon holds open for us, as long as somebody holds this.
class OpenFile {
 public:
  OpenFile(std::shared_ptr<Connection> connection, int handle) : connection_(std::move(connection)), handle_(handle) {}
  ~OpenFile() { kvfs_file_unregister(connection_->client(), handle_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const Connection* connection() const { return connection_.get(); }
  uint32_t handle() const { return uint32_t(handle_); }
  bool can_read = false, can_write = false;
  bool retired() const { return retired_.load(std::memory_order_acquire); }
  void retire() { retired_.store(true, std::memory_order_release); }

 private:
  std::shared_ptr<Connection> connection_;
  int handle_;
  std::atomic<bool> retired_{false};  // deregistered: for operations that are prepared already only
};

class Files {
 public:
  // 0 or a positive errno: EBADF not on a kvfs mount or not fit for I/O, EINVAL registered already.
  int add(int fd);
  void remove(int fd);
  // What is registered as fd, with this session. 0 or -errno: -EBADF.
  int find(int fd, const std::shared_ptr<Connection>& c, std::shared_ptr<OpenFile>* out);
  void lock() { mu_.lock(); }
  void unlock() { mu_.unlock(); }

 private:
  struct Entry {
    uint64_t dev = 0, ino = 0;
    uint32_t generation = 0;
    std::shared_ptr<OpenFile> file;
  };
  std::mutex mu_;
  std::unordered_map<int, Entry> entries_;  // <= the session's limit of files, per mount
};

Files& files();

// Opens fd's file in a session. 0 or -errno.
int open_file(const std::shared_ptr<Connection>& c, int fd, std::shared_ptr<OpenFile>* out);

}  // namespace kvfs::compat
