// control.cpp owns sessions' life: accept, requests, death. See control.h.
#include "control.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>

#include "../ring/unix_address.h"
#include "../store/check.h"
#include "bus_guard.h"

namespace kvfs {

namespace {
constexpr int kMaxAccepts = 16;  // between looks at the clients there are
constexpr uint64_t kListenTag = 0, kPostTag = ~uint64_t(0);
}  // namespace

ControlServer::ControlServer(const ControlConfig& cfg, Reactor* reactor, InodeTable* inodes, Namespaces* ns,
                             Upcalls* upcalls)
    : cfg_(cfg), reactor_(reactor), inodes_(inodes), ns_(ns), upcalls_(upcalls) {
  if (cfg_.total_bytes == 0) cfg_.total_bytes = uint64_t(sysconf(_SC_PHYS_PAGES)) * uint64_t(sysconf(_SC_PAGESIZE)) / 2;
}

ControlServer::~ControlServer() {
  KVFS_CHECK(!thread_.joinable());
  for (int fd : {listen_fd_, epoll_fd_, post_fd_}) {
    if (fd >= 0) close(fd);
  }
}

Status ControlServer::start() {
  if (cfg_.path.empty()) return {EINVAL, "the control socket has no path"};
  struct stat st;
  if (lstat(cfg_.path.c_str(), &st) == 0) {
    if (!S_ISSOCK(st.st_mode)) return {EEXIST, cfg_.path + " exists and is no socket"};
    unlink(cfg_.path.c_str());  // left by a daemon that died; the data lock says that none runs
  }
  listen_fd_ = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  epoll_fd_ = epoll_create1(EPOLL_CLOEXEC);
  post_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (listen_fd_ < 0 || epoll_fd_ < 0 || post_fd_ < 0) return {errno, "cannot create the control socket"};
  if (const int err = UnixAddress(cfg_.path.c_str()).listen_on(listen_fd_, 64); err != 0)
    return {err, "cannot listen on " + cfg_.path + ": " + strerror(err)};
  chmod(cfg_.path.c_str(), cfg_.allowed_uid == KVFS_ANY_UID ? 0600 : 0666);  // who may connect is checked by uid
  epoll_event ev{};
  ev.events = EPOLLIN;
  ev.data.u64 = kListenTag;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, listen_fd_, &ev);
  ev.data.u64 = kPostTag;
  epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, post_fd_, &ev);
  populator_.start();
  thread_ = std::thread([this] { run(); });
  return {};
}

void ControlServer::stop() {
  if (!thread_.joinable()) return;
  post([this] {
    stopping_ = true;
    epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, listen_fd_, nullptr);
    unlink(cfg_.path.c_str());
    for (auto& [id, c] : clients_) {
      if (!c->closing) drop(c.get());
    }
  });
  thread_.join();
  populator_.stop();
}

void ControlServer::post(std::function<void()> fn) {
  {
    std::lock_guard<std::mutex> g(post_mu_);
    posted_.push_back(std::move(fn));
  }
  uint64_t one = 1;
  ssize_t n = write(post_fd_, &one, sizeof one);
  (void)n;
}

void ControlServer::run_posted() {
  uint64_t v;
  ssize_t n = read(post_fd_, &v, sizeof v);
  (void)n;
  std::vector<std::function<void()>> fns;
  {
    std::lock_guard<std::mutex> g(post_mu_);
    fns.swap(posted_);
  }
  for (auto& f : fns) f();
}

void ControlServer::run() {
  epoll_event ev[32];
  while (!stopping_ || !clients_.empty()) {
    int n = epoll_wait(epoll_fd_, ev, 32, -1);
    for (int i = 0; i < n; ++i) {
      if (ev[i].data.u64 == kPostTag) {
        run_posted();
      } else if (ev[i].data.u64 == kListenTag) {
        if (!stopping_) accept_some();
      } else if (Client* c = find(ev[i].data.u64)) {
        if (!c->closing) on_client(c, ev[i].events);
      }
    }
  }
}

ControlServer::Client* ControlServer::find(uint64_t id) {
  auto it = clients_.find(id);
  return it == clients_.end() ? nullptr : it->second.get();
}

