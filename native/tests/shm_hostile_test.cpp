// shm_hostile_test.cpp: channels through shared memory whose peer says what it must not, and segments that are not what they
// should be. Everything comes back once, nothing outside of the arena is touched, and only the channel is lost.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <functional>
#include <thread>

#include "../transport/shm_connect.h"
#include "../transport/tcp_connect.h"
#include "channel_pair.h"
#include "handshake.h"
#include "shm_fixture.h"

namespace kvfs {
namespace {

using wire::Desc;
using wire::FrameHeader;
using wire::Op;
using wire::Result;
using wire::Type;

class ShmHostile : public HostileChannel<ShmClientChannel, ShmServerChannel> {
 protected:
  void open_server(ShmServerLimits limits = {}) {
    other_ = pair_.link(1);
    server_ = std::make_unique<ShmServerChannel>(*ring_, pair_.link(0), handler_, limits);
    server_->start();
    out_ = ShmProducer(&pair_.words(1)[0], pair_.at(1, layout_.requests), pair_.setup.slots, pair_.setup.request_bytes);
  }
  void open_client() {
    other_ = pair_.link(0);
    client_ = std::make_unique<ShmClientChannel>(*ring_, pair_.link(1), ChannelLimits{});
    out_ = ShmProducer(&pair_.words(0)[1], pair_.at(0, layout_.results), pair_.setup.slots, pair_.setup.result_bytes);
  }
  void bell() { ASSERT_EQ(::send(other_->fd(), "", 1, MSG_NOSIGNAL | MSG_DONTWAIT), 1); }
  // By hand, as the peer.
  void say(FrameHeader h, const void* body, size_t n, bool damage = false) {
    int err = 0;
    uint8_t* slot = out_.next(&err);
    ASSERT_NE(slot, nullptr);
    h.magic = wire::kFrameMagic;
    if (n != 0) std::memcpy(slot + sizeof h, body, n);
    wire::seal(&h, slot + sizeof h);
    if (damage) h.sum ^= 1;
    std::memcpy(slot, &h, sizeof h);
    out_.push();
    bell();
  }
  static FrameHeader header(Type type, uint16_t count, uint64_t batch) {
    FrameHeader h{};
    h.type = uint8_t(type);
    h.count = count;
    h.batch = batch;
    return h;
  }
  void request(const std::vector<Desc>& d) {
    say(header(Type::Request, uint16_t(d.size()), ++batch_), d.data(), d.size() * sizeof(Desc));
  }
  static Desc desc(Op op, uint32_t len, uint64_t addr) {
    Call c(op, 1, len);
    c.op.desc.addr = addr;
    return c.op.desc;
  }
  bool server_ends(int with) {
    until([&] { return handler_.ended_times != 0; });
    return handler_.ended_times == 1 && handler_.ended_with == with;
  }
  Call* get(uint32_t len) {
    calls_.push_back(std::make_unique<Call>(Op::Get, 1, len));
    client_->submit(&calls_.back()->op);
    client_->flush(1);
    return calls_.back().get();
  }
  uint64_t sent_batch() {
    FrameHeader h;
    std::memcpy(&h, pair_.at(0, layout_.requests), sizeof h);
    return h.batch;
  }
  // A client with one Get of 4096 bytes outstanding, of which only this is said.
  void answered_with(const std::function<void(FrameHeader*, Result*)>& spoil, bool damage = false) {
    open_client();
    Call* c = get(4096);
    Result r{};
    r.len = 4096;
    r.result = 4096;
    FrameHeader h = header(Type::Response, 1, sent_batch());
    spoil(&h, &r);
    say(h, &r, sizeof r, damage);
    until([&] { return c->ended(); });
    EXPECT_TRUE(c->ended());
    EXPECT_FALSE(c->op.answered);
  }

