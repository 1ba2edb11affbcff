// hf3fs_objects_test.cpp tests the calls that make and end things: shared memory, rings, registered descriptors, and what a
// mount and a GPU are asked.
#include <errno.h>
#include <sys/mman.h>

#include <chrono>

#include "hf3fs_fixture.h"

namespace {

constexpr uint8_t kNoId[16] = {};

// Whether somebody's iov of this size can be found by name.
bool size_is_named(uint64_t bytes) {
  for (const auto& e : std::filesystem::directory_iterator("/dev/shm")) {
    std::error_code gone;
    if (e.path().filename().string().rfind("kvfs-iov-", 0) == 0 && e.file_size(gone) == bytes) return true;
  }
  return false;
}

bool named(const hf3fs_iov& v) {
  std::string out = "/dev/shm/kvfs-iov-";
  for (char c : v.id) {
    char hex[3];
    snprintf(hex, sizeof hex, "%02x", uint8_t(c));
    out += hex;
  }
  return access(out.c_str(), F_OK) == 0;
}

class Hf3fsObjects : public Hf3fsTest {
 protected:
  void SetUp() override {
    Hf3fsTest::SetUp();
    ASSERT_EQ(hf3fs_iorcreate(&writes_, mount(), 8, false, 0, -1), 0);
    ASSERT_EQ(hf3fs_iorcreate(&reads_, mount(), 8, true, 0, -1), 0);
    fd_ = open_file("file");
    ASSERT_LE(hf3fs_reg_fd(fd_, 0), 0);
  }
  void TearDown() override {
    hf3fs_dereg_fd(fd_);
    close(fd_);
    hf3fs_iordestroy(&writes_);
    hf3fs_iordestroy(&reads_);
    Hf3fsTest::TearDown();
  }
  // Whether the memory works for a write and a read.
  void expect_works(const hf3fs_iov& v, char fill) {
    memset(v.base, fill, 4096);
    ASSERT_EQ(io(writes_, v, fd_, 0, 4096), 4096);
    memset(v.base, 0, 4096);
    ASSERT_EQ(io(reads_, v, fd_, 0, 4096), 4096);
    EXPECT_EQ(v.base[4095], uint8_t(fill));
  }
  // MAP_SHARED memory of a named file in /dev/shm.
  static uint8_t* map_named(const char* name, size_t bytes, int* fd) {
    *fd = shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
    EXPECT_GE(*fd, 0);
    EXPECT_EQ(ftruncate(*fd, off_t(bytes)), 0);
    return static_cast<uint8_t*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0));
  }

  hf3fs_ior reads_{}, writes_{};
  int fd_ = -1;
};

