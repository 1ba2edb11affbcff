// node_fixture.h owns a node on a fresh preallocated file in a temporary directory, for the ring's tests.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <string>

#include "../ffi/kvfs_node.h"
#include "../include/kvfs.h"

class NodeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    alarm(200);  // no test hangs
    char tmp[] = "/var/tmp/kvfs-ring-XXXXXX";
    ASSERT_NE(mkdtemp(tmp), nullptr);
    dir_ = tmp;
    data_ = dir_ + "/data";
    sock_ = dir_ + "/sock";
    char err[256] = "";
    ASSERT_EQ(kvfs_node_format(data_.c_str(), 256u << 20, 0, 0, err, sizeof err), 0) << err;
    start();
  }
  void start() {
    char err[256] = "";
    kvfs_node_config c{};
    c.data_path = data_.c_str();
    c.socket_path = sock_.c_str();
    c.memory_bytes = memory_;
    c.dirty_bytes = dirty_;
    c.verify = 1;
    c.allowed_uid = KVFS_ANY_UID;
    struct stat st;
    ASSERT_EQ(stat(dir_.c_str(), &st), 0);
    c.mount_dev = st.st_dev;  // ordinary files stand in for files of the mount
    ASSERT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), 0) << err;
    ASSERT_EQ(kvfs_node_ns_put(node_, "t", "cache", 1, 1, KVFS_ANY_UID), 0);
    ASSERT_EQ(kvfs_node_ns_put(node_, "t", "other", 2, 0, KVFS_ANY_UID), 0);
  }
  void stop() {
    char err[256] = "";
    if (node_ != nullptr) {
      EXPECT_EQ(kvfs_node_stop(node_, err, sizeof err), 0) << err;
    }
    node_ = nullptr;
  }
  void TearDown() override {
    stop();
    std::filesystem::remove_all(dir_);
    alarm(0);
  }
  // An operation of the daemon's own ring on an inode.
  static kvfs_sqe inode_sqe(uint8_t op, uint64_t ino, uint64_t off, const void* mem = nullptr, uint32_t len = 0,
                            uint8_t flags = 0) {
    kvfs_sqe s{};
    s.opcode = op;
    s.flags = flags;
    s.iov = KVFS_IOV_INPROC;
    s.iov_off = reinterpret_cast<uintptr_t>(mem);
    s.off = off;
    s.len = len;
    memcpy(s.key, &ino, sizeof ino);
    return s;
  }
  struct kvfs_node_stats stats() {
    struct kvfs_node_stats s;
    EXPECT_EQ(kvfs_node_stats(node_, &s), 0);
    return s;
  }
  // Runs f in a child that was forked while this process had no other threads: a child of a process with threads may find
  // the allocator locked for ever.
  template <typename F>
  pid_t fork_client(F f) {
    stop();
    int started[2];
    EXPECT_EQ(pipe(started), 0);
    const pid_t pid = fork();
    if (pid == 0) {
      char c;
      close(started[1]);
      (void)!read(started[0], &c, 1);
      f();
      _exit(0);
    }
    close(started[0]);
    start();
    close(started[1]);
    return pid;
  }
  // Takes the next question to the Python daemon and answers it.
  void answer_upcall(uint32_t kind, int err) {
    pollfd p{kvfs_node_upcall_fd(node_), POLLIN, 0};
    kvfs_upcall u{};
    do {
      ASSERT_EQ(poll(&p, 1, 10000), 1);
    } while (kvfs_node_next_upcall(node_, &u) == 0);
    EXPECT_EQ(u.kind, kind);
    EXPECT_EQ(kvfs_node_answer(node_, u.id, err), 0);
  }
  // Until every session's memory is free again.
  bool wait_sessions(uint64_t want) {
    for (int i = 0; i < 2000; ++i) {
      if (stats().sessions == want) return true;
      usleep(1000);
    }
    return false;
  }

  std::string dir_, data_, sock_;
  uint64_t memory_ = 16u << 20, dirty_ = 0;
  kvfs_node* node_ = nullptr;
};

constexpr uint64_t kSec = 1000000000;
