// net_server_fixture.h owns a NetServer on a real store with connections in memory, driven turn by turn by the test.
#pragma once

#include <gtest/gtest.h>

#include <cerrno>
#include <deque>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "../server/net_server.h"
#include "../server/reactor.h"
#include "net_capability.h"
#include "store_fixture.h"

namespace kvfs::testing_net {

// A connection whose peer is the test: what is asked arrives at receive(), what is answered is in `answers` after flush().
// The server has its ServerChannel (end()), the test this, which lives on.
class MemoryChannel {
 public:
  struct Ask {
    wire::Desc desc;
    Bytes payload;
    uint64_t batch;
    uint16_t index;
    uint32_t map_version;
  };
  struct Answer {
    int64_t result;
    Bytes bytes;
    uint64_t sum;
    bool lent;
  };
  explicit MemoryChannel(ChannelHandler* h) : handler_(h) {}
  ~MemoryChannel() { EXPECT_EQ(ops_, 0u); }
  std::unique_ptr<ServerChannel> server_end() {
    auto e = std::make_unique<ServerEnd>(this);
    end_ = e.get();
    return e;
  }

  void ask(Ask a) { asks_.push_back(std::move(a)); }
  // What has come is given to the handler, until it has no buffer.
  void receive() {
    while (!asks_.empty() && !ended_) {
      Ask& a = asks_.front();
      auto* op = pending_ != nullptr ? pending_ : new ServerOp{};
      pending_ = nullptr;
      op->desc = a.desc;
      op->channel = end_;
      op->batch = a.batch;
      op->index = a.index;
      op->map_version = a.map_version;
      const int err = wire::check_desc(op->desc);
      if (err == 0 && wire::has_in(wire::Op{op->desc.op})) {
        if (!handler_->buffer(op)) {
          pending_ = op;
          return;
        }
        std::memcpy(op->buf, a.payload.data(), a.payload.size());
        if (stall_payload) {  // the rest of it never comes
          stalled_.push_back(op);
          asks_.pop_front();
          ++ops_;
          return;
        }
      }
      asks_.pop_front();
      ++ops_;
      handler_->take(op, err);
    }
  }
  void cancel(uint64_t batch) { handler_->cancel(end_, batch); }
  void reply(ServerOp* op) { replied_.push_back(op); }
  void flush() {
    if (ended_) return release();
    while (!replied_.empty()) {
      ServerOp* op = replied_.front();
      replied_.pop_front();
      Bytes bytes(op->buf, op->buf + (op->lent != nullptr ? 0 : op->out_len));
      if (op->lent != nullptr)
        for (const Lent::Part& p : op->lent->parts) bytes.insert(bytes.end(), p.ptr, p.ptr + p.len);
      answers[{op->batch, op->index}] = {op->result, std::move(bytes), op->out_sum, op->lent != nullptr};
      order.push_back({op->batch, op->index});
      if (unread) {  // on its way for ever
        sent_.push_back(op);
      } else {
        finish(op);
      }
    }
  }

  void end(int err) {
    if (ended_) return;
    ended_ = true;
    why = err;
    delete std::exchange(pending_, nullptr);
    asks_.clear();
    for (ServerOp* op : stalled_) finish(op);
    stalled_.clear();
    release();
    handler_->ended(end_, err);
  }
  void read_all() {  // the peer reads again
    unread = false;
    std::deque<ServerOp*> sent;
    sent.swap(sent_);
    for (ServerOp* op : sent) finish(op);
  }

  bool lends = false, unread = false, stall_payload = false, resumed = false;
  int why = 0;
  std::map<std::pair<uint64_t, uint16_t>, Answer> answers;
  std::vector<std::pair<uint64_t, uint16_t>> order;
  bool ended() const { return ended_; }

