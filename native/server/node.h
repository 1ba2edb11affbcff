// node.h owns struct kvfs_node, what is behind the C ABI of kvfs_node.h: a reactor thread with its io_uring, device and
// store, and those that hand it work. net.cpp puts network servers on the reactors of nodes.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "../ffi/kvfs_node.h"
#include "../ring/queue.h"
#include "../store/store.h"
#include "../store/uring_device.h"
#include "control.h"
#include "files.h"
#include "fuse_channel.h"
#include "namespaces.h"
#include "reactor.h"
#include "remote_node.h"

namespace kvfs {

// A ring in our own memory: same layout and code as the clients', an eventfd or a futex to wake us.
struct OwnRing {
  Ring daemon;
  ClientRing client;
  std::mutex mu;
  bool make(uint32_t entries, bool notify) {
    daemon.bytes = ring_bytes(entries);
    daemon.mem = aligned_alloc(4096, daemon.bytes);
    daemon.wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (notify) daemon.notify_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (daemon.mem == nullptr || daemon.wake_fd < 0 || (notify && daemon.notify_fd < 0)) return false;
    memset(daemon.mem, 0, daemon.bytes);
    ring_format(daemon.mem, entries);
    daemon.q.attach(daemon.mem, entries);
    client.attach(daemon.mem, daemon.bytes);
    return true;
  }
  ~OwnRing() {
    free(daemon.mem);
    if (daemon.wake_fd >= 0) close(daemon.wake_fd);
    if (daemon.notify_fd >= 0) close(daemon.notify_fd);
  }
  void publish() {
    if (!client.publish()) return;
    uint64_t one = 1;
    ssize_t n = write(daemon.wake_fd, &one, sizeof one);
    (void)n;
  }
};

// Something one thread waits for another to set.
template <typename T>
struct Box {
  std::mutex mu;
  std::condition_variable cv;
  bool full = false;
  T value{};
  void set(T v) {
    std::lock_guard<std::mutex> g(mu);
    value = std::move(v);
    full = true;
    cv.notify_one();
  }
  T get() {
    std::unique_lock<std::mutex> g(mu);
    cv.wait(g, [&] { return full; });
    return std::move(value);
  }
};

// The C ABI's way to give a Status: -errno, and the text for people to `err`.
inline int fail(const Status& st, char* err, size_t len) {
  if (err != nullptr && len > 0) snprintf(err, len, "%s", st.message.c_str());
  return -st.err;
}

// What f, run by the reactor between two turns, returns.
template <typename F>
auto in_reactor(Reactor* r, F f) {
  auto box = std::make_shared<Box<decltype(f())>>();
  r->post([box, f] { box->set(f()); });
  return box->get();
}

// A descriptor that lives as long as somebody uses it.
struct SharedFd {
  explicit SharedFd(int f) : fd(f) {}
  ~SharedFd() {
    if (fd >= 0) close(fd);
  }
  int fd;
};

}  // namespace kvfs

struct kvfs_node {
  std::string data_path;
  std::unique_ptr<kvfs::RemoteNode> remote;  // null: the chunks are in data_path
  kvfs::StoreOptions store_opt;
  uint64_t dirty_bytes = kvfs::kDirtyBytes;
  uint32_t pin_cpu = 0;  // 1 + the CPU of the reactor; 0: any
  kvfs::InodeTable inodes;
  kvfs::Namespaces namespaces;
  kvfs::Upcalls upcalls;
  kvfs::OwnRing own, calls;
  uint64_t next_call = 1;
  std::thread thread;
  kvfs::Box<kvfs::Status> opened, closed;
  kvfs::Reactor* reactor = nullptr;  // lives on the reactor thread's stack from opened to closed
  kvfs::Store* store = nullptr;
  std::unique_ptr<kvfs::ControlServer> control;
  std::unique_ptr<kvfs::FileServer> files;
  kvfs::Uring* ring = nullptr;  // the reactor's
  std::mutex fuse_mu;           // over the whole of a start or a stop
  std::unique_ptr<kvfs::FuseChannel> fuse;
  std::mutex notify_mu;
  std::shared_ptr<kvfs::SharedFd> notify;  // /dev/fuse, for invalidations
  std::shared_ptr<kvfs::FuseChannel::Left> left;

  void run();
};
