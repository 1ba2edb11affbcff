// uring_device_test.cpp checks the io_uring device on a real file, and the reactor's single place to wait.
#include "../store/uring_device.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "../store/check.h"
#include "sim_device.h"

namespace kvfs {
namespace {

constexpr uint64_t kSize = 8u << 20;

struct Buffer {
  void* p = nullptr;
  explicit Buffer(size_t n) { KVFS_CHECK(posix_memalign(&p, 4096, n) == 0); }
  ~Buffer() { free(p); }
  uint8_t* bytes() { return static_cast<uint8_t*>(p); }
};

uint64_t now_ms() {
  return static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now().time_since_epoch())
          .count());
}

class UringDeviceTest : public testing::Test {
 protected:
  void SetUp() override {
    const char* base = std::getenv("TMPDIR");
    std::string t = std::string(base != nullptr ? base : "/tmp") + "/kvfs-uring-XXXXXX";
    ASSERT_NE(mkdtemp(t.data()), nullptr);
    dir_ = t;
    path_ = dir_ + "/image";
    UringOptions opt;
    opt.entries = 16;  // less than the tests keep in flight
    const Status st = Uring::create(opt, &ring_);
    if (st.err == ENOSYS || st.err == EPERM) GTEST_SKIP() << st.message;
    ASSERT_TRUE(st) << st.message;
  }
  void TearDown() override {
    dev_.reset();
    ring_.reset();
    unlink(path_.c_str());
    rmdir(dir_.c_str());
  }
  Status open(std::unique_ptr<UringDevice>* out, uint64_t create = 0, bool read_only = false) {
    DeviceOptions opt;
    opt.create_bytes = create;
    opt.read_only = read_only;
    opt.allow_buffered = true;
    return UringDevice::open(*ring_, path_, opt, out);
  }
  void create() {
    const Status st = open(&dev_, kSize);
    ASSERT_TRUE(st) << st.message;
  }
  int run(Io::Op op, uint64_t off, void* p, uint32_t len, int fixed = -1) {
    Io io;
    io.op = op;
    io.off = off;
    io.len = len;
    io.mem = {p, fixed};
    io.result = 1;
    io.done = [](Io*) {};
    dev_->submit(&io);
    while (dev_->inflight() > 0) dev_->poll(true);
    return io.result;
  }

  std::string dir_, path_;
  std::unique_ptr<Uring> ring_;
  std::unique_ptr<UringDevice> dev_;
};

