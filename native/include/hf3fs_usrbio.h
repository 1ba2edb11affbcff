/* hf3fs_usrbio.h owns the C interface of libhf3fs_api_shared.so: 3FS's USRBIO calls, names and layouts, answered by kvfs.
 * Programs written for 3FS compile against it and run against the library as they are. What is promised, and where it
 * differs from 3FS: docs/usrbio-3fs.md.
 *
 * An ior may be used by several threads: each call is atomic, and waiting keeps nobody from preparing. An iov and an ior
 * must not be destroyed while another thread uses them. If the daemon dies, operations end with -EREMOTEIO within
 * 100 ms. After fork() the child makes its own iors; iovs and registered descriptors go on working there. */
#ifndef HF3FS_USRBIO_H
#define HF3FS_USRBIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HF3FS_SUPER_MAGIC 0x8f3f5fff

#define HF3FS_IOR_ALLOW_READ_UNCOMMITTED 1 /* accepted; kvfs's reads see every acknowledged write anyway */
#define HF3FS_IOR_FORBID_READ_HOLES 2      /* a read that touches a hole ends with -ENODATA */

typedef void* hf3fs_iov_handle;
typedef void* hf3fs_ior_handle;

/* Shared memory that I/O reads from or writes to. The struct is the caller's. */
struct hf3fs_iov {
  uint8_t* base;
  hf3fs_iov_handle iovh; /* NULL: wrapped */
  char id[16];
  char mount_point[256];
  size_t size;
  size_t block_size; /* kept, not used */
  int numa;
};

/* A ring for either reads or writes. The struct is the caller's. */
struct hf3fs_ior {
  struct hf3fs_iov iov; /* of it, only size says something */
  hf3fs_ior_handle iorh;
  char mount_point[256];
  bool for_read;
  int io_depth; /* > 0: operations start in batches of exactly that many; <= 0: as soon as they are submitted */
  int priority; /* kept, not used */
  int timeout;  /* ms; kept, not used: nothing is gained by waiting for a fuller batch */
  uint64_t flags;
};

struct hf3fs_cqe {
  int32_t index; /* what hf3fs_prep_io returned */
  int32_t reserved;
  int64_t result; /* bytes, fewer at the end of the file, or -errno */
  const void* userdata;
};

/* Whether fd is open on a kvfs mount. */
bool hf3fs_is_hf3fs(int fd);
/* strlen + 1 of the mount point that path lies on, copied if that fits into `size`; -1: on no kvfs mount. */
int hf3fs_extract_mount_point(char* hf3fs_mount_point, int size, const char* path);

/* 0 or -errno. New shared memory of `size` bytes, zeroed. numa < 0: anywhere. */
int hf3fs_iovcreate(struct hf3fs_iov* iov, const char* hf3fs_mount_point, size_t size, size_t block_size, int numa);
/* Another process's iov, by its id: of the same user, and neither unlinked nor destroyed. */
int hf3fs_iovopen(struct hf3fs_iov* iov, const uint8_t id[16], const char* hf3fs_mount_point, size_t size,
                  size_t block_size, int numa);
/* Nobody can open it any more; who has it open goes on. */
void hf3fs_iovunlink(struct hf3fs_iov* iov);
/* Returns when no operation uses it any more. A wrapped one's memory stays the caller's. */
void hf3fs_iovdestroy(struct hf3fs_iov* iov);
/* Memory that the caller has mapped MAP_SHARED, of a memfd or a file on tmpfs. The id means nothing here: all zeros will
 * do. Memory that cannot be shared is refused by hf3fs_prep_io. */
int hf3fs_iovwrap(struct hf3fs_iov* iov, void* base, const uint8_t id[16], const char* hf3fs_mount_point, size_t size,
                  size_t block_size, int numa);

/* Bytes that a ring of so many entries takes. */
size_t hf3fs_ior_size(int entries);
/* 0 or -errno: -EINVAL also for io_depth > entries and more than 65536 entries. */
int hf3fs_iorcreate(struct hf3fs_ior* ior, const char* hf3fs_mount_point, int entries, bool for_read, int io_depth,
                    int numa);
int hf3fs_iorcreate2(struct hf3fs_ior* ior, const char* hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int priority, int numa);
int hf3fs_iorcreate3(struct hf3fs_ior* ior, const char* hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int priority, int timeout, int numa);
int hf3fs_iorcreate4(struct hf3fs_ior* ior, const char* hf3fs_mount_point, int entries, bool for_read, int io_depth,
                     int timeout, int numa, uint64_t flags);
