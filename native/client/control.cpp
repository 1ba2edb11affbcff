// control.cpp owns libkvfs's control calls: connect, rings, iovs, namespaces, files.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>

#include "../ring/unix_address.h"
#include "client.h"

namespace kvfs {

namespace {
constexpr int kReplySeconds = 30;  // a namespace question goes through the daemon's Python part
// Calls on a socket with a time limit end with EINTR, SA_RESTART or not: by a program's timers, and by the clean-up of an
// io_uring that this thread made. They go on, but not past the limit.
constexpr uint64_t kReplyNs = uint64_t{kReplySeconds} * 1000000000u;

std::atomic<pid_t> g_pid{0};

pid_t my_pid() {
  static const int once = [] {
    pthread_atfork(nullptr, nullptr, [] { g_pid.store(getpid(), std::memory_order_relaxed); });
    g_pid.store(getpid(), std::memory_order_relaxed);
    return 0;
  }();
  (void)once;
  return g_pid.load(std::memory_order_relaxed);
}

int connect_to(const char* path) {
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return -errno;
  timeval tv{kReplySeconds, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
  const UnixAddress address(path);
  const uint64_t deadline = now_ns() + kReplyNs;
  int err;
  do {
    err = address.connect_to(fd);
  } while (err == EINTR && now_ns() < deadline);
  if (err == 0) return fd;
  close(fd);
  return err == EINTR ? -ETIMEDOUT : -err;
}

int recv_reply(int sock, uint16_t type, CtlReply* r, int fds[2]) {
  fds[0] = fds[1] = -1;
  iovec iov{r, sizeof *r};
  alignas(cmsghdr) char ctl[CMSG_SPACE(2 * sizeof(int))];
  msghdr m{};
  m.msg_iov = &iov;
  m.msg_iovlen = 1;
  m.msg_control = ctl;
  m.msg_controllen = sizeof ctl;
  const uint64_t deadline = now_ns() + kReplyNs;
  ssize_t n;
  do {
    n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);
  } while (n < 0 && errno == EINTR && now_ns() < deadline);
  if (n < 0) return errno == EAGAIN || errno == EINTR ? -ETIMEDOUT : -EREMOTEIO;
  for (cmsghdr* h = CMSG_FIRSTHDR(&m); h != nullptr; h = CMSG_NXTHDR(&m, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    size_t k = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(h), std::min<size_t>(k, 2) * sizeof(int));
  }
  if (n == 0) return -EREMOTEIO;  // the daemon ended or refused us
  if (n != ssize_t(sizeof *r) || r->magic != kCtlMagic || r->version != kCtlVersion || r->type != type) return -EPROTO;
  return 0;
}

void close_fds(int fds[2]) {
  for (int i = 0; i < 2; ++i) {
    if (fds[i] >= 0) close(fds[i]);
    fds[i] = -1;
  }
}
}  // namespace

void init_request(CtlRequest* q, Ctl type) {
  memset(q, 0, sizeof *q);
  q->magic = kCtlMagic;
  q->version = kCtlVersion;
  q->type = uint16_t(type);
}

uint64_t now_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return uint64_t(ts.tv_sec) * 1000000000u + uint64_t(ts.tv_nsec);
}

bool forked(const kvfs_client* c) { return c->pid != my_pid(); }

bool peer_gone(const kvfs_client* c) {
  pollfd p{c->sock, POLLRDHUP, 0};
  return poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

// The caller holds c->mu.
int control_call(kvfs_client* c, CtlRequest* q, CtlReply* r, int fds[2]) {
  fds[0] = fds[1] = -1;
  if (forked(c)) return -ECHILD;
  if (c->dead) return -EREMOTEIO;
  const uint64_t deadline = now_ns() + kReplyNs;
  ssize_t n;
  do {
    n = send(c->sock, q, sizeof *q, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR && now_ns() < deadline);
  int err = n == ssize_t(sizeof *q) ? recv_reply(c->sock, q->type, r, fds) : -EREMOTEIO;
  if (err != 0) {
    c->dead = true;  // request and reply can't be paired any more
    close_fds(fds);
    return err;
  }
  if (r->err != 0) close_fds(fds);
  return r->err;
}

}  // namespace kvfs

using namespace kvfs;  // NOLINT: the C functions below

int kvfs_open(const char* socket_path, kvfs_client** out) {
  *out = nullptr;
  if (socket_path == nullptr) return -EINVAL;
  auto c = std::unique_ptr<kvfs_client>(new (std::nothrow) kvfs_client);
  if (!c) return -ENOMEM;
  c->pid = my_pid();
  c->path = socket_path;
  int fd = connect_to(socket_path);
  if (fd < 0) return fd;
  c->sock = fd;
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, Ctl::Hello);
  int err = control_call(c.get(), &q, &r, fds);
  close_fds(fds);
  if (err != 0) {
    close(fd);
    return err;
  }
  memcpy(c->token, r.token, sizeof c->token);
  *out = c.release();
  return 0;
}