// Random reads and writes, up to 100 in flight on a ring of 16, never overlapping, some through registered buffers.
TEST_F(UringDeviceTest, RandomOperationsMatchAModel) {
  create();
  constexpr uint32_t kCell = 64u << 10, kCells = kSize / kCell;
  struct Slot {
    Io io;
    Buffer buf{kCell};
    uint32_t cell = 0;
    bool busy = false;
    unsigned* done = nullptr;
  };
  std::vector<Slot> slots(100);
  std::vector<uint8_t> model(kSize), taken(kCells);
  std::vector<int> fixed;
  for (int i = 0; i < 30; ++i) fixed.push_back(ring_->register_buffer(slots[static_cast<size_t>(i)].buf.p, kCell));
  unsigned done = 0, started = 0;
  Rng rng(1);
  const auto check = [&](Slot& s) {
    ASSERT_EQ(s.io.result, 0);
    if (s.io.op == Io::Op::Read) {
      ASSERT_EQ(std::memcmp(s.buf.p, model.data() + s.io.off, s.io.len), 0);
    }
    if (s.io.op != Io::Op::Flush) taken[s.cell] = 0;
    s.busy = false;
    ++done;
  };
  while (done < 5000) {
    for (size_t i = 0; i < slots.size() && started < 5000; ++i) {
      Slot& s = slots[i];
      if (s.busy || s.io.owner != nullptr) continue;
      s.cell = static_cast<uint32_t>(rng.below(kCells));
      if (taken[s.cell]) continue;
      const uint32_t units = kCell / dev_->align(), at = static_cast<uint32_t>(rng.below(units));
      s.io.op = rng.below(50) == 0 ? Io::Op::Flush : rng.below(2) == 0 ? Io::Op::Read : Io::Op::Write;
      s.io.off = static_cast<uint64_t>(s.cell) * kCell + static_cast<uint64_t>(at) * dev_->align();
      s.io.len = (1 + static_cast<uint32_t>(rng.below(units - at))) * dev_->align();
      s.io.mem = {s.buf.p, i < fixed.size() ? fixed[i] : -1};
      s.io.owner = &s;
      s.io.result = 1;
      s.io.done = [](Io* io) { static_cast<Slot*>(io->owner)->io.owner = nullptr; };
      if (s.io.op == Io::Op::Write) {
        for (uint32_t b = 0; b < s.io.len; b += 8) {
          const uint64_t v = rng.next();
          std::memcpy(s.buf.bytes() + b, &v, 8);
        }
        std::memcpy(model.data() + s.io.off, s.buf.p, s.io.len);
      }
      if (s.io.op != Io::Op::Flush) taken[s.cell] = 1;
      s.busy = true;
      ++started;
      dev_->submit(&s.io);
    }
    dev_->poll(true);
    for (Slot& s : slots) {
      if (s.busy && s.io.owner == nullptr) check(s);
      if (HasFatalFailure()) return;
    }
  }
  EXPECT_EQ(dev_->inflight(), 0u);
  for (const int f : fixed) {
    if (f >= 0) {
      EXPECT_EQ(ring_->unregister_buffer(f), 0);
    }
  }
  // What is on the file is what was written.
  Buffer all(kSize);
  const int fd = ::open(path_.c_str(), O_RDONLY);
  ASSERT_EQ(pread(fd, all.p, kSize, 0), static_cast<ssize_t>(kSize));
  ::close(fd);
  EXPECT_EQ(std::memcmp(all.p, model.data(), kSize), 0);
}

TEST_F(UringDeviceTest, NothingCompletesInline) {
  create();
  Buffer b(4096);
  Io io;
  io.op = Io::Op::Read;
  io.len = 4096;
  io.mem.ptr = b.p;
  bool done = false;
  io.owner = &done;
  io.done = [](Io* i) { *static_cast<bool*>(i->owner) = true; };
  dev_->submit(&io);
  EXPECT_FALSE(done);
  EXPECT_EQ(dev_->inflight(), 1u);
  while (!done) dev_->poll(true);
  EXPECT_EQ(dev_->poll(true), 0u);  // returns at once when nothing is in flight
}

TEST_F(UringDeviceTest, CallbacksMaySubmit) {
  create();
  struct Chain {
    UringDevice* dev;
    int left = 500;
    Io io;
  } chain;
  Buffer b(4096);
  chain.dev = dev_.get();
  chain.io.op = Io::Op::Write;
  chain.io.len = 4096;
  chain.io.mem.ptr = b.p;
  chain.io.owner = &chain;
  chain.io.done = [](Io* i) {
    auto* c = static_cast<Chain*>(i->owner);
    if (--c->left > 0) c->dev->submit(i);
  };
  dev_->submit(&chain.io);
  while (chain.left > 0) dev_->poll(true);
  EXPECT_EQ(dev_->inflight(), 0u);
}

TEST_F(UringDeviceTest, SecondOpenIsRefusedUntilTheFirstIsClosed) {
  create();
  std::unique_ptr<UringDevice> other;
  Status st = open(&other);
  EXPECT_EQ(st.err, EBUSY);
  EXPECT_NE(st.message.find("in use"), std::string::npos) << st.message;
  EXPECT_EQ(open(&other, 0, true).err, EBUSY);
  dev_.reset();
  st = open(&other);
  EXPECT_TRUE(st) << st.message;
  EXPECT_EQ(other->size(), kSize);
}

