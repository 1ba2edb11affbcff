// fuzz_tcp_server.cpp plays a client towards a TcpServerChannel: whatever it sends and reads, in whatever order, and whenever
// buffers are there, every operation that was taken is released once, all buffers come back, and the channel ends.
//
// Input: steps of one byte that says what to do and what that takes.
#include "../tests/channel_fixture.h"
#include "../transport/tcp_server.h"

namespace kvfs {
namespace {

constexpr unsigned kMaxSteps = 128;
constexpr uint32_t kMaxPayload = 64u << 10;  // that is made up for a frame

Uring& ring() {
  static std::unique_ptr<Uring> r = [] {
    std::unique_ptr<Uring> u;
    KVFS_CHECK(Uring::create(UringOptions{}, &u).err == 0);
    return u;
  }();
  return *r;
}

class Run {
 public:
  Run(const uint8_t* p, size_t n) : p_(p), n_(n) {}
  void run() {
    int fd[2];
    KVFS_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) == 0);
    raw_ = fd[1];
    const uint8_t how = byte();
    TcpServerLimits limits;
    limits.max_ops = 64;
    limits.max_in = 256u << 10;
    limits.features = (how & 1) != 0 ? wire::kFeatures : 0;
    handler_.features = limits.features;
    handler_.shuffle = (how & 2) != 0;
    TcpServerChannel server(ring(), fd[0], handler_, limits);
    server.start();
    for (unsigned i = 0; i < kMaxSteps && n_ > 0; ++i) step(&server);
    handler_.hold = false;
    handler_.answers = 256;
    handler_.room = UINT64_MAX;
    ::shutdown(raw_, SHUT_RDWR);
    for (unsigned i = 0; !server.closed(); ++i) {
      KVFS_CHECK(i < 2000);
      turn(&server, 1'000'000);
    }
    KVFS_CHECK(handler_.out == 0 && handler_.taken == handler_.released_ops && handler_.ended_times == 1);
    ::close(raw_);
  }

 private:
  uint8_t byte() {
    if (n_ == 0) return 0;
    --n_;
    return *p_++;
  }
  void bytes(void* to, size_t n) {
    std::memset(to, 0, n);
    const size_t k = std::min(n, n_);
    std::memcpy(to, p_, k);
    p_ += k;
    n_ -= k;
  }
  void put(const void* p, size_t n) {
    [[maybe_unused]] const ssize_t sent = ::send(raw_, p, n, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  void turn(TcpServerChannel* s, uint64_t wait_ns) {
    KVFS_CHECK(ring().submit_and_wait(wait_ns) >= 0);
    handler_.answer(s);
  }
  void frame(wire::Type type) {
    wire::FrameHeader h{};
    h.magic = wire::kFrameMagic;
    h.type = uint8_t(type);
    h.batch = byte();
    Bytes body, payload;
    if (type == wire::Type::Request) {
      const unsigned n = 1 + byte() % 16;
      h.map_version = byte();
      for (unsigned i = 0; i < n; ++i) {
        const uint8_t what = byte();
        const uint32_t len = byte() * 97u % kMaxPayload;
        Call c(wire::Op{static_cast<uint8_t>(1 + what % wire::kOpMax)}, what >> 4, len);
        if (what % wire::kOpMax == 10) c.op.desc.len = sizeof(wire::TargetStat);
        if ((what & 0x80) != 0) {  // a field is something else
          const uint8_t at = byte();
          reinterpret_cast<uint8_t*>(&c.op.desc)[at % sizeof c.op.desc] ^= byte();
        }
        const bool in = wire::has_in(wire::Op{c.op.desc.op});
        const size_t k = in ? std::min(c.op.desc.len, kMaxPayload) : 0;
        const Bytes data(k, what);
        if (in && c.op.desc.sum == 0) c.op.desc.sum = wire::data_sum(data.data(), k);
        payload.insert(payload.end(), data.begin(), data.end());
        const auto* d = reinterpret_cast<const uint8_t*>(&c.op.desc);
        body.insert(body.end(), d, d + sizeof c.op.desc);
      }
      h.count = static_cast<uint16_t>(n);
      h.payload = payload.size();
    }
    const uint8_t damage = byte();
    if (damage == 1) h.payload += byte();
    if (damage == 2) h.count = static_cast<uint16_t>(h.count + byte());
    Bytes all(sizeof h);
    if (body.size() == wire::body_bytes(h)) wire::seal(&h, body.data());
    std::memcpy(all.data(), &h, sizeof h);
    all.insert(all.end(), body.begin(), body.end());
    all.insert(all.end(), payload.begin(), payload.end());
    if (damage == 3) all[byte() % all.size()] ^= 1;
    if (damage == 4) all.resize(all.size() - byte() % all.size());
    put(all.data(), all.size());
  }
  void step(TcpServerChannel* s) {
    switch (byte() % 12) {
      case 0:
      case 1:
      case 2:
        return frame(wire::Type::Request);
      case 3:
        return frame(wire::Type::Cancel);
      case 4:
        return frame(wire::Type::Ping);
      case 5:
        return frame(wire::Type{byte()});
      case 6: {
        uint8_t raw[64];
        const size_t n = byte() % sizeof raw;
        bytes(raw, n);
        return put(raw, n);
      }
      case 7: {
        uint8_t sink[16384];
        [[maybe_unused]] const ssize_t got = ::recv(raw_, sink, sizeof sink, MSG_DONTWAIT);
        return;
      }
      case 8:
        handler_.hold = (byte() & 1) != 0;
        return;
      case 9:
        handler_.answers = byte();
        handler_.room = byte() * 1000u;
        return;
      case 10:
        if (byte() == 7) s->close();
        return;
      default:
        return turn(s, 0);
    }
  }

  const uint8_t* p_;
  size_t n_;
  int raw_ = -1;
  MapHandler handler_;
};

}  // namespace
}  // namespace kvfs

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvfs::Run(data, size).run();
  return 0;
}
