// fuse_stream_test.cpp tests long requests of the mount: writes whose buffers become dirty chunks, and reads made before they
// are asked for. Whatever is lent or read ahead, every answer is what the file holds when it is given.
#include <algorithm>

#include "fuse_channel_fixture.h"

namespace {

constexpr uint32_t kPiece = 256u << 10;

class FuseStreamTest : public FuseChannelTest {
 protected:
  int64_t own(uint8_t op, uint64_t off, std::string* data = nullptr) {
    const kvfs_sqe s =
        data != nullptr ? inode_sqe(op, kIno, off, data->data(), uint32_t(data->size())) : inode_sqe(op, kIno, off);
    return kvfs_node_call(node_, &s, 10 * kSec);
  }
  void model_write(uint64_t off, const std::string& data) {
    if (model_.size() < off + data.size()) model_.resize(off + data.size(), '\0');
    std::copy(data.begin(), data.end(), model_.begin() + ptrdiff_t(off));
  }
  void write(uint64_t off, const std::string& data) {
    expect_written(kIno, off, data);
    model_write(off, data);
  }
  void read(uint64_t off, uint32_t size) {
    expect_answer(read_request(kIno, off, size), 0, off < model_.size() ? model_.substr(off, size) : "");
  }
  std::string model_;
};

TEST_F(FuseStreamTest, WhatIsAcknowledgedIsThereAndMayChangeAtOnce) {
  if (!privileged()) GTEST_SKIP() << "needs long messages";
  std::mt19937_64 random(7);
  for (unsigned i = 0; i < 40; ++i) {
    const uint64_t off = uint64_t{i % 12} * FuseChannel::kMaxIo + (i % 5 == 4 ? 4096 : 0);
    write(off, noise(FuseChannel::kMaxIo, i));
    // Its chunks are on their way to the store.
    const uint64_t at = off + random() % (FuseChannel::kMaxIo - 9000);
    if (i % 2 == 0) write(at, noise(1 + random() % 9000, 100 + i));
    read(at - std::min<uint64_t>(at, 5000), 20000);
    if (i % 7 == 6) {
      const uint64_t size = off + random() % FuseChannel::kMaxIo;
      ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, size), 0);
      model_.resize(size, '\0');
    }
    read(off, FuseChannel::kMaxIo);
  }
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC, 0), 0);
  EXPECT_EQ(stats().dirty_bytes, 0u);
  for (uint64_t off = 0; off < model_.size(); off += FuseChannel::kMaxIo) read(off, FuseChannel::kMaxIo);
}

// More than there are slots, so that each must have come back.
TEST_F(FuseStreamTest, EveryBufferOnLoanComesBack) {
  if (!privileged()) GTEST_SKIP() << "needs long messages";
  for (unsigned i = 0; i < 3 * FuseChannel::kSlots; ++i)
    write(uint64_t{i % 16} * FuseChannel::kMaxIo, noise(FuseChannel::kMaxIo, i));
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC, 0), 0);
  for (unsigned i = 0; i < 16; ++i) read(uint64_t{i} * FuseChannel::kMaxIo, FuseChannel::kMaxIo);
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
}

TEST_F(FuseStreamTest, WhatWasReadAheadIsNeverOld) {
  constexpr uint64_t kPieces = 24;
  for (uint64_t i = 0; i < kPieces; ++i) {
    for (uint64_t part = 0; part < 2; ++part)
      write(i * kPiece + part * (kPiece / 2), noise(kPiece / 2, unsigned(2 * i + part)));
  }
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC, 0), 0);
  std::mt19937_64 random(11);
  for (int pass = 0; pass < 12; ++pass) {
    for (uint64_t off = 0; off <= model_.size(); off += kPiece) {
      read(off, kPiece);
      const uint64_t ahead = off + kPiece + random() % (2 * kPiece);
      std::string data = noise(1 + random() % 70000, unsigned(random()));
      switch (random() % 6) {
        case 0:
          write(ahead, data);
          break;
        case 1:  // another client's
          ASSERT_EQ(own(KVFS_OP_INODE_WRITE, ahead, &data), int64_t(data.size()));
          model_write(ahead, data);
          break;
        case 2:
          if (random() % 4 == 0) {
            ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, ahead), 0);
            model_.resize(ahead, '\0');
          }
          break;
        default:
          break;
      }
    }
    if (model_.size() > 2 * kPieces * kPiece) {
      ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, kPieces * kPiece), 0);
      model_.resize(kPieces * kPiece);
    }
  }
}

TEST_F(FuseStreamTest, ManyReadersInOrderAndAnEndInTheMiddle) {
  constexpr uint64_t kFirst = 100, kReaders = 2 * FuseChannel::kStreams;
  const std::string data = noise(4 * FuseChannel::kStreamIo, 3);
  for (uint64_t ino = kFirst; ino < kFirst + kReaders; ++ino) {
    ASSERT_EQ(kvfs_node_inode_open(node_, ino, 0), 0);
    for (uint64_t off = 0; off < data.size(); off += FuseChannel::kStreamIo)
      expect_written(ino, off, data.substr(off, FuseChannel::kStreamIo));
  }
  for (unsigned turn = 0; turn < 3; ++turn) {
    const uint64_t off = uint64_t{turn} * FuseChannel::kStreamIo;
    for (uint64_t ino = kFirst; ino < kFirst + kReaders; ++ino)
      expect_answer(read_request(ino, off, FuseChannel::kStreamIo), 0, data.substr(off, FuseChannel::kStreamIo));
  }
  expect_nothing(kernel_);  // nobody gets what was only read ahead
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
}

}  // namespace
