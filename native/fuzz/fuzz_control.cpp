// fuzz_control.cpp feeds arbitrary bytes to the parser of control messages.
#include <cstdlib>
#include <cstring>

#include "../ring/control.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvfs;
  auto check = [](const void* p, size_t n) {
    CtlRequest q{};
    int err = ctl_parse(p, n, &q);
    if (err > 0) abort();
    if (err == 0 && Ctl(q.type) == Ctl::NsOpen) {
      if (strnlen(q.tenant, sizeof q.tenant) == sizeof q.tenant) abort();
      if (strnlen(q.name, sizeof q.name) == sizeof q.name || strchr(q.name, '/') != nullptr) abort();
    }
    if (err == 0 && Ctl(q.type) == Ctl::RingCreate && !ring_entries_ok(uint32_t(q.a))) abort();
  };
  check(data, size);
  // The same with a valid frame around it, so that the checks behind the first are reached.
  CtlRequest q{};
  memcpy(&q, data, size < sizeof q ? size : sizeof q);
  q.magic = kCtlMagic;
  q.version = kCtlVersion;
  memset(q.rsv, 0, sizeof q.rsv);
  q.type = uint16_t(q.type % 10);
  check(&q, sizeof q);
  return 0;
}
