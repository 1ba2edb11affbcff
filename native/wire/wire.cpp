// wire.cpp: checks and sums of the wire's records; see wire.h.
#include "wire.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <cerrno>

#include "../store/checksum.h"

namespace kvfs::wire {

namespace {

// The sum of a struct whose sum field counts as zero, and what follows it.
template <typename T>
uint64_t sum_of(T head, const void* rest, size_t n) {
  head.sum = 0;
  XXH3_state_t s;
  XXH3_64bits_reset(&s);
  XXH3_64bits_update(&s, &head, sizeof head);
  if (n != 0) XXH3_64bits_update(&s, rest, n);
  return XXH3_64bits_digest(&s);
}

bool zero(const void* p, size_t n) {
  const auto* b = static_cast<const uint8_t*>(p);
  for (size_t i = 0; i < n; ++i)
    if (b[i] != 0) return false;
  return true;
}

}  // namespace

uint64_t data_sum(const void* p, size_t n) { return xxh3(p, n); }

uint32_t body_bytes(const FrameHeader& h) {
  switch (Type{h.type}) {
    case Type::Request:
      return h.count * uint32_t{sizeof(Desc)};
    case Type::Response:
      return h.count * uint32_t{sizeof(Result)};
    default:
      return 0;
  }
}

int check_header(const FrameHeader& h, bool from_client) {
  if (h.magic != kFrameMagic || h.rsv0 != 0 || h.rsv1 != 0 || h.rsv2 != 0) return -EPROTO;
  switch (Type{h.type}) {
    case Type::Request:
    case Type::Response:
      if ((Type{h.type} == Type::Request) != from_client) return -EPROTO;
      if (h.count == 0 || h.count > kMaxBatch || h.payload > kMaxFrameBytes) return -EPROTO;
      return 0;
    case Type::Cancel:
    case Type::Ping:
      if (!from_client) return -EPROTO;
      break;
    case Type::Pong:
      if (from_client) return -EPROTO;
      break;
    case Type::Bye:
      break;
    default:
      return -EPROTO;
  }
  return h.count == 0 && h.payload == 0 ? 0 : -EPROTO;
}

int check_sum(const FrameHeader& h, const void* body) { return sum_of(h, body, body_bytes(h)) == h.sum ? 0 : -EBADMSG; }

int check_message(const uint8_t* message, size_t n, bool from_client, FrameHeader* h) {
  if (n < sizeof *h) return -EPROTO;
  std::memcpy(h, message, sizeof *h);
  if (const int err = check_header(*h, from_client); err != 0) return err;
  if (h->payload != 0 || n != sizeof *h + body_bytes(*h)) return -EPROTO;
  return check_sum(*h, message + sizeof *h);
}

void seal(FrameHeader* h, const void* body) { h->sum = sum_of(*h, body, body_bytes(*h)); }

int check_hello(const Hello& h, const void* capability) {
  if (h.magic != kHelloMagic || h.version == 0 || h.capability_len > kMaxCapability) return -EPROTO;
  if (h.purpose < uint16_t(Purpose::Session) || h.purpose > uint16_t(Purpose::Map)) return -EPROTO;
  return sum_of(h, capability, h.capability_len) == h.sum ? 0 : -EBADMSG;
}
void seal(Hello* h, const void* capability) { h->sum = sum_of(*h, capability, h->capability_len); }

int check_hello(const RdmaHello& h) {
  if (h.magic != kHelloMagic || h.version == 0 || h.rsv != 0 || h.rsv1 != 0) return -EPROTO;
  return sum_of(h, nullptr, 0) == h.sum ? 0 : -EBADMSG;
}
void seal(RdmaHello* h) { h->sum = sum_of(*h, nullptr, 0); }

int check_reply(const HelloReply& r, const void* map) {
  if (r.magic != kReplyMagic || r.rsv != 0 || r.map_len > kMaxMap || r.err > 0 || r.err < -4095) return -EPROTO;
  if (r.err == 0 && (r.version == 0 || r.version > kVersion)) return -EPROTO;
  return sum_of(r, map, r.map_len) == r.sum ? 0 : -EBADMSG;
}
void seal(HelloReply* r, const void* map) { r->sum = sum_of(*r, map, r->map_len); }

int check_desc(const Desc& d) {
  if (d.op == 0 || d.op > kOpMax) return -EOPNOTSUPP;
  const Op op{d.op};
  if ((d.flags & ~kFlagsMask) != 0 || d.rsv != 0) return -EINVAL;
  if (mutates(op) != (d.seq != 0) || (op != Op::Scan && d.cursor != 0)) return -EINVAL;
  if (!has_in(op) && d.sum != 0) return -EINVAL;
  const bool file = d.kind == uint8_t(Kind::File);
  if (!file && d.kind != uint8_t(Kind::Block)) return -EINVAL;
  const bool whole = op == Op::Scan || op == Op::Sync || op == Op::Stat || (op == Op::Purge && !file);
  if (whole) {
    if (d.key_len != 0 || !zero(d.key, sizeof d.key) || d.off != 0) return -EINVAL;
  } else if (op == Op::Purge) {
    if (d.key_len != 24 || !zero(d.key + 24, 8) || d.off != 0) return -EINVAL;
  } else if (file) {
    if (d.key_len != 16 || !zero(d.key + 16, 16)) return -EINVAL;
  } else {
    if (d.key_len == 0 || d.key_len > 33) return -EINVAL;
    if (d.key_len < 32 && !zero(d.key + d.key_len, 32u - d.key_len)) return -EINVAL;
  }
  switch (op) {
    case Op::Get:
      return d.len != 0 && d.len <= kMaxOpBytes && d.off < kMaxChunk ? 0 : -EINVAL;
    case Op::Put:
      return !file && d.off == 0 && d.len != 0 && d.len <= kMaxOpBytes ? 0 : -EINVAL;
    case Op::Write:
      return file && d.len != 0 && d.off <= kFileChunk && d.len <= kFileChunk - d.off ? 0 : -EINVAL;
    case Op::Truncate:
      return file && d.len == 0 && d.off <= kFileChunk ? 0 : -EINVAL;
    case Op::Flush:
      return file && d.len == 0 && d.off == 0 ? 0 : -EINVAL;
    case Op::Scan:
      return d.len >= sizeof(ScanRecord) && d.len <= (1u << 20) ? 0 : -EINVAL;
    case Op::Stat:
      return d.len == sizeof(TargetStat) ? 0 : -EINVAL;
    default:
      return d.len == 0 && d.off == 0 ? 0 : -EINVAL;
  }
}

ChunkKey key_of(const Desc& d) {
  ChunkKey k;
  k.kind = Kind{d.kind};
  k.key_len = d.key_len;
  k.ns = d.ns;
  std::memcpy(k.id, d.key, sizeof k.id);
  return k;
}

}  // namespace kvfs::wire
