// remote_sim.cpp: see remote_sim.h.
#include "remote_sim.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../store/checksum.h"

namespace kvfs {

Bytes map_bytes(const wire::ClusterMap& m) {
  wire::MapHeader h{};
  h.magic = wire::kMapMagic;
  h.format = wire::kMapFormat;
  h.map_version = m.version;
  h.slots = uint32_t(m.slots.size());
  h.targets = uint32_t(m.targets.size());
  h.namespaces = uint32_t(m.namespaces.size());
  Bytes b;
  const auto add = [&](const void* p, size_t n) {
    b.insert(b.end(), static_cast<const uint8_t*>(p), static_cast<const uint8_t*>(p) + n);
  };
  add(&h, sizeof h);
  add(m.targets.data(), m.targets.size() * sizeof(wire::MapTarget));
  add(m.slots.data(), m.slots.size() * sizeof(uint16_t));
  add(m.namespaces.data(), m.namespaces.size() * sizeof(wire::MapNamespace));
  h.sum = xxh3(b.data(), b.size());
  std::memcpy(b.data(), &h, sizeof h);
  return b;
}

wire::ClusterMap sim_map(uint32_t targets, uint32_t rails, uint32_t version) {
  wire::ClusterMap m;
  m.version = version;
  for (uint32_t i = 0; i < targets; ++i) {
    wire::MapTarget t{};
    t.id = i + 1;
    t.endpoints = rails;
    for (uint32_t r = 0; r < rails; ++r) {
      t.endpoint[r].transport = uint8_t(wire::Transport::Tcp);
      t.endpoint[r].family = 4;
      t.endpoint[r].port = uint16_t(1000 * (i + 1) + r);
      t.endpoint[r].address[0] = 127;
    }
    m.targets.push_back(t);
  }
  for (uint32_t s = 0; s < 256; ++s) m.slots.push_back(uint16_t(s % targets));
  return m;
}

// ---- servers

int64_t SimServer::execute(const wire::Desc& d, void* in_out) {
  ++ops;
  const ChunkKey key = wire::key_of(d);
  const std::string name(reinterpret_cast<const char*>(&key), sizeof key);
  const auto of_inode = [&](const std::string& n) {
    const auto* k = reinterpret_cast<const ChunkKey*>(n.data());
    return k->kind == Kind::File && k->ns == d.ns && std::memcmp(k->id, d.key, 8) == 0;
  };
  const auto durable = [&](const std::string& n) {
    const auto i = mem.find(n);
    if (i == mem.end()) {
      disk.erase(n);
    } else {
      disk[n] = i->second;
    }
  };
  auto i = mem.find(name);
  int64_t result = 0;
  switch (wire::Op{d.op}) {
    case wire::Op::Get: {
      if (i == mem.end()) return -ENOENT;
      if (d.off >= i->second.size()) return 0;
      const size_t n = std::min<size_t>(d.len, i->second.size() - d.off);
      std::memcpy(in_out, i->second.data() + d.off, n);
      return int64_t(n);
    }
    case wire::Op::Lookup:
      return i == mem.end() ? -ENOENT : int64_t(i->second.size());
    case wire::Op::Put:
    case wire::Op::Write: {
      const auto* p = static_cast<const uint8_t*>(in_out);
      uint64_t id = 0;
      if (d.len >= sizeof id) std::memcpy(&id, p, sizeof id);
      if (id != 0) ++executed[id];
      if (wire::Op{d.op} == wire::Op::Put) {
        if (i != mem.end()) return i->second.size() == d.len ? 0 : -EEXIST;
        mem[name].assign(p, p + d.len);
        result = 1;
      } else {
        Bytes& b = mem[name];
        if (b.size() < d.off + d.len) b.resize(d.off + d.len);
        std::memcpy(b.data() + d.off, p, d.len);
        result = d.len;
      }
      break;
    }
    case wire::Op::Truncate:
      if (d.off == 0) {
        mem.erase(name);
      } else if (i != mem.end() && i->second.size() > d.off) {
        i->second.resize(d.off);
      }
      break;
    case wire::Op::Delete:
      if (i == mem.end()) return -ENOENT;
      mem.erase(i);
      break;
    case wire::Op::Flush: {
      std::set<std::string> names;
      for (const auto* m : {&mem, &disk}) {
        for (const auto& [n, b] : *m) {
          if (of_inode(n)) names.insert(n);
        }
      }
      for (const auto& n : names) durable(n);
      return 0;
    }
    case wire::Op::Sync:
      disk = mem;
      return 0;
    case wire::Op::Scan: {
      auto* out = static_cast<wire::ScanRecord*>(in_out);
      uint32_t n = 0;
      uint64_t at = 0;
      for (const auto& [k, b] : mem) {
        const auto* c = reinterpret_cast<const ChunkKey*>(k.data());
        if (uint8_t(c->kind) != d.kind || c->ns != d.ns || at++ < d.cursor) continue;
        if ((n + 1) * sizeof *out > d.len) break;
        out[n] = {};
        out[n].cursor = d.cursor;
        out[n].length = b.size();
        out[n].key_len = c->key_len;
        std::memcpy(out[n].key, c->id, sizeof c->id);
        ++n;
      }
      if (n == 0) return 0;
      uint64_t of_kind = 0;
      for (const auto& [k, b] : mem) {
        const auto* c = reinterpret_cast<const ChunkKey*>(k.data());
        of_kind += uint8_t(c->kind) == d.kind && c->ns == d.ns;
      }
      out[n - 1].cursor = d.cursor + n >= of_kind ? UINT64_MAX : d.cursor + n;
      return n * int64_t{sizeof *out};
    }
    case wire::Op::Purge:
      std::erase_if(mem, [&](const auto& e) {
        const auto* c = reinterpret_cast<const ChunkKey*>(e.first.data());
        if (uint8_t(c->kind) != d.kind || c->ns != d.ns) return false;
        if (c->kind == Kind::Block) return true;
        uint64_t index, first, end;
        std::memcpy(&index, c->id + 8, 8);
        std::memcpy(&first, d.key + 8, 8);
        std::memcpy(&end, d.key + 16, 8);
        return of_inode(e.first) && index >= first && index < end;
      });
      break;
    case wire::Op::Stat: {
      const wire::TargetStat s{1u << 30, room, room, mem.size()};
      std::memcpy(in_out, &s, sizeof s);
      return sizeof s;
    }
  }
  if ((d.flags & wire::kDurable) != 0) durable(name);
  return result;
}

// ---- the network

SimNetwork::SimNetwork(uint32_t n, uint64_t seed) : rng(seed) {
  for (uint32_t i = 0; i < n; ++i) {
    servers.push_back(std::make_unique<SimServer>());
    servers.back()->id = i + 1;
  }
}

void SimNetwork::wait(uint64_t timeout_ns) {
  const uint64_t end = timeout_ns == UINT64_MAX ? UINT64_MAX : now + timeout_ns;
  if (events_.empty() || events_.top().at > end) {
    ASSERT_NE(end, UINT64_MAX) << "nothing would ever wake the store";
    now = end;
    return;
  }
  now = std::max(now, events_.top().at);
  for (int i = 0; i < 64 && !events_.empty() && events_.top().at <= now; ++i) {
    const auto f = events_.top().f;
    events_.pop();
    f();
  }
}

void SimNetwork::dial(std::unique_ptr<Dial> d) {
  ++dials;
  SimServer* s = servers[d->endpoint.port / 1000 - 1].get();
  const bool lost = !passes(*s, d->endpoint.port) || (s->up && s->hung);
  auto shared = std::make_shared<std::unique_ptr<Dial>>(std::move(d));
  const uint64_t timeout = (*shared)->timeout_ns;
  at(lost ? timeout : 100'000 + random(kMs), [this, shared, s, lost] {
    std::unique_ptr<Dial> d = std::move(*shared);
    const bool map_only = d->purpose == wire::Purpose::Map;
    const auto end = [&](int err, bool answered) {
      d->err = err;
      d->answered = answered;
      dialed_.push_back(std::move(d));
    };
    if (lost) return end(-ETIMEDOUT, false);
    if (!s->up) return end(-ECONNREFUSED, false);
    d->reply.map_version = map_only && maps_blocked ? 0 : s->map_version;
    if (s->refuse != 0) return end(s->refuse, true);
    if (map_only) {
      if (maps_blocked) return end(-ETIMEDOUT, false);
      ++maps_sent;
      d->map = map_bytes(map);
      return end(0, true);
    }
    uint64_t id;
    if (d->purpose == wire::Purpose::Attach) {
      std::memcpy(&id, d->session, sizeof id);
      if (!s->sessions.contains(id)) return end(-ESTALE, true);
    } else {
      for (const auto& [old, session] : s->sessions) session->over = true;
      s->sessions.clear();
      id = rng() | 1;
      s->sessions[id] = std::make_shared<SimSession>();
      s->sessions[id]->id = id;
    }
    std::memcpy(d->reply.session, &id, sizeof id);
    std::memcpy(d->reply.boot, &s->boot, sizeof s->boot);
    d->reply.max_ops = s->max_ops;
    d->reply.max_batch = s->max_batch;
    d->reply.max_in = s->max_in;
    d->link = s->sessions[id];
    end(0, true);
  });
}

