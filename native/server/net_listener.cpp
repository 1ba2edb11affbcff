// net_listener.cpp: see net_listener.h.
#include "net_listener.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "../store/check.h"
#include "../transport/shm_connect.h"
#include "../transport/tcp_server.h"
#include "net_shm.h"
#include "reactor.h"

namespace kvfs {

namespace {

constexpr int kBacklog = 512;
constexpr int kEvents = 64;
constexpr int kAccepts = 16;  // of one listener per turn

// What an event is about: the lowest bits of its data tell. Listeners: fd << 2 | 1; hooks: pointer | 2; peers: pointer.
constexpr uint64_t kWakeTag = 3, kListenerTag = 1, kHookTag = 2, kTagMask = 3;

int watch(int epoll, int how, int fd, uint32_t events, uint64_t data) {
  epoll_event e{};
  e.events = events;
  e.data.u64 = data;
  return epoll_ctl(epoll, how, fd, &e) == 0 ? 0 : -errno;
}

uint64_t of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

}  // namespace

int parse_listen_url(const std::string& url, const char* scheme, sockaddr_storage* out, socklen_t* len) {
  const std::string start = std::string(scheme) + "://";
  if (url.compare(0, start.size(), start) != 0) return -EINVAL;
  const std::string rest = url.substr(start.size());
  const size_t colon = rest.rfind(':');
  if (colon == std::string::npos) return -EINVAL;
  std::string host = rest.substr(0, colon);
  uint16_t port = 0;
  const char* end = rest.data() + rest.size();
  const auto [at, bad] = std::from_chars(rest.data() + colon + 1, end, port);
  if (bad != std::errc{} || at != end) return -EINVAL;
  *out = {};
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    auto* in6 = reinterpret_cast<sockaddr_in6*>(out);
    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(port);
    *len = sizeof *in6;
    return inet_pton(AF_INET6, host.c_str(), &in6->sin6_addr) == 1 ? 0 : -EINVAL;
  }
  auto* in = reinterpret_cast<sockaddr_in*>(out);
  in->sin_family = AF_INET;
  in->sin_port = htons(port);
  *len = sizeof *in;
  return inet_pton(AF_INET, host.c_str(), &in->sin_addr) == 1 ? 0 : -EINVAL;
}

NetListener::NetListener(std::vector<NetTarget> targets, const uint8_t* key, const NetServerOptions& opt)
    : targets_(std::move(targets)), checks_(key != nullptr), opt_(opt) {
  if (checks_) std::memcpy(key_.data(), key, key_.size());
}

NetListener::~NetListener() {
  stop();
  for (const std::string& path : paths_) unlink(path.c_str());
  for (const int fd : listeners_) close(fd);
  if (wake_ >= 0) close(wake_);
  if (epoll_ >= 0) close(epoll_);
}

Status NetListener::start() {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_ < 0 || wake_ < 0) return {errno, "no descriptors for the server's listener"};
  if (const int err = watch(epoll_, EPOLL_CTL_ADD, wake_, EPOLLIN, kWakeTag); err != 0)
    return {-err, "cannot watch the listener's eventfd"};
  thread_ = std::thread([this] { run(); });
  return {};
}

void NetListener::stop() {
  if (!thread_.joinable()) return;
  stop_.store(true);
  const uint64_t one = 1;
  (void)!write(wake_, &one, sizeof one);
  thread_.join();
}

int NetListener::listen_tcp(const std::string& url, std::string* why) {
  sockaddr_storage addr{};
  socklen_t len = 0;
  if (parse_listen_url(url, "tcp", &addr, &len) != 0) {
    *why = url + ": not tcp://ADDRESS:PORT with a numeric address, IPv6 in brackets";
    return -EINVAL;
  }
  std::lock_guard<std::mutex> g(mu_);
  if (listeners_.size() + hooks_.size() >= kMaxListeners) {
    *why = "this server listens in " + std::to_string(kMaxListeners) + " places already";
    return -EMFILE;
  }
  const int fd = tcp_listen(reinterpret_cast<sockaddr*>(&addr), len, kBacklog);
  if (fd < 0) {
    *why = url + ": " + strerror(-fd);
    return fd;
  }
  int rc = getsockname(fd, reinterpret_cast<sockaddr*>(&addr), &len) == 0 ? 0 : -errno;
  if (rc == 0) rc = add_listener(fd);
  if (rc != 0) {
    close(fd);
    *why = url + ": " + strerror(-rc);
    return rc;
  }
  return ntohs(addr.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&addr)->sin6_port
                                          : reinterpret_cast<sockaddr_in*>(&addr)->sin_port);
}

