// files.cpp owns FileServer, see files.h.
#include "files.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>

#include "../ring/unix_address.h"
#include "../store/check.h"

namespace kvfs {

namespace {
constexpr size_t kMaxConns = 64;  // the oldest goes when one more comes

struct Answer {
  std::mutex mu;
  std::condition_variable cv;
  bool ready = false;
  int result = 0;

  void set(int value) {
    std::lock_guard<std::mutex> g(mu);
    result = value;
    ready = true;
    cv.notify_one();
  }
  int get() {
    std::unique_lock<std::mutex> g(mu);
    return cv.wait_for(g, std::chrono::seconds(5), [&] { return ready; }) ? result : -ETIMEDOUT;
  }
};

void answer(int result, CtlReply* r) {
  r->err = result < 0 ? result : 0;
  if (result >= 0) r->id = uint32_t(result);
}
}  // namespace

FileServer::~FileServer() {
  KVFS_CHECK(!thread_.joinable());
  if (listen_fd_ >= 0) close(listen_fd_);
  if (stop_fd_ >= 0) close(stop_fd_);
}

Status FileServer::start() {
  struct stat st;
  if (lstat(path_.c_str(), &st) == 0 && S_ISSOCK(st.st_mode)) unlink(path_.c_str());
  listen_fd_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  stop_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (listen_fd_ < 0 || stop_fd_ < 0) return {errno, "cannot create the file socket"};
  if (const int err = UnixAddress(path_.c_str()).listen_on(listen_fd_, 64); err != 0)
    return {err, "cannot listen on " + path_ + ": " + strerror(err)};
  chmod(path_.c_str(), 0666);  // the uid and the token are checked
  thread_ = std::thread([this] { run(); });
  return {};
}

void FileServer::stop() {
  if (!thread_.joinable()) return;
  uint64_t one = 1;
  ssize_t n = write(stop_fd_, &one, sizeof one);
  (void)n;
  thread_.join();
  unlink(path_.c_str());
}

void FileServer::run() {
  // Everything else that was open in the process stays out of this table: keep ours and the control thread's wake fd.
#ifdef __SANITIZE_THREAD__
  const bool own = false;  // ThreadSanitizer takes equal numbers of two tables for one descriptor
#else
  const bool own = unshare(CLONE_FILES) == 0;
#endif
  if (own) {
    int keep[3] = {listen_fd_, stop_fd_, control_->post_fd()};
    std::sort(keep, keep + 3);
    unsigned from = 3;
    for (int k : keep) {
      if (unsigned(k) > from) close_range(from, unsigned(k) - 1, 0);
      from = unsigned(k) + 1;
    }
    close_range(from, ~0u, 0);
  }
  std::vector<int> conns;
  for (;;) {
    std::vector<pollfd> p = {{listen_fd_, POLLIN, 0}, {stop_fd_, POLLIN, 0}};
    for (int c : conns) p.push_back({c, POLLIN, 0});
    if (poll(p.data(), p.size(), -1) < 0) continue;
    if (p[1].revents != 0) break;
    for (size_t i = 2; i < p.size(); ++i) {
      if (p[i].revents != 0 && take(p[i].fd) != 0) {
        close(p[i].fd);
        std::erase(conns, p[i].fd);
      }
    }
    if (p[0].revents != 0) {
      int c = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
      ucred cred{};
      socklen_t len = sizeof cred;
      if (c >= 0 && (getsockopt(c, SOL_SOCKET, SO_PEERCRED, &cred, &len) != 0 || !control_->uid_ok(cred.uid))) {
        close(c);
      } else if (c >= 0) {
        if (conns.size() == kMaxConns) {
          close(conns.front());
          conns.erase(conns.begin());
        }
        conns.push_back(c);
      }
    }
  }
  for (int c : conns) close(c);
  if (own) close_range(3, ~0u, 0);  // the other table has its own copies
}

int FileServer::take(int conn) {
  char buf[sizeof(CtlRequest) + 1];
  iovec iov{buf, sizeof buf};
  alignas(cmsghdr) char ctl[CMSG_SPACE(sizeof(int))];
  msghdr m{};
  m.msg_iov = &iov;
  m.msg_iovlen = 1;
  m.msg_control = ctl;
  m.msg_controllen = sizeof ctl;
  ssize_t n = recvmsg(conn, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -errno;
  int fds[2] = {-1, -1};  // CMSG_SPACE rounds up to 8 bytes: the kernel may fit two descriptors in
  for (cmsghdr* h = CMSG_FIRSTHDR(&m); h != nullptr; h = CMSG_NXTHDR(&m, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    size_t k = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(h), std::min<size_t>(k, 2) * sizeof(int));
  }
  if (fds[1] >= 0) close(fds[1]);
  int fd = fds[0];
  CtlRequest q{};
  int err = n == 0 ? -EPIPE : ctl_parse(buf, size_t(n), &q);
  const bool ours = Ctl(q.type) == Ctl::FileOpen || Ctl(q.type) == Ctl::IovImport;
  if (err != 0 || !ours || fds[1] >= 0) {
    if (fd >= 0) close(fd);
    return err != 0 ? err : -EPROTO;
  }
  if (Ctl(q.type) == Ctl::IovImport) return import_memory(conn, q, fd);
  CtlReply r{};
  r.magic = kCtlMagic;
  r.version = kCtlVersion;
  r.type = q.type;
  r.err = -EBADF;
  if (fd >= 0) {
    struct statx stx;
    int flags = fcntl(fd, F_GETFL);
    // DONT_SYNC: answered from the kernel's cache, so that no request goes to our own mount.
    if (flags < 0 || (flags & O_PATH) != 0) {
      r.err = -EBADF;  // an O_PATH descriptor proves no right to the data
    } else if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_INO | STATX_TYPE, &stx) != 0) {
      r.err = -errno;
    } else if (mount_dev_.load(std::memory_order_relaxed) == 0 ||
               makedev(stx.stx_dev_major, stx.stx_dev_minor) != mount_dev_.load(std::memory_order_relaxed)) {
      r.err = -EXDEV;
    } else if (!S_ISREG(stx.stx_mode)) {
      r.err = -EINVAL;
    } else {
      int acc = flags & O_ACCMODE;
      auto a = std::make_shared<Answer>();
      control_->bind_file(q.token, stx.stx_ino, acc != O_WRONLY, acc != O_RDONLY, [a](int result) { a->set(result); });
      answer(a->get(), &r);
    }
  }
  // Answered before the close, which may wait for our own mount.
  bool sent = send(conn, &r, sizeof r, MSG_NOSIGNAL | MSG_DONTWAIT) == ssize_t(sizeof r);
  if (fd >= 0) close(fd);
  return sent ? 0 : -EPIPE;
}

