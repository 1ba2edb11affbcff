// Batches under way together, the event descriptor, and memory of the client's own, also when that is made shorter.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <atomic>
#include <thread>
#include <vector>

#include "node_fixture.h"

namespace {

struct Keys {
  std::vector<std::string> text;
  std::vector<kvfs_block> blocks;
  Keys(const std::string& prefix, int n, uint32_t len, uint64_t at) {
    for (int i = 0; i < n; ++i) text.push_back(prefix + std::to_string(i));
    for (int i = 0; i < n; ++i)
      blocks.push_back({text[i].data(), uint32_t(text[i].size()), len, at + uint64_t(i) * len, 0, 0});
  }
  kvfs_batch batch(uint8_t opcode, int ns, uint16_t iov) {
    kvfs_batch b{};
    b.blocks = blocks.data();
    b.n = int32_t(blocks.size());
    b.opcode = opcode;
    b.handle = ns;
    b.iov = iov;
    return b;
  }
};

class BatchTest : public NodeTest {
 protected:
  void SetUp() override {
    NodeTest::SetUp();
    ASSERT_EQ(kvfs_open(sock_.c_str(), &c_), 0);
    ASSERT_EQ(kvfs_ring_create(c_, 32, &r_), 0);
    ns_ = kvfs_ns_open(c_, "t", "cache", 0);
    ASSERT_GE(ns_, 0);
  }
  void TearDown() override {
    kvfs_close(c_);
    NodeTest::TearDown();
  }
  kvfs_client* c_ = nullptr;
  kvfs_ring* r_ = nullptr;
  int ns_ = -1;
};

TEST_F(BatchTest, ManyAtOnceThroughTheEventDescriptor) {
  kvfs_iov v;
  ASSERT_EQ(kvfs_iov_alloc(c_, 20u << 20, 0, &v), 0);
  memset(v.base, 5, v.size);
  std::vector<Keys> keys;
  std::vector<kvfs_batch> batches;
  for (int i = 0; i < 20; ++i) keys.emplace_back("b" + std::to_string(i) + "-", i * 5, 4096, uint64_t(i) << 20);
  for (int i = 0; i < 20; ++i) batches.push_back(keys[i].batch(KVFS_OP_PUT, ns_, v.id));
  keys[7].blocks[3].key_len = 34;  // refused here, not by the daemon
  pollfd p{kvfs_ring_event_fd(r_), POLLIN, 0};
  ASSERT_GE(p.fd, 0);
  ASSERT_EQ(kvfs_ring_event_fd(r_), p.fd);
  for (auto& b : batches) ASSERT_EQ(kvfs_batch_submit(r_, &b), 0);
  int done = 0;
  while (done < 20) {
    if (kvfs_arm(r_, 1) == 0) {
      ASSERT_EQ(poll(&p, 1, 10000), 1);
    }
    kvfs_batch* ended[3];
    int n = kvfs_batch_poll(r_, ended, 3);
    ASSERT_GE(n, 0);
    done += n;
  }
  for (int i = 0; i < 20; ++i) {
    for (int k = 0; k < i * 5; ++k) ASSERT_EQ(keys[i].blocks[k].status, i == 7 && k == 3 ? -EINVAL : 1);
  }
  kvfs_batch* one;
  EXPECT_EQ(kvfs_batch_wait(r_, &one, 1, kSec), -EDEADLK);
  kvfs_batch wrong = keys[1].batch(KVFS_OP_SYNC, ns_, v.id);
  ASSERT_EQ(kvfs_batch_submit(r_, &wrong), 0);
  ASSERT_EQ(kvfs_batch_wait(r_, &one, 1, kSec), 1);
  EXPECT_EQ(one, &wrong);
  EXPECT_EQ(keys[1].blocks[0].status, -EOPNOTSUPP);
  EXPECT_EQ(kvfs_match_prefix(r_, ns_, keys[19].blocks.data(), 95, kSec), 95);
  EXPECT_EQ(kvfs_match_prefix(r_, ns_, keys[7].blocks.data(), 35, kSec), 3);
}

TEST_F(BatchTest, MemoryOfTheClientsOwn) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP()
      << "client and daemon share a process here: the client's look at all descriptors races with the daemon's close";
#endif
  int fd = memfd_create("engine", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, 1 << 20), 0);
  void* mem = mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(mem, MAP_FAILED);
  char* p = static_cast<char*>(mem);
  memset(p, 9, 1 << 20);
  kvfs_iov v;
  ASSERT_EQ(kvfs_iov_register(c_, p + 5000, 100000, &v), 0);
  EXPECT_EQ(v.base, p + 4096);
  EXPECT_EQ(v.size, 102400u);
  kvfs_block b{"k", 1, 4096, 904, 0, 0};
  ASSERT_EQ(kvfs_put(r_, ns_, &v, &b, 1, 0, kSec), 1);
  b.value_off = 50000;
  memset(p + 4096 + 50000, 0, 4096);
  ASSERT_EQ(kvfs_get(r_, ns_, &v, &b, 1, kSec), 1);
  EXPECT_EQ(p[4096 + 50000 + 4095], 9);
  b.value_off = v.size - 4095;
  ASSERT_EQ(kvfs_get(r_, ns_, &v, &b, 1, kSec), 0);
  EXPECT_EQ(b.status, -EFAULT);
  ASSERT_EQ(kvfs_iov_free(c_, &v), 0);
  EXPECT_EQ(p[1 << 19], 9);  // the mapping is ours
  std::vector<char> heap(100000);
  EXPECT_EQ(kvfs_iov_register(c_, heap.data(), heap.size(), &v), -EOPNOTSUPP);
  EXPECT_EQ(kvfs_iov_register(c_, p, uint64_t(64) << 30, &v), -EOPNOTSUPP);
  ASSERT_EQ(fcntl(fd, F_SETFL, 0), 0);
  close(fd);
  // Nothing but the mapping leads to the file any more, and that only who is privileged may follow.
  const int left = kvfs_iov_register(c_, p, 4096, &v);
  if (left == 0) {
    ASSERT_EQ(kvfs_iov_free(c_, &v), 0);
  } else {
    EXPECT_EQ(left, -ENOENT);
  }
  munmap(mem, 1 << 20);
}

