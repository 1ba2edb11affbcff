// fuzz_fuse_channel.cpp plays both the kernel and the daemon's libfuse towards a FuseChannel on a reactor with a store in
// memory: whatever they send, in whatever order they read, close or are closed, every well-formed request ends once, as an
// answer or with the daemon, and the channel ends.
//
// Input: steps of one byte that says what to do, one with details, one with a length, then that many bytes.
#include <linux/fuse.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "../server/fuse_channel.h"
#include "../store/check.h"
#include "../tests/sim_device.h"

namespace kvfs {
namespace {

constexpr uint64_t kOpen = 2, kClosed = 3, kView = KVFS_VIEW_INO | 4;
constexpr int kRoom = 8 << 20;
constexpr unsigned kMaxSteps = 512;
constexpr unsigned kMaxTurns = 20000;

// Made once: inputs differ in what they find stored, which decides nothing.
struct World {
  SimDevice dev;
  std::unique_ptr<Store> store;
  std::unique_ptr<Uring> uring;
  std::string room;
  World() : dev(options()), room(2 << 20, '\0') {
    FormatOptions f;
    f.segment_bytes = 1 << 20;
    f.journal_bytes = 4 << 20;
    KVFS_CHECK(Store::format(dev, f).err == 0);
    StoreOptions o;
    o.memory_bytes = 0;
    KVFS_CHECK(Store::open(dev, o, &store).err == 0);
    KVFS_CHECK(Uring::create(UringOptions{}, &uring).err == 0);
  }
  static SimOptions options() {
    SimOptions o;
    o.record = false;
    return o;
  }
};

World& world() {
  static World w;
  return w;
}

template <typename T>
void append(std::string* s, const T& v) {
  s->append(reinterpret_cast<const char*>(&v), sizeof v);
}

class Run {
 public:
  Run(const uint8_t* data, size_t size) : data_(data), size_(size) {
    inodes_.open(kOpen, 100000);
    int k[2], d[2];
    KVFS_CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, k) == 0);
    KVFS_CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, d) == 0);
    int room = kRoom;
    counted_ = setsockopt(k[0], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) == 0 &&
               setsockopt(k[1], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) == 0;
    room = size > 0 && (data[0] & 1) != 0 ? 40 << 10 : 200 << 10;
    setsockopt(d[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    kernel_ = k[0];
    daemon_ = d[0];
    channel_ = std::make_unique<FuseChannel>(k[1], d[1], &reactor_, world().uring.get(), &inodes_, &upcalls_);
  }
  ~Run() {
    if (kernel_ >= 0) close(kernel_);
    if (daemon_ >= 0) close(daemon_);
  }
  void run() {
    KVFS_CHECK(reactor_.init().err == 0);
    reactor_.post([this] {
      KVFS_CHECK(channel_->init().err == 0);
      reactor_.set_fuse(channel_.get());
      step();
    });
    reactor_.run();
  }

 private:
  uint8_t byte() {
    if (size_ == 0) return 0;
    --size_;
    return *data_++;
  }
  std::string take(size_t n) {
    n = n < size_ ? n : size_;
    std::string s(reinterpret_cast<const char*>(data_), n);
    data_ += n;
    size_ -= n;
    return s;
  }

  // One per turn of the reactor, which it keeps from sleeping.
  void step() {
    KVFS_CHECK(++turns_ < kMaxTurns);  // a hang
    world().uring->submit_and_wait(0);
    listen(kernel_, true);
    if (!deaf_) listen(daemon_, false);
    if (size_ > 0 && ++steps_ < kMaxSteps) {
      while (size_ > 0 && act()) {
      }
    } else if (quiet_ < 8) {
      deaf_ = false;
      ++quiet_;
    } else if (!ending_) {
      // A request is answered, or the daemon has it.
      if (counted_ && kernel_ >= 0 && daemon_ >= 0 && channel_->idle())
        KVFS_CHECK(answers_ + passed_ + dropped_ == asked_ + relayed_);
      ending_ = true;
      reactor_.close_fuse([this] { ended_ = true; });
    } else if (!ended_ || !reactor_.write_back().empty()) {
      reactor_.closed(kOpen);  // what was written goes to the store, while there are turns that poll the device
    } else if (world().dev.inflight() == 0) {
      channel_.reset();
      return reactor_.stop();
    }
    reactor_.post([this] { step(); });
  }
  // True: another message in the same turn.
  bool act() {
    const uint8_t what = byte(), how = byte();
    const std::string body = take(byte());
    switch (what & 7) {
      case 0:
      case 1:
      case 2:
        ask(what >> 3, how, body);
        break;
      case 3: {  // as it comes
        counted_ = false;
        if (kernel_ >= 0) (void)!send(kernel_, body.data(), body.size(), MSG_NOSIGNAL);
        break;
      }
      case 4: {  // an answer
        fuse_out_header out{};
        out.len = uint32_t(sizeof out + body.size());
        out.error = how & 1 ? -int(how) : 0;
        out.unique = how & 2 ? init_ : how & 4 ? 0 : how;
        std::string m;
        append(&m, out);
        say(m + body, out.unique);
        break;
      }
      case 5: {
        uint64_t unique = 0;
        if (body.size() >= sizeof(fuse_out_header))
          memcpy(&unique, body.data() + offsetof(fuse_out_header, unique), sizeof unique);
        if (!body.empty()) say(body, unique);
        break;
      }
      case 6:
        deaf_ = (how & 1) != 0;
        if ((how & 2) != 0) inodes_.find(kOpen)->no_capability.store((how & 4) != 0);
        if ((how & 8) != 0) inodes_.find(kOpen)->written_ns.store(0);
        break;
      case 7:
        if (how == 1 && daemon_ >= 0) close(std::exchange(daemon_, -1));
        if (how == 2 && kernel_ >= 0) close(std::exchange(kernel_, -1));
        break;
    }
    return (how & 0x80) != 0;
  }

  void ask(unsigned opcode, uint8_t how, std::string body) {
    constexpr uint32_t kOpcodes[] = {FUSE_READ,   FUSE_WRITE,     FUSE_FLUSH,        FUSE_GETXATTR, FUSE_FORGET,
                                     FUSE_LOOKUP, FUSE_INTERRUPT, FUSE_BATCH_FORGET, FUSE_INIT,     FUSE_SETXATTR};
    constexpr uint64_t kNodes[] = {kOpen, kOpen, kClosed, kView};
    fuse_in_header in{};
    in.opcode = kOpcodes[opcode % std::size(kOpcodes)];
    in.unique = ++unique_;
    in.nodeid = kNodes[how & 3];
    std::string m;
    if (in.opcode == FUSE_READ) {
      fuse_read_in r{};
      memcpy(&r, body.data(), body.size() < sizeof r ? body.size() : sizeof r);
      r.size %= 20000;
      if ((how & 4) == 0) r.offset %= 1 << 20;
      body.clear();
      append(&body, r);
    } else if (in.opcode == FUSE_WRITE) {
      fuse_write_in w{};
      memcpy(&w, body.data(), body.size() < sizeof w ? body.size() : sizeof w);
      if ((how & 8) != 0) body.resize(body.size() + 8000);
      w.size = uint32_t(body.size());
      w.offset = (how & 4) == 0 ? w.offset % (1 << 20) : INT64_MAX - w.offset % 1000;
      std::string head;
      append(&head, w);
      body = head + body;
    } else if (in.opcode == FUSE_GETXATTR && (how & 4) != 0) {
      body.resize(sizeof(fuse_getxattr_in));
      body.append("security.capability", 20);
    } else if ((how & 8) != 0) {
      body.resize(body.size() + 3000);
    }
    in.len = uint32_t(sizeof in + body.size());
    append(&m, in);
    m += body;
    if (kernel_ < 0 || send(kernel_, m.data(), m.size(), MSG_NOSIGNAL) != ssize_t(m.size())) return;
    if (in.opcode == FUSE_INIT) init_ = in.unique;
    ++asked_;
    if (in.opcode == FUSE_INTERRUPT) ++dropped_;
    if (in.opcode == FUSE_FORGET && in.nodeid != kView) ++dropped_;
    if (in.opcode == FUSE_BATCH_FORGET) counted_ = false;  // where it ends is for its body to say
  }
  void say(const std::string& m, uint64_t unique) {
    if (daemon_ < 0 || send(daemon_, m.data(), m.size(), MSG_NOSIGNAL) != ssize_t(m.size())) return;
    if (m.size() >= sizeof(fuse_out_header) && unique != 0) ++relayed_;
  }
  void listen(int fd, bool kernel) {
    std::string& room = world().room;
    for (;;) {
      const ssize_t n = fd >= 0 ? recv(fd, room.data(), room.size(), 0) : -1;
      if (n <= 0) return;
      quiet_ = 0;
      ++(kernel ? answers_ : passed_);
    }
  }

  const uint8_t* data_;
  size_t size_;
  InodeTable inodes_;
  Upcalls upcalls_;
  Reactor reactor_{world().uring.get(), &world().dev, world().store.get(), &inodes_, &upcalls_};
  std::unique_ptr<FuseChannel> channel_;
  int kernel_ = -1, daemon_ = -1;
  bool counted_ = false, deaf_ = false, ending_ = false, ended_ = false;
  unsigned steps_ = 0, turns_ = 0, quiet_ = 0;
  uint64_t unique_ = 0, init_ = 0, asked_ = 0, answers_ = 0, passed_ = 0, dropped_ = 0, relayed_ = 0;
};

}  // namespace
}  // namespace kvfs

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvfs::Run run(data, size);
  run.run();
  return 0;
}
