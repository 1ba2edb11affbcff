// server_punch_test.cpp tests PUNCH and reads that forbid holes on a node: against a model, with space that comes back, with
// bytes that are only in memory, and with kernel copies that must go.
#include <algorithm>
#include <random>
#include <thread>
#include <vector>

#include "file_client.h"

namespace {

constexpr uint64_t kChunk = 64u << 10;
using Text = std::vector<char>;

class Punch : public FileTest {
 protected:
  Punch() { dirty_ = 16u << 20; }
  int64_t punch(uint64_t off, uint64_t bytes) {
    kvfs_sqe* s = kvfs_prep(ring_);
    s->opcode = KVFS_OP_PUNCH;
    s->handle = uint32_t(handle_);
    s->off = off;
    s->iov_off = bytes;
    EXPECT_EQ(kvfs_submit(ring_), 1);
    return end_op(60 * kSec);
  }
  int64_t write(uint64_t off, const Text& t) {
    memcpy(iov_.base, t.data(), t.size());
    start_op(KVFS_OP_WRITE, off, uint32_t(t.size()));
    return end_op(60 * kSec);
  }
  int64_t read(uint64_t off, uint32_t len, uint8_t flags = 0) {
    memset(iov_.base, 0x5a, len);
    start_op(KVFS_OP_READ, off, len, 0, flags);
    return end_op(60 * kSec);
  }
  void expect(const Text& model) {
    for (uint64_t at = 0; at < model.size(); at += kIov) {
      const uint64_t n = std::min<uint64_t>(kIov, model.size() - at);
      ASSERT_EQ(read(at, uint32_t(n)), int64_t(n));
      ASSERT_EQ(memcmp(iov_.base, model.data() + at, n), 0) << at;
    }
  }
  uint64_t used_bytes() { return stats().slot_bytes; }
};

TEST_F(Punch, AgainstAModel) {
  std::mt19937_64 rng(4);
  const uint64_t kSize = 40 * kChunk + 777;
  Text model(kSize);
  for (char& c : model) c = char(rng() | 1);
  for (uint64_t at = 0; at < kSize; at += kIov)
    ASSERT_GT(write(at, Text(model.begin() + long(at), model.begin() + long(std::min(kSize, at + kIov)))), 0);
  for (int i = 0; i < 300; ++i) {
    const bool aligned = rng() % 3 == 0;
    uint64_t off = rng() % kSize, n = rng() % (rng() % 4 == 0 ? 12 * kChunk : kChunk / 2);
    if (aligned) {
      off -= off % kChunk;
      n += kChunk;
    }
    const uint64_t end = std::min(kSize, off + n);
    if (rng() % 2 == 0) {
      ASSERT_EQ(punch(off, n), 0);
      std::fill(model.begin() + long(off), model.begin() + long(std::max(off, end)), 0);
    } else if (off < end) {
      Text t(std::min<uint64_t>(end - off, kIov));
      for (char& c : t) c = char(rng() | 1);
      ASSERT_EQ(write(off, t), int64_t(t.size()));
      std::copy(t.begin(), t.end(), model.begin() + long(off));
    }
    if (i % 30 == 0) {
      ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
    }
    if (i % 10 == 0) expect(model);
  }
  expect(model);
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  expect(model);
}

TEST_F(Punch, SpaceComesBackAndTheSizeStays) {
  const Text t(kIov, 7);
  for (uint64_t at = 0; at < 8 * kIov; at += kIov) ASSERT_EQ(write(at, t), int64_t(kIov));
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  ASSERT_GE(used_bytes(), 8 * kIov);
  ASSERT_EQ(punch(kChunk + 1, 8 * kIov - 2 * kChunk), 0);
  EXPECT_LE(used_bytes(), 4 * kChunk);
  EXPECT_EQ(read(8 * kIov - 10, 100), 10);
  ASSERT_EQ(punch(0, uint64_t(INT64_MAX)), 0);  // past the end: what there is
  EXPECT_EQ(used_bytes(), 0u);
  EXPECT_EQ(read(8 * kIov - 10, 100), 10);
  EXPECT_EQ(static_cast<char*>(iov_.base)[9], 0);
}

TEST_F(Punch, BytesThatAreOnlyInMemoryGoToo) {
  const Text t(3 * kChunk - 100, 7);
  ASSERT_EQ(write(50, t), int64_t(t.size()));  // no chunk is whole: all of it waits
  ASSERT_EQ(punch(kChunk, kChunk), 0);
  ASSERT_EQ(punch(100, 100), 0);
  Text model(3 * kChunk - 50, 7);
  std::fill(model.begin(), model.begin() + 50, 0);
  std::fill(model.begin() + 100, model.begin() + 200, 0);
  std::fill(model.begin() + long(kChunk), model.begin() + long(2 * kChunk), 0);
  expect(model);
  EXPECT_EQ(read(kChunk + 5, 10, KVFS_SQE_NO_HOLES), -ENODATA);
  EXPECT_EQ(read(100, 10, KVFS_SQE_NO_HOLES), 10);  // a part of a chunk: zeros, no hole
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  expect(model);
}

TEST_F(Punch, SparseFilesOfAnySize) {
  const uint64_t kHuge = uint64_t(1) << 62;
  ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, kHuge), 0);
  ASSERT_EQ(write(kChunk * 5, Text(100, 1)), 100);
  ASSERT_EQ(write(kHuge - kChunk, Text(100, 2)), 100);
  ASSERT_EQ(punch(1, kHuge - 2 * kChunk), 0);  // walks the store, not the range
  EXPECT_EQ(read(kChunk * 5, 100), 100);
  EXPECT_EQ(static_cast<char*>(iov_.base)[0], 0);
  EXPECT_EQ(read(kHuge - kChunk, 100), 100);
  EXPECT_EQ(static_cast<char*>(iov_.base)[0], 2);  // behind the range
}

TEST_F(Punch, Refused) {
  EXPECT_EQ(punch(0, uint64_t(1) << 63), -EFBIG);
  EXPECT_EQ(punch(uint64_t(INT64_MAX), 1), -EFBIG);
  EXPECT_EQ(punch(100, 100), 0);  // beyond the end
  const int fd = ::open((dir_ + "/file").c_str(), O_RDONLY | O_CLOEXEC);
  handle_ = kvfs_file_register(client_, fd);
  ASSERT_GE(handle_, 0);
  ::close(fd);
  EXPECT_EQ(punch(0, 1), -EBADF);
  start_op(KVFS_OP_WRITE, 0, 1, 0, KVFS_SQE_NO_HOLES);
  EXPECT_EQ(end_op(10 * kSec), -EINVAL);
}

TEST_F(Punch, WhatTheKernelHasIsDroppedFirst) {
  ASSERT_EQ(write(0, Text(100, 1)), 100);
  char byte;
  ASSERT_EQ(own(KVFS_OP_INODE_READ, 0, &byte, 1, KVFS_SQE_FUSE), 1);
  std::thread answers([&] { answer_upcall(KVFS_UPCALL_DROP, 0); });
  EXPECT_EQ(punch(0, 50), 0);
  answers.join();
}

}  // namespace