ControlServer::Client* ControlServer::find_token(const uint8_t token[16]) {
  for (auto& [id, c] : clients_) {
    if (!c->closing && memcmp(c->token, token, sizeof c->token) == 0) return c.get();
  }
  return nullptr;
}

bool ControlServer::uid_ok(uint32_t uid) const {
  return uid == 0 || uid == geteuid() || (cfg_.allowed_uid != KVFS_ANY_UID && uid == cfg_.allowed_uid);
}

bool ControlServer::room_for(pid_t pid) const {
  const size_t own =
      size_t(std::count_if(clients_.begin(), clients_.end(), [&](auto& c) { return c.second->pid == pid; }));
  return clients_.size() < cfg_.max_sessions && own < std::max<size_t>(1, cfg_.max_sessions / 2);
}

void ControlServer::accept_some() {
  for (int i = 0; i < kMaxAccepts; ++i) {
    int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    ucred cred{};
    socklen_t len = sizeof cred;
    auto c = std::make_unique<Client>();
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) != 0 || !uid_ok(cred.uid) || !room_for(cred.pid) ||
        getrandom(c->token, sizeof c->token, 0) != ssize_t(sizeof c->token)) {
      close(fd);
      continue;
    }
    c->id = ++last_id_;
    c->fd = fd;
    c->uid = cred.uid;
    c->pid = cred.pid;
    c->session = new Session;
    epoll_event ev{};
    ev.events = EPOLLIN | EPOLLRDHUP;
    ev.data.u64 = c->id;
    epoll_ctl(epoll_fd_, EPOLL_CTL_ADD, fd, &ev);
    clients_[c->id] = std::move(c);
    ++stats_.sessions;
  }
}

void ControlServer::on_client(Client* c, uint32_t events) {
  if ((events & EPOLLIN) != 0 && !c->busy) {
    char buf[sizeof(CtlRequest) + 1];  // one more byte: a message that is too long shows
    // Without room for control data the kernel drops descriptors that a client sends along.
    ssize_t n = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
    if (n > 0) {
      CtlRequest q{};
      int err = ctl_parse(buf, size_t(n), &q);
      if (err == -EPROTO) {
        drop(c);
      } else if (err != 0) {
        reply(c, q, err);
      } else {
        handle(c, q);
      }
      return;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    drop(c);
    return;
  }
  // A request on top of an unanswered one, or the peer's end.
  drop(c);
}

void ControlServer::reply(Client* c, const CtlRequest& q, int err, uint32_t id, uint64_t a, const int* fds, int nfds) {
  c->busy = false;
  CtlReply r{};
  r.magic = kCtlMagic;
  r.version = kCtlVersion;
  r.type = q.type;
  r.err = err;
  r.id = id;
  r.a = a;
  if (Ctl(q.type) == Ctl::Hello && err == 0) memcpy(r.token, c->token, sizeof r.token);
  iovec iov{&r, sizeof r};
  msghdr m{};
  m.msg_iov = &iov;
  m.msg_iovlen = 1;
  alignas(cmsghdr) char ctl[CMSG_SPACE(2 * sizeof(int))] = {};
  if (nfds > 0) {
    m.msg_control = ctl;
    m.msg_controllen = CMSG_SPACE(size_t(nfds) * sizeof(int));
    cmsghdr* h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(size_t(nfds) * sizeof(int));
    memcpy(CMSG_DATA(h), fds, size_t(nfds) * sizeof(int));
  }
  if (sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT) != ssize_t(sizeof r)) drop(c);
}

void ControlServer::handle(Client* c, const CtlRequest& q) {
  c->busy = true;
  Session* s = c->session;
  switch (Ctl(q.type)) {
    case Ctl::Hello:
      reply(c, q, 0);
      return;
    case Ctl::RingCreate:
      ring_create(c, q);
      return;
    case Ctl::RingDestroy:
      ring_destroy(c, q);
      return;
    case Ctl::IovCreate:
      iov_create(c, q);
      return;
    case Ctl::IovFree:
      iov_free(c, q);
      return;
    case Ctl::NsOpen:
      ns_open(c, q, true);
      return;
    case Ctl::NsClose:
      if (q.id >= c->ns_used.size() || !c->ns_used[q.id]) return reply(c, q, -EBADF);
      c->ns_used[q.id] = false;
      reactor_->post([s, id = q.id] { s->ns[id] = NsHandle{}; });
      return reply(c, q, 0);
    case Ctl::FileClose:
      if (q.id >= c->files_used.size() || !c->files_used[q.id]) return reply(c, q, -EBADF);
      c->files_used[q.id] = false;
      reactor_->post([this, s, id = q.id] {
        reactor_->close_file(s->files[id].inode);
        s->files[id] = FileHandle{};
      });
      return reply(c, q, 0);
    case Ctl::RingEvent:
      return ring_event(c, q);
    case Ctl::FileOpen:
    case Ctl::IovImport:
      return reply(c, q, -EOPNOTSUPP);  // have their own socket
  }
  reply(c, q, -EOPNOTSUPP);
}

