// A chunk server as strangers meet it, over real sockets: handshakes good and hostile, sessions, its end.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <cstdio>
#include <thread>

#include "../ffi/kvfs_net.h"
#include "../server/net_listener.h"
#include "../store/checksum.h"
#include "net_capability.h"
#include "node_fixture.h"

namespace kvfs::testing_net {
namespace {

constexpr wire::Grant kAll{wire::kAnyNamespace, wire::kBlocks | wire::kFiles, wire::kAllRights, 0, 0};

std::vector<uint8_t> make_map(uint32_t version) {
  wire::MapHeader h{};
  h.magic = wire::kMapMagic;
  h.format = wire::kMapFormat;
  h.map_version = version;
  h.slots = 1;
  h.targets = 1;
  wire::MapTarget t{};
  t.id = 1;
  t.endpoints = 1;
  t.endpoint[0].transport = uint8_t(wire::Transport::Tcp);
  t.endpoint[0].family = 4;
  t.endpoint[0].port = 1;
  std::vector<uint8_t> out(sizeof h + sizeof t + 2);
  std::memcpy(out.data(), &h, sizeof h);
  std::memcpy(out.data() + sizeof h, &t, sizeof t);
  h.sum = xxh3(out.data(), out.size());
  std::memcpy(out.data(), &h, sizeof h);
  return out;
}

// A socket and what is said on it, by hand. A ring that was closed a moment ago may still interrupt whoever made it (its
// clean-up is work for that thread), so every call here goes on after EINTR.
struct Socket {
  int fd = -1;
  Socket() = default;
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  Socket(Socket&& o) noexcept : fd(std::exchange(o.fd, -1)) {}
  ~Socket() {
    if (fd >= 0) close(fd);
  }
  bool open(int port) {
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in a{};
    a.sin_family = AF_INET;
    a.sin_port = htons(uint16_t(port));
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    // First connected, then limited: the kernel itself goes on with an interrupted connect() that has no time limit.
    if (fd < 0 || connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) != 0) {
      std::perror("connect");
      return false;
    }
    const timeval limit{20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return true;
  }
  bool say(const void* p, size_t n) {
    const auto* from = static_cast<const uint8_t*>(p);
    while (n != 0) {
      const ssize_t put = send(fd, from, n, MSG_NOSIGNAL);
      if (put < 0 && errno == EINTR) continue;
      if (put <= 0) return false;
      from += put;
      n -= size_t(put);
    }
    return true;
  }
  bool hear(void* p, size_t n) {
    auto* to = static_cast<uint8_t*>(p);
    while (n != 0) {
      const ssize_t got = recv(fd, to, n, 0);
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      to += got;
      n -= size_t(got);
    }
    return true;
  }
  // The peer has ended it, within ms.
  bool ends(int ms) {
    pollfd p{fd, POLLIN, 0};
    char c[256];
    for (;;) {
      const int ready = poll(&p, 1, ms);
      if (ready < 0 && errno == EINTR) continue;
      if (ready != 1) return false;
      const ssize_t got = recv(fd, c, sizeof c, MSG_DONTWAIT);
      if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) return true;
    }
  }
};

std::vector<uint8_t> hello_bytes(wire::Purpose purpose, const std::vector<uint8_t>& capability, const uint8_t* session,
                                 uint32_t target = 0) {
  wire::Hello h{};
  h.magic = wire::kHelloMagic;
  h.version = wire::kVersion;
  h.purpose = uint16_t(purpose);
  h.features = wire::kFeatures;
  h.target = target;
  h.capability_len = uint32_t(capability.size());
  if (session != nullptr) std::memcpy(h.session, session, sizeof h.session);
  wire::seal(&h, capability.data());
  std::vector<uint8_t> out(sizeof h + capability.size());
  std::memcpy(out.data(), &h, sizeof h);
  if (!capability.empty()) std::memcpy(out.data() + sizeof h, capability.data(), capability.size());
  return out;
}

class NetListenerTest : public NodeTest {
 protected:
  void SetUp() override {
    NodeTest::SetUp();
    cap_ = issuer_.make({kAll});
  }
  void TearDown() override {
    kvfs_server_stop(server_);
    NodeTest::TearDown();
  }
  void serve(bool checked = true, uint32_t keep_ms = 0, uint32_t max_sessions = 0) {
    char err[256] = "";
    const auto map = make_map(3);
    kvfs_server_config c{};
    c.targets = &node_;
    c.target_count = 1;
    c.auth_key = checked ? issuer_.key : nullptr;
    c.map = map.data();
    c.map_bytes = map.size();
    c.buffer_bytes = 64u << 20;
    c.keep_ms = keep_ms;
    c.max_sessions = max_sessions;
    c.data_sums = 1;
    ASSERT_EQ(kvfs_server_start(&c, &server_, err, sizeof err), 0) << err;
    port_ = kvfs_server_listen(server_, "tcp://127.0.0.1:0", err, sizeof err);
    ASSERT_GT(port_, 0) << err;
  }
  int greet(Socket* s, wire::Purpose p, const std::vector<uint8_t>& cap, wire::HelloReply* r,
            const uint8_t* session = nullptr, uint32_t target = 0) {
    if (!s->open(port_)) return -ECONNREFUSED;
    const auto h = hello_bytes(p, cap, session, target);
    if (!s->say(h.data(), h.size()) || !s->hear(r, sizeof *r)) return -EPIPE;
    map_.resize(r->map_len <= wire::kMaxMap ? r->map_len : 0);
    if (!map_.empty() && !s->hear(map_.data(), map_.size())) return -EPIPE;
    if (const int bad = wire::check_reply(*r, map_.data()); bad != 0) return bad;
    return r->err;
  }
  // One request and its answer.
  static int64_t ask(Socket* s, wire::Desc d, uint64_t batch, std::vector<uint8_t>* data, uint32_t map_version = 3) {
    wire::FrameHeader h{};
    h.magic = wire::kFrameMagic;
    h.type = uint8_t(wire::Type::Request);
    h.count = 1;
    h.batch = batch;
    h.map_version = map_version;
    const bool in = wire::has_in(wire::Op{d.op});
    if (in) {
      h.payload = data->size();
      d.sum = wire::data_sum(data->data(), data->size());
    }
    wire::seal(&h, &d);
    if (!s->say(&h, sizeof h) || !s->say(&d, sizeof d) || (in && !s->say(data->data(), data->size()))) return -EPIPE;
    wire::Result r;
    if (!s->hear(&h, sizeof h) || !s->hear(&r, sizeof r)) return -EPIPE;
    if (wire::check_header(h, false) != 0 || wire::check_sum(h, &r) != 0 || h.batch != batch) return -EBADMSG;
    if (h.payload != r.len) return -EPROTO;
    if (r.len != 0) {
      data->resize(r.len);
      if (!s->hear(data->data(), r.len)) return -EPIPE;
      if (wire::data_sum(data->data(), r.len) != r.sum) return -EBADMSG;
    }
    return r.result;
  }
  static wire::Desc desc(wire::Op op, uint64_t key, uint32_t len, uint64_t seq = 0, uint32_t ns = 1) {
    wire::Desc d{};
    d.op = uint8_t(op);
    d.kind = uint8_t(Kind::Block);
    d.key_len = 8;
    d.ns = ns;
    d.len = len;
    d.seq = seq;
    std::memcpy(d.key, &key, sizeof key);
    return d;
  }
  kvfs_net_stats net() {
    kvfs_net_stats s{};
    kvfs_server_stats(server_, &s);
    return s;
  }
  template <typename F>
  bool within(int ms, F f) {
    for (int i = 0; i < ms; ++i) {
      if (f()) return true;
      usleep(1000);
    }
    return f();
  }

