// remote_node.cpp owns the C ABI of kvfs_remote.h; see remote_node.h.
#include "remote_node.h"

#include <sys/random.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "../remote/connector.h"
#include "../remote/rdma_transport.h"
#include "../remote/shm_transport.h"
#include "../remote/tcp_transport.h"
#include "node.h"

namespace kvfs {

namespace {
constexpr uint8_t kClassCache = 1, kClassDurable = 2;  // MapNamespace::cls
constexpr uint32_t kMaxRemoteConnections = 16;         // per rail
constexpr uint32_t kMinDeadlineMs = 100;
constexpr uint32_t kAny = 0, kTcpOnly = 1, kRdmaOnly = 2;  // kvfs_remote_config::transport

// Every target has an endpoint that one of our ports can reach.
bool reaches_all(RdmaTransport* rdma, const wire::ClusterMap& map, std::string* why) {
  for (const wire::MapTarget& t : map.targets) {
    const bool reached = std::any_of(t.endpoint, t.endpoint + t.endpoints, [&](const wire::MapEndpoint& e) {
      return e.transport == uint8_t(wire::Transport::Rdma) && !rdma->routes(e).empty();
    });
    if (reached) continue;
    *why = "target " + std::to_string(t.id) + " has no rdma:// endpoint that this host's RDMA ports can reach";
    return false;
  }
  return true;
}

// Those of files are opened by descriptor, not by name.
void make_known(const wire::ClusterMap& map, Namespaces* namespaces) {
  for (const wire::MapNamespace& n : map.namespaces) {
    if (n.cls != kClassCache && n.cls != kClassDurable) continue;
    NamespaceInfo i;
    i.ns_id = n.id;
    i.evictable = n.cls == kClassCache;
    namespaces->put(n.tenant, n.name, i);
  }
}

}  // namespace

Status RemoteNode::take(const kvfs_remote_config& cfg) {
  const int err = cfg.map != nullptr ? wire::parse_map(cfg.map, cfg.map_bytes, &opt_.map) : -EPROTO;
  if (err == -EPROTONOSUPPORT) return {EPROTONOSUPPORT, "the cluster map has a format that this version does not know"};
  if (err != 0) return {-err, "the cluster map is damaged or no cluster map"};
  if (cfg.capability_bytes > wire::kMaxCapability) return {EINVAL, "the capability is too long"};
  if (cfg.capability_bytes != 0) {
    const auto* c = static_cast<const uint8_t*>(cfg.capability);
    capability_.assign(c, c + cfg.capability_bytes);
  }
  if (cfg.transport > 2) return {EINVAL, "transport must be 0 (any), 1 (TCP) or 2 (RDMA)"};
  if (cfg.connections > kMaxRemoteConnections)
    return {EINVAL, "at most " + std::to_string(kMaxRemoteConnections) + " connections per rail"};
  if (cfg.deadline_ms != 0 && cfg.deadline_ms < kMinDeadlineMs)
    return {EINVAL, "the deadline must be " + std::to_string(kMinDeadlineMs) + " ms at least"};
  opt_.file_ns = cfg.file_ns;
  opt_.peer.transport = cfg.transport;
  if (cfg.connections != 0) opt_.peer.connections = cfg.connections;
  if (cfg.deadline_ms != 0) opt_.peer.deadline_ns = uint64_t{cfg.deadline_ms} * 1'000'000;
  opt_.peer.dead_ns = std::min(opt_.peer.dead_ns, opt_.peer.deadline_ns / 4);
  data_sums_ = cfg.data_sums != 0;
  if (cfg.rails != nullptr) rails_ = cfg.rails;
  return {};
}

Status RemoteNode::open(Uring* uring, Namespaces* namespaces, std::unique_ptr<Store>* out) {
  ConnectorOptions c;
  c.capability = capability_;
  c.features = wire::kFeatures & ~(data_sums_ ? uint64_t{0} : wire::kDataSums);
  auto connector = std::make_unique<Connector>(uring, std::move(c));
  connector->add(std::make_unique<TcpTransport>(uring));
  if (opt_.peer.transport == kAny) connector->add(std::make_unique<ShmTransport>(uring));
  if (opt_.peer.transport != kTcpOnly) {
    std::string why;
    std::unique_ptr<RdmaTransport> rdma = RdmaTransport::open(uring, rails_, &why);
    const bool must = opt_.peer.transport == kRdmaOnly;
    if (rdma == nullptr && must) return {ENODEV, why};
    if (must && !reaches_all(rdma.get(), opt_.map, &why)) return {EHOSTUNREACH, why};
    if (rdma != nullptr) connector->add(std::move(rdma));
  }
  Status s = connector->init();
  if (s.err != 0) return s;
  make_known(opt_.map, namespaces);
  if (getrandom(&opt_.seed, sizeof opt_.seed, 0) < 0) opt_.seed = monotonic_ns();
  opt_.on_map = [namespaces](const wire::ClusterMap& map) { make_known(map, namespaces); };
  auto store = std::make_unique<RemoteStore>(std::move(connector), std::move(opt_));
  s = store->start();
  if (s.err != 0) {
    (void)store->close();
    return s;
  }
  *out = std::move(store);
  return {};
}

}  // namespace kvfs