void ControlServer::ring_create(Client* c, const CtlRequest& q) {
  uint32_t id = 0;
  while (id < kMaxRings && c->rings[id] != nullptr) ++id;
  const uint64_t bytes = ring_bytes(uint32_t(q.a));
  if (id == kMaxRings || bytes > kMaxRingBytes - c->ring_bytes) return reply(c, q, -EMFILE);
  auto r = std::make_unique<Ring>();
  r->bytes = bytes;
  int fds[2] = {-1, -1};
  int err = make_shared_memory("kvfs-ring", r->bytes, false, &fds[0], &r->mem);
  if (err != 0) return reply(c, q, err);
  err = populate(r->mem, r->bytes);
  if (err == 0 && (fds[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0) err = -errno;
  if (err != 0) {
    munmap(r->mem, r->bytes);
    close(fds[0]);
    return reply(c, q, err);
  }
  ring_format(r->mem, uint32_t(q.a));
  r->q.attach(r->mem, uint32_t(q.a));
  r->wake_fd = fds[1];
  r->session = c->session;
  Ring* raw = r.release();
  c->rings[id] = raw;
  c->ring_bytes += bytes;
  ++stats_.rings;
  reactor_->post([re = reactor_, raw, id] {
    raw->session->rings[id] = raw;
    re->add_ring(raw);
  });
  reply(c, q, 0, id, raw->bytes, fds, 2);
  close(fds[0]);
}

void ControlServer::ring_destroy(Client* c, const CtlRequest& q) {
  if (q.id >= kMaxRings || c->rings[q.id] == nullptr) return reply(c, q, -EBADF);
  Ring* r = c->rings[q.id];
  c->rings[q.id] = nullptr;  // busy: no other request comes before the answer
  reactor_->post([this, r, q, cid = c->id] {
    r->session->rings[q.id] = nullptr;
    reactor_->close_ring(r, [this, r, q, cid] {
      post([this, r, q, cid] {
        const uint64_t bytes = r->bytes;
        free_ring(r);
        Client* cl = find(cid);
        if (cl == nullptr) return;
        cl->ring_bytes -= bytes;
        if (!cl->closing) reply(cl, q, 0);
      });
    });
  });
}

// A socket and not an eventfd: a client may make the latter block its writers, but never a send with MSG_DONTWAIT.
void ControlServer::ring_event(Client* c, const CtlRequest& q) {
  if (q.id >= kMaxRings || c->rings[q.id] == nullptr) return reply(c, q, -EBADF);
  Ring* r = c->rings[q.id];
  int sv[2];
  if (r->event_fd.load(std::memory_order_relaxed) >= 0) return reply(c, q, -EALREADY);
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, sv) != 0) return reply(c, q, -errno);
  // The client arms the ring after our answer, so the reactor sees the descriptor before it sees the ring armed.
  r->event_fd.store(sv[0], std::memory_order_release);
  reply(c, q, 0, q.id, 0, &sv[1], 1);
  close(sv[1]);
}

void ControlServer::iov_create(Client* c, const CtlRequest& q) {
  const uint64_t bytes = (q.a + 4095) & ~uint64_t(4095);
  if (std::find(c->iovs.begin(), c->iovs.end(), nullptr) == c->iovs.end()) return reply(c, q, -EMFILE);
  if (bytes > cfg_.session_bytes - c->bytes) return reply(c, q, -EDQUOT);
  if (bytes > cfg_.total_bytes - std::min(cfg_.total_bytes, stats_.iov_bytes.load())) return reply(c, q, -ENOMEM);
  int fd = -1;
  void* mem = nullptr;
  int err = make_shared_memory("kvfs-iov", bytes, q.flags & 1, &fd, &mem);
  if (err != 0) return reply(c, q, err);
  c->bytes += bytes;
  stats_.iov_bytes += bytes;
  c->cancelled = std::make_shared<std::atomic<bool>>(false);
  populator_.add(mem, bytes, c->cancelled, [this, q, cid = c->id, fd, mem, bytes](int result) {
    post([=, this] { iov_ready(find(cid), q, result, fd, mem, bytes); });
  });
}

