// net_capability.h owns who signs capabilities in tests.
#pragma once

#include <sodium.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../wire/capability.h"

namespace kvfs::testing_net {

struct Issuer {
  uint8_t key[wire::kPublicKeyBytes], secret[crypto_sign_SECRETKEYBYTES];
  Issuer() {
    if (sodium_init() < 0) std::abort();
    crypto_sign_keypair(key, secret);
  }
  std::vector<uint8_t> make(const std::vector<wire::Grant>& grants, uint64_t not_before = 0,
                            uint64_t expires = UINT64_MAX, const std::string& tenant = "tenant",
                            uint16_t version = wire::kCapabilityVersion) const {
    wire::CapabilityHeader h{};
    h.magic = wire::kCapabilityMagic;
    h.version = version;
    h.grants = uint16_t(grants.size());
    h.not_before = not_before;
    h.expires = expires;
    std::memcpy(h.tenant, tenant.data(), tenant.size());
    const size_t body = sizeof h + grants.size() * sizeof(wire::Grant);
    std::vector<uint8_t> out(body + wire::kSignatureBytes);
    std::memcpy(out.data(), &h, sizeof h);
    if (!grants.empty()) std::memcpy(out.data() + sizeof h, grants.data(), body - sizeof h);
    crypto_sign_detached(out.data() + body, nullptr, out.data(), body, secret);
    return out;
  }
};

}  // namespace kvfs::testing_net
