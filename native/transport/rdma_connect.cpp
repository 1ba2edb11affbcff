// rdma_connect.cpp: see rdma_connect.h.
//
// The queue pair is made on the reactor's own context of the device, not on the one that librdmacm shares between all
// threads, so the RDMA CM knows only its number, and its states are changed here.
#include "rdma_connect.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

namespace kvfs {

namespace {

// Client: requests and as many answers as it may not have looked at yet; the device makes the server wait for more.
constexpr RdmaConnection::Shape kClientShape{
    .frames = 32,
    .frame_bytes = RdmaDevice::kRequestBytes,
    .receives = 64,
    .receive_bytes = sizeof(wire::FrameHeader) + wire::kMaxBatch * sizeof(wire::Result),
    .reachable = true};
constexpr uint32_t kOwnReceives = 64;  // of a server's connection where the device shares none
constexpr uint8_t kMaxReads = 16;      // RDMA READs under way on one connection

int last_error() { return errno != 0 ? -errno : -EIO; }

int left_ms(uint64_t deadline_ns) {
  const uint64_t now = monotonic_ns();
  return now >= deadline_ns ? 0 : int(std::min<uint64_t>((deadline_ns - now + 999'999) / 1'000'000, 1u << 30));
}

// A connection attempt, and all of it that has to go if it fails.
class Attempt {
 public:
  explicit Attempt(const RdmaDial& dial) : dial_(dial), verbs_(dial.device->verbs()) {}
  ~Attempt() {
    connection_.reset();
    if (id_ != nullptr) verbs_.destroy_id(id_);
    if (events_ != nullptr) verbs_.destroy_event_channel(events_);
  }

  int run(std::unique_ptr<RdmaConnection>* out) {
    if (!dial_.device->port_active(dial_.port)) return -ENETDOWN;
    errno = 0;
    events_ = verbs_.create_event_channel();
    if (events_ == nullptr) return last_error();
    fcntl(events_->fd, F_SETFD, FD_CLOEXEC);
    if (fcntl(events_->fd, F_SETFL, fcntl(events_->fd, F_GETFL) | O_NONBLOCK) != 0) return -errno;
    if (verbs_.create_id(events_, &id_, nullptr, RDMA_PS_TCP) != 0) return last_error();
    if (const int err = resolve(); err != 0) return err;
    int err = 0;
    connection_ = RdmaConnection::open(*dial_.device, id_, events_, kClientShape, &err);
    id_ = nullptr;
    events_ = nullptr;
    if (connection_ == nullptr) return err;
    if (const int e = connect(); e != 0) return e;
    *out = std::move(connection_);
    return 0;
  }
  bool answered() const { return answered_; }

 private:
  int resolve() {
    auto* from = reinterpret_cast<sockaddr*>(const_cast<sockaddr_storage*>(&dial_.source));
    auto* to = reinterpret_cast<sockaddr*>(const_cast<sockaddr_storage*>(&dial_.destination));
    const int ms = left_ms(dial_.deadline_ns);
    if (ms == 0) return -ETIMEDOUT;
    if (verbs_.resolve_addr(id_, dial_.source.ss_family != 0 ? from : nullptr, to, ms) != 0) return last_error();
    if (const int err = wait(RDMA_CM_EVENT_ADDR_RESOLVED, events_); err != 0) return err;
    if (dial_.device->name() != verbs_.get_device_name(id_->verbs->device) || id_->port_num != dial_.port)
      return -EADDRNOTAVAIL;
    if (verbs_.resolve_route(id_, std::max(left_ms(dial_.deadline_ns), 1)) != 0) return last_error();
    return wait(RDMA_CM_EVENT_ROUTE_RESOLVED, events_);
  }

  int connect() {
    const ibv_device_attr& attr = dial_.device->attr();
    wire::RdmaHello hello = dial_.hello;
    hello.magic = wire::kHelloMagic;
    hello.version = wire::kVersion;
    hello.rsv = 0;
    hello.rsv1 = 0;
    wire::seal(&hello);
    rdma_conn_param p{};
    p.private_data = &hello;
    p.private_data_len = sizeof hello;
    p.responder_resources = uint8_t(std::clamp(attr.max_qp_rd_atom, 1, int{kMaxReads}));
    p.initiator_depth = 0;  // a client reads nothing of a server's
    p.retry_count = RdmaConnection::kRetries;
    p.rnr_retry_count = 7;
    p.qp_num = connection_->qp()->qp_num;
    if (verbs_.connect(connection_->id(), &p) != 0) return last_error();
    if (const int err = wait(RDMA_CM_EVENT_CONNECT_RESPONSE, connection_->events()); err != 0) return err;
    if (const int err = connection_->to_ready(0, p.responder_resources); err != 0) return err;
    if (verbs_.establish(connection_->id()) != 0) return last_error();
    connection_->connected();
    return 0;
  }

  // The next event; 0 if it is the wanted one.
  int wait(rdma_cm_event_type wanted, rdma_event_channel* channel) {
    rdma_cm_event* e = nullptr;
    while (verbs_.get_cm_event(channel, &e) != 0) {
      if (errno != EAGAIN && errno != EINTR) return last_error();
      pollfd p{channel->fd, POLLIN, 0};
      const int ms = left_ms(dial_.deadline_ns);
      if (ms == 0) return -ETIMEDOUT;
      if (::poll(&p, 1, ms) < 0 && errno != EINTR) return -errno;
    }
    const int err = e->event == wanted ? 0 : refusal(*e);
    verbs_.ack_cm_event(e);
    return err;
  }

  int refusal(const rdma_cm_event& e) {
    switch (e.event) {
      case RDMA_CM_EVENT_REJECTED: {
        wire::RdmaReply reply{};
        if (e.param.conn.private_data_len < sizeof reply) return -ECONNREFUSED;
        std::memcpy(&reply, e.param.conn.private_data, sizeof reply);
        if (reply.err >= 0 || reply.err < -4095 || reply.rsv != 0) return -ECONNREFUSED;
        answered_ = true;
        return reply.err;
      }
      case RDMA_CM_EVENT_ADDR_ERROR:
      case RDMA_CM_EVENT_ROUTE_ERROR:
      case RDMA_CM_EVENT_UNREACHABLE:
        return e.status < 0 && e.status >= -4095 ? e.status : -EHOSTUNREACH;
      case RDMA_CM_EVENT_DEVICE_REMOVAL:
        return -ENODEV;
      default:
        return -ECONNREFUSED;
    }
  }

  const RdmaDial& dial_;
  const VerbsTable& verbs_;
  rdma_event_channel* events_ = nullptr;
  rdma_cm_id* id_ = nullptr;
  std::unique_ptr<RdmaConnection> connection_;
  bool answered_ = false;
};

}  // namespace

int rdma_connect(const RdmaDial& dial, std::unique_ptr<RdmaConnection>* out, bool* answered) {
  Attempt attempt(dial);
  const int err = attempt.run(out);
  *answered = attempt.answered();
  return err;
}

// ---------------------------------------------------------------- server

RdmaIncoming::~RdmaIncoming() {
  if (id_ != nullptr) reject(-ECONNREFUSED);
}

std::string RdmaIncoming::device() const { return verbs_->get_device_name(id_->verbs->device); }

void RdmaIncoming::reject(int err) {
  const wire::RdmaReply reply{err, 0};
  verbs_->reject(id_, &reply, sizeof reply);
  verbs_->destroy_id(id_);
  id_ = nullptr;
}

std::unique_ptr<RdmaConnection> RdmaIncoming::accept(RdmaDevice& device, int* err) {
  errno = 0;
  rdma_event_channel* events = verbs_->create_event_channel();
  if (events == nullptr) {
    *err = last_error();
    reject(-EBUSY);
    return nullptr;
  }
  fcntl(events->fd, F_SETFD, FD_CLOEXEC);
  if (verbs_->migrate_id(id_, events) != 0) {
    *err = last_error();
    reject(-EBUSY);
    verbs_->destroy_event_channel(events);
    return nullptr;
  }
  RdmaConnection::Shape shape;
  shape.frames = 64;
  shape.frame_bytes = sizeof(wire::FrameHeader) + RdmaConnection::kServerResults * sizeof(wire::Result);
  if (device.srq() == nullptr) {
    shape.receives = kOwnReceives;
    shape.receive_bytes = RdmaDevice::kRequestBytes;
  }
  rdma_cm_id* id = std::exchange(id_, nullptr);
  auto c = RdmaConnection::open(device, id, events, shape, err);  // from here on it refuses by going away
  if (c == nullptr) return nullptr;
  const int reads = std::clamp(std::min<int>(max_reads_, device.attr().max_qp_init_rd_atom), 0, int{kMaxReads});
  *err = reads == 0 ? -EPROTO : c->to_ready(uint8_t(reads), 0);
  if (*err == 0) {
    const wire::RdmaReply reply{};
    rdma_conn_param p{};
    p.private_data = &reply;
    p.private_data_len = sizeof reply;
    p.initiator_depth = uint8_t(reads);
    p.rnr_retry_count = 7;
    p.srq = device.srq() != nullptr;
    p.qp_num = c->qp()->qp_num;
    if (verbs_->accept(c->id(), &p) != 0) *err = last_error();
  }
  if (*err != 0) return nullptr;
  c->connected();
  return c;
}

Status RdmaListener::open(const VerbsTable& verbs, const sockaddr* address, std::unique_ptr<RdmaListener>* out) {
  std::unique_ptr<RdmaListener> l(new RdmaListener(verbs));
  const auto failed = [](const char* what) {
    const int err = errno != 0 ? errno : EIO;
    return Status{err, std::string("RDMA listener: ") + what + ": " + std::strerror(err)};
  };
  errno = 0;
  l->events_ = verbs.create_event_channel();
  if (l->events_ == nullptr) return failed("no event channel");
  fcntl(l->events_->fd, F_SETFD, FD_CLOEXEC);
  if (fcntl(l->events_->fd, F_SETFL, fcntl(l->events_->fd, F_GETFL) | O_NONBLOCK) != 0)
    return failed("no event channel");
  if (verbs.create_id(l->events_, &l->id_, nullptr, RDMA_PS_TCP) != 0) return failed("no RDMA CM");
  if (verbs.bind_addr(l->id_, const_cast<sockaddr*>(address)) != 0) return failed("the address cannot be used");
  if (verbs.listen(l->id_, kBacklog) != 0) return failed("cannot listen");
  *out = std::move(l);
  return {};
}

RdmaListener::~RdmaListener() {
  if (id_ != nullptr) verbs_.destroy_id(id_);
  if (events_ != nullptr) verbs_.destroy_event_channel(events_);
}

uint16_t RdmaListener::port() const { return ntohs(verbs_.get_src_port(id_)); }

std::string RdmaListener::device() const {
  return id_->verbs != nullptr ? verbs_.get_device_name(id_->verbs->device) : "";
}

void RdmaListener::take(const std::function<void(RdmaIncoming)>& incoming) {
  rdma_cm_event* e = nullptr;
  for (unsigned i = 0; i < kEvents && verbs_.get_cm_event(events_, &e) == 0; ++i) {
    if (e->event != RDMA_CM_EVENT_CONNECT_REQUEST) {
      verbs_.ack_cm_event(e);
      continue;
    }
    rdma_cm_id* id = e->id;
    wire::RdmaHello hello{};
    const bool whole = e->param.conn.private_data_len >= sizeof hello;  // some devices hand on more than was sent
    if (whole) std::memcpy(&hello, e->param.conn.private_data, sizeof hello);
    // Said from our side: how many of our reads the client answers at once.
    const uint8_t reads = e->param.conn.initiator_depth;
    verbs_.ack_cm_event(e);  // before the id moves to another channel, or goes
    RdmaIncoming request(verbs_, id, hello, reads);
    const int err = whole ? wire::check_hello(hello) : -EPROTO;
    if (err != 0) {
      ++malformed_;
      request.reject(err);
      continue;
    }
    incoming(std::move(request));
  }
}

}  // namespace kvfs
