// tcp_channel_test.cpp: both ends of a TCP channel together: what goes in at one end comes out at the other, whatever the sizes,
// the order of answers, the buffers' readiness, cancels and ends in between.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <thread>

#include "../transport/tcp_client.h"
#include "../transport/tcp_server.h"
#include "channel_pair.h"

namespace kvfs {
namespace {

using wire::Op;

class TcpChannel : public ChannelPair<TcpClientChannel, TcpServerChannel> {
 protected:
  void open(uint64_t features = wire::kFeatures, int small_buffer = 0, uint32_t max_batch = 64) {
    int fd[2];
    tcp_pair(fd, small_buffer);
    handler_.features = features;
    ChannelLimits cl;
    cl.features = features;
    cl.max_batch = max_batch;
    client_ = std::make_unique<TcpClientChannel>(*ring_, fd[1], cl);
    TcpServerLimits sl;
    sl.max_ops = 4096;
    sl.max_in = 128ull << 20;
    sl.features = features;
    server_ = std::make_unique<TcpServerChannel>(*ring_, fd[0], handler_, sl);
    server_->start();
  }
};

TEST_F(TcpChannel, EveryOperationGoesThereAndBack) {
  open();
  every_operation_goes_there_and_back();
}

TEST_F(TcpChannel, BatchesOfAllSizesMakeOneFrameEach) {
  open(wire::kFeatures, 0, 256);
  batches_of_all_sizes_make_one_frame_each();
}

TEST_F(TcpChannel, ABatchOf64PiecesIsReceivedInFewCallsAndHardlyCopied) {
  open();
  for (uint32_t k = 0; k < 64; ++k) store(k, 4096);
  const auto calls = client_->counters().calls;
  for (uint32_t k = 0; k < 64; ++k) call(Op::Get, k, 4096);
  ASSERT_TRUE(settle());
  EXPECT_LE(client_->counters().calls - calls, 4u);  // a send; the header, the payload and the next header
  EXPECT_LE(client_->counters().copied, 8192u);
  EXPECT_EQ(client_->counters().bytes_in, 64u * 4096u);
}

// Of answers that are there already, each one's payload is received together with the next one's header.
TEST_F(TcpChannel, AnswersThatWaitAreReceivedWithOneCallEach) {
  constexpr uint32_t kBatches = 16, kOps = 4;
  open(wire::kFeatures, 0, kOps);
  std::vector<Call*> gets;
  for (uint32_t k = 0; k < kBatches * kOps; ++k) store(k, 4096);
  const ChannelCounters before = client_->counters();
  for (uint32_t k = 0; k < kBatches * kOps; ++k) gets.push_back(call(Op::Get, k, 4096));
  ASSERT_TRUE(settle());
  for (uint32_t k = 0; k < kBatches * kOps; ++k) EXPECT_TRUE(right(*gets[k], k, 4096)) << k;
  EXPECT_EQ(client_->counters().frames_in - before.frames_in, kBatches);
  EXPECT_LE(client_->counters().calls - before.calls, kBatches + 4) << "with the send and a few more receives";
}

TEST_F(TcpChannel, LargePayloadsGoBothWays) {
  open();
  for (const uint32_t len : {1u << 20, 16u << 20}) {
    Call* put = call(Op::Put, len, len);
    ASSERT_TRUE(settle());
    EXPECT_EQ(put->op.result, 1);
    Call* get = call(Op::Get, len, len);
    ASSERT_TRUE(settle());
    EXPECT_TRUE(right(*get, len, len));
  }
  EXPECT_LE(client_->counters().copied + server_->counters().copied, 6u * TcpStream::kStage);
}

TEST_F(TcpChannel, ManyBatchesAreAnsweredInAnyOrderAndInPieces) {
  open(wire::kFeatures, 0, 16);
  handler_.shuffle = true;
  handler_.answers = 7;
  for (uint32_t k = 0; k < 500; ++k) store(k, 100 + 37 * k);
  std::vector<Call*> gets;
  for (uint32_t k = 0; k < 500; ++k) gets.push_back(call(Op::Get, k, 100 + 37 * k));
  ASSERT_TRUE(settle());
  for (uint32_t k = 0; k < 500; ++k) EXPECT_TRUE(right(*gets[k], k, 100 + 37 * k)) << k;
  EXPECT_GT(client_->counters().frames_in, client_->counters().frames_out);
}

TEST_F(TcpChannel, BuffersMayBeWithheldAndTheRestGoesOnWhenTheyAreBack) {
  open();
  handler_.room = 100'000;
  handler_.answers = 1;
  std::vector<Call*> puts;
  for (uint32_t k = 0; k < 100; ++k) puts.push_back(call(Op::Put, k, 30'000));
  ASSERT_TRUE(settle());
  EXPECT_GT(handler_.refused, 0u);
  for (Call* c : puts) EXPECT_EQ(c->op.result, 1);
  for (uint32_t k = 0; k < 100; ++k) {
    Call probe(Op::Get, k);
    EXPECT_EQ(handler_.chunks[chunk_name(probe.op.desc)], pattern(k, 30'000)) << k;
  }
}

TEST_F(TcpChannel, TheServerStopsListeningToAClientThatDoesNotRead) {
  open();
  store(1, 16u << 20);
  client_->close();  // its place is taken by a socket that only sends
  while (!client_->closed()) ring_->submit_and_wait(1'000'000);
  server_->close();
  until([&] { return server_->closed(); });
  int fd[2];
  tcp_pair(fd);
  MapHandler h;
  h.chunks = handler_.chunks;
  TcpServerLimits sl;
  TcpServerChannel server(*ring_, fd[0], h, sl);
  server.start();
  constexpr uint32_t kLen = 256u << 10;
  constexpr uint64_t kRequests = 1000, kFrame = sizeof(wire::FrameHeader) + sizeof(wire::Desc);
  Call get(Op::Get, 1, kLen);
  for (uint64_t i = 1; i <= kRequests; ++i) {
    uint8_t bytes[kFrame];
    wire::FrameHeader f{};
    f.magic = wire::kFrameMagic;
    f.type = uint8_t(wire::Type::Request);
    f.count = 1;
    f.batch = i;
    wire::seal(&f, &get.op.desc);
    std::memcpy(bytes, &f, sizeof f);
    std::memcpy(bytes + sizeof f, &get.op.desc, sizeof get.op.desc);
    ASSERT_EQ(send(fd[1], bytes, kFrame, 0), ssize_t{kFrame});
    ASSERT_GE(ring_->submit_and_wait(0), 0);
    h.answer(&server);
  }
  EXPECT_GE(h.taken, TcpServerChannel::kMaxUnsent / kLen);
  EXPECT_LE(h.out, TcpServerChannel::kMaxUnsent + 2 * (TcpStream::kStage / kFrame + 1) * kLen)
      << "what waits for it is bounded";
  EXPECT_LT(h.taken, kRequests);
  close(fd[1]);
  for (int i = 0; i < 1000 && !server.closed(); ++i) {
    ASSERT_GE(ring_->submit_and_wait(1'000'000), 0);
    h.answer(&server);
  }
  EXPECT_TRUE(server.closed());
  EXPECT_EQ(h.out, 0u);
}

TEST_F(TcpChannel, ACancelledOperationComesBackBeforeItLeft) {
  open();
  Call* c = call(Op::Put, 1, 1000);
  client_->cancel(&c->op);
  EXPECT_FALSE(c->ended()) << "never from within the call";
  ASSERT_GE(ring_->submit_and_wait(1'000'000'000), 1);
  EXPECT_TRUE(c->ended() && c->op.cancelled && !c->op.answered);
  EXPECT_EQ(client_->ops_inflight(), 0u);
  Call* after = call(Op::Sync);
  ASSERT_TRUE(settle());
  EXPECT_TRUE(after->op.answered);
  EXPECT_EQ(handler_.taken, 1u);
}

TEST_F(TcpChannel, ACancelledOperationComesBackWhileTheServerHasIt) {
  open();
  store(1, 4096);
  handler_.hold = true;
  Call* one = call(Op::Get, 1, 4096);
  Call* two = call(Op::Get, 1, 4096);
  client_->flush(1);
  until([&] { return handler_.taken >= 2; });
  client_->cancel(&one->op);
  until([&] { return one->ended(); });
  EXPECT_TRUE(one->op.cancelled);
  EXPECT_EQ(client_->ops_inflight(), 2u) << "the server still owes an answer";
  for (int i = 0; i < 5; ++i) turn();
  EXPECT_TRUE(handler_.cancelled.empty()) << "the other one of the batch is still wanted";
  std::memset(one->mem.get(), 0x77, 4096);
  client_->cancel(&two->op);
  until([&] { return !handler_.cancelled.empty(); });
  EXPECT_EQ(handler_.cancelled.size(), 1u);
  handler_.hold = false;
  ASSERT_TRUE(settle());
  EXPECT_EQ(one->mem[0], 0x77) << "not touched after it came back";
}

TEST_F(TcpChannel, AnOperationCancelledWhileItsAnswerComesLeavesTheRestWhole) {
  for (const uint64_t features : {uint64_t{0}, wire::kFeatures}) {
    open(features);
    store(1, 8u << 20);
    store(2, 100'000);
    handler_.answers = 2;
    for (int round = 0; round < 20; ++round) {
      Call* big = call(Op::Get, 1, 8u << 20);
      Call* small = call(Op::Get, 2, 100'000);
      client_->flush(1);
      bool over = false;
      for (int i = 0; i < 20000 && !over; ++i) {
        turn(0);
        over = big->ended() || big->mem[(8u << 20) / 20 * static_cast<uint32_t>(round) + 1] != 0xa5;
      }
      client_->cancel(&big->op);
      until([&] { return big->ended(); });
      ASSERT_TRUE(big->ended());
      if (big->op.cancelled) std::memset(big->mem.get(), 0x77, 8u << 20);
      ASSERT_TRUE(settle());
      EXPECT_TRUE(small->ended() && right(*small, 2, 100'000));
      if (big->op.cancelled) {
        for (uint32_t i = 0; i < 8u << 20; i += 4096) ASSERT_EQ(big->mem[i], 0x77);
      } else {
        EXPECT_TRUE(right(*big, 1, 8u << 20));
      }
    }
    EXPECT_EQ(client_->error(), 0);
    client_->close();
    server_->close();
    while (!client_->closed() || !server_->closed()) turn();
    handler_.ended_times = 0;
  }
  open();
}

TEST_F(TcpChannel, APutCancelledWhileItIsSentComesBackThoughTheServerDoesNotRead) {
  open(wire::kFeatures, 4096);
  handler_.room = 1;
  Call* first = call(Op::Put, 1, 1u << 20);
  Call* put = call(Op::Put, 2, 16u << 20);
  Call* third = call(Op::Put, 3, 1000);
  handler_.hold = true;  // so that no buffer comes back
  client_->flush(1);
  for (int i = 0; i < 50; ++i) turn(100'000);
  EXPECT_FALSE(put->ended());
  client_->cancel(&put->op);
  until([&] { return put->ended(); });
  ASSERT_TRUE(put->ended());
  EXPECT_TRUE(put->op.cancelled);
  std::memset(put->mem.get(), 0x77, 16u << 20);
  handler_.hold = false;
  ASSERT_TRUE(settle());
  EXPECT_EQ(first->op.result, 1);
  EXPECT_EQ(third->op.result, 1);
  EXPECT_TRUE(handler_.errors.empty()) << "what the server got of it was whole";
  EXPECT_EQ(client_->error(), 0);
}

TEST_F(TcpChannel, APingIsAnsweredWhileOperationsWait) {
  open();
  handler_.hold = true;
  call(Op::Sync);
  for (int i = 0; i < 10; ++i) turn();
  const uint64_t heard = client_->heard_ns();
  client_->ping();
  until([&] { return client_->heard_ns() != heard; });
  EXPECT_GT(client_->heard_ns(), heard);
  EXPECT_EQ(client_->error(), 0);
}

TEST_F(TcpChannel, WhenTheServerGoesEverythingComesBackUnanswered) {
  open();
  store(1, 1u << 20);
  handler_.hold = true;
  std::vector<Call*> some;
  for (int i = 0; i < 100; ++i) some.push_back(call(i % 2 != 0 ? Op::Get : Op::Put, 1, 1u << 20));
  client_->flush(1);
  for (int i = 0; i < 20; ++i) turn();
  server_->close();
  until([&] { return client_->ops_inflight() == 0; });
  EXPECT_NE(client_->error(), 0);
  for (Call* c : some) EXPECT_TRUE(c->ended() && !c->op.answered && c->op.result < 0);
  Call* late = call(Op::Sync);
  EXPECT_FALSE(late->ended());
  for (int i = 0; i < 10; ++i) turn();
  EXPECT_TRUE(late->ended() && !late->op.answered && late->op.result == client_->error());
}

TEST_F(TcpChannel, WhenTheClientGoesTheServerHasItsBuffersBack) {
  open();
  handler_.hold = true;
  for (int i = 0; i < 20; ++i) call(Op::Put, static_cast<uint64_t>(i), 1u << 20);
  client_->flush(1);
  for (int i = 0; i < 5; ++i) turn(0);
  client_->close();
  until([&] { return handler_.ended_times != 0; });
  EXPECT_FALSE(server_->closed()) << "what was taken must be replied to";
}

// Memory that ends too early, as that of a client who made its file shorter.
TEST_F(TcpChannel, MemoryThatIsNotThereFailsItsOperationAlone) {
  constexpr uint32_t kLen = 300'000, kThere = 65536, kBad = 7;
  for (const uint64_t features : {wire::kFeatures, uint64_t{0}}) {
    open(features);
    auto* mem = static_cast<uint8_t*>(mmap(nullptr, kLen, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(mem, MAP_FAILED);
    ASSERT_EQ(mprotect(mem + kThere, kLen - kThere, PROT_NONE), 0);
    for (uint32_t k = 0; k < 20; ++k) store(k, kLen);
    const auto of_bad_memory = [&](Op op, uint64_t key) {
      calls_.push_back(std::make_unique<Call>(op, key, kLen));
      calls_.back()->op.mem.ptr = mem;
      client_->submit(&calls_.back()->op);
      return calls_.back().get();
    };
    std::vector<Call*> gets;
    for (uint32_t k = 0; k < 20; ++k)
      gets.push_back(k % kBad == 3 ? of_bad_memory(Op::Get, k) : call(Op::Get, k, kLen));
    ASSERT_TRUE(settle());
    for (uint32_t k = 0; k < 20; ++k) {
      EXPECT_TRUE(gets[k]->op.answered) << k;
      EXPECT_EQ(gets[k]->op.result, k % kBad == 3 ? -EFAULT : int64_t{kLen}) << k;
      EXPECT_TRUE(k % kBad == 3 || right(*gets[k], k, kLen)) << k;
    }
    if ((features & wire::kDataSums) == 0) {  // with sums we would read it ourselves
      std::vector<Call*> puts;
      for (uint32_t k = 100; k < 120; ++k)
        puts.push_back(k % kBad == 3 ? of_bad_memory(Op::Put, k) : call(Op::Put, k, kLen));
      ASSERT_TRUE(settle());
      for (uint32_t k = 100; k < 120; ++k) {
        const NetOp& op = puts[k - 100]->op;
        EXPECT_TRUE(op.answered) << k;
        EXPECT_EQ(op.result, k % kBad == 3 ? -EFAULT : 1) << k;
        const Bytes& there = handler_.chunks[chunk_name(op.desc)];
        ASSERT_EQ(there.size(), kLen);
        EXPECT_TRUE(k % kBad == 3 ? there.back() == 0 : there == pattern(k, kLen)) << k;
      }
    }
    const uint64_t calls = client_->counters().calls;
    for (uint32_t k = 0; k < 3; ++k) gets[k] = call(Op::Get, k, kLen);
    ASSERT_TRUE(settle());
    for (uint32_t k = 0; k < 3; ++k) EXPECT_TRUE(right(*gets[k], k, kLen)) << k;
    EXPECT_LE(client_->counters().calls - calls, 5u) << "not one by one any more";
    EXPECT_EQ(client_->error(), 0);
    client_->close();
    server_->close();
    until([&] { return client_->closed() && server_->closed(); });
    munmap(mem, kLen);
    handler_.chunks.clear();
    handler_.ended_times = 0;
  }
  open();
}

// Against a model, with sizes, orders, cancels, withheld buffers and new submissions from `done` by chance.
TEST_F(TcpChannel, RandomWorkAgreesWithAModel) {
  struct Model {
    std::map<uint64_t, uint32_t> put;  // key -> length, once answered
  };
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    open(seed % 2 != 0 ? wire::kFeatures : 0, seed % 3 == 0 ? 4096 : 0, seed % 4 == 0 ? 256 : 32);
    std::mt19937_64 r(seed);
    handler_.shuffle = true;
    handler_.room = seed % 2 != 0 ? UINT64_MAX : 200'000;
    Model m;
    Calls mine;
    uint64_t next_key = seed << 32;
    const auto size = [&]() -> uint32_t {
      const uint64_t k = r() % 20;
      return k == 0 ? 1 + static_cast<uint32_t>(r() % (1u << 20)) : 1 + static_cast<uint32_t>(r() % 9000);
    };
    for (int step = 0; step < 1500; ++step) {
      handler_.answers = static_cast<uint32_t>(r() % 20);
      const uint64_t what = r() % 10;
      if (client_->ops_inflight() < 1000 && client_->bytes_inflight() < 32u << 20) {
        for (uint64_t n = r() % 40; n > 0; --n) {
          if (what < 4) {
            const uint32_t len = size();
            mine.push_back(std::make_unique<Call>(Op::Put, next_key, len));
            std::memcpy(mine.back()->mem.get(), pattern(next_key, len).data(), len);
            mine.back()->arg = reinterpret_cast<void*>(next_key++);
          } else if (!m.put.empty()) {
            auto it = m.put.begin();
            std::advance(it, static_cast<long>(r() % m.put.size()));
            mine.push_back(std::make_unique<Call>(Op::Get, it->first, it->second));
            mine.back()->arg = reinterpret_cast<void*>(it->first);
          } else {
            continue;
          }
          client_->submit(&mine.back()->op);
        }
      }
      if (what == 9 && !mine.empty()) {
        Call* c = mine[r() % mine.size()].get();
        if (!c->ended()) client_->cancel(&c->op);
      }
      if (r() % 2 != 0) client_->flush(1);
      turn(r() % 3 == 0 ? 100'000 : 0);
      if (step == 1499) {
        handler_.answers = 256;
        ASSERT_TRUE(settle());
      }
      std::erase_if(mine, [&](const std::unique_ptr<Call>& c) {
        if (!c->ended()) return false;
        EXPECT_EQ(c->back, 1u);
        const auto key = reinterpret_cast<uint64_t>(c->arg);
        EXPECT_NE(c->op.answered, c->op.cancelled);
        if (c->op.cancelled) return true;
        if (wire::Op{c->op.desc.op} == Op::Put) {
          EXPECT_EQ(c->op.result, 1);
          m.put[key] = c->op.desc.len;
        } else {
          EXPECT_TRUE(right(*c, key, c->op.desc.len)) << key;
        }
        return true;
      });
    }
    EXPECT_TRUE(mine.empty());
    EXPECT_GT(m.put.size(), 100u);
    EXPECT_TRUE(handler_.errors.empty());
    EXPECT_EQ(client_->error(), 0);
    client_->close();
    server_->close();
    while (!client_->closed() || !server_->closed()) turn();
    EXPECT_EQ(handler_.out, 0u);
    handler_.ended_times = 0;
    handler_.room = UINT64_MAX;
  }
  open();
}

TEST_F(TcpChannel, AnOperationOrTheChannelMayBeEndedFromDone) {
  open();
  handler_.hold = true;
  struct Arg {
    TcpClientChannel* c;
    Call *other, *put;
  };
  Call* first = call(Op::Sync);
  Call* other = call(Op::Get, 5, 4096);
  Call* put = call(Op::Put, 6, 1u << 20);
  Arg arg{client_.get(), other, put};
  first->arg = &arg;
  first->then = [](Call* c) {
    auto* a = static_cast<Arg*>(c->arg);
    a->c->cancel(&a->other->op);
    a->c->cancel(&a->put->op);
    a->c->close();
  };
  client_->flush(1);
  for (int i = 0; i < 10; ++i) turn();
  handler_.hold = false;
  handler_.answers = 3;
  until([&] { return first->ended(); });
  until([&] { return client_->ops_inflight() == 0; });
  EXPECT_TRUE(first->ended() && other->ended() && put->ended());
}

TEST(TcpChannelThreads, TwoReactorsServeEachOther) {
  int fd[2];
  tcp_pair(fd);
  std::atomic<bool> stop{false};
  std::thread server([&] {
    std::unique_ptr<Uring> ring;
    ASSERT_EQ(Uring::create(UringOptions{}, &ring).err, 0);
    MapHandler h;
    Call probe(Op::Get, 1);
    h.chunks[chunk_name(probe.op.desc)] = pattern(1, 300'000);
    TcpServerChannel c(*ring, fd[0], h, TcpServerLimits{});
    c.start();
    while (!c.closed()) {
      ring->submit_and_wait(10'000'000);
      h.answer(&c);
    }
    EXPECT_EQ(h.out, 0u);
  });
  std::unique_ptr<Uring> ring;
  ASSERT_EQ(Uring::create(UringOptions{}, &ring).err, 0);
  TcpClientChannel c(*ring, fd[1], ChannelLimits{});
  for (int round = 0; round < 50; ++round) {
    Calls gets;
    for (int i = 0; i < 20; ++i) {
      gets.push_back(std::make_unique<Call>(Op::Get, 1, 300'000));
      c.submit(&gets.back()->op);
    }
    c.flush(1);
    while (c.ops_inflight() != 0) ring->submit_and_wait(UINT64_MAX);
    for (const auto& g : gets) ASSERT_EQ(std::memcmp(g->mem.get(), pattern(1, 300'000).data(), 300'000), 0);
  }
  c.close();
  while (!c.closed()) ring->submit_and_wait(UINT64_MAX);
  server.join();
}

}  // namespace
}  // namespace kvfs