/* Returns when nothing is in flight on it. May be called again. */
void hf3fs_iordestroy(struct hf3fs_ior* ior);

/* <= 0: a handle that hf3fs_prep_io takes as well as fd; > 0: an errno, EBADF not ours, EINVAL registered already. The
 * file stays usable after close(fd), until hf3fs_dereg_fd(fd). */
int hf3fs_reg_fd(int fd, uint64_t flags);
void hf3fs_dereg_fd(int fd);

int hf3fs_io_entries(const struct hf3fs_ior* ior);

/* >= 0: the operation's index; -EINVAL, -EBADF not registered, -EACCES not opened for that, -EAGAIN ring full. */
int hf3fs_prep_io(const struct hf3fs_ior* ior, const struct hf3fs_iov* iov, bool read, void* ptr, int fd, size_t off,
                  uint64_t len, const void* userdata);
/* 0 or -errno. */
int hf3fs_submit_ios(const struct hf3fs_ior* ior);
/* How many cqes were filled, in any order: at least min_results, fewer once abs_timeout (CLOCK_REALTIME; NULL: never) has
 * passed; or -errno. min_results <= 0 takes what is there. */
int hf3fs_wait_for_ios(const struct hf3fs_ior* ior, struct hf3fs_cqe* cqes, int cqec, int min_results,
                       const struct timespec* abs_timeout);

/* 0 or a positive errno. */
int hf3fs_hardlink(const char* target, const char* link_name);
/* 0 or a positive errno. Bytes [start[i], end[i]) read as zeros afterwards, and whole chunks' space comes back. The
 * descriptor must be open for writing. flags: none are known. */
int hf3fs_punchhole(int fd, int n, const size_t* start, const size_t* end, size_t flags);

/* GPU memory: -ENOTSUP unless hf3fs_gdr_available(), never host memory instead. block_size must be 0. */
enum hf3fs_mem_type { HF3FS_MEM_HOST = 0, HF3FS_MEM_DEVICE = 1, HF3FS_MEM_MANAGED = 2 };

int hf3fs_iovcreate_device(struct hf3fs_iov* iov, const char* hf3fs_mount_point, size_t size, size_t block_size,
                           int device_id);
int hf3fs_iovopen_device(struct hf3fs_iov* iov, const uint8_t id[16], const char* hf3fs_mount_point, size_t size,
                         size_t block_size, int device_id);
int hf3fs_iovwrap_device(struct hf3fs_iov* iov, void* device_ptr, const uint8_t id[16], const char* hf3fs_mount_point,
                         size_t size, size_t block_size, int device_id);
/* direction 0: before a write, 1: after a read. Nothing to do for host memory. */
int hf3fs_iovsync(const struct hf3fs_iov* iov, int direction);
bool hf3fs_gdr_available(void);
int hf3fs_gdr_device_count(void);
enum hf3fs_mem_type hf3fs_iov_mem_type(const struct hf3fs_iov* iov);
/* -1: host memory. */
int hf3fs_iov_device_id(const struct hf3fs_iov* iov);

#ifdef __cplusplus
}
#define HF3FS_ASSERT_LAYOUT(what) static_assert(what, #what)
#else
#define HF3FS_ASSERT_LAYOUT(what) _Static_assert(what, #what)
#endif

/* Programs compiled against 3FS's header have these built in. */
#if defined(__LP64__)
HF3FS_ASSERT_LAYOUT(sizeof(struct hf3fs_iov) == 312);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, base) == 0);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, iovh) == 8);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, id) == 16);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, mount_point) == 32);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, size) == 288);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, block_size) == 296);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_iov, numa) == 304);
HF3FS_ASSERT_LAYOUT(sizeof(struct hf3fs_ior) == 600);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, iov) == 0);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, iorh) == 312);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, mount_point) == 320);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, for_read) == 576);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, io_depth) == 580);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, priority) == 584);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, timeout) == 588);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_ior, flags) == 592);
HF3FS_ASSERT_LAYOUT(sizeof(struct hf3fs_cqe) == 24);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_cqe, index) == 0);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_cqe, reserved) == 4);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_cqe, result) == 8);
HF3FS_ASSERT_LAYOUT(offsetof(struct hf3fs_cqe, userdata) == 16);
#endif
#undef HF3FS_ASSERT_LAYOUT
#endif
