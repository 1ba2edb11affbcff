// fuse_channel_fixture.h owns a node between a kernel and a daemon that are the test: one socketpair stands in for /dev/fuse,
// another leads to the daemon's libfuse.
#pragma once

#include <fcntl.h>
#include <linux/fuse.h>
#include <sys/socket.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../server/fuse_channel.h"
#include "node_fixture.h"

using kvfs::FuseChannel;

constexpr uint64_t kIno = 10, kUnknown = 11, kView = KVFS_VIEW_INO | 12;
constexpr int kRoom = 8 << 20;
constexpr size_t kLongest = FuseChannel::kMaxIo + (128 << 10);

template <typename T>
std::string bytes(const T& v) {
  return std::string(reinterpret_cast<const char*>(&v), sizeof v);
}

inline std::string noise(size_t n, unsigned seed = 1) {
  std::mt19937_64 random(seed);
  std::string s;
  s.reserve(n + 8);
  while (s.size() < n) s += bytes(random());
  s.resize(n);
  return s;
}

class FuseChannelTest : public NodeTest {
 protected:
  void SetUp() override {
    NodeTest::SetUp();
    ASSERT_EQ(kvfs_node_inode_open(node_, kIno, 0), 0);
    ASSERT_EQ(kvfs_node_inode_open(node_, kView, 100), 0);  // that it is open changes nothing
    begin();
  }
  void TearDown() override {
    close_kernel();
    close_daemon();
    NodeTest::TearDown();
  }
  static void widen(int fd, int room) {
    if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room) != 0) {
      ASSERT_EQ(setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room), 0);
    }
  }
  int begin(int room = kRoom) {
    int k[2], d[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, k), 0);
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, d), 0);
    for (int fd : {k[0], k[1], d[0]}) widen(fd, kRoom);
    widen(d[1], room);
    kernel_ = k[0];
    daemon_ = d[0];
    char err[256] = "";
    return kvfs_node_fuse_start(node_, k[1], d[1], err, sizeof err);
  }
  void close_kernel() {
    if (kernel_ >= 0) close(std::exchange(kernel_, -1));
  }
  void close_daemon() {
    if (daemon_ >= 0) close(std::exchange(daemon_, -1));
  }
  bool privileged() {  // else sockets have no room for the longest messages
    int room = 0;
    socklen_t n = sizeof room;
    return getsockopt(kernel_, SOL_SOCKET, SO_SNDBUF, &room, &n) == 0 && room >= kRoom;
  }

  std::string request(uint32_t opcode, uint64_t nodeid, const std::string& body = "") {
    fuse_in_header in{};
    in.len = uint32_t(sizeof in + body.size());
    in.opcode = opcode;
    in.unique = unique_ += 2;
    in.nodeid = nodeid;
    return bytes(in) + body;
  }
  std::string read_request(uint64_t ino, uint64_t off, uint32_t size) {
    fuse_read_in r{};
    r.offset = off;
    r.size = size;
    return request(FUSE_READ, ino, bytes(r));
  }
  std::string write_request(uint64_t ino, uint64_t off, const std::string& data) {
    fuse_write_in w{};
    w.offset = off;
    w.size = uint32_t(data.size());
    return request(FUSE_WRITE, ino, bytes(w) + data);
  }
  std::string xattr_request(uint64_t ino, const char* name, uint32_t size = 24) {
    fuse_getxattr_in g{};
    g.size = size;
    return request(FUSE_GETXATTR, ino, bytes(g) + std::string(name, strlen(name) + 1));
  }
  std::string forgets(const std::vector<uint64_t>& inos) {
    fuse_batch_forget_in b{};
    b.count = uint32_t(inos.size());
    std::string body = bytes(b);
    for (uint64_t ino : inos) {
      fuse_forget_one one{};
      one.nodeid = ino;
      one.nlookup = 1;
      body += bytes(one);
    }
    return request(FUSE_BATCH_FORGET, 0, body);
  }
  static std::string answer(uint64_t unique, int error, const std::string& body = "") {
    fuse_out_header out{};
    out.len = uint32_t(sizeof out + body.size());
    out.error = error;
    out.unique = unique;
    return bytes(out) + body;
  }

  static void put(int fd, const std::string& m) {
    ASSERT_EQ(send(fd, m.data(), m.size(), MSG_NOSIGNAL), ssize_t(m.size()));
  }
  static std::string get(int fd) {
    pollfd p{fd, POLLIN, 0};
    if (poll(&p, 1, 20000) != 1) return "nothing came";
    std::string m(kLongest, '\0');
    const ssize_t n = recv(fd, m.data(), m.size(), 0);
    if (n < 0) return "error";
    m.resize(size_t(n));
    return m;
  }
  void ask(const std::string& m) { put(kernel_, m); }

  struct Answer {
    fuse_out_header head{};
    std::string body;
  };
  Answer next_answer() {
    const std::string m = get(kernel_);
    Answer a;
    if (m.size() < sizeof a.head) {
      ADD_FAILURE() << m;
      return a;
    }
    memcpy(&a.head, m.data(), sizeof a.head);
    a.body = m.substr(sizeof a.head);
    EXPECT_EQ(a.head.len, m.size());
    return a;
  }
  // Asks, and expects the node's own answer.
  void expect_answer(const std::string& m, int error, const std::string& body = "") {
    ask(m);
    Answer a = next_answer();
    EXPECT_EQ(a.head.unique, unique_);
    EXPECT_EQ(a.head.error, error);
    EXPECT_TRUE(a.body == body) << a.body.size() << " bytes, not " << body.size();
  }
  void expect_written(uint64_t ino, uint64_t off, const std::string& data) {
    fuse_write_out w{};
    w.size = uint32_t(data.size());
    expect_answer(write_request(ino, off, data), 0, bytes(w));
  }
  void expect_passed_on(const std::string& m) {
    ask(m);
    EXPECT_TRUE(get(daemon_) == m) << "of " << m.size() << " bytes";
  }
  void expect_dropped(const std::string& m) {
    ask(m);
    expect_passed_on(request(FUSE_LOOKUP, 1, std::string("after", 6)));
  }
  void expect_serves() {
    expect_written(kIno, 5, "still there");
    expect_answer(read_request(kIno, 5, 11), 0, "still there");
    expect_passed_on(request(FUSE_LOOKUP, 1, std::string("name", 5)));
  }
  void expect_nothing(int fd) {
    char c;
    EXPECT_EQ(recv(fd, &c, 1, MSG_DONTWAIT), -1);
    EXPECT_EQ(errno, EAGAIN);
  }
  bool upcall(kvfs_upcall* u, int timeout_ms) {
    pollfd p{kvfs_node_upcall_fd(node_), POLLIN, 0};
    while (poll(&p, 1, timeout_ms) == 1) {
      if (kvfs_node_next_upcall(node_, u) == 1) return true;
    }
    return false;
  }

  int kernel_ = -1, daemon_ = -1;
  uint64_t unique_ = 0;
};