static void unmap_ring(kvfs_ring* r) {
  munmap(r->mem, r->bytes);
  close(r->wake_fd);
  if (r->event_fd >= 0) close(r->event_fd);
  delete r;
}

// Works in a forked child too: only the child's own mappings and descriptors go.
void kvfs_close(kvfs_client* c) {
  if (c == nullptr) return;
  for (kvfs_ring* r : c->rings) unmap_ring(r);
  for (const ClientIov& v : c->iovs) {
    if (v.own) munmap(v.iov.base, v.iov.size);
  }
  close(c->sock);
  if (c->descriptor_sock >= 0) close(c->descriptor_sock);
  delete c;
}

void kvfs_abandon(kvfs_client* c) {
  if (c == nullptr || forked(c)) return;  // the child's shutdown would be the parent's too
  c->dead = true;
  shutdown(c->sock, SHUT_RDWR);  // ends a call under way, which holds `mu`
  {
    std::lock_guard<std::mutex> g(c->descriptor_sock_mu);
    if (c->descriptor_sock >= 0) shutdown(c->descriptor_sock, SHUT_RDWR);
  }
  std::lock_guard<std::mutex> g(c->mu);
  for (const kvfs_ring* r : c->rings) {
    if (r->event_fd >= 0) shutdown(r->event_fd, SHUT_RDWR);
  }
}

int kvfs_alive(const kvfs_client* c) { return !forked(c) && !peer_gone(c) ? 1 : 0; }

int kvfs_iov_alloc(kvfs_client* c, uint64_t bytes, uint32_t flags, kvfs_iov* out) {
  if (c == nullptr || out == nullptr || bytes == 0 || (flags & ~KVFS_IOV_HUGE) != 0) return -EINVAL;
  std::lock_guard<std::mutex> g(c->mu);
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, Ctl::IovCreate);
  q.a = bytes;
  q.flags = flags;
  int err = control_call(c, &q, &r, fds);
  if (err != 0) return err;
  void* mem = fds[0] < 0 ? MAP_FAILED : mmap(nullptr, r.a, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
  close_fds(fds);
  if (mem == MAP_FAILED) {
    CtlReply r2;
    init_request(&q, Ctl::IovFree);
    q.id = r.id;
    control_call(c, &q, &r2, fds);
    return -ENOMEM;
  }
  if (flags & KVFS_IOV_HUGE) madvise(mem, r.a, MADV_HUGEPAGE);
  out->base = mem;
  out->size = r.a;
  out->id = uint16_t(r.id);
  c->iovs.push_back({*out, true});
  return 0;
}

int kvfs_iov_free(kvfs_client* c, kvfs_iov* iov) {
  if (c == nullptr || iov == nullptr) return -EINVAL;
  if (forked(c)) return -ECHILD;
  std::lock_guard<std::mutex> g(c->mu);
  auto it = std::find_if(c->iovs.begin(), c->iovs.end(),
                         [&](const ClientIov& v) { return v.iov.id == iov->id && v.iov.base == iov->base; });
  if (it == c->iovs.end()) return -EBADF;
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, Ctl::IovFree);
  q.id = it->iov.id;
  int err = control_call(c, &q, &r, fds);
  close_fds(fds);
  if (it->own) munmap(it->iov.base, it->iov.size);
  c->iovs.erase(it);
  iov->base = nullptr;
  iov->size = 0;
  return err;
}

static int simple_call(kvfs_client* c, Ctl type, uint32_t id) {
  if (c == nullptr) return -EINVAL;
  if (forked(c)) return -ECHILD;  // before the lock, which another thread may have held at the fork
  std::lock_guard<std::mutex> g(c->mu);
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, type);
  q.id = id;
  int err = control_call(c, &q, &r, fds);
  close_fds(fds);
  return err;
}

int kvfs_ns_open(kvfs_client* c, const char* tenant, const char* name, uint32_t flags) {
  if (c == nullptr || tenant == nullptr || name == nullptr || (flags & ~KVFS_NS_RDONLY) != 0) return -EINVAL;
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, Ctl::NsOpen);
  if (strlen(tenant) >= sizeof q.tenant || strlen(name) >= sizeof q.name) return -ENAMETOOLONG;
  memcpy(q.tenant, tenant, strlen(tenant));
  memcpy(q.name, name, strlen(name));
  q.flags = flags;
  std::lock_guard<std::mutex> g(c->mu);
  int err = control_call(c, &q, &r, fds);
  close_fds(fds);
  return err != 0 ? err : int(r.id);
}

int kvfs_ns_close(kvfs_client* c, int handle) { return simple_call(c, Ctl::NsClose, uint32_t(handle)); }