  ShmPair pair_;
  ShmLayout layout_{pair_.setup};
  std::unique_ptr<ShmLink> other_;
  ShmProducer out_;
  uint64_t batch_ = 0;
};

// ---- a hostile client

TEST_F(ShmHostile, AnIndexOfMoreThanTheRingHoldsEndsTheConnection) {
  open_server();
  pair_.words(1)[0].tail = pair_.setup.slots + 1;
  bell();
  EXPECT_TRUE(server_ends(-EPROTO));
}

TEST_F(ShmHostile, AnIndexOfAnswersThatWereNeverGivenEndsTheConnection) {
  open_server();
  pair_.words(1)[1].head = 7;
  request({desc(Op::Get, 100, 0)});
  EXPECT_TRUE(server_ends(-EPROTO));
}

TEST_F(ShmHostile, WhatLiesOutsideOfTheArenaIsRefusedAndTheRestIsServed) {
  open_server();
  Desc other_memory = desc(Op::Get, 100, 0);
  other_memory.rkey = 1;
  Desc nowhere = desc(Op::Lookup, 0, 0);
  nowhere.addr = 4096;
  const Bytes good = pattern(1, 4096);
  Desc put = desc(Op::Put, 4096, kTestArena - 4096);
  std::memcpy(pair_.at(1, layout_.arena + kTestArena - 4096), good.data(), good.size());
  put.sum = wire::data_sum(good.data(), good.size());
  request({desc(Op::Get, 100, kTestArena - 99), desc(Op::Get, 100, UINT64_MAX - 50), desc(Op::Put, 4096, kTestArena),
           other_memory, nowhere, put});
  until([&] { return handler_.released_ops >= 6; });
  EXPECT_EQ(handler_.errors, std::vector<int>(5, -EINVAL));
  ASSERT_EQ(handler_.chunks.size(), 1u);
  EXPECT_EQ(handler_.chunks.begin()->second, good);
  EXPECT_EQ(handler_.ended_times, 0u);
}

TEST_F(ShmHostile, APayloadThatIsNotWhatItsSumSaysIsRefused) {
  open_server();
  Desc put = desc(Op::Put, 4096, 0);
  put.sum = 42;
  request({put});
  until([&] { return handler_.released_ops >= 1; });
  EXPECT_EQ(handler_.errors, std::vector<int>{-EBADMSG});
  EXPECT_TRUE(handler_.chunks.empty());
}

TEST_F(ShmHostile, MoreThanTheSessionMayHaveUnansweredEndsTheConnection) {
  ShmServerLimits few;
  few.max_ops = 4;
  open_server(few);
  handler_.hold = true;
  request(std::vector<Desc>(4, desc(Op::Get, 100, 0)));
  until([&] { return handler_.waiting.size() >= 4; });
  EXPECT_EQ(handler_.ended_times, 0u);
  request({desc(Op::Get, 100, 0)});
  EXPECT_TRUE(server_ends(-EPROTO));
  handler_.hold = false;
}

TEST_F(ShmHostile, MoreBytesThanTheSessionMayHaveUnansweredEndTheConnection) {
  ShmServerLimits few;
  few.max_in = kMaxChunk;
  open_server(few);
  request({desc(Op::Put, kMaxChunk, 0), desc(Op::Put, 1, 0)});
  EXPECT_TRUE(server_ends(-EPROTO));
}

TEST_F(ShmHostile, ALargerBatchThanWasAgreedOnEndsTheConnection) {
  ShmServerLimits few;
  few.max_batch = 2;
  open_server(few);
  request(std::vector<Desc>(3, desc(Op::Get, 100, 0)));
  EXPECT_TRUE(server_ends(-EPROTO));
}

TEST_F(ShmHostile, FramesThatAreNoneEndTheConnection) {
  const Desc d = desc(Op::Get, 100, 0);
  const std::vector<std::function<void()>> wrongs = {
      [&] { say(header(Type::Request, 1, 1), &d, sizeof d, true); },
      [&] { say(header(Type::Response, 1, 1), &d, sizeof(Result)); },
      [&] { say(header(Type{77}, 0, 1), nullptr, 0); },
      [&] {  // with payload, of which there is none here
        FrameHeader h = header(Type::Request, 1, 1);
        h.payload = 4096;
        say(h, &d, sizeof d);
      },
      [&] {  // a count of more than a slot holds: what lies behind it is not read
        FrameHeader h = header(Type::Request, 0, 1);
        h.magic = wire::kFrameMagic;
        h.count = wire::kMaxBatch;
        int err = 0;
        std::memcpy(out_.next(&err), &h, sizeof h);
        out_.push();
        bell();
      },
  };
  for (size_t i = 0; i < wrongs.size(); ++i) {
    open_server();
    wrongs[i]();
    for (int k = 0; k < 1000 && handler_.ended_times == 0; ++k) turn();
    EXPECT_EQ(handler_.ended_times, 1u) << i;
    EXPECT_EQ(handler_.ended_with, i == 0 ? -EBADMSG : -EPROTO) << i;
    EXPECT_EQ(handler_.taken, 0u) << i;
    for (int k = 0; k < 1000 && !server_->closed(); ++k) turn();
    server_.reset();
    other_.reset();
    handler_ = MapHandler{};
    pair_ = ShmPair{};
  }
  other_ = pair_.link(0);
  pair_.link(1);
}

TEST_F(ShmHostile, AFloodOfBellsKeepsNobodyFromBeingServed) {
  open_server();
  handler_.chunks[chunk_name(desc(Op::Get, 100, 0))] = pattern(1, 100);
  for (int i = 0; i < 10000 && ::send(other_->fd(), "", 1, MSG_NOSIGNAL | MSG_DONTWAIT) == 1; ++i) {
  }
  int err = 0;
  uint8_t* slot = out_.next(&err);
  FrameHeader h = header(Type::Request, 1, 1);
  h.magic = wire::kFrameMagic;
  const Desc d = desc(Op::Get, 100, 0);
  std::memcpy(slot + sizeof h, &d, sizeof d);
  wire::seal(&h, &d);
  std::memcpy(slot, &h, sizeof h);
  out_.push();
  until([&] { return handler_.released_ops >= 1; });
  EXPECT_EQ(handler_.released_ops, 1u);
  EXPECT_EQ(std::memcmp(pair_.at(1, layout_.arena), pattern(1, 100).data(), 100), 0);
}

// ---- a hostile server

TEST_F(ShmHostile, AnswersToNothingThatWasAskedEndTheConnection) {
  answered_with([](FrameHeader* h, Result*) { h->batch += 1; });
  EXPECT_EQ(client_->error(), -EPROTO);
}
TEST_F(ShmHostile, AnAnswerToAnOperationThatIsNotInTheBatchEndsTheConnection) {
  answered_with([](FrameHeader*, Result* r) { r->index = 1; });
  EXPECT_EQ(client_->error(), -EPROTO);
}
TEST_F(ShmHostile, AnAnswerOfMoreThanWasAskedForEndsTheConnection) {
  answered_with([](FrameHeader*, Result* r) { r->len = 4097, r->result = 4097; });
  EXPECT_EQ(client_->error(), -EPROTO);
}
TEST_F(ShmHostile, AnAnswerWhoseLengthAndResultDifferEndsTheConnection) {
  answered_with([](FrameHeader*, Result* r) { r->result = 100; });
  EXPECT_EQ(client_->error(), -EPROTO);
}
TEST_F(ShmHostile, ADamagedAnswerEndsTheConnection) {
  answered_with([](FrameHeader*, Result*) {}, true);
  EXPECT_EQ(client_->error(), -EBADMSG);
}
TEST_F(ShmHostile, DataThatIsNotWhatItsSumSaysIsNoAnswerAndTheConnectionGoesOn) {
  answered_with([](FrameHeader*, Result* r) { r->sum = 1; });
  EXPECT_EQ(calls_[0]->op.result, -EBADMSG);
  EXPECT_EQ(client_->error(), 0);
}
TEST_F(ShmHostile, APongThatNobodyAskedForEndsTheConnection) {
  open_client();
  say(header(Type::Pong, 0, 1), nullptr, 0);
  until([&] { return client_->error() != 0; });
  EXPECT_EQ(client_->error(), -EPROTO);
}
TEST_F(ShmHostile, AServersIndexOfMoreThanTheRingHoldsEndsTheConnection) {
  open_client();
  Call* c = get(4096);
  pair_.words(0)[1].tail = UINT32_MAX;
  bell();
  until([&] { return c->ended(); });
  EXPECT_EQ(client_->error(), -EPROTO);
}

// ---- segments

struct Memfd {
  int fd;
  Memfd(uint64_t bytes, int seals) : fd(memfd_create("kvfs-test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    KVFS_CHECK(ftruncate(fd, off_t(bytes)) == 0 && (seals == 0 || fcntl(fd, F_ADD_SEALS, seals) == 0));
  }
  ~Memfd() { ::close(fd); }
};

TEST(ShmSegment, OneThatCouldShrinkOrIsOfAnotherSizeIsRefused) {
  const ShmSetup s = shm_setup(64, kTestArena);
  const uint64_t bytes = ShmLayout(s).bytes;
  EXPECT_EQ(check_segment(Memfd(bytes, F_SEAL_SHRINK).fd, s), 0);
  EXPECT_EQ(check_segment(Memfd(bytes, 0).fd, s), -EPROTO);
  EXPECT_EQ(check_segment(Memfd(bytes, F_SEAL_GROW).fd, s), -EPROTO);
  EXPECT_EQ(check_segment(Memfd(bytes - 4096, F_SEAL_SHRINK).fd, s), -EPROTO);
  EXPECT_EQ(check_segment(Memfd(bytes + 4096, F_SEAL_SHRINK).fd, s), -EPROTO);
  const int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(check_segment(file, s), -EPROTO);
  close(file);
}

TEST(ShmSegment, SetupsThatNobodyCanWorkWithAreRefused) {
  const auto spoilt = [](const std::function<void(ShmSetup*)>& spoil) {
    ShmSetup s = shm_setup(64, kTestArena);
    spoil(&s);
    s.sum = 0;
    s.sum = wire::data_sum(&s, sizeof s);
    return check_setup(s);
  };
  EXPECT_EQ(spoilt([](ShmSetup*) {}), 0);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->magic = 0; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->slots = 0; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->slots = 65; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->slots = 1u << 31; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->request_bytes = 64; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->request_bytes = 1u << 30; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->result_bytes = 72; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->arena_bytes = 4096; }), -EPROTO);
  EXPECT_EQ(spoilt([](ShmSetup* s) { s->arena_bytes = 1ull << 40; }), -EPROTO);
  ShmSetup damaged = shm_setup(64, kTestArena);
  damaged.slots *= 2;
  EXPECT_EQ(check_setup(damaged), -EBADMSG);
}