TEST_F(Hf3fsObjects, IovCreate) {
  hf3fs_iov v;
  memset(&v, 0xee, sizeof v);
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 10'000, 4096, 0), 0);
  EXPECT_NE(v.base, nullptr);
  EXPECT_NE(v.iovh, nullptr);
  EXPECT_NE(memcmp(v.id, kNoId, 16), 0);
  EXPECT_STREQ(v.mount_point, mount());
  EXPECT_EQ(v.size, 10'000u);
  EXPECT_EQ(v.block_size, 4096u);
  EXPECT_EQ(v.numa, 0);
  for (size_t i = 0; i < v.size; ++i) ASSERT_EQ(v.base[i], 0);
  expect_works(v, 5);
  EXPECT_TRUE(named(v));
  hf3fs_iovdestroy(&v);
  EXPECT_FALSE(named(v));
  EXPECT_EQ(v.base, nullptr);
  hf3fs_iovdestroy(&v);
  hf3fs_iovdestroy(nullptr);

  EXPECT_EQ(hf3fs_iovcreate(nullptr, mount(), 4096, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, nullptr, 4096, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, "", 4096, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, std::string(256, 'x').c_str(), 4096, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, mount(), 0, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, mount(), SIZE_MAX, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate(&v, "/nowhere", 4096, 0, -1), -ENOENT);
  EXPECT_EQ(hf3fs_iovcreate(&v, "/dev", 4096, 0, -1), -ENOENT);  // no mount of ours
  constexpr size_t kTooMuch = (size_t{5} << 30) + 77 * 4096;
  EXPECT_EQ(hf3fs_iovcreate(&v, mount(), kTooMuch, 0, -1), -EDQUOT);
  EXPECT_FALSE(size_is_named(kTooMuch));
}

TEST_F(Hf3fsObjects, IovOpen) {
  hf3fs_iov made{}, opened{};
  ASSERT_EQ(hf3fs_iovcreate(&made, mount(), 8192, 0, -1), 0);
  const auto* id = reinterpret_cast<const uint8_t*>(made.id);
  ASSERT_EQ(hf3fs_iovopen(&opened, id, mount(), 8192, 0, -1), 0);
  EXPECT_NE(opened.base, made.base);
  opened.base[8191] = 9;
  EXPECT_EQ(made.base[8191], 9);
  expect_works(opened, 6);
  EXPECT_EQ(hf3fs_iovopen(&opened, id, mount(), 16384, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovopen(&opened, nullptr, mount(), 8192, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovopen(&opened, kNoId, mount(), 8192, 0, -1), -ENOENT);
  EXPECT_TRUE(named(made));
  hf3fs_iovunlink(&made);
  EXPECT_FALSE(named(made));
  hf3fs_iov again{};
  EXPECT_EQ(hf3fs_iovopen(&again, id, mount(), 8192, 0, -1), -ENOENT);
  hf3fs_iovdestroy(&made);
  opened.base[0] = 1;  // who has it goes on
  hf3fs_iovdestroy(&opened);
}

TEST_F(Hf3fsObjects, DestroyingWhatWasOpenedLeavesItToItsMaker) {
  hf3fs_iov made{}, opened{};
  ASSERT_EQ(hf3fs_iovcreate(&made, mount(), 8192, 0, -1), 0);
  ASSERT_EQ(hf3fs_iovopen(&opened, reinterpret_cast<uint8_t*>(made.id), mount(), 8192, 0, -1), 0);
  hf3fs_iovdestroy(&opened);
  ASSERT_EQ(hf3fs_iovopen(&opened, reinterpret_cast<uint8_t*>(made.id), mount(), 8192, 0, -1), 0);
  hf3fs_iovdestroy(&opened);
  expect_works(made, 3);
  hf3fs_iovdestroy(&made);
}

TEST_F(Hf3fsObjects, IovWrap) {
  hf3fs_iov v{};
  EXPECT_EQ(hf3fs_iovwrap(nullptr, &v, kNoId, mount(), 64, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovwrap(&v, nullptr, kNoId, mount(), 64, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovwrap(&v, &v, nullptr, mount(), 64, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovwrap(&v, &v, kNoId, std::string(256, 'x').c_str(), 64, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iovwrap(&v, &v, kNoId, "/nowhere", sizeof v, 0, -1), 0);  // found out later, as in 3FS

  int fd;
  uint8_t* mem = map_named("/kvfs-test-wrap", 1 << 20, &fd);
  ASSERT_EQ(hf3fs_iovwrap(&v, mem, kNoId, mount(), 1 << 20, 0, -1), 0);
  EXPECT_EQ(v.base, mem);
  EXPECT_EQ(v.iovh, nullptr);
  shm_unlink("/kvfs-test-wrap");
  expect_works(v, 7);
  hf3fs_iov part{};
  ASSERT_EQ(hf3fs_iovwrap(&part, mem + 100'001, kNoId, mount(), 8192, 0, -1), 0);  // any part of it
  expect_works(part, 8);
  EXPECT_EQ(stats().iovs, 1u);  // shared once
  hf3fs_iovdestroy(&part);
  hf3fs_iovdestroy(&v);
  mem[0] = 1;  // the caller's
  munmap(mem, 1 << 20);
  close(fd);
}

// Other memory at the same address is not taken for what was there before.
TEST_F(Hf3fsObjects, WrappedAgainAfterARemap) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP()
      << "client and daemon share a process here: the client's look at all descriptors races with the daemon's close";
#endif
  uint8_t* where = nullptr;
  for (int round = 1; round <= 5; ++round) {
    const int fd = memfd_create("engine", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(fd, 65536), 0);
    void* mem =
        mmap(where, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | (where != nullptr ? MAP_FIXED_NOREPLACE : 0), fd, 0);
    ASSERT_NE(mem, MAP_FAILED);
    where = static_cast<uint8_t*>(mem);
    hf3fs_iov v{};
    ASSERT_EQ(hf3fs_iovwrap(&v, where, kNoId, mount(), 65536, 0, -1), 0);
    expect_works(v, char(round));
    munmap(where, 65536);  // never destroyed, as 3FS's callers do
    close(fd);
  }
}

TEST_F(Hf3fsObjects, MoreWrappedMemoryThanASessionHoldsAtOnce) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP()
      << "client and daemon share a process here: the client's look at all descriptors races with the daemon's close";
#endif
  constexpr int kAreas = 300;
  const int fd = memfd_create("engine", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(fd, kAreas * 8192), 0);
  std::vector<uint8_t*> at;
  for (int i = 0; i < kAreas; ++i) {
    void* mem = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, off_t(i) * 8192);
    ASSERT_NE(mem, MAP_FAILED);
    at.push_back(static_cast<uint8_t*>(mem));
    hf3fs_iov v{};
    ASSERT_EQ(hf3fs_iovwrap(&v, mem, kNoId, mount(), 4096, 0, -1), 0);
    expect_works(v, char(i | 1));
  }
  hf3fs_iov first{};
  ASSERT_EQ(hf3fs_iovwrap(&first, at[0], kNoId, mount(), 4096, 0, -1), 0);
  expect_works(first, 3);
  for (uint8_t* mem : at) munmap(mem, 4096);
  close(fd);
}

TEST_F(Hf3fsObjects, IorCreate) {
  hf3fs_ior r;
  memset(&r, 0xee, sizeof r);
  ASSERT_EQ(hf3fs_iorcreate3(&r, mount(), 7, true, -3, 1, 9, 0), 0);
  EXPECT_NE(r.iorh, nullptr);
  EXPECT_STREQ(r.mount_point, mount());
  EXPECT_TRUE(r.for_read);
  EXPECT_EQ(r.io_depth, -3);
  EXPECT_EQ(r.priority, 1);
  EXPECT_EQ(r.timeout, 9);
  EXPECT_EQ(r.flags, 0u);
  EXPECT_EQ(r.iov.size, hf3fs_ior_size(7));
  EXPECT_EQ(hf3fs_io_entries(&r), 7);
  hf3fs_iordestroy(&r);
  EXPECT_EQ(r.iorh, nullptr);
  hf3fs_iordestroy(&r);
  hf3fs_iordestroy(nullptr);
  EXPECT_EQ(hf3fs_io_entries(&r), -EINVAL);
  EXPECT_EQ(hf3fs_io_entries(nullptr), -EINVAL);
  ASSERT_EQ(hf3fs_iorcreate2(&r, mount(), 1, false, 1, -1, -1), 0);
  hf3fs_iordestroy(&r);
  ASSERT_EQ(hf3fs_iorcreate4(&r, mount(), 65536, true, 0, 0, -1, 3), 0);
  EXPECT_EQ(r.flags, 3u);
  hf3fs_iordestroy(&r);

  EXPECT_EQ(hf3fs_iorcreate(nullptr, mount(), 8, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, nullptr, 8, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, "", 8, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, std::string(256, 'x').c_str(), 8, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, mount(), 0, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, mount(), 65537, true, 0, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, mount(), 8, true, 9, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate3(&r, mount(), 8, true, 0, 0, -1, -1), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate4(&r, mount(), 8, true, 0, 0, -1, 4), -EINVAL);
  EXPECT_EQ(hf3fs_iorcreate(&r, "/nowhere", 8, true, 0, -1), -ENOENT);
  EXPECT_EQ(hf3fs_iorcreate(&r, "/dev", 8, true, 0, -1), -ENOENT);
  stop();
  EXPECT_EQ(hf3fs_iorcreate(&r, mount(), 8, true, 0, -1), -EREMOTEIO);
}

TEST_F(Hf3fsObjects, IorSize) {
  EXPECT_EQ(hf3fs_ior_size(0), 0u);
  EXPECT_EQ(hf3fs_ior_size(-1), 0u);
  EXPECT_GT(hf3fs_ior_size(1), 0u);
  EXPECT_GT(hf3fs_ior_size(1000), hf3fs_ior_size(10));
}

TEST_F(Hf3fsObjects, ManyRingsAtOnce) {
  std::vector<hf3fs_ior> rings(200);
  hf3fs_iov v{};
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 4096, 0, -1), 0);
  for (auto& r : rings) ASSERT_EQ(hf3fs_iorcreate(&r, mount(), 64, false, 0, -1), 0);
  for (auto& r : rings) EXPECT_EQ(io(r, v, fd_, 0, 4096), 4096);
  for (auto& r : rings) hf3fs_iordestroy(&r);
  EXPECT_LE(stats().rings, 40u);  // what is kept for the next
  hf3fs_iovdestroy(&v);
}

TEST_F(Hf3fsObjects, ARingPerCallIsCheap) {
  hf3fs_iov v{};
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 4096, 0, -1), 0);
  constexpr int kRounds = 5000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
    hf3fs_ior r{};
    ASSERT_EQ(hf3fs_iorcreate4(&r, mount(), 64, i % 2 == 0, 0, 0, -1, 0), 0);
    hf3fs_iordestroy(&r);
  }
  const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  printf("%.0f rings made and destroyed per second\n", kRounds / s);
  for (int i = 0; i < 100; ++i) {
    hf3fs_ior r{};
    ASSERT_EQ(hf3fs_iorcreate4(&r, mount(), 64, i % 2 == 0, 0, 0, -1, 0), 0);
    ASSERT_EQ(io(r, v, fd_, 0, 4096), i == 0 ? 0 : 4096);
    hf3fs_iordestroy(&r);
  }
  hf3fs_iovdestroy(&v);
}

TEST_F(Hf3fsObjects, RegisterDescriptors) {
  hf3fs_iov v{};
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 4096, 0, -1), 0);
  EXPECT_EQ(hf3fs_reg_fd(-1, 0), EBADF);
  EXPECT_EQ(hf3fs_reg_fd(987, 0), EBADF);
  EXPECT_EQ(hf3fs_reg_fd(fd_, 0), EINVAL);  // already
  const int foreign = open("/dev/null", O_RDWR | O_CLOEXEC), directory = open(mount(), O_RDONLY | O_CLOEXEC);
  const int path = open((dir_ + "/file").c_str(), O_PATH | O_CLOEXEC);
  EXPECT_EQ(hf3fs_reg_fd(foreign, 0), EBADF);
  EXPECT_EQ(hf3fs_reg_fd(directory, 0), EBADF);
  EXPECT_EQ(hf3fs_reg_fd(path, 0), EBADF);
  for (int fd : {foreign, directory, path}) close(fd);

  const int other = open_file("other");
  const int handle = hf3fs_reg_fd(other, 0);
  ASSERT_LE(handle, 0);
  EXPECT_EQ(io(writes_, v, other, 0, 100), 100);
  EXPECT_EQ(io(writes_, v, handle, 100, 100), 100);
  EXPECT_EQ(io(reads_, v, handle, 0, 4096), 200);
  close(other);  // the file stays usable
  EXPECT_EQ(io(reads_, v, other, 0, 4096), 200);
  hf3fs_dereg_fd(other);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &v, true, v.base, other, 0, 1, nullptr), -EBADF);
  EXPECT_EQ(hf3fs_prep_io(&reads_, &v, true, v.base, handle, 0, 1, nullptr), -EBADF);
  hf3fs_dereg_fd(other);
  hf3fs_dereg_fd(-1);
  hf3fs_iovdestroy(&v);
}

