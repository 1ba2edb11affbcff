// remote_node.h owns how a node begins whose chunks are on chunk servers: what kvfs_remote_config says, as a RemoteStore.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../ffi/kvfs_remote.h"
#include "../remote/remote_store.h"
#include "../store/uring_device.h"
#include "namespaces.h"

namespace kvfs {

// A copy of a kvfs_remote_config, checked.
class RemoteNode {
 public:
  Status take(const kvfs_remote_config& cfg);
  // On the reactor thread. The map's namespaces become known, now and with each newer map.
  Status open(Uring* uring, Namespaces* namespaces, std::unique_ptr<Store>* out);

 private:
  RemoteOptions opt_;
  std::vector<uint8_t> capability_;
  bool data_sums_ = false;
  std::string rails_;  // patterns of RDMA devices, empty: all
};

}  // namespace kvfs
