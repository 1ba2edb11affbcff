// channel_pair.h owns a client's and a server's channel in one loop, for tests of each transport: ChannelPair, both made by the
// test, and HostileChannel, one of them with the test at the other end. Everything must have come back at the end.
#pragma once

#include <gtest/gtest.h>

#include "channel_fixture.h"

namespace kvfs {

template <typename Client, typename Server>
class ChannelLoop : public testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(Uring::create(UringOptions{}, &ring_).err, 0); }
  void turn(uint64_t wait_ns) {
    ASSERT_GE(ring_->submit_and_wait(wait_ns), 0);
    if (server_ != nullptr) handler_.answer(server_.get());
    if (client_ != nullptr) client_->flush(1);
  }
  // Until f() is true, but for 20 s only.
  template <typename F>
  bool until(F f, uint64_t wait_ns = 1'000'000) {
    const uint64_t deadline = monotonic_ns() + 20'000'000'000;
    while (!f() && monotonic_ns() < deadline) turn(wait_ns);
    return f();
  }
  void check_client() {
    EXPECT_TRUE(client_->closed());
    for (const auto& c : calls_) EXPECT_EQ(c->back, 1u) << "every operation comes back once";
  }
  void check_server() {
    EXPECT_TRUE(server_->closed());
    EXPECT_EQ(handler_.out, 0u) << "every buffer comes back";
    EXPECT_EQ(handler_.taken, handler_.released_ops);
    EXPECT_EQ(handler_.ended_times, 1u);
  }

  std::unique_ptr<Uring> ring_;
  MapHandler handler_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Server> server_;
  Calls calls_;
};

template <typename Client, typename Server>
class ChannelPair : public ChannelLoop<Client, Server> {
 protected:
  using Base = ChannelLoop<Client, Server>;
  using Base::calls_, Base::client_, Base::handler_, Base::server_;

  void TearDown() override {
    if (client_ == nullptr) return;
    handler_.hold = false;
    client_->close();
    if (server_ != nullptr) server_->close();
    this->until([&] { return client_->closed() && (server_ == nullptr || server_->closed()); });
    this->check_client();
    EXPECT_EQ(client_->ops_inflight(), 0u);
    EXPECT_EQ(client_->bytes_inflight(), 0u);
    if (server_ != nullptr) this->check_server();
  }
  void turn(uint64_t wait_ns = 1'000'000) { Base::turn(wait_ns); }
  bool settle() {
    return this->until([&] { return client_->ops_inflight() == 0; });
  }
  Call* call(wire::Op op, uint64_t key = 0, uint32_t len = 0, uint32_t off = 0) {
    calls_.push_back(std::make_unique<Call>(op, key, len, off));
    Call* c = calls_.back().get();
    if (op == wire::Op::Put || op == wire::Op::Write) std::memcpy(c->mem.get(), pattern(key, len).data(), len);
    client_->submit(&c->op);
    return c;
  }
  void store(uint64_t key, uint32_t len) {
    Call c(wire::Op::Get, key);
    handler_.chunks[chunk_name(c.op.desc)] = pattern(key, len);
  }
  static bool right(const Call& c, uint64_t key, uint32_t len) {
    return c.op.answered && c.op.result == len && std::memcmp(c.mem.get(), pattern(key, len).data(), len) == 0;
  }

  // Of an open pair.
  void every_operation_goes_there_and_back() {
    using wire::Op;
    Call* put = call(Op::Put, 1, 5000);
    Call* write = call(Op::Write, 2, 4096, 8192);
    ASSERT_TRUE(settle());
    EXPECT_EQ(put->op.result, 1);
    EXPECT_EQ(write->op.result, 4096);
    Call* again = call(Op::Put, 1, 5000);
    Call* get = call(Op::Get, 1, 5000);
    Call* tail = call(Op::Get, 1, 5000, 4000);
    Call* none = call(Op::Get, 9, 100);
    Call* lookup = call(Op::Lookup, 1);
    Call* scan = call(Op::Scan, 0, 6400);
    Call* stat = call(Op::Stat, 0, sizeof(wire::TargetStat));
    Call* flush = call(Op::Flush, 2);
    Call* sync = call(Op::Sync);
    Call* purge = call(Op::Purge);
    ASSERT_TRUE(settle());
    EXPECT_EQ(again->op.result, 0);
    EXPECT_TRUE(right(*get, 1, 5000));
    EXPECT_EQ(tail->op.result, 1000);
    EXPECT_EQ(std::memcmp(tail->mem.get(), pattern(1, 5000).data() + 4000, 1000), 0);
    EXPECT_EQ(none->op.result, -ENOENT);
    EXPECT_TRUE(none->op.answered);
    EXPECT_EQ(lookup->op.result, 5000);
    EXPECT_EQ(scan->op.result, 64);
    EXPECT_EQ(stat->op.result, 32);
    wire::TargetStat st;
    std::memcpy(&st, stat->mem.get(), sizeof st);
    EXPECT_EQ(st.room, 400u);
    for (Call* c : {flush, sync, purge}) EXPECT_TRUE(c->op.answered && c->op.result == 0);
    Call* cut = call(Op::Truncate, 2, 0, 100);
    Call* del = call(Op::Delete, 1);
    ASSERT_TRUE(settle());
    EXPECT_EQ(cut->op.result, 0);
    EXPECT_EQ(del->op.result, 0);
    EXPECT_EQ(handler_.chunks.size(), 1u);
  }
  // Of a pair whose batches may have 256.
  void batches_of_all_sizes_make_one_frame_each() {
    using wire::Op;
    for (uint32_t k = 0; k < 256; ++k) store(k, 4096);
    for (const uint32_t n : {1u, 2u, 63u, 64u, 255u, 256u}) {
      std::vector<Call*> gets;
      const auto before = client_->counters().frames_out;
      for (uint32_t k = 0; k < n; ++k) gets.push_back(call(Op::Get, k, 4096));
      ASSERT_TRUE(settle());
      EXPECT_EQ(client_->counters().frames_out, before + 1);
      for (uint32_t k = 0; k < n; ++k) EXPECT_TRUE(right(*gets[k], k, 4096)) << k << " of " << n;
    }
  }
};

template <typename Client, typename Server>
class HostileChannel : public ChannelLoop<Client, Server> {
 protected:
  using Base = ChannelLoop<Client, Server>;
  using Base::client_, Base::server_;

  void TearDown() override {
    if (client_ != nullptr) {
      client_->close();
      this->until([&] { return client_->closed(); });
      this->check_client();
    }
    if (server_ != nullptr) {
      server_->close();
      this->until([&] { return server_->closed(); });
      this->check_server();
    }
  }
  void turn() { Base::turn(200'000); }
};

}  // namespace kvfs
