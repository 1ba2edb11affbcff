// rdma_device.cpp: see rdma_device.h.
#include "rdma_device.h"

#include <fcntl.h>
#include <net/if.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "../store/check.h"
#include "rdma_connection.h"

namespace kvfs {

namespace {

int last_error() { return errno != 0 ? -errno : -EIO; }

// That the network device of a RoCE port has lost its carrier. The kernel tells the port of it later.
bool carrier_lost(const VerbsTable& verbs, ibv_context* context, uint8_t port) {
  ibv_gid_entry gid{};
  char name[IF_NAMESIZE], carrier = '1';
  if (verbs.query_gid_ex(context, port, 0, &gid, 0, sizeof gid) != 0 || gid.gid_type == IBV_GID_TYPE_IB ||
      if_indextoname(gid.ndev_ifindex, name) == nullptr)
    return false;  // InfiniBand, or not to be seen from here
  const int fd = ::open(("/sys/class/net/" + std::string(name) + "/carrier").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool off = ::read(fd, &carrier, 1) < 0 && errno == EINVAL;
  ::close(fd);
  return off || carrier == '0';
}

}  // namespace

int RdmaBuffer::open(const VerbsTable& verbs, ibv_pd* pd, size_t bytes, int access) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return -errno;
  verbs_ = &verbs;
  base_ = static_cast<uint8_t*>(p);
  bytes_ = bytes;
  // A forked child would otherwise take pages from under the device at the first write.
  madvise(p, bytes, MADV_DONTFORK);
  errno = 0;
  mr_ = verbs.reg_mr(pd, p, bytes, access);
  if (mr_ != nullptr) return 0;
  const int err = last_error();
  close();
  return err;
}

void RdmaBuffer::close() {
  if (mr_ != nullptr) verbs_->dereg_mr(mr_);
  if (base_ != nullptr) munmap(base_, bytes_);
  mr_ = nullptr;
  base_ = nullptr;
}

Status RdmaDevice::open(const VerbsTable& verbs, const std::string& device, Role role, const RdmaMemory::Limits& limits,
                        std::unique_ptr<RdmaDevice>* out) {
  int n = 0;
  ibv_device** list = verbs.get_device_list(&n);
  if (list == nullptr) return {ENODEV, "RDMA devices cannot be listed"};
  Status s{ENODEV, "there is no RDMA device " + device};
  for (int i = 0; i < n; ++i) {
    if (device != verbs.get_device_name(list[i])) continue;
    std::unique_ptr<RdmaDevice> d(new RdmaDevice(verbs, device, role));
    s = d->init(list[i], limits);
    if (s) *out = std::move(d);
    break;
  }
  verbs.free_device_list(list);
  return s;
}

Status RdmaDevice::init(ibv_device* device, const RdmaMemory::Limits& limits) {
  const auto failed = [&](const char* what) {
    const int err = errno != 0 ? errno : EIO;
    return Status{err, "RDMA device " + name_ + ": " + what + ": " + std::strerror(err)};
  };
  errno = 0;
  context_ = verbs_.open_device(device);
  if (context_ == nullptr) return failed("cannot be opened");
  if (const int err = verbs_.query_device(context_, &attr_); err != 0) {
    errno = err;
    return failed("cannot be asked for its limits");
  }
  pd_ = verbs_.alloc_pd(context_);
  if (pd_ == nullptr) return failed("no protection domain");
  if (fcntl(context_->async_fd, F_SETFL, fcntl(context_->async_fd, F_GETFL) | O_NONBLOCK) != 0)
    return failed("its events cannot be waited for");
  int access = IBV_ACCESS_LOCAL_WRITE;
  if (role_ == Role::Client) access |= IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
  memory_ = std::make_unique<RdmaMemory>(verbs_, pd_, access, limits);
  if (role_ == Role::Server && attr_.max_srq > 0 && attr_.max_srq_wr >= int(kSharedReceives)) {
    if (const int err = open_shared_receives(); err != 0) {
      errno = -err;
      return failed("no shared receive queue");
    }
  }
  return {};
}

int RdmaDevice::open_shared_receives() {
  ibv_srq_init_attr a{};
  a.attr.max_wr = kSharedReceives;
  a.attr.max_sge = 1;
  errno = 0;
  srq_ = verbs_.create_srq(pd_, &a);
  // A device may promise shared receive queues and have none left: each connection then has receives of its own.
  if (srq_ == nullptr) return errno == ENOMEM || errno == EOPNOTSUPP || errno == ENOSYS ? 0 : last_error();
  const size_t bytes = size_t{kSharedReceives} * kRequestBytes;
  if (const int err = receives_.open(verbs_, pd_, bytes, IBV_ACCESS_LOCAL_WRITE); err != 0) return err;
  for (uint32_t slot = 0; slot < kSharedReceives; ++slot)
    if (const int err = repost(&slot, 1); err != 0) return err;
  return 0;
}

int RdmaDevice::repost(const uint32_t* slots, uint32_t n) {
  unposted_.insert(unposted_.end(), slots, slots + n);
  while (!unposted_.empty()) {
    const uint32_t slot = unposted_.back();
    ibv_sge sge{uintptr_t(received(slot)), kRequestBytes, receives_.mr()->lkey};
    ibv_recv_wr wr{}, *bad = nullptr;
    wr.wr_id = RdmaConnection::kReceive | slot;
    wr.sg_list = &sge;
    wr.num_sge = 1;
    if (const int err = verbs_.post_srq_recv(srq_, &wr, &bad); err != 0) return -err;
    unposted_.pop_back();
  }
  return 0;
}

RdmaDevice::~RdmaDevice() {
  KVFS_CHECK(connections_.empty());
  unearth(-1);
  if (poll_ >= 0) uring_->remove_poll(poll_);
  memory_.reset();
  if (srq_ != nullptr) verbs_.destroy_srq(srq_);
  receives_.close();
  if (pd_ != nullptr) verbs_.dealloc_pd(pd_);
  if (context_ != nullptr) verbs_.close_device(context_);
}

bool RdmaDevice::port_active(uint8_t port) const {
  ibv_port_attr attr{};
  if (verbs_.query_port(context_, port, &attr) != 0 || attr.state != IBV_PORT_ACTIVE) return false;
  return !carrier_lost(verbs_, context_, port);
}

void RdmaDevice::bury(rdma_cm_id* id, rdma_event_channel* events) {
  if (buried_.size() == kBuried) unearth(-1);
  buried_.push_back({id, events, id->port_num});
}

void RdmaDevice::unearth(int port) {
  std::erase_if(buried_, [&](const Buried& b) {
    if (port >= 0 && b.port != port) return false;
    verbs_.destroy_id(b.id);
    verbs_.destroy_event_channel(b.events);
    return true;
  });
}

int RdmaDevice::attach(Uring& uring) {
  if (poll_ >= 0) return 0;
  uring_ = &uring;
  const int handle = uring.add_poll(
      context_->async_fd, [](void* self, uint32_t) { static_cast<RdmaDevice*>(self)->on_events(); }, this);
  if (handle < 0) return handle;
  poll_ = handle;
  on_events();  // of before
  return 0;
}

void RdmaDevice::on_events() {  // as many as queue pairs and ports, at most
  ibv_async_event e;
  while (verbs_.get_async_event(context_, &e) == 0) {
    on_event(e);
    verbs_.ack_async_event(&e);
  }
}

void RdmaDevice::on_event(const ibv_async_event& e) {
  switch (e.event_type) {
    case IBV_EVENT_PORT_ERR:
      for (RdmaConnection* c : connections_)
        if (c->port() == e.element.port_num) c->fail(-ENETDOWN);
      return;
    case IBV_EVENT_PORT_ACTIVE:
      if (port_active(e.element.port_num)) unearth(e.element.port_num);  // else it has gone again
      return;
    case IBV_EVENT_DEVICE_FATAL:
      dead_ = true;
      for (RdmaConnection* c : connections_) c->fail(-ENODEV);
      return;
    case IBV_EVENT_SRQ_ERR:
      for (RdmaConnection* c : connections_) c->fail(-EIO);
      dead_ = true;
      return;
    case IBV_EVENT_QP_FATAL:
    case IBV_EVENT_QP_REQ_ERR:
    case IBV_EVENT_QP_ACCESS_ERR:
    case IBV_EVENT_PATH_MIG_ERR:
      for (RdmaConnection* c : connections_)
        if (c->qp() == e.element.qp) c->fail(e.event_type == IBV_EVENT_QP_ACCESS_ERR ? -EPROTO : -EIO);
      return;
    case IBV_EVENT_QP_LAST_WQE_REACHED:
      for (RdmaConnection* c : connections_)
        if (c->qp() == e.element.qp) c->last_receive();
      return;
    case IBV_EVENT_CQ_ERR:
      for (RdmaConnection* c : connections_)
        if (c->cq() == e.element.cq) c->fail(-EIO);
      return;
    default:  // addresses that changed: new connections find out
      return;
  }
}

}  // namespace kvfs
