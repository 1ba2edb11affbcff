// capability.cpp: parsing, signatures and rights; see capability.h.
#include "capability.h"

#include <sodium.h>

#include <algorithm>
#include <cerrno>

#include "../ring/control.h"

namespace kvfs::wire {

static_assert(kPublicKeyBytes == crypto_sign_PUBLICKEYBYTES && kSignatureBytes == crypto_sign_BYTES);

namespace {

bool grant_ok(const Grant& g) {
  return g.ns != 0 && g.kinds != 0 && (g.kinds & ~(kBlocks | kFiles)) == 0 && g.rights != 0 &&
         (g.rights & ~kAllRights) == 0 && (g.flags & ~kCache) == 0 && g.rsv == 0;
}

uint8_t bit_of(Kind k) { return k == Kind::File ? kFiles : kBlocks; }

uint8_t right_for(Op op) {
  switch (op) {
    case Op::Get:
    case Op::Lookup:
      return kRead;
    case Op::Delete:
    case Op::Purge:
      return kDelete;
    case Op::Scan:
      return kList;
    default:
      return kWrite;
  }
}

}  // namespace

uint8_t Capability::rights(Kind kind, uint32_t ns) const {
  uint8_t r = 0;
  for (const Grant& g : grants)
    if ((g.kinds & bit_of(kind)) != 0 && (g.ns == ns || g.ns == kAnyNamespace)) r |= g.rights;
  return r;
}

bool Capability::cache(Kind kind, uint32_t ns) const {
  return std::any_of(grants.begin(), grants.end(), [&](const Grant& g) {
    return (g.kinds & bit_of(kind)) != 0 && (g.ns == ns || g.ns == kAnyNamespace) && (g.flags & kCache) != 0;
  });
}

bool Capability::anywhere(uint8_t right) const {
  return std::any_of(grants.begin(), grants.end(), [&](const Grant& g) { return (g.rights & right) != 0; });
}

int parse_capability(const void* bytes, size_t n, Capability* out) {
  CapabilityHeader h;
  if (n < sizeof h + kSignatureBytes || n > kMaxCapability) return -EPROTO;
  std::memcpy(&h, bytes, sizeof h);
  if (h.magic != kCapabilityMagic) return -EPROTO;
  if (h.version != kCapabilityVersion) return -EPROTONOSUPPORT;
  if (h.grants == 0 || h.grants > kMaxGrants || h.expires <= h.not_before) return -EPROTO;
  if (n != sizeof h + h.grants * sizeof(Grant) + kSignatureBytes) return -EPROTO;
  if (!ctl_name_ok(h.tenant, sizeof h.tenant)) return -EPROTO;
  Capability c;
  c.not_before = h.not_before;
  c.expires = h.expires;
  std::memcpy(c.serial, h.serial, sizeof c.serial);
  std::memcpy(c.tenant, h.tenant, sizeof c.tenant);
  c.grants.resize(h.grants);
  std::memcpy(c.grants.data(), static_cast<const uint8_t*>(bytes) + sizeof h, h.grants * sizeof(Grant));
  if (!std::all_of(c.grants.begin(), c.grants.end(), grant_ok)) return -EPROTO;
  *out = std::move(c);
  return 0;
}

int open_capability(const void* bytes, size_t n, const uint8_t key[kPublicKeyBytes], Capability* out) {
  if (n < kSignatureBytes || n > kMaxCapability) return -EPROTO;
  if (sodium_init() < 0) return -EACCES;
  const auto* b = static_cast<const uint8_t*>(bytes);
  const size_t body = n - kSignatureBytes;
  if (crypto_sign_verify_detached(b + body, b, body, key) != 0) return -EACCES;
  return parse_capability(bytes, n, out);
}

int check_rights(const Capability& c, const Desc& d) {
  const Op op{d.op};
  if (op == Op::Stat) return 0;                                 // says nothing about what anybody keeps
  if (op == Op::Sync) return c.anywhere(kWrite) ? 0 : -EACCES;  // names no namespace
  if (op != Op::Scan && d.ns == kAnyNamespace) return -EINVAL;  // a chunk is in one namespace
  return (c.rights(Kind{d.kind}, d.ns) & right_for(op)) != 0 ? 0 : -EACCES;
}

}  // namespace kvfs::wire