int NetListener::add_listener(int fd) {
  const auto data = uint64_t(fd) << 2 | kListenerTag;
  const int rc = watch(epoll_, EPOLL_CTL_ADD, fd, listening_ ? uint32_t{EPOLLIN} : 0u, data);
  if (rc == 0) listeners_.push_back(fd);
  return rc;
}

int NetListener::listen_shm(const std::string& url, std::string* why) {
  std::string name;
  if (!parse_shm_url(url, &name)) {
    *why = url + ": not shm://NAME with a name of up to 16 letters, digits, dots, dashes and underscores";
    return -EINVAL;
  }
  std::lock_guard<std::mutex> g(mu_);
  if (listeners_.size() + hooks_.size() >= kMaxListeners) {
    *why = "this server listens in " + std::to_string(kMaxListeners) + " places already";
    return -EMFILE;
  }
  const std::string path = shm_path(name);
  int rc = shm_listen(path, kBacklog);
  if (rc >= 0) {
    const int fd = rc;
    paths_.push_back(path);
    rc = add_listener(fd);
    if (rc != 0) close(fd);
  }
  if (rc != 0) *why = url + " (" + path + "): " + strerror(-rc);
  return rc;
}

int NetListener::add_hook(std::unique_ptr<ListenerHook> hook) {
  std::lock_guard<std::mutex> g(mu_);
  if (listeners_.size() + hooks_.size() >= kMaxListeners) return -EMFILE;
  const int rc = watch(epoll_, EPOLL_CTL_ADD, hook->fd(), EPOLLIN, of(hook.get()) | kHookTag);
  if (rc == 0) hooks_.push_back(std::move(hook));
  return rc;
}

void NetListener::set_map(std::shared_ptr<const ServedMap> map) {
  std::lock_guard<std::mutex> g(mu_);
  map_ = std::move(map);
}

std::shared_ptr<const ServedMap> NetListener::map() const {
  std::lock_guard<std::mutex> g(mu_);
  return map_;
}

void NetListener::add_stats(kvfs_net_stats* out) const {
  out->refused += refused_.load(std::memory_order_relaxed);
  out->protocol_errors += protocol_errors_.load(std::memory_order_relaxed);
}

int NetListener::examine(const wire::Hello& hello, const std::vector<uint8_t>& capability,
                         wire::Capability* out) const {
  const wire::Purpose purpose{hello.purpose};
  if (purpose != wire::Purpose::Map && hello.target >= targets_.size()) return -ENODEV;
  if (purpose == wire::Purpose::Attach) return 0;  // the session's number is the proof
  if (!checks_) {
    *out = {};
    out->expires = UINT64_MAX;
    out->grants = {{wire::kAnyNamespace, wire::kBlocks | wire::kFiles, wire::kAllRights, 0, 0}};
    return 0;
  }
  if (wire::open_capability(capability.data(), capability.size(), key_.data(), out) != 0) return -EACCES;
  return out->valid_at(uint64_t(time(nullptr))) ? 0 : -EACCES;
}

// ---- the thread

void NetListener::run() {
  epoll_event events[kEvents];
  while (!stop_.load()) {
    listen_or_not();
    int timeout = -1;
    if (!peers_.empty() || handed_->load() != 0) {
      const uint64_t now = monotonic_ns();
      uint64_t at = now + 100000000;  // places of those handed over come back without a sign
      for (const auto& p : peers_) at = std::min(at, p->deadline_ns);
      timeout = at <= now ? 0 : int((at - now) / 1000000 + 1);
    }
    const int n = epoll_wait(epoll_, events, kEvents, timeout);
    for (int i = 0; i < n; ++i) {
      const uint64_t data = events[i].data.u64;
      if (data == kWakeTag) {
        uint64_t v;
        (void)!read(wake_, &v, sizeof v);
      } else if ((data & kTagMask) == kListenerTag) {
        accept_some(int(data >> 2));
      } else if ((data & kTagMask) == kHookTag) {
        reinterpret_cast<ListenerHook*>(uintptr_t(data & ~kTagMask))->ready();
      } else {
        go_on(reinterpret_cast<Peer*>(uintptr_t(data)));
      }
    }
    drop_late();
  }
  while (!peers_.empty()) forget(peers_.back().get(), true);
  std::lock_guard<std::mutex> g(mu_);
  hooks_.clear();
}

// Places for handshakes are what a listener waits for.
void NetListener::listen_or_not() {
  const bool want = peers_.size() + handed_->load() < kMaxHandshakes;
  std::lock_guard<std::mutex> g(mu_);
  if (want == listening_) return;
  listening_ = want;
  for (const int fd : listeners_)
    watch(epoll_, EPOLL_CTL_MOD, fd, want ? uint32_t{EPOLLIN} : 0u, uint64_t(fd) << 2 | kListenerTag);
}

