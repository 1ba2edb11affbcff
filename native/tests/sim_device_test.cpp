// sim_device_test.cpp checks the simulated device: the other tests' verdicts rest on it.
#include "sim_device.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <set>

namespace kvfs {
namespace {

struct Op {
  Io io;
  alignas(4096) uint8_t buf[4096];
  bool finished = false;
  Op(Io::Op op, uint64_t off = 0, uint8_t fill = 0) {
    io.op = op;
    io.off = off;
    io.len = op == Io::Op::Flush ? 0 : 4096;
    io.mem.ptr = buf;
    io.owner = this;
    io.done = [](Io* i) { static_cast<Op*>(i->owner)->finished = true; };
    std::memset(buf, fill, sizeof buf);
  }
};

void drain(SimDevice& dev) {
  while (dev.inflight() > 0) dev.poll(true);
}

void run(SimDevice& dev, Op& op) {
  dev.submit(&op.io);
  drain(dev);
}

uint8_t first_byte(const SimImage& image, uint64_t off) {
  uint8_t b;
  image.read(off, &b, 1);
  return b;
}

TEST(SimDevice, ReadsWhatWasWrittenAndZerosElsewhere) {
  SimDevice dev(SimOptions{});
  Op w(Io::Op::Write, 8192, 7), r(Io::Op::Read, 8192, 1), z(Io::Op::Read, 4096, 1);
  dev.submit(&w.io);
  EXPECT_FALSE(w.finished);  // never inline
  drain(dev);
  EXPECT_TRUE(w.finished);
  run(dev, r);
  run(dev, z);
  EXPECT_EQ(r.buf[4095], 7);
  EXPECT_EQ(z.buf[0], 0);
  dev.image().flip_bit(8192, 3);
  run(dev, r);
  EXPECT_EQ(r.buf[0], 7 ^ 8);
}

TEST(SimDevice, CompletesInSeedDependentOrder) {
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<int> first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      SimOptions opt;
      opt.seed = seed;
      SimDevice dev(opt);
      std::vector<int> order;
      std::vector<std::unique_ptr<Op>> ops;
      for (int i = 0; i < 4; ++i) {
        ops.push_back(std::make_unique<Op>(Io::Op::Write, 4096u * static_cast<unsigned>(i)));
        ops.back()->io.owner = &order;
        ops.back()->io.done = [](Io* io) {
          static_cast<std::vector<int>*>(io->owner)->push_back(static_cast<int>(io->off / 4096));
        };
        dev.submit(&ops.back()->io);
      }
      drain(dev);
      if (repeat == 0) first = order;
      EXPECT_EQ(order, first);
    }
    orders.insert(first);
  }
  EXPECT_GT(orders.size(), 10u);
}

TEST(SimDevice, OnlyFlushedWritesSurviveEveryCrash) {
  SimDevice dev(SimOptions{});
  Op a(Io::Op::Write, 0, 1), b(Io::Op::Write, 4096, 2), c(Io::Op::Write, 8192, 3), flush(Io::Op::Flush);
  run(dev, a);
  dev.submit(&b.io);  // in flight while the flush starts: not covered by it, whatever finishes first
  dev.submit(&flush.io);
  drain(dev);
  run(dev, c);
  const size_t n = dev.trace().size();
  const std::vector<size_t> open = dev.open_writes(n);
  ASSERT_EQ(open.size(), 2u);
  EXPECT_EQ(dev.trace()[open[0]].off, 4096u);
  EXPECT_EQ(dev.trace()[open[1]].off, 8192u);
  EXPECT_EQ(dev.open_writes(2).size(), 1u);  // before the flush, a is open too
  EXPECT_TRUE(dev.open_writes(0).empty());
  Rng rng(1);
  std::set<int> seen;
  for (int i = 0; i < 400; ++i) {
    const SimImage image = dev.crash_image(n, rng);
    EXPECT_EQ(first_byte(image, 0), 1);
    seen.insert(first_byte(image, 4096) * 10 + first_byte(image, 8192));
  }
  EXPECT_EQ(seen, (std::set<int>{0, 3, 20, 23}));
  using Fate = SimDevice::Fate;
  const SimImage chosen = dev.crash_image(n, {Fate::Lost, Fate::Whole}, rng);
  EXPECT_EQ(first_byte(chosen, 4096), 0);
  EXPECT_EQ(first_byte(chosen, 8192), 3);
  EXPECT_TRUE(dev.crash_image(n, {Fate::Whole, Fate::Whole}, rng) == dev.image());
  EXPECT_TRUE(dev.crash_image(0, rng) == SimImage());
}

