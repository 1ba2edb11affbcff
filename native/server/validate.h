// validate.h owns the checks of one copied SQE that need no tables: opcodes, reserved bytes, key shape, lengths.
#pragma once

#include <cerrno>
#include <cstdint>

#include "../include/kvfs_ring.h"

namespace kvfs {

inline bool all_zero(const uint8_t* p, unsigned n) {
  uint8_t acc = 0;
  for (unsigned i = 0; i < n; ++i) acc |= p[i];
  return acc == 0;
}

inline bool op_has_key(uint8_t op) { return op >= KVFS_OP_GET && op <= KVFS_OP_EVICT; }
inline bool op_has_iov(uint8_t op) {
  return op == KVFS_OP_GET || op == KVFS_OP_PUT || op == KVFS_OP_READ || op == KVFS_OP_WRITE || op == KVFS_OP_SCAN ||
         op == KVFS_OP_INODE_READ || op == KVFS_OP_INODE_WRITE || op == KVFS_OP_INODE_SCAN;
}

// `s` is the daemon's private copy. 0 or -errno.
inline int check_sqe(const kvfs_sqe& s, bool inproc) {
  if (s.opcode > KVFS_OP_PUNCH) {
    if (s.opcode < KVFS_OP_INODE_READ || s.opcode > KVFS_OP_INODE_LAND) return -EOPNOTSUPP;
    if (!inproc) return -EPERM;
  }
  if (s.flags & ~(KVFS_SQE_DURABLE | KVFS_SQE_FUSE | KVFS_SQE_NOTOUCH | KVFS_SQE_NO_HOLES)) return -EINVAL;
  if ((s.flags & KVFS_SQE_NO_HOLES) && s.opcode != KVFS_OP_READ) return -EINVAL;
  if ((s.flags & KVFS_SQE_FUSE) && !inproc) return -EPERM;
  if (!all_zero(s.rsv0, sizeof s.rsv0) || !all_zero(s.rsv1, sizeof s.rsv1) || !all_zero(s.rsv2, sizeof s.rsv2))
    return -EINVAL;
  if (op_has_key(s.opcode)) {
    if (s.key_len == 0 || s.key_len > KVFS_KEY_MAX + 1) return -EINVAL;
    if (s.key_len < KVFS_KEY_MAX && !all_zero(s.key + s.key_len, KVFS_KEY_MAX - s.key_len)) return -EINVAL;
  }
  if (s.opcode == KVFS_OP_PUT && (s.len == 0 || s.len > KVFS_VALUE_MAX || s.off != 0)) return -EINVAL;
  if (s.iov == KVFS_IOV_INPROC && !inproc && op_has_iov(s.opcode)) return -EBADF;
  switch (s.opcode) {
    case KVFS_OP_READ:
    case KVFS_OP_WRITE:
    case KVFS_OP_INODE_READ:
    case KVFS_OP_INODE_WRITE:
    case KVFS_OP_INODE_TRUNCATE:
    case KVFS_OP_INODE_DELETE:
      // Offsets are POSIX off_t: no byte may lie beyond INT64_MAX.
      if (s.off > uint64_t(INT64_MAX) - s.len) return -EFBIG;
      break;
    case KVFS_OP_PUNCH:
      if (s.off > uint64_t(INT64_MAX) || s.iov_off > uint64_t(INT64_MAX) - s.off) return -EFBIG;
      break;
    default:
      break;
  }
  return 0;
}

}  // namespace kvfs
