// ring_test.cpp tests the queues of native/ring/queue.h alone: order, bounds, sleeping and waking, impossible indices.
#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <thread>

#include "../ring/control.h"
#include "../server/validate.h"

namespace {

using namespace kvfs;

struct Pair {
  explicit Pair(uint32_t entries) : mem(aligned_alloc(4096, ring_bytes(entries)), free) {
    memset(mem.get(), 0, ring_bytes(entries));
    ring_format(mem.get(), entries);
    daemon.attach(mem.get(), entries);
    EXPECT_EQ(client.attach(mem.get(), ring_bytes(entries)), 0);
  }
  kvfs_ring_hdr* hdr() { return static_cast<kvfs_ring_hdr*>(mem.get()); }
  std::unique_ptr<void, void (*)(void*)> mem;
  ClientRing client;
  DaemonRing daemon;
};

TEST(Ring, FullEmptyAndWrap) {
  for (uint32_t entries : {2u, 8u, 4096u}) {
    Pair p(entries);
    uint64_t in = 0, out = 0;
    for (int round = 0; round < 5; ++round) {
      kvfs_sqe* s;
      uint32_t n = 0;
      while ((s = p.client.next()) != nullptr) {
        s->user_data = in++;
        ++n;
      }
      ASSERT_EQ(n, entries);
      p.client.publish();
      ASSERT_EQ(p.daemon.refresh(), entries);
      for (uint32_t i = 0; i < entries; ++i) {
        kvfs_sqe c;
        p.daemon.take(&c);
        p.daemon.complete(c.user_data, int64_t(i));
      }
      ASSERT_EQ(p.daemon.refresh(), 0u);
      p.daemon.publish();
      kvfs_cqe q;
      while (p.client.pop(&q, 1) == 1) ASSERT_EQ(q.user_data, out++);
      ASSERT_EQ(in, out);
    }
  }
}

TEST(Ring, CqNeverOverflows) {
  Pair p(4);
  // A client that publishes more without reading completions: indices written by hand.
  p.hdr()->sq_tail = 4;
  ASSERT_EQ(p.daemon.refresh(), 4u);
  kvfs_sqe s;
  for (int i = 0; i < 4; ++i) p.daemon.take(&s);
  p.hdr()->sq_tail = 8;
  EXPECT_EQ(p.daemon.refresh(), 0u);  // all four CQE slots are reserved
  for (int i = 0; i < 4; ++i) p.daemon.complete(0, 0);
  p.daemon.publish();
  EXPECT_EQ(p.daemon.refresh(), 0u);  // and now full of unread completions
  p.hdr()->cq_head = 1;
  EXPECT_EQ(p.daemon.refresh(), 1u);
  EXPECT_EQ(p.daemon.broken(), 0);
}

TEST(Ring, ImpossibleIndicesBreakIt) {
  for (auto [tail, head] : {std::pair<uint32_t, uint32_t>{9, 0}, {0xffffffff, 0}, {1, 1}, {1, 0x80000000}}) {
    Pair p(8);
    p.hdr()->sq_tail = tail;
    p.hdr()->cq_head = head;
    EXPECT_EQ(p.daemon.refresh(), 0u);
    EXPECT_EQ(p.daemon.broken(), EPROTO);
    EXPECT_EQ(p.client.broken(), uint32_t(EPROTO));
    p.hdr()->sq_tail = 1;
    p.hdr()->cq_head = 0;
    EXPECT_EQ(p.daemon.refresh(), 0u);  // for good
  }
}

// Client and daemon on two threads; both "sleep" by the protocol and count on being told: a lost wake hangs the test.
TEST(Ring, TwoThreadsSleepAndWake) {
  Pair p(16);
  constexpr uint64_t kN = 60000;
  std::atomic<uint32_t> wake_daemon{0}, wake_client{0};
  std::thread daemon([&] {
    uint64_t served = 0;
    while (served < kN) {
      uint32_t n = p.daemon.refresh();
      for (uint32_t i = 0; i < n; ++i) {
        kvfs_sqe s;
        p.daemon.take(&s);
        p.daemon.complete(s.user_data, int64_t(s.off * 3));
        ++served;
      }
      if (p.daemon.publish()) {
        wake_client.fetch_add(1);
        wake_client.notify_one();
      }
      if (n == 0) {
        uint32_t seen = wake_daemon.load();
        p.daemon.need_wake(true);
        full_fence();
        if (!p.daemon.can_take()) wake_daemon.wait(seen);
        p.daemon.need_wake(false);
      }
    }
  });
  uint64_t sent = 0, got = 0;
  while (got < kN) {
    while (sent < kN) {
      kvfs_sqe* s = p.client.next();
      if (s == nullptr) break;
      s->user_data = sent;
      s->off = sent++;
    }
    if (p.client.publish()) {
      wake_daemon.fetch_add(1);
      wake_daemon.notify_one();
    }
    kvfs_cqe q[7];
    int n = p.client.pop(q, 7);
    for (int i = 0; i < n; ++i) {
      ASSERT_EQ(q[i].user_data, got);
      ASSERT_EQ(q[i].result, int64_t(got * 3));
      ++got;
    }
    if (n == 0 && got < kN) {
      uint32_t seen = wake_client.load();
      if (p.client.arm() == p.client.cq_head()) wake_client.wait(seen);
      p.client.disarm();
    }
  }
  daemon.join();
}

TEST(Ring, SqeChecks) {
  kvfs_sqe s{};
  s.opcode = KVFS_OP_GET;
  s.key_len = 4;
  EXPECT_EQ(check_sqe(s, false), 0);
  s.key[4] = 1;
  EXPECT_EQ(check_sqe(s, false), -EINVAL);
  s.key_len = 33;
  EXPECT_EQ(check_sqe(s, false), 0);
  s.key_len = 34;
  EXPECT_EQ(check_sqe(s, false), -EINVAL);
  s.key_len = 33;
  s.iov = KVFS_IOV_INPROC;
  EXPECT_EQ(check_sqe(s, false), -EBADF);
  EXPECT_EQ(check_sqe(s, true), 0);
  s.opcode = KVFS_OP_INODE_READ;
  EXPECT_EQ(check_sqe(s, false), -EPERM);
  s.opcode = KVFS_OP_INODE_LAND + 1;
  EXPECT_EQ(check_sqe(s, true), -EOPNOTSUPP);
}

}  // namespace
