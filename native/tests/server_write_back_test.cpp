// server_write_back_test.cpp tests the write-back of file data as a node does it: two submitters on one file against a model,
// sizes that run ahead of the store, little memory, little space, and a stop.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "file_client.h"

namespace {

constexpr uint32_t kIov = 4u << 20, kChunk = 64u << 10;
using Text = std::vector<char>;

char byte_of(uint64_t seed, uint64_t at) {
  const uint64_t x = (at + seed * 1000003) * 0x9e3779b97f4a7c15ull;
  return char(x >> 56 | 1);
}

Text text(uint64_t seed, uint64_t at, size_t n) {
  Text t(n);
  for (size_t i = 0; i < n; ++i) t[i] = byte_of(seed, at + i);
  return t;
}

class NodeWriteBack : public NodeTest {
 protected:
  int64_t own(uint8_t op, uint64_t off = 0, void* mem = nullptr, uint32_t len = 0, uint8_t flags = 0) {
    const kvfs_sqe s = inode_sqe(op, ino_, off, mem, len, flags);
    return kvfs_node_call(node_, &s, 60 * kSec);
  }
  int64_t write(uint64_t off, Text t, uint8_t flags = 0) {
    return own(KVFS_OP_INODE_WRITE, off, t.data(), uint32_t(t.size()), flags);
  }
  Text read(uint64_t off, size_t n) {
    Text t(n, '?');
    const int64_t got = own(KVFS_OP_INODE_READ, off, t.data(), uint32_t(n));
    EXPECT_GE(got, 0);
    t.resize(got < 0 ? 0 : size_t(got));
    return t;
  }
  // What the store has of the file: length by chunk.
  std::map<uint64_t, uint32_t> stored() {
    std::map<uint64_t, uint32_t> out;
    std::vector<kvfs_scan_entry> e(512);
    for (uint64_t cursor = 0; cursor != UINT64_MAX;) {
      const int64_t n = own(KVFS_OP_INODE_SCAN, cursor, e.data(), uint32_t(e.size() * sizeof e[0]));
      EXPECT_GE(n, 0);
      if (n <= 0) break;
      for (size_t i = 0; i < size_t(n) / sizeof e[0]; ++i) {
        uint64_t ino, index;
        memcpy(&ino, e[i].key, 8);
        memcpy(&index, e[i].key + 8, 8);
        if (ino == ino_) out[index] = e[i].length;
        cursor = e[i].cursor;
      }
    }
    return out;
  }
  uint64_t take() {
    uint64_t size = 0, written_ns = 0;
    EXPECT_EQ(kvfs_node_inode_take(node_, ino_, &size, &written_ns), 0);
    return size;
  }
  void restart() {
    stop();
    start();
  }
  void open(uint64_t size = 0) { ASSERT_EQ(kvfs_node_inode_open(node_, ino_, size), 0); }
  void close_inode() { ASSERT_EQ(kvfs_node_inode_close(node_, ino_), 0); }