std::unique_ptr<Dial> SimNetwork::taken() {
  if (dialed_.empty()) return nullptr;
  std::unique_ptr<Dial> d = std::move(dialed_.front());
  dialed_.pop_front();
  return d;
}

std::unique_ptr<ClientChannel> SimNetwork::channel(Dial* d, const ChannelLimits& limits) {
  SimServer* s = servers[d->endpoint.port / 1000 - 1].get();
  auto c = std::make_unique<SimChannel>(this, s, std::static_pointer_cast<SimSession>(d->link), d->endpoint.port,
                                        limits.max_batch);
  uint64_t id;
  std::memcpy(&id, d->reply.session, sizeof id);
  if (!s->up || !s->sessions.contains(id)) c->fail(-ECONNRESET);
  return c;
}

void SimNetwork::break_connections(SimServer* s, int err) {
  for (SimChannel* c : channels) {
    if (c->server == s) c->fail(err);
  }
}

void SimNetwork::stop(SimServer* s) {
  s->up = s->hung = false;
  s->stalled.clear();
  s->sessions.clear();
  break_connections(s, -ECONNRESET);
}

void SimNetwork::restart(SimServer* s) {
  stop(s);
  s->up = true;
  ++s->boot;
  s->mem = s->disk;
  s->executed.clear();
}