TEST_F(Hf3fsObjects, OperationsGoOnAfterDeregistering) {
  hf3fs_iov v{};
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 4096, 0, -1), 0);
  const int a = open_file("a");
  ASSERT_LE(hf3fs_reg_fd(a, 0), 0);
  v.base[0] = 'a';
  ASSERT_GE(hf3fs_prep_io(&writes_, &v, false, v.base, a, 0, 1, nullptr), 0);
  hf3fs_dereg_fd(a);
  const int b = open_file("b");
  ASSERT_LE(hf3fs_reg_fd(b, 0), 0);  // must not get the place of what is still used
  ASSERT_EQ(hf3fs_submit_ios(&writes_), 0);
  hf3fs_cqe q{};
  ASSERT_EQ(hf3fs_wait_for_ios(&writes_, &q, 1, 1, nullptr), 1);
  EXPECT_EQ(q.result, 1);
  EXPECT_EQ(io(reads_, v, b, 0, 10), 0);
  hf3fs_dereg_fd(b);
  close(b);
  ASSERT_LE(hf3fs_reg_fd(a, 0), 0);
  EXPECT_EQ(io(reads_, v, a, 0, 10), 1);
  hf3fs_dereg_fd(a);
  close(a);
  hf3fs_iovdestroy(&v);
}

