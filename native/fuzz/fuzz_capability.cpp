// fuzz_capability.cpp feeds arbitrary bytes to the parser of capabilities, as if the signature were right.
#include <cstdlib>
#include <cstring>

#include "../wire/capability.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvfs::wire;
  const auto check = [](const uint8_t* p, size_t n) {
    Capability c;
    const int err = parse_capability(p, n, &c);
    if (err > 0) abort();
    if (err != 0) return;
    if (c.grants.empty() || c.grants.size() > kMaxGrants || c.expires <= c.not_before) abort();
    if (strnlen(c.tenant, sizeof c.tenant) == sizeof c.tenant) abort();
    if (n != sizeof(CapabilityHeader) + c.grants.size() * sizeof(Grant) + kSignatureBytes) abort();
    uint8_t all = 0;
    for (const Grant& g : c.grants) {
      if (g.ns == 0 || (c.rights(kvfs::Kind::Block, g.ns) & ~kAllRights) != 0) abort();
      all |= g.rights;
    }
    for (const uint8_t right : {kRead, kWrite, kDelete, kList})
      if (c.anywhere(right) != ((all & right) != 0)) abort();
    // Nobody who does not hold the key gets anything by it.
    const uint8_t key[kPublicKeyBytes] = {1, 2, 3};
    if (open_capability(p, n, key, &c) == 0) abort();
  };
  check(data, size);
  // The same with a valid header around it, so that the checks behind the first are reached.
  if (size < sizeof(CapabilityHeader) + sizeof(Grant) + kSignatureBytes || size > kMaxCapability) return 0;
  uint8_t copy[kMaxCapability];
  memcpy(copy, data, size);
  CapabilityHeader h;
  memcpy(&h, copy, sizeof h);
  h.magic = kCapabilityMagic;
  h.version = kCapabilityVersion;
  h.grants = uint16_t((size - sizeof h - kSignatureBytes) / sizeof(Grant));
  memcpy(copy, &h, sizeof h);
  check(copy, size);
  return 0;
}
