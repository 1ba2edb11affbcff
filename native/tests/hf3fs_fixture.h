// hf3fs_fixture.h owns a node that 3FS's calls find as if it were mounted: its directory has the mount's `.kvfs/info`, and
// ordinary files in it stand in for the mount's.
#pragma once

#include <fcntl.h>
#include <time.h>

#include <fstream>
#include <string>
#include <vector>

#include "../include/hf3fs_usrbio.h"
#include "node_fixture.h"

class Hf3fsTest : public NodeTest {
 protected:
  void SetUp() override {
    NodeTest::SetUp();
    std::filesystem::create_directory(dir_ + "/.kvfs");
    std::ofstream(dir_ + "/.kvfs/info") << "{\"socket\":\"" << sock_ << "\",\"directory\":\"/x\",\"format\":1}\n";
  }
  const char* mount() const { return dir_.c_str(); }
  // An open file that the node knows, of `size` bytes as far as it is concerned.
  int open_file(const std::string& name, int flags = O_RDWR, uint64_t size = 0) {
    const int fd = ::open((dir_ + "/" + name).c_str(), flags | O_CREAT | O_CLOEXEC, 0600);
    EXPECT_GE(fd, 0);
    EXPECT_EQ(kvfs_node_inode_open(node_, inode_of(fd), size), 0);
    return fd;
  }
  static uint64_t inode_of(int fd) {
    struct stat st {};
    EXPECT_EQ(fstat(fd, &st), 0);
    return st.st_ino;
  }
  static timespec in_ms(int64_t ms) {
    timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    const int64_t ns = t.tv_nsec + ms * 1'000'000;
    return {time_t(t.tv_sec + ns / 1'000'000'000), long(ns % 1'000'000'000)};
  }
  // Prepares, submits and waits for one operation; its result.
  static int64_t io(const hf3fs_ior& ior, const hf3fs_iov& iov, int fd, uint64_t off, uint64_t len, uint64_t at = 0) {
    const int slot = hf3fs_prep_io(&ior, &iov, ior.for_read, iov.base + at, fd, off, len, &ior);
    if (slot < 0) return slot;
    EXPECT_EQ(hf3fs_submit_ios(&ior), 0);
    hf3fs_cqe q{};
    EXPECT_EQ(hf3fs_wait_for_ios(&ior, &q, 1, 1, nullptr), 1);
    EXPECT_EQ(q.index, slot);
    EXPECT_EQ(q.userdata, &ior);
    return q.result;
  }
};
