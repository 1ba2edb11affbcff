// map.h owns the cluster map as bytes and in memory: which target has a slot, where targets listen, which namespaces there
// are. The same bytes are made and read in Python (fs/kvfs/cluster/map.py). Hostile input: parse_map checks all of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "wire.h"

namespace kvfs::wire {

constexpr uint32_t kMapMagic = 0x4d46564bu;  // "KVFM"
constexpr uint16_t kMapFormat = 1;
constexpr uint32_t kMaxSlots = 65536;
constexpr uint32_t kMaxTargets = 1024;
constexpr uint32_t kMaxEndpoints = 16;  // of one target
constexpr uint32_t kMaxNamespaces = 4096;

// Header, then `targets` MapTarget, then `slots` uint16_t (index into the targets), then `namespaces` MapNamespace.
struct MapHeader {
  uint32_t magic;
  uint16_t format;
  uint16_t rsv;
  uint32_t map_version;  // >= 1
  uint32_t slots;        // power of two
  uint32_t targets;      // >= 1
  uint32_t namespaces;
  uint64_t sum;  // XXH3-64 of everything with sum = 0
};
static_assert(sizeof(MapHeader) == 32);

enum class Transport : uint8_t { Tcp = 1, Rdma = 2, Shm = 3 };

struct MapEndpoint {
  uint8_t transport;
  uint8_t family;       // 4 or 6; Shm: 0
  uint16_t port;        // Shm: 0
  uint32_t speed;       // Mbit/s of the rail at the server's end; 0 = unknown
  uint8_t address[16];  // IPv4 in the first four; Shm: the name of a socket, behind it zeros
};
static_assert(sizeof(MapEndpoint) == 24);

bool shm_name_ok(std::string_view name);  // 1..16 of A-Z a-z 0-9 . _ -, not beginning with a dot
inline std::string shm_name(const MapEndpoint& e) {
  const auto* p = reinterpret_cast<const char*>(e.address);
  return {p, strnlen(p, sizeof e.address)};
}

struct MapTarget {
  uint32_t id;      // of the target, in the whole cluster
  uint32_t number;  // at its server: Hello::target
  uint32_t endpoints;
  uint32_t rsv;
  MapEndpoint endpoint[kMaxEndpoints];
};
static_assert(sizeof(MapTarget) == 400);

struct MapNamespace {
  uint32_t id;  // >= 1
  uint8_t cls;  // 1 cache (evictable), 2 durable, 3 volume: file chunks of one POSIX tree
  uint8_t rsv[3];
  char tenant[64];  // NUL-terminated
  char name[128];
};
static_assert(sizeof(MapNamespace) == 200);

struct ClusterMap {
  uint32_t version = 0;
  std::vector<MapTarget> targets;
  std::vector<uint16_t> slots;
  std::vector<MapNamespace> namespaces;

  // Index into `targets` of who has the key: the low bits of the XXH3-64 of the 40 bytes of a ChunkKey.
  uint32_t target_of(const ChunkKey& key) const;
};

// 0, -EPROTO (shape, ranges, names, duplicates), -EBADMSG (sum), -EPROTONOSUPPORT (format).
int parse_map(const void* bytes, size_t n, ClusterMap* out);

}  // namespace kvfs::wire
