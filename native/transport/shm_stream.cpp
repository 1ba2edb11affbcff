// shm_stream.cpp: see shm_stream.h and shm_ring.h.
#include "shm_stream.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>

#include "../store/check.h"
#include "../store/checksum.h"

namespace kvfs {

namespace {
constexpr uint64_t kPage = 4096;
constexpr uint32_t kLine = 64;
constexpr uint32_t kSlots = 64;
constexpr uint32_t kHeader = sizeof(wire::FrameHeader);

uint64_t pages(uint64_t n) { return (n + kPage - 1) / kPage * kPage; }
uint32_t lines(uint32_t n) { return (n + kLine - 1) / kLine * kLine; }
uint64_t sum_of(ShmSetup s) {
  s.sum = 0;
  return xxh3(&s, sizeof s);
}
bool slot_ok(uint32_t bytes, uint32_t record) {
  return bytes % kLine == 0 && bytes >= kHeader + record && bytes <= kShmMaxSlotBytes;
}
}  // namespace

ShmSetup shm_setup(uint32_t max_batch, uint64_t arena_bytes) {
  ShmSetup s{};
  s.magic = kShmMagic;
  s.slots = kSlots;
  s.request_bytes = lines(kHeader + max_batch * uint32_t{sizeof(wire::Desc)});
  s.result_bytes = lines(kHeader + max_batch * uint32_t{sizeof(wire::Result)});
  s.arena_bytes = arena_bytes;
  s.sum = sum_of(s);
  return s;
}

int check_setup(const ShmSetup& s) {
  if (s.magic != kShmMagic) return -EPROTO;
  if (sum_of(s) != s.sum) return -EBADMSG;
  if (s.slots == 0 || s.slots > kShmMaxSlots || (s.slots & (s.slots - 1)) != 0) return -EPROTO;
  if (!slot_ok(s.request_bytes, sizeof(wire::Desc)) || !slot_ok(s.result_bytes, sizeof(wire::Result))) return -EPROTO;
  const bool arena = s.arena_bytes % kPage == 0 && s.arena_bytes >= wire::kMaxOpBytes && s.arena_bytes <= kShmMaxArena;
  return arena ? 0 : -EPROTO;
}

ShmLayout::ShmLayout(const ShmSetup& s)
    : requests(kShmWords),
      results(requests + pages(uint64_t{s.slots} * s.request_bytes)),
      arena(results + pages(uint64_t{s.slots} * s.result_bytes)),
      bytes(arena + s.arena_bytes) {}

ShmLink::~ShmLink() {
  hang_up();
  ::munmap(mem_, ShmLayout(setup_).bytes);
}

void ShmLink::hang_up() {
  if (fd_ < 0) return;
  ::shutdown(fd_, SHUT_RDWR);  // a poll that the kernel has not yet taken back holds the socket
  ::close(fd_);
  fd_ = -1;
}

ShmStream::ShmStream(Uring& uring, std::unique_ptr<ShmLink> link, bool server)
    : uring_(uring), link_(std::move(link)), server_(server) {
  const ShmSetup& s = link_->setup();
  const ShmLayout at(s);
  uint8_t* mem = link_->mem();
  auto* words = reinterpret_cast<ShmWords*>(mem);
  arena_ = mem + at.arena;
  const ShmProducer requests(&words[0], mem + at.requests, s.slots, s.request_bytes);
  const ShmProducer results(&words[1], mem + at.results, s.slots, s.result_bytes);
  out_ = server ? results : requests;
  in_ = server ? ShmConsumer(&words[0], mem + at.requests, s.slots, s.request_bytes)
               : ShmConsumer(&words[1], mem + at.results, s.slots, s.result_bytes);
  copy_.reset(new uint8_t[in_.slot_bytes()]);
  nop_.done = on_called;
  nop_.owner = this;
  heard_ns_ = monotonic_ns();
}

ShmStream::~ShmStream() {
  KVFS_CHECK(!calling_);
  if (poll_ >= 0) uring_.remove_poll(poll_);
}

void ShmStream::start() {
  poll_ = uring_.add_poll(link_->fd(), on_poll, this);
  if (poll_ < 0) return fail(poll_);
  call_back();  // what came before
}

void ShmStream::on_poll(void* self, uint32_t) { static_cast<ShmStream*>(self)->turn(); }

void ShmStream::on_called(NetIo* io) {
  auto* self = static_cast<ShmStream*>(io->owner);
  self->calling_ = false;
  self->turn();
}

void ShmStream::call_back() {
  if (calling_ || ended_) return;
  calling_ = true;
  uring_.submit(&nop_);
}

void ShmStream::fail(int err) {
  if (err_ == 0) err_ = err;
  call_back();
}

void ShmStream::turn() {
  if (ended_ || in_turn_) return;
  in_turn_ = true;
  listen();
  take_frames();
  if (err_ == 0) on_turn();
  post();
  in_turn_ = false;
  if (err_ != 0) end();
}

// Bells say nothing but that there may be something.
void ShmStream::listen() {
  uint8_t byte;
  for (uint32_t n = 0; !hung_up_; ++n) {
    if (n == kBells) return call_back();
    const ssize_t got = ::recv(link_->fd(), &byte, sizeof byte, MSG_DONTWAIT);
    if (got > 0 || (got < 0 && errno == EINTR)) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    hung_up_ = true;
  }
}

void ShmStream::take_frames() {
  bool any = false;
  for (uint32_t n = 0; err_ == 0; ++n) {
    if (n == kBudget) {
      call_back();
      break;
    }
    int err = 0;
    const uint8_t* slot = in_.front(&err);
    if (slot == nullptr && err == 0) {
      // What was published before the end counts: the end was seen before the ring was found empty.
      if (hung_up_)
        err = -ECONNRESET;
      else if (in_.arm())
        break;
      else
        continue;
    }
    wire::FrameHeader h;
    if (err == 0) {
      std::memcpy(&h, slot, sizeof h);
      err = wire::check_header(h, server_);
    }
    const uint32_t body = err == 0 ? wire::body_bytes(h) : 0;
    if (err == 0 && (h.payload != 0 || body > in_.slot_bytes() - kHeader)) err = -EPROTO;
    if (err == 0) {
      std::memcpy(copy_.get(), slot + kHeader, body);
      in_.pop();
      any = true;
      ++counters_.frames_in;
      err = wire::check_sum(h, copy_.get());
    }
    if (err == 0) err = on_frame(h, copy_.get());
    if (err != 0 && err_ == 0) err_ = err;
  }
  if (!any) return;
  heard_ns_ = monotonic_ns();
  if (in_.wanted()) bell();
}

void ShmStream::bell() {
  const uint8_t byte = 0;
  ++counters_.calls;
  // EAGAIN: it has not heard earlier ones yet. Other errors: the end, which comes as one of the socket.
  (void)!::send(link_->fd(), &byte, sizeof byte, MSG_DONTWAIT | MSG_NOSIGNAL);
}

uint8_t* ShmStream::body(uint32_t* room) {
  int err = 0;
  slot_ = err_ == 0 && !ended_ ? out_.next(&err) : nullptr;
  if (err != 0) fail(err);
  *room = out_.slot_bytes() - kHeader;
  return slot_ != nullptr ? slot_ + kHeader : nullptr;
}

// The body is where the peer can write, too: a sum of what it changes meanwhile is its own problem.
void ShmStream::send(wire::Type type, uint32_t count, uint64_t batch, uint32_t map_version) {
  KVFS_CHECK(slot_ != nullptr);
  wire::FrameHeader h{};
  h.magic = wire::kFrameMagic;
  h.type = uint8_t(type);
  h.count = uint16_t(count);
  h.map_version = map_version;
  h.batch = batch;
  wire::seal(&h, slot_ + kHeader);
  std::memcpy(slot_, &h, sizeof h);
  out_.push();
  slot_ = nullptr;
  sent_ = true;
  ++counters_.frames_out;
}

bool ShmStream::control(wire::Type type, uint64_t number) {
  uint32_t room;
  if (body(&room) == nullptr) return false;
  send(type, 0, number, 0);
  return true;
}

void ShmStream::post() {
  if (std::exchange(sent_, false) && !ended_ && out_.asleep()) bell();
}

void ShmStream::end() {
  const int err = err_;
  if (server_ && err != 0 && !hung_up_) {
    int full = 0;
    slot_ = out_.next(&full);
    if (slot_ != nullptr) send(wire::Type::Bye, 0, err == -ESHUTDOWN ? 0 : uint64_t(-err), 0);
    post();
  }
  ended_ = true;
  if (poll_ >= 0) uring_.remove_poll(std::exchange(poll_, -1));
  link_->hang_up();
  on_ended(err);
}

}  // namespace kvfs
