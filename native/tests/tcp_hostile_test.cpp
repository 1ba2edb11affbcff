// tcp_hostile_test.cpp: TCP channels whose peer or path is not what it should be: bytes that change on the way, servers and
// clients that say what they must not. Damage is noticed, everything comes back once, and only the channel is lost.
#include <gtest/gtest.h>

#include <functional>

#include "../transport/tcp_client.h"
#include "../transport/tcp_server.h"
#include "channel_pair.h"

namespace kvfs {
namespace {

using wire::FrameHeader;
using wire::Op;
using wire::Result;
using wire::Type;

class TcpHostile : public HostileChannel<TcpClientChannel, TcpServerChannel> {
 protected:
  void TearDown() override {
    if (raw_ >= 0) ::close(raw_);
    HostileChannel::TearDown();
  }
  void open_client() {
    int fd[2];
    tcp_pair(fd);
    raw_ = fd[0];
    client_ = std::make_unique<TcpClientChannel>(*ring_, fd[1], ChannelLimits{});
  }
  void open_server(const TcpServerLimits& limits = {}) {
    int fd[2];
    tcp_pair(fd);
    raw_ = fd[1];
    server_ = std::make_unique<TcpServerChannel>(*ring_, fd[0], handler_, limits);
    server_->start();
  }
  Call* call(Op op, uint64_t key, uint32_t len) {
    calls_.push_back(std::make_unique<Call>(op, key, len));
    client_->submit(&calls_.back()->op);
    return calls_.back().get();
  }
  void send_raw(const void* p, size_t n) { ASSERT_EQ(::send(raw_, p, n, MSG_NOSIGNAL), static_cast<ssize_t>(n)); }
  static Bytes frame(FrameHeader h, const Bytes& body, const Bytes& payload = {}) {
    h.magic = wire::kFrameMagic;
    wire::seal(&h, body.data());
    Bytes b(sizeof h);
    std::memcpy(b.data(), &h, sizeof h);
    b.insert(b.end(), body.begin(), body.end());
    b.insert(b.end(), payload.begin(), payload.end());
    return b;
  }
  static FrameHeader header(Type type, size_t count, uint64_t payload, uint64_t batch) {
    FrameHeader h{};
    h.type = uint8_t(type);
    h.count = static_cast<uint16_t>(count);
    h.payload = payload;
    h.batch = batch;
    return h;
  }
  template <typename T>
  static Bytes records(const std::vector<T>& v) {
    Bytes b(v.size() * sizeof(T));
    std::memcpy(b.data(), v.data(), b.size());
    return b;
  }
  // The batch of the frame that the client has sent.
  uint64_t sent_batch() {
    client_->flush(1);
    FrameHeader h{};
    for (int i = 0; i < 100; ++i) {
      turn();
      if (::recv(raw_, &h, sizeof h, MSG_DONTWAIT | MSG_PEEK) == ssize_t{sizeof h}) return h.batch;
    }
    ADD_FAILURE() << "no frame";
    return 0;
  }

