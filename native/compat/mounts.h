// mounts.h owns the question which kvfs mount something lies on: read from the kernel's mount table, so that a mount that
// is dead or busy is never asked.
#pragma once

#include <cstdint>
#include <string>

namespace kvfs::compat {

struct Mount {
  std::string point;
  uint64_t dev = 0;
};

// The kvfs mount that holds `path`, an absolute path without links; false: another file system does.
bool mount_of_path(const std::string& path, Mount* out);
// The kvfs mount with this device number.
bool mount_of_dev(uint64_t dev, Mount* out);
// An absolute path without links; its last name need not exist. 0 or -errno.
int resolve(const char* path, std::string* out);
// The device number behind a path or (path "") a descriptor, without asking the file system. 0 or -errno.
int device_of(int dirfd, const char* path, uint64_t* dev, uint64_t* ino = nullptr);
// The daemon's socket, as the mount tells it. 0 or -errno: -ENOENT if this is no root of a kvfs mount.
int socket_of(const char* mount_point, std::string* out);

}  // namespace kvfs::compat
