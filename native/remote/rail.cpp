// rail.cpp: a rail's state; see rail.h.
#include "rail.h"

#include <arpa/inet.h>

#include <algorithm>

namespace kvfs {

uint32_t Rail::speed() const {
  if (endpoint.speed == 0 || route.speed == 0) return std::max(endpoint.speed, route.speed);
  return std::min(endpoint.speed, route.speed);
}

uint32_t Rail::live() const {
  return uint32_t(std::count_if(connections.begin(), connections.end(), [](const auto& c) { return !c->ending; }));
}

void Rail::failed(uint64_t now, std::mt19937_64& random) {
  ++failures;
  if (++in_row >= kDownAfter) down = true;
  backoff_ns = std::clamp(2 * backoff_ns, kBackoffMin, kBackoffMax);
  dial_at_ns = now + backoff_ns / 2 + random() % (backoff_ns / 2);  // so that clients don't all come at once
}

std::string rail_name(const wire::MapEndpoint& e, const std::string& device) {
  if (wire::Transport{e.transport} == wire::Transport::Shm) return "shm://" + wire::shm_name(e);
  char address[INET6_ADDRSTRLEN] = "";
  inet_ntop(e.family == 6 ? AF_INET6 : AF_INET, e.address, address, sizeof address);
  std::string s = e.transport == uint8_t(wire::Transport::Rdma) ? "rdma://" : "tcp://";
  s += e.family == 6 ? "[" + std::string(address) + "]" : std::string(address);
  s += ":" + std::to_string(e.port);
  return device.empty() ? s : s + "@" + device;
}

}  // namespace kvfs
