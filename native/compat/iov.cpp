// iov.cpp owns the calls on iovs: shared memory made, opened by id, wrapped, given up; and the honest answers of the GPU calls
// where no GPU can be used.
//
// An iov lives in /dev/shm/kvfs-iov-<its id in hex>, mode 0600, until it is unlinked or destroyed. Whoever has it open holds a
// shared lock on it, so that what a killed process left can be told apart: the first iov of a process removes that. A process
// that just ends takes its iovs' names along.
#include <dirent.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "../include/hf3fs_usrbio.h"
#include "connection.h"

using namespace kvfs::compat;  // NOLINT: the C functions below

namespace {
constexpr char kDirectory[] = "/dev/shm/", kPrefix[] = "kvfs-iov-";
constexpr time_t kNewborn = 60;  // seconds in which an iov's maker may still be about to lock it
constexpr uint64_t kMaxBytes = uint64_t{1} << 40;

// Behind hf3fs_iov::iovh.
struct Mapping {
  std::string path;
  int fd = -1;
  void* base = nullptr;
  uint64_t bytes = 0;  // whole pages
  pid_t maker = 0;     // whose destroy unlinks it; 0: it was opened

  ~Mapping() {
    if (base != nullptr) munmap(base, bytes);
    if (fd >= 0) close(fd);
  }
};

__attribute__((destructor)) void at_exit() { registry().unlink_names(); }

std::string path_of(const uint8_t id[16]) {
  std::string out = std::string(kDirectory) + kPrefix;
  for (int i = 0; i < 16; ++i) {
    char hex[3];
    snprintf(hex, sizeof hex, "%02x", id[i]);
    out += hex;
  }
  return out;
}

void remove_left_behind() {
  DIR* d = opendir(kDirectory);
  if (d == nullptr) return;
  while (dirent* e = readdir(d)) {
    if (strncmp(e->d_name, kPrefix, sizeof kPrefix - 1) != 0) continue;
    const int fd = openat(dirfd(d), e->d_name, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;
    struct stat st;
    const bool old = fstat(fd, &st) == 0 && st.st_uid == geteuid() && time(nullptr) - st.st_mtime > kNewborn;
    if (old && flock(fd, LOCK_EX | LOCK_NB) == 0) unlinkat(dirfd(d), e->d_name, 0);
    close(fd);
  }
  closedir(d);
}

void prefer_node(void* base, uint64_t bytes, int numa) {
  unsigned long nodes[16] = {};
  constexpr int kBits = CHAR_BIT * sizeof nodes[0];
  if (numa < 0 || numa >= int(16 * kBits)) return;
  nodes[numa / kBits] = 1ul << (numa % kBits);
  // A wish: on a machine without that node the memory is where it is.
  syscall(SYS_mbind, base, bytes, MPOL_PREFERRED, nodes, 16 * kBits, 0);
}

int check_arguments(const hf3fs_iov* iov, const char* mount_point, size_t size) {
  const bool good = iov != nullptr && mount_point != nullptr && *mount_point != 0 &&
                    strlen(mount_point) < sizeof iov->mount_point && size != 0 && size <= kMaxBytes;
  return good ? 0 : -EINVAL;
}

void fill(hf3fs_iov* iov, void* base, void* handle, const uint8_t id[16], const char* mount_point, size_t size,
          size_t block_size, int numa) {
  memset(iov, 0, sizeof *iov);
  iov->base = static_cast<uint8_t*>(base);
  iov->iovh = handle;
  memcpy(iov->id, id, sizeof iov->id);
  memcpy(iov->mount_point, mount_point, strlen(mount_point));
  iov->size = size;
  iov->block_size = block_size;
  iov->numa = numa;
}

// Maps the file and shares it with the mount's daemon. 0 or -errno.
int map(Mapping* m, const char* mount_point, size_t size, int numa) {
  m->bytes = (size + 4095) & ~uint64_t{4095};
  void* base = mmap(nullptr, m->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
  if (base == MAP_FAILED) return -errno;
  m->base = base;
  prefer_node(base, m->bytes, numa);
  std::shared_ptr<Connection> c;
  std::shared_ptr<Area> area;
  int err = registry().connect(mount_point, &c);
  if (err == 0) err = c->share(m->base, m->bytes, &area);
  return err;
}
}  // namespace

int hf3fs_iovcreate(hf3fs_iov* iov, const char* mount_point, size_t size, size_t block_size, int numa) {
  int err = check_arguments(iov, mount_point, size);
  if (err != 0) return err;
  static const int once = (remove_left_behind(), 0);
  (void)once;
  uint8_t id[16];
  if (getrandom(id, sizeof id, 0) != ssize_t(sizeof id)) return -EIO;
  auto m = std::unique_ptr<Mapping>(new (std::nothrow) Mapping);
  if (!m) return -ENOMEM;
  m->path = path_of(id);
  m->fd = open(m->path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (m->fd < 0) return -errno;
  m->maker = getpid();
  err = flock(m->fd, LOCK_SH) != 0 || ftruncate(m->fd, off_t((size + 4095) & ~size_t{4095})) != 0 ? -errno : 0;
  if (err == 0) err = map(m.get(), mount_point, size, numa);
  if (err != 0) {
    unlink(m->path.c_str());
    return err;
  }
  registry().add_name(m->path);
  fill(iov, m->base, m.get(), id, mount_point, size, block_size, numa);
  m.release();
  return 0;
}

int hf3fs_iovopen(hf3fs_iov* iov, const uint8_t id[16], const char* mount_point, size_t size, size_t block_size,
                  int numa) {
  int err = id == nullptr ? -EINVAL : check_arguments(iov, mount_point, size);
  if (err != 0) return err;
  auto m = std::unique_ptr<Mapping>(new (std::nothrow) Mapping);
  if (!m) return -ENOMEM;
  m->path = path_of(id);
  m->fd = open(m->path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  struct stat st;
  if (m->fd < 0 || flock(m->fd, LOCK_SH | LOCK_NB) != 0 || fstat(m->fd, &st) != 0) return -errno;
  if (!S_ISREG(st.st_mode) || uint64_t(st.st_size) < size) return -EINVAL;
  err = map(m.get(), mount_point, size, numa);
  if (err != 0) return err;
  fill(iov, m->base, m.get(), id, mount_point, size, block_size, numa);
  m.release();
  return 0;
}

void hf3fs_iovunlink(hf3fs_iov* iov) {
  if (iov == nullptr || iov->iovh == nullptr) return;
  registry().unlink_name(static_cast<Mapping*>(iov->iovh)->path);
}

void hf3fs_iovdestroy(hf3fs_iov* iov) {
  if (iov == nullptr || iov->base == nullptr) return;
  auto* m = static_cast<Mapping*>(iov->iovh);
  registry().forget(iov->base, m != nullptr ? m->bytes : iov->size);
  if (m == nullptr) return;
  if (m->maker == getpid()) registry().unlink_name(m->path);
  delete m;
  iov->iovh = nullptr;
  iov->base = nullptr;
}

int hf3fs_iovwrap(hf3fs_iov* iov, void* base, const uint8_t id[16], const char* mount_point, size_t size,
                  size_t block_size, int numa) {
  if (base == nullptr || id == nullptr) return -EINVAL;
  const int err = check_arguments(iov, mount_point, size);
  if (err != 0) return err;
  fill(iov, base, nullptr, id, mount_point, size, block_size, numa);
  kvfs_place place{};
  const bool shareable = kvfs_iov_place(base, size, &place) == 0;
  registry().check(base, size, place);
  if (!shareable) return 0;  // hf3fs_prep_io will say so
  prefer_node(reinterpret_cast<void*>(uintptr_t(base) & ~uintptr_t{4095}), size, numa);
  // At once, since the caller may be about to unlink it. What is in the way now, hf3fs_prep_io will say.
  std::shared_ptr<Connection> c;
  std::shared_ptr<Area> area;
  if (registry().connect(mount_point, &c) == 0) c->share(base, size, &area);
  return 0;
}

// ---- GPU memory: none can be used

bool hf3fs_gdr_available(void) { return false; }

int hf3fs_gdr_device_count(void) { return 0; }

enum hf3fs_mem_type hf3fs_iov_mem_type(const hf3fs_iov*) { return HF3FS_MEM_HOST; }

int hf3fs_iov_device_id(const hf3fs_iov*) { return -1; }

int hf3fs_iovsync(const hf3fs_iov* iov, int direction) {
  return iov == nullptr || (direction != 0 && direction != 1) ? -EINVAL : 0;
}

int hf3fs_iovcreate_device(hf3fs_iov* iov, const char* mount_point, size_t size, size_t block_size, int device_id) {
  const int err = check_arguments(iov, mount_point, size);
  return err != 0 || block_size != 0 || device_id < 0 ? -EINVAL : -ENOTSUP;
}

int hf3fs_iovopen_device(hf3fs_iov* iov, const uint8_t id[16], const char* mount_point, size_t size, size_t block_size,
                         int device_id) {
  return id == nullptr ? -EINVAL : hf3fs_iovcreate_device(iov, mount_point, size, block_size, device_id);
}

int hf3fs_iovwrap_device(hf3fs_iov* iov, void* device_ptr, const uint8_t id[16], const char* mount_point, size_t size,
                         size_t block_size, int device_id) {
  return device_ptr == nullptr ? -EINVAL : hf3fs_iovopen_device(iov, id, mount_point, size, block_size, device_id);
}
