// uring_net_test.cpp: operations on sockets in a reactor's io_uring: each ends once, with what was moved, also when it is
// cancelled, when there are more than the queues hold, and beside other events.
#include <gtest/gtest.h>
#include <sys/eventfd.h>

#include <thread>

#include "channel_fixture.h"

namespace kvfs {
namespace {

struct Op {
  NetIo io;
  msghdr msg{};
  iovec iov{};
  int ended = 0;
  Op() {
    io.owner = this;
    io.done = [](NetIo* i) { ++static_cast<Op*>(i->owner)->ended; };
  }
  void recv(int fd, void* p, uint32_t n, int flags = 0) {
    iov = {p, n};
    msg.msg_iov = &iov;
    msg.msg_iovlen = 1;
    io.op = NetIo::Op::RecvMsg;
    io.fd = fd;
    io.msg = &msg;
    io.flags = flags;
  }
};

class UringNet : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    UringOptions o;
    o.entries = 8;
    o.defer_taskrun = GetParam();
    ASSERT_EQ(Uring::create(o, &ring_).err, 0);
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd_), 0);
  }
  void TearDown() override {
    ::close(fd_[0]);
    ::close(fd_[1]);
  }
  int wait(uint64_t ns = 1'000'000'000) { return ring_->submit_and_wait(ns); }

  std::unique_ptr<Uring> ring_;
  int fd_[2];
};
INSTANTIATE_TEST_SUITE_P(Modes, UringNet, testing::Bool());

TEST_P(UringNet, MovesBytesThroughIovecsAndTellsHowMany) {
  char a[3] = {'a', 'b', 'c'}, b[2] = {'d', 'e'}, in[8] = {};
  iovec out[2] = {{a, 3}, {b, 2}}, to[2] = {{in, 1}, {in + 2, 4}};
  msghdr mo{}, mi{};
  mo.msg_iov = out;
  mi.msg_iov = to;
  mo.msg_iovlen = mi.msg_iovlen = 2;
  Op s, r;
  s.io.op = NetIo::Op::SendMsg;
  s.io.fd = fd_[0];
  s.io.msg = &mo;
  r.io.op = NetIo::Op::RecvMsg;
  r.io.fd = fd_[1];
  r.io.msg = &mi;
  r.io.flags = MSG_WAITALL;
  ring_->submit(&r.io);
  EXPECT_EQ(wait(0), 0);
  ring_->submit(&s.io);
  while (r.ended == 0 || s.ended == 0) ASSERT_GE(wait(), 0);
  EXPECT_EQ(s.io.result, 5);
  EXPECT_EQ(r.io.result, 5);
  EXPECT_EQ(std::string(in, 6), std::string("a\0bcde", 6));
}

// Who spins for events enters the kernel only when there are some, and the kernel completes nothing before that.
TEST_P(UringNet, WhatHasComeIsAnEventBeforeTheKernelIsEntered) {
  char in = 0;
  Op r;
  r.recv(fd_[1], &in, 1);
  ring_->submit(&r.io);
  EXPECT_EQ(wait(0), 0);
  EXPECT_FALSE(ring_->has_events());
  std::thread([&] { EXPECT_EQ(::send(fd_[0], "x", 1, 0), 1); }).join();
  EXPECT_TRUE(ring_->has_events());
  EXPECT_EQ(r.ended, 0);
  EXPECT_EQ(wait(0), 1);
  EXPECT_EQ(r.ended, 1);
  EXPECT_FALSE(ring_->has_events());
}

TEST_P(UringNet, ACancelledReceiveSaysWhatCameUntilThen) {
  std::vector<char> in(1000);
  Op r;
  r.recv(fd_[1], in.data(), 1000, MSG_WAITALL);
  ring_->submit(&r.io);
  ASSERT_EQ(wait(0), 0);
  ASSERT_EQ(::send(fd_[0], "abc", 3, 0), 3);
  wait(1'000'000);
  EXPECT_EQ(r.ended, 0);
  ring_->cancel(&r.io);
  ring_->cancel(&r.io);
  for (int i = 0; i < 100 && r.ended == 0; ++i) ASSERT_GE(wait(10'000'000), 0);
  EXPECT_EQ(r.ended, 1);
  const int got = std::max(r.io.result, 0);
  ASSERT_EQ(::send(fd_[0], "def", 3, 0), 3);
  r.recv(fd_[1], in.data() + got, static_cast<uint32_t>(6 - got), MSG_WAITALL);
  ring_->submit(&r.io);
  while (r.ended == 1) ASSERT_GE(wait(), 0);
  EXPECT_EQ(std::string(in.data(), 6), "abcdef") << "nothing is lost on the way";
  Op none;
  none.recv(fd_[1], in.data(), 1);
  ring_->submit(&none.io);
  ring_->cancel(&none.io);
  while (none.ended == 0) ASSERT_GE(wait(), 0);
  EXPECT_EQ(none.io.result, -ECANCELED);
}

TEST_P(UringNet, MoreOperationsThanTheQueuesHoldAllEndOnce) {
  constexpr size_t kOps = 500;
  std::vector<Op> ops(kOps), nops(kOps);
  std::vector<char> in(kOps);
  for (size_t i = 0; i < kOps; ++i) {
    ops[i].recv(fd_[1], &in[i], 1);
    ring_->submit(&ops[i].io);
    ring_->submit(&nops[i].io);
  }
  int events = 0;
  for (int i = 0; i < 1000 && events < static_cast<int>(kOps); ++i) events += wait(1'000'000);
  EXPECT_EQ(events, static_cast<int>(kOps)) << "each Nop is an event";
  for (size_t i = 0; i < kOps; i += 2) ring_->cancel(&ops[i].io);
  for (int i = 0; i < 1000 && events < static_cast<int>(kOps + kOps / 2); ++i) events += wait(1'000'000);
  const std::string bytes(kOps / 2, 'x');
  ASSERT_EQ(::send(fd_[0], bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
  for (int i = 0; i < 1000 && events < static_cast<int>(2 * kOps); ++i) events += wait(1'000'000);
  for (size_t i = 0; i < kOps; ++i) {
    ASSERT_EQ(ops[i].ended, 1) << i;
    ASSERT_EQ(nops[i].ended, 1) << i;
    ASSERT_EQ(ops[i].io.result, i % 2 == 0 ? -ECANCELED : 1);
  }
}

TEST_P(UringNet, TheEndOfAPeerAndErrorsAreResults) {
  char c;
  Op r, bad;
  r.recv(fd_[1], &c, 1);
  ring_->submit(&r.io);
  ASSERT_GE(wait(0), 0);
  ::shutdown(fd_[0], SHUT_RDWR);
  bad.recv(1 << 20, &c, 1);
  ring_->submit(&bad.io);
  while (r.ended == 0 || bad.ended == 0) ASSERT_GE(wait(), 0);
  EXPECT_EQ(r.io.result, 0);
  EXPECT_EQ(bad.io.result, -EBADF);
}

TEST_P(UringNet, AnOperationMayBeSubmittedAgainFromItsEnd) {
  struct Again {
    Uring* ring;
    int left;
  } again{ring_.get(), 100};
  NetIo io;
  io.owner = &again;
  io.done = [](NetIo* i) {
    auto* a = static_cast<Again*>(i->owner);
    if (--a->left > 0) a->ring->submit(i);
  };
  ring_->submit(&io);
  while (again.left > 0) ASSERT_GE(wait(), 0);
}

}  // namespace
}  // namespace kvfs