TEST_F(Hf3fsObjects, PunchHole) {
  hf3fs_iov v{};
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 1 << 20, 0, -1), 0);
  memset(v.base, 7, 1 << 20);
  ASSERT_EQ(io(writes_, v, fd_, 0, 1 << 20), 1 << 20);
  const size_t start[] = {100, 65536, 900'000}, end[] = {200, 3 * 65536, 900'000};
  EXPECT_EQ(hf3fs_punchhole(fd_, 3, start, end, 0), 0);
  ASSERT_EQ(io(reads_, v, fd_, 0, 1 << 20), 1 << 20);
  for (size_t i = 0; i < 1 << 20; ++i)
    ASSERT_EQ(v.base[i], (i >= 100 && i < 200) || (i >= 65536 && i < 3 * 65536) ? 0 : 7) << i;
  EXPECT_EQ(hf3fs_punchhole(fd_, 0, nullptr, nullptr, 0), 0);
  EXPECT_EQ(hf3fs_punchhole(fd_, 1, nullptr, end, 0), EINVAL);
  EXPECT_EQ(hf3fs_punchhole(fd_, -1, start, end, 0), EINVAL);
  EXPECT_EQ(hf3fs_punchhole(fd_, 1, start, end, 1), EINVAL);
  EXPECT_EQ(hf3fs_punchhole(fd_, 1, end, start, 0), EINVAL);
  EXPECT_EQ(hf3fs_punchhole(-1, 1, start, end, 0), EBADF);
  const int readable = open_file("file", O_RDONLY);
  EXPECT_EQ(hf3fs_punchhole(readable, 1, start, end, 0), EBADF);
  close(readable);
  hf3fs_iovdestroy(&v);
}

