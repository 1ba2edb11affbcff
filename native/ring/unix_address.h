// A Unix socket's address for a path of any length: sun_path holds 107 bytes, data directories are often deeper. A longer
// path is named through an open descriptor of its directory (/proc/self/fd/N/name), which is the same file.
#pragma once

#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <string>

namespace kvfs {

class UnixAddress {
 public:
  explicit UnixAddress(const char* path) {
    addr_.sun_family = AF_UNIX;
    if (strlen(path) < sizeof addr_.sun_path) {
      memcpy(addr_.sun_path, path, strlen(path));
      return;
    }
    const char* slash = strrchr(path, '/');
    dir_ = slash != nullptr ? open(std::string(path, slash).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC) : -1;
    if (dir_ < 0) {
      error_ = slash != nullptr ? errno : ENAMETOOLONG;
      return;
    }
    const int n = snprintf(addr_.sun_path, sizeof addr_.sun_path, "/proc/self/fd/%d%s", dir_, slash);
    if (n < 0 || size_t(n) >= sizeof addr_.sun_path) error_ = ENAMETOOLONG;
  }
  ~UnixAddress() {
    if (dir_ >= 0) close(dir_);
  }
  UnixAddress(const UnixAddress&) = delete;
  UnixAddress& operator=(const UnixAddress&) = delete;

  int bind_to(int fd) const { return call(bind, fd); }  // 0 or errno
  int listen_on(int fd, int backlog) const {            // 0 or errno
    const int err = bind_to(fd);
    return err != 0 ? err : listen(fd, backlog) == 0 ? 0 : errno;
  }
  int connect_to(int fd) const { return call(connect, fd); }  // 0 or errno

 private:
  int call(int (*f)(int, const sockaddr*, socklen_t), int fd) const {
    if (error_ != 0) return error_;
    return f(fd, reinterpret_cast<const sockaddr*>(&addr_), sizeof addr_) == 0 ? 0 : errno;
  }

  sockaddr_un addr_{};
  int dir_ = -1;
  int error_ = 0;
};

}  // namespace kvfs
