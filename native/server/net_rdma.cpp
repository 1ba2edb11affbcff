// net_rdma.cpp: see net_rdma.h.
#include "net_rdma.h"

#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <list>
#include <utility>

#include "../store/check.h"
#include "../transport/rdma_server.h"
#include "reactor.h"

namespace kvfs {

namespace {

// What reactors have to say to the listener thread: which requests they have admitted. Outlives both.
struct Inbox {
  struct Answer {
    uint64_t request = 0;
    NetConn* conn = nullptr;  // null: reply.err
    wire::HelloReply reply{};
  };
  std::mutex mu;
  std::vector<Answer> answers;  // by mu
  bool closed = false;          // by mu: nobody reads any more
  int wake = -1;
  ~Inbox() {
    if (wake >= 0) close(wake);
  }
};

}  // namespace

// One address that is listened on. All of it runs on the listener thread.
class RdmaServing::Hook final : public ListenerHook {
 public:
  Hook(RdmaServing* serving, const VerbsTable& verbs, std::unique_ptr<RdmaListener> listener)
      : serving_(serving), verbs_(verbs), listener_(std::move(listener)) {}
  ~Hook() override;
  int init();
  int fd() const override { return epoll_; }
  void ready() override;

 private:
  struct Request {
    uint64_t number;
    uint32_t target;
    RdmaIncoming incoming;
  };
  void arrived(RdmaIncoming incoming);
  void refuse(RdmaIncoming* incoming, int err);
  void admitted(const Inbox::Answer& answer);
  void abandon(uint32_t target, NetConn* conn);

  RdmaServing* serving_;
  const VerbsTable& verbs_;
  std::unique_ptr<RdmaListener> listener_;
  std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  int epoll_ = -1;  // of the listener and the inbox
  uint64_t last_request_ = 0;
  std::list<Request> requests_;  // at their reactors; at most kMaxHandshakes
  uint64_t malformed_ = 0;       // of the listener's, already counted
};

int RdmaServing::Hook::init() {
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  inbox_->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (epoll_ < 0 || inbox_->wake < 0) return -errno;
  for (const int fd : {listener_->fd(), inbox_->wake}) {
    epoll_event e{};
    e.events = EPOLLIN;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &e) != 0) return -errno;
  }
  return 0;
}

RdmaServing::Hook::~Hook() {
  std::vector<Inbox::Answer> answers;
  {
    std::lock_guard<std::mutex> g(inbox_->mu);
    inbox_->closed = true;
    answers = std::move(inbox_->answers);
  }
  for (const Request& r : requests_)
    for (const Inbox::Answer& a : answers)
      if (a.request == r.number && a.conn != nullptr) abandon(r.target, a.conn);
  serving_->under_way_.fetch_sub(uint32_t(requests_.size()));
  requests_.clear();  // refuses them
  if (epoll_ >= 0) close(epoll_);
}

void RdmaServing::Hook::ready() {
  uint64_t n;
  (void)!read(inbox_->wake, &n, sizeof n);
  std::vector<Inbox::Answer> answers;
  {
    std::lock_guard<std::mutex> g(inbox_->mu);
    answers.swap(inbox_->answers);
  }
  for (const Inbox::Answer& a : answers) admitted(a);
  listener_->take([this](RdmaIncoming incoming) { arrived(std::move(incoming)); });
  const uint64_t malformed = listener_->malformed();
  serving_->malformed_.fetch_add(malformed - std::exchange(malformed_, malformed), std::memory_order_relaxed);
}

void RdmaServing::Hook::refuse(RdmaIncoming* incoming, int err) {
  serving_->refused_.fetch_add(1, std::memory_order_relaxed);
  incoming->reject(err);
}

void RdmaServing::Hook::arrived(RdmaIncoming incoming) {
  const wire::RdmaHello& said = incoming.hello();
  if (said.target >= serving_->targets_.size()) return refuse(&incoming, -ENODEV);
  if (serving_->under_way_.load() >= kMaxHandshakes) return refuse(&incoming, -EBUSY);
  serving_->under_way_.fetch_add(1);
  wire::Hello hello{};
  hello.magic = wire::kHelloMagic;
  hello.version = said.version;
  hello.purpose = uint16_t(wire::Purpose::Attach);
  hello.features = wire::kFeatures;  // of these, what its session has
  hello.target = said.target;
  std::copy(std::begin(said.client), std::end(said.client), hello.client);
  std::copy(std::begin(said.session), std::end(said.session), hello.session);
  const NetTarget target = serving_->targets_[said.target];
  requests_.push_back({++last_request_, said.target, std::move(incoming)});
  target.reactor->post([hello, number = last_request_, server = target.server, inbox = inbox_] {
    Inbox::Answer a;
    a.request = number;
    a.conn = server->admit(hello, nullptr, &a.reply);
    std::lock_guard<std::mutex> g(inbox->mu);
    if (inbox->closed) {
      if (a.conn != nullptr) server->abandon(a.conn);
      return;
    }
    inbox->answers.push_back(a);
    const uint64_t one = 1;
    (void)!write(inbox->wake, &one, sizeof one);
  });
}

void RdmaServing::Hook::abandon(uint32_t target, NetConn* conn) {
  const NetTarget t = serving_->targets_[target];
  t.reactor->post([server = t.server, conn] { server->abandon(conn); });
}