void SimNetwork::go_on(SimServer* s) {
  s->hung = false;
  for (auto& f : s->stalled) at(latency(), std::move(f));
  s->stalled.clear();
}

// ---- connections

SimChannel::SimChannel(SimNetwork* net, SimServer* s, std::shared_ptr<SimSession> session, uint16_t p,
                       uint32_t max_batch)
    : server(s),
      port(p),
      net_(net),
      session_(std::move(session)),
      max_batch_(max_batch),
      self_(std::make_shared<SimChannel*>(this)),
      heard_(net->now) {
  net_->channels.push_back(this);
}

SimChannel::~SimChannel() {
  EXPECT_TRUE(closed());
  *self_ = nullptr;
  std::erase(net_->channels, this);
}

void SimChannel::submit(NetOp* op) {
  EXPECT_EQ(error_, 0) << "submitted to a broken channel";
  const wire::Desc& d = op->desc;
  EXPECT_EQ(wire::check_desc(d), 0);
  submitted_.push_back(op);
  live_.insert(op);
  ++ops_;
  bytes_ += wire::has_in(wire::Op{d.op}) || wire::has_out(wire::Op{d.op}) ? d.len : 0;
  if (wire::has_out(wire::Op{d.op})) {
    net_->gets_inflight += d.len;
    net_->gets_max = std::max(net_->gets_max, net_->gets_inflight);
  }
}

void SimChannel::flush(uint32_t map_version) {
  if (error_ != 0 || submitted_.empty()) return;
  net_->frames += (submitted_.size() + max_batch_ - 1) / max_batch_;
  net_->largest_frame = std::max<uint64_t>(net_->largest_frame, submitted_.size());
  const uint64_t delay = net_->latency();
  for (NetOp* op : submitted_) {
    if (server->memoryless.contains(port) && op->desc.len != 0) {
      give_back(op, -ENOMEM, false, false);
      continue;
    }
    if (server->missing.contains(op->mem.ptr)) {
      op->unreachable = true;
      give_back(op, -EFAULT, false, false);
      continue;
    }
    const uint64_t no = ++next_;
    Flight& f = flights_[no];
    f.op = op;
    f.desc = op->desc;
    f.map_version = map_version;
    if (wire::has_in(wire::Op{f.desc.op})) {
      const auto* p = static_cast<const uint8_t*>(op->mem.ptr);
      f.in.assign(p, p + f.desc.len);
      session_->in += f.desc.len;
    }
    ++session_->unanswered;
    if (session_->unanswered > server->max_ops || session_->in > server->max_in) ++net_->violations;
    net_->at(delay, [self = self_, no] { call(self, [no](SimChannel* c) { c->arrive(no); }); });
  }
  submitted_.clear();
}

