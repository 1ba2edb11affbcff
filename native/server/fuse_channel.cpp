// fuse_channel.cpp owns what FuseChannel does with each request and answer. Protocol: linux/fuse.h.
#include "fuse_channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "../store/check.h"

namespace kvfs {

namespace {
constexpr size_t kPage = 4096;
constexpr size_t kSlotData = FuseChannel::kMaxIo + kPage;     // names and lists may follow a head too
constexpr size_t kAnswer = FuseChannel::kMaxIo + 16 * kPage;  // the longest answer of the daemon
constexpr size_t kSocketOverhead = 32 + sizeof(fuse_in_header) + sizeof(fuse_write_in) + kPage;
constexpr size_t kLongestName = 64 << 10;  // of what follows a head and is no data: values of extended attributes
constexpr char kCapability[] = "security.capability";

bool plain(uint64_t nodeid) { return (nodeid & KVFS_VIEW_INO) == 0; }

void unblock(int fd) { fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }
}  // namespace

FuseChannel::FuseChannel(int kernel, int daemon, Reactor* reactor, Uring* uring, InodeTable* inodes, Upcalls* upcalls)
    : kernel_(kernel), daemon_(daemon), reactor_(reactor), uring_(uring), inodes_(inodes), upcalls_(upcalls) {
  ring_.fuse = this;
}

FuseChannel::~FuseChannel() {
  KVFS_CHECK(idle());
  stop();
  if (memory_ != nullptr) munmap(memory_, memory_bytes_);
  if (epoll_ >= 0) close(epoll_);
  close(kernel_);
  close(daemon_);
  if (direct_ >= 0) close(direct_);
}

void FuseChannel::set_direct(int direct, uint64_t opcodes) {
  KVFS_CHECK(direct_ < 0);
  unblock(direct);
  direct_ = direct;
  direct_opcodes_ = opcodes;
}

Status FuseChannel::init() {
  unblock(kernel_);
  unblock(daemon_);
  int room = 0;
  socklen_t length = sizeof room;
  if (getsockopt(daemon_, SOL_SOCKET, SO_SNDBUF, &room, &length) != 0) return {errno, "the mount's socket is none"};
  if (room < int(kLongestName + kSocketOverhead)) return {ENOBUFS, "the mount's socket has too little room"};
  message_max_ = std::bit_floor(std::min(kMaxIo, uint32_t(room) - uint32_t(kSocketOverhead)));
  memory_bytes_ = kSlots * kSlotData;
  void* memory =
      mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return {errno, "no memory for the mount's requests"};
  memory_ = static_cast<char*>(memory);
  answer_ = std::make_unique<char[]>(kAnswer);
  slots_ = std::make_unique<Slot[]>(kSlots);
  for (unsigned i = 0; i < kSlots; ++i) {
    slots_[i].data = memory_ + i * kSlotData;
    slots_[i].channel = this;
    slots_[i].lender.returned = loan_over;
    slots_[i].next = free_;
    free_ = &slots_[i];
  }
  // io_uring watches an epoll: a watch of its own would keep the mount's connection after its last descriptor is closed,
  // by a kill too, until the ring's end, which comes some time after the process's.
  epoll_ = epoll_create1(EPOLL_CLOEXEC);
  epoll_event events{};
  events.events = EPOLLIN;
  if (epoll_ < 0 || epoll_ctl(epoll_, EPOLL_CTL_ADD, kernel_, &events) != 0)
    return {errno, "the mount cannot be watched"};
  kernel_poll_ = uring_->add_poll(epoll_, on_kernel, this);
  daemon_poll_ = uring_->add_poll(daemon_, on_daemon, this);
  if (kernel_poll_ < 0 || daemon_poll_ < 0) {
    stop();
    return {ENOSPC, "io_uring cannot watch the mount"};
  }
  return {};
}

void FuseChannel::stop() {
  stopped_ = true;
  for (int* handle : {&kernel_poll_, &daemon_poll_, &room_poll_}) {
    if (*handle >= 0) uring_->remove_poll(*handle);
    *handle = -1;
  }
  if (blocked_ != nullptr) release(std::exchange(blocked_, nullptr));
  for (Ahead& a : aheads_) {
    if (a.slot != nullptr && a.waiter == nullptr) drop(&a);
  }
}

void FuseChannel::tell_memory(Store* store, bool add) const {
  for (unsigned i = 0; i < kSlots; ++i) store->memory(slots_[i].data, kSlotData, add);
}

void FuseChannel::on_kernel(void* self, uint32_t) { static_cast<FuseChannel*>(self)->kernel_ready_ = true; }
void FuseChannel::on_daemon(void* self, uint32_t) { static_cast<FuseChannel*>(self)->daemon_ready_ = true; }

void FuseChannel::on_room(void* self, uint32_t) {
  auto* c = static_cast<FuseChannel*>(self);
  c->uring_->remove_poll(std::exchange(c->room_poll_, -1));
}

bool FuseChannel::ready() const {
  if (stopped_) return false;
  if (daemon_ready_) return true;
  if (blocked_ != nullptr) return room_poll_ < 0;
  return kernel_ready_ && !gone_ && free_ != nullptr;
}

void FuseChannel::pump() {
  if (stopped_) return;
  if (daemon_ready_) relay_answers();
  if (blocked_ != nullptr && room_poll_ < 0) pass_on(std::exchange(blocked_, nullptr));
  if (kernel_ready_) read_requests();
}

bool FuseChannel::look() {
  if (stopped_ || gone_) return false;
  kernel_ready_ = true;
  return read_requests() != 0;
}

unsigned FuseChannel::read_requests() {
  unsigned taken = 0;
  for (unsigned i = 0; i < kBudget && free_ != nullptr && blocked_ == nullptr && !gone_; ++i) {
    Slot* s = free_;  // taken only when there is a request
    iovec parts[2] = {{&s->head, sizeof s->head}, {s->data, kSlotData}};
    const ssize_t n = readv(kernel_, parts, 2);
    if (n < 0 && (errno == EINTR || errno == ENOENT)) continue;  // ENOENT: the request was given up meanwhile
    if (n < 0 && errno == EAGAIN) {
      kernel_ready_ = false;
      break;
    }
    if (n <= 0) {
      kernel_gone();
      break;
    }
    new_slot()->length = size_t(n);
    take(s);
    quick_ = s->answered && s->head.in.opcode != FUSE_READ;
    ++taken;
  }
  return taken;
}

// Unmounted, or the connection was aborted: the daemon ends.
void FuseChannel::kernel_gone() {
  gone_ = true;
  kernel_ready_ = false;
  if (kernel_poll_ >= 0) uring_->remove_poll(std::exchange(kernel_poll_, -1));
  upcalls_->ask_inode(KVFS_UPCALL_UNMOUNTED, 0);
}

void FuseChannel::take(Slot* s) {
  const fuse_in_header& in = s->head.in;
  if (s->length < sizeof in || in.len != s->length) return release(s);  // not of this protocol
  const size_t body = s->length - sizeof in;
  switch (in.opcode) {
    case FUSE_READ:
      if (body == sizeof(fuse_read_in) && read(s)) return;
      break;
    case FUSE_WRITE:
      if (body >= sizeof(fuse_write_in) && body - sizeof(fuse_write_in) == s->head.write.size &&
          serve(s, KVFS_OP_INODE_WRITE, s->head.write.offset, s->head.write.size))
        return;
      break;
    case FUSE_FLUSH:
      // Its size and times are in the inode, from where the daemon takes them at the release.
      if (!plain(in.nodeid) || !inodes_->find(in.nodeid)) break;
      return reply(s, int(reactor_->closed(in.nodeid)), nullptr, 0);
    case FUSE_GETATTR:
      if (fuse_attr_out known; left_->attrs.get(in.nodeid, &known)) return reply(s, 0, &known, sizeof known);
      break;
    case FUSE_GETXATTR:
      if (answer_xattr(s)) return;
      break;
    case FUSE_LOOKUP:
      if (answer_lookup(s)) return;
      break;
    case FUSE_INTERRUPT:  // nothing here or in the daemon ends early
      return release(s);
    case FUSE_FORGET:  // the tree's inodes are not counted
      if (plain(in.nodeid)) return release(s);
      break;
    case FUSE_BATCH_FORGET:
      if (only_plain_forgets(s)) return release(s);
      break;
    case FUSE_INIT:
      init_unique_ = in.unique;
      break;
    default:
      break;
  }
  pass_on(s);
}

// False: the daemon must do it.
bool FuseChannel::serve(Slot* s, uint8_t opcode, uint64_t off, uint32_t len) {
  const uint64_t ino = s->head.in.nodeid;
  if (!plain(ino) || len > kMaxIo || !inodes_->find(ino)) return false;
  const bool stream = opcode == KVFS_OP_INODE_READ && len >= kStreamIo;  // it would only push others out of memory
  send(s, opcode, KVFS_SQE_FUSE | (stream ? KVFS_SQE_NOTOUCH : 0), ino, off, len);
  return true;
}

void FuseChannel::send(Slot* s, uint8_t opcode, uint8_t flags, uint64_t ino, uint64_t off, uint32_t len) {
  kvfs_sqe q{};
  q.opcode = opcode;
  q.flags = flags;
  q.iov = KVFS_IOV_INPROC;
  q.iov_off = uint64_t(reinterpret_cast<uintptr_t>(s->data));
  q.off = off;
  q.len = len;
  q.user_data = uint64_t(s - slots_.get());
  memcpy(q.key, &ino, sizeof ino);
  reactor_->take(&ring_, q, lent_ < kMaxLent ? &s->lender : nullptr);
}

void FuseChannel::done(uint64_t slot, int64_t result) {
  KVFS_CHECK(slot < kSlots);
  Slot* s = &slots_[slot];
  if (s->ahead != nullptr) return ahead_done(s->ahead, result);
  if (result < 0) return reply(s, int(result), nullptr, 0);
  if (s->head.in.opcode == FUSE_READ) return reply(s, 0, s->data, size_t(result));
  quick_ = true;
  fuse_write_out out{};
  out.size = uint32_t(result);
  reply(s, 0, &out, sizeof out);
}

// The kernel asks for it before each write, and it is hardly ever there.
bool FuseChannel::answer_xattr(Slot* s) {
  constexpr size_t kHead = sizeof(fuse_in_header) + sizeof(fuse_getxattr_in);
  static_assert(kHead + sizeof kCapability <= sizeof s->head);
  if (s->length != kHead + sizeof kCapability) return false;
  if (memcmp(reinterpret_cast<const char*>(&s->head) + kHead, kCapability, sizeof kCapability) != 0) return false;
  InodeRef i = inodes_->find(s->head.in.nodeid);
  if (!i || !i->no_capability.load(std::memory_order_acquire)) return false;
  reply(s, -ENODATA, nullptr, 0);
  return true;
}

bool FuseChannel::answer_lookup(Slot* s) {
  constexpr size_t kInHead = sizeof s->head - sizeof(fuse_in_header);
  const size_t length = s->length - sizeof(fuse_in_header);
  char name[EntryTable::kLongestName + 1];
  if (length < 2 || length > sizeof name || !plain(s->head.in.nodeid)) return false;
  memcpy(name, s->head.bytes, std::min(length, kInHead));
  if (length > kInHead) memcpy(name + kInHead, s->data, length - kInHead);
  if (name[length - 1] != '\0') return false;
  const fuse_entry_out found = left_->entries.take(s->head.in.nodeid, {name, length - 1});
  if (found.nodeid == 0 || inodes_->find(found.nodeid))
    return false;  // an open file's size and times are the daemon's to say
  reply(s, 0, &found, sizeof found);
  return true;
}

bool FuseChannel::only_plain_forgets(const Slot* s) {
  constexpr size_t kHead = sizeof(fuse_in_header) + sizeof(fuse_batch_forget_in);
  if (s->length < kHead) return false;
  const uint64_t count = s->head.forgets.count;
  if ((s->length - kHead) / sizeof(fuse_forget_one) != count) return false;
  for (uint64_t i = 0; i < count; ++i) {
    const size_t at = kHead + i * sizeof(fuse_forget_one);
    char one[sizeof(fuse_forget_one)];  // may lie across the end of the head
    const size_t in_head = at < sizeof s->head ? std::min(sizeof one, sizeof s->head - at) : 0;
    memcpy(one, reinterpret_cast<const char*>(&s->head) + at, in_head);
    if (in_head < sizeof one) memcpy(one + in_head, s->data + (at + in_head - sizeof s->head), sizeof one - in_head);
    uint64_t nodeid;
    memcpy(&nodeid, one + offsetof(fuse_forget_one, nodeid), sizeof nodeid);
    if (!plain(nodeid)) return false;
  }
  return true;
}

int FuseChannel::receiver(const Slot* s) const {
  const fuse_in_header& in = s->head.in;
  const bool direct = in.opcode < 64 && (direct_opcodes_ >> in.opcode & 1) != 0;
  // libfuse has no READDIR: see patch_init.
  return direct && (plain(in.nodeid) || in.opcode == FUSE_READDIR) ? direct_ : daemon_;
}

void FuseChannel::pass_on(Slot* s) {
  const int to = receiver(s);
  const size_t head = std::min(s->length, sizeof s->head);
  iovec parts[2] = {{&s->head, head}, {s->data, s->length - head}};
  msghdr m{};
  m.msg_iov = parts;
  m.msg_iovlen = parts[1].iov_len == 0 ? 1 : 2;
  ssize_t n;
  do n = sendmsg(to, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
  while (n < 0 && errno == EINTR);
  if (n < 0 && errno == EAGAIN) {
    blocked_ = s;
    room_poll_ = uring_->add_poll(to, on_room, this, POLLOUT);
    if (room_poll_ >= 0) return;
    blocked_ = nullptr;
  }
  // A daemon that takes nothing any more is about to end; nobody is left waiting for it.
  const bool answers = s->head.in.opcode != FUSE_FORGET && s->head.in.opcode != FUSE_BATCH_FORGET;
  if (n < 0 && answers) return reply(s, -EIO, nullptr, 0);
  release(s);
}

void FuseChannel::relay_answers() {
  for (unsigned i = 0; i < kBudget; ++i) {
    const ssize_t n = recv(daemon_, answer_.get(), kAnswer, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      daemon_ready_ = false;
      return;
    }
    fuse_out_header out;
    if (size_t(n) < sizeof out) continue;
    memcpy(&out, answer_.get(), sizeof out);
    if (out.unique == 0) continue;  // notifications may wait for requests that we serve: see kvfs_node_fuse_invalidate
    if (out.unique == init_unique_) patch_init(answer_.get(), size_t(n));
    (void)!write(kernel_, answer_.get(), size_t(n));  // ENOENT: nobody waits for it any more
  }
}

// What libfuse cannot say, and bounds that are ours.
void FuseChannel::patch_init(char* answer, size_t length) {
  init_unique_ = 0;
  fuse_out_header out;
  fuse_init_out init;
  memcpy(&out, answer, sizeof out);
  if (out.error != 0 || length < sizeof out + sizeof init) return;
  memcpy(&init, answer + sizeof out, sizeof init);
  init.max_background = kSlots;
  init.congestion_threshold = kSlots * 3 / 4;
  init.max_write = std::min(init.max_write, message_max_);
  init.max_pages = uint16_t(std::min<uint32_t>(init.max_pages, message_max_ / kPage));
  // Attributes come with the names only where they are wanted: libfuse asks for both ways only where it serves both.
  if (direct_ >= 0 && (init.flags & FUSE_DO_READDIRPLUS) != 0) init.flags |= FUSE_READDIRPLUS_AUTO;
  memcpy(answer + sizeof out, &init, sizeof init);
}

void FuseChannel::reply(Slot* s, int error, const void* body, size_t bytes) {
  fuse_out_header out{};
  out.len = uint32_t(sizeof out + bytes);
  out.error = error;
  out.unique = s->head.in.unique;
  iovec parts[2] = {{&out, sizeof out}, {const_cast<void*>(body), bytes}};
  (void)!writev(kernel_, parts, bytes == 0 ? 1 : 2);  // ENOENT: nobody waits for it any more
  s->answered = true;
  if (s->lender.loans == 0) return release(s);
  ++lent_;
}

void FuseChannel::loan_over(Lender* l) {
  auto* s = reinterpret_cast<Slot*>(l);
  if (!s->answered) return;
  --s->channel->lent_;
  s->channel->release(s);
}

FuseChannel::Slot* FuseChannel::new_slot() {
  Slot* s = free_;
  free_ = s->next;
  ++used_;
  s->answered = false;
  return s;
}

void FuseChannel::release(Slot* s) {
  --used_;
  s->next = free_;
  free_ = s;
}

}  // namespace kvfs