// Maps what the client shares. Everything asked of the descriptor is answered by the kernel, never by another process.
int FileServer::import_memory(int conn, const CtlRequest& q, int fd) {
  CtlReply r{};
  r.magic = kCtlMagic;
  r.version = kCtlVersion;
  r.type = q.type;
  int flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
  struct stat st;
  struct statfs fs;
  if (flags < 0 || (flags & O_PATH) != 0) {
    r.err = -EBADF;
  } else if (fcntl(fd, F_GET_SEALS) < 0 || fstatfs(fd, &fs) != 0 || fs.f_type != TMPFS_MAGIC) {
    r.err = -EOPNOTSUPP;  // only memory files know seals; on anything else the calls after this one might wait
  } else if ((flags & O_ACCMODE) != O_RDWR) {
    r.err = -EACCES;
  } else if (q.a > control_->session_bytes()) {
    r.err = -EDQUOT;
  } else if (fstat(fd, &st) != 0 || q.b > uint64_t(st.st_size) ||
             q.a > ((uint64_t(st.st_size) + 4095) & ~uint64_t(4095)) - q.b) {
    r.err = -EINVAL;
  } else {
    void* mem = mmap(nullptr, q.a, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(q.b));
    if (mem == MAP_FAILED) {
      r.err = -errno;
    } else {
      auto a = std::make_shared<Answer>();
      control_->bind_iov(q.token, mem, q.a, [a](int result) { a->set(result); });
      answer(a->get(), &r);
    }
  }
  if (fd >= 0) close(fd);
  return send(conn, &r, sizeof r, MSG_NOSIGNAL | MSG_DONTWAIT) == ssize_t(sizeof r) ? 0 : -EPIPE;
}

}  // namespace kvfs