void RdmaServing::Hook::admitted(const Inbox::Answer& a) {
  const auto at = std::ranges::find(requests_, a.request, &Request::number);
  KVFS_CHECK(at != requests_.end());
  const uint32_t number = at->target;
  RdmaIncoming incoming = std::move(at->incoming);
  requests_.erase(at);
  RdmaDevice* device = nullptr;
  std::unique_ptr<RdmaConnection> connection;
  if (a.conn == nullptr) {
    incoming.reject(a.reply.err);  // the target has counted it
  } else {
    Status s;
    int err = 0;
    device = serving_->device(verbs_, number, incoming.device(), &s);
    if (device == nullptr) {
      refuse(&incoming, -EBUSY);
    } else {
      connection = incoming.accept(*device, &err);
    }
  }
  if (connection == nullptr) {
    if (a.conn != nullptr) abandon(number, a.conn);
    serving_->under_way_.fetch_sub(1);
    return;
  }
  const NetTarget t = serving_->targets_[number];
  RdmaServerOptions options;
  options.max_ops = a.reply.max_ops;
  options.max_batch = a.reply.max_batch;
  options.max_in = a.reply.max_in;
  options.features = a.reply.features;
  // A std::function can be copied, so what it holds is shared.
  auto held = std::make_shared<std::unique_ptr<RdmaConnection>>(std::move(connection));
  t.reactor->post([held, device, options, conn = a.conn, server = t.server, serving = serving_] {
    if (device->attach(*server->uring()) == 0) {
      server->connect(conn, std::make_unique<RdmaServerChannel>(*server->uring(), std::move(*held), options, *server));
    } else {
      held->reset();
      server->abandon(conn);
    }
    serving->under_way_.fetch_sub(1);
  });
}

// ---- devices

RdmaServing::~RdmaServing() { KVFS_CHECK(devices_.empty()); }

void RdmaServing::end(uint32_t target) {
  std::lock_guard<std::mutex> g(mu_);
  std::erase_if(devices_, [&](const Open& o) { return o.target == target; });
}

RdmaDevice* RdmaServing::device(const VerbsTable& verbs, uint32_t target, const std::string& name, Status* s) {
  std::lock_guard<std::mutex> g(mu_);
  // One that has broken is not used again; it stays until the end, as its connections may still be going.
  for (const Open& o : devices_)
    if (o.target == target && o.device->name() == name && !o.device->dead()) return o.device.get();
  if (devices_.size() >= kMaxDevices) {
    *s = {EMFILE, "this server uses " + std::to_string(kMaxDevices) + " RDMA devices already"};
    return nullptr;
  }
  Open made;
  made.target = target;
  *s = RdmaDevice::open(verbs, name, RdmaDevice::Role::Server, {}, &made.device);
  if (s->err != 0) return nullptr;
  const NetBuffers& b = targets_[target].server->buffers();
  int err = made.device->memory().declare(b.base(), b.bytes());
  if (err == 0) err = made.device->memory().prepare(b.base());
  if (err != 0) {
    *s = {-err, "RDMA device " + name + ": " + std::to_string(b.bytes() >> 20) +
                    " MiB of buffers cannot be registered: " + std::strerror(-err) +
                    (err == -ENOMEM ? " (they are locked in memory: see ulimit -l, LimitMEMLOCK)" : "")};
    return nullptr;
  }
  devices_.push_back(std::move(made));
  return devices_.back().device.get();
}

int RdmaServing::listen(const std::string& url, NetListener* listener, std::string* why) {
  sockaddr_storage addr{};
  socklen_t len = 0;
  if (parse_listen_url(url, "rdma", &addr, &len) != 0) {
    *why = url + ": not rdma://ADDRESS:PORT with a numeric address, IPv6 in brackets";
    return -EINVAL;
  }
  const VerbsTable* verbs = load_verbs(why);
  if (verbs == nullptr) return -EOPNOTSUPP;
  std::vector<RdmaPort> ports;
  Status s = rdma_ports(*verbs, &ports);
  if (s.err != 0 || ports.empty()) {
    *why = "RDMA is not available: " + (s.err != 0 ? s.message : "this host has no RDMA device");
    return s.err != 0 ? -s.err : -ENODEV;
  }
  std::unique_ptr<RdmaListener> opened;
  s = RdmaListener::open(*verbs, reinterpret_cast<sockaddr*>(&addr), &opened);
  // An address is one device's: what is missing is said now, and not to the first client.
  for (uint32_t t = 0; s.err == 0 && !opened->device().empty() && t < targets_.size(); ++t)
    device(*verbs, t, opened->device(), &s);
  if (s.err != 0) {
    *why = url + ": " + s.message;
    return -s.err;
  }
  const int port = opened->port();
  auto hook = std::make_unique<Hook>(this, *verbs, std::move(opened));
  int rc = hook->init();
  if (rc == 0) rc = listener->add_hook(std::move(hook));
  if (rc == 0) return port;
  *why = url + ": " + std::strerror(-rc);
  return rc;
}

void RdmaServing::add_stats(kvfs_net_stats* out) const {
  out->refused += refused_.load(std::memory_order_relaxed);
  out->protocol_errors += malformed_.load(std::memory_order_relaxed);
}

}  // namespace kvfs
