// fuzz_wire.cpp feeds arbitrary bytes to what reads hellos, replies, frames, descriptors and cluster maps.
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../store/checksum.h"
#include "../wire/map.h"
#include "../wire/wire.h"

using namespace kvfs;
using namespace kvfs::wire;

namespace {

template <typename T>
bool load(const uint8_t* data, size_t size, T* out) {
  if (size < sizeof *out) return false;
  memcpy(out, data, sizeof *out);
  return true;
}

void hello(const uint8_t* data, size_t size) {
  Hello h;
  if (!load(data, size, &h)) return;
  // A reader has capability_len bytes before it checks them.
  const size_t rest = size - sizeof h;
  h.magic = kHelloMagic;
  if (h.capability_len > rest) h.capability_len = uint32_t(rest);
  if (h.capability_len > kMaxCapability) return;
  seal(&h, data + sizeof h);
  const int err = check_hello(h, data + sizeof h);
  if (err == 0 && (h.version == 0 || h.purpose == 0 || h.purpose > uint16_t(Purpose::Map))) abort();
  h.sum ^= 1;
  if (check_hello(h, data + sizeof h) == 0) abort();
}

void reply(const uint8_t* data, size_t size) {
  HelloReply r;
  if (!load(data, size, &r)) return;
  const size_t rest = size - sizeof r;
  r.magic = kReplyMagic;
  r.rsv = 0;
  if (r.map_len > rest) r.map_len = uint32_t(rest);
  seal(&r, data + sizeof r);
  const int err = check_reply(r, data + sizeof r);
  if (err == 0 && (r.err > 0 || (r.err == 0 && r.version != kVersion))) abort();
}

void frame(const uint8_t* data, size_t size) {
  FrameHeader h;
  if (!load(data, size, &h)) return;
  h.magic = kFrameMagic;
  for (const bool from_client : {false, true}) {
    if (check_header(h, from_client) != 0) continue;
    if (h.count > kMaxBatch || h.payload > kMaxFrameBytes || body_bytes(h) > kMaxBatch * sizeof(Desc)) abort();
    std::vector<uint8_t> body(body_bytes(h));
    const size_t n = std::min(body.size(), size - sizeof h);
    if (n != 0) memcpy(body.data(), data + sizeof h, n);
    FrameHeader sealed = h;
    seal(&sealed, body.data());
    if (check_sum(sealed, body.data()) != 0) abort();
  }
}

void desc(const uint8_t* data, size_t size) {
  Desc d;
  if (!load(data, size, &d)) return;
  d.op = uint8_t(1 + d.op % kOpMax);
  d.flags &= kFlagsMask;
  d.kind = uint8_t(1 + d.kind % 2);
  d.rsv = 0;
  if (check_desc(d) != 0) return;
  const Op op{d.op};
  if (mutates(op) != (d.seq != 0)) abort();
  if ((has_in(op) || has_out(op)) && (d.len == 0 || d.len > kMaxOpBytes)) abort();
  if ((op == Op::Write || op == Op::Truncate) && d.off + d.len > kFileChunk) abort();
  const ChunkKey k = key_of(d);
  if (k.rsv[0] != 0 || k.rsv[1] != 0 || k.key_len > 33) abort();
}

void map(const uint8_t* data, size_t size) {
  ClusterMap m;
  (void)parse_map(data, size, &m);
  // With a right header and sum, so that what is behind them is read.
  MapHeader h;
  if (!load(data, size, &h)) return;
  std::vector<uint8_t> copy(data, data + size);
  h.magic = kMapMagic;
  h.format = kMapFormat;
  h.rsv = 0;
  h.sum = 0;
  h.targets = 1 + h.targets % 4;
  h.slots = 1u << (h.slots % 8);
  h.namespaces %= 4;
  copy.resize(sizeof h + h.targets * sizeof(MapTarget) + h.slots * sizeof(uint16_t) +
              h.namespaces * sizeof(MapNamespace));
  memcpy(copy.data(), &h, sizeof h);
  h.sum = xxh3(copy.data(), copy.size());
  memcpy(copy.data(), &h, sizeof h);
  const int err = parse_map(copy.data(), copy.size(), &m);
  if (err > 0 || err == -EBADMSG) abort();
  if (err != 0) return;
  if (m.targets.size() != h.targets || m.slots.size() != h.slots) abort();
  ChunkKey k;
  memcpy(k.id, copy.data(), sizeof k.id);
  if (m.target_of(k) >= m.targets.size()) abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  hello(data, size);
  reply(data, size);
  frame(data, size);
  desc(data, size);
  map(data, size);
  return 0;
}