TEST_F(Hf3fsObjects, WhatIsNoMountOfOurs) {
  char mp[256] = "untouched";
  EXPECT_EQ(hf3fs_extract_mount_point(mp, sizeof mp, "/usr/bin"), -1);
  EXPECT_EQ(hf3fs_extract_mount_point(mp, sizeof mp, "/no/such/path"), -1);
  EXPECT_EQ(hf3fs_extract_mount_point(mp, sizeof mp, nullptr), -1);
  EXPECT_STREQ(mp, "untouched");
  EXPECT_FALSE(hf3fs_is_hf3fs(-1));
  EXPECT_FALSE(hf3fs_is_hf3fs(987));
  const int foreign = open("/dev/null", O_RDONLY | O_CLOEXEC);
  EXPECT_FALSE(hf3fs_is_hf3fs(foreign));
  close(foreign);
  EXPECT_EQ(hf3fs_hardlink(nullptr, "x"), EINVAL);
  EXPECT_EQ(hf3fs_hardlink("/no/such/path", "x"), ENOENT);
  EXPECT_EQ(hf3fs_hardlink("/usr/bin", "/tmp/x"), EXDEV);
}

TEST_F(Hf3fsObjects, GpuCallsAreHonest) {
  EXPECT_FALSE(hf3fs_gdr_available());
  EXPECT_EQ(hf3fs_gdr_device_count(), 0);
  hf3fs_iov v{};
  EXPECT_EQ(hf3fs_iovcreate_device(&v, mount(), 4096, 0, 0), -ENOTSUP);
  EXPECT_EQ(hf3fs_iovopen_device(&v, kNoId, mount(), 4096, 0, 0), -ENOTSUP);
  EXPECT_EQ(hf3fs_iovwrap_device(&v, &v, kNoId, mount(), 4096, 0, 0), -ENOTSUP);
  EXPECT_EQ(hf3fs_iovcreate_device(&v, mount(), 4096, 4096, 0), -EINVAL);
  EXPECT_EQ(hf3fs_iovopen_device(&v, kNoId, mount(), 4096, 4096, 0), -EINVAL);
  EXPECT_EQ(hf3fs_iovwrap_device(&v, &v, kNoId, mount(), 4096, 4096, 0), -EINVAL);
  EXPECT_EQ(hf3fs_iovcreate_device(nullptr, mount(), 4096, 0, 0), -EINVAL);
  EXPECT_EQ(v.base, nullptr);
  ASSERT_EQ(hf3fs_iovcreate(&v, mount(), 4096, 0, -1), 0);
  EXPECT_EQ(hf3fs_iov_mem_type(&v), HF3FS_MEM_HOST);
  EXPECT_EQ(hf3fs_iov_device_id(&v), -1);
  EXPECT_EQ(hf3fs_iovsync(&v, 0), 0);
  EXPECT_EQ(hf3fs_iovsync(&v, 1), 0);
  EXPECT_EQ(hf3fs_iovsync(&v, 2), -EINVAL);
  EXPECT_EQ(hf3fs_iovsync(nullptr, 0), -EINVAL);
  hf3fs_iovdestroy(&v);
}

}  // namespace