  int raw_ = -1;
};

// One exchange through a middleman that changes one byte: the `at`th of one direction.
struct Middleman {
  int a, b;
  size_t at;
  size_t seen = 0;
  void pass(uint8_t mask) {
    uint8_t buf[4096];
    const ssize_t n = ::recv(a, buf, sizeof buf, MSG_DONTWAIT);
    if (n == 0) ::shutdown(b, SHUT_WR);
    if (n <= 0) return;
    if (at >= seen && at < seen + static_cast<size_t>(n)) buf[at - seen] ^= mask;
    seen += static_cast<size_t>(n);
    [[maybe_unused]] const ssize_t sent = ::send(b, buf, static_cast<size_t>(n), MSG_NOSIGNAL);
  }
};

TEST_F(TcpHostile, NoChangedByteIsEverTakenForData) {
  constexpr uint32_t kLen = 300;
  const size_t kOut = sizeof(FrameHeader) + 2 * sizeof(wire::Desc) + kLen;
  const size_t kIn = sizeof(FrameHeader) + 2 * sizeof(Result) + kLen;
  size_t broken = 0, damaged = 0;
  for (size_t pos = 0; pos < kOut + kIn; ++pos) {
    int c[2], s[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, c), 0);
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, s), 0);
    Middleman there{c[1], s[1], pos < kOut ? pos : SIZE_MAX}, back{s[1], c[1], pos < kOut ? SIZE_MAX : pos - kOut};
    const auto mask = static_cast<uint8_t>(1u << pos % 8);
    MapHandler h;
    Call get(Op::Get, 1, kLen), put(Op::Put, 2, kLen);
    h.chunks[chunk_name(get.op.desc)] = pattern(1, kLen);
    std::memcpy(put.mem.get(), pattern(2, kLen).data(), kLen);
    TcpClientChannel client(*ring_, c[0], ChannelLimits{});
    TcpServerChannel server(*ring_, s[0], h, TcpServerLimits{});
    server.start();
    client.submit(&get.op);
    client.submit(&put.op);
    client.flush(1);
    for (int i = 0; i < 40 && !(get.ended() && put.ended()); ++i) {
      ring_->submit_and_wait(i < 12 ? 0 : 500'000);
      there.pass(mask);
      h.answer(&server);
      back.pass(mask);
    }
    client.close();
    server.close();
    for (int i = 0; i < 1000 && !(client.closed() && server.closed()); ++i) {
      ring_->submit_and_wait(1'000'000);
      h.answer(&server);
    }
    ASSERT_TRUE(client.closed() && server.closed());
    ASSERT_EQ(get.back, 1u);
    ASSERT_EQ(put.back, 1u);
    if (get.op.answered) {
      ASSERT_EQ(get.op.result, kLen) << pos;
      ASSERT_EQ(std::memcmp(get.mem.get(), pattern(1, kLen).data(), kLen), 0) << pos;
    }
    ASSERT_TRUE(!put.op.answered || put.op.result == 1 || put.op.result == -EBADMSG) << pos;
    for (const auto& [name, bytes] : h.chunks)
      ASSERT_TRUE(bytes == pattern(1, kLen) || (name == chunk_name(put.op.desc) && bytes == pattern(2, kLen))) << pos;
    const bool hurt = !get.op.answered || !put.op.answered;
    broken += hurt ? 1 : 0;
    damaged += put.op.answered && put.op.result == -EBADMSG ? 1 : 0;
    ASSERT_TRUE(hurt || (put.op.answered && put.op.result == -EBADMSG)) << "nobody noticed byte " << pos;
    ::close(c[1]);
    ::close(s[1]);
  }
  EXPECT_EQ(damaged, size_t{kLen}) << "each byte of the put's payload, and only the put is lost";
  EXPECT_EQ(broken, kOut + kIn - kLen);
}

TEST_F(TcpHostile, AnAnswerThatCannotBeEndsTheChannelAndTouchesNothing) {
  const auto result = [](uint16_t index, uint32_t len, int64_t r) { return Result{index, 0, len, r, 0}; };
  struct Case {
    const char* what;
    std::vector<Result> results;
    uint64_t payload;
    int64_t batch_off;
  };
  const std::vector<Case> cases = {
      {"a batch that was never sent", {result(0, 0, -ENOENT)}, 0, 65536},
      {"another slot", {result(0, 0, -ENOENT)}, 0, 1},
      {"an index beyond the batch", {result(2, 0, -ENOENT)}, 0, 0},
      {"one operation twice", {result(0, 0, -ENOENT), result(0, 0, -ENOENT)}, 0, 0},
      {"one operation twice, with payload", {result(0, 10, 10), result(0, 10, 10)}, 20, 0},
      {"more than was asked for", {result(0, 4097, 4097)}, 4097, 0},
      {"a length that is not the result", {result(0, 100, 99)}, 100, 0},
      {"payload with an error", {result(0, 100, -ENOENT)}, 100, 0},
      {"payload for an operation without", {result(1, 100, 100)}, 100, 0},
      {"a result without its payload", {result(0, 0, 4096)}, 0, 0},
      {"a total that is less", {result(0, 4096, 4096)}, 4095, 0},
      {"a total that is more", {result(0, 4096, 4096)}, 5000, 0},
      {"an errno that is none", {result(0, 0, -5000)}, 0, 0},
      {"a put that wrote two", {result(1, 0, 2)}, 0, 0},
  };
  for (const Case& k : cases) {
    SCOPED_TRACE(k.what);
    open_client();
    Call* get = call(Op::Get, 1, 4096);
    Call* put = call(Op::Put, 2, 64);
    const uint64_t batch = sent_batch() + static_cast<uint64_t>(k.batch_off);
    const Bytes f =
        frame(header(Type::Response, k.results.size(), k.payload, batch), records(k.results), Bytes(k.payload, 0x11));
    send_raw(f.data(), f.size());
    until([&] { return client_->ops_inflight() == 0; });
    EXPECT_EQ(client_->error(), -EPROTO);
    EXPECT_TRUE(get->ended() && put->ended());
    for (uint32_t i = 0; i < 4096; ++i) ASSERT_EQ(get->mem[i], 0xa5);
    until([&] { return client_->closed(); });
    ASSERT_TRUE(client_->closed());
    ::close(raw_);
    raw_ = -1;
  }
}

