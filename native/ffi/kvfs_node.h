/* kvfs_node.h owns the C interface between the Python daemon and the native node (reactor + control server).
 * All calls are thread-safe unless stated; none holds a lock while it waits for I/O except
 * kvfs_node_call, kvfs_node_fuse_start and kvfs_node_fuse_stop.
 * Results: >= 0 or -errno; text for people goes to `err` (NUL-terminated, may be NULL). */
#ifndef KVFS_NODE_H
#define KVFS_NODE_H

#include <stddef.h>
#include <stdint.h>

#include "../include/kvfs_ring.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvfs_node kvfs_node;
struct kvfs_remote_config;

#define KVFS_ANY_UID 0xffffffffu

struct kvfs_node_config {
  const char* data_path;   /* block device or preallocated file */
  const char* socket_path; /* NULL: no clients but the in-process ring. `<socket_path>.fd` takes file handles. */
  uint64_t memory_bytes;   /* DRAM tier; 0 = off */
  uint64_t dirty_bytes;    /* write-back bound; 0 = default */
  uint32_t verify;         /* check checksums of device reads */
  uint32_t allowed_uid;    /* besides the daemon's own uid and 0; KVFS_ANY_UID = nobody else */
  uint32_t max_sessions;   /* 0 = 64 */
  uint32_t read_only;
  uint64_t session_bytes; /* iov memory of one session; 0 = 4 GiB */
  uint64_t mount_dev;     /* st_dev of the mount, for file handles; 0 = set later by kvfs_node_set_mount */
  double high_watermark;  /* 0 = default */
  double low_watermark;
  const struct kvfs_remote_config* remote; /* with data_path NULL: the chunks are on chunk servers, see kvfs_remote.h */
  uint32_t pin_cpu;                        /* the reactor runs on CPU pin_cpu - 1 only; 0: on any */
  uint32_t rsv;
};

/* Counters and gauges; copied by the reactor between two turns. */
struct kvfs_node_stats {
  uint64_t chunks, block_chunks, file_chunks, data_bytes, slot_bytes, capacity_bytes, free_bytes, reserved_bytes;
  uint64_t free_segments, total_segments, index_bytes;
  uint64_t gets, get_hits, puts, puts_existed, deletes, writes, evictions, checksum_errors, io_errors;
  uint64_t mem_hits, mem_bytes, journal_groups, journal_bytes, checkpoints, flushes, moves, dirty_bytes;
  uint64_t bytes_read, bytes_written;
  uint64_t sessions, rings, iovs, iov_bytes, sqes, bad_sqes, broken_rings, sleeps, turns;
};

#define KVFS_UPCALL_NAMESPACE 1u /* a client opens namespace (tenant, name) that kvfs_node_ns_put has not named yet */
#define KVFS_UPCALL_DROP 2u      /* a client wrote to inode `ino`: the kernel's pages and attributes of it must go */
#define KVFS_UPCALL_STORE 3u     /* a client's fsync: size and times of inode `ino` must be made durable */
#define KVFS_UPCALL_UNMOUNTED 4u /* the kernel has ended the connection of kvfs_node_fuse_start */

struct kvfs_upcall {
  uint64_t id;
  uint64_t ino;
  uint32_t kind;
  uint32_t uid; /* of the client */
  char tenant[64];
  char name[128];
};

int kvfs_node_format(const char* path, uint64_t size, uint32_t segment_bytes, uint64_t journal_bytes, char* err,
                     size_t err_len);
int kvfs_node_start(const struct kvfs_node_config* cfg, kvfs_node** out, char* err, size_t err_len);
/* Ends all sessions, drains, checkpoints, closes. The node is gone afterwards whatever is returned. */
int kvfs_node_stop(kvfs_node* n, char* err, size_t err_len);

/* In-process ring of 4096 entries. Submit and reap from one thread at a time each. */
int kvfs_node_submit(kvfs_node* n, const struct kvfs_sqe* sqes, int count); /* how many were taken (may be < count) */
int kvfs_node_event_fd(kvfs_node* n); /* readable when there is something to reap */
int kvfs_node_reap(kvfs_node* n, struct kvfs_cqe* out, int max);
/* One operation, blocking (spins briefly first). Its own ring; calls are serialized. -ETIMEDOUT: the operation goes on
 * and its memory must stay valid until kvfs_node_stop. */
int64_t kvfs_node_call(kvfs_node* n, const struct kvfs_sqe* sqe, uint64_t timeout_ns);

int kvfs_node_stats(kvfs_node* n, struct kvfs_node_stats* out);
/* 1: so little space is left that every byte which is freed is wanted at once. */
int kvfs_node_space_short(kvfs_node* n);

/* Makes a namespace known. uid: who may open it besides 0 and the daemon's own; KVFS_ANY_UID = everybody admitted. */
int kvfs_node_ns_put(kvfs_node* n, const char* tenant, const char* name, uint32_t ns_id, int evictable, uint32_t uid);

int kvfs_node_upcall_fd(kvfs_node* n);                            /* readable when an upcall waits */
int kvfs_node_next_upcall(kvfs_node* n, struct kvfs_upcall* out); /* 1 = filled, 0 = none */
/* err 0 (after kvfs_node_ns_put, after the drop, after the store) or -errno for the client. Every upcall must be
 * answered: the client's operation waits for it. */