  uint64_t ino_ = 42;
};

// A file whose bytes are divided between the two submitters, so that each knows what it must read, while they share chunks
// and pages.
class TwoSubmitters : public NodeWriteBack, protected FileClient {
 protected:
  static constexpr uint64_t kSize = 3u << 20;
  void SetUp() override {
    dirty_ = 1u << 20;
    NodeTest::SetUp();
    ino_ = connect_file(node_, dir_, sock_, 64, kIov);
    ASSERT_NE(ino_, 0u);
    static constexpr uint64_t kLengths[] = {100, 5000, 70, 300000, 4096, 9000, 150000, 1};
    for (uint64_t at = 0, i = 0; at < kSize; ++i) {
      const uint64_t n = std::min(kLengths[i % 8], kSize - at);
      ranges_[i / 2 % 2].push_back({at, n});
      at += n;
    }
    model_.assign(kSize, 0);
    answers_ = std::thread([this] {
      pollfd p{kvfs_node_upcall_fd(node_), POLLIN, 0};
      kvfs_upcall u{};
      while (!quiet_) {
        (void)poll(&p, 1, 10);
        while (kvfs_node_next_upcall(node_, &u) == 1) EXPECT_EQ(kvfs_node_answer(node_, u.id, 0), 0);
      }
    });
  }
  void end_answers() {
    quiet_ = true;
    if (answers_.joinable()) answers_.join();
  }
  void TearDown() override {
    kvfs_close(client_);
    end_answers();
    NodeTest::TearDown();
  }
  int64_t client(uint8_t op, uint64_t off, uint32_t len, uint8_t flags = 0) {
    start_op(op, off, len, 0, flags);
    return end_op(60 * kSec);
  }
  // One submitter: writes, reads back what is its own, sometimes syncs.
  void work(int who, uint64_t seed, int steps) {
    std::mt19937_64 rng(seed);
    const bool ours = who == 0;
    for (int i = 0; i < steps && !HasFailure(); ++i) {
      const auto [base, room] = ranges_[who][rng() % ranges_[who].size()];
      const uint64_t from = rng() % 3 == 0 ? 0 : rng() % room;
      const uint64_t most = rng() % 3 == 0 ? room - from : std::min<uint64_t>(room - from, 6000);
      const auto len = uint32_t(1 + rng() % most);
      const uint64_t off = base + from;
      const uint8_t flags = rng() % 16 == 0 ? KVFS_SQE_DURABLE : 0;
      switch (rng() % 8) {
        case 0:
          ASSERT_EQ(ours ? own(KVFS_OP_INODE_FSYNC) : client(KVFS_OP_FSYNC, 0, 0), 0);
          break;
        case 1:
        case 2:
        case 3: {
          Text got(len);
          const int64_t n = ours ? own(KVFS_OP_INODE_READ, off, got.data(), len) : client(KVFS_OP_READ, off, len);
          ASSERT_EQ(n, int64_t(len));
          if (!ours) memcpy(got.data(), iov_.base, len);
          for (uint32_t k = 0; k < len; ++k) ASSERT_EQ(got[k], model_[off + k]) << off + k << " by " << who;
          break;
        }
        default: {
          Text t = text(seed + uint64_t(i), off, len);
          memcpy(&model_[off], t.data(), len);
          if (!ours) memcpy(iov_.base, t.data(), len);
          ASSERT_EQ(ours ? own(KVFS_OP_INODE_WRITE, off, t.data(), len, flags) : client(KVFS_OP_WRITE, off, len, flags),
                    int64_t(len));
        }
      }
    }
  }
  void check() {
    Text all = read(0, kSize);
    ASSERT_EQ(all.size(), kSize);
    for (uint64_t i = 0; i < kSize; ++i) ASSERT_EQ(all[i], model_[i]) << i;
  }

  std::vector<std::pair<uint64_t, uint64_t>> ranges_[2];
  Text model_;
  std::thread answers_;
  std::atomic<bool> quiet_{false};
};

TEST_F(TwoSubmitters, AgainstAModel) {
  for (uint64_t round = 1; round <= 6; ++round) {
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, kSize), 0);
    std::thread other([&] { work(1, round * 1000, 300); });
    work(0, round * 5000, 300);
    other.join();
    if (HasFailure()) return;
    check();
    // Everything from a random place on is cut off, and comes back as zeros.
    std::mt19937_64 rng(round);
    const uint64_t cut = rng() % kSize;
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, cut), 0);
    std::fill(model_.begin() + long(cut), model_.end(), 0);
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, kSize), 0);
    check();
  }
  ASSERT_EQ(own(KVFS_OP_SYNC), 0);
  check();
  kvfs_close(client_);
  client_ = nullptr;
  ASSERT_TRUE(wait_sessions(0));
  end_answers();
  restart();
  open(kSize);
  check();
}

// A truncation and an fsync at once: the flush of what stays brings nothing back of what went.
TEST_F(TwoSubmitters, TruncationBesideFlushes) {
  for (int round = 0; round < 60; ++round) {
    const uint64_t end = 3 * kChunk, cut = 2 * kChunk + 20000;
    ASSERT_EQ(write(0, text(1, 0, end)), int64_t(end));
    ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
    ASSERT_EQ(write(2 * kChunk + 100, text(2, 0, 50)), 50);
    ASSERT_EQ(write(2 * kChunk + 9000, text(2, 0, 50)), 50);
    std::thread other([&] { ASSERT_EQ(client(KVFS_OP_FSYNC, 0, 0), 0); });
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, cut), 0);
    other.join();
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, end), 0);
    const Text tail = read(cut, end - cut);
    for (size_t i = 0; i < tail.size(); ++i) ASSERT_EQ(tail[i], 0) << i << " in round " << round;
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 0), 0);
  }
}

