// capability.h owns capabilities: what a client may do with which namespaces, signed by who hands out rights (Ed25519).
// docs/wire-protocol.md has the bytes; Python makes them (fs/kvfs/cluster). Hostile input: all of it is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "wire.h"

namespace kvfs::wire {

constexpr uint32_t kCapabilityMagic = 0x5043564bu;  // "KVCP"
constexpr uint16_t kCapabilityVersion = 1;
constexpr uint32_t kMaxGrants = 64;
constexpr uint32_t kAnyNamespace = UINT32_MAX;
constexpr size_t kPublicKeyBytes = 32, kSignatureBytes = 64;

constexpr uint8_t kRead = 1, kWrite = 2, kDelete = 4, kList = 8, kAllRights = 15;  // Grant::rights
constexpr uint8_t kBlocks = 1, kFiles = 2;                                         // Grant::kinds
constexpr uint8_t kCache = 1;                                                      // Grant::flags: puts are evictable

// Header, then `grants` Grant, then the signature over both.
struct CapabilityHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t grants;      // 1..kMaxGrants
  uint64_t not_before;  // seconds since 1970
  uint64_t expires;     // > not_before
  uint8_t serial[16];
  char tenant[64];  // NUL-padded
};
static_assert(sizeof(CapabilityHeader) == 104);

struct Grant {
  uint32_t ns;  // kAnyNamespace: all of them
  uint8_t kinds;
  uint8_t rights;
  uint8_t flags;
  uint8_t rsv;
};
static_assert(sizeof(Grant) == 8);
static_assert(sizeof(CapabilityHeader) + kMaxGrants * sizeof(Grant) + kSignatureBytes <= kMaxCapability);

struct Capability {
  uint64_t not_before = 0, expires = 0;
  uint8_t serial[16] = {};
  char tenant[64] = {};
  std::vector<Grant> grants;

  bool valid_at(uint64_t unix_s) const { return unix_s >= not_before && unix_s < expires; }
  // Rights to chunks of (kind, ns): of all grants that name them together. ns kAnyNamespace: to all namespaces at once.
  uint8_t rights(Kind kind, uint32_t ns) const;
  bool cache(Kind kind, uint32_t ns) const;
  bool anywhere(uint8_t right) const;  // some grant has it
};

// 0; -EPROTO (shape, reserved fields, names), -EPROTONOSUPPORT (version). Says nothing about the signature.
int parse_capability(const void* bytes, size_t n, Capability* out);
// The same, and -EACCES unless the holder of the key signed it.
int open_capability(const void* bytes, size_t n, const uint8_t key[kPublicKeyBytes], Capability* out);

// What a request needs: 0, -EACCES, or -EINVAL where it names all namespaces and may not.
int check_rights(const Capability& c, const Desc& d);

}  // namespace kvfs::wire
