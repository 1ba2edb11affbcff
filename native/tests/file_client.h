// file_client.h owns a ring client that has one file open, as an engine beside the mount has it: FileClient, a mixin for
// fixtures on NodeTest, and FileTest, a node with such a client.
#pragma once

#include <fcntl.h>

#include "node_fixture.h"

class FileClient {
 protected:
  // Makes a file in `dir`, opens its inode in the node and registers it. The inode's number, 0 if something failed.
  uint64_t connect_file(kvfs_node* node, const std::string& dir, const std::string& sock, uint32_t entries,
                        uint64_t bytes) {
    const int fd = ::open((dir + "/file").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    EXPECT_GE(fd, 0);
    struct stat st {};
    EXPECT_EQ(fstat(fd, &st), 0);
    EXPECT_EQ(kvfs_node_inode_open(node, st.st_ino, 0), 0);
    const int err = kvfs_open(sock.c_str(), &client_);
    EXPECT_EQ(err, 0);
    if (err == 0) {
      handle_ = kvfs_file_register(client_, fd);
      EXPECT_GE(handle_, 0);
      EXPECT_EQ(kvfs_ring_create(client_, entries, &ring_), 0);
      EXPECT_EQ(kvfs_iov_alloc(client_, bytes, 0, &iov_), 0);
    }
    ::close(fd);
    return ring_ != nullptr && iov_.base != nullptr && handle_ >= 0 ? st.st_ino : 0;
  }
  void start_op(uint8_t op, uint64_t off, uint32_t len, uint64_t at = 0, uint8_t flags = 0) {
    kvfs_sqe* s = kvfs_prep(ring_);
    ASSERT_NE(s, nullptr);
    s->opcode = op;
    s->flags = flags;
    s->handle = uint32_t(handle_);
    s->iov = iov_.id;
    s->iov_off = at;
    s->off = off;
    s->len = len;
    ASSERT_EQ(kvfs_submit(ring_), 1);
  }
  int64_t end_op(uint64_t timeout_ns) {
    kvfs_cqe q{};
    EXPECT_EQ(kvfs_wait(ring_, &q, 1, 1, timeout_ns), 1);
    return q.result;
  }

  kvfs_client* client_ = nullptr;
  kvfs_ring* ring_ = nullptr;
  kvfs_iov iov_{};
  int handle_ = -1;
};

class FileTest : public NodeTest, protected FileClient {
 protected:
  static constexpr uint32_t kIov = 4u << 20;
  void SetUp() override {
    NodeTest::SetUp();
    ino_ = connect_file(node_, dir_, sock_, 64, kIov);
    ASSERT_NE(ino_, 0u);
  }
  void TearDown() override {
    kvfs_close(client_);
    NodeTest::TearDown();
  }
  // The mount's side of the same file.
  int64_t own(uint8_t op, uint64_t off = 0, void* mem = nullptr, uint32_t len = 0, uint8_t flags = 0) {
    const kvfs_sqe s = inode_sqe(op, ino_, off, mem, len, flags);
    return kvfs_node_call(node_, &s, 60 * kSec);
  }

  uint64_t ino_ = 0;
};
