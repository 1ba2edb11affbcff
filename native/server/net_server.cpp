// net_server.cpp owns sessions, connections and buffers of a target's network side; see net_server.h.
#include "net_server.h"

#include <sys/random.h>
#include <time.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "../store/check.h"
#include "reactor.h"

namespace kvfs {

namespace {
constexpr uint64_t kClockNs = 100000000;  // how often clocks of connections and sessions are looked at
constexpr uint64_t kAskNs = 100000000;    // a connection that was told of a buffer asks for it within this
constexpr uint64_t kMostIn = 64u << 20;   // payload that one session may have unanswered

void add(ChannelCounters* to, const ChannelCounters& c) {
  to->frames_out += c.frames_out;
  to->frames_in += c.frames_in;
  to->bytes_out += c.bytes_out;
  to->bytes_in += c.bytes_in;
  to->calls += c.calls;
  to->rdma += c.rdma;
  to->copied += c.copied;
}
}  // namespace

NetServer::NetServer(Uring* uring, Store* store, const NetServerOptions& opt)
    : uring_(uring), store_(store), opt_(opt) {}

NetServer::~NetServer() { KVFS_CHECK(sessions_.empty() && conns_.empty() && store_ops_ == 0 && jobs_.empty()); }

Status NetServer::init() {
  const Status s = buffers_.init(uring_, opt_.buffer_bytes);
  if (s.err != 0) return s;
  max_in_ = std::min<uint64_t>(kMostIn, std::max<uint64_t>(buffers_.side_bytes() / 2, NetBuffers::kBlock));
  out_share_ = std::max<uint64_t>(buffers_.side_bytes() / 4, NetBuffers::kBlock);
  constexpr uint32_t n = kMaxJobs * kPurgeWidth;
  children_ = std::make_unique<Child[]>(n);
  for (uint32_t i = 0; i < n; ++i) {
    children_[i].next = free_children_;
    free_children_ = &children_[i];
  }
  return {};
}

// ---- sessions and connections

NetSession* NetServer::open_session(const wire::Hello& hello, const wire::Capability& capability, int* err) {
  if (sessions_.size() >= opt_.max_sessions) {
    // One that nobody is connected to makes room, the one that was left first.
    NetSession* oldest = nullptr;
    for (const auto& [id, s] : sessions_)
      if (s->conns.empty() && s->held == 0 && (oldest == nullptr || s->idle_since_ns < oldest->idle_since_ns))
        oldest = s.get();
    if (oldest == nullptr) return *err = -EBUSY, nullptr;
    end_session(oldest);
  }
  supersede(hello, capability);
  auto s = std::make_unique<NetSession>(2 * opt_.max_ops);
  if (getrandom(s->id.data(), s->id.size(), 0) != ssize_t(s->id.size())) return *err = -EBUSY, nullptr;
  std::copy_n(hello.client, s->client.size(), s->client.begin());
  s->capability = capability;
  s->features = hello.features & opt_.features;
  s->idle_since_ns = now_ns_;
  stats_.sessions_opened++;
  NetSession* p = s.get();
  sessions_[p->id] = std::move(s);
  return p;
}

// A client that begins anew at this target has given up what it asked for before: what of it has not begun, and what may
// still come over its old connections, must not be made after what it asks for now.
void NetServer::supersede(const wire::Hello& hello, const wire::Capability& capability) {
  constexpr std::array<uint8_t, 16> kNobody{};
  for (const auto& [id, s] : sessions_) {
    if (s->over || s->client == kNobody || !std::equal(s->client.begin(), s->client.end(), hello.client) ||
        std::memcmp(s->capability.tenant, capability.tenant, sizeof capability.tenant) != 0)
      continue;
    s->over = true;
    stats_.sessions_superseded++;
    for (NetTask* t : jobs_) {
      if (t->session == s.get()) give_up_job(t);
    }
    // Those first: one that came a second time is queued when its first is refused.
    for (TaskList* list : {&s->jobs, &s->queue}) {
      while (!list->empty()) refuse(list->pop(), -ECANCELED);
    }
    for (NetConn* c : s->conns) doom(c, -ESTALE);
  }
}

void NetServer::end_session(NetSession* s) {
  KVFS_CHECK(s->conns.empty() && s->held == 0 && s->in_wait.empty());
  if (s->in_ring) std::erase(ring_, s);  // for operations that were refused before its turn came
  if (s->jobs_listed) std::erase(job_wait_, s);
  const auto id = s->id;
  sessions_.erase(id);
}

NetConn* NetServer::admit(const wire::Hello& hello, const wire::Capability* capability, wire::HelloReply* reply) {
  *reply = {};
  now_ns_ = monotonic_ns();
  wall_s_ = uint64_t(time(nullptr));
  reply->version = wire::kVersion;
  reply->map_version = map_version_;
  std::copy(opt_.boot.begin(), opt_.boot.end(), reply->boot);
  reply->max_ops = opt_.max_ops;
  reply->max_batch = opt_.max_batch;
  reply->max_in = max_in_;
  reply->keep_ms = opt_.keep_ms;
  NetSession* s = nullptr;
  int err = 0;
  if (stop_at_ns_ != 0) {
    err = -EBUSY;
  } else if (conns_.size() >= kMaxTargetConnections) {
    err = -EMFILE;
  } else if (wire::Purpose{hello.purpose} == wire::Purpose::Session) {
    s = open_session(hello, *capability, &err);
  } else {
    std::array<uint8_t, 16> id;
    std::copy_n(hello.session, id.size(), id.begin());
    const auto it = sessions_.find(id);
    if (it == sessions_.end() || it->second->over)
      err = -ESTALE;
    else if (it->second->conns.size() >= wire::kMaxConnections)
      err = -EMFILE;
    else if (!it->second->capability.valid_at(wall_s_))
      err = -EACCES;
    else
      s = it->second.get();
  }
  if (s == nullptr) {
    stats_.refused++;
    reply->err = err;
    return nullptr;
  }
  std::copy(s->id.begin(), s->id.end(), reply->session);
  reply->features = hello.features & s->features;
  auto c = std::make_unique<NetConn>();
  c->session = s;
  c->features = reply->features;
  c->progress_ns = now_ns_;
  s->conns.push_back(c.get());
  conns_.push_back(std::move(c));
  return conns_.back().get();
}

void NetServer::connect(NetConn* c, std::unique_ptr<ServerChannel> channel) {
  KVFS_CHECK(c->channel == nullptr && channel != nullptr);
  c->channel = std::move(channel);
  c->channel->owner = c;
  stats_.connections_opened++;
  if (stop_at_ns_ != 0) doom(c, -ESHUTDOWN);
  if (c->doom != 0) doomed_ = true;  // maybe before there was a channel to close
  c->channel->start();
}

void NetServer::abandon(NetConn* c) {
  KVFS_CHECK(c->channel == nullptr);
  c->ended = true;
  sweep_ = true;
}

void NetServer::doom(NetConn* c, int err) {
  if (c->doom != 0 || c->ended) return;
  c->doom = err;
  if (err == -EPROTO) stats_.protocol_errors++;
  doomed_ = true;
}

void NetServer::close_doomed() {
  if (!doomed_) return;
  doomed_ = false;
  for (size_t i = 0; i < conns_.size(); ++i) {
    NetConn* c = conns_[i].get();
    if (c->doom == 0 || c->closing || c->ended || c->channel == nullptr) continue;
    c->closing = true;
    c->channel->close(c->doom == -ESHUTDOWN ? 0 : c->doom);
  }
}

void NetServer::ended(ServerChannel* channel, int err) {
  auto* c = static_cast<NetConn*>(channel->owner);
  if (c->ended) return;
  c->ended = true;
  if (err == -EPROTO && c->doom == 0) stats_.protocol_errors++;
  end_waiting(c);
  // What has not begun does not begin: a client that wants it comes again.
  if (std::find(cancelling_.begin(), cancelling_.end(), c) == cancelling_.end()) cancelling_.push_back(c);
  sweep_ = true;
}

// Frees connections that nothing refers to any more, and sessions that are over.
void NetServer::sweep() {
  if (!sweep_) return;
  sweep_ = false;
  std::erase_if(conns_, [&](const std::unique_ptr<NetConn>& p) {
    NetConn* c = p.get();
    if (!c->ended) return false;
    const bool gone = c->held == 0 && !c->dirty && (c->channel == nullptr || c->channel->closed());
    if (!gone) return sweep_ = true, false;
    if (c->channel != nullptr) add(&past_, c->channel->counters());
    std::erase(cancelling_, c);
    std::erase(c->session->conns, c);
    if (c->session->conns.empty()) c->session->idle_since_ns = now_ns_;
    next_clock_ns_ = 0;
    return true;
  });
}

void NetServer::look_at_clocks() {
  const uint64_t now = now_ns_;
  if (now < next_clock_ns_) return;
  next_clock_ns_ = now + kClockNs;
  wall_s_ = uint64_t(time(nullptr));
  const bool over = stop_at_ns_ != 0 && now >= stop_at_ns_;
  const uint64_t stall = uint64_t{opt_.stall_ms} * 1000000u;
  for (const auto& c : conns_) {
    if (c->ended || c->channel == nullptr) continue;
    if ((c->receiving != 0 || c->replied != 0) && now - c->progress_ns > stall) doom(c.get(), -ETIMEDOUT);
    if (stop_at_ns_ != 0 && (over || c->session->held == 0)) doom(c.get(), -ESHUTDOWN);
  }
  // Who is told of a buffer and does not ask for it loses its turn: it is still receiving something else.
  if (asked_ns_ != 0 && now - asked_ns_ > kAskNs && !in_wait_.empty()) end_waiting(in_wait_.front()->in_wait.front());
  if (over) {
    for (NetTask* t : jobs_) give_up_job(t);
  }
  for (auto it = sessions_.begin(); it != sessions_.end();) {
    NetSession* s = (it++)->second.get();
    if (!s->conns.empty() || s->held != 0) continue;
    if (s->over || stop_at_ns_ != 0 || now - s->idle_since_ns >= uint64_t{opt_.keep_ms} * 1000000u) end_session(s);
  }
  if (stop_at_ns_ != 0 && sessions_.empty() && stopped_ != nullptr) {
    const auto done = std::move(stopped_);
    stopped_ = nullptr;
    done();
  }
}

void NetServer::set_map(uint32_t version, std::vector<uint32_t> cache) {
  map_version_ = version;
  cache_ = std::move(cache);
}

void NetServer::stop(std::function<void()> done) {
  stop_at_ns_ = monotonic_ns() + kStopNs;
  stopped_ = std::move(done);
  next_clock_ns_ = 0;
}

// ---- buffers and tasks

NetTask* NetServer::new_task(ServerOp* op, NetConn* c) {
  if (free_tasks_ == nullptr) {
    constexpr unsigned kSlab = 256;
    slabs_.push_back(std::make_unique<NetTask[]>(kSlab));
    for (unsigned i = 0; i < kSlab; ++i) {
      slabs_.back()[i].next = free_tasks_;
      free_tasks_ = &slabs_.back()[i];
    }
  }
  NetTask* t = free_tasks_;
  free_tasks_ = t->next;
  Lent lent = std::move(t->lent);  // empty, but has memory
  *t = NetTask{};
  t->lent = std::move(lent);
  t->server = this;
  t->session = c->session;
  t->conn = c;
  t->op = op;
  op->owner = t;
  ++c->held;
  ++c->unanswered;
  ++c->session->held;
  ++c->session->unanswered;
  return t;
}

void NetServer::out_freed(NetSession* s) {
  if (!s->queue.empty() && !s->in_ring) {  // it had all that it may have
    s->in_ring = true;
    ring_.push_back(s);
  }
  more_ = more_ || !ring_.empty();
}

void NetServer::free_task(NetTask* t) {
  NetSession* s = t->session;
  if (t->buf.ptr != nullptr) {
    buffers_.put(t->buf);
    if (t->side == NetBuffers::In) {
      in_freed_ = true;
    } else {
      s->out_bytes -= t->buf.len;
      out_freed(s);
    }
  }
  if (t->lent_bytes != 0) {
    store_->give_back(&t->lent);
    s->out_bytes -= t->lent_bytes;
    out_freed(s);
  }
  --t->conn->held;
  --s->held;
  if (s->held == 0 && (s->conns.empty() || stop_at_ns_ != 0)) next_clock_ns_ = 0;
  t->next = free_tasks_;
  free_tasks_ = t;
}

// The client has its answer, or will not get one.
void NetServer::uncount(NetTask* t) {
  NetSession* s = t->session;
  --t->conn->unanswered;
  --s->unanswered;
  if (t->buf.ptr == nullptr || t->side != NetBuffers::In) return;
  t->conn->in_bytes -= t->op->desc.len;
  s->in_bytes -= t->op->desc.len;
  in_freed_ = true;
  if (s->in_wait.empty() || s->in_listed) return;
  s->in_listed = true;
  in_wait_.push_back(s);
}

bool NetServer::buffer(ServerOp* op) {
  auto* c = static_cast<NetConn*>(op->channel->owner);
  NetSession* s = c->session;
  if (c->doom != 0) return false;
  const uint32_t len = op->desc.len;
  if (c->unanswered >= opt_.max_ops || c->in_bytes + len > max_in_ || s->held >= kHeldFactor * opt_.max_ops)
    return doom(c, -EPROTO), false;
  // Over all its connections: what is more waits until the session has less, and others go on.
  const bool too_much = s->in_bytes != 0 && s->in_bytes + len > max_in_;
  const bool first = in_wait_.empty() || (in_wait_.front() == s && s->in_wait.front() == c);
  NetBuffers::Buffer b;
  if (too_much || !first || !buffers_.get(NetBuffers::In, len, &b)) {
    if (!c->waiting) s->in_wait.push_back(c);
    c->waiting = true;
    if (too_much) {
      unlist(s);
    } else if (!s->in_listed) {
      s->in_listed = true;
      in_wait_.push_back(s);
    }
    if (first) asked_ns_ = 0;
    return false;
  }
  if (c->waiting) {  // the next one's turn
    end_waiting(c);
    if (s->in_listed) {
      std::erase(in_wait_, s);
      in_wait_.push_back(s);
    }
  }
  NetTask* t = new_task(op, c);
  t->buf = b;
  t->side = NetBuffers::In;
  op->buf = b.ptr;
  op->buf_len = b.len;
  op->fixed = b.fixed;
  c->in_bytes += len;
  s->in_bytes += len;
  if (++c->receiving == 1 && c->replied == 0) c->progress_ns = now_ns_;
  return true;
}

void NetServer::unlist(NetSession* s) {
  if (!s->in_listed) return;
  s->in_listed = false;
  std::erase(in_wait_, s);
  asked_ns_ = 0;
  in_freed_ = true;  // the next may find what it wants
}

void NetServer::end_waiting(NetConn* c) {
  if (!c->waiting) return;
  c->waiting = false;
  std::erase(c->session->in_wait, c);
  if (c->session->in_wait.empty()) unlist(c->session);
  asked_ns_ = 0;
  in_freed_ = true;
}

// Sessions take turns for buffers, and of each session its connections; nobody is passed by one who wants less. The first
// is told, and asks again (buffer()) when it can.
void NetServer::give_waiting_buffers() {
  if (!in_freed_) return;
  in_freed_ = false;
  if (in_wait_.empty()) return;
  if (asked_ns_ == 0) asked_ns_ = now_ns_;
  in_wait_.front()->in_wait.front()->channel->resume();
}

void NetServer::released(ServerOp* op) {
  auto* t = static_cast<NetTask*>(op->owner);
  NetConn* c = t->conn;
  c->progress_ns = now_ns_;
  if (t->state == NetTask::State::Receiving) {  // never became complete
    --c->receiving;
    uncount(t);
  } else {
    KVFS_CHECK(t->state == NetTask::State::Replied);
    --c->replied;
  }
  op->owner = nullptr;
  free_task(t);
}

// ---- the reactor's turns

void NetServer::pump() {
  now_ns_ = monotonic_ns();
  look_at_clocks();
  close_doomed();
  run_cancels();
  give_waiting_buffers();
  schedule();
  start_jobs();
  step_jobs();
  sweep();
}

void NetServer::publish() {
  // flush() may call back and make connections dirty again: they are of the next turn.
  std::vector<NetConn*> now;
  now.swap(dirty_);
  for (NetConn* c : now) {
    c->dirty = false;
    c->channel->flush();
  }
}

bool NetServer::ready() const {
  return more_ || jobs_ready_ || in_freed_ || doomed_ || !cancelling_.empty() || !dirty_.empty() ||
         (next_clock_ns_ == 0 && (stop_at_ns_ != 0 || !sessions_.empty()));
}

uint64_t NetServer::deadline_ns() const {
  if (sessions_.empty() && stop_at_ns_ == 0) return UINT64_MAX;
  return next_clock_ns_;
}

void NetServer::add_stats(kvfs_net_stats* out) const {
  ChannelCounters c = past_;
  for (const auto& n : conns_)
    if (n->channel != nullptr) add(&c, n->channel->counters());
  const kvfs_net_stats& s = stats_;
  out->sessions += sessions_.size();
  out->connections += conns_.size();
  out->sessions_opened += s.sessions_opened;
  out->sessions_superseded += s.sessions_superseded;
  out->connections_opened += s.connections_opened;
  out->refused += s.refused;
  out->protocol_errors += s.protocol_errors;
  out->denied += s.denied;
  out->ops += s.ops;
  out->gets += s.gets;
  out->puts += s.puts;
  out->writes += s.writes;
  out->stale_maps += s.stale_maps;
  out->replayed += s.replayed;
  out->cancelled += s.cancelled;
  out->bytes_in += c.bytes_in;
  out->bytes_out += c.bytes_out;
  out->frames_in += c.frames_in;
  out->frames_out += c.frames_out;
  out->buffers_used += buffers_.used();
  out->buffers_total += buffers_.bytes();
  out->calls += c.calls;
  out->rdma += c.rdma;
  out->copied += c.copied;
}

}  // namespace kvfs