using namespace kvfs;  // NOLINT: the C functions below

int kvfs_node_rails(kvfs_node* n, kvfs_rail_stats* out, int max) {
  if (max < 0 || (max != 0 && out == nullptr)) return -EINVAL;
  if (!n->remote) return -EOPNOTSUPP;
  const auto all = in_reactor(n->reactor, [n] {
    std::vector<kvfs_rail_stats> rails;
    for (const auto& p : static_cast<RemoteStore*>(n->store)->peers()) {
      for (const auto& r : p->rails()) {
        kvfs_rail_stats s{};
        s.target = p->id();
        s.rail = r->number;
        snprintf(s.name, sizeof s.name, "%s", r->name.c_str());
        s.transport = r->endpoint.transport;
        s.connections = r->live();
        s.up = !r->down && s.connections != 0;
        s.speed = r->speed();
        s.bytes_in = r->in_before;
        s.bytes_out = r->out_before;
        for (const auto& c : r->connections) {
          s.bytes_in += c->channel->counters().bytes_in;
          s.bytes_out += c->channel->counters().bytes_out;
        }
        s.ops = r->ops;
        s.failures = r->failures;
        s.reconnects = r->made > 0 ? r->made - 1 : 0;
        s.inflight_bytes = r->bytes;
        rails.push_back(s);
      }
    }
    return rails;
  });
  for (size_t i = 0; i < all.size() && i < size_t(max); ++i) out[i] = all[i];
  return int(all.size());
}

int kvfs_fetch_map(const char* url, const void* capability, size_t capability_bytes, void* out, size_t max,
                   uint32_t timeout_ms, char* err, size_t err_len) {
  const auto fail = [&](int e, const std::string& what) {
    if (err != nullptr && err_len > 0) snprintf(err, err_len, "%s", what.c_str());
    return e;
  };
  Dial d;
  d.purpose = wire::Purpose::Map;
  if (url == nullptr || !parse_tcp_url(url, &d.endpoint))
    return fail(-EINVAL, "not tcp://ADDRESS:PORT with a numeric address");
  if (capability_bytes > wire::kMaxCapability) return fail(-EINVAL, "the capability is too long");
  std::vector<uint8_t> proof;
  if (capability_bytes != 0) {
    const auto* c = static_cast<const uint8_t*>(capability);
    proof.assign(c, c + capability_bytes);
  }
  wire::Hello h{};
  h.purpose = uint16_t(wire::Purpose::Map);
  if (getrandom(h.client, sizeof h.client, 0) < 0) return fail(-errno, "no random bytes");
  TcpTransport tcp(nullptr);
  tcp.dial(&d, h, proof, monotonic_ns() + uint64_t{timeout_ms} * 1'000'000);
  if (d.err == 0) {
    wire::ClusterMap map;
    d.err = wire::parse_map(d.map.data(), d.map.size(), &map);
    if (d.err != 0) return fail(d.err, std::string(url) + ": the answer is no cluster map");
  }
  if (d.err == -EACCES && d.answered)
    return fail(d.err, std::string(url) + ": the server refuses this client's capability");
  if (d.err != 0) return fail(d.err, std::string(url) + ": " + strerror(-d.err));
  if (d.map.size() > max) return fail(-EMSGSIZE, "the map has " + std::to_string(d.map.size()) + " bytes");
  memcpy(out, d.map.data(), d.map.size());
  return int(d.map.size());
}
