// hf3fs_io_test.cpp tests the calls on rings: prepare, submit, wait, and what their results say.
#include <errno.h>
#include <linux/memfd.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "hf3fs_fixture.h"

namespace {

constexpr size_t kIov = 4 << 20;

class Hf3fsIo : public Hf3fsTest {
 protected:
  void SetUp() override {
    Hf3fsTest::SetUp();
    ASSERT_EQ(hf3fs_iovcreate(&iov_, mount(), kIov, 0, -1), 0);
    ASSERT_EQ(hf3fs_iorcreate4(&reads_, mount(), 8, true, 0, 0, -1, 0), 0);
    ASSERT_EQ(hf3fs_iorcreate(&writes_, mount(), 8, false, 0, -1), 0);
    fd_ = open_file("file");
    ASSERT_LE(hf3fs_reg_fd(fd_, 0), 0);
  }
  void TearDown() override {
    hf3fs_dereg_fd(fd_);
    close(fd_);
    hf3fs_iordestroy(&reads_);
    hf3fs_iordestroy(&writes_);
    hf3fs_iovdestroy(&iov_);
    Hf3fsTest::TearDown();
  }
  int64_t write(uint64_t off, uint64_t len, int fill, int fd = -1) {
    memset(iov_.base, fill, len);
    return io(writes_, iov_, fd < 0 ? fd_ : fd, off, len);
  }
  int64_t read(uint64_t off, uint64_t len, const hf3fs_ior* ior = nullptr) {
    memset(iov_.base, 0x5a, len);
    return io(ior != nullptr ? *ior : reads_, iov_, fd_, off, len);
  }
  // How many of the memory's first n bytes are c.
  size_t count(size_t n, int c) const { return size_t(std::count(iov_.base, iov_.base + n, uint8_t(c))); }
  int prep(const hf3fs_ior& ior, uint64_t off, uint64_t len, const void* user = nullptr) {
    return hf3fs_prep_io(&ior, &iov_, ior.for_read, iov_.base + off % (kIov / 2), fd_, off, len, user);
  }

