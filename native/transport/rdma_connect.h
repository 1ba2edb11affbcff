// rdma_connect.h owns how RDMA connections begin, over the RDMA CM: rdma_connect for clients; RdmaListener and RdmaIncoming
// for servers. Nothing of it runs on a reactor thread. Deadlines are CLOCK_MONOTONIC nanoseconds, errors -errno.
#pragma once

#include <sys/socket.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "rdma_connection.h"

namespace kvfs {

struct RdmaDial {
  RdmaDevice* device = nullptr;  // of Role::Client; outlives the connection
  uint8_t port = 1;
  sockaddr_storage source{};  // one of the port's addresses: without it the kernel might choose another device
  sockaddr_storage destination{};
  wire::RdmaHello hello{};  // magic, version and sum are filled in
  uint64_t deadline_ns = 0;
};

// Waits for the server. 0; -errno: *answered says if it is the server's refusal (as in HelloReply) or that of the network:
// -ETIMEDOUT, -EHOSTUNREACH, -ECONNREFUSED (nobody listens), -ENETDOWN, -EADDRNOTAVAIL (the source is another device's).
int rdma_connect(const RdmaDial& dial, std::unique_ptr<RdmaConnection>* out, bool* answered);

// A well-formed request for a connection. One that goes unanswered is rejected with -ECONNREFUSED.
class RdmaIncoming {
 public:
  RdmaIncoming(const VerbsTable& verbs, rdma_cm_id* id, const wire::RdmaHello& hello, uint8_t max_reads)
      : verbs_(&verbs), id_(id), hello_(hello), max_reads_(max_reads) {}
  RdmaIncoming(RdmaIncoming&& o) noexcept
      : verbs_(o.verbs_), id_(std::exchange(o.id_, nullptr)), hello_(o.hello_), max_reads_(o.max_reads_) {}
  RdmaIncoming& operator=(RdmaIncoming&&) = delete;
  ~RdmaIncoming();

  const wire::RdmaHello& hello() const { return hello_; }
  std::string device() const;  // that it came by
  const sockaddr* peer() const { return &id_->route.addr.dst_addr; }
  // On `device`, of Role::Server, that has this name. Null: *err, and the client is told -EBUSY.
  std::unique_ptr<RdmaConnection> accept(RdmaDevice& device, int* err);
  void reject(int err);

 private:
  const VerbsTable* verbs_;
  rdma_cm_id* id_;
  wire::RdmaHello hello_;
  uint8_t max_reads_;
};

class RdmaListener {
 public:
  static constexpr int kBacklog = 128;
  static constexpr unsigned kEvents = 64;  // taken at once

  // Port 0: any. Status: EADDRINUSE, EADDRNOTAVAIL, ENODEV (no RDMA device has the address).
  static Status open(const VerbsTable& verbs, const sockaddr* address, std::unique_ptr<RdmaListener>* out);
  ~RdmaListener();
  RdmaListener(const RdmaListener&) = delete;
  RdmaListener& operator=(const RdmaListener&) = delete;

  int fd() const { return events_->fd; }  // readable: take() has something to do; nonblocking
  uint16_t port() const;
  std::string device() const;  // that has the address; empty: the address is that of all
  // Gives what has come, at most kEvents, to `incoming`; requests that are not well-formed are rejected.
  void take(const std::function<void(RdmaIncoming)>& incoming);
  uint64_t malformed() const { return malformed_; }

 private:
  explicit RdmaListener(const VerbsTable& verbs) : verbs_(verbs) {}
  const VerbsTable& verbs_;
  rdma_event_channel* events_ = nullptr;
  rdma_cm_id* id_ = nullptr;
  uint64_t malformed_ = 0;
};

}  // namespace kvfs
