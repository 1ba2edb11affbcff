/* kvfs_ring.h owns the shared-memory layout of rings: the bytes that a client process and the daemon both see.
 * Documented to the byte in docs/ring-protocol.md. Plain C; no pointers; little-endian; fixed width.
 *
 * One mapping (a sealed memfd made by the daemon) holds: ring header, SQE array, CQE array.
 * The client produces SQEs and consumes CQEs; the daemon does the opposite. Indices run freely (u32) and are masked.
 * The daemon trusts nothing here: it copies each SQE once, then checks the copy. */
#ifndef KVFS_RING_H
#define KVFS_RING_H

#include <stdint.h>

#define KVFS_RING_MAGIC 0x3147524e5346564bULL /* "KVFSNRG1" read as a little-endian u64 */
#define KVFS_RING_VERSION 1u
#define KVFS_RING_MIN_ENTRIES 2u
#define KVFS_RING_MAX_ENTRIES 4096u /* power of two; the CQ has the same number of entries */
#define KVFS_KEY_MAX 32u            /* bytes of a block key in an SQE; longer keys are hashed by the client library */
#define KVFS_VALUE_MAX (16u << 20)  /* bytes of one chunk */
#define KVFS_IOV_INPROC 0xffffu /* iov id of the daemon's own address space: accepted from the in-process ring only */

/* Operations. Results: >= 0 as stated, else -errno. */
enum kvfs_opcode {
  KVFS_OP_NOP = 0,    /* 0 */
  KVFS_OP_GET = 1,    /* block read: handle = namespace; bytes [off, off+len) of the value -> iov; result = bytes copied
                         (short at the value's end); -ENOENT miss, -EIO damaged */
  KVFS_OP_PUT = 2,    /* create-if-absent: len bytes from iov; result 1 = written, 0 = was there (same length);
                         -EEXIST same key with another length, -ENOSPC, -EINVAL len 0 or > KVFS_VALUE_MAX */
  KVFS_OP_EXISTS = 3, /* result = value length in bytes, -ENOENT */
  KVFS_OP_EVICT = 4,  /* result 0, -ENOENT */
  KVFS_OP_READ = 5,   /* file read: handle = registered file; result = bytes, short at EOF; holes read as zeros, or
                         -ENODATA with KVFS_SQE_NO_HOLES */
  KVFS_OP_WRITE = 6,  /* file write; result = len */
  KVFS_OP_FSYNC = 7,  /* file data (handle) to stable storage; result 0 */
  KVFS_OP_SCAN = 8,   /* list a namespace: off = cursor (0 starts), len = room in iov; packs struct kvfs_scan_entry
                         records; result = bytes packed, 0 = end. The next cursor is the last record's `cursor`. */
  KVFS_OP_PUNCH = 9,  /* bytes [off, off + iov_off) of a file (handle, open for writing) read as zeros from now on, and
                         whole chunks' space comes back; result 0. The size stays. */
  /* Below: the in-process ring of the daemon only (anything else gets -EPERM). `handle` is unused; key/off name things. */
  KVFS_OP_INODE_READ = 32, /* off, len of inode `ino` (first 8 bytes of key) */
  KVFS_OP_INODE_WRITE = 33,
  KVFS_OP_INODE_TRUNCATE = 34, /* off = new size */
  KVFS_OP_INODE_FSYNC = 35,
  KVFS_OP_INODE_DELETE = 36, /* drop all chunks of the inode; off = its size in bytes (bounds the search) */
  KVFS_OP_INODE_SCAN = 37,   /* every file chunk in the store, as kvfs_scan_entry (fsck, recovery) */
  KVFS_OP_SYNC = 38,         /* everything acknowledged so far becomes durable */
  KVFS_OP_CHECKPOINT = 39,
  KVFS_OP_NS_DELETE = 40,  /* drop every block of namespace id `handle` */
  KVFS_OP_INODE_LAND = 41, /* what was written to the inode so far is in the store, though perhaps not durable */
};
/* The in-process ring uses GET/PUT/EXISTS/EVICT/SCAN with handle = namespace id (u32), no registration needed. */

