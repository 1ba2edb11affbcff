// map.cpp: the cluster map's bytes; see map.h.
#include "map.h"

#include <algorithm>
#include <cerrno>

#include "../ring/control.h"
#include "../store/checksum.h"

namespace kvfs::wire {

bool shm_name_ok(std::string_view name) {
  if (name.empty() || name.size() > sizeof MapEndpoint::address || name.front() == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' || c == '_' ||
           c == '-';
  });
}

uint32_t ClusterMap::target_of(const ChunkKey& key) const { return slots[xxh3(&key, sizeof key) & (slots.size() - 1)]; }

namespace {

// Its name is part of a path.
bool shm_ok(const MapEndpoint& e) {
  const std::string name = shm_name(e);
  return e.family == 0 && e.port == 0 && shm_name_ok(name) &&
         std::all_of(e.address + name.size(), std::end(e.address), [](uint8_t c) { return c == 0; });
}

bool target_ok(const MapTarget& t) {
  if (t.rsv != 0 || t.endpoints == 0 || t.endpoints > kMaxEndpoints) return false;
  for (uint32_t i = 0; i < t.endpoints; ++i) {
    const MapEndpoint& e = t.endpoint[i];
    if (e.transport == uint8_t(Transport::Shm)) {
      if (!shm_ok(e)) return false;
      continue;
    }
    if (e.transport != uint8_t(Transport::Tcp) && e.transport != uint8_t(Transport::Rdma)) return false;
    if ((e.family != 4 && e.family != 6) || e.port == 0) return false;
  }
  return true;
}

bool namespace_ok(const MapNamespace& n) {
  return n.id != 0 && n.id != UINT32_MAX && n.cls >= 1 && n.cls <= 3 && (n.rsv[0] | n.rsv[1] | n.rsv[2]) == 0 &&
         ctl_name_ok(n.tenant, sizeof n.tenant) && ctl_name_ok(n.name, sizeof n.name);
}

template <typename T>
const uint8_t* take(const uint8_t* from, size_t n, std::vector<T>* out) {
  out->resize(n);
  if (n != 0) std::memcpy(out->data(), from, n * sizeof(T));
  return from + n * sizeof(T);
}

}  // namespace

int parse_map(const void* bytes, size_t n, ClusterMap* out) {
  MapHeader h;
  if (n < sizeof h || n > kMaxMap) return -EPROTO;
  std::memcpy(&h, bytes, sizeof h);
  if (h.magic != kMapMagic) return -EPROTO;
  if (h.format != kMapFormat) return -EPROTONOSUPPORT;
  if (h.rsv != 0 || h.map_version == 0 || h.slots == 0 || h.slots > kMaxSlots || (h.slots & (h.slots - 1)) != 0 ||
      h.targets == 0 || h.targets > kMaxTargets || h.namespaces > kMaxNamespaces)
    return -EPROTO;
  const size_t want =
      sizeof h + h.targets * sizeof(MapTarget) + h.slots * sizeof(uint16_t) + h.namespaces * sizeof(MapNamespace);
  if (n != want) return -EPROTO;
  std::vector<uint8_t> copy(static_cast<const uint8_t*>(bytes), static_cast<const uint8_t*>(bytes) + n);
  std::memset(copy.data() + offsetof(MapHeader, sum), 0, sizeof h.sum);
  if (xxh3(copy.data(), n) != h.sum) return -EBADMSG;

  ClusterMap m;
  m.version = h.map_version;
  const uint8_t* at = take(copy.data() + sizeof h, h.targets, &m.targets);
  at = take(at, h.slots, &m.slots);
  take(at, h.namespaces, &m.namespaces);
  std::vector<uint32_t> ids;
  for (const MapTarget& t : m.targets) {
    if (!target_ok(t)) return -EPROTO;
    ids.push_back(t.id);
  }
  std::sort(ids.begin(), ids.end());
  if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) return -EPROTO;
  if (std::any_of(m.slots.begin(), m.slots.end(), [&](uint16_t t) { return t >= h.targets; })) return -EPROTO;
  ids.clear();
  for (const MapNamespace& s : m.namespaces) {
    if (!namespace_ok(s)) return -EPROTO;
    ids.push_back(s.id);
  }
  std::sort(ids.begin(), ids.end());
  if (std::adjacent_find(ids.begin(), ids.end()) != ids.end()) return -EPROTO;
  *out = std::move(m);
  return 0;
}

}  // namespace kvfs::wire