  Issuer issuer_;
  std::vector<uint8_t> cap_, map_;
  kvfs_server* server_ = nullptr;
  int port_ = 0;
};

TEST_F(NetListenerTest, ASessionPutsAndGetsOverBothItsConnections) {
  serve();
  Socket one, two;
  wire::HelloReply r{}, r2{};
  ASSERT_EQ(greet(&one, wire::Purpose::Session, cap_, &r), 0);
  EXPECT_EQ(r.map_version, 3u);
  EXPECT_EQ(r.features, wire::kDataSums);
  EXPECT_EQ(r.map_len, 0u);
  ASSERT_EQ(greet(&two, wire::Purpose::Attach, {}, &r2, r.session), 0);
  EXPECT_EQ(std::memcmp(r.session, r2.session, sizeof r.session), 0);
  EXPECT_EQ(std::memcmp(r.boot, r2.boot, sizeof r.boot), 0);
  std::vector<uint8_t> v(100000, 7), got;
  const auto put = desc(wire::Op::Put, 1, 100000, 1);
  EXPECT_EQ(ask(&one, put, 1, &v), 1);
  EXPECT_EQ(ask(&two, put, 1, &v), 1) << "came again: answered, not made again";
  EXPECT_EQ(ask(&two, desc(wire::Op::Get, 1, 16u << 20), 2, &got), 100000);
  EXPECT_EQ(got, v);
  EXPECT_EQ(ask(&two, desc(wire::Op::Get, 1, 100), 3, &got, 2), -ESTALE);
  // The node's own clients see the same chunk, for it is one store.
  EXPECT_EQ(stats().puts, 1u);
  const auto n = net();
  EXPECT_EQ(n.sessions, 1u);
  EXPECT_EQ(n.connections, 2u);
  EXPECT_EQ(n.replayed, 1u);
  EXPECT_EQ(n.stale_maps, 1u);
  EXPECT_EQ(n.bytes_in, 200000u);
}

TEST_F(NetListenerTest, TheMapIsGivenToWhoHasACapability) {
  serve();
  Socket a, b, c;
  wire::HelloReply r{};
  EXPECT_EQ(greet(&a, wire::Purpose::Map, {}, &r), -EACCES);
  ASSERT_EQ(greet(&b, wire::Purpose::Map, cap_, &r), 0);
  EXPECT_EQ(map_, make_map(3));
  EXPECT_TRUE(b.ends(5000));
  char err[256] = "";
  const auto newer = make_map(4), older = make_map(2);
  EXPECT_EQ(kvfs_server_set_map(server_, newer.data(), newer.size(), err, sizeof err), 0) << err;
  EXPECT_EQ(kvfs_server_set_map(server_, older.data(), older.size(), err, sizeof err), -ESTALE);
  EXPECT_LT(kvfs_server_set_map(server_, newer.data(), newer.size() - 1, err, sizeof err), 0);
  ASSERT_EQ(greet(&c, wire::Purpose::Map, cap_, &r), 0);
  EXPECT_EQ(map_, newer);
}

TEST_F(NetListenerTest, WhoMayNotComeInIsToldWhy) {
  serve();
  wire::HelloReply r{};
  const auto refused = [&](wire::Purpose p, const std::vector<uint8_t>& cap, const uint8_t* session = nullptr,
                           uint32_t target = 0) {
    Socket s;
    const int err = greet(&s, p, cap, &r, session, target);
    EXPECT_TRUE(s.ends(5000));
    return err;
  };
  const auto S = wire::Purpose::Session;
  const uint64_t now = uint64_t(time(nullptr));
  EXPECT_EQ(refused(S, {}), -EACCES);
  EXPECT_EQ(refused(S, issuer_.make({kAll}, 0, now - 1)), -EACCES) << "expired";
  EXPECT_EQ(refused(S, issuer_.make({kAll}, now + 1000)), -EACCES) << "not yet";
  EXPECT_EQ(refused(S, Issuer{}.make({kAll})), -EACCES) << "another's signature";
  for (size_t i = 0; i < cap_.size(); ++i) {
    auto bad = cap_;
    bad[i] ^= uint8_t(1u << (i % 8));
    EXPECT_EQ(refused(S, bad), -EACCES) << "byte " << i;
  }
  for (const size_t n : {size_t{1}, size_t{63}, size_t{64}, size_t{104}, cap_.size() - 1})
    EXPECT_EQ(refused(S, {cap_.begin(), cap_.begin() + ptrdiff_t(n)}), -EACCES);
  EXPECT_EQ(refused(S, cap_, nullptr, 1), -ENODEV);
  const uint8_t guess[16] = {1, 2, 3};
  EXPECT_EQ(refused(wire::Purpose::Attach, {}, guess), -ESTALE);
  EXPECT_EQ(net().sessions, 0u);
  EXPECT_GE(net().refused, cap_.size());
}

TEST_F(NetListenerTest, WithoutAKeyNobodysRightsAreChecked) {
  serve(false);
  Socket s;
  wire::HelloReply r{};
  std::vector<uint8_t> v(100, 1);
  ASSERT_EQ(greet(&s, wire::Purpose::Session, {}, &r), 0);
  EXPECT_EQ(ask(&s, desc(wire::Op::Put, 1, 100, 1, 77), 1, &v), 1);
}

TEST_F(NetListenerTest, RightsAreCheckedOfEveryRequest) {
  serve();
  Socket s;
  wire::HelloReply r{};
  std::vector<uint8_t> v(100, 1);
  ASSERT_EQ(greet(&s, wire::Purpose::Session, issuer_.make({{1, wire::kBlocks, wire::kRead, 0, 0}}), &r), 0);
  EXPECT_EQ(ask(&s, desc(wire::Op::Put, 1, 100, 1), 1, &v), -EACCES);
  EXPECT_EQ(ask(&s, desc(wire::Op::Get, 1, 100), 2, &v), -ENOENT);
  EXPECT_EQ(ask(&s, desc(wire::Op::Get, 1, 100, 0, 2), 3, &v), -EACCES);
  EXPECT_EQ(net().denied, 2u);
}

TEST_F(NetListenerTest, ASessionOutlivesItsConnectionsForAsLongAsWasSaid) {
  serve(true, 400);
  wire::HelloReply r{}, r2{};
  std::vector<uint8_t> v(100, 1);
  const auto put = desc(wire::Op::Put, 1, 100, 1);
  {
    Socket s;
    ASSERT_EQ(greet(&s, wire::Purpose::Session, cap_, &r), 0);
    EXPECT_EQ(r.keep_ms, 400u);
    EXPECT_EQ(ask(&s, put, 1, &v), 1);
  }
  ASSERT_TRUE(within(5000, [&] { return net().connections == 0; }));
  {
    Socket s;
    ASSERT_EQ(greet(&s, wire::Purpose::Attach, {}, &r2, r.session), 0);
    EXPECT_EQ(ask(&s, put, 1, &v), 1) << "and it knows what it has done";
  }
  ASSERT_TRUE(within(5000, [&] { return net().sessions == 0; }));
  Socket s;
  EXPECT_EQ(greet(&s, wire::Purpose::Attach, {}, &r2, r.session), -ESTALE);
}

TEST_F(NetListenerTest, HostileHandshakesCostNobodyElseAnything) {
  serve();
  std::vector<Socket> held;
  const auto good = hello_bytes(wire::Purpose::Session, cap_, nullptr);
  // Garbage, another protocol, a wrong sum, an impossible length: ended at once.
  std::vector<std::vector<uint8_t>> bad = {std::vector<uint8_t>(64, 0xff), good, good, good};
  const char http[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
  bad.emplace_back(http, http + sizeof http - 1);
  bad[1][60] ^= 1;
  bad[2].back() ^= 1;
  bad[3][offsetof(wire::Hello, capability_len) + 2] = 0xff;
  for (auto& b : bad) {
    Socket s;
    ASSERT_TRUE(s.open(port_));
    ASSERT_TRUE(s.say(b.data(), b.size()));
    EXPECT_TRUE(s.ends(4000));
  }
  EXPECT_EQ(net().protocol_errors, bad.size());
  // Half a Hello and then nothing; nothing at all; a byte at a time: until their time is up.
  for (int i = 0; i < 60; ++i) {
    Socket s;
    ASSERT_TRUE(s.open(port_));
    if (i % 2 == 0) {
      ASSERT_TRUE(s.say(good.data(), size_t(1 + i % 60)));
    }
    held.push_back(std::move(s));
  }
  Socket s;
  wire::HelloReply r{};
  ASSERT_EQ(greet(&s, wire::Purpose::Session, cap_, &r), 0) << "the others' places are not ours";
  Socket drip;
  ASSERT_TRUE(drip.open(port_));
  bool ended = false;
  for (size_t i = 0; i < good.size() && !ended; ++i) {
    (void)drip.say(&good[i], 1);
    ended = drip.ends(100);
  }
  EXPECT_TRUE(ended);
  for (Socket& h : held) EXPECT_TRUE(h.ends(8000));
  std::vector<uint8_t> v(100, 1);
  EXPECT_EQ(ask(&s, desc(wire::Op::Get, 1, 100), 1, &v), -ENOENT);
}

TEST_F(NetListenerTest, WhoComesWhenAllPlacesAreTakenWaitsUntilOneIsFree) {
  serve();
  std::vector<Socket> held(kMaxHandshakes);
  for (Socket& s : held) ASSERT_TRUE(s.open(port_));
  Socket s;
  wire::HelloReply r{};
  EXPECT_EQ(greet(&s, wire::Purpose::Session, cap_, &r), 0);
}

TEST_F(NetListenerTest, SessionsAreBounded) {
  serve(true, 0, 2);
  Socket a, b, c;
  wire::HelloReply r{};
  ASSERT_EQ(greet(&a, wire::Purpose::Session, cap_, &r), 0);
  ASSERT_EQ(greet(&b, wire::Purpose::Session, cap_, &r), 0);
  EXPECT_EQ(greet(&c, wire::Purpose::Session, cap_, &r), -EBUSY);
}

TEST_F(NetListenerTest, AddressesThatAreNoneAreRefusedWithAReason) {
  serve();
  for (const char* url : {"", "tcp://", "tcp://localhost:1", "udp://127.0.0.1:1", "tcp://127.0.0.1", "tcp://127.0.0.1:",
                          "tcp://127.0.0.1:65536", "tcp://127.0.0.1:1x", "tcp://[127.0.0.1]:0", "tcp://::1:0"}) {
    char err[256] = "";
    EXPECT_EQ(kvfs_server_listen(server_, url, err, sizeof err), -EINVAL) << url;
    EXPECT_STRNE(err, "") << url;
  }
  char err[256] = "";
  const std::string taken = "tcp://127.0.0.1:" + std::to_string(port_);
  EXPECT_EQ(kvfs_server_listen(server_, taken.c_str(), err, sizeof err), -EADDRINUSE);
  EXPECT_GT(kvfs_server_listen(server_, "tcp://[::1]:0", err, sizeof err), 0) << err;
  int n = 2;
  while (kvfs_server_listen(server_, "tcp://127.0.0.1:0", err, sizeof err) > 0) ++n;
  EXPECT_EQ(n, int(kMaxListeners));
}

TEST_F(NetListenerTest, WhatIsMissingForRdmaIsSaid) {
  serve();
  char err[256] = "";
  EXPECT_EQ(kvfs_server_listen(server_, "rdma://host:1", err, sizeof err), -EINVAL);
  // An address of no host: neither without RDMA devices nor with them can it be listened on.
  EXPECT_LT(kvfs_server_listen(server_, "rdma://192.0.2.1:0", err, sizeof err), 0);
  EXPECT_NE(std::string(err).find("RDMA"), std::string::npos) << err;
  EXPECT_GT(kvfs_server_listen(server_, "tcp://127.0.0.1:0", err, sizeof err), 0) << err;
}

TEST_F(NetListenerTest, TheServerStopsWhileClientsSend) {
  serve();
  std::atomic<bool> over{false};
  std::atomic<int> answers{0};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      while (!over.load()) {  // comes again and again, as long as there is somebody
        Socket s;
        wire::HelloReply r{};
        std::vector<uint8_t> v(20000, uint8_t(t)), got;
        const auto h = hello_bytes(wire::Purpose::Session, cap_, nullptr);
        if (!s.open(port_) || !s.say(h.data(), h.size()) || !s.hear(&r, sizeof r) || r.err != 0) continue;
        for (uint64_t i = 1; i < 50; ++i) {
          if (ask(&s, desc(wire::Op::Put, t * 1000000 + i, 20000, i), i, &v) < 0) break;
          if (ask(&s, desc(wire::Op::Get, t * 1000000 + i, 20000), 100 + i, &got) < 0) break;
          answers.fetch_add(1);
        }
      }
    });
  }
  EXPECT_TRUE(within(20000, [&] { return answers.load() > 200; }));
  kvfs_server_stop(server_);
  server_ = nullptr;
  over = true;
  for (auto& t : threads) t.join();
  // The node goes on, and can be served again.
  serve();
  Socket s;
  wire::HelloReply r{};
  std::vector<uint8_t> got;
  ASSERT_EQ(greet(&s, wire::Purpose::Session, cap_, &r), 0);
  EXPECT_EQ(ask(&s, desc(wire::Op::Get, 1, 20000), 1, &got), 20000);
}

