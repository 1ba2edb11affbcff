// connector.cpp: threads that connect; see connector.h.
#include "connector.h"

#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../store/check.h"

namespace kvfs {

namespace {
// To wake the reactor is all that is wanted: it looks at what is done in every turn.
void on_done(void*, uint32_t) {}
}  // namespace

Connector::Connector(Uring* uring, ConnectorOptions opt) : uring_(uring), opt_(std::move(opt)) {
  if (getrandom(client_, sizeof client_, 0) != ssize_t{sizeof client_}) std::memset(client_, 0, sizeof client_);
}

Status Connector::init() {
  fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd_ < 0) return {errno, "cannot create the connector's eventfd"};
  poll_ = uring_->add_poll(fd_, on_done, nullptr);
  if (poll_ < 0) return {-poll_, "io_uring cannot watch the connector's eventfd"};
  for (unsigned i = 0; i < kThreads; ++i) threads_.emplace_back([this] { run(); });
  return {};
}

Connector::~Connector() {
  {
    std::lock_guard<std::mutex> g(mu_);
    stop_ = true;
    waiting_.clear();
  }
  cv_.notify_all();
  for (std::thread& t : threads_) t.join();
  if (poll_ >= 0) uring_->remove_poll(poll_);
  if (fd_ >= 0) close(fd_);
}

Transport* Connector::of(const wire::MapEndpoint& e) {
  for (const auto& t : transports_) {
    if (uint8_t(t->kind()) == e.transport) return t.get();
  }
  return nullptr;
}

std::vector<Route> Connector::routes(const wire::MapEndpoint& e) {
  Transport* t = of(e);
  return t != nullptr ? t->routes(e) : std::vector<Route>{};
}

void Connector::dial(std::unique_ptr<Dial> d) {
  {
    std::lock_guard<std::mutex> g(mu_);
    waiting_.push_back(std::move(d));
  }
  cv_.notify_one();
}

std::unique_ptr<Dial> Connector::taken() {
  std::lock_guard<std::mutex> g(mu_);
  if (done_.empty()) return nullptr;
  std::unique_ptr<Dial> d = std::move(done_.front());
  done_.pop_front();
  return d;
}

std::unique_ptr<ClientChannel> Connector::channel(Dial* d, const ChannelLimits& limits) {
  return of(d->endpoint)->channel(d, limits);
}

void Connector::memory(void* base, size_t len, bool add) {
  for (const auto& t : transports_) t->memory(base, len, add);
}

void Connector::wait(uint64_t timeout_ns) { uring_->submit_and_wait(timeout_ns); }
uint64_t Connector::now_ns() { return monotonic_ns(); }

void Connector::run() {
  std::unique_lock<std::mutex> g(mu_);
  for (;;) {
    cv_.wait(g, [this] { return stop_ || !waiting_.empty(); });
    if (stop_) return;
    std::unique_ptr<Dial> d = std::move(waiting_.front());
    waiting_.pop_front();
    g.unlock();
    attempt(d.get());
    g.lock();
    done_.push_back(std::move(d));
    const uint64_t one = 1;
    const ssize_t n = write(fd_, &one, sizeof one);
    (void)n;  // EAGAIN: the counter is full, so the event is pending anyway
  }
}

void Connector::attempt(Dial* d) {
  Transport* t = of(d->endpoint);
  if (t == nullptr) {
    d->err = -EPROTONOSUPPORT;
    return;
  }
  wire::Hello h{};
  h.purpose = uint16_t(d->purpose);
  h.features = opt_.features;
  h.target = d->target;
  std::memcpy(h.client, client_, sizeof h.client);
  std::memcpy(h.session, d->session, sizeof h.session);
  // The session's number is what proves the right to attach.
  static const std::vector<uint8_t> kNone;
  const bool attach = d->purpose == wire::Purpose::Attach;
  t->dial(d, h, attach ? kNone : opt_.capability, monotonic_ns() + d->timeout_ns);
}

}  // namespace kvfs