TEST_F(TcpHostile, AFrameThatOnlyAClientSendsEndsTheClientsChannel) {
  for (const Type t : {Type::Request, Type::Ping, Type::Cancel, Type::Pong}) {
    open_client();
    const Bytes body(t == Type::Request ? sizeof(wire::Desc) : 0);
    const Bytes f = frame(header(t, t == Type::Request ? 1 : 0, 0, 77), body);
    send_raw(f.data(), f.size());
    until([&] { return client_->error() != 0; });
    EXPECT_EQ(client_->error(), -EPROTO);
    until([&] { return client_->closed(); });
    ::close(raw_);
    raw_ = -1;
  }
}

TEST_F(TcpHostile, AServersByeSaysWhy) {
  open_client();
  Call* get = call(Op::Get, 1, 4096);
  sent_batch();
  const Bytes f = frame(header(Type::Bye, 0, 0, ESHUTDOWN), {});
  send_raw(f.data(), f.size());
  until([&] { return client_->error() != 0; });
  EXPECT_EQ(client_->error(), -ESHUTDOWN);
  until([&] { return get->ended(); });
  EXPECT_EQ(get->op.result, -ESHUTDOWN);
}

TEST_F(TcpHostile, AWrongSumOfDataConcernsItsOperationAlone) {
  open_client();
  Call* get = call(Op::Get, 1, 4096);
  Call* good = call(Op::Get, 2, 64);
  const uint64_t batch = sent_batch();
  const Bytes fine = pattern(5, 64);
  const std::vector<Result> rs = {{0, 0, 4096, 4096, 12345}, {1, 0, 64, 64, wire::data_sum(fine.data(), 64)}};
  Bytes payload(4096, 1);
  payload.insert(payload.end(), fine.begin(), fine.end());
  const Bytes f = frame(header(Type::Response, 2, payload.size(), batch), records(rs), payload);
  send_raw(f.data(), f.size());
  until([&] { return client_->ops_inflight() == 0; });
  EXPECT_FALSE(get->op.answered);
  EXPECT_EQ(get->op.result, -EBADMSG);
  EXPECT_TRUE(good->op.answered && good->op.result == 64);
  EXPECT_EQ(client_->error(), 0);
}

