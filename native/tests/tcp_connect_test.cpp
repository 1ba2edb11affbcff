// tcp_connect_test.cpp: how TCP connections begin: both halves of the handshake agree, and neither waits longer than its
// deadline or believes what it should not.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <time.h>

#include <thread>

#include "../transport/tcp_connect.h"
#include "../transport/tcp_stream.h"
#include "channel_fixture.h"
#include "handshake.h"

namespace kvfs {
namespace {

uint64_t in_ms(uint64_t ms) { return monotonic_ns() + ms * 1'000'000; }

wire::HelloReply good_reply() {
  wire::HelloReply r{};
  r.version = 1;
  r.features = wire::kFeatures;
  r.max_ops = 10;
  r.max_batch = 64;
  r.max_in = 64u << 20;
  return r;
}

struct Answered {
  int rc;
  wire::HelloReply reply;
  Bytes map;
};

// What the client makes of this reply.
Answered exchange(const wire::HelloReply& reply, const Bytes& map, wire::Hello hello) {
  int fd[2];
  tcp_pair(fd);
  std::thread server([&] {
    wire::Hello got;
    Bytes capability;
    EXPECT_EQ(server_read_hello(fd[0], &got, &capability, in_ms(5000)), 0);
    EXPECT_EQ(got.target, hello.target);
    EXPECT_EQ(capability, Bytes({1, 2, 3}));
    EXPECT_EQ(send_reply(fd[0], reply, map.data(), static_cast<uint32_t>(map.size()), in_ms(5000)), 0);
  });
  Answered a{};
  const uint8_t capability[] = {1, 2, 3};
  a.rc = client_handshake(fd[1], hello, capability, 3, &a.reply, &a.map, in_ms(5000));
  server.join();
  close(fd[0]);
  close(fd[1]);
  return a;
}

wire::Hello hello(wire::Purpose p = wire::Purpose::Session) {
  wire::Hello h{};
  h.purpose = uint16_t(p);
  h.features = wire::kFeatures;
  h.target = 3;
  return h;
}

TEST(TcpConnect, BothSidesAgreeAndTheMapComesAlong) {
  const Bytes map = pattern(1, 300'000);
  const Answered a = exchange(good_reply(), map, hello());
  EXPECT_EQ(a.rc, 0);
  EXPECT_EQ(a.reply.max_ops, 10u);
  EXPECT_EQ(a.map, map);
  EXPECT_EQ(exchange(good_reply(), map, hello(wire::Purpose::Map)).rc, 0);
}

TEST(TcpConnect, ARefusalIsTheResult) {
  wire::HelloReply r{};
  r.err = -EACCES;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EACCES);
}

TEST(TcpConnect, AReplyThatWasNotAskedForIsNotBelieved) {
  wire::HelloReply r = good_reply();
  r.features |= 1u << 20;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EPROTO);
  r = good_reply();
  r.version = 2;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EPROTO);
  r = good_reply();
  r.max_batch = 257;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EPROTO);
  r = good_reply();
  r.max_ops = 0;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EPROTO);
  r = good_reply();
  r.max_in = 4096;
  EXPECT_EQ(exchange(r, {}, hello()).rc, -EPROTO);
  EXPECT_EQ(exchange(good_reply(), {}, hello(wire::Purpose::Map)).rc, -EPROTO) << "asked for a map, got none";
}

TEST(TcpConnect, SilenceEndsWithTheDeadline) {
  int fd[2];
  tcp_pair(fd);
  wire::HelloReply reply;
  EXPECT_EQ(client_handshake(fd[1], hello(), nullptr, 0, &reply, nullptr, in_ms(20)), -ETIMEDOUT);
  wire::Hello h;
  Bytes capability;
  EXPECT_EQ(server_read_hello(fd[0], &h, &capability, in_ms(20)), 0) << "that was a whole hello";
  EXPECT_EQ(server_read_hello(fd[0], &h, &capability, in_ms(20)), -ETIMEDOUT);
  close(fd[1]);
  EXPECT_EQ(server_read_hello(fd[0], &h, &capability, in_ms(1000)), -ECONNRESET);
  close(fd[0]);
}

TEST(TcpConnect, AHelloInPiecesIsReadToItsEndAndNotBeyond) {
  int fd[2];
  tcp_pair(fd);
  wire::Hello h = hello();
  h.magic = wire::kHelloMagic;
  h.version = 9;
  h.capability_len = 2000;
  const Bytes capability = pattern(1, 2000);
  wire::seal(&h, capability.data());
  Bytes all(sizeof h);
  std::memcpy(all.data(), &h, sizeof h);
  all.insert(all.end(), capability.begin(), capability.end());
  all.push_back(0x55);  // the first byte of what follows
  ServerHandshake s(fd[0]);
  for (size_t i = 0; i + 1 < all.size(); ++i) {
    ASSERT_EQ(s.read(), 0) << i;
    ASSERT_EQ(send(fd[1], &all[i], 1, 0), 1);
  }
  ASSERT_EQ(send(fd[1], &all.back(), 1, 0), 1);
  int rc = 0;
  for (int i = 0; i < 1000 && rc == 0; ++i) rc = s.read();
  EXPECT_EQ(rc, 1);
  EXPECT_EQ(s.capability(), capability);
  uint8_t next = 0;
  EXPECT_EQ(recv(fd[0], &next, 1, 0), 1);
  EXPECT_EQ(next, 0x55);
  close(fd[0]);
  close(fd[1]);
}

TEST(TcpConnect, WhatIsNoHelloIsToldAtOnce) {
  const char* const http = "GET / HTTP/1.1\r\n";
  int fd[2];
  tcp_pair(fd);
  ASSERT_GT(send(fd[1], http, 16, 0), 0);
  wire::Hello h;
  Bytes capability;
  EXPECT_EQ(server_read_hello(fd[0], &h, &capability, in_ms(5000)), -EPROTO);
  h = hello();
  h.magic = wire::kHelloMagic;
  h.version = 1;
  h.capability_len = wire::kMaxCapability + 1;
  close(fd[0]);
  close(fd[1]);
  tcp_pair(fd);
  ASSERT_GT(send(fd[1], &h, sizeof h, 0), 0);
  EXPECT_EQ(server_read_hello(fd[0], &h, &capability, in_ms(5000)), -EPROTO);
  close(fd[0]);
  close(fd[1]);
}

TEST(TcpConnect, ListenAcceptAndConnectWithADeadline) {
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int l = tcp_listen(reinterpret_cast<sockaddr*>(&a), sizeof a, 4);
  ASSERT_GE(l, 0);
  socklen_t n = sizeof a;
  ASSERT_EQ(getsockname(l, reinterpret_cast<sockaddr*>(&a), &n), 0);
  EXPECT_EQ(tcp_accept(l, nullptr), -EAGAIN);
  const int c = tcp_connect(reinterpret_cast<sockaddr*>(&a), sizeof a, in_ms(5000));
  ASSERT_GE(c, 0);
  sockaddr_storage peer;
  const int s = tcp_accept(l, &peer);
  EXPECT_GE(s, 0);
  EXPECT_EQ(peer.ss_family, AF_INET);
  EXPECT_EQ(tcp_listen(reinterpret_cast<sockaddr*>(&a), sizeof a, 4), -EADDRINUSE);
  close(s);
  close(c);
  close(l);
  EXPECT_EQ(tcp_connect(reinterpret_cast<sockaddr*>(&a), sizeof a, in_ms(5000)), -ECONNREFUSED);
}

}  // namespace
}  // namespace kvfs