/* SQE flags */
#define KVFS_SQE_DURABLE 0x01u  /* PUT/WRITE/EVICT: complete only once it would survive power loss */
#define KVFS_SQE_FUSE 0x02u     /* in-process only: this read fills the kernel's page cache */
#define KVFS_SQE_NOTOUCH 0x04u  /* do not count this access for eviction */
#define KVFS_SQE_NO_HOLES 0x08u /* READ: -ENODATA where nothing was written, as far as chunks tell */

/* How a sleeping client is woken. */
#define KVFS_WAKE_FUTEX 1u /* FUTEX_WAKE on cq_tail */
#define KVFS_WAKE_EVENT 2u /* a byte to the ring's event socket */

struct kvfs_sqe { /* 128 bytes, two cache lines; file operations use only the first */
  uint8_t opcode;
  uint8_t flags;
  uint16_t iov;    /* id from iov registration */
  uint32_t handle; /* namespace or file handle */
  uint64_t user_data;
  uint64_t iov_off; /* byte offset in the iov (or the address, for KVFS_IOV_INPROC) */
  uint64_t off;     /* file offset, or first byte of the value */
  uint32_t len;
  uint8_t key_len;  /* 1..32; 33 = the key is the 32-byte hash of a longer one (the "long key" kind) */
  uint8_t rsv0[3];  /* must be 0 */
  uint8_t rsv1[24]; /* must be 0 */
  uint8_t key[32];  /* unused tail must be 0 */
  uint8_t rsv2[32]; /* must be 0 */
};

struct kvfs_cqe { /* 16 bytes */
  uint64_t user_data;
  int64_t result;
};

struct kvfs_scan_entry { /* 64 bytes */
  uint64_t cursor;
  uint64_t length; /* bytes of the value or chunk */
  uint32_t mtime;  /* seconds since 1970 */
  uint32_t version;
  uint8_t key_len; /* as in the SQE */
  uint8_t rsv[7];
  uint8_t key[32];
};

/* Ring header: 5 cache lines of 64 bytes, padded to 4096 bytes. Each index has one writer. */
struct kvfs_ring_hdr {
  /* line 0: constant after creation */
  uint64_t magic;
  uint32_t version;
  uint32_t entries; /* power of two */
  uint32_t sqe_off; /* byte offset of the SQE array: 4096 */
  uint32_t cqe_off;
  uint8_t rsv0[40];
  /* line 1: written by the client */
  uint32_t sq_tail;
  uint8_t rsv1[60];
  /* line 2: written by the daemon */
  uint32_t sq_head;
  uint32_t sq_need_wake; /* 1: the daemon sleeps; after publishing sq_tail the client must write its wake eventfd */
  uint8_t rsv2[56];
  /* line 3: written by the daemon; cq_tail is also the futex word the client sleeps on (shared futex) */
  uint32_t cq_tail;
  uint32_t broken; /* non-zero errno: the daemon has given this ring up */
  uint8_t rsv3[56];
  /* line 4: written by the client */
  uint32_t cq_head;
  uint32_t cq_need_wake; /* KVFS_WAKE_*: the client sleeps or is about to, and how to wake it after publishing */
  uint32_t cq_wake_at;   /* the daemon wakes only once cq_tail has reached this (modulo 2^32) */
  uint8_t rsv4[52];
  uint8_t pad[4096 - 5 * 64];
};

#ifdef __cplusplus
static_assert(sizeof(kvfs_sqe) == 128);
static_assert(sizeof(kvfs_cqe) == 16);
static_assert(sizeof(kvfs_scan_entry) == 64);
static_assert(sizeof(kvfs_ring_hdr) == 4096);
#endif

#endif
