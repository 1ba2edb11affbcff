// server_inode_test.cpp tests operations of another process on one file beside the mount's: order, sizes, and the questions to
// the daemon that a write or an fsync waits for.
#include <vector>

#include "file_client.h"

namespace {

class InodeTest : public FileTest {
 protected:
  void send(uint8_t op, uint64_t off, uint32_t len, uint64_t at = 0) { start_op(op, off, len, at); }
  int64_t wait() { return end_op(10 * kSec); }
  int64_t call(uint8_t op, uint64_t off, uint32_t len, uint64_t at = 0) {
    send(op, off, len, at);
    return wait();
  }
  char* mem() { return static_cast<char*>(iov_.base); }
  bool asked() {
    kvfs_upcall u{};
    bool any = kvfs_node_next_upcall(node_, &u) == 1;
    if (any) {
      EXPECT_EQ(kvfs_node_answer(node_, u.id, 0), 0);
    }
    return any;
  }
};

TEST_F(InodeTest, WriteWaitsForTheKernelsCopiesToGo) {
  char c = 0;
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  EXPECT_FALSE(asked());  // nobody has read it for the kernel
  EXPECT_EQ(own(KVFS_OP_INODE_READ, 0, &c, 1, KVFS_SQE_FUSE), 1);
  send(KVFS_OP_WRITE, 0, 100);
  usleep(20000);
  kvfs_cqe q{};
  EXPECT_EQ(kvfs_peek(ring_, &q, 1), 0);
  answer_upcall(KVFS_UPCALL_DROP, 0);
  EXPECT_EQ(wait(), 100);
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  uint64_t size = 0, written_ns = 0;
  EXPECT_EQ(kvfs_node_inode_show(node_, ino_, &size, &written_ns), 0);
  EXPECT_EQ(size, 100u);
  EXPECT_NE(written_ns, 0u);
  send(KVFS_OP_WRITE, 50, 100);
  answer_upcall(KVFS_UPCALL_DROP, ENOENT);  // gone already: as good
  EXPECT_EQ(wait(), 100);
  EXPECT_FALSE(asked());
}

TEST_F(InodeTest, WritesDuringADropWaitForItOrTheNext) {
  char c = 0;
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  EXPECT_EQ(own(KVFS_OP_INODE_READ, 0, &c, 1, KVFS_SQE_FUSE), 1);
  send(KVFS_OP_WRITE, 0, 10);
  pollfd p{kvfs_node_upcall_fd(node_), POLLIN, 0};
  ASSERT_EQ(poll(&p, 1, 10000), 1);
  kvfs_upcall first{};
  ASSERT_EQ(kvfs_node_next_upcall(node_, &first), 1);
  send(KVFS_OP_WRITE, 0, 20);  // if it ends before the next read, that drop will do
  usleep(20000);
  EXPECT_EQ(own(KVFS_OP_INODE_READ, 0, &c, 1, KVFS_SQE_FUSE), 1);
  send(KVFS_OP_WRITE, 0, 30);  // needs another
  usleep(20000);
  kvfs_cqe q[3];
  EXPECT_EQ(kvfs_peek(ring_, q, 3), 0);
  EXPECT_FALSE(asked());  // one at a time
  EXPECT_EQ(kvfs_node_answer(node_, first.id, 0), 0);
  int n = 0;
  do {
    n += kvfs_wait(ring_, q + n, 1, 3 - n, 10 * kSec);
    EXPECT_NE(q[n - 1].result, 30);
  } while (n < 2 && q[0].result != 10);
  answer_upcall(KVFS_UPCALL_DROP, 0);
  if (n < 3) n += kvfs_wait(ring_, q + n, 3 - n, 3 - n, 10 * kSec);
  EXPECT_EQ(n, 3);
  EXPECT_EQ(q[0].result + q[1].result + q[2].result, 60);
}

TEST_F(InodeTest, FsyncFailsIfTheSizeCannotBeStored) {
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  for (int err : {EIO, 0}) {
    send(KVFS_OP_FSYNC, 0, 0);
    answer_upcall(KVFS_UPCALL_STORE, err);
    EXPECT_EQ(wait(), -err);
  }
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  EXPECT_EQ(call(KVFS_OP_FSYNC, 0, 0), 0);  // not grown
}

TEST_F(InodeTest, StopDoesNotWaitForAnswers) {
  char c = 0;
  EXPECT_EQ(call(KVFS_OP_WRITE, 0, 100), 100);
  EXPECT_EQ(own(KVFS_OP_INODE_READ, 0, &c, 1, KVFS_SQE_FUSE), 1);
  send(KVFS_OP_WRITE, 0, 10);
  send(KVFS_OP_FSYNC, 0, 0);
  usleep(20000);
  stop();
}

// Whatever the order, a truncated file holds nothing of a write that began before, beyond what that write reported.
TEST_F(InodeTest, TruncationAndWritesTakeTurns) {
  memset(mem(), 'x', kIov);
  for (int round = 0; round < 50; ++round) {
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 0), 0);
    for (int i = 0; i < 4; ++i) send(KVFS_OP_WRITE, uint64_t(i) * 300000, 1000000);
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 100), 0);
    for (int i = 0; i < 4; ++i) ASSERT_EQ(wait(), 1000000);
    int64_t size = kvfs_node_inode_size(node_, ino_);
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 2000000), 0);
    std::vector<char> all(2000000, 'y');
    ASSERT_EQ(own(KVFS_OP_INODE_READ, 0, all.data(), 2000000), 2000000);
    for (int64_t i = size; i < 2000000; ++i) ASSERT_EQ(all[size_t(i)], 0) << i << " of " << size;
  }
}

TEST_F(InodeTest, SizeOfAWriteThatOutlivesItsHandleIsKept) {
  for (int i = 0; i < 16; ++i) send(KVFS_OP_WRITE, uint64_t(i) << 20, 1u << 20);
  EXPECT_EQ(kvfs_file_unregister(client_, handle_), 0);
  int64_t end = 0;
  kvfs_cqe q[16];
  ASSERT_EQ(kvfs_wait(ring_, q, 16, 16, 10 * kSec), 16);
  for (const kvfs_cqe& c : q) end += c.result > 0 ? c.result : 0;
  EXPECT_EQ(kvfs_node_inode_size(node_, ino_), end);
  for (int i = 0; i < 1000 && kvfs_node_inode_refs(node_, ino_) != 1; ++i) usleep(1000);
  EXPECT_EQ(kvfs_node_inode_close(node_, ino_), 0);
}

// The store is full in the middle of a write beyond the end: what it left there must not show when the file grows.
TEST_F(InodeTest, FailedWriteBeyondTheEndLeavesNothing) {
  memset(mem(), 'x', kIov);
  uint64_t size = 0;
  int64_t n = 0;
  while ((n = call(KVFS_OP_WRITE, size, kIov)) == kIov) size += kIov;
  ASSERT_TRUE(n < 0 || n < int64_t(kIov)) << n;
  if (n > 0) size += uint64_t(n);
  ASSERT_EQ(uint64_t(kvfs_node_inode_size(node_, ino_)), size);
  ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, size + kIov), 0);
  std::vector<char> tail(kIov, 'y');
  ASSERT_EQ(own(KVFS_OP_INODE_READ, size, tail.data(), kIov), int64_t(kIov));
  for (uint32_t i = 0; i < kIov; ++i) ASSERT_EQ(tail[i], 0) << i;
}

}  // namespace