// What has been lost on the way is never heard of again.
void SimChannel::arrive(uint64_t no) {
  const auto i = flights_.find(no);
  if (i == flights_.end() || error_ != 0 || !net_->passes(*server, port)) return;
  if (server->hung) {
    // The bytes are with the server: it reads them when it goes on, sooner or later, whatever became of the connection.
    server->stalled.push_back([self = self_, no, f = i->second, s = server, session = session_, net = net_] {
      if (*self != nullptr && (*self)->error_ == 0) return (*self)->arrive(no);
      net->at(net->random(3 * kSecond), [f, s, session, boot = s->boot] {
        if (session->over || s->boot != boot || !wire::mutates(wire::Op{f.desc.op}) ||
            session->answers.contains(f.desc.seq))
          return;
        session->answers[f.desc.seq] = s->execute(f.desc, const_cast<uint8_t*>(f.in.data()));
      });
    });
    return;
  }
  const Flight& f = i->second;
  if (net_->chance(net_->faults.drop_before)) return fail(-ECONNRESET);
  const wire::Op op{f.desc.op};
  if (f.map_version < server->map_version) return answer(no, -ESTALE, {}, false);
  if (!f.in.empty() && net_->chance(net_->faults.damage_in)) return answer(no, -EBADMSG, {}, false);
  Bytes out(wire::has_out(op) ? f.desc.len : 0);
  int64_t result;
  const auto known = wire::mutates(op) ? session_->answers.find(f.desc.seq) : session_->answers.end();
  if (known != session_->answers.end()) {
    result = known->second;
  } else {
    result = server->execute(f.desc, f.in.empty() ? out.data() : const_cast<uint8_t*>(f.in.data()));
    if (wire::mutates(op)) {
      // The server remembers max_ops numbers.
      session_->top = std::max(session_->top, f.desc.seq);
      if (f.desc.seq + server->max_ops <= session_->top) ++net_->violations;
      session_->answers[f.desc.seq] = result;
    }
  }
  if (net_->chance(net_->faults.drop_after)) return fail(-ECONNRESET);
  const bool damaged = result > 0 && !out.empty() && net_->chance(net_->faults.damage);
  net_->at(net_->latency(), [self = self_, no, result, out = std::move(out), damaged] {
    call(self, [&](SimChannel* c) { c->answer(no, result, out, damaged); });
  });
}

void SimChannel::answer(uint64_t no, int64_t result, Bytes out, bool damaged) {
  const auto i = flights_.find(no);
  if (i == flights_.end() || error_ != 0 || !net_->passes(*server, port)) return;
  if (server->hung) {
    server->stalled.push_back([self = self_, no, result, out = std::move(out), damaged] {
      call(self, [&](SimChannel* c) { c->answer(no, result, out, damaged); });
    });
    return;
  }
  heard_ = net_->now;
  NetOp* op = i->second.op;
  settle(no);
  if (op == nullptr) return;
  if (!out.empty() && result > 0) std::memcpy(op->mem.ptr, out.data(), size_t(result));
  if (damaged) {
    static_cast<uint8_t*>(op->mem.ptr)[0] ^= 0xff;
    give_back(op, -EBADMSG, false, false);
  } else {
    give_back(op, result, true, false);
  }
}

void SimChannel::settle(uint64_t no) {
  const Flight& f = flights_[no];
  const wire::Op what{f.desc.op};
  --session_->unanswered;
  if (wire::has_in(what)) session_->in -= f.desc.len;
  --ops_;
  bytes_ -= wire::has_in(what) || wire::has_out(what) ? f.desc.len : 0;
  flights_.erase(no);
}

void SimChannel::give_back(NetOp* op, int64_t result, bool answered, bool cancelled) {
  live_.erase(op);
  if (wire::has_out(wire::Op{op->desc.op})) net_->gets_inflight -= op->desc.len;
  op->result = result;
  op->answered = answered;
  op->cancelled = cancelled;
  op->done(op);
}

void SimChannel::cancel(NetOp* op) {
  ++ending_;
  net_->at(10'000, [self = self_, op] {
    call(self, [op](SimChannel* c) {
      --c->ending_;
      if (!c->live_.contains(op)) return;
      for (auto& [no, f] : c->flights_) {
        if (f.op == op) f.op = nullptr;
      }
      c->give_back(op, -ECANCELED, false, true);
    });
  });
}

void SimChannel::ping() {
  net_->at(net_->latency(), [self = self_] {
    call(self, [](SimChannel* c) {
      const auto pong = [self = c->self_] {
        call(self, [](SimChannel* c) {
          if (c->error_ == 0 && !c->server->hung && c->net_->passes(*c->server, c->port)) c->heard_ = c->net_->now;
        });
      };
      if (c->server->hung) {
        c->server->stalled.push_back(pong);
      } else {
        pong();
      }
    });
  });
}