TEST(SimDevice, TornWritesMixSectors) {
  SimDevice dev(SimOptions{});
  Op a(Io::Op::Write, 0, 1);
  run(dev, a);
  dev.reset_trace();
  Op b(Io::Op::Write, 0, 2);
  run(dev, b);
  Rng rng(2);
  bool mixed = false;
  for (int i = 0; i < 20; ++i) {
    const SimImage image = dev.crash_image(dev.trace().size(), {SimDevice::Fate::Torn}, rng);
    int twos = 0;
    for (uint64_t s = 0; s < 8; ++s) {
      const uint8_t v = first_byte(image, s * 512);
      ASSERT_TRUE(v == 1 || v == 2);
      ASSERT_EQ(first_byte(image, s * 512 + 511), v);
      twos += v == 2;
    }
    mixed |= twos > 0 && twos < 8;
  }
  EXPECT_TRUE(mixed);
}

TEST(SimDevice, FailedFlushProtectsNothing) {
  SimDevice dev(SimOptions{});
  dev.add_fault({Io::Op::Flush, 0, 1, EIO, false});
  Op a(Io::Op::Write, 0, 1), flush(Io::Op::Flush), again(Io::Op::Flush);
  run(dev, a);
  run(dev, flush);
  EXPECT_EQ(flush.io.result, -EIO);
  EXPECT_EQ(dev.open_writes(dev.trace().size()).size(), 1u);
  run(dev, again);
  EXPECT_EQ(again.io.result, 0);  // a later success says nothing about what the failed one should have written
  EXPECT_EQ(dev.open_writes(dev.trace().size()).size(), 1u);
  Op b(Io::Op::Write, 4096, 2), last(Io::Op::Flush);
  run(dev, b);
  run(dev, last);
  EXPECT_EQ(dev.open_writes(dev.trace().size()), std::vector<size_t>{0});
}

TEST(SimDevice, InjectsFaults) {
  SimDevice dev(SimOptions{});
  dev.add_fault({Io::Op::Write, 1, 1, ENOSPC, false});
  dev.add_fault({Io::Op::Read, 0, 1, EIO, false});
  Op a(Io::Op::Write, 0, 1), b(Io::Op::Write, 4096, 2), c(Io::Op::Write, 4096, 3), r(Io::Op::Read, 0);
  run(dev, a);
  run(dev, b);
  run(dev, r);
  EXPECT_EQ(a.io.result, 0);
  EXPECT_EQ(b.io.result, -ENOSPC);
  EXPECT_EQ(r.io.result, -EIO);
  EXPECT_EQ(first_byte(dev.image(), 4096), 0);
  EXPECT_EQ(dev.open_writes(dev.trace().size()).size(), 2u);  // a failed write may have happened
  dev.fail_writes_after(1, EIO);
  Op flush(Io::Op::Flush), flush2(Io::Op::Flush);
  run(dev, flush);
  run(dev, c);
  run(dev, b);
  run(dev, flush2);
  EXPECT_EQ(flush.io.result, 0);
  EXPECT_EQ(c.io.result, 0);
  EXPECT_EQ(b.io.result, -EIO);
  EXPECT_EQ(flush2.io.result, -EIO);
  dev.clear_faults();
  run(dev, b);
  EXPECT_EQ(b.io.result, 0);
}

TEST(SimDevice, NoticesCallersMistakes) {
  SimDevice dev(SimOptions{});
  Op a(Io::Op::Write, 0, 1), b(Io::Op::Write, 0, 2);
  dev.submit(&a.io);
  dev.submit(&b.io);
  EXPECT_EQ(dev.overlapping_writes(), 1u);
  b.buf[17] = 9;
  drain(dev);
  EXPECT_EQ(dev.changed_buffers(), 1u);
}

TEST(SimDevice, CopiesOfAnImageAreIndependent) {
  SimImage a;
  a.write(100, "hello", 5);
  SimImage b = a;
  EXPECT_TRUE(a == b);
  b.write(100, "j", 1);
  EXPECT_FALSE(a == b);
  EXPECT_EQ(first_byte(a, 100), 'h');
  EXPECT_EQ(first_byte(b, 101), 'e');
}

}  // namespace
}  // namespace kvfs