 private:
  void finish(ServerOp* op) {
    --ops_;
    handler_->released(op);
    delete op;
  }
  void release() {
    read_all();
    while (!replied_.empty()) {
      ServerOp* op = replied_.front();
      replied_.pop_front();
      finish(op);
    }
  }
  struct ServerEnd final : ServerChannel {
    explicit ServerEnd(MemoryChannel* c) : m(c) {}
    void start() override {}
    void reply(ServerOp* op) override { m->reply(op); }
    void flush() override { m->flush(); }
    void resume() override { m->resumed = true; }
    void close(int err) override { m->end(err); }
    bool closed() const override { return m->ended_ && m->ops_ == 0; }
    uint32_t ops_inflight() const override { return m->ops_; }
    bool sending() const override { return !m->sent_.empty(); }
    bool lends() const override { return m->lends; }
    const ChannelCounters& counters() const override { return none; }
    MemoryChannel* m;
    ChannelCounters none;
  };
  ChannelHandler* handler_;
  ServerEnd* end_ = nullptr;
  ServerOp* pending_ = nullptr;
  uint32_t ops_ = 0;
  bool ended_ = false;
  std::deque<Ask> asks_;
  std::deque<ServerOp*> replied_, sent_, stalled_;
};

constexpr wire::Grant kAll{wire::kAnyNamespace, wire::kBlocks | wire::kFiles, wire::kAllRights, 0, 0};

// A client's connection: makes descriptors, keeps answers.
struct Client {
  MemoryChannel* channel = nullptr;
  wire::HelloReply reply{};
  uint64_t batch = 0, seq = 0;