void SimChannel::fail(int err) {
  if (error_ != 0) return;
  error_ = err;
  ++ending_;
  for (const auto& [no, f] : flights_) {  // the server's count is of connections that it has
    --session_->unanswered;
    if (wire::has_in(wire::Op{f.desc.op})) session_->in -= f.desc.len;
  }
  flights_.clear();
  net_->at(0, [self = self_] {
    call(self, [](SimChannel* c) {
      --c->ending_;
      while (!c->live_.empty()) c->give_back(*c->live_.begin(), c->error_, false, false);
    });
  });
}

// ---- the harness

RemoteHarness::RemoteHarness(uint32_t targets, uint32_t rails, uint64_t seed,
                             const std::function<void(RemoteOptions*)>& change) {
  auto n = std::make_unique<SimNetwork>(targets, seed);
  net = n.get();
  net->map = sim_map(targets, rails);
  RemoteOptions o;
  o.map = net->map;
  o.file_ns = kFileNs;
  o.seed = seed;
  o.peer.deadline_ns = 10 * kSecond;
  o.peer.dead_ns = kSecond;
  if (change) change(&o);
  store = std::make_unique<RemoteStore>(std::move(n), std::move(o));
}

RemoteHarness::~RemoteHarness() {
  EXPECT_EQ(net->violations, 0u) << "limits of a session were exceeded";
  const Status s = store->close();
  EXPECT_EQ(s.err, 0) << s.message;
  EXPECT_EQ(store->live_ops(), 0u);
  EXPECT_EQ(store->window_used(), 0u);
}

void RemoteHarness::turn() {
  store->tick(net->now);
  const uint64_t at = store->deadline_ns();
  net->wait(store->busy() ? 0 : at > net->now ? at - net->now : 0);
}

bool RemoteHarness::until(const std::function<bool()>& ended, uint64_t limit_ns) {
  const uint64_t end = net->now + limit_ns;
  for (uint64_t i = 0; !ended(); ++i) {
    if (net->now > end) return false;
    turn();
    if (i > 20'000'000) {
      ADD_FAILURE() << "time does not pass";
      return false;
    }
  }
  return true;
}

void RemoteHarness::pass(uint64_t ns) {
  bool over = false;
  net->at(ns, [&] { over = true; });
  EXPECT_TRUE(until([&] { return over; }, ns + kSecond));
}

int64_t RemoteHarness::run(Request::Op op, const ChunkKey& key, void* mem, uint32_t off, uint32_t len, uint8_t flags) {
  Request r;
  r.op = op;
  r.key = key;
  r.mem.ptr = mem;
  r.off = off;
  r.len = len;
  r.flags = flags;
  bool done = false;
  r.owner = &done;
  r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
  store->submit(&r);
  EXPECT_FALSE(done) << "completed by submit()";
  EXPECT_TRUE(until([&] { return done; })) << "the request never ended";
  return r.result;
}

SimServer& RemoteHarness::server_of(const ChunkKey& key) {
  ChunkKey k = key;
  if (k.kind == Kind::File) k.ns = kFileNs;
  const uint32_t id = store->map().targets[store->map().target_of(k)].id;
  return *net->servers[id - 1];
}

ChunkKey RemoteHarness::key_on(uint32_t target, uint64_t salt) const {
  for (uint64_t n = salt * 100'000;; ++n) {
    const ChunkKey k = block_key(n + 1, kNs);
    if (store->map().target_of(k) == target) return k;
  }
}

void start(RemoteHarness& h, Async* a, Request::Op op, const ChunkKey& key, uint32_t off, uint32_t len, uint8_t flags) {
  a->h = &h;
  a->req = Request{};
  a->req.op = op;
  a->req.key = key;
  a->req.off = off;
  a->req.len = len;
  a->req.flags = flags;
  a->req.mem.ptr = a->mem.data();
  a->req.owner = a;
  a->req.done = [](Request* r) {
    auto* self = static_cast<Async*>(r->owner);
    ASSERT_FALSE(self->done) << "ended twice";
    self->done = true;
    self->ended_ns = self->h->net->now;
  };
  h.store->submit(&a->req);
}

bool all_done(const std::vector<Async>& v) {
  return std::all_of(v.begin(), v.end(), [](const Async& a) { return a.done; });
}

}  // namespace kvfs
