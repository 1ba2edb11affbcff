// rdma_transport.cpp: see rdma_transport.h.
#include "rdma_transport.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../transport/rdma_client.h"
#include "../transport/rdma_connect.h"
#include "tcp_transport.h"

namespace kvfs {

namespace {
// What a Dial holds until a channel is made of it; by itself it ends the connection.
struct Link {
  std::unique_ptr<RdmaConnection> connection;
};
}  // namespace

std::unique_ptr<RdmaTransport> RdmaTransport::open(Uring* uring, const std::string& rails, std::string* why) {
  const VerbsTable* verbs = load_verbs(why);
  if (verbs == nullptr) return nullptr;
  std::vector<RdmaPort> ports;
  if (const Status s = rdma_ports(*verbs, &ports); s.err != 0) {
    *why = "RDMA is not available: " + s.message;
    return nullptr;
  }
  const bool any = !ports.empty();
  std::erase_if(ports, [&](RdmaPort& p) {
    p.active = true;  // or may be later
    return p.addresses.empty() || !rdma_selected(p, rails);
  });
  if (ports.size() > kMaxPorts) ports.resize(kMaxPorts);
  if (!ports.empty()) return std::make_unique<RdmaTransport>(uring, *verbs, std::move(ports));
  *why = !any ? "RDMA is not available: this host has no RDMA device"
              : "RDMA is not available: no RDMA port" + (rails.empty() ? "" : " of " + rails) + " has an address";
  return nullptr;
}

std::vector<Route> RdmaTransport::routes(const wire::MapEndpoint& e) {
  sockaddr_storage to;
  address_of(e, &to);
  std::vector<Route> out;
  for (const RdmaPort& p : ports_)
    if (p.source_for(reinterpret_cast<const sockaddr*>(&to)) != nullptr) out.push_back({p.name(), p.speed});
  return out;
}

RdmaDevice* RdmaTransport::device(const std::string& name) {
  std::lock_guard<std::mutex> one(opening_);
  {
    std::lock_guard<std::mutex> g(mu_);
    for (const auto& d : devices_)
      if (d->name() == name && !d->dead()) return d.get();
    if (devices_.size() >= kMaxDevices) return nullptr;
  }
  std::unique_ptr<RdmaDevice> made;
  if (!RdmaDevice::open(verbs_, name, RdmaDevice::Role::Client, {}, &made)) return nullptr;
  std::lock_guard<std::mutex> g(mu_);
  for (const auto& [base, len] : ranges_) (void)made->memory().declare(base, len);  // else: registered for each use
  devices_.push_back(std::move(made));
  return devices_.back().get();
}

void RdmaTransport::dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>&, uint64_t deadline_ns) {
  const auto port = std::ranges::find(ports_, d->device, &RdmaPort::name);
  if (wire::Purpose{hello.purpose} != wire::Purpose::Attach || port == ports_.end()) {
    d->err = -EPROTONOSUPPORT;
    return;
  }
  RdmaDial to;
  address_of(d->endpoint, &to.destination);
  const sockaddr_storage* source = port->source_for(reinterpret_cast<const sockaddr*>(&to.destination));
  to.device = device(port->device);
  if (source == nullptr || to.device == nullptr) {
    d->err = source == nullptr ? -EADDRNOTAVAIL : -ENODEV;
    return;
  }
  to.port = port->port;
  to.source = *source;
  to.hello.target = hello.target;
  std::copy(std::begin(hello.session), std::end(hello.session), to.hello.session);
  std::copy(std::begin(hello.client), std::end(hello.client), to.hello.client);
  to.deadline_ns = deadline_ns;
  auto link = std::make_shared<Link>();
  bool answered = false;
  d->reply = {};
  d->err = rdma_connect(to, &link->connection, &answered);
  d->answered = d->err == 0 || answered;
  if (d->err == 0) d->link = std::move(link);
}

std::unique_ptr<ClientChannel> RdmaTransport::channel(Dial* d, const ChannelLimits& limits) {
  auto* link = static_cast<Link*>(d->link.get());
  if (link->connection->device().attach(*uring_) != 0) return nullptr;
  return std::make_unique<RdmaClientChannel>(*uring_, std::move(link->connection), limits);
}

void RdmaTransport::memory(void* base, size_t len, bool add) {
  std::lock_guard<std::mutex> g(mu_);
  if (add) {
    ranges_.emplace_back(base, len);
  } else {
    std::erase_if(ranges_, [&](const auto& r) { return r.first == base; });
  }
  for (const auto& d : devices_) (void)(add ? d->memory().declare(base, len) : d->memory().withdraw(base));
}

}  // namespace kvfs
