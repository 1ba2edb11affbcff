// rdma_ports.cpp: which RDMA devices and ports there are, and the addresses by which the RDMA CM knows them.
#include <arpa/inet.h>
#include <dirent.h>
#include <fnmatch.h>
#include <ifaddrs.h>
#include <net/if.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "rdma_device.h"

namespace kvfs {

namespace {

constexpr uint32_t kMaxGids = 4096;  // looked at, of one port

uint32_t mbits(const ibv_port_attr& a) {
  uint32_t lane = 0;
  switch (a.active_speed) {
    case 1:
      lane = 2500;
      break;
    case 2:
      lane = 5000;
      break;
    case 4:
    case 8:
      lane = 10000;
      break;
    case 16:
      lane = 14000;
      break;
    case 32:
      lane = 25000;
      break;
    case 64:
      lane = 50000;
      break;
    case 128:
      lane = 100000;
      break;
    default:
      return 0;
  }
  switch (a.active_width) {
    case 1:
      return lane;
    case 2:
      return lane * 4;
    case 4:
      return lane * 8;
    case 8:
      return lane * 12;
    case 16:
      return lane * 2;
    default:
      return 0;
  }
}

bool mapped(const uint8_t* gid) {
  static constexpr uint8_t kPrefix[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
  return std::memcmp(gid, kPrefix, sizeof kPrefix) == 0;
}

bool link_local(const uint8_t* ip6) { return ip6[0] == 0xfe && (ip6[1] & 0xc0) == 0x80; }

sockaddr_storage address_of(const uint8_t* gid, uint32_t ifindex) {
  sockaddr_storage s{};
  if (mapped(gid)) {
    auto* in = reinterpret_cast<sockaddr_in*>(&s);
    in->sin_family = AF_INET;
    std::memcpy(&in->sin_addr, gid + 12, 4);
  } else {
    auto* in = reinterpret_cast<sockaddr_in6*>(&s);
    in->sin6_family = AF_INET6;
    std::memcpy(&in->sin6_addr, gid, 16);
    if (link_local(gid)) in->sin6_scope_id = ifindex;
  }
  return s;
}

// IP over InfiniBand: the interfaces of the device, whose GIDs are no IP addresses.
void addresses_of_netdevs(RdmaPort* p) {
  const std::string folder = "/sys/class/infiniband/" + p->device + "/device/net";
  if (DIR* d = opendir(folder.c_str()); d != nullptr) {
    while (const dirent* e = readdir(d))
      if (e->d_name[0] != '.') p->netdevs.emplace_back(e->d_name);
    closedir(d);
  }
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return;
  for (const ifaddrs* a = all; a != nullptr; a = a->ifa_next) {
    if (a->ifa_addr == nullptr || std::ranges::find(p->netdevs, a->ifa_name) == p->netdevs.end()) continue;
    sockaddr_storage s{};
    if (a->ifa_addr->sa_family == AF_INET) std::memcpy(&s, a->ifa_addr, sizeof(sockaddr_in));
    if (a->ifa_addr->sa_family == AF_INET6) std::memcpy(&s, a->ifa_addr, sizeof(sockaddr_in6));
    if (s.ss_family != 0) p->addresses.push_back(s);
  }
  freeifaddrs(all);
}

void gids_of(const VerbsTable& verbs, ibv_context* context, const ibv_port_attr& attr, RdmaPort* p) {
  const uint32_t n = std::min<uint32_t>(attr.gid_tbl_len > 0 ? uint32_t(attr.gid_tbl_len) : 0, kMaxGids);
  for (uint32_t i = 0; i < n; ++i) {
    ibv_gid_entry e{};
    if (verbs.query_gid_ex(context, p->port, i, &e, 0, sizeof e) != 0) continue;
    RdmaGid g;
    g.index = i;
    std::memcpy(g.bytes, e.gid.raw, 16);
    if (std::all_of(g.bytes, g.bytes + 16, [](uint8_t b) { return b == 0; })) continue;
    g.type = e.gid_type == IBV_GID_TYPE_ROCE_V2   ? RdmaGid::Type::RoceV2
             : e.gid_type == IBV_GID_TYPE_ROCE_V1 ? RdmaGid::Type::RoceV1
                                                  : RdmaGid::Type::Ib;
    p->gids.push_back(g);
    if (g.type == RdmaGid::Type::Ib) continue;
    char name[IF_NAMESIZE];
    if (if_indextoname(e.ndev_ifindex, name) != nullptr && std::ranges::find(p->netdevs, name) == p->netdevs.end())
      p->netdevs.emplace_back(name);
    const sockaddr_storage s = address_of(g.bytes, e.ndev_ifindex);
    const auto same = [&](const sockaddr_storage& o) { return std::memcmp(&o, &s, sizeof s) == 0; };
    if (std::ranges::none_of(p->addresses, same)) p->addresses.push_back(s);
  }
}

}  // namespace

std::string RdmaGid::text() const {
  char s[INET6_ADDRSTRLEN];
  return inet_ntop(AF_INET6, bytes, s, sizeof s);
}

const sockaddr_storage* RdmaPort::source_for(const sockaddr* destination) const {
  for (const sockaddr_storage& s : addresses) {
    if (s.ss_family != destination->sa_family) continue;
    if (s.ss_family == AF_INET) return &s;
    const auto* from = reinterpret_cast<const sockaddr_in6*>(&s);
    const auto* to = reinterpret_cast<const sockaddr_in6*>(destination);
    if (link_local(from->sin6_addr.s6_addr) == link_local(to->sin6_addr.s6_addr)) return &s;
  }
  return nullptr;
}

Status rdma_ports(const VerbsTable& verbs, std::vector<RdmaPort>* out) {
  int n = 0;
  ibv_device** list = verbs.get_device_list(&n);
  if (list == nullptr) {
    const int err = errno != 0 ? errno : ENOSYS;
    return {err, std::string("RDMA devices cannot be listed: ") + std::strerror(err)};
  }
  for (int i = 0; i < n; ++i) {
    ibv_context* context = verbs.open_device(list[i]);
    if (context == nullptr) continue;  // on its way out
    ibv_device_attr device{};
    if (verbs.query_device(context, &device) == 0) {
      for (unsigned port = 1; port <= device.phys_port_cnt; ++port) {
        ibv_port_attr attr{};
        if (verbs.query_port(context, uint8_t(port), &attr) != 0) continue;
        RdmaPort p;
        p.device = verbs.get_device_name(list[i]);
        p.port = uint8_t(port);
        p.active = attr.state == IBV_PORT_ACTIVE;
        p.ethernet = attr.link_layer == IBV_LINK_LAYER_ETHERNET;
        p.speed = mbits(attr);
        gids_of(verbs, context, attr, &p);
        if (!p.ethernet) addresses_of_netdevs(&p);
        out->push_back(std::move(p));
      }
    }
    verbs.close_device(context);
  }
  verbs.free_device_list(list);
  std::ranges::sort(*out, {}, [](const RdmaPort& p) { return p.name(); });
  return {};
}

bool rdma_selected(const RdmaPort& port, const std::string& patterns) {
  if (!port.active) return false;
  if (patterns.empty()) return true;
  size_t at = 0;
  while (at <= patterns.size()) {
    const size_t end = std::min(patterns.find(',', at), patterns.size());
    const std::string one = patterns.substr(at, end - at);
    const auto match = [&](const std::string& name) { return fnmatch(one.c_str(), name.c_str(), 0) == 0; };
    if (match(port.device) || match(port.name()) || std::ranges::any_of(port.netdevs, match)) return true;
    at = end + 1;
  }
  return false;
}

}  // namespace kvfs