  hf3fs_iov iov_{};
  hf3fs_ior reads_{}, writes_{};
  int fd_ = -1;
};

TEST_F(Hf3fsIo, WhatIsWrittenIsRead) {
  EXPECT_EQ(write(0, 1 << 20, 7), 1 << 20);
  EXPECT_EQ(read(0, 1 << 20), 1 << 20);
  EXPECT_EQ(count(1 << 20, 7), size_t{1} << 20);
}

TEST_F(Hf3fsIo, ShortAtTheEndAndZerosInHoles) {
  EXPECT_EQ(read(0, 100), 0);
  EXPECT_EQ(write(200'000, 1000, 3), 1000);
  EXPECT_EQ(read(200'500, 4096), 500);
  EXPECT_EQ(count(500, 3), 500u);
  EXPECT_EQ(read(201'000, 4096), 0);
  EXPECT_EQ(read(0, 100'000), 100'000);
  EXPECT_EQ(count(100'000, 0), 100'000u);
}

TEST_F(Hf3fsIo, HolesAreErrorsIfSaid) {
  hf3fs_ior strict{};
  ASSERT_EQ(hf3fs_iorcreate4(&strict, mount(), 4, true, 0, 0, -1, HF3FS_IOR_FORBID_READ_HOLES), 0);
  EXPECT_EQ(read(0, 100, &strict), 0);  // the end of the file is none
  ASSERT_EQ(write(0, 1000, 1), 1000);
  ASSERT_EQ(write(1 << 20, 65536, 1), 65536);
  EXPECT_EQ(read(0, 1000, &strict), 1000);
  EXPECT_EQ(read(1 << 20, 1 << 20, &strict), 65536);
  EXPECT_EQ(read(0, 1001, &strict), -ENODATA);
  EXPECT_EQ(read(65536, 1, &strict), -ENODATA);
  EXPECT_EQ(read((1 << 20) - 1, 2, &strict), -ENODATA);
  // The same once it is in the store.
  const kvfs_sqe s = inode_sqe(KVFS_OP_INODE_FSYNC, inode_of(fd_), 0);
  ASSERT_EQ(kvfs_node_call(node_, &s, 10 * kSec), 0);
  EXPECT_EQ(read(0, 1000, &strict), 1000);
  EXPECT_EQ(read(0, 1001, &strict), -ENODATA);
  EXPECT_EQ(read(0, 1001), 1001);
  hf3fs_iordestroy(&strict);
}

TEST_F(Hf3fsIo, PrepareRefuses) {
  uint8_t* p = iov_.base;
  EXPECT_EQ(hf3fs_prep_io(nullptr, &iov_, true, p, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, nullptr, true, p, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, false, p, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&writes_, &iov_, true, p, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p, fd_, 0, 0, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, nullptr, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p - 1, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p + kIov, fd_, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p + 1, fd_, 0, kIov, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p + 1, fd_, 0, UINT64_MAX, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p, fd_, size_t{INT64_MAX}, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p, fd_ + 100, 0, 1, nullptr), -EBADF);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, p, INT32_MIN, 0, 1, nullptr), -EINVAL);
  hf3fs_ior none{};
  EXPECT_EQ(hf3fs_prep_io(&none, &iov_, false, p, fd_, 0, 1, nullptr), -EINVAL);
  std::vector<uint8_t> heap(4096);
  hf3fs_iov private_memory{};
  const uint8_t id[16] = {};
  ASSERT_EQ(hf3fs_iovwrap(&private_memory, heap.data(), id, mount(), heap.size(), 0, -1), 0);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &private_memory, true, heap.data(), fd_, 0, 1, nullptr), -EINVAL);
}

TEST_F(Hf3fsIo, TheDescriptorsAccessModeCounts) {
  const int r = open_file("file", O_RDONLY), w = open_file("file", O_WRONLY);
  ASSERT_LE(hf3fs_reg_fd(r, 0), 0);
  ASSERT_LE(hf3fs_reg_fd(w, 0), 0);
  EXPECT_EQ(hf3fs_prep_io(&writes_, &iov_, false, iov_.base, r, 0, 1, nullptr), -EACCES);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &iov_, true, iov_.base, w, 0, 1, nullptr), -EACCES);
  EXPECT_EQ(write(0, 10, 1, w), 10);
  EXPECT_EQ(io(reads_, iov_, r, 0, 10), 10);
  for (int fd : {r, w}) {
    hf3fs_dereg_fd(fd);
    close(fd);
  }
}

TEST_F(Hf3fsIo, AFullRing) {
  ASSERT_EQ(hf3fs_io_entries(&writes_), 8);
  for (int i = 0; i < 8; ++i) EXPECT_GE(prep(writes_, uint64_t(i) * 4096, 4096), 0);
  EXPECT_EQ(prep(writes_, 0, 4096), -EAGAIN);
  ASSERT_EQ(hf3fs_submit_ios(&writes_), 0);
  hf3fs_cqe q[8];
  int got = hf3fs_wait_for_ios(&writes_, q, 3, 3, nullptr);
  EXPECT_EQ(got, 3);
  for (int i = 0; i < 3; ++i) EXPECT_GE(prep(writes_, uint64_t(i) * 4096, 4096), 0);  // taken: free again
  EXPECT_EQ(prep(writes_, 0, 4096), -EAGAIN);
  for (got = 0; got < 8;) got += hf3fs_wait_for_ios(&writes_, q, 8, 1, nullptr);
  EXPECT_EQ(got, 8);
}

TEST_F(Hf3fsIo, EveryOperationEndsOnce) {
  std::vector<int> seen(5);
  for (int& s : seen) ASSERT_GE(prep(writes_, uint64_t(&s - seen.data()) * 70'000, 70'000, &s), 0);
  ASSERT_EQ(hf3fs_submit_ios(&writes_), 0);
  hf3fs_cqe q[8];
  ASSERT_EQ(hf3fs_wait_for_ios(&writes_, q, 8, 5, nullptr), 5);
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(q[i].result, 70'000);
    EXPECT_EQ(q[i].reserved, 0);
    ++*static_cast<int*>(const_cast<void*>(q[i].userdata));
  }
  EXPECT_EQ(seen, std::vector<int>(5, 1));
}

TEST_F(Hf3fsIo, WaitRefusesAndTimesOut) {
  hf3fs_cqe q[8];
  EXPECT_EQ(hf3fs_wait_for_ios(nullptr, q, 1, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, nullptr, 1, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 0, 1, nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_submit_ios(nullptr), -EINVAL);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, 0, nullptr), 0);   // polls
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, -5, nullptr), 0);  // polls
  const timespec past = in_ms(-1000), soon = in_ms(60);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, 1, &past), 0);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, 1, &soon), 0);
  const timespec now = in_ms(0);
  EXPECT_TRUE(now.tv_sec > soon.tv_sec || (now.tv_sec == soon.tv_sec && now.tv_nsec >= soon.tv_nsec));
  // A timeout gives what there is, and no error.
  ASSERT_GE(prep(writes_, 0, 4096), 0);
  ASSERT_EQ(hf3fs_submit_ios(&writes_), 0);
  const timespec later = in_ms(100);
  EXPECT_EQ(hf3fs_wait_for_ios(&writes_, q, 8, 5, &later), 1);
}

