// control.h owns the messages on the Unix socket (SOCK_SEQPACKET) between client and daemon, and their checks.
// One fixed-size request, one fixed-size reply, one request outstanding per session. Bytes: docs/ring-protocol.md.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "queue.h"

namespace kvfs {

constexpr uint32_t kCtlMagic = 0x4c54434bu;  // "KCTL"
constexpr uint16_t kCtlVersion = 1;

enum class Ctl : uint16_t {
  Hello = 1,        // -> token
  RingCreate = 2,   // a = entries -> id, a = bytes; fds: memfd, wake eventfd
  RingDestroy = 3,  // id
  IovCreate = 4,    // a = bytes, flags -> id, a = bytes; fds: memfd
  IovFree = 5,      // id
  NsOpen = 6,       // tenant, name, flags -> id
  NsClose = 7,      // id
  FileClose = 8,    // id
  FileOpen = 9,     // only on `<sock>.fd`, with the token and one descriptor -> id
  IovImport = 10,   // only on `<sock>.fd`, with the token and one descriptor; a = bytes, b = offset -> id
  RingEvent = 11,   // id -> fd: a socket that gets readable, see kvfs_ring_event_fd
};

struct CtlRequest {  // 256 bytes
  uint32_t magic;
  uint16_t version;
  uint16_t type;
  uint32_t id;
  uint32_t flags;
  uint64_t a;
  uint8_t token[16];
  uint64_t b;
  uint8_t rsv[16];  // 0
  char tenant[64];  // NUL-terminated
  char name[128];
};
static_assert(sizeof(CtlRequest) == 256);

struct CtlReply {  // 48 bytes
  uint32_t magic;
  uint16_t version;
  uint16_t type;
  int32_t err;  // 0 or -errno
  uint32_t id;
  uint64_t a;
  uint8_t token[16];
  uint64_t rsv;
};
static_assert(sizeof(CtlReply) == 48);

// A name: 1..cap-1 bytes, NUL-terminated, nothing but zeros after, no '/', no control characters, not "." or "..".
inline bool ctl_name_ok(const char* s, size_t cap) {
  size_t n = strnlen(s, cap);
  if (n == 0 || n == cap) return false;
  for (size_t i = n; i < cap; ++i) {
    if (s[i] != 0) return false;
  }
  for (size_t i = 0; i < n; ++i) {
    unsigned char c = static_cast<unsigned char>(s[i]);
    if (c < 0x20 || c == 0x7f || c == '/') return false;
  }
  return !(s[0] == '.' && (n == 1 || (n == 2 && s[1] == '.')));
}

// Copies and checks one received message. 0 or -errno (-EPROTO: hang up; others: answer).
inline int ctl_parse(const void* buf, size_t len, CtlRequest* out) {
  if (len != sizeof *out) return -EPROTO;
  memcpy(out, buf, sizeof *out);
  if (out->magic != kCtlMagic || out->version != kCtlVersion) return -EPROTO;
  for (uint8_t b : out->rsv) {
    if (b != 0) return -EPROTO;
  }
  switch (Ctl(out->type)) {
    case Ctl::RingCreate:
      return out->a <= KVFS_RING_MAX_ENTRIES && ring_entries_ok(uint32_t(out->a)) ? 0 : -EINVAL;
    case Ctl::IovCreate:
      return out->a != 0 && out->a <= (uint64_t(1) << 40) && out->flags <= 1 ? 0 : -EINVAL;
    case Ctl::NsOpen:
      return ctl_name_ok(out->tenant, sizeof out->tenant) && ctl_name_ok(out->name, sizeof out->name) && out->flags <= 1
                 ? 0
                 : -EINVAL;
    case Ctl::IovImport:
      return out->a != 0 && out->a <= (uint64_t(1) << 40) && out->b <= (uint64_t(1) << 60) &&
                     (out->a | out->b) % 4096 == 0
                 ? 0
                 : -EINVAL;
    case Ctl::Hello:
    case Ctl::RingDestroy:
    case Ctl::IovFree:
    case Ctl::NsClose:
    case Ctl::FileClose:
    case Ctl::FileOpen:
    case Ctl::RingEvent:
      return 0;
  }
  return -EOPNOTSUPP;
}

}  // namespace kvfs
