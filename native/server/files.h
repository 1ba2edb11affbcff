// files.h owns the thread that takes open files and shared memory from clients (`<socket>.fd`): one descriptor proves the
// right to one file.
// Closing a descriptor of our own mount makes the kernel send FLUSH to ourselves and wait for the answer, so the thread
// has its own descriptor table (unshare(CLONE_FILES)): a dying daemon never closes such a descriptor on its main path.
#pragma once

#include <atomic>
#include <string>
#include <thread>

#include "control.h"

namespace kvfs {

class FileServer {
 public:
  FileServer(std::string path, ControlServer* control) : path_(std::move(path)), control_(control) {}
  ~FileServer();
  Status start();
  void stop();
  void set_mount(uint64_t dev) { mount_dev_.store(dev, std::memory_order_relaxed); }

 private:
  void run();
  int take(int conn);  // answers one request; -errno: close the connection
  int import_memory(int conn, const CtlRequest& q, int fd);

  std::string path_;
  ControlServer* control_;
  int listen_fd_ = -1, stop_fd_ = -1;
  std::atomic<uint64_t> mount_dev_{0};
  std::thread thread_;
};

}  // namespace kvfs
