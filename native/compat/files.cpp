// files.cpp owns the calls on files: register, deregister, which mount, hard link, punch hole. See files.h.
#include "files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "../include/hf3fs_usrbio.h"
#include "mounts.h"

namespace kvfs::compat {

Files& files() {
  static auto* const f = new Files;
  return *f;
}

int open_file(const std::shared_ptr<Connection>& c, int fd, std::shared_ptr<OpenFile>* out) {
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0) return -EBADF;
  const int handle = kvfs_file_register(c->client(), fd);
  if (handle < 0) return handle;
  *out = std::make_shared<OpenFile>(c, handle);
  (*out)->can_read = (flags & O_ACCMODE) != O_WRONLY;
  (*out)->can_write = (flags & O_ACCMODE) != O_RDONLY;
  return 0;
}

int Files::add(int fd) {
  Entry e;
  e.generation = generation();
  if (fd < 0 || device_of(fd, "", &e.dev, &e.ino) != 0) return EBADF;
  {
    std::lock_guard<std::mutex> g(mu_);
    const auto it = entries_.find(fd);
    if (it != entries_.end() && it->second.file->connection()->alive()) return EINVAL;
    if (it != entries_.end()) entries_.erase(it);  // its daemon is gone, or it is the parent's
  }
  std::shared_ptr<Connection> c;
  int err = registry().connect_fd(fd, &c);
  if (err == 0) err = open_file(c, fd, &e.file);
  if (err == -EXDEV || err == -EINVAL) return EBADF;
  if (err != 0) return -err;
  std::lock_guard<std::mutex> g(mu_);
  return entries_.try_emplace(fd, std::move(e)).second ? 0 : EINVAL;
}

void Files::remove(int fd) {
  std::shared_ptr<OpenFile> last;  // goes without the lock
  std::lock_guard<std::mutex> g(mu_);
  const auto it = entries_.find(fd);
  if (it == entries_.end()) return;
  last = std::move(it->second.file);
  last->retire();
  entries_.erase(it);
}

int Files::find(int fd, const std::shared_ptr<Connection>& c, std::shared_ptr<OpenFile>* out) {
  std::lock_guard<std::mutex> g(mu_);
  const auto it = entries_.find(fd);
  if (it == entries_.end()) return -EBADF;
  Entry& e = it->second;
  if (e.generation != generation()) {
    // Registered before a fork: if the descriptor still is that file, then here as well.
    uint64_t dev = 0, ino = 0;
    if (device_of(fd, "", &dev, &ino) != 0 || dev != e.dev || ino != e.ino) return -EBADF;
    std::shared_ptr<OpenFile> again;
    const int err = open_file(c, fd, &again);
    if (err != 0) return err == -EREMOTEIO ? err : -EBADF;
    e.file = std::move(again);
    e.generation = generation();
  }
  if (e.file->connection() != c.get()) return -EBADF;
  *out = e.file;
  return 0;
}

}  // namespace kvfs::compat

using namespace kvfs::compat;  // NOLINT: the C functions below

bool hf3fs_is_hf3fs(int fd) {
  uint64_t dev = 0;
  if (fd < 0 || device_of(fd, "", &dev) != 0) return false;
  Mount m;
  return registry().connected(dev) || mount_of_dev(dev, &m);
}

int hf3fs_extract_mount_point(char* hf3fs_mount_point, int size, const char* path) {
  std::string full;
  Mount m;
  if (path == nullptr || resolve(path, &full) != 0 || !mount_of_path(full, &m)) return -1;
  const int need = int(m.point.size()) + 1;
  if (hf3fs_mount_point != nullptr && need <= size) memcpy(hf3fs_mount_point, m.point.c_str(), size_t(need));
  return need;
}

int hf3fs_reg_fd(int fd, uint64_t) {
  const int err = files().add(fd);
  return err != 0 ? err : -fd;
}

void hf3fs_dereg_fd(int fd) { files().remove(fd); }

int hf3fs_hardlink(const char* target, const char* link_name) {
  if (target == nullptr || link_name == nullptr) return EINVAL;
  std::string full;
  Mount m;
  const int err = resolve(target, &full);
  if (err != 0) return -err;
  if (!mount_of_path(full, &m)) return EXDEV;
  return linkat(AT_FDCWD, full.c_str(), AT_FDCWD, link_name, 0) == 0 ? 0 : errno;
}

int hf3fs_punchhole(int fd, int n, const size_t* start, const size_t* end, size_t flags) {
  if (n < 0 || flags != 0 || (n > 0 && (start == nullptr || end == nullptr))) return EINVAL;
  for (int i = 0; i < n; ++i) {
    if (start[i] > end[i] || end[i] > size_t{INT64_MAX}) return EINVAL;
  }
  std::shared_ptr<Connection> c;
  std::shared_ptr<OpenFile> file;
  int err = registry().connect_fd(fd, &c);
  if (err == 0) err = open_file(c, fd, &file);
  if (err == -EXDEV) err = -EBADF;
  kvfs_ring* ring = nullptr;
  if (err == 0) err = c->take_ring(KVFS_RING_MIN_ENTRIES, &ring);
  if (err != 0) return -err;
  for (int i = 0; i < n && err == 0; ++i) {
    if (start[i] == end[i]) continue;
    kvfs_sqe* s = kvfs_prep(ring);
    s->opcode = KVFS_OP_PUNCH;
    s->handle = file->handle();
    s->off = start[i];
    s->iov_off = end[i] - start[i];
    kvfs_submit(ring);
    kvfs_cqe q{};
    err = kvfs_wait(ring, &q, 1, 1, KVFS_NO_TIMEOUT);
    if (err >= 0) err = int(q.result);
  }
  c->give_ring(ring, kvfs_inflight(ring) == 0);
  return -err;
}
