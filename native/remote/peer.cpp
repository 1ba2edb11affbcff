// peer.cpp: a target's session and connections; see peer.h.
#include "peer.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "../store/check.h"

namespace kvfs {

namespace {
constexpr uint64_t kBatchBytes = 1u << 20;  // a batch that has them is full: rails share what is large
constexpr uint64_t kLookNs = 10'000'000;    // at what ends or has yet to show that it works
constexpr uint64_t kUnknownSpeed = 10'000;  // Mbit/s
constexpr uint64_t kOpCost = 256;           // bytes on the wire besides the payload
constexpr uint64_t kNever = UINT64_MAX;

constexpr uint32_t kMaxSessionOps = 1u << 16;  // of what a server offers: more are never under way

bool same(const wire::MapEndpoint& a, const wire::MapEndpoint& b) {
  return a.transport == b.transport && a.family == b.family && a.port == b.port &&
         std::memcmp(a.address, b.address, sizeof a.address) == 0;
}

uint64_t payload(const wire::Desc& d) {
  const wire::Op op{d.op};
  return wire::has_in(op) || wire::has_out(op) ? d.len : 0;
}

bool is_get(const RemoteOp* op) { return wire::has_out(wire::Op{op->net.desc.op}); }

// Comparable between rails: how long what is in flight keeps the link busy.
uint64_t load(const Rail& r) {
  uint64_t ops = 0;
  for (const auto& c : r.connections) ops += c->ops;
  return (r.bytes + ops * kOpCost) * 1000 / (r.speed() != 0 ? r.speed() : kUnknownSpeed);
}

uint64_t load(const Connection& c) { return c.bytes + c.ops * kOpCost; }
}  // namespace

Peer::Peer(PeerHost* host, Network* network, Window* window, std::mt19937_64* random, const PeerOptions& opt,
           const wire::MapTarget& target)
    : host_(host), network_(network), window_(window), random_(random), opt_(opt) {
  update(target);
}

void Peer::update(const wire::MapTarget& target) {
  target_ = target;
  attention_ = sort_ = true;
  for (auto& r : rails_) {
    r->gone = std::none_of(target.endpoint, target.endpoint + target.endpoints,
                           [&](const wire::MapEndpoint& e) { return same(e, r->endpoint); });
    if (!r->gone) continue;
    for (auto& c : r->connections) end(c.get());
  }
  find_rails();
}

// Where there was no way to an endpoint there may be one by now.
void Peer::find_rails() {
  for (uint32_t i = 0; i < target_.endpoints; ++i) {
    const wire::MapEndpoint& e = target_.endpoint[i];
    if (e.transport == uint8_t(wire::Transport::Rdma) && opt_.transport == 1) continue;
    if (std::any_of(rails_.begin(), rails_.end(), [&](const auto& r) { return !r->gone && same(r->endpoint, e); }))
      continue;
    for (Route& route : network_->routes(e)) {
      auto r = std::make_unique<Rail>();
      r->peer = this;
      r->endpoint = e;
      r->name = rail_name(e, route.device);
      r->route = std::move(route);
      r->number = uint32_t(rails_.size());
      rails_.push_back(std::move(r));
    }
  }
}

bool Peer::up() const {
  return std::any_of(rails_.begin(), rails_.end(), [](const auto& r) { return r->live() != 0; });
}

bool Peer::has(wire::Transport kind) const {
  return std::any_of(rails_.begin(), rails_.end(), [&](const auto& r) { return !r->gone && r->kind() == kind; });
}

// Beside RDMA or shared memory one TCP connection is enough: it holds the session, and takes over where all others are down.
// Shared memory has no use for a second one: both ends are one thread.
uint32_t Peer::wanted(const Rail& r) const {
  if (r.gone || closing_) return 0;
  if (r.kind() == wire::Transport::Shm) return 1;
  const bool spare = r.tcp() && (has(wire::Transport::Rdma) || has(wire::Transport::Shm));
  return spare ? 1 : opt_.connections;
}

// ---- operations that wait

void Peer::queue(RemoteOp* op) {
  op->peer = this;
  op->state = RemoteOp::State::Queued;
  (is_get(op) ? gets_ : others_).push_back(op);
}

void Peer::queue_again(RemoteOp* op) {
  op->peer = this;
  op->state = RemoteOp::State::Queued;
  (is_get(op) ? gets_ : others_).push_front(op);
}

void Peer::unqueue(RemoteOp* op) {
  (is_get(op) ? gets_ : others_).erase(op);
  if (gets_.empty()) window_->leave(&place_);
}

RemoteOp* Peer::unqueue_any() {
  RemoteOp* op = gets_.empty() ? others_.front() : gets_.front();
  if (op != nullptr) unqueue(op);
  return op;
}

// The next one that all limits let through; taken from its queue, the window is taken.
RemoteOp* Peer::next_op() {
  if (ops_ + cancelled_ops_ >= session_.max_ops) return nullptr;
  for (int i = 0; i < 2; ++i) {
    gets_next_ = !gets_next_;
    if (gets_next_) {
      RemoteOp* op = gets_.front();
      if (op != nullptr && window_->take(&place_, op->net.desc.len)) return gets_.pop();
      continue;
    }
    RemoteOp* op = others_.front();
    if (op == nullptr) continue;
    const bool changes = wire::mutates(wire::Op{op->net.desc.op});
    if (changes && !numbered(op) && next_seq_ - first_seq_ >= session_.max_ops) continue;
    if (in_ + cancelled_in_ + payload(op->net.desc) <= session_.max_in) return others_.pop();
  }
  return nullptr;
}

bool Peer::send_batch(uint64_t now) {
  if (!waiting()) return false;
  Connection* c = session_.valid ? pick() : nullptr;
  count_cancelled();
  uint32_t n = 0;
  uint64_t bytes = 0;
  while (c != nullptr && n < session_.limits.max_batch && bytes < kBatchBytes) {
    RemoteOp* op = next_op();
    if (op == nullptr) break;
    ++n;
    bytes += payload(op->net.desc);
    send(op, c, now);
  }
  // Who can send nothing for another reason than the window must not keep it from others.
  if (gets_.empty() || c == nullptr || ops_ + cancelled_ops_ >= session_.max_ops) window_->leave(&place_);
  return n != 0;
}

void Peer::send(RemoteOp* op, Connection* c, uint64_t now) {
  NetOp& n = op->net;
  const wire::Op what{n.desc.op};
  const uint64_t bytes = payload(n.desc);
  if (wire::mutates(what) && op->session != session_.number) {
    // The seq of another session means nothing here. The operations are such that they may be executed again.
    op->again = op->sent;
    op->session = session_.number;
    n.desc.seq = next_seq_++;
    settled_[n.desc.seq % settled_.size()] = false;
  }
  n.result = 0;
  n.answered = n.cancelled = n.unreachable = false;
  n.done = net_done;
  n.owner = op;
  n.next = nullptr;
  op->conn = c;
  op->state = RemoteOp::State::Sent;
  op->sent = true;
  if (c->ops++ == 0) c->since_ns = now;
  c->bytes += bytes;
  c->rail->bytes += bytes;
  ++c->rail->ops;
  ++ops_;
  if (wire::has_in(what)) in_ += bytes;
  c->touched = true;
  c->channel->submit(&n);
}

void Peer::settle(RemoteOp* op) {
  if (!numbered(op)) return;
  settled_[op->net.desc.seq % settled_.size()] = true;
  while (first_seq_ < next_seq_ && settled_[first_seq_ % settled_.size()]) ++first_seq_;
  op->session = 0;
}

void Peer::count_cancelled() {
  cancelled_ops_ = 0;
  cancelled_in_ = 0;
  for (const auto& r : rails_) {
    for (const auto& c : r->connections) {
      if (c->ending) continue;
      cancelled_ops_ += c->channel->ops_inflight() - c->ops;
      cancelled_in_ += c->channel->bytes_inflight() - c->bytes;
    }
  }
}

void Peer::flush(uint32_t map_version) {
  for (size_t i = 0; i < rails_.size(); ++i) {
    Rail* r = rails_[i].get();
    for (size_t k = 0; k < r->connections.size(); ++k) {  // none goes in here
      Connection* c = r->connections[k].get();
      if (!c->touched) continue;
      c->touched = false;
      c->channel->flush(map_version);
    }
  }
}

void Peer::net_done(NetOp* n) {
  auto* op = static_cast<RemoteOp*>(n->owner);
  Peer* self = op->peer;
  Connection* c = op->conn;
  const uint64_t bytes = payload(n->desc);
  --c->ops;
  c->bytes -= bytes;
  c->rail->bytes -= bytes;
  --self->ops_;
  if (wire::has_in(wire::Op{n->desc.op})) self->in_ -= bytes;
  if (is_get(op)) self->window_->give(n->desc.len);
  if (n->answered) {
    c->rail->works();
    c->proven = true;
  }
  // It cannot reach memory, and asked again it would say the same, at once: other connections may do without.
  const bool undone = !n->answered && !n->cancelled && !n->unreachable && n->result != -EBADMSG;
  if (undone && c->channel->error() == 0) c->memoryless = true;
  if (c->ending || c->memoryless || c->channel->error() != 0) self->attention_ = true;
  op->conn = nullptr;
  self->host_->came_back(op);
}

// ---- connections

// Those of the best kind: shared memory before RDMA before TCP, rails that are up before others.
void Peer::sort_rails() {
  sort_ = false;
  usable_.clear();
  uint32_t best = UINT32_MAX;
  for (const auto& r : rails_) {
    if (r->tcp() && opt_.transport == 2 && has(wire::Transport::Rdma)) continue;  // holds the session
    if (r->live() == 0) continue;
    const uint32_t kind = r->kind() == wire::Transport::Shm ? 0 : r->tcp() ? 2 : 1;
    const uint32_t rank = uint32_t(r->down) * 3 + kind;
    if (rank < best) usable_.clear();
    best = std::min(best, rank);
    if (rank == best) usable_.push_back(r.get());
  }
}

// The less loaded of two rails, two different ones: with two rails it is always the better one, and the parts of a large
// batch end together. Of its connections the least loaded.
Connection* Peer::pick() {
  for (;;) {
    if (sort_) sort_rails();
    const size_t n = usable_.size();
    if (n == 0) return nullptr;
    const size_t first = (*random_)() % n;
    Rail* r = usable_[first];
    if (n > 1) {
      Rail* other = usable_[(first + 1 + (*random_)() % (n - 1)) % n];
      if (load(*other) < load(*r)) r = other;
    }
    Connection* c = nullptr;
    const size_t begin = (*random_)();  // so that those with nothing to do are used alike
    for (size_t i = 0; i < r->connections.size(); ++i) {
      Connection* next = r->connections[(begin + i) % r->connections.size()].get();
      if (!next->ending && (c == nullptr || load(*next) < load(*c))) c = next;
    }
    if (c->channel->error() == 0) return c;
    broke(c, now_);
  }
}

void Peer::broke(Connection* c, uint64_t now) {
  c->rail->failed(now, *random_);
  end(c);
}

void Peer::end(Connection* c) {
  if (c->ending) return;
  c->ending = true;
  attention_ = sort_ = true;
  c->channel->close();
}

void Peer::disown(const RemoteOp* op) {
  if (!numbered(op) || !session_.valid) return;
  session_.valid = false;
  disowned_ = attention_ = true;
}

void Peer::end_session() {
  session_.valid = false;
  for (auto& r : rails_) {
    for (auto& c : r->connections) end(c.get());
  }
}

uint64_t Peer::step(uint64_t now) {
  now_ = now;
  attention_ = false;
  if (std::exchange(disowned_, false)) end_session();
  uint64_t at = kNever;
  for (size_t i = 0; i < rails_.size(); ++i) at = std::min(at, step_connections(rails_[i].get(), now));
  std::erase_if(rails_,
                [this](const auto& r) { return r->gone && !r->dialing && r->connections.empty() && (sort_ = true); });
  return std::min(at, step_dials(now));
}

uint64_t Peer::step_connections(Rail* r, uint64_t now) {
  uint64_t at = kNever;
  for (size_t i = 0; i < r->connections.size();) {
    Connection* c = r->connections[i].get();
    ClientChannel* ch = c->channel.get();
    if (!c->ending && (ch->error() != 0 || c->memoryless)) broke(c, now);
    if (!c->ending && !c->proven && ch->heard_ns() > c->made_ns) c->proven = true;
    if (!c->ending && c->proven && r->down && ch->heard_ns() > c->made_ns) {
      r->down = false;
      r->works();
      sort_ = true;
    }
    if (!c->ending && c->ops != 0) {
      const uint64_t heard = std::max(ch->heard_ns(), c->since_ns);
      if (c->pinged_ns <= heard) {
        if (now >= heard + opt_.ping_ns()) {
          ch->ping();
          c->touched = true;
          c->pinged_ns = now;
        }
      } else if (now >= c->pinged_ns + opt_.dead_ns - opt_.ping_ns()) {
        broke(c, now);
      }
      at = std::min(at, now + opt_.ping_ns() / 2);
    }
    if (c->ending && c->ops == 0 && ch->closed()) {
      r->in_before += ch->counters().bytes_in;
      r->out_before += ch->counters().bytes_out;
      sort_ = true;
      r->connections.erase(r->connections.begin() + ptrdiff_t(i));
      continue;
    }
    if (c->ending || r->down) at = std::min(at, now + kLookNs);
    ++i;
  }
  return at;
}

uint64_t Peer::step_dials(uint64_t now) {
  if (closing_ || dialing_session_) return kNever;
  uint64_t at = kNever;
  if (!session_.valid) {
    // What the last session had under way comes back first: its seqs mean nothing to the next.
    if (ops_ != 0) return now + kLookNs;
    for (size_t i = 0; i < rails_.size(); ++i) {
      Rail* r = rails_[(next_rail_ + i) % rails_.size()].get();
      if (!r->tcp() || r->gone) continue;
      if (r->dialing || r->dial_at_ns > now) {
        at = std::min(at, r->dialing ? kNever : r->dial_at_ns);
        continue;
      }
      next_rail_ = uint32_t((next_rail_ + i + 1) % rails_.size());
      dialing_session_ = true;
      dial(r, wire::Purpose::Session);
      return kNever;
    }
    return at;
  }
  uint32_t live = 0;
  for (const auto& r : rails_) live += r->live() + uint32_t(r->dialing);
  for (const auto& r : rails_) {
    if (r->dialing || r->live() >= wanted(*r) || live >= wire::kMaxConnections) continue;
    if (r->dial_at_ns > now) {
      at = std::min(at, r->dial_at_ns);
      continue;
    }
    ++live;
    dial(r.get(), wire::Purpose::Attach);
  }
  return at;
}

void Peer::dial(Rail* r, wire::Purpose purpose) {
  auto d = std::make_unique<Dial>();
  d->purpose = purpose;
  d->endpoint = r->endpoint;
  d->device = r->route.device;
  d->target = target_.number;
  if (purpose == wire::Purpose::Attach) std::memcpy(d->session, session_.id, sizeof d->session);
  d->timeout_ns = opt_.connect_ns();
  d->owner = r;
  r->dialing = true;
  network_->dial(std::move(d));
}

void Peer::dialed(Dial* d, uint64_t now) {
  auto* r = static_cast<Rail*>(d->owner);
  r->dialing = false;
  attention_ = sort_ = true;
  const bool session = d->purpose == wire::Purpose::Session;
  if (session) dialing_session_ = false;
  // Nonsense, or less than one operation needs.
  if (d->err == 0 && session &&
      (d->reply.max_ops == 0 || d->reply.max_batch == 0 || d->reply.max_in < wire::kMaxOpBytes))
    d->err = -EPROTO;
  if (session) {
    tried_ = true;
    last_error_ = d->err;
    refused_ = d->err != 0 && d->answered;
  }
  // At a socket of this name there may be another server than the map's: what that says is not about our session.
  const bool ours = r->kind() != wire::Transport::Shm || std::memcmp(d->reply.boot, boot_, sizeof boot_) == 0;
  if (d->answered && ours && d->reply.map_version != 0) host_->heard_of_map(d->reply.map_version);
  if (!session && d->err == -ESTALE && d->answered && ours) {
    // The session is over, at the latest since the target's process is. One that began in between is not meant.
    if (session_.valid && std::memcmp(d->session, session_.id, sizeof d->session) == 0) end_session();
    return;
  }
  if (d->err != 0) {
    r->failed(now, *random_);
    return;
  }
  if (closing_ || r->gone) return;
  if (session) {
    took_session(d);
  } else if (!session_.valid || std::memcmp(d->session, session_.id, sizeof d->session) != 0) {
    return;
  }
  add_connection(r, d, now);
}

void Peer::took_session(Dial* d) {
  const wire::HelloReply& h = d->reply;
  if (booted_ && std::memcmp(boot_, h.boot, 8) != 0) {
    lazy.lose();
  } else if (booted_ && std::memcmp(boot_, h.boot, sizeof boot_) != 0) {
    lazy.lose_blocks();
  }
  booted_ = true;
  std::memcpy(boot_, h.boot, sizeof boot_);
  session_.valid = true;
  ++session_.number;
  std::memcpy(session_.id, h.session, sizeof session_.id);
  session_.max_ops = std::min(h.max_ops, kMaxSessionOps);
  session_.max_in = h.max_in;
  session_.limits.max_batch = std::min(h.max_batch, wire::kMaxBatch);
  session_.limits.features = h.features & wire::kFeatures;
  next_seq_ = first_seq_ = 1;
  settled_.assign(session_.max_ops, true);
  find_rails();
}

void Peer::add_connection(Rail* r, Dial* d, uint64_t now) {
  auto c = std::make_unique<Connection>();
  c->channel = network_->channel(d, session_.limits);
  if (c->channel == nullptr) {
    r->failed(now, *random_);
    if (!up()) session_.valid = false;  // nothing holds it
    return;
  }
  c->rail = r;
  c->made_ns = std::max(now, c->channel->heard_ns());
  ++r->made;
  if (r->down) {
    c->channel->ping();
    c->touched = true;
  }
  r->connections.push_back(std::move(c));
  sort_ = true;
}

void Peer::close() {
  closing_ = true;
  for (auto& r : rails_) {
    for (auto& c : r->connections) end(c.get());
  }
}

bool Peer::idle() const {
  return std::all_of(rails_.begin(), rails_.end(), [](const auto& r) { return r->connections.empty(); });
}

bool Peer::closed() const {
  return idle() && std::none_of(rails_.begin(), rails_.end(), [](const auto& r) { return r->dialing; });
}

}  // namespace kvfs
