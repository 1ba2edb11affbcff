// memory.cpp owns kvfs_iov_register: the file behind memory of the caller's, found and handed to the daemon.
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "client.h"

using namespace kvfs;  // NOLINT: the C functions below

namespace {
struct Place {
  dev_t dev = 0;
  ino_t ino = 0;
  uint64_t off = 0;  // of the area's first byte in the file
  char path[512] = "";
  char map[64] = "";  // the mapping itself, in /proc/self/map_files
};

// Where [from, to) lies, if all of it is one stretch of one shared mapping's file.
int find_place(uintptr_t from, uintptr_t to, Place* out) {
  FILE* f = fopen("/proc/self/maps", "re");
  if (f == nullptr) return -errno;
  char* line = nullptr;
  size_t room = 0;
  uintptr_t at = from;
  int err = -EOPNOTSUPP;
  while (at < to && getline(&line, &room, f) > 0) {
    uintptr_t start, end;
    uint64_t off, ino;
    unsigned major, minor;
    char perms[5];
    int path_at = 0;
    if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s %" SCNx64 " %x:%x %" SCNu64 " %n", &start, &end, perms, &off,
               &major, &minor, &ino, &path_at) != 7)
      break;
    if (end <= at) continue;
    if (start > at || perms[0] != 'r' || perms[1] != 'w' || perms[3] != 's' || ino == 0) break;
    const uint64_t here = off + (at - start);
    if (at == from) {
      out->dev = makedev(major, minor);
      out->ino = ino;
      out->off = here;
      snprintf(out->map, sizeof out->map, "/proc/self/map_files/%" PRIxPTR "-%" PRIxPTR, start, end);
      line[strcspn(line, "\n")] = 0;
      snprintf(out->path, sizeof out->path, "%s", path_at > 0 ? line + path_at : "");
    } else if (out->dev != makedev(major, minor) || out->ino != ino || here != out->off + (at - from)) {
      break;  // another file, or another part of it
    }
    at = end;
  }
  if (at >= to) err = 0;
  free(line);
  fclose(f);
  return err;
}

// Inode numbers on tmpfs say nothing without the device, and /proc/self/maps shows the device that stat does.
bool is_it(int fd, const Place& p) {
  struct stat st;
  return fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_dev == p.dev && st.st_ino == p.ino &&
         (fcntl(fd, F_GETFL) & O_ACCMODE) == O_RDWR;
}

// A descriptor for the file, or -errno: its path, one that the process has, or (a file without either; with
// CAP_CHECKPOINT_RESTORE) the mapping.
int open_place(const Place& p) {
  int fd = -1;
  if (p.path[0] == '/' && strncmp(p.path, "/memfd:", 7) != 0) {
    fd = open(p.path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd >= 0 && is_it(fd, p)) return fd;
    if (fd >= 0) close(fd);
    fd = -1;
  }
  DIR* d = opendir("/proc/self/fd");
  if (d == nullptr) return -errno;
  while (dirent* e = readdir(d)) {
    int n = atoi(e->d_name);
    if (e->d_name[0] == '.' || n == dirfd(d) || !is_it(n, p)) continue;
    fd = fcntl(n, F_DUPFD_CLOEXEC, 3);
    break;
  }
  closedir(d);
  if (fd >= 0) return fd;
  fd = open(p.map, O_RDWR | O_CLOEXEC);
  if (fd >= 0 && is_it(fd, p)) return fd;
  if (fd >= 0) close(fd);
  return -ENOENT;
}
}  // namespace

int kvfs_iov_place(const void* base, uint64_t bytes, kvfs_place* out) {
  const uintptr_t from = reinterpret_cast<uintptr_t>(base);
  if (base == nullptr || bytes == 0 || bytes > UINTPTR_MAX - from) return -EINVAL;
  Place p;
  const int err = find_place(from, from + bytes, &p);
  if (err == 0) *out = {p.dev, p.ino, p.off};
  return err;
}

int kvfs_iov_register(kvfs_client* c, void* base, uint64_t bytes, kvfs_iov* out) {
  if (c == nullptr || out == nullptr || base == nullptr || bytes == 0) return -EINVAL;
  if (forked(c)) return -ECHILD;
  const uintptr_t first = reinterpret_cast<uintptr_t>(base);
  if (bytes > UINTPTR_MAX - 4095 - first) return -EINVAL;
  const uintptr_t from = first & ~uintptr_t(4095), to = (first + bytes + 4095) & ~uintptr_t(4095);
  Place place;
  int err = find_place(from, to, &place);
  if (err != 0) return err;
  int fd = open_place(place);
  if (fd < 0) return fd;
  CtlRequest q;
  init_request(&q, Ctl::IovImport);
  q.a = to - from;
  q.b = place.off;
  int id = descriptor_call(c, &q, fd);
  close(fd);
  if (id < 0) return id;
  out->base = reinterpret_cast<void*>(from);
  out->size = to - from;
  out->id = uint16_t(id);
  std::lock_guard<std::mutex> g(c->mu);
  c->iovs.push_back({*out, false});
  return 0;
}