void ControlServer::iov_ready(Client* c, const CtlRequest& q, int err, int fd, void* mem, uint64_t bytes) {
  c->cancelled.reset();
  auto slot = std::find(c->iovs.begin(), c->iovs.end(), nullptr);
  if (err == 0 && slot == c->iovs.end()) err = -EMFILE;  // memory of the client's own took the last one
  if (c->closing || err != 0) {
    munmap(mem, bytes);
    close(fd);
    stats_.iov_bytes -= bytes;
    c->bytes -= bytes;
    if (c->closing) return end_session(c);
    return reply(c, q, err);
  }
  const uint32_t id = uint32_t(slot - c->iovs.begin());
  Iov* v = new Iov;
  v->size = bytes;
  v->base = static_cast<char*>(mem);
  *slot = v;
  ++stats_.iovs;
  reactor_->post([re = reactor_, s = c->session, v, id] {
    re->add_iov(v);
    s->iovs[id] = v;
  });
  reply(c, q, 0, id, bytes, &fd, 1);
  close(fd);
}

void ControlServer::iov_free(Client* c, const CtlRequest& q) {
  if (q.id >= kMaxIovs || c->iovs[q.id] == nullptr) return reply(c, q, -EBADF);
  Iov* v = c->iovs[q.id];
  c->iovs[q.id] = nullptr;
  reactor_->post([this, v, q, s = c->session, cid = c->id] {
    s->iovs[q.id] = nullptr;
    reactor_->close_iov(v, [this, v, q, cid] {
      post([this, v, q, cid] {
        uint64_t bytes = v->size;
        free_iov(v);
        Client* cl = find(cid);
        if (cl == nullptr) return;
        cl->bytes -= bytes;
        if (!cl->closing) reply(cl, q, 0);
      });
    });
  });
}

void ControlServer::ns_open(Client* c, const CtlRequest& q, bool may_ask) {
  NamespaceInfo info;
  if (!ns_->find(q.tenant, q.name, &info)) {
    if (!may_ask) return reply(c, q, -ENOENT);
    int64_t id = upcalls_->ask(c->uid, q.tenant, q.name);
    if (id < 0) return reply(c, q, int(id));
    c->upcall = uint64_t(id);
    c->pending = q;
    return;  // busy until answer()
  }
  if (info.uid != KVFS_ANY_UID && c->uid != info.uid && c->uid != 0 && c->uid != geteuid()) return reply(c, q, -EACCES);
  uint32_t h = 0;
  while (h < c->ns_used.size() && c->ns_used[h]) ++h;
  if (h >= kMaxNs) return reply(c, q, -EMFILE);
  if (h == c->ns_used.size()) c->ns_used.push_back(false);
  c->ns_used[h] = true;
  NsHandle nh;
  nh.ns_id = info.ns_id;
  nh.used = true;
  nh.evictable = info.evictable;
  nh.rdonly = (q.flags & 1) != 0;
  reactor_->post([s = c->session, h, nh] {
    if (s->ns.size() <= h) s->ns.resize(h + 1);
    s->ns[h] = nh;
  });
  reply(c, q, 0, h);
}

void ControlServer::answer(uint64_t upcall, int err) {
  post([this, upcall, err] {
    for (auto& [id, c] : clients_) {
      if (c->closing || c->upcall != upcall) continue;
      c->upcall = 0;
      CtlRequest q = c->pending;
      if (err != 0) {
        reply(c.get(), q, err);
      } else {
        ns_open(c.get(), q, false);
      }
      return;
    }
  });
}