TEST_F(Hf3fsIo, PollingFindsResults) {
  ASSERT_GE(prep(writes_, 0, 4096), 0);
  ASSERT_EQ(hf3fs_submit_ios(&writes_), 0);
  hf3fs_cqe q[1];
  int got = 0;
  while (got == 0) got = hf3fs_wait_for_ios(&writes_, q, 1, 0, nullptr);
  EXPECT_EQ(got, 1);
  EXPECT_EQ(q[0].result, 4096);
}

TEST_F(Hf3fsIo, PositiveDepthMeansExactBatches) {
  hf3fs_ior batched{};
  ASSERT_EQ(hf3fs_iorcreate3(&batched, mount(), 8, false, 3, 0, 5, -1), 0);
  hf3fs_cqe q[8];
  for (uint64_t i = 0; i < 2; ++i) ASSERT_GE(prep(batched, i * 4096, 4096), 0);
  ASSERT_EQ(hf3fs_submit_ios(&batched), 0);
  timespec soon = in_ms(50);
  EXPECT_EQ(hf3fs_wait_for_ios(&batched, q, 8, 1, &soon), 0);
  for (uint64_t i = 2; i < 5; ++i) ASSERT_GE(prep(batched, i * 4096, 4096), 0);
  ASSERT_EQ(hf3fs_submit_ios(&batched), 0);
  EXPECT_EQ(hf3fs_wait_for_ios(&batched, q, 8, 3, nullptr), 3);
  soon = in_ms(50);
  EXPECT_EQ(hf3fs_wait_for_ios(&batched, q, 8, 1, &soon), 0);  // two are left
  ASSERT_GE(prep(batched, 0, 4096), 0);
  ASSERT_EQ(hf3fs_submit_ios(&batched), 0);
  EXPECT_EQ(hf3fs_wait_for_ios(&batched, q, 8, 3, nullptr), 3);
  hf3fs_iordestroy(&batched);
}

TEST_F(Hf3fsIo, NegativeDepthNeverKeepsAPartialBatch) {
  hf3fs_ior at_most{};
  ASSERT_EQ(hf3fs_iorcreate3(&at_most, mount(), 8, false, -4, 0, 100, -1), 0);
  hf3fs_cqe q[8];
  for (uint64_t n = 1; n <= 8; ++n) {
    for (uint64_t i = 0; i < n; ++i) ASSERT_GE(prep(at_most, i * 4096, 4096), 0);
    if (n % 2 == 0) {
      ASSERT_EQ(hf3fs_submit_ios(&at_most), 0);  // only a hint
    }
    EXPECT_EQ(hf3fs_wait_for_ios(&at_most, q, 8, int(n), nullptr), int(n));
  }
  hf3fs_iordestroy(&at_most);
}