TEST_F(NodeWriteBack, NoSizeIsTakenWhoseBytesAreNotInTheStore) {
  open();
  std::atomic<bool> done{false};
  std::thread writer([&] {
    std::mt19937_64 rng(3);
    uint64_t at = 0;
    while (at < (12u << 20)) {
      const size_t n = 1 + rng() % 20000;
      if (write(at, text(5, at, n)) != int64_t(n)) break;
      at += n;
    }
    EXPECT_GE(at, 12u << 20);
    done = true;
  });
  bool ahead = false;
  for (bool last = false; !last;) {
    last = done;
    const int64_t size = kvfs_node_inode_size(node_, ino_);
    const uint64_t taken = take();
    ahead = ahead || taken < uint64_t(size);
    const auto chunks = stored();
    for (uint64_t at = 0; at < taken; at += kChunk) {
      const auto c = chunks.find(at / kChunk);
      ASSERT_TRUE(c != chunks.end() && c->second >= std::min<uint64_t>(kChunk, taken - at)) << at << " of " << taken;
    }
  }
  writer.join();
  EXPECT_TRUE(ahead);
  const auto size = uint64_t(kvfs_node_inode_size(node_, ino_));
  ASSERT_EQ(own(KVFS_OP_INODE_LAND), 0);
  EXPECT_EQ(take(), size);
  EXPECT_EQ(stats().dirty_bytes, 0u);
}

// The store's journal comes a little after its data; a size that is told before would outlive the bytes in a crash.
TEST_F(NodeWriteBack, LandingIncludesTheJournal) {
  open();
  for (uint64_t i = 0; i < 20; ++i) {
    const uint8_t flags = i % 2 == 0 ? 0 : KVFS_SQE_DURABLE;
    const uint64_t before = stats().journal_groups;
    ASSERT_EQ(write(i * 100, text(11, 0, 100), flags), 100);
    if (flags == 0) {
      EXPECT_EQ(take(), i * 100);
    }
    ASSERT_EQ(own(KVFS_OP_INODE_LAND), 0);
    EXPECT_GT(stats().journal_groups, before);
    EXPECT_EQ(take(), i * 100 + 100);
  }
  for (uint64_t i = 1; i < 20; ++i) {  // full chunks go at once
    const uint64_t before = stats().journal_groups;
    ASSERT_EQ(write(i * kChunk, text(11, 0, kChunk)), int64_t(kChunk));
    while (take() < (i + 1) * kChunk) usleep(20);
    EXPECT_GT(stats().journal_groups, before);
  }
  ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 50), 0);
  EXPECT_EQ(take(), 50u);
  ASSERT_EQ(write(1000, text(11, 0, 100)), 100);
  EXPECT_EQ(take(), 50u);
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  EXPECT_EQ(take(), 1100u);
}

TEST_F(NodeWriteBack, DirtyBytesAreBounded) {
  dirty_ = 1u << 20;
  restart();
  open();
  constexpr size_t kLong = 24u << 20;
  std::atomic<bool> done{false};
  std::thread watch([&] {
    uint64_t most = 0;
    while (!done) most = std::max(most, stats().dirty_bytes);
    EXPECT_LE(most, dirty_);
  });
  EXPECT_EQ(write(33, text(6, 33, kLong)), int64_t(kLong));
  for (uint64_t i = 0; i < 1000; ++i) EXPECT_EQ(write(i * 70000, text(7, i, 10)), 10);  // a page of each of many chunks
  done = true;
  watch.join();
  Text want(33, 0);
  const Text rest = text(6, 33, kLong);
  want.insert(want.end(), rest.begin(), rest.end());
  for (uint64_t i = 0; i * 70000 + 10 <= want.size(); ++i) {
    const Text t = text(7, i, 10);
    std::copy(t.begin(), t.end(), want.begin() + long(i * 70000));
  }
  EXPECT_TRUE(read(0, want.size()) == want);
}