TEST_F(NetListenerTest, AServerOfNothingIsRefused) {
  char err[256] = "";
  const auto map = make_map(3);
  kvfs_server_config c{};
  EXPECT_EQ(kvfs_server_start(&c, &server_, err, sizeof err), -EINVAL);
  c.targets = &node_;
  c.target_count = 1;
  EXPECT_EQ(kvfs_server_start(&c, &server_, err, sizeof err), -EINVAL);
  c.map = map.data();
  c.map_bytes = map.size() - 1;
  EXPECT_EQ(kvfs_server_start(&c, &server_, err, sizeof err), -EPROTO);
  EXPECT_STRNE(err, "");
}

TEST_F(NetListenerTest, AReactorRunsOnTheCpuItIsToldTo) {
  stop();
  char err[256] = "";
  kvfs_node_config c{};
  c.data_path = data_.c_str();
  cpu_set_t mine;
  ASSERT_EQ(sched_getaffinity(0, sizeof mine, &mine), 0);
  uint32_t cpu = 0;
  while (!CPU_ISSET(cpu, &mine)) ++cpu;
  c.pin_cpu = cpu + 1;
  ASSERT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), 0) << err;
  stop();
  c.pin_cpu = CPU_SETSIZE;
  EXPECT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), -EINVAL);
  EXPECT_STRNE(err, "");
  node_ = nullptr;
}

}  // namespace
}  // namespace kvfs::testing_net