void ControlServer::bind_file(const uint8_t token[16], uint64_t ino, bool can_read, bool can_write,
                              std::function<void(int)> reply_fn) {
  std::array<uint8_t, 16> t;
  memcpy(t.data(), token, 16);
  post([this, t, ino, can_read, can_write, reply_fn = std::move(reply_fn)] {
    Client* c = find_token(t.data());
    if (c == nullptr) return reply_fn(-EACCES);
    uint32_t h = 0;
    while (h < c->files_used.size() && c->files_used[h]) ++h;
    if (h >= kMaxFiles) return reply_fn(-EMFILE);
    InodeRef inode = inodes_->ref(ino);
    if (!inode) return reply_fn(-ESTALE);
    if (h == c->files_used.size()) c->files_used.push_back(false);
    c->files_used[h] = true;
    reactor_->post([s = c->session, h, inode, can_read, can_write] {
      if (s->files.size() <= h) s->files.resize(h + 1);
      s->files[h] = FileHandle{inode, can_read, can_write};
    });
    reply_fn(int(h));
  });
}

void ControlServer::bind_iov(const uint8_t token[16], void* base, uint64_t size, std::function<void(int)> reply_fn) {
  std::array<uint8_t, 16> t;
  memcpy(t.data(), token, 16);
  post([this, t, base, size, reply_fn = std::move(reply_fn)] {
    Client* c = find_token(t.data());
    uint32_t id = 0;
    while (c != nullptr && id < kMaxIovs && c->iovs[id] != nullptr) ++id;
    int err = c == nullptr ? -EACCES : id == kMaxIovs ? -EMFILE : size > cfg_.session_bytes - c->bytes ? -EDQUOT : 0;
    int guard = err == 0 ? bus_guard_add(base, size) : -1;
    if (err == 0 && guard < 0) err = -ENFILE;
    if (err != 0) {
      munmap(base, size);
      return reply_fn(err);
    }
    Iov* v = new Iov;
    v->base = static_cast<char*>(base);
    v->size = size;
    v->guard = guard;
    c->iovs[id] = v;
    c->bytes += size;
    ++stats_.iovs;
    stats_.iov_bytes += size;
    reactor_->post([this, s = c->session, v, id, cid = c->id, reply_fn] {
      if (reactor_->add_iov(v)) {
        s->iovs[id] = v;
        return reply_fn(int(id));
      }
      // Not pinned: the kernel could fail in the middle of a write of ours when the client truncates it.
      reactor_->close_iov(v, [this, v, id, cid, reply_fn] {
        post([this, v, id, cid, reply_fn] {
          if (Client* cl = find(cid)) {
            cl->iovs[id] = nullptr;
            cl->bytes -= v->size;
          }
          free_iov(v);
          reply_fn(-ENOMEM);
        });
      });
    });
  });
}

// The session's end: the client died, misbehaved, or we stop. Its memory goes once the reactor has nothing in flight
// on it.
void ControlServer::drop(Client* c) {
  c->closing = true;
  epoll_ctl(epoll_fd_, EPOLL_CTL_DEL, c->fd, nullptr);
  shutdown(c->fd, SHUT_RDWR);  // the peer sees the end at once
  if (!c->cancelled) return end_session(c);
  *c->cancelled = true;  // iov_ready() goes on
}

void ControlServer::end_session(Client* c) {
  reactor_->post([this, s = c->session, cid = c->id] {
    for (Ring* r : s->rings) {
      if (r == nullptr) continue;
      r->q.give_up(EREMOTEIO);
      syscall(SYS_futex, r->q.futex_word(), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
    reactor_->close_session(s, [this, s, cid] {
      post([this, s, cid] {
        Client* cl = find(cid);
        KVFS_CHECK(cl != nullptr);
        for (Ring* r : s->rings) {
          if (r != nullptr) free_ring(r);
        }
        for (Iov* v : s->iovs) {
          if (v != nullptr) free_iov(v);
        }
        delete s;
        close(cl->fd);
        clients_.erase(cid);
        --stats_.sessions;
      });
    });
  });
}

void ControlServer::free_ring(Ring* r) {
  munmap(r->mem, r->bytes);
  close(r->wake_fd);
  if (r->event_fd >= 0) close(r->event_fd);
  delete r;
  --stats_.rings;
}

void ControlServer::free_iov(Iov* v) {
  if (v->guard >= 0) bus_guard_remove(v->guard);
  munmap(v->base, v->size);
  stats_.iov_bytes -= v->size;
  --stats_.iovs;
  delete v;
}

}  // namespace kvfs
