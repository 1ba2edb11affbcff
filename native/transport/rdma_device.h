// rdma_device.h owns what RDMA devices there are (rdma_ports), and RdmaDevice, one of them opened for one reactor: its
// protection domain, its registered memory, receives that its connections share, and its events.
#pragma once

#include <netinet/in.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../store/uring_device.h"
#include "../wire/wire.h"
#include "rdma_memory.h"

namespace kvfs {

struct RdmaGid {
  uint32_t index = 0;
  uint8_t bytes[16] = {};
  enum class Type : uint8_t { Ib, RoceV1, RoceV2 } type = Type::Ib;
  std::string text() const;  // "::ffff:10.0.0.1"
};

struct RdmaPort {
  std::string device;
  uint8_t port = 1;
  bool active = false;
  bool ethernet = false;  // RoCE; else InfiniBand
  uint32_t speed = 0;     // Mbit/s
  std::vector<std::string> netdevs;
  std::vector<RdmaGid> gids;
  std::vector<sockaddr_storage> addresses;  // of this port, that connections can start from
  std::string name() const { return device + "/" + std::to_string(port); }
  // Where to start from for a destination: of its family and scope. Null: it can't be reached from here.
  const sockaddr_storage* source_for(const sockaddr* destination) const;
};

// All ports of all devices, sorted by name.
Status rdma_ports(const VerbsTable& verbs, std::vector<RdmaPort>* out);
// patterns: separated by commas, as in a shell, each matched against device, device/port and network devices; empty: the
// active ports, all of them.
bool rdma_selected(const RdmaPort& port, const std::string& patterns);

class RdmaConnection;

// Memory of our own that the device can reach.
class RdmaBuffer {
 public:
  RdmaBuffer() = default;
  ~RdmaBuffer() { close(); }
  RdmaBuffer(const RdmaBuffer&) = delete;
  RdmaBuffer& operator=(const RdmaBuffer&) = delete;
  int open(const VerbsTable& verbs, ibv_pd* pd, size_t bytes, int access);  // 0 or -errno
  void close();
  uint8_t* base() const { return base_; }
  ibv_mr* mr() const { return mr_; }

 private:
  const VerbsTable* verbs_ = nullptr;
  uint8_t* base_ = nullptr;
  size_t bytes_ = 0;
  ibv_mr* mr_ = nullptr;
};

class RdmaDevice {
 public:
  enum class Role : uint8_t {
    Client,
    Server
  };  // a client's memory can be reached by its servers, a server's by nobody
  static constexpr uint32_t kSharedReceives = 256;
  // A request frame of any client.
  static constexpr uint32_t kRequestBytes = sizeof(wire::FrameHeader) + wire::kMaxBatch * sizeof(wire::Desc);

  // On any thread.
  static Status open(const VerbsTable& verbs, const std::string& device, Role role, const RdmaMemory::Limits& limits,
                     std::unique_ptr<RdmaDevice>* out);
  ~RdmaDevice();  // without connections; on the reactor's thread if attached
  RdmaDevice(const RdmaDevice&) = delete;
  RdmaDevice& operator=(const RdmaDevice&) = delete;

  // Hears of the device's events from now on, on the thread of this Uring. 0 or -errno. Twice does no harm.
  int attach(Uring& uring);
  const std::string& name() const { return name_; }
  const VerbsTable& verbs() const { return verbs_; }
  ibv_context* context() const { return context_; }
  ibv_pd* pd() const { return pd_; }
  const ibv_device_attr& attr() const { return attr_; }
  RdmaMemory& memory() { return *memory_; }
  Role role() const { return role_; }
  bool dead() const { return dead_; }  // a fatal error: nothing works any more. Any thread

  // Null: the device has none, or this is a client's.
  ibv_srq* srq() const { return srq_; }
  const uint8_t* received(uint32_t slot) const { return receives_.base() + size_t{slot} * kRequestBytes; }
  // 0 or -errno: those that could not be posted are tried again with the next ones.
  int repost(const uint32_t* slots, uint32_t n);

  // By its state, and by the carrier of its network device, which is lost before the state says so.
  bool port_active(uint8_t port) const;
  // A connection's end while its port is down: the RDMA CM would say goodbye into nothing, and the management queue pair of
  // soft-RoCE does not survive that. So the id goes when the port is up again. At most kBuried wait for it.
  static constexpr size_t kBuried = 256;
  void bury(rdma_cm_id* id, rdma_event_channel* events);

  void add(RdmaConnection* c) { connections_.push_back(c); }
  void remove(RdmaConnection* c) { std::erase(connections_, c); }

 private:
  RdmaDevice(const VerbsTable& verbs, std::string name, Role role)
      : verbs_(verbs), name_(std::move(name)), role_(role) {}
  Status init(ibv_device* device, const RdmaMemory::Limits& limits);
  int open_shared_receives();
  void on_events();
  void on_event(const ibv_async_event& e);
  struct Buried {
    rdma_cm_id* id;
    rdma_event_channel* events;
    uint8_t port;
  };
  void unearth(int port);  // < 0: all

  const VerbsTable& verbs_;
  std::string name_;
  Role role_;
  ibv_context* context_ = nullptr;
  ibv_pd* pd_ = nullptr;
  ibv_srq* srq_ = nullptr;
  ibv_device_attr attr_{};
  RdmaBuffer receives_;
  std::vector<uint32_t> unposted_;
  std::unique_ptr<RdmaMemory> memory_;
  Uring* uring_ = nullptr;
  int poll_ = -1;
  std::atomic<bool> dead_{false};
  std::vector<RdmaConnection*> connections_;
  std::vector<Buried> buried_;
};

}  // namespace kvfs