// One request and its reply on the descriptors' connection, which is made if there is none. -EREMOTEIO: it is lost.
static int descriptor_exchange(kvfs_client* c, CtlRequest* q, int fd, CtlReply* r) {
  if (c->descriptor_sock < 0) {
    const int made = connect_to((c->path + ".fd").c_str());
    if (made < 0) return made;
    std::lock_guard<std::mutex> g(c->descriptor_sock_mu);
    c->descriptor_sock = made;
    if (c->dead) shutdown(made, SHUT_RDWR);
  }
  iovec iov{q, sizeof *q};
  alignas(cmsghdr) char ctl[CMSG_SPACE(sizeof(int))] = {};
  msghdr m{};
  m.msg_iov = &iov;
  m.msg_iovlen = 1;
  m.msg_control = ctl;
  m.msg_controllen = sizeof ctl;
  cmsghdr* h = CMSG_FIRSTHDR(&m);
  h->cmsg_level = SOL_SOCKET;
  h->cmsg_type = SCM_RIGHTS;
  h->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(h), &fd, sizeof fd);
  ssize_t n;
  do {
    n = sendmsg(c->descriptor_sock, &m, MSG_NOSIGNAL);
  } while (n < 0 && errno == EINTR);
  if (n < 0 && errno == EBADF) return -EBADF;  // the caller's descriptor: nothing was sent
  int fds[2] = {-1, -1};
  const int err = n == ssize_t(sizeof *q) ? recv_reply(c->descriptor_sock, q->type, r, fds) : -EREMOTEIO;
  close_fds(fds);
  if (err != 0) {  // request and reply can't be paired any more
    std::lock_guard<std::mutex> g(c->descriptor_sock_mu);
    close(c->descriptor_sock);
    c->descriptor_sock = -1;
  }
  return err;
}

int kvfs::descriptor_call(kvfs_client* c, CtlRequest* q, int fd) {
  if (forked(c)) return -ECHILD;
  CtlReply r;
  memcpy(q->token, c->token, sizeof q->token);
  std::lock_guard<std::mutex> g(c->descriptor_mu);
  if (c->dead) return -EREMOTEIO;
  const bool kept = c->descriptor_sock >= 0;
  int err = descriptor_exchange(c, q, fd, &r);
  // The daemon closes the connection that is oldest when too many come, never with a request of ours half done.
  if (err == -EREMOTEIO && kept) err = descriptor_exchange(c, q, fd, &r);
  if (err == 0) err = r.err;
  return err != 0 ? err : int(r.id);
}

int kvfs_file_register(kvfs_client* c, int fd) {
  if (c == nullptr || fd < 0) return -EINVAL;
  CtlRequest q;
  init_request(&q, Ctl::FileOpen);
  return descriptor_call(c, &q, fd);
}

int kvfs_file_unregister(kvfs_client* c, int handle) { return simple_call(c, Ctl::FileClose, uint32_t(handle)); }

int kvfs_ring_create(kvfs_client* c, uint32_t entries, kvfs_ring** out) {
  *out = nullptr;
  if (c == nullptr || !ring_entries_ok(entries)) return -EINVAL;
  auto ring = std::unique_ptr<kvfs_ring>(new (std::nothrow) kvfs_ring);
  if (!ring) return -ENOMEM;
  std::lock_guard<std::mutex> g(c->mu);
  CtlRequest q;
  CtlReply r;
  int fds[2];
  init_request(&q, Ctl::RingCreate);
  q.a = entries;
  int err = control_call(c, &q, &r, fds);
  if (err != 0) return err;
  void* mem = MAP_FAILED;
  if (fds[0] >= 0 && fds[1] >= 0) {
    mem = mmap(nullptr, r.a, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fds[0], 0);
  }
  err = mem == MAP_FAILED ? -ENOMEM : ring->q.attach(mem, r.a);
  if (err != 0) {
    if (mem != MAP_FAILED) munmap(mem, r.a);
    close_fds(fds);
    CtlReply r2;
    init_request(&q, Ctl::RingDestroy);
    q.id = r.id;
    control_call(c, &q, &r2, fds);
    return err;
  }
  close(fds[0]);
  ring->client = c;
  ring->mem = mem;
  ring->bytes = r.a;
  ring->wake_fd = fds[1];
  ring->id = r.id;
  c->rings.push_back(ring.get());
  *out = ring.release();
  return 0;
}

int kvfs_ring_destroy(kvfs_ring* r) {
  if (r == nullptr) return -EINVAL;
  kvfs_client* c = r->client;
  if (forked(c)) return -ECHILD;
  int err = simple_call(c, Ctl::RingDestroy, r->id);
  std::lock_guard<std::mutex> g(c->mu);
  std::erase(c->rings, r);
  unmap_ring(r);
  return err;
}

int kvfs_ring_event_fd(kvfs_ring* r) {
  if (r == nullptr) return -EINVAL;
  kvfs_client* c = r->client;
  std::lock_guard<std::mutex> g(c->mu);
  if (r->event_fd >= 0) return r->event_fd;
  CtlRequest q;
  CtlReply reply;
  int fds[2];
  init_request(&q, Ctl::RingEvent);
  q.id = r->id;
  int err = control_call(c, &q, &reply, fds);
  if (err != 0) return err;
  if (fds[0] < 0) return -EPROTO;
  r->event_fd = fds[0];
  return r->event_fd;
}