TEST_F(NodeWriteBack, SyncFsyncAndLandWaitForWhatIsDirty) {
  open();
  for (const uint8_t op : {KVFS_OP_SYNC, KVFS_OP_CHECKPOINT, KVFS_OP_INODE_FSYNC, KVFS_OP_INODE_LAND}) {
    ASSERT_EQ(write(5 * kChunk + 7, text(op, 0, 100)), 100);
    EXPECT_NE(stats().dirty_bytes, 0u);
    ASSERT_EQ(own(op), 0);
    EXPECT_EQ(stats().dirty_bytes, 0u);
    EXPECT_EQ(stored(), (std::map<uint64_t, uint32_t>{{5, 107}}));
    EXPECT_EQ(read(5 * kChunk + 7, 100), text(op, 0, 100));
    ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 0), 0);
    EXPECT_TRUE(stored().empty());
  }
}

TEST_F(NodeWriteBack, DeletedAndTruncatedBytesNeverReachTheStore) {
  open();
  ASSERT_EQ(write(0, text(8, 0, 3 * kChunk - 100)), int64_t(3 * kChunk - 100));
  ASSERT_EQ(own(KVFS_OP_INODE_TRUNCATE, 10), 0);
  ASSERT_EQ(own(KVFS_OP_SYNC), 0);
  EXPECT_EQ(stored(), (std::map<uint64_t, uint32_t>{{0, 10}}));
  ASSERT_EQ(write(0, text(8, 0, 100000)), 100000);
  close_inode();
  ASSERT_EQ(own(KVFS_OP_INODE_DELETE, 100000), 0);
  EXPECT_EQ(stats().dirty_bytes, 0u);
  ASSERT_EQ(own(KVFS_OP_SYNC), 0);
  EXPECT_TRUE(stored().empty());
}

TEST_F(NodeWriteBack, AStopLosesNothing) {
  open();
  ASSERT_EQ(write(100, text(9, 100, 200000)), 200000);
  ASSERT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  ASSERT_EQ(write(200100, text(9, 200100, 77777)), 77777);  // dirty still
  restart();
  open(277877);
  EXPECT_EQ(read(100, 277777), text(9, 100, 277777));
}

// Where space is short write() itself fails, and whatever it took is stored: pages of many chunks too, that still wait when
// the rest of the space is written straight to the store.
TEST_F(NodeWriteBack, NoSpaceIsToldByTheWrite) {
  constexpr uint64_t kFull = 42, kScattered = 43;
  for (const uint64_t ino : {kFull, kScattered}) ASSERT_EQ(kvfs_node_inode_open(node_, ino, 0), 0);
  std::mt19937_64 rng(4);
  uint64_t at = 0, scattered = 0;
  bool short_of_space = false;
  for (int failures = 0; failures < 3;) {
    ino_ = kScattered;
    if (!short_of_space) {
      const uint64_t before = stats().dirty_bytes;
      if (write(scattered * kChunk, text(12, scattered, 10)) == 10) ++scattered;
      short_of_space = at > (100u << 20) && stats().dirty_bytes <= before;
    }
    ino_ = kFull;
    const size_t n = failures != 0 ? 1 + rng() % 3000 : short_of_space ? 1u << 20 : 200000;
    const int64_t done = write(at, text(10, at, n));
    ASSERT_TRUE(done == -ENOSPC || done > 0) << done;
    if (done > 0) at += uint64_t(done);
    if (done != int64_t(n)) ++failures;
  }
  EXPECT_GT(at, 100u << 20);
  ASSERT_EQ(uint64_t(kvfs_node_inode_size(node_, ino_)), at);
  for (const uint64_t ino : {kFull, kScattered}) {
    ino_ = ino;
    EXPECT_EQ(own(KVFS_OP_INODE_FSYNC), 0);
  }
  for (uint64_t i = 0; i < scattered; ++i) ASSERT_EQ(read(i * kChunk, 10), text(12, i, 10)) << i;
  ino_ = kFull;
  for (uint64_t i = 0; i < at; i += 1u << 20) {
    const auto n = size_t(std::min<uint64_t>(1u << 20, at - i));
    ASSERT_TRUE(read(i, n) == text(10, i, n)) << i;
  }
}

}  // namespace
