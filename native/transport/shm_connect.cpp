// shm_connect.cpp: see shm_connect.h.
#include "shm_connect.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <utility>
#include <vector>

#include "../ring/unix_address.h"
#include "../wire/map.h"
#include "tcp_connect.h"

namespace kvfs {

namespace {

constexpr const char* kDirectory = "/run/kvfs";
constexpr int kSocket = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;

struct Descriptor {
  int fd;
  explicit Descriptor(int f) : fd(f) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  int release() { return std::exchange(fd, -1); }
};

// A message with room for one descriptor.
struct WithDescriptor {
  iovec iov;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr msg{};
  WithDescriptor(void* p, size_t n) : iov{p, n} {
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
  }
};

// The setup and its descriptor (-1: without, or not exactly one: CMSG_SPACE is padded, and two fit in). 0; -EAGAIN: not
// there yet; -errno.
int take_setup(int fd, ShmSetup* setup, int* memory) {
  WithDescriptor m(setup, sizeof *setup);
  const ssize_t n = ::recvmsg(fd, &m.msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return errno == EINTR ? -EAGAIN : -errno;
  std::vector<int> fds;
  for (cmsghdr* c = CMSG_FIRSTHDR(&m.msg); c != nullptr; c = CMSG_NXTHDR(&m.msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t had = fds.size(), more = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    fds.resize(had + more);
    std::memcpy(fds.data() + had, CMSG_DATA(c), more * sizeof(int));
  }
  if (fds.size() == 1) *memory = fds[0];
  for (const int f : fds)
    if (f != *memory) ::close(f);
  if (n == 0) return -ECONNRESET;
  const bool whole = n == ssize_t{sizeof *setup} && (m.msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0;
  return whole && *memory >= 0 ? 0 : -EPROTO;
}

}  // namespace

bool parse_shm_url(std::string_view url, std::string* name) {
  constexpr std::string_view kScheme = "shm://";
  if (!url.starts_with(kScheme) || !wire::shm_name_ok(url.substr(kScheme.size()))) return false;
  *name = url.substr(kScheme.size());
  return true;
}

std::string shm_path(std::string_view name) {
  const char* dir = std::getenv("KVFS_SHM_DIR");
  return std::string(dir != nullptr && *dir != 0 ? dir : kDirectory) + "/" + std::string(name);
}

int shm_listen(const std::string& path, int backlog) {
  const size_t slash = path.rfind('/');
  if (slash != std::string::npos && slash != 0 && ::mkdir(path.substr(0, slash).c_str(), 0755) != 0 && errno != EEXIST)
    return -errno;
  Descriptor fd(::socket(AF_UNIX, kSocket, 0));
  if (fd.fd < 0) return -errno;
  const UnixAddress address(path.c_str());
  struct stat st;
  if (::lstat(path.c_str(), &st) == 0) {
    if (!S_ISSOCK(st.st_mode)) return -EEXIST;
    const Descriptor other(::socket(AF_UNIX, kSocket, 0));
    if (other.fd < 0) return -errno;
    if (address.connect_to(other.fd) != ECONNREFUSED) return -EADDRINUSE;
    ::unlink(path.c_str());  // of one that has died
  }
  if (const int err = address.bind_to(fd.fd); err != 0) return -err;
  // Who may come in is decided by the hello: the session's number is the proof.
  if (::chmod(path.c_str(), 0666) != 0 || ::listen(fd.fd, backlog) != 0) {
    const int err = errno;
    ::unlink(path.c_str());
    return -err;
  }
  return fd.release();
}

bool is_unix(int fd) {
  int domain = 0;
  socklen_t n = sizeof domain;
  return ::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &n) == 0 && domain == AF_UNIX;
}

int send_segment(int fd, const ShmSetup& setup, int memory) {
  ShmSetup said = setup;
  WithDescriptor m(&said, sizeof said);
  cmsghdr* c = CMSG_FIRSTHDR(&m.msg);
  c->cmsg_level = SOL_SOCKET;
  c->cmsg_type = SCM_RIGHTS;
  c->cmsg_len = CMSG_LEN(sizeof memory);
  std::memcpy(CMSG_DATA(c), &memory, sizeof memory);
  const ssize_t n = ::sendmsg(fd, &m.msg, MSG_DONTWAIT | MSG_NOSIGNAL);
  return n == ssize_t{sizeof said} ? 0 : n < 0 ? -errno : -EPROTO;
}

int check_segment(int memory, const ShmSetup& setup) {
  if (const int err = check_setup(setup); err != 0) return err;
  const int seals = ::fcntl(memory, F_GET_SEALS);
  struct stat st;
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || ::fstat(memory, &st) != 0) return -EPROTO;
  return uint64_t(st.st_size) == ShmLayout(setup).bytes ? 0 : -EPROTO;
}

int shm_connect(const std::string& path, const wire::Hello& hello, wire::HelloReply* reply,
                std::unique_ptr<ShmLink>* out, uint64_t deadline_ns) {
  Descriptor fd(::socket(AF_UNIX, kSocket, 0));
  if (fd.fd < 0) return -errno;
  if (const int err = UnixAddress(path.c_str()).connect_to(fd.fd); err != 0) return -err;
  if (const int err = client_handshake(fd.fd, hello, nullptr, 0, reply, nullptr, deadline_ns); err != 0) return err;
  ShmSetup setup{};
  Descriptor memory(-1);
  int err = -EAGAIN;
  for (;;) {
    err = take_setup(fd.fd, &setup, &memory.fd);
    const uint64_t now = monotonic_ns();
    if (err != -EAGAIN) break;
    if (now >= deadline_ns) return -ETIMEDOUT;
    pollfd p{fd.fd, POLLIN, 0};
    (void)::poll(&p, 1, int(std::min<uint64_t>((deadline_ns - now) / 1000000 + 1, 1000)));
  }
  if (err == 0) err = check_segment(memory.fd, setup);
  if (err != 0) return err;
  const uint64_t bytes = ShmLayout(setup).bytes;
  void* mem = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
  if (mem == MAP_FAILED) return -errno;
  (void)::madvise(mem, bytes, MADV_HUGEPAGE);
  *out = std::make_unique<ShmLink>(fd.release(), mem, setup);
  return 0;
}

}  // namespace kvfs