// While another client is served, one truncates its memory again and again under transfers of its own.
TEST_F(BatchTest, TruncatedMemoryHurtsNobodyElse) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a mapping replaced in a SIGBUS handler is beyond ThreadSanitizer's model";
#endif
  kvfs_iov v;
  ASSERT_EQ(kvfs_iov_alloc(c_, 4 << 20, 0, &v), 0);
  memset(v.base, 3, v.size);
  Keys keys("k", 16, 65536, 0);
  ASSERT_EQ(kvfs_put(r_, ns_, &v, keys.blocks.data(), 16, 0, 10 * kSec), 16);
  std::atomic<bool> stop{false};
  std::atomic<int> bad{0};
  std::thread hostile([&] {
    for (int round = 0; round < 30; ++round) {
      kvfs_client* c;
      kvfs_ring* r;
      kvfs_iov own;
      int fd = memfd_create("engine", MFD_CLOEXEC);
      if (ftruncate(fd, 1 << 20) != 0) ++bad;
      void* mem = mmap(nullptr, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (kvfs_open(sock_.c_str(), &c) != 0 || kvfs_ring_create(c, 32, &r) != 0) ++bad;
      int ns = kvfs_ns_open(c, "t", "cache", 0);
      if (kvfs_iov_register(c, mem, 1 << 20, &own) != 0) ++bad;
      Keys same("k", 16, 65536, 0);
      kvfs_batch batch = same.batch(KVFS_OP_GET, ns, own.id);
      if (kvfs_batch_submit(r, &batch) != 0) ++bad;
      if (ftruncate(fd, round % 2 == 0 ? 0 : 300000) != 0) ++bad;
      kvfs_batch* ended;
      if (kvfs_batch_wait(r, &ended, 1, 10 * kSec) != 1) ++bad;
      kvfs_close(c);
      munmap(mem, 1 << 20);
      close(fd);
    }
    stop = true;
  });
  Keys mine("k", 16, 65536, 1 << 20);
  while (!stop) {
    memset(static_cast<char*>(v.base) + (1 << 20), 0, 1 << 20);
    if (kvfs_get(r_, ns_, &v, mine.blocks.data(), 16, 10 * kSec) != 16) ++bad;
    if (memcmp(v.base, static_cast<char*>(v.base) + (1 << 20), 1 << 20) != 0) ++bad;
  }
  hostile.join();
  EXPECT_EQ(bad, 0);
  ASSERT_TRUE(wait_sessions(1));
  EXPECT_EQ(stats().iovs, 1u);
}

// Hits are copied in the reactor's turn; what a client can see of them it sees after the turn.
TEST_F(BatchTest, LargeHitsAreAnsweredATurnEach) {
  kvfs_iov v;
  ASSERT_EQ(kvfs_iov_alloc(c_, 8u << 20, 0, &v), 0);
  memset(v.base, 7, v.size);
  Keys keys("k", 8, 1 << 20, 0);
  ASSERT_EQ(kvfs_put(r_, ns_, &v, keys.blocks.data(), 8, 0, 10 * kSec), 8);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(kvfs_get(r_, ns_, &v, keys.blocks.data(), 8, 10 * kSec), 8);
  const auto before = stats();
  ASSERT_EQ(kvfs_get(r_, ns_, &v, keys.blocks.data(), 8, 10 * kSec), 8);
  const auto after = stats();
  EXPECT_EQ(after.mem_hits - before.mem_hits, 8u);
  EXPECT_GE(after.turns - before.turns, 8u);
}

}  // namespace
