/* kvfs.h owns the C interface of libkvfs.so: a client process's way to KV blocks and files over shared-memory rings.
 * Everything returns >= 0 or -errno. A client (control calls) may be shared by threads; a ring belongs to one thread at
 * a time. After fork() the child must open its own client: every call on the parent's returns -ECHILD.
 * If the daemon dies, calls and waits return -EREMOTEIO within 100 ms. */
#ifndef KVFS_H
#define KVFS_H

#include <stddef.h>
#include <stdint.h>

#include "kvfs_ring.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvfs_client kvfs_client;
typedef struct kvfs_ring kvfs_ring;

#define KVFS_NS_RDONLY 1u /* the handle refuses put and evict with -EACCES */
#define KVFS_IOV_HUGE 1u  /* try 2 MiB pages; falls back to ordinary ones */
#define KVFS_NO_TIMEOUT UINT64_MAX
#define KVFS_BATCHES 256 /* batches under way on one ring */

/* One memory area shared with the daemon. */
struct kvfs_iov {
  void* base;
  uint64_t size; /* bytes; the request rounded up to a page */
  uint16_t id;   /* for kvfs_sqe.iov */
};

/* Where memory of the caller's own lies. */
struct kvfs_place {
  uint64_t dev, ino, off; /* off: of the first byte in the file */
};

/* One key of a batch. `value_off` is where the value lies in the iov. */
struct kvfs_block {
  const void* key;
  uint32_t key_len;   /* 1..32; longer: status -EINVAL */
  uint32_t len;       /* bytes to read or to write */
  uint64_t value_off; /* byte offset in the iov */
  uint64_t off;       /* get: first byte of the value */
  int64_t status;     /* out: the operation's result, as in kvfs_ring.h */
};

/* Any number of operations of one kind, under way together. The caller fills the first part and leaves it, the blocks and
 * their memory alone until the batch is done. Statuses are in the blocks then. */
struct kvfs_batch {
  struct kvfs_block* blocks;
  const uint16_t* iovs; /* of each block, or NULL: `iov` for all */
  void* user;           /* the caller's */
  int32_t n;
  int32_t
      handle; /* namespace; file for KVFS_OP_READ, WRITE and FSYNC, whose blocks have no key and `off` in the file */
  uint16_t iov;
  uint8_t opcode; /* enum kvfs_opcode */
  uint8_t flags;  /* KVFS_SQE_* */
  /* The library's. */
  uint32_t slot;
  int32_t next;    /* the first block not yet handed over */
  int32_t pending; /* blocks handed over and not yet done */
  struct kvfs_batch* after;
};

int kvfs_open(const char* socket_path, kvfs_client** out);
/* Frees rings and iovs too. NULL is fine. */
void kvfs_close(kvfs_client* c);
/* Gives up a daemon that does not answer: control calls under way and later ones fail with -EREMOTEIO, so that destroying
 * rings, freeing iovs and kvfs_close do not wait for it, and so does what waits for completions, within 100 ms. Any
 * thread, any time before kvfs_close. A daemon that goes on later may still read and write the memory shared with it. */
void kvfs_abandon(kvfs_client* c);
/* 1: the daemon is there; 0: it is gone for good, or this is a forked child. */
int kvfs_alive(const kvfs_client* c);

int kvfs_iov_alloc(kvfs_client* c, uint64_t bytes, uint32_t flags, struct kvfs_iov* out);
/* Shares memory that the caller has mapped: it must be a MAP_SHARED mapping of a memfd or of a file on tmpfs such as
 * /dev/shm/x, which is found through /proc/self/maps and the process's descriptors (-EOPNOTSUPP if it is not that;
 * -ENOENT if it is unlinked, no descriptor of it is open, and CAP_CHECKPOINT_RESTORE is missing). The area is widened to whole pages: see out->base. The file must not be
 * made shorter while it is shared: operations get -EFAULT then. kvfs_iov_free ends the sharing, not the mapping. */
int kvfs_iov_register(kvfs_client* c, void* base, uint64_t bytes, struct kvfs_iov* out);
int kvfs_iov_free(kvfs_client* c, struct kvfs_iov* iov);
/* Which bytes of which file such memory is; else -EOPNOTSUPP. Equal places are the same bytes. */
int kvfs_iov_place(const void* base, uint64_t bytes, struct kvfs_place* out);