void NetListener::accept_some(int listener) {
  for (int i = 0; i < kAccepts && peers_.size() + handed_->load() < kMaxHandshakes; ++i) {
    const int fd = tcp_accept(listener, nullptr);
    if (fd == -ECONNABORTED || fd == -EINTR) continue;
    if (fd < 0) {
      // Out of descriptors or memory: those who wait may try again when somebody has gone.
      if (fd != -EAGAIN) usleep(10000);
      return;
    }
    auto p = std::make_unique<Peer>(fd);
    p->deadline_ns = monotonic_ns() + kHandshakeNs;
    if (watch(epoll_, EPOLL_CTL_ADD, fd, EPOLLIN, of(p.get())) != 0) {
      close(fd);
      continue;
    }
    peers_.push_back(std::move(p));
  }
}

void NetListener::go_on(Peer* p) {
  if (p->writing) return write_more(p);
  const int rc = p->shake.read();
  if (rc == 0) return;
  if (rc > 0) return heard(p);
  if (rc == -EPROTO || rc == -EBADMSG) protocol_errors_.fetch_add(1, std::memory_order_relaxed);
  forget(p, true);
}

void NetListener::heard(Peer* p) {
  const wire::Hello& hello = p->shake.hello();
  wire::Capability capability;
  if (const int err = examine(hello, p->shake.capability(), &capability); err != 0) return refuse(p, err);
  // Sessions begin over TCP: whoever is on this host is not for that reason known.
  if (is_unix(p->shake.fd()) && wire::Purpose{hello.purpose} != wire::Purpose::Attach)
    return refuse(p, -EPROTONOSUPPORT);
  if (wire::Purpose{hello.purpose} != wire::Purpose::Map) return hand_over(p, std::move(capability));
  const auto served = map();
  wire::HelloReply r{};
  r.version = wire::kVersion;
  r.features = hello.features & opt_.features;
  std::copy(opt_.boot.begin(), opt_.boot.end(), r.boot);
  r.map_version = served->version;
  p->shake.answer(r, served->bytes.data(), uint32_t(served->bytes.size()));
  write_more(p);
}

void NetListener::refuse(Peer* p, int err) {
  refused_.fetch_add(1, std::memory_order_relaxed);
  wire::HelloReply r{};
  r.version = wire::kVersion;
  r.err = err;
  p->shake.answer(r, nullptr, 0);
  write_more(p);
}

void NetListener::write_more(Peer* p) {
  const int rc = p->shake.write();
  if (rc != 0) return forget(p, true);
  if (p->writing) return;
  p->writing = true;
  if (watch(epoll_, EPOLL_CTL_MOD, p->shake.fd(), EPOLLOUT, of(p)) != 0) forget(p, true);
}

// The reactor decides, answers and serves. The answer is 88 bytes to an empty socket: it never waits.
void NetListener::hand_over(Peer* p, wire::Capability capability) {
  const int fd = p->shake.fd();
  const wire::Hello hello = p->shake.hello();
  const NetTarget target = targets_[hello.target];
  forget(p, false);
  handed_->fetch_add(1);
  target.reactor->post([=, count = handed_, capability = std::move(capability)] {
    NetServer* s = target.server;
    if (is_unix(fd)) {
      admit_shm(s, fd, hello);
      count->fetch_sub(1);
      return;
    }
    wire::HelloReply reply;
    NetConn* c = s->admit(hello, &capability, &reply);
    ServerHandshake answer(fd);
    answer.answer(reply, nullptr, 0);
    const bool sent = answer.write() == 1;
    if (c != nullptr && sent) {
      const TcpServerLimits limits{reply.max_ops, reply.max_batch, reply.max_in, reply.features};
      s->connect(c, std::make_unique<TcpServerChannel>(*s->uring(), fd, *s, limits));
    } else {
      if (c != nullptr) s->abandon(c);
      close(fd);
    }
    count->fetch_sub(1);
  });
}

void NetListener::forget(Peer* p, bool close_fd) {
  const int fd = p->shake.fd();
  if (close_fd)
    close(fd);
  else
    epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
  std::erase_if(peers_, [&](const auto& q) { return q.get() == p; });
}

void NetListener::drop_late() {
  const uint64_t now = monotonic_ns();
  for (size_t i = peers_.size(); i-- > 0;)
    if (peers_[i]->deadline_ns <= now) forget(peers_[i].get(), true);
}

}  // namespace kvfs