// ---- connecting

class ShmConnect : public testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/kvfs-shm-XXXXXX";
    ASSERT_NE(mkdtemp(name), nullptr);
    dir_ = name;
    path_ = dir_ + "/server";
    listener_ = shm_listen(path_, 8);
    ASSERT_GE(listener_, 0);
  }
  void TearDown() override {
    ::close(listener_);
    unlink(path_.c_str());
    rmdir(dir_.c_str());
  }
  // As a server that says yes and then hands over `memory` (-1: ends it), as often as `times` says, with `setup`.
  int connect_to(int memory, const ShmSetup& setup, size_t times = 1) {
    std::thread server([&] {
      int fd = -1;
      for (int i = 0; i < 5000 && fd < 0; ++i, usleep(1000)) fd = tcp_accept(listener_, nullptr);
      wire::Hello hello;
      std::vector<uint8_t> capability;
      EXPECT_EQ(server_read_hello(fd, &hello, &capability, monotonic_ns() + 5'000'000'000), 0);
      wire::HelloReply r{};
      r.version = wire::kVersion;
      r.max_ops = r.max_batch = 8;
      r.max_in = wire::kMaxOpBytes;
      EXPECT_EQ(send_reply(fd, r, nullptr, 0, monotonic_ns() + 5'000'000'000), 0);
      if (memory >= 0 && times == 1) {
        EXPECT_EQ(send_segment(fd, setup, memory), 0);
      } else if (memory >= 0) {
        iovec v{const_cast<ShmSetup*>(&setup), sizeof setup};
        const std::vector<int> fds(times, memory);
        alignas(cmsghdr) char control[CMSG_SPACE(3 * sizeof(int))] = {};
        msghdr m{};
        m.msg_iov = &v;
        m.msg_iovlen = 1;
        m.msg_control = control;
        m.msg_controllen = CMSG_SPACE(times * sizeof(int));
        cmsghdr* c = CMSG_FIRSTHDR(&m);
        *c = {CMSG_LEN(times * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
        std::memcpy(CMSG_DATA(c), fds.data(), times * sizeof(int));
        EXPECT_EQ(sendmsg(fd, &m, 0), ssize_t{sizeof setup});
      }
      ::close(fd);
    });
    wire::Hello hello{};
    hello.purpose = uint16_t(wire::Purpose::Attach);
    wire::HelloReply reply{};
    std::unique_ptr<ShmLink> link;
    const int err = shm_connect(path_, hello, &reply, &link, monotonic_ns() + 5'000'000'000);
    server.join();
    EXPECT_EQ(link != nullptr, err == 0);
    return err;
  }
  std::string dir_, path_;
  int listener_ = -1;
};

TEST_F(ShmConnect, ASegmentThatIsWhatItShouldBeIsTakenAndNoOther) {
  const ShmSetup s = shm_setup(8, kTestArena);
  const uint64_t bytes = ShmLayout(s).bytes;
  EXPECT_EQ(connect_to(Memfd(bytes, F_SEAL_SHRINK).fd, s), 0);
  EXPECT_EQ(connect_to(Memfd(bytes, 0).fd, s), -EPROTO);
  EXPECT_EQ(connect_to(Memfd(bytes / 2, F_SEAL_SHRINK).fd, s), -EPROTO);
  EXPECT_EQ(connect_to(-1, s), -ECONNRESET);
}

TEST_F(ShmConnect, MoreDescriptorsThanOneAreRefusedAndNoneStaysOpen) {
  const auto open_now = [] {
    size_t n = 0;
    for (int fd = 0; fd < 1024; ++fd) n += fcntl(fd, F_GETFD) >= 0;
    return n;
  };
  const ShmSetup s = shm_setup(8, kTestArena);
  const Memfd memory(ShmLayout(s).bytes, F_SEAL_SHRINK);
  const size_t before = open_now();
  for (const size_t times : {2u, 3u}) EXPECT_EQ(connect_to(memory.fd, s, times), -EPROTO);
  EXPECT_EQ(open_now(), before);
  EXPECT_EQ(connect_to(memory.fd, s), 0);
  EXPECT_EQ(open_now(), before);
}

TEST_F(ShmConnect, ASocketThatIsListenedOnIsNotTakenAwayAndOneOfTheDeadIs) {
  EXPECT_EQ(shm_listen(path_, 8), -EADDRINUSE);
  ::close(listener_);
  listener_ = shm_listen(path_, 8);
  EXPECT_GE(listener_, 0);
  const std::string file = dir_ + "/file";
  const int fd = ::open(file.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  EXPECT_EQ(shm_listen(file, 8), -EEXIST);
  ::close(fd);
  unlink(file.c_str());
}

TEST(ShmName, NamesThatCouldLeaveTheDirectoryAreNone) {
  std::string name;
  for (const char* good : {"shm://a", "shm://server-0.kvfs_1", "shm://0123456789abcdef"})
    EXPECT_TRUE(parse_shm_url(good, &name)) << good;
  for (const char* bad :
       {"shm://", "shm://.", "shm://..", "shm://a/b", "shm://0123456789abcdefg", "shm://a b", "tcp://a", "shm:a"})
    EXPECT_FALSE(parse_shm_url(bad, &name)) << bad;
}

}  // namespace
}  // namespace kvfs