/* Handle of a namespace (>= 0). */
int kvfs_ns_open(kvfs_client* c, const char* tenant, const char* name, uint32_t flags);
int kvfs_ns_close(kvfs_client* c, int handle);
/* Handle of an open file on the mount; the descriptor's access mode is the handle's. The fd stays the caller's. */
int kvfs_file_register(kvfs_client* c, int fd);
int kvfs_file_unregister(kvfs_client* c, int handle);

int kvfs_ring_create(kvfs_client* c, uint32_t entries, kvfs_ring** out);
int kvfs_ring_destroy(kvfs_ring* r);

/* The next free entry, zeroed, or NULL if `entries` operations are under way. Published by kvfs_submit. */
struct kvfs_sqe* kvfs_prep(kvfs_ring* r);
int kvfs_prep_block(kvfs_ring* r, uint8_t opcode, uint8_t flags, int ns, const void* key, uint32_t key_len,
                    uint16_t iov, uint64_t iov_off, uint64_t off, uint32_t len, uint64_t user_data);
/* Hands over everything prepared; returns how many. One system call only if the daemon sleeps. */
int kvfs_submit(kvfs_ring* r);
/* Up to max completions without waiting; returns how many, or an error if there are none and there will be none. */
int kvfs_peek(kvfs_ring* r, struct kvfs_cqe* out, int max);
/* Waits for at least min (1..max) completions, returns how many were taken (>= min), or -ETIMEDOUT (none taken),
 * -EREMOTEIO, or the errno with which the daemon gave the ring up. timeout in ns. */
int kvfs_wait(kvfs_ring* r, struct kvfs_cqe* out, int min, int max, uint64_t timeout_ns);
/* A descriptor for poll, epoll or an event loop, to wait on instead of in kvfs_wait; the ring's to close. It is readable
 * once kvfs_arm's completions are there, and when the daemon is gone. Made by the first call. */
int kvfs_ring_event_fd(kvfs_ring* r);
/* Before waiting on that descriptor. 1: at least min completions are there already, do not wait; 0: wait, then kvfs_peek
 * or kvfs_batch_poll, and arm again. */
int kvfs_arm(kvfs_ring* r, int min);
/* The sleep of kvfs_wait alone: 0 once min completions are there, or its errors. For a ring behind a lock: while one
 * thread sleeps here without the lock, others may prepare and submit with it, but nobody may reap. */
int kvfs_sleep(kvfs_ring* r, int min, uint64_t timeout_ns);
/* Operations submitted and not yet reaped. */
int kvfs_inflight(const kvfs_ring* r);

/* Blocking batches of any n on a ring with nothing in flight (-EBUSY otherwise). Returns how many have status >= 0. */
int kvfs_get(kvfs_ring* r, int ns, const struct kvfs_iov* iov, struct kvfs_block* b, int n, uint64_t timeout_ns);
int kvfs_put(kvfs_ring* r, int ns, const struct kvfs_iov* iov, struct kvfs_block* b, int n, uint8_t flags,
             uint64_t timeout_ns);
int kvfs_exists(kvfs_ring* r, int ns, struct kvfs_block* b, int n, uint64_t timeout_ns);
int kvfs_evict(kvfs_ring* r, int ns, struct kvfs_block* b, int n, uint64_t timeout_ns);

/* Asynchronous batches. A ring has either these or the operations above under way, not both.
 * Submit: 0, or -EAGAIN if KVFS_BATCHES are under way. The first blocks are handed over at once, the rest by poll and wait.
 * Poll and wait return how many finished batches they put into `done`, in the order in which these finished. Wait waits
 * for one at least: -ETIMEDOUT, or -EDEADLK if none is under way. After -EREMOTEIO every batch under way is undecided, and
 * its memory must stay until the ring is destroyed. */
int kvfs_batch_submit(kvfs_ring* r, struct kvfs_batch* b);
int kvfs_batch_poll(kvfs_ring* r, struct kvfs_batch** done, int max);
int kvfs_batch_wait(kvfs_ring* r, struct kvfs_batch** done, int max, uint64_t timeout_ns);
/* How many of the first n keys are there: all are asked together, a ring full at a time, and none after the first that
 * is missing. On a ring with nothing in flight. */
int kvfs_match_prefix(kvfs_ring* r, int ns, const struct kvfs_block* b, int n, uint64_t timeout_ns);

#ifdef __cplusplus
}
#endif
#endif
