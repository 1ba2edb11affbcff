// net_rdma.h owns the RDMA side of a chunk server: RdmaServing, the devices that its targets use, and the listeners that
// bring connections in: a request is looked at on the listener thread, admitted on the reactor of the target that it asks
// for, accepted on the listener thread, where it may wait for the device, and served on the reactor.
//
// Bounds: kMaxHandshakes requests that are not through yet, more are told -EBUSY; kMaxDevices devices of all targets together.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../transport/rdma_connect.h"
#include "net_listener.h"

namespace kvfs {

class RdmaServing {
 public:
  static constexpr size_t kMaxDevices = 256;

  explicit RdmaServing(std::vector<NetTarget> targets) : targets_(std::move(targets)) {}
  ~RdmaServing();  // after end() for each target

  // "rdma://HOST:PORT", see kvfs_server_listen. Any thread. The port, or -errno.
  int listen(const std::string& url, NetListener* listener, std::string* why);
  // On the target's reactor, when its server has ended and the listener has stopped.
  void end(uint32_t target);
  void add_stats(kvfs_net_stats* out) const;

 private:
  class Hook;
  struct Open {
    uint32_t target = 0;
    std::unique_ptr<RdmaDevice> device;
  };
  // Opened at first use, with the target's buffers registered: not on a reactor's thread. Null: *s.
  RdmaDevice* device(const VerbsTable& verbs, uint32_t target, const std::string& name, Status* s);

  const std::vector<NetTarget> targets_;
  std::atomic<uint32_t> under_way_{0};  // requests that are not through yet
  std::atomic<uint64_t> refused_{0}, malformed_{0};
  std::mutex mu_;
  std::vector<Open> devices_;  // by mu_
};

}  // namespace kvfs
