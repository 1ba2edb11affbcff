// rdma_fixture.h: a client's and a server's end of RDMA connections in one process, on one reactor thread, between real
// devices: those of the virtual machine that `make test-rdma` starts.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "transport/rdma_client.h"
#include "transport/rdma_connect.h"
#include "transport/rdma_server.h"

namespace kvfs {

inline uint64_t clock_now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000u + uint64_t(t.tv_nsec);
}

// Page-aligned memory of a test.
struct Memory {
  explicit Memory(size_t n, int prot = PROT_READ | PROT_WRITE)
      : len(n), p(static_cast<uint8_t*>(mmap(nullptr, n, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {}
  ~Memory() { munmap(p, len); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  size_t len;
  uint8_t* p;
};

inline void fill(uint8_t* p, size_t n, uint64_t seed) {
  for (size_t i = 0; i < n; ++i) p[i] = uint8_t((seed + i) * 0x9E3779B97F4A7C15u >> 56);
}
inline bool filled(const uint8_t* p, size_t n, uint64_t seed) {
  for (size_t i = 0; i < n; ++i)
    if (p[i] != uint8_t((seed + i) * 0x9E3779B97F4A7C15u >> 56)) return false;
  return true;
}

// Answers Gets with bytes that follow from the key, and keeps what was put.
class TestHandler : public ChannelHandler {
 public:
  static constexpr uint32_t kSmall = 64u << 10, kLarge = 16u << 20;
  static constexpr uint32_t kSmalls = 256, kLarges = 4;

  TestHandler() : pool(size_t{kSmall} * kSmalls + size_t{kLarge} * kLarges) {
    for (uint32_t i = 0; i < kSmalls; ++i) small.push_back(pool.p + size_t{kSmall} * i);
    for (uint32_t i = 0; i < kLarges; ++i) large.push_back(pool.p + size_t{kSmall} * kSmalls + size_t{kLarge} * i);
  }
  bool buffer(ServerOp* op) override {
    auto& free = op->desc.len <= kSmall ? small : large;
    if (free.empty()) return false;
    op->buf = free.back();
    op->buf_len = op->desc.len <= kSmall ? kSmall : kLarge;
    free.pop_back();
    return true;
  }
  void take(ServerOp* op, int err) override {
    ++taken;
    op->result = err;
    if (hold) {
      held.push_back(op);
    } else {
      execute(op);
    }
  }
  void execute(ServerOp* op) {
    const wire::Desc& d = op->desc;
    uint64_t seed;
    std::memcpy(&seed, d.key, sizeof seed);
    if (op->result == 0 && wire::Op{d.op} == wire::Op::Put) {
      puts[seed] = filled(op->buf, d.len, seed);
      op->result = 1;
    } else if (op->result == 0 && wire::Op{d.op} == wire::Op::Get) {
      if (!buffer(op)) {
        waiting.push_back(op);
        return;
      }
      fill(op->buf, d.len, seed);
      op->out_len = d.len;
      op->result = d.len;
      op->out_sum = wire::data_sum(op->buf, d.len) ^ (damage ? 1 : 0);
    }
    op->channel->reply(op);
    if (std::find(dirty.begin(), dirty.end(), op->channel) == dirty.end()) dirty.push_back(op->channel);
  }
  void answer_held(int64_t result) {
    for (ServerOp* op : std::exchange(held, {})) {
      if (result != 0) op->result = result;
      execute(op);
    }
  }
  void cancel(ServerChannel*, uint64_t batch) override {
    cancelled.push_back(batch);
    if (!answers_cancel) return;
    std::vector<ServerOp*> keep;
    for (ServerOp* op : std::exchange(held, {})) {
      if (op->batch == batch) {
        op->result = -ECANCELED;
        execute(op);
      } else {
        keep.push_back(op);
      }
    }
    held.insert(held.end(), keep.begin(), keep.end());
  }
  void released(ServerOp* op) override {
    ++returned;
    if (op->buf != nullptr) (op->buf_len == kSmall ? small : large).push_back(op->buf);
    for (ServerOp* w : std::exchange(waiting, {})) execute(w);
    freed = true;
  }
  void ended(ServerChannel* c, int err) override {
    ends[c] = err;
    // What it still has of this channel it replies to, as it must.
    for (auto* list : {&held, &waiting})
      for (size_t i = list->size(); i-- != 0;)
        if ((*list)[i]->channel == c) {
          c->reply((*list)[i]);
          list->erase(list->begin() + ptrdiff_t(i));
        }
    dirty.push_back(c);
  }

  Memory pool;
  std::vector<uint8_t*> small, large;
  std::vector<ServerOp*> held, waiting;
  std::vector<ServerChannel*> dirty;
  std::vector<uint64_t> cancelled;
  std::map<uint64_t, bool> puts;
  std::map<ServerChannel*, int> ends;
  bool hold = false, damage = false, answers_cancel = true, freed = false;
  uint64_t taken = 0, returned = 0;
};

struct ClientOp : NetOp {
  ClientOp() {
    done = [](NetOp* op) { ++static_cast<ClientOp*>(op)->times; };
  }
  uint32_t times = 0;
};

inline void make_op(ClientOp* op, wire::Op what, uint64_t seed, void* mem, uint32_t len) {
  op->desc = {};
  op->desc.op = uint8_t(what);
  op->desc.kind = uint8_t(Kind::Block);
  op->desc.ns = 1;
  op->desc.key_len = 16;
  std::memcpy(op->desc.key, &seed, sizeof seed);
  op->desc.len = len;
  op->desc.seq = wire::mutates(what) ? seed + 1 : 0;
  op->mem.ptr = mem;
}

class RdmaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    // Elsewhere are other people's devices, and cables that this can't pull.
    if (std::getenv("KVFS_RDMA_VM") == nullptr) GTEST_SKIP() << "runs in a virtual machine: make test-rdma";
    verbs = load_verbs(&why);
    ASSERT_NE(verbs, nullptr) << why;
    const Status found = rdma_ports(*verbs, &ports);
    ASSERT_TRUE(found) << found.message;
    std::erase_if(ports, [](const RdmaPort& p) { return !rdma_selected(p, "") || ipv4(p) == nullptr; });
    ASSERT_GE(ports.size(), 4u);
    ASSERT_TRUE(Uring::create({}, &uring));
    for (unsigned rail = 0; rail < 2; ++rail) {
      ASSERT_TRUE(RdmaDevice::open(*verbs, ports[rail].device, RdmaDevice::Role::Client, {}, &client_device[rail]));
      ASSERT_TRUE(RdmaDevice::open(*verbs, ports[rail + 2].device, RdmaDevice::Role::Server, {}, &server_device[rail]));
      ASSERT_EQ(client_device[rail]->attach(*uring), 0);
      ASSERT_EQ(server_device[rail]->attach(*uring), 0);
      ASSERT_EQ(server_device[rail]->memory().declare(handler.pool.p, handler.pool.len), 0);
      ASSERT_EQ(server_device[rail]->memory().prepare(handler.pool.p), 0);
      ASSERT_TRUE(
          RdmaListener::open(*verbs, reinterpret_cast<const sockaddr*>(ipv4(ports[rail + 2])), &listener[rail]));
    }
  }

  void TearDown() override {
    for (auto& c : clients) c->close();
    for (auto& s : servers) s->close();
    EXPECT_TRUE(turn_until([&] { return all_closed(); })) << "channels close";
    EXPECT_EQ(handler.small.size(), TestHandler::kSmalls) << "all buffers are back";
    EXPECT_EQ(handler.large.size(), TestHandler::kLarges);
    clients.clear();
    servers.clear();
  }

  bool all_closed() const {
    return std::ranges::all_of(clients, [](auto& c) { return c->closed(); }) &&
           std::ranges::all_of(servers, [](auto& s) { return s->closed(); });
  }

  static const sockaddr_storage* ipv4(const RdmaPort& p) {
    for (const sockaddr_storage& s : p.addresses)
      if (s.ss_family == AF_INET) return &s;
    return nullptr;
  }

  RdmaDial dial(unsigned rail) {
    RdmaDial d;
    d.device = client_device[rail].get();
    d.port = ports[rail].port;
    d.source = *ipv4(ports[rail]);
    d.destination = *ipv4(ports[rail + 2]);
    reinterpret_cast<sockaddr_in*>(&d.destination)->sin_port = htons(listener[rail]->port());
    std::memset(d.hello.session, 7, sizeof d.hello.session);
    d.deadline_ns = clock_now() + 10'000'000'000u;
    return d;
  }

  // Both ends of a connection of `rail`; the accepting one is made by `accept`.
  int connect(unsigned rail, std::unique_ptr<RdmaConnection>* client, std::unique_ptr<RdmaConnection>* server) {
    const RdmaDial d = dial(rail);
    int result = 1, accept_err = 0;
    bool answered = false;
    std::atomic<bool> done = false;
    std::thread t([&] {
      result = rdma_connect(d, client, &answered);
      done = true;
    });
    while (!done) {
      pollfd p{listener[rail]->fd(), POLLIN, 0};
      poll(&p, 1, 20);
      listener[rail]->take([&](RdmaIncoming in) {
        EXPECT_EQ(in.hello().session[3], 7);
        EXPECT_EQ(in.device(), server_device[rail]->name());
        *server = in.accept(*server_device[rail], &accept_err);
      });
    }
    t.join();
    EXPECT_EQ(accept_err, 0);
    return result;
  }

  void open(unsigned rail = 0, RdmaServerOptions options = {}) {
    std::unique_ptr<RdmaConnection> c, s;
    ASSERT_EQ(connect(rail, &c, &s), 0);
    ASSERT_NE(s, nullptr);
    ChannelLimits limits;
    limits.max_batch = 64;
    clients.push_back(std::make_unique<RdmaClientChannel>(*uring, std::move(c), limits));
    servers.push_back(std::make_unique<RdmaServerChannel>(*uring, std::move(s), options, handler));
    servers.back()->start();
  }

  void turn() {
    ASSERT_GE(uring->submit_and_wait(20'000'000), 0);
    if (std::exchange(handler.freed, false))
      for (auto& s : servers)
        if (!s->closed()) s->resume();
    for (ServerChannel* c : std::exchange(handler.dirty, {})) c->flush();
  }
  bool turn_until(const std::function<bool()>& done, uint64_t seconds = 20) {
    const uint64_t end = clock_now() + seconds * 1'000'000'000u;
    while (!done()) {
      if (clock_now() > end) return false;
      turn();
    }
    return true;
  }
  static bool all_done(const std::vector<ClientOp>& ops) {
    return std::ranges::all_of(ops, [](const ClientOp& o) { return o.times != 0; });
  }

  const VerbsTable* verbs = nullptr;
  std::vector<RdmaPort> ports;
  TestHandler handler;
  std::unique_ptr<Uring> uring;
  std::unique_ptr<RdmaDevice> client_device[2], server_device[2];
  std::unique_ptr<RdmaListener> listener[2];
  std::vector<std::unique_ptr<RdmaClientChannel>> clients;
  std::vector<std::unique_ptr<RdmaServerChannel>> servers;
};

}  // namespace kvfs
