// fuzz_tcp_client.cpp plays a server towards a TcpClientChannel, and the owner of its operations: whatever is answered,
// cancelled or closed, in whatever order, every operation comes back once, its memory is not touched afterwards, and with
// checksums no byte is accepted that was not meant.
//
// Input: steps of one byte that says what to do and what that takes.
#include "../tests/channel_fixture.h"
#include "../transport/tcp_client.h"

namespace kvfs {
namespace {

constexpr unsigned kMaxSteps = 128;
constexpr size_t kMaxCalls = 64;
constexpr uint8_t kMeant = 0x11, kPoison = 0x77;

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
    ChannelLimits limits;
    limits.max_batch = 1 + how % 16;
    sums_ = (how & 0x80) != 0;
    limits.features = sums_ ? wire::kFeatures : 0;
    TcpClientChannel client(ring(), fd[0], limits);
    client_ = &client;
    for (unsigned i = 0; i < kMaxSteps && n_ > 0; ++i) step();
    client.close();
    for (unsigned i = 0; !client.closed(); ++i) {
      KVFS_CHECK(i < 2000);
      KVFS_CHECK(ring().submit_and_wait(1'000'000) >= 0);
    }
    KVFS_CHECK(client.ops_inflight() == 0 && client.bytes_inflight() == 0);
    for (const auto& c : calls_) {
      KVFS_CHECK(c->back == 1);
      if (c->mem != nullptr)
        for (uint32_t i = 0; i < c->op.desc.len; ++i) KVFS_CHECK(c->mem[i] == kPoison);
    }
    ::close(raw_);
  }

 private:
  uint8_t byte() {
    if (n_ == 0) return 0;
    --n_;
    return *p_++;
  }
  void put(const void* p, size_t n) {
    [[maybe_unused]] const ssize_t sent = ::send(raw_, p, n, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  static void ended(Call* c) {
    auto* self = static_cast<Run*>(c->arg);
    KVFS_CHECK(!(c->op.answered && c->op.cancelled));
    if (self->sums_ && c->op.answered && wire::has_out(wire::Op{c->op.desc.op}))
      for (int64_t i = 0; i < c->op.result; ++i) KVFS_CHECK(c->mem[static_cast<size_t>(i)] == kMeant);
    if (c->mem != nullptr) std::memset(c->mem.get(), kPoison, c->op.desc.len);
    if ((self->in_done_ & 1) != 0) self->submit();
    if ((self->in_done_ & 2) != 0) self->cancel(self->in_done_ >> 2);
    if (self->in_done_ == 0xff) self->client_->close();
  }
  void submit() {
    if (calls_.size() >= kMaxCalls) return;
    const uint8_t what = byte();
    const wire::Op op{static_cast<uint8_t>(1 + what % wire::kOpMax)};
    uint32_t len = wire::has_in(op) || wire::has_out(op) ? 1 + byte() * 64u : 0;
    if (op == wire::Op::Stat) len = sizeof(wire::TargetStat);
    calls_.push_back(std::make_unique<Call>(op, what, len));
    Call* c = calls_.back().get();
    c->then = ended;
    c->arg = this;
    client_->submit(&c->op);
  }
  void cancel(size_t which) {
    if (calls_.empty()) return;
    Call* c = calls_[which % calls_.size()].get();
    if (!c->ended()) client_->cancel(&c->op);
  }
  // An answer for what is known of the batches that are out.
  void answer() {
    wire::FrameHeader h{};
    h.magic = wire::kFrameMagic;
    h.type = uint8_t(wire::Type::Response);
    std::vector<Call*> out;
    const uint8_t which = byte();
    for (const auto& c : calls_)
      if (!c->ended() && c->op.batch != 0) out.push_back(c.get());
    if (!out.empty()) h.batch = out[which % out.size()]->op.batch;
    const unsigned n = 1 + byte() % 8;
    Bytes body, payload;
    unsigned count = 0;
    for (Call* c : out) {
      if (c->op.batch != h.batch || count == n) continue;
      const uint8_t how = byte();
      wire::Result r{};
      r.index = static_cast<uint16_t>(c->op.index);
      if (wire::has_out(wire::Op{c->op.desc.op}) && (how & 1) != 0) r.len = c->op.desc.len;
      if (wire::Op{c->op.desc.op} == wire::Op::Scan) r.len = r.len / 64 * 64;
      r.result = r.len != 0 ? r.len : (how & 2) != 0 ? -ENOENT : 0;
      const Bytes data(r.len, (how & 4) != 0 && sums_ ? kMeant + 1 : kMeant);
      const Bytes meant(r.len, kMeant);
      r.sum = wire::data_sum(meant.data(), meant.size());
      if ((how & 0xe0) == 0xe0) {  // a field is something else
        const uint8_t at = byte();
        reinterpret_cast<uint8_t*>(&r)[at % sizeof r] ^= byte();
      }
      payload.insert(payload.end(), data.begin(), data.end());
      const auto* p = reinterpret_cast<const uint8_t*>(&r);
      body.insert(body.end(), p, p + sizeof r);
      ++count;
    }
    h.count = static_cast<uint16_t>(count);
    h.payload = payload.size();
    const uint8_t damage = byte();
    if (damage == 1) h.payload += byte();
    if (damage == 2) h.batch += byte();
    if (damage == 5) {
      h = wire::FrameHeader{};
      h.magic = wire::kFrameMagic;
      h.type = byte();
      h.batch = byte();
      body.clear();
    }
    if (body.size() == wire::body_bytes(h)) wire::seal(&h, body.data());
    Bytes all(sizeof h);
    std::memcpy(all.data(), &h, sizeof h);
    all.insert(all.end(), body.begin(), body.end());
    all.insert(all.end(), payload.begin(), payload.end());
    size_t end = all.size();
    if (damage == 3) all[byte() % all.size()] ^= 1;
    if (damage == 4) end -= (byte() * 64u + byte()) % all.size();
    put(all.data(), end);
    rest_.assign(all.begin() + static_cast<long>(end), all.end());
  }
  void step() {
    switch (byte() % 12) {
      case 0:
      case 1:
        return submit();
      case 2:
        return client_->flush(byte() % 2);
      case 3:
        return cancel(byte());
      case 4:
      case 5:
        return answer();
      case 6:  // the rest of one that was cut off
        put(rest_.data(), rest_.size());
        rest_.clear();
        return;
      case 7: {
        static uint8_t sink[1u << 16];
        [[maybe_unused]] const ssize_t got = ::recv(raw_, sink, byte() * 256u, MSG_DONTWAIT);
        return;
      }
      case 8:
        in_done_ = byte();
        return;
      case 9:
        if (byte() == 7) client_->close();
        return client_->ping();
      default:
        KVFS_CHECK(ring().submit_and_wait(0) >= 0);
    }
  }

  const uint8_t* p_;
  size_t n_;
  int raw_ = -1;
  bool sums_ = false;
  uint8_t in_done_ = 0;
  TcpClientChannel* client_ = nullptr;
  Calls calls_;
  Bytes rest_;
};

}  // namespace
}  // namespace kvfs

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  kvfs::Run(data, size).run();
  return 0;
}