int kvfs_node_answer(kvfs_node* n, uint64_t id, int err);

/* Open inodes: INODE_* operations and file handles need the inode open. Opens are counted; the first sets the size. */
int kvfs_node_inode_open(kvfs_node* n, uint64_t ino, uint64_t size);
int kvfs_node_inode_close(kvfs_node* n, uint64_t ino);    /* references left */
int kvfs_node_inode_refs(kvfs_node* n, uint64_t ino);     /* opens not yet closed */
int64_t kvfs_node_inode_size(kvfs_node* n, uint64_t ino); /* -ENOENT if not open */
/* What the kernel is to be given: from now on it may hold copies, which a client's write must drop (upcall). Size in
 * bytes; written_ns: time of the last write (ns since 1970) not yet taken with kvfs_node_inode_take, 0 = none. */
int kvfs_node_inode_show(kvfs_node* n, uint64_t ino, uint64_t* size, uint64_t* written_ns);
/* 1: all that was written to it is in the store; 0: not yet. */
int kvfs_node_inode_landed(kvfs_node* n, uint64_t ino);
/* For whoever stores it: the time is taken, and the size is that of the bytes which are in the store. */
int kvfs_node_inode_take(kvfs_node* n, uint64_t ino, uint64_t* size, uint64_t* written_ns);
/* Whether it is known to have no security.capability, for which the kernel asks before each write. */
int kvfs_node_inode_no_capability(kvfs_node* n, uint64_t ino, int on);
int kvfs_node_set_mount(kvfs_node* n, uint64_t st_dev);

/* The mount. `kernel` is /dev/fuse, mounted; `daemon` one end of a SOCK_SEQPACKET socketpair whose other end the daemon's
 * libfuse serves as if it were /dev/fuse. Reads and writes of open inodes are served here, the rest there. Both
 * descriptors are the node's from now on, whatever is returned. Inode numbers with KVFS_VIEW_INO are the daemon's alone. */
#define KVFS_VIEW_INO 0x8000000000000000u
int kvfs_node_fuse_start(kvfs_node* n, int kernel, int daemon, char* err, size_t err_len);
/* Requests on inodes without KVFS_VIEW_INO whose opcode is a bit of `opcodes` (1 << FUSE_LOOKUP, ...) go to `direct` instead,
 * a socket like `daemon`, whose reader answers on /dev/fuse itself. Once per fuse_start. It is the node's from now on. */
int kvfs_node_fuse_direct(kvfs_node* n, int direct, uint64_t opcodes);
/* Leaves an answer (struct fuse_attr_out) to GETATTR of a directory, which the caller keeps right; NULL: takes it back.
 * -ENOSPC: there are too many already. */
int kvfs_node_fuse_attr(kvfs_node* n, uint64_t ino, const void* answer, size_t bytes);
/* Leaves answers to LOOKUP in directory `parent`, as READDIRPLUS has them (struct fuse_direntplus), of inodes with one name;
 * each is used once, and not while the inode is open. The caller says of each inode that changes, before the change is
 * answered. -ENOSPC: not all, or they are no such thing. */
int kvfs_node_fuse_entries(kvfs_node* n, uint64_t parent, const void* entries, size_t bytes);
int kvfs_node_fuse_entry_changed(kvfs_node* n, uint64_t ino);
/* Ends it when all requests under way have ended. */
int kvfs_node_fuse_stop(kvfs_node* n);
/* The kernel forgets pages and attributes of `ino`. Waits for reads of it that are under way: never call it from the
 * thread that answers them. -ENOENT: the kernel does not know it. */
int kvfs_node_fuse_invalidate(kvfs_node* n, uint64_t ino);

/* Offline check of a store that nobody has open (store/check_store.h says what the problems' numbers mean). */
struct kvfs_check_config {
  const char* data_path;
  uint32_t data, repair, orphans; /* orphans: compare with namespaces and inodes, both ascending */
  uint32_t namespaces;
  const uint32_t* ns_ids;
  uint64_t files;
  const uint64_t* inos;
  const uint64_t* sizes;
};
/* Shared with a thread that shows progress or interrupts: bytes read and to be read; cancel is set from outside. */
struct kvfs_check_progress {
  uint64_t done, total;
  uint32_t cancel, rsv;
};
struct kvfs_check_finding {
  uint32_t problem, length;
  uint64_t where;
  uint8_t kind, key_len, piece, rsv;
  uint32_t ns;
  uint8_t id[32];
};
struct kvfs_check_report {
  uint64_t counts[12]; /* by problem */
  uint64_t chunks, block_chunks, file_chunks, data_bytes, verified_bytes, salvaged;
  uint32_t closed, repaired;
  uint64_t findings;
  struct kvfs_check_finding* finding; /* kvfs_check_free */
};
int kvfs_check(const struct kvfs_check_config* cfg, struct kvfs_check_progress* progress, struct kvfs_check_report* out,
               char* err, size_t err_len);
void kvfs_check_free(struct kvfs_check_report* report);

#ifdef __cplusplus
}
#endif
#endif