TEST_F(UringDeviceTest, CreatesAllocatedFilesAndKeepsExistingOnes) {
  create();
  struct stat st;
  ASSERT_EQ(stat(path_.c_str(), &st), 0);
  EXPECT_EQ(st.st_size, static_cast<off_t>(kSize));
  EXPECT_GE(st.st_blocks * 512, static_cast<off_t>(kSize));
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  Buffer b(4096);
  std::memset(b.p, 9, 4096);
  ASSERT_EQ(run(Io::Op::Write, 4096, b.p, 4096), 0);
  ASSERT_EQ(run(Io::Op::Flush, 0, nullptr, 0), 0);
  dev_.reset();
  ASSERT_TRUE(open(&dev_, kSize * 2));
  EXPECT_EQ(dev_->size(), kSize);
  std::memset(b.p, 0, 4096);
  ASSERT_EQ(run(Io::Op::Read, 4096, b.p, 4096), 0);
  EXPECT_EQ(b.bytes()[4095], 9);
}

TEST_F(UringDeviceTest, OpenErrorsAreClear) {
  EXPECT_EQ(open(&dev_).err, ENOENT);
  EXPECT_EQ(UringDevice::open(*ring_, "/dev/null", {}, &dev_).err, EINVAL);
  EXPECT_EQ(UringDevice::open(*ring_, dir_, {}, &dev_).err, EINVAL);
  ::close(::open(path_.c_str(), O_CREAT | O_WRONLY, 0600));
  const Status st = open(&dev_);
  EXPECT_EQ(st.err, EINVAL);
  EXPECT_NE(st.message.find(path_), std::string::npos);
  EXPECT_EQ(open(&dev_, 1ull << 60).err != 0, true);  // more than any disk
  EXPECT_EQ(dev_, nullptr);
}

TEST_F(UringDeviceTest, ErrorsReachTheCaller) {
  create();
  Buffer b(8192);
  std::memset(b.p, 1, 8192);
  ASSERT_EQ(truncate(path_.c_str(), kSize - 4096), 0);  // somebody else shortens the file
  EXPECT_EQ(run(Io::Op::Read, kSize - 8192, b.p, 8192), -EIO);
  EXPECT_EQ(run(Io::Op::Read, kSize - 4096, b.p, 4096), -EIO);
  EXPECT_EQ(run(Io::Op::Read, 0, reinterpret_cast<void*>(8), 4096), -EFAULT);
  EXPECT_EQ(run(Io::Op::Read, 0, b.p, 4096, 77), -EFAULT);  // no such registered buffer
  EXPECT_EQ(run(Io::Op::Read, 0, b.p, 4096), 0);
  dev_.reset();
  ASSERT_TRUE(open(&dev_, 0, true));
  EXPECT_EQ(run(Io::Op::Write, 0, b.p, 4096), -EBADF);
}

TEST_F(UringDeviceTest, RegisteredBuffersAreCheckedAndReused) {
  create();
  Buffer b(8192);
  const int first = ring_->register_buffer(b.p, 4096);
  if (first == -EOPNOTSUPP || first == -ENOMEM) GTEST_SKIP() << "no registered buffers here";
  ASSERT_GE(first, 0);
  EXPECT_EQ(run(Io::Op::Write, 0, b.p, 4096, first), 0);
  EXPECT_EQ(run(Io::Op::Read, 0, b.bytes() + 4096, 4096, first), -EFAULT);  // not in the buffer
  EXPECT_EQ(ring_->unregister_buffer(first), 0);
  EXPECT_EQ(ring_->unregister_buffer(first), -EINVAL);
  EXPECT_EQ(ring_->unregister_buffer(-1), -EINVAL);
  EXPECT_EQ(run(Io::Op::Read, 0, b.p, 4096, first), -EFAULT);
  for (unsigned i = 0; i < Uring::kBuffers; ++i) ASSERT_EQ(ring_->register_buffer(b.p, 4096), static_cast<int>(i));
  EXPECT_EQ(ring_->register_buffer(b.p, 4096), -ENOSPC);
  EXPECT_EQ(ring_->unregister_buffer(500), 0);
  EXPECT_EQ(ring_->register_buffer(b.p, 4096), 500);
}

