// rdma_transport.h owns RDMA as a kind of connection of the remote store: the ports of this machine that may be used, their
// devices, and the memory that is declared to them.
//
// Bounds: kMaxPorts ports; a device that has broken is opened again, kMaxDevices times for all together.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../transport/rdma_device.h"
#include "connector.h"

namespace kvfs {

class RdmaTransport final : public Transport {
 public:
  static constexpr size_t kMaxPorts = 64;
  static constexpr size_t kMaxDevices = 256;

  // rails: patterns as in rdma_selected; ports that are down now are used once they are up. Null: *why, RDMA is not
  // available.
  static std::unique_ptr<RdmaTransport> open(Uring* uring, const std::string& rails, std::string* why);
  RdmaTransport(Uring* uring, const VerbsTable& verbs, std::vector<RdmaPort> ports)
      : uring_(uring), verbs_(verbs), ports_(std::move(ports)) {}

  wire::Transport kind() const override { return wire::Transport::Rdma; }
  // One for each port that has an address of the endpoint's family and scope.
  std::vector<Route> routes(const wire::MapEndpoint& e) override;
  void dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>& capability, uint64_t deadline_ns) override;
  std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) override;
  void memory(void* base, size_t len, bool add) override;

 private:
  RdmaDevice* device(const std::string& name);  // opened at first use: on a thread that may wait

  Uring* uring_;
  const VerbsTable& verbs_;
  const std::vector<RdmaPort> ports_;
  std::mutex opening_;                                // of devices, one at a time
  std::mutex mu_;                                     // never held for long: the reactor's thread takes it
  std::vector<std::unique_ptr<RdmaDevice>> devices_;  // by mu_
  std::vector<std::pair<void*, size_t>> ranges_;      // by mu_: declared
};

}  // namespace kvfs
