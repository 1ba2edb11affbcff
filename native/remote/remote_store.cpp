// remote_store.cpp owns the remote store's turn: new requests, deadlines, sending, and the cluster map. What requests mean
// is in remote_requests.cpp.
#include "remote_store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "../store/check.h"

namespace kvfs {

namespace {
constexpr uint64_t kStatNs = 1'000'000'000;
constexpr uint64_t kGraceNs = 1'000'000'000;  // in which a cancelled operation comes back; then its connection ends
constexpr uint64_t kPassNs = 1'000'000'000;   // timers are looked at as often at least
constexpr uint64_t kMapRetryNs = 50'000'000;
constexpr uint64_t kCloseNs = 5'000'000'000;
constexpr size_t kTurns = 1u << 14;
constexpr int kRounds = 4;  // of sending in one tick
constexpr uint32_t kMaxStale = 3;
constexpr uint32_t kMaxDamaged = 3;
}  // namespace

RemoteStore::RemoteStore(std::unique_ptr<Network> network, RemoteOptions opt)
    : network_(std::move(network)), opt_(std::move(opt)), random_(opt_.seed), window_(opt_.window), turns_(kTurns) {
  set_map(std::move(opt_.map));
}

RemoteStore::~RemoteStore() {
  // A channel that something refers to can't be destroyed: close() has said so.
  for (auto* list : {&peers_, &retired_}) {
    for (auto& p : *list) {
      if (!p->idle()) p.release();
    }
  }
}

Status RemoteStore::start() {
  for (const wire::MapTarget& t : map_.targets) {
    if (std::none_of(t.endpoint, t.endpoint + t.endpoints,
                     [](const wire::MapEndpoint& e) { return e.transport == uint8_t(wire::Transport::Tcp); }))
      return {EINVAL, "target " + std::to_string(t.id) + " has no tcp:// endpoint, with which every session begins"};
  }
  const uint64_t begin = network_->now_ns();
  for (;;) {
    const uint64_t now = network_->now_ns();
    tick(now);
    size_t up = 0;
    const Peer* down = nullptr;
    for (const auto& p : peers_) {
      if (p->up()) {
        ++up;
        continue;
      }
      down = p.get();
      const int err = p->last_error();
      const std::string who = "chunk server of target " + std::to_string(p->id());
      if (p->refused() && (err == -EACCES || err == -EPERM))
        return {-err, "the " + who + " refuses this client's capability"};
      if (p->refused() && err == -EPROTONOSUPPORT) return {-err, "the " + who + " speaks another protocol version"};
    }
    if (up == peers_.size() || (up != 0 && now - begin >= opt_.others_ns)) return {};
    if (now - begin >= opt_.start_ns) {
      const int err = down->last_error() != 0 ? -down->last_error() : ETIMEDOUT;
      const auto& rails = down->rails();
      return {err,
              "no chunk server answers; " + (rails.empty() ? "" : rails.front()->name + ": ") + std::strerror(err)};
    }
    network_->wait(std::min<uint64_t>(10'000'000, busy() ? 0 : UINT64_MAX));
  }
}

Status RemoteStore::close() {
  const uint64_t end = network_->now_ns() + kCloseNs;
  for (auto* list : {&peers_, &retired_}) {
    for (auto& p : *list) {
      p->close();
      while (RemoteOp* op = p->unqueue_any()) resend(op);
    }
  }
  for (;;) {
    tick(network_->now_ns());
    const auto idle = [](const auto& p) { return p->idle(); };
    const bool done =
        std::all_of(peers_.begin(), peers_.end(), idle) && std::all_of(retired_.begin(), retired_.end(), idle);
    if (done && pool_.live() == 0) return {};
    if (network_->now_ns() >= end) return {ETIMEDOUT, "connections to chunk servers could not be ended in time"};
    network_->wait(busy() ? 0 : 1'000'000);
  }
}

int64_t RemoteStore::lookup(const ChunkKey&, ChunkInfo*) { return -ENOENT; }

void RemoteStore::submit(Request* r) {
  r->next = nullptr;
  *incoming_end_ = r;
  incoming_end_ = &r->next;
  if (r->op == Request::Op::Put || r->op == Request::Op::Write) room_ -= std::min(room_, r->len * peers_.size());
}

void RemoteStore::tick(uint64_t now_ns) {
  now_ = now_ns;
  again_ = false;
  while (std::unique_ptr<Dial> d = network_->taken()) {
    if (d->purpose == wire::Purpose::Map) {
      took_map(d.get());
    } else {
      static_cast<Rail*>(d->owner)->peer->dialed(d.get(), now_);
    }
  }
  // Those that come while these are taken are for the next turn: busy() says so.
  Request* r = std::exchange(incoming_, nullptr);
  incoming_end_ = &incoming_;
  while (r != nullptr) {
    Request* next = r->next;
    accept(r);
    r = next;
  }
  expire();
  const auto attention = [](const auto& p) { return p->attention(); };
  if (now_ >= next_pass_ || std::any_of(peers_.begin(), peers_.end(), attention) ||
      std::any_of(retired_.begin(), retired_.end(), attention))
    pass();
  pump();
  count_room();
}

uint64_t RemoteStore::deadline_ns() const {
  uint64_t at = next_pass_;
  if (!timed_.empty()) at = std::min(at, timed_.front()->deadline);
  if (!late_.empty()) at = std::min(at, late_.front()->deadline);
  return at;
}

// ---- where operations go

Peer* RemoteStore::peer_of(const wire::Desc& d) const { return peers_[map_.target_of(wire::key_of(d))].get(); }

// Those with a number of the peer's session must not stand behind others, which may have to wait until theirs is settled.
void RemoteStore::place(RemoteOp* op, Peer* p, bool first) {
  if (op->peer != p) first = false;
  if (op->peer == p && p->numbered(op)) first = true;
  const uint64_t in = wire::has_in(wire::Op{op->net.desc.op}) ? op->net.desc.len : 0;
  if (op->peer != p) {
    if (op->peer != nullptr) {
      op->peer->pending -= in;
      op->peer->settle(op);
      op->session = 0;  // a number is its peer's
    }
    p->pending += in;
  }
  op->map_version = map_.version;
  if (first) {
    p->queue_again(op);
  } else {
    p->queue(op);
  }
  if (!p->active) {
    p->active = true;
    active_.push_back(p);
  }
  again_ = true;
}

void RemoteStore::route(RemoteOp* op) { place(op, peer_of(op->net.desc), false); }

// After it was sent: to the same target, or where a newer map says.
void RemoteStore::resend(RemoteOp* op) {
  const wire::Op what{op->net.desc.op};
  const bool of_chunk = what <= wire::Op::Lookup;
  Peer* p = of_chunk ? peer_of(op->net.desc) : op->peer;
  // A question to a target that is no longer in the map has nobody to answer it.
  const int64_t unmade = op->unknown ? -ETIMEDOUT : -EREMOTEIO;
  if (p->closing()) return finish(op, of_chunk || what == wire::Op::Scan ? unmade : 0);
  place(op, p, true);
}

void RemoteStore::came_back(RemoteOp* op) {
  const NetOp& n = op->net;
  again_ = true;
  if (n.unreachable) {  // asked again it would be the same
    if (op->unknown) op->peer->disown(op);
    return finish(op, n.result);
  }
  if (n.answered && n.result == -ESTALE) return op->expired ? finish(op, -ETIMEDOUT) : stale(op);
  const bool damaged = n.result == -EBADMSG;
  if (n.answered && !damaged && n.result != -ECANCELED) return answered(op, n.result);
  if (op->expired) {
    if (!n.answered) op->peer->disown(op);
    return finish(op, -ETIMEDOUT);
  }
  if (!n.answered) op->unknown = true;
  if (damaged) {
    ++counters_.checksum_errors;
    if (++op->damaged > kMaxDamaged) return finish(op, -EIO);
  }
  resend(op);
}

// ---- time

void RemoteStore::expire() {
  while (!timed_.empty() && timed_.front()->deadline <= now_) {
    RemoteOp* op = timed_.front();
    if (op->state == RemoteOp::State::Sent) {
      timed_.erase(op);
      op->expired = true;
      op->deadline = now_ + kGraceNs;
      late_.push_back(op);
      op->peer->cancel(op);
      continue;
    }
    if (op->state == RemoteOp::State::Queued) op->peer->unqueue(op);
    if (op->state == RemoteOp::State::Parked) parked_.erase(op);
    if (op->sent) op->peer->disown(op);
    finish(op, op->sent ? -ETIMEDOUT : -EREMOTEIO);
  }
  // Ending the connection ends them; a few at most are asked of one that is ending already.
  for (RemoteOp* op = late_.front(); op != nullptr && op->deadline <= now_; op = late_.front()) {
    op->deadline = now_ + kGraceNs;
    late_.erase(op);
    late_.push_back(op);
    op->peer->give_up(op->conn);
  }
}

void RemoteStore::pass() {
  next_pass_ = now_ + kPassNs;
  for (auto* list : {&peers_, &retired_}) {
    for (size_t i = 0; i < list->size(); ++i) {
      Peer* p = (*list)[i].get();
      next_pass_ = std::min(next_pass_, p->step(now_));
      if (list == &retired_ || !p->up() || p->stat_asked || p->closing()) continue;
      if (now_ >= p->stat_at_ns) {
        ask_stat(p);
      } else {
        next_pass_ = std::min(next_pass_, p->stat_at_ns);
      }
    }
  }
  std::erase_if(retired_,
                [](const auto& p) { return p->closed() && p->inflight() == 0 && p->pending == 0 && !p->active; });
  if (want_map_ && !fetching_) {
    if (now_ >= fetch_at_ns_) {
      fetch_map();
    } else {
      next_pass_ = std::min(next_pass_, fetch_at_ns_);
    }
  }
  next_pass_ = std::max(next_pass_, now_ + 1'000'000);
}

// One batch of each target in turn, another one first each time, until nothing more can go; then what was handed over
// leaves. Whatever comes back meanwhile may go out again.
void RemoteStore::pump() {
  for (int round = 0; round < kRounds; ++round) {
    again_ = false;
    bool sent = true;
    while (sent) {
      sent = false;
      first_active_ = active_.empty() ? 0 : (first_active_ + 1) % active_.size();
      for (size_t i = 0; i < active_.size(); ++i) {
        if (active_[(first_active_ + i) % active_.size()]->send_batch(now_)) sent = true;
      }
    }
    std::erase_if(active_, [](Peer* p) { return !p->waiting() && (p->active = false, true); });
    // Pings have to leave, too: all peers, not only the active.
    for (auto& p : peers_) p->flush(map_.version);
    for (auto& p : retired_) p->flush(map_.version);
    if (!again_) return;
  }
}

// ---- space

void RemoteStore::ask_stat(Peer* p) {
  wire::Desc d{};
  d.op = uint8_t(wire::Op::Stat);
  d.kind = uint8_t(Kind::Block);
  d.len = sizeof(wire::TargetStat);
  RemoteOp* op = make(d);
  op->net.mem.ptr = &p->answer;
  p->stat_asked = true;
  p->written_before = p->written;
  place(op, p, false);
}

void RemoteStore::take_stat(RemoteOp* op, int64_t result) {
  Peer* p = op->peer;
  p->stat_asked = false;
  p->stat_at_ns = now_ + kStatNs;
  if (result != int64_t{sizeof(wire::TargetStat)}) return;
  p->stat = p->answer;
  p->stat_known = true;
  p->written -= p->written_before;
}

// As if all targets had as little room as the one with the least, since what is written goes to all alike.
void RemoteStore::count_room() {
  uint64_t least = UINT64_MAX;
  for (const auto& p : peers_) {
    const uint64_t used = p->pending + p->written;
    least = std::min(least, p->stat_known && p->stat.room > used ? p->stat.room - used : 0);
  }
  room_ = std::min(least, UINT64_MAX / peers_.size()) * peers_.size();
}

StoreStats RemoteStore::stats() const {
  StoreStats s = counters_;
  for (const auto& p : peers_) {
    s.chunks += p->stat.chunks;
    s.capacity_bytes += p->stat.capacity;
    s.free_bytes += p->stat.free;
  }
  return s;
}

// ---- the map

void RemoteStore::heard_of_map(uint32_t version) {
  if (version <= map_.version) return;
  if (!want_map_) fetch_tries_ = 0;
  want_map_ = true;
  next_pass_ = 0;
}

void RemoteStore::stale(RemoteOp* op) {
  // Refused, but an earlier session may have made it.
  if (++op->stale > kMaxStale) return finish(op, op->again ? -ETIMEDOUT : -EREMOTEIO);
  if (op->map_version < map_.version) return resend(op);
  op->state = RemoteOp::State::Parked;
  parked_.push_back(op);
  if (!want_map_) {
    fetch_tries_ = 0;
    for (fetch_from_ = 0; fetch_from_ < peers_.size() && peers_[fetch_from_].get() != op->peer;) ++fetch_from_;
  }
  want_map_ = true;
  next_pass_ = 0;
}

// First from the target that told of a newer one, then from each in turn, and from other endpoints after all targets.
void RemoteStore::fetch_map() {
  const size_t targets = map_.targets.size();
  const wire::MapTarget& t = map_.targets[(fetch_from_ + fetch_tries_) % targets];
  auto d = std::make_unique<Dial>();
  d->purpose = wire::Purpose::Map;
  const size_t skip = fetch_tries_ / targets;
  ++fetch_tries_;
  for (uint32_t i = 0; i < t.endpoints; ++i) {
    d->endpoint = t.endpoint[(skip + i) % t.endpoints];
    if (d->endpoint.transport == uint8_t(wire::Transport::Tcp)) break;
  }
  d->target = t.number;
  d->timeout_ns = opt_.peer.connect_ns();
  fetching_ = true;
  network_->dial(std::move(d));
}

void RemoteStore::took_map(Dial* d) {
  fetching_ = false;
  fetch_at_ns_ = now_ + kMapRetryNs;
  next_pass_ = 0;
  wire::ClusterMap map;
  if (d->err != 0 || wire::parse_map(d->map.data(), d->map.size(), &map) != 0) return;
  if (map.version > map_.version) {
    set_map(std::move(map));
    if (opt_.on_map) opt_.on_map(map_);
  } else if (fetch_tries_ < map_.targets.size()) {
    return;  // another target may have a newer one
  }
  want_map_ = false;
  while (RemoteOp* op = parked_.pop()) resend(op);
}

void RemoteStore::set_map(wire::ClusterMap map) {
  map_ = std::move(map);
  std::vector<std::unique_ptr<Peer>> old = std::move(peers_);
  peers_.clear();
  for (const wire::MapTarget& t : map_.targets) {
    const auto had =
        std::find_if(old.begin(), old.end(), [&](const auto& p) { return p != nullptr && p->id() == t.id; });
    if (had != old.end()) {
      (*had)->update(t);
      peers_.push_back(std::move(*had));
    } else {
      peers_.push_back(
          std::make_unique<Peer>(static_cast<PeerHost*>(this), network_.get(), &window_, &random_, opt_.peer, t));
    }
  }
  for (auto& p : old) {
    if (p == nullptr) continue;
    p->close();
    while (RemoteOp* op = p->unqueue_any()) resend(op);
    retired_.push_back(std::move(p));
  }
  // Those that wait go where the new map says.
  std::vector<RemoteOp*> waiting;
  for (auto& p : peers_) {
    while (RemoteOp* op = p->unqueue_any()) waiting.push_back(op);
  }
  for (RemoteOp* op : waiting) {
    if (wire::Op{op->net.desc.op} <= wire::Op::Lookup) {
      route(op);
    } else {
      place(op, op->peer, false);
    }
  }
}

}  // namespace kvfs