TEST_F(TcpHostile, ARequestThatCannotBeIsAnsweredAndOneThatBreaksTheLimitsEndsTheChannel) {
  open_server();
  Call bad(Op::Put, 1, 1000);
  bad.op.desc.off = 7;
  Call unknown(Op::Sync);
  unknown.op.desc.op = 99;
  Call rdma(Op::Get, 1, 100);
  rdma.op.desc.addr = 4096;
  Call damaged(Op::Put, 2, 100);
  damaged.op.desc.sum = 1;
  const std::vector<wire::Desc> ds = {bad.op.desc, unknown.op.desc, rdma.op.desc, damaged.op.desc};
  const Bytes f = frame(header(Type::Request, 4, 1100, 1), records(ds), Bytes(1100, 9));
  send_raw(f.data(), f.size());
  until([&] { return handler_.released_ops >= 4; });
  EXPECT_EQ(handler_.errors, (std::vector<int>{-EOPNOTSUPP, -EINVAL, -EINVAL, -EBADMSG}));
  EXPECT_TRUE(handler_.chunks.empty());
  EXPECT_EQ(handler_.ended_times, 0u);
  const Bytes wrong = frame(header(Type::Request, 1, 999, 2), records(std::vector<wire::Desc>{bad.op.desc}));
  send_raw(wrong.data(), wrong.size());
  until([&] { return handler_.ended_times != 0; });
  EXPECT_EQ(handler_.ended_with, -EPROTO);
}

TEST_F(TcpHostile, MoreThanTheSessionMayAskForEndsTheChannelWithABye) {
  for (const bool bytes : {false, true}) {
    TcpServerLimits limits;
    limits.max_ops = 3;
    limits.max_in = 5000;
    MapHandler h;
    h.hold = true;
    int fd[2];
    tcp_pair(fd);
    TcpServerChannel server(*ring_, fd[0], h, limits);
    server.start();
    Call c(bytes ? Op::Put : Op::Sync, 1, bytes ? 2000 : 0);
    const std::vector<wire::Desc> two = {c.op.desc, c.op.desc};
    const size_t payload = bytes ? 4000 : 0;
    for (uint64_t batch = 1; batch <= 2; ++batch) {
      const Bytes f = frame(header(Type::Request, 2, payload, batch), records(two), Bytes(payload));
      ASSERT_EQ(::send(fd[1], f.data(), f.size(), 0), static_cast<ssize_t>(f.size()));
    }
    for (int i = 0; i < 1000 && h.ended_times == 0; ++i) ring_->submit_and_wait(1'000'000);
    EXPECT_EQ(h.ended_with, -EPROTO);
    EXPECT_EQ(h.taken, 2u);
    EXPECT_FALSE(server.closed());
    h.hold = false;
    h.answer(&server);
    for (int i = 0; i < 1000 && !server.closed(); ++i) ring_->submit_and_wait(1'000'000);
    EXPECT_TRUE(server.closed());
    EXPECT_EQ(h.out, 0u);
    ::close(fd[1]);
  }
}

TEST_F(TcpHostile, GarbageFramesOfAServerAndHalfFramesEndTheServersChannel) {
  const std::vector<std::function<Bytes()>> cases = {
      [] { return Bytes(48, 0xff); },
      [] { return frame(header(Type::Response, 1, 0, 1), Bytes(sizeof(Result))); },
      [] { return frame(header(Type::Pong, 0, 0, 1), {}); },
      [] { return frame(header(Type::Request, 0, 0, 1), {}); },
      [] {
        Bytes b = frame(header(Type::Ping, 0, 0, 1), {});
        b[40] ^= 1;
        return b;
      },
      [] {
        FrameHeader h = header(Type::Request, 256, 0, 1);
        Bytes b = frame(h, Bytes(256 * sizeof(wire::Desc)));
        b.resize(100);
        return b;
      },
  };
  for (size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    MapHandler h;
    int fd[2];
    tcp_pair(fd);
    TcpServerChannel server(*ring_, fd[0], h, TcpServerLimits{});
    server.start();
    const Bytes b = cases[i]();
    ASSERT_EQ(::send(fd[1], b.data(), b.size(), 0), static_cast<ssize_t>(b.size()));
    ::shutdown(fd[1], SHUT_WR);
    for (int t = 0; t < 1000 && !server.closed(); ++t) ring_->submit_and_wait(1'000'000);
    EXPECT_TRUE(server.closed());
    EXPECT_LT(h.ended_with, 0);
    EXPECT_EQ(h.taken, 0u);
    ::close(fd[1]);
  }
}

}  // namespace
}  // namespace kvfs