  static wire::Desc desc(wire::Op op, const ChunkKey& key) {
    wire::Desc d{};
    d.op = uint8_t(op);
    d.kind = uint8_t(key.kind);
    d.key_len = key.key_len;
    d.ns = key.ns;
    std::memcpy(d.key, key.id, sizeof d.key);
    return d;
  }
  wire::Desc get(const ChunkKey& k, uint32_t len, uint32_t off = 0) const {
    wire::Desc d = desc(wire::Op::Get, k);
    d.len = len;
    d.off = off;
    return d;
  }
  wire::Desc change(wire::Op op, const ChunkKey& k, uint32_t len = 0, uint32_t off = 0) {
    wire::Desc d = desc(op, k);
    d.len = len;
    d.off = off;
    d.seq = ++seq;
    return d;
  }
  wire::Desc whole(wire::Op op, Kind kind, uint32_t ns, uint32_t len = 0, uint64_t cursor = 0) {
    wire::Desc d{};
    d.op = uint8_t(op);
    d.kind = uint8_t(kind);
    d.ns = ns;
    d.len = len;
    d.cursor = cursor;
    if (wire::mutates(op)) d.seq = ++seq;
    return d;
  }
  wire::Desc purge_file(uint64_t ino, uint64_t from, uint64_t to, uint32_t ns) {
    wire::Desc d = whole(wire::Op::Purge, Kind::File, ns);
    d.key_len = 24;
    const uint64_t part[3] = {ino, from, to};
    std::memcpy(d.key, part, sizeof part);
    return d;
  }
};

class NetServerTest : public ::testing::Test {
 protected:
  void SetUp() override { alarm(200); }  // no test hangs
  void TearDown() override {
    stop();
    alarm(0);
  }
  void start(NetServerOptions o = {}, uint64_t device = 64u << 20, uint64_t memory = 0) {
    opt = o;
    dev = std::make_unique<SimDevice>(sim(1, device));
    ASSERT_EQ(Store::format(*dev, kSmall).err, 0);
    store = std::make_unique<Harness>(*dev, StoreOptions{.memory_bytes = memory});
    ASSERT_EQ(store->open().err, 0);
    server = std::make_unique<NetServer>(nullptr, store->store.get(), opt);
    ASSERT_EQ(server->init().err, 0);
    server->set_map(1, {});
  }
  void stop() {
    clients.clear();  // they are the test's, which is over
    if (!server) return;
    bool gone = false;
    server->stop([&] { gone = true; });
    until([&] { return gone; });
    server.reset();
    channels.clear();
    EXPECT_EQ(store->store->close().err, 0);
  }
  void turn() {
    for (Client* c : clients) c->channel->receive();
    server->pump();
    store->turn();
    server->publish();
  }
  template <typename F>
  void until(F f) {
    const uint64_t end = monotonic_ns() + 90000000000u;
    while (!f()) {
      ASSERT_LT(monotonic_ns(), end) << "nothing happens any more";
      turn();
    }
  }
  wire::Hello hello(wire::Purpose p, const Client* of = nullptr) {
    wire::Hello h{};
    h.magic = wire::kHelloMagic;
    h.version = wire::kVersion;
    h.purpose = uint16_t(p);
    h.features = wire::kFeatures;
    h.client[0] = client_number;
    if (of != nullptr) std::memcpy(h.session, of->reply.session, sizeof h.session);
    return h;
  }
  static wire::Capability capability(std::vector<wire::Grant> grants, uint64_t expires = UINT64_MAX) {
    wire::Capability c;
    c.expires = expires;
    c.grants = std::move(grants);
    return c;
  }
  // A new session, or one more connection of `of`'s. Its channel lives as long as the server has it.
  int admit(Client* c, const wire::Capability& cap, const Client* of = nullptr) {
    const wire::Hello h = hello(of != nullptr ? wire::Purpose::Attach : wire::Purpose::Session, of);
    NetConn* conn = server->admit(h, &cap, &c->reply);
    if (conn == nullptr) return c->reply.err;
    channels.push_back(std::make_unique<MemoryChannel>(server.get()));
    c->channel = channels.back().get();
    server->connect(conn, c->channel->server_end());
    clients.push_back(c);
    return 0;
  }
  void leave(Client* c, int err = 0) {
    std::erase(clients, c);
    c->channel->end(err);
    turn();
    turn();
  }
  // Asks as a batch of its own; its number.
  uint64_t send(Client* c, std::vector<wire::Desc> descs, const Bytes& payload = {}, uint32_t map_version = 1) {
    const uint64_t b = ++c->batch;
    for (uint16_t i = 0; i < descs.size(); ++i) {
      const bool in = wire::has_in(wire::Op{descs[i].op});
      if (in) descs[i].sum = wire::data_sum(payload.data(), payload.size());
      c->channel->ask({descs[i], in ? payload : Bytes{}, b, i, map_version});
    }
    return b;
  }
  bool answered(const Client* c, uint64_t batch, uint16_t index = 0) {
    return c->channel->answers.contains({batch, index});
  }
  int64_t result(Client* c, uint64_t batch, uint16_t index = 0) {
    until([&] { return c->channel->ended() || answered(c, batch, index); });
    if (!answered(c, batch, index)) return -EPIPE;
    return c->channel->answers[{batch, index}].result;
  }
  int64_t run(Client* c, const wire::Desc& d, const Bytes& payload = {}, uint32_t map_version = 1) {
    const uint64_t b = send(c, {d}, payload, map_version);
    const int64_t r = result(c, b);
    if (answered(c, b)) last = c->channel->answers[{b, uint16_t{0}}];
    return r;
  }
  int64_t put(Client* c, const ChunkKey& k, const Bytes& v) {
    return run(c, c->change(wire::Op::Put, k, uint32_t(v.size())), v);
  }
  kvfs_net_stats stats() {
    kvfs_net_stats s{};
    server->add_stats(&s);
    return s;
  }

  NetServerOptions opt;
  uint8_t client_number = 0;  // of those admitted from now on; 0: of none
  std::unique_ptr<SimDevice> dev;
  std::unique_ptr<Harness> store;
  std::unique_ptr<NetServer> server;
  std::vector<Client*> clients;  // that are connected
  std::vector<std::unique_ptr<MemoryChannel>> channels;
  MemoryChannel::Answer last;
};

inline ChunkKey volume_key(uint64_t ino, uint64_t index, uint32_t ns) {
  ChunkKey k = file_key(ino, index);
  k.ns = ns;
  return k;
}

}  // namespace kvfs::testing_net