TEST_F(Hf3fsIo, MoreEntriesThanTheRingBehindHas) {
  hf3fs_ior wide{};
  ASSERT_EQ(hf3fs_iorcreate(&wide, mount(), 10'000, false, 0, -1), 0);
  EXPECT_EQ(hf3fs_io_entries(&wide), 10'000);
  for (uint64_t i = 0; i < 10'000; ++i) ASSERT_GE(prep(wide, i * 16, 16), 0);
  EXPECT_EQ(prep(wide, 0, 16), -EAGAIN);
  ASSERT_EQ(hf3fs_submit_ios(&wide), 0);
  std::vector<hf3fs_cqe> q(10'000);
  ASSERT_EQ(hf3fs_wait_for_ios(&wide, q.data(), 10'000, 10'000, nullptr), 10'000);
  for (const hf3fs_cqe& c : q) ASSERT_EQ(c.result, 16);
  hf3fs_iordestroy(&wide);
}

// Whoever prepares, submits and waits: each operation ends once, with its own bytes.
TEST_F(Hf3fsIo, ThreadsShareARing) {
  hf3fs_ior ring{};
  ASSERT_EQ(hf3fs_iorcreate(&ring, mount(), 64, false, 0, -1), 0);
  constexpr int kThreads = 4, kEach = 500;
  std::atomic<int> taken{0};
  std::vector<std::atomic<int>> ends(kThreads * kEach);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      hf3fs_cqe q[16];
      for (int made = 0; taken < kThreads * kEach;) {
        while (made < kEach) {
          const int n = t * kEach + made;
          if (hf3fs_prep_io(&ring, &iov_, false, iov_.base, fd_, size_t(n) * 512, 512, &ends[size_t(n)]) < 0) break;
          ++made;
        }
        EXPECT_EQ(hf3fs_submit_ios(&ring), 0);
        const timespec soon = in_ms(20);
        const int got = hf3fs_wait_for_ios(&ring, q, 16, made < kEach ? 1 : 4, &soon);
        ASSERT_GE(got, 0);
        for (int i = 0; i < got; ++i) {
          EXPECT_EQ(q[i].result, 512);
          ++*static_cast<std::atomic<int>*>(const_cast<void*>(q[i].userdata));
        }
        taken += got;
      }
    });
  }
  for (auto& t : threads) t.join();
  for (auto& e : ends) EXPECT_EQ(e, 1);
  hf3fs_iordestroy(&ring);
}

// Destroying waits for what is under way: the memory is ours afterwards.
TEST_F(Hf3fsIo, DestroyedWithOperationsUnderWay) {
  for (int round = 0; round < 20; ++round) {
    hf3fs_ior ring{};
    ASSERT_EQ(hf3fs_iorcreate(&ring, mount(), 64, false, 0, -1), 0);
    for (uint64_t i = 0; i < 64; ++i) ASSERT_GE(prep(ring, i * 32768, 32768), 0);
    ASSERT_EQ(hf3fs_submit_ios(&ring), 0);
    hf3fs_iordestroy(&ring);
    hf3fs_iordestroy(&ring);
  }
  EXPECT_EQ(write(0, 100, 9), 100);
}

TEST_F(Hf3fsIo, TheDaemonsEnd) {
  ASSERT_EQ(write(0, 4096, 1), 4096);
  for (uint64_t i = 0; i < 3; ++i) ASSERT_GE(prep(reads_, 0, 4096), 0);
  std::thread waiter([&] {  // with nothing under way
    hf3fs_cqe q[1];
    EXPECT_EQ(hf3fs_wait_for_ios(&writes_, q, 1, 1, nullptr), -EREMOTEIO);
  });
  stop();
  waiter.join();
  ASSERT_EQ(hf3fs_submit_ios(&reads_), 0);
  hf3fs_cqe q[8];
  ASSERT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, 3, nullptr), 3);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(q[i].result, -EREMOTEIO);
  EXPECT_EQ(hf3fs_wait_for_ios(&reads_, q, 8, 1, nullptr), -EREMOTEIO);
  EXPECT_EQ(hf3fs_wait_for_ios(&writes_, q, 8, 0, nullptr), -EREMOTEIO);
  if (prep(writes_, 0, 4096) >= 0) {
    EXPECT_EQ(hf3fs_submit_ios(&writes_), 0);
    EXPECT_EQ(hf3fs_wait_for_ios(&writes_, q, 8, 1, nullptr), 1);
    EXPECT_EQ(q[0].result, -EREMOTEIO);
  }
  // With the next daemon new rings work; memory is shared again by itself.
  start();
  ASSERT_EQ(kvfs_node_inode_open(node_, inode_of(fd_), 0), 0);
  hf3fs_ior again{};
  ASSERT_EQ(hf3fs_iorcreate(&again, mount(), 8, false, 0, -1), 0);
  EXPECT_EQ(prep(again, 0, 4096), -EBADF);  // what was registered went with the old one
  ASSERT_LE(hf3fs_reg_fd(fd_, 0), 0);
  EXPECT_EQ(io(again, iov_, fd_, 0, 4096), 4096);
  hf3fs_iordestroy(&again);
}

}  // namespace