struct Bell {
  int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  int rung = 0;
  ~Bell() { close(fd); }
  void ring() {
    const uint64_t one = 1;
    KVFS_CHECK(write(fd, &one, 8) == 8);
  }
  static void ready(void* owner, uint32_t) {
    auto* b = static_cast<Bell*>(owner);
    uint64_t n;
    if (read(b->fd, &n, 8) == 8) ++b->rung;
  }
};

TEST_F(UringDeviceTest, EventfdsWakeTheWaiter) {
  Bell a, b;
  const int ha = ring_->add_poll(a.fd, Bell::ready, &a), hb = ring_->add_poll(b.fd, Bell::ready, &b);
  ASSERT_GE(ha, 0);
  ASSERT_GE(hb, 0);
  EXPECT_EQ(ring_->submit_and_wait(0), 0);
  for (int i = 1; i <= 200; ++i) {  // again and again: multishot
    a.ring();
    while (a.rung < i) ASSERT_GE(ring_->submit_and_wait(1'000'000'000), 0);
  }
  EXPECT_EQ(b.rung, 0);
  std::thread other([&b] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    b.ring();
  });
  ring_->submit_and_wait(UINT64_MAX);
  other.join();
  EXPECT_EQ(b.rung, 1);
  ring_->remove_poll(ha);
  a.ring();
  EXPECT_EQ(ring_->submit_and_wait(10'000'000), 0);
  EXPECT_EQ(a.rung, 200);
  const int again = ring_->add_poll(a.fd, Bell::ready, &a);  // already readable: reported at once
  EXPECT_NE(again, ha);
  EXPECT_EQ(ring_->submit_and_wait(1'000'000'000), 1);
  EXPECT_EQ(a.rung, 201);
  ring_->remove_poll(again);
  ring_->remove_poll(hb);
}

// The reactor watches one edge-triggered epoll set of all eventfds and never reads these.
TEST_F(UringDeviceTest, AnEpollSetWakesTheWaiterOnEveryRing) {
  Bell bells[3];
  struct Set {
    int fd = epoll_create1(EPOLL_CLOEXEC);
    int events = 0;
    ~Set() { close(fd); }
  } set;
  for (Bell& b : bells) {
    epoll_event ev{};
    ev.events = EPOLLIN | EPOLLET;
    ASSERT_EQ(epoll_ctl(set.fd, EPOLL_CTL_ADD, b.fd, &ev), 0);
  }
  const int h = ring_->add_poll(
      set.fd,
      [](void* o, uint32_t) {
        epoll_event ev[8];
        auto* s = static_cast<Set*>(o);
        s->events += epoll_wait(s->fd, ev, 8, 0);
      },
      &set);
  ASSERT_GE(h, 0);
  std::atomic<int> seen{0};
  std::thread other([&] {
    for (int i = 0; i < 2000; ++i) {
      bells[i % 3].ring();
      for (const uint64_t start = now_ms(); seen.load() <= i && now_ms() - start < 5000;) std::this_thread::yield();
    }
  });
  bool lost = false;
  while (!lost && set.events < 2000) {
    lost = ring_->submit_and_wait(3'000'000'000) == 0;  // a lost wake-up shows as this timeout
    seen = set.events;
  }
  seen = 1 << 30;
  other.join();
  EXPECT_FALSE(lost) << set.events;
  ring_->remove_poll(h);
}

TEST_F(UringDeviceTest, ManyPollsAndADyingDescriptor) {
  std::vector<std::unique_ptr<Bell>> bells;
  std::vector<int> handles;
  for (int i = 0; i < 300; ++i) {  // many more than the ring has entries
    bells.push_back(std::make_unique<Bell>());
    handles.push_back(ring_->add_poll(bells.back()->fd, Bell::ready, bells.back().get()));
    ASSERT_GE(handles.back(), 0);
  }
  for (auto& b : bells) b->ring();
  const auto missing = [&bells] {
    int n = 0;
    for (auto& b : bells) n += b->rung == 0;
    return n;
  };
  for (const uint64_t start = now_ms(); missing() > 0 && now_ms() - start < 5000;) ring_->submit_and_wait(10'000'000);
  EXPECT_EQ(missing(), 0);
  for (const int h : handles) ring_->remove_poll(h);
  ring_->submit_and_wait(1'000'000);
  struct Seen {
    uint32_t events = 0;
    int calls = 0;
  } seen;
  const int bad = ring_->add_poll(
      9999,
      [](void* o, uint32_t ev) {
        static_cast<Seen*>(o)->events = ev;
        ++static_cast<Seen*>(o)->calls;
      },
      &seen);
  for (int i = 0; i < 5; ++i) ring_->submit_and_wait(1'000'000);
  EXPECT_EQ(seen.calls, 1);
  EXPECT_NE(seen.events & 0x20u, 0u);  // POLLNVAL
  ring_->remove_poll(bad);
}

TEST_F(UringDeviceTest, WaitsAsLongAsAsked) {
  const uint64_t start = now_ms();
  EXPECT_EQ(ring_->submit_and_wait(50'000'000), 0);
  const uint64_t took = now_ms() - start;
  EXPECT_GE(took, 49u);
  EXPECT_LT(took, 5000u);
}

TEST_F(UringDeviceTest, TwoDevicesShareARing) {
  create();
  const std::string second = dir_ + "/second";
  DeviceOptions opt;
  opt.create_bytes = kSize;
  opt.allow_buffered = true;
  std::unique_ptr<UringDevice> other;
  ASSERT_TRUE(UringDevice::open(*ring_, second, opt, &other));
  Buffer a(4096), b(4096), r(4096);
  std::memset(a.p, 1, 4096);
  std::memset(b.p, 2, 4096);
  std::vector<Io> ios(80);
  for (size_t i = 0; i < ios.size(); ++i) {
    ios[i].op = Io::Op::Write;
    ios[i].off = i * 4096;
    ios[i].len = 4096;
    ios[i].mem.ptr = i % 2 == 0 ? a.p : b.p;
    ios[i].result = 1;
    ios[i].done = [](Io*) {};
    (i % 2 == 0 ? dev_ : other)->submit(&ios[i]);
  }
  while (dev_->inflight() > 0) dev_->poll(true);
  while (other->inflight() > 0) other->poll(true);
  for (const Io& io : ios) EXPECT_EQ(io.result, 0);
  ASSERT_EQ(run(Io::Op::Read, 2 * 4096, r.p, 4096), 0);
  EXPECT_EQ(r.bytes()[0], 1);
  ASSERT_EQ(run(Io::Op::Read, 4096, r.p, 4096), 0);
  EXPECT_EQ(r.bytes()[0], 0);
  other.reset();
  unlink(second.c_str());
}

TEST(Uring, AllModesWork) {
  for (int mode = 0; mode < 3; ++mode) {
    UringOptions opt;
    opt.single_issuer = mode > 0;
    opt.defer_taskrun = mode == 2;
    std::unique_ptr<Uring> ring;
    const Status st = Uring::create(opt, &ring);
    if (st.err == ENOSYS || st.err == EPERM) GTEST_SKIP() << st.message;
    ASSERT_TRUE(st) << st.message;
    Bell b;
    const int h = ring->add_poll(b.fd, Bell::ready, &b);
    for (int i = 1; i <= 10; ++i) {
      b.ring();
      for (const uint64_t start = now_ms(); b.rung < i && now_ms() - start < 2000;)
        ring->submit_and_wait(0);  // never blocks
      ASSERT_EQ(b.rung, i) << mode;
    }
    ring->remove_poll(h);
  }
  std::unique_ptr<Uring> ring;
  UringOptions opt;
  opt.entries = 0;
  EXPECT_EQ(Uring::create(opt, &ring).err, EINVAL);
}

}  // namespace
}  // namespace kvfs
