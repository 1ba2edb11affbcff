// fuzz_ring.cpp feeds arbitrary bytes to the daemon's side of a ring and to the SQE check.
#include <cstdlib>
#include <cstring>

#include "../ring/queue.h"
#include "../server/validate.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvfs;
  constexpr uint32_t kEntries = 8;
  static void* mem = aligned_alloc(4096, ring_bytes(kEntries));
  memset(mem, 0, ring_bytes(kEntries));
  ring_format(mem, kEntries);
  DaemonRing d;
  d.attach(mem, kEntries);
  auto* h = static_cast<kvfs_ring_hdr*>(mem);
  uint32_t held = 0;
  // Each step: 1 byte of what to do, then bytes written somewhere into the ring.
  while (size >= 4) {
    uint32_t at = (uint32_t(data[1]) | uint32_t(data[2]) << 8) % uint32_t(ring_bytes(kEntries) - 256);
    size_t n = data[3] < size - 4 ? data[3] : size - 4;
    uint8_t what = data[0];
    if (what & 1) memcpy(static_cast<char*>(mem) + at, data + 4, n);
    if (what & 2) h->sq_tail += what >> 4;
    if (what & 4) h->cq_head += what >> 4;
    data += 4 + n;
    size -= 4 + n;
    uint32_t can = d.refresh();
    if (can > kEntries) abort();
    for (uint32_t i = 0; i < can; ++i) {
      kvfs_sqe s;
      d.take(&s);
      if (++held > kEntries) abort();
      int err = check_sqe(s, what & 8);
      if (err == 0 && !(what & 8) && (s.opcode > KVFS_OP_PUNCH || (op_has_iov(s.opcode) && s.iov == KVFS_IOV_INPROC)))
        abort();
      if (err > 0) abort();
    }
    for (; held > (what >> 6); --held) d.complete(1, 2);
    d.publish();
  }
  return 0;
}
