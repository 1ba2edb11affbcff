// shm_channel_test.cpp: both ends of a channel through shared memory together: what goes in at one end comes out at the other,
// whatever the sizes, the order of answers, the room in rings, arena and buffers, cancels and ends in between.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "channel_pair.h"
#include "shm_fixture.h"

namespace kvfs {
namespace {

using wire::Op;

class ShmChannel : public ChannelPair<ShmClientChannel, ShmServerChannel> {
 protected:
  void open(uint64_t features = wire::kFeatures, uint32_t max_batch = 64) {
    const ShmPair pair(max_batch);
    handler_.features = features;
    ChannelLimits cl;
    cl.features = features;
    cl.max_batch = max_batch;
    client_ = std::make_unique<ShmClientChannel>(*ring_, pair.link(1), cl);
    ShmServerLimits sl;
    sl.max_ops = 4096;
    sl.max_batch = max_batch;
    sl.max_in = 128ull << 20;
    sl.features = features;
    server_ = std::make_unique<ShmServerChannel>(*ring_, pair.link(0), handler_, sl);
    server_->start();
  }
};

TEST_F(ShmChannel, EveryOperationGoesThereAndBack) {
  open();
  every_operation_goes_there_and_back();
}

TEST_F(ShmChannel, BatchesOfAllSizesMakeOneFrameEach) {
  open(wire::kFeatures, 256);
  batches_of_all_sizes_make_one_frame_each();
}

TEST_F(ShmChannel, ABatchOf64TakesOneBellThereAndOneBack) {
  open();
  for (uint32_t k = 0; k < 64; ++k) store(k, 4096);
  for (int i = 0; i < 10; ++i) turn(0);  // both sleep
  const auto there = client_->counters().calls, back = server_->counters().calls;
  for (uint32_t k = 0; k < 64; ++k) call(Op::Get, k, 4096);
  ASSERT_TRUE(settle());
  EXPECT_EQ(client_->counters().calls, there + 1);
  EXPECT_EQ(server_->counters().calls, back + 1);
}

TEST_F(ShmChannel, AnySizeUpToTheLargestIsCarriedWithAndWithoutSums) {
  for (const uint64_t features : {wire::kFeatures, uint64_t{0}}) {
    open(features);
    std::vector<uint32_t> sizes = {1, 7, 63, 64, 4095, 4096, 4097, 65537, 1u << 20, kMaxChunk - 1, kMaxChunk};
    for (const uint32_t n : sizes) call(Op::Put, n, n);
    ASSERT_TRUE(settle()) << "what finds no room in the arena waits";
    std::vector<Call*> gets;
    for (const uint32_t n : sizes) gets.push_back(call(Op::Get, n, n));
    ASSERT_TRUE(settle());
    for (size_t i = 0; i < sizes.size(); ++i) EXPECT_TRUE(right(*gets[i], sizes[i], sizes[i])) << sizes[i];
    TearDown();
    client_.reset();
    server_.reset();
    calls_.clear();
    handler_ = MapHandler{};
  }
}

TEST_F(ShmChannel, MoreThanRingArenaAndBuffersHoldGetsThroughInAnyOrder) {
  open(wire::kFeatures, 4);
  handler_.room = 256u << 10;
  handler_.answers = 3;
  handler_.shuffle = true;
  for (uint32_t k = 0; k < 600; ++k) call(Op::Put, k, 60000);  // 36 MB, 150 frames
  ASSERT_TRUE(settle());
  EXPECT_GT(handler_.refused, 0u) << "buffers ran out";
  std::vector<Call*> gets;
  handler_.answers = 256;
  for (uint32_t k = 0; k < 600; ++k) gets.push_back(call(Op::Get, k, 60000));
  ASSERT_TRUE(settle());
  for (uint32_t k = 0; k < 600; ++k) EXPECT_TRUE(right(*gets[k], k, 60000)) << k;
}

TEST_F(ShmChannel, AnswersThatFindTheRingFullWaitAndNothingIsLost) {
  open(wire::kFeatures, 1);  // a frame per operation, 64 slots
  handler_.hold = true;
  store(1, 100);
  std::vector<Call*> gets;
  for (uint32_t k = 0; k < 300; ++k) gets.push_back(call(Op::Get, 1, 100));
  until([&] { return handler_.waiting.size() >= 300; });
  ASSERT_EQ(handler_.waiting.size(), 300u);
  handler_.hold = false;
  handler_.answers = 1000;
  ASSERT_TRUE(settle());
  for (Call* c : gets) EXPECT_TRUE(right(*c, 1, 100));
}

TEST_F(ShmChannel, WhatIsCancelledComesBackAtOnceAndItsMemoryIsNotTouchedAnyMore) {
  open();
  store(1, 4096);
  handler_.hold = true;
  std::vector<Call*> gets;
  for (int i = 0; i < 8; ++i) gets.push_back(call(Op::Get, 1, 4096));
  until([&] { return handler_.waiting.size() >= 8; });
  for (int i = 0; i < 7; ++i) client_->cancel(&gets[size_t(i)]->op);
  until([&] { return gets[6]->ended(); });
  for (int i = 0; i < 7; ++i) {
    EXPECT_TRUE(gets[size_t(i)]->ended() && gets[size_t(i)]->op.cancelled && !gets[size_t(i)]->op.answered);
    gets[size_t(i)]->mem.reset();  // ASan sees who touches it
  }
  EXPECT_EQ(client_->ops_inflight(), 8u) << "the server has yet to answer";
  EXPECT_TRUE(handler_.cancelled.empty()) << "one of the batch is wanted";
  handler_.hold = false;
  ASSERT_TRUE(settle());
  EXPECT_TRUE(right(*gets[7], 1, 4096));

  handler_.hold = true;
  Call* last = call(Op::Get, 1, 4096);
  until([&] { return !handler_.waiting.empty(); });
  client_->cancel(&last->op);
  until([&] { return !handler_.cancelled.empty(); });
  EXPECT_EQ(handler_.cancelled.size(), 1u) << "nothing of the batch is wanted";
  Call* unsent = call(Op::Get, 1, 4096);
  client_->cancel(&unsent->op);
  until([&] { return unsent->ended(); });
  EXPECT_TRUE(unsent->op.cancelled);
}

TEST_F(ShmChannel, APingIsAnsweredThoughNothingElseIs) {
  open();
  store(1, 10);
  handler_.hold = true;
  call(Op::Get, 1, 10);
  for (int i = 0; i < 10; ++i) turn();
  const uint64_t before = client_->heard_ns();
  client_->ping();
  until([&] { return client_->heard_ns() != before; });
  EXPECT_GT(client_->heard_ns(), before);
  EXPECT_EQ(client_->error(), 0);
}

TEST_F(ShmChannel, AServerThatIsGoneIsNoticedAndWhatItHadAnsweredCounts) {
  open();
  store(1, 4096);
  Call* answered = call(Op::Get, 1, 4096);
  client_->flush(1);
  handler_.hold = true;
  for (int i = 0; i < 1000 && handler_.waiting.empty(); ++i) turn(0);
  Call* open_one = call(Op::Get, 1, 4096);
  client_->flush(1);
  for (int i = 0; i < 1000 && handler_.waiting.size() < 2; ++i) turn(0);
  ServerOp* first = handler_.waiting.front();
  handler_.waiting.erase(handler_.waiting.begin());
  server_->reply(first);
  server_->flush();
  server_->close();  // before the client has looked
  until([&] { return client_->closed(); });
  EXPECT_TRUE(right(*answered, 1, 4096));
  EXPECT_TRUE(open_one->ended() && !open_one->op.answered);
  EXPECT_EQ(open_one->op.result, -ECONNRESET);
  Call* late = call(Op::Get, 1, 4096);
  client_->flush(1);
  EXPECT_TRUE(late->ended() && !late->op.answered);
}

TEST_F(ShmChannel, AClientThatIsGoneEndsTheChannelAndItsOperationsGoBackToTheHandler) {
  open();
  store(1, 4096);
  handler_.hold = true;
  for (int i = 0; i < 20; ++i) call(Op::Get, 1, 4096);
  for (int i = 0; i < 5; ++i) call(Op::Put, 7, 4096);
  until([&] { return handler_.waiting.size() >= 25; });
  client_->close();
  until([&] { return handler_.ended_times != 0; });
  EXPECT_EQ(handler_.ended_times, 1u);
  EXPECT_EQ(handler_.ended_with, 0);
}

// Each end on a thread that sleeps until it is woken: a bell that is not rung is seen as a wait of seconds.
TEST_F(ShmChannel, EndsThatSleepOnThreadsOfTheirOwnAreAlwaysWoken) {
  const ShmPair pair;
  for (uint32_t k = 0; k < 64; ++k) store(k, 1000 + k);
  std::atomic<bool> stop{false};
  std::thread serving([&, link = pair.link(0)]() mutable {
    std::unique_ptr<Uring> ring;
    ASSERT_EQ(Uring::create(UringOptions{}, &ring).err, 0);
    ShmServerChannel server(*ring, std::move(link), handler_, ShmServerLimits{});
    server.start();
    while (!server.closed()) {
      ASSERT_GE(ring->submit_and_wait(stop ? 1'000'000 : 20'000'000'000), 0);
      handler_.answer(&server);
    }
  });
  client_ = std::make_unique<ShmClientChannel>(*ring_, pair.link(1), ChannelLimits{});
  std::mt19937_64 random(1);
  for (uint32_t round = 0; round < 2000; ++round) {
    const auto n = uint32_t(1 + random() % 8);
    std::vector<Call*> gets;
    for (uint32_t k = 0; k < n; ++k) gets.push_back(call(Op::Get, k, 1000 + k));
    client_->flush(1);
    const uint64_t began = monotonic_ns();
    while (client_->ops_inflight() != 0) {
      ASSERT_GE(ring_->submit_and_wait(5'000'000'000), 0);
      ASSERT_LT(monotonic_ns() - began, 5'000'000'000u) << "round " << round;
      client_->flush(1);
    }
    for (uint32_t k = 0; k < n; ++k) ASSERT_TRUE(right(*gets[k], k, 1000 + k));
    calls_.clear();
  }
  client_->close();
  while (!client_->closed()) ASSERT_GE(ring_->submit_and_wait(1'000'000), 0);
  stop = true;
  serving.join();
  EXPECT_EQ(handler_.ended_times, 1u);
  EXPECT_EQ(handler_.out, 0u);
}

}  // namespace
}  // namespace kvfs
