// mounts.cpp owns the reading of /proc/self/mountinfo and of a mount's `.kvfs/info`. See mounts.h.
#include "mounts.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kvfs::compat {

namespace {
constexpr char kType[] = "fuse.kvfs", kInfo[] = "/.kvfs/info";
constexpr size_t kInfoMax = 65536;

// Mount tables write blanks and backslashes in octal.
std::string plain(const char* s) {
  std::string out;
  for (; *s != 0; ++s) {
    auto digit = [&](int i) { return s[i] >= '0' && s[i] <= '7'; };
    if (*s == '\\' && digit(1) && digit(2) && digit(3)) {
      out += char((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
      s += 3;
    } else {
      out += *s;
    }
  }
  return out;
}

// Calls f(mount, whether it is kvfs) for each line of the table.
template <typename F>
void each_mount(F f) {
  FILE* table = fopen("/proc/self/mountinfo", "re");
  if (table == nullptr) return;
  char* line = nullptr;
  size_t room = 0;
  while (getline(&line, &room, table) > 0) {
    unsigned major, minor;
    int point_at = 0, point_end = 0;
    if (sscanf(line, "%*u %*u %u:%u %*s %n%*s%n", &major, &minor, &point_at, &point_end) != 2 || point_end == 0)
      continue;
    const char* type = strstr(line + point_end, " - ");
    if (type == nullptr) continue;
    type += 3;
    line[point_end] = 0;
    const bool ours = strncmp(type, kType, sizeof kType - 1) == 0 && type[sizeof kType - 1] == ' ';
    f(Mount{plain(line + point_at), makedev(major, minor)}, ours);
  }
  free(line);
  fclose(table);
}

bool holds(const std::string& point, const std::string& path) {
  if (point == "/") return true;
  return path.compare(0, point.size(), point) == 0 && (path.size() == point.size() || path[point.size()] == '/');
}

// The string that follows "name": in a JSON object of strings and numbers. Empty: none, or one that no path is written as.
std::string json_string(const std::string& text, const char* name) {
  std::string out;
  size_t at = text.find(std::string("\"") + name + "\"");
  if (at == std::string::npos) return out;
  at = text.find_first_not_of(" \t\r\n", at + strlen(name) + 2);
  if (at == std::string::npos || text[at] != ':') return out;
  at = text.find_first_not_of(" \t\r\n", at + 1);
  if (at == std::string::npos || text[at] != '"') return out;
  for (++at; at < text.size() && text[at] != '"'; ++at) {
    if (text[at] == '\\') {
      ++at;
      if (at >= text.size() || strchr("\"\\/", text[at]) == nullptr) return "";
    }
    out += text[at];
  }
  return at < text.size() ? out : "";
}
}  // namespace

bool mount_of_path(const std::string& path, Mount* out) {
  bool found = false, ours = false;
  each_mount([&](Mount m, bool is_ours) {
    // Of two mounts on one path the later one is seen.
    if (!holds(m.point, path) || (found && m.point.size() < out->point.size())) return;
    found = true;
    ours = is_ours;
    *out = std::move(m);
  });
  return ours;
}

bool mount_of_dev(uint64_t dev, Mount* out) {
  bool found = false;
  each_mount([&](Mount m, bool is_ours) {
    if (!is_ours || m.dev != dev) return;
    found = true;
    *out = std::move(m);
  });
  return found;
}

int resolve(const char* path, std::string* out) {
  char buf[PATH_MAX];
  if (realpath(path, buf) != nullptr) {
    *out = buf;
    return 0;
  }
  if (errno != ENOENT) return -errno;
  const std::string text = path;
  const size_t slash = text.rfind('/');
  const std::string above = slash == std::string::npos ? "." : slash == 0 ? "/" : text.substr(0, slash);
  if (realpath(above.c_str(), buf) == nullptr) return -errno;
  *out = buf;
  if (*out != "/") *out += '/';
  *out += slash == std::string::npos ? text : text.substr(slash + 1);
  return 0;
}

int device_of(int dirfd, const char* path, uint64_t* dev, uint64_t* ino) {
  struct statx st;
  const int flags = AT_STATX_DONT_SYNC | (*path == 0 ? AT_EMPTY_PATH : 0);
  if (statx(dirfd, path, flags, STATX_INO, &st) != 0) return -errno;
  *dev = makedev(st.stx_dev_major, st.stx_dev_minor);
  if (ino != nullptr) *ino = st.stx_ino;
  return 0;
}

int socket_of(const char* mount_point, std::string* out) {
  const int fd = open((std::string(mount_point) + kInfo).c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOTDIR ? -ENOENT : -errno;
  std::string text(kInfoMax, 0);
  const ssize_t n = read(fd, text.data(), text.size());
  const int err = n < 0 ? -errno : 0;
  close(fd);
  if (err != 0) return err;
  text.resize(size_t(n));
  *out = json_string(text, "socket");
  return out->empty() ? -EPROTO : 0;
}

}  // namespace kvfs::compat
