// net_exec.cpp owns what becomes of an operation: whether it may be, its session's turn, the store, the answer.
//
// Sessions with operations that wait are in ring_, and each has its turn of kQuantum bytes. Who finds no outgoing buffer
// keeps its place at the front, and until it has one nobody else gets any, so that large reads are not starved by small
// ones. A session that has its share of the buffers is out of the ring until one comes back.
#include <algorithm>
#include <cerrno>

#include "../store/check.h"
#include "net_server.h"

namespace kvfs {

using wire::Op;

int NetServer::permit(const NetTask* t) const {
  const wire::Capability& c = t->session->capability;
  if (!c.valid_at(wall_s_)) return -EACCES;
  return wire::check_rights(c, t->op->desc);
}

void NetServer::take(ServerOp* op, int err) {
  auto* c = static_cast<NetConn*>(op->channel->owner);
  auto* t = static_cast<NetTask*>(op->owner);
  if (t != nullptr) {  // its payload is there
    --c->receiving;
    c->progress_ns = now_ns_;
  } else {
    t = new_task(op, c);
  }
  t->state = NetTask::State::Queued;
  const wire::Desc& d = op->desc;
  const Op what{d.op};
  stats_.ops++;
  if (c->unanswered > opt_.max_ops || c->session->held > kHeldFactor * opt_.max_ops) {
    doom(c, -EPROTO);
    return refuse(t, -EPROTO);
  }
  if (err != 0) return refuse(t, err);
  if (t->session->over) return refuse(t, -ECANCELED);
  stats_.gets += what == Op::Get;
  stats_.puts += what == Op::Put;
  stats_.writes += what == Op::Write;
  if (const int no = permit(t); no != 0) {
    stats_.denied += no == -EACCES;
    return refuse(t, no);
  }
  AnswerMemory& memory = c->session->memory;
  const uint64_t sum = wire::mutates(what) ? AnswerMemory::what(d) : 0;
  if (wire::mutates(what)) {
    int64_t result = 0;
    switch (memory.find(d.seq, sum, &result)) {
      case AnswerMemory::Found::New:
        break;
      case AnswerMemory::Found::UnderWay:
        stats_.replayed++;
        t->state = NetTask::State::Attached;
        return memory.attach(t);
      case AnswerMemory::Found::Answered:
        stats_.replayed++;
        return answer(t, result);
      case AnswerMemory::Found::Forgotten:
        return refuse(t, -EALREADY);
      case AnswerMemory::Found::Busy:
        return refuse(t, -EBUSY);
      case AnswerMemory::Found::Different:
        return refuse(t, -EINVAL);
    }
  }
  if (op->map_version < map_version_) {
    stats_.stale_maps++;
    return refuse(t, -ESTALE);
  }
  if (wire::mutates(what)) memory.begin(t, sum);
  enqueue(t);
}

void NetServer::enqueue(NetTask* t) {
  NetSession* s = t->session;
  t->state = NetTask::State::Queued;
  t->req.key = wire::key_of(t->op->desc);
  s->queue.push(t);
  if (!s->in_ring) {
    s->in_ring = true;
    ring_.push_back(s);
  }
  more_ = true;
}

// One turn of each session in the ring.
void NetServer::schedule() {
  more_ = false;
  if (ring_.empty()) return;
  std::vector<NetSession*> pass, served;
  pass.swap(ring_);
  std::vector<NetSession*> kept;
  uint32_t budget = kTurnOps;
  bool no_buffer = false, no_slot = false;
  for (NetSession* s : pass) {
    if (budget == 0 || no_slot) {
      kept.push_back(s);
      more_ = more_ || !no_slot;
      continue;
    }
    switch (serve(s, pass.size() == 1, no_buffer, &budget)) {
      case Serve::Done:
      case Serve::Parked:
        s->in_ring = false;
        s->deficit = 0;
        break;
      case Serve::More:
        served.push_back(s);
        more_ = true;
        break;
      case Serve::NoSlot:
        no_slot = true;
        kept.push_back(s);
        break;
      case Serve::NoBuffer:
        no_buffer = true;
        kept.push_back(s);
        break;
    }
  }
  kept.insert(kept.end(), ring_.begin(), ring_.end());
  kept.insert(kept.end(), served.begin(), served.end());
  ring_ = std::move(kept);
}

NetServer::Serve NetServer::serve(NetSession* s, bool alone, bool no_buffer, uint32_t* budget) {
  constexpr uint64_t kMost = uint64_t{kMaxChunk} + kOpCost + kQuantum;
  s->deficit = std::min(s->deficit + kQuantum, kMost);
  while (!s->queue.empty()) {
    ChunkKey keys[Store::kPrefetch];
    uint32_t group = 0;
    for (const NetTask* t = s->queue.head; t != nullptr && group < Store::kPrefetch; t = t->next)
      keys[group++] = t->req.key;
    if (group > 1) store_->prefetch(keys, group);
    for (; group != 0 && !s->queue.empty(); --group) {
      NetTask* t = s->queue.head;
      const uint64_t cost = uint64_t{kOpCost} + t->op->desc.len;
      if (*budget == 0 || (cost > s->deficit && !alone)) return Serve::More;
      const uint32_t before = store_ops_;
      if (const Serve r = start(t, no_buffer); r != Serve::Done) return r;
      s->deficit -= std::min(cost, s->deficit);
      *budget -= std::min(*budget, store_ops_ == before ? 1 : kTurnOps / kTurnStoreOps);
    }
  }
  return Serve::Done;
}

// Takes the head of its session's queue off and begins it; anything but Done: it stays there.
NetServer::Serve NetServer::start(NetTask* t, bool no_buffer) {
  NetSession* s = t->session;
  const wire::Desc& d = t->op->desc;
  const auto run = [&](Request::Op op, uint32_t off, uint32_t len) {
    if (store_ops_ >= kMaxStoreOps) return Serve::NoSlot;
    s->queue.pop();
    submit(t, op, off, len);
    return Serve::Done;
  };
  const auto done = [&](int64_t result) {
    s->queue.pop();
    finish(t, result);
    return Serve::Done;
  };
  ChunkInfo info;
  switch (Op{d.op}) {
    case Op::Get: {
      if (store_ops_ >= kMaxStoreOps) return Serve::NoSlot;
      const bool lends = t->conn->channel->lends(), at_once = lends && has_share(*s, d.len);
      int64_t n = at_once ? lend(t) : -EAGAIN;
      if (n != -EAGAIN) return done(n);
      // Not in memory, or no room for as much as was asked for. What is not there needs no buffer, and a short chunk only a
      // small one.
      n = at_once ? int64_t{t->lent.length} : store_->lookup(t->req.key, &info);
      if (n < 0 || uint64_t(n) <= d.off) return done(n < 0 ? n : 0);
      const auto len = uint32_t(std::min<uint64_t>(d.len, uint64_t(n) - d.off));
      if (!has_share(*s, len)) return Serve::Parked;
      if (lends && !at_once && (n = lend(t)) != -EAGAIN) return done(n);
      if (const Serve r = out_buffer(t, len, no_buffer); r != Serve::Done) return r;
      return run(Request::Op::Get, d.off, len);
    }
    case Op::Lookup:
      return done(store_->lookup(t->req.key, &info));
    case Op::Put:
      return run(Request::Op::Put, 0, d.len);
    case Op::Write:
      return run(Request::Op::Write, d.off, d.len);
    case Op::Truncate:
      return run(Request::Op::Truncate, d.off, 0);
    case Op::Delete:
      return run(Request::Op::Delete, 0, 0);
    case Op::Flush:
      return run(Request::Op::Flush, 0, 0);
    case Op::Sync:
      return run(Request::Op::Sync, 0, 0);
    case Op::Scan:
      if (d.cursor == UINT64_MAX) return done(0);
      if (d.cursor >= 1ull << 48) return done(-EINVAL);
      if (const Serve r = out_buffer(t, d.len, no_buffer); r != Serve::Done) return r;
      [[fallthrough]];
    case Op::Purge:
      s->queue.pop();
      s->jobs.push(t);
      if (!s->jobs_listed) {
        s->jobs_listed = true;
        job_wait_.push_back(s);
      }
      return Serve::Done;
    case Op::Stat: {
      if (const Serve r = out_buffer(t, sizeof(wire::TargetStat), no_buffer); r != Serve::Done) return r;
      const StoreStats st = store_->stats();
      const wire::TargetStat out{st.capacity_bytes, st.free_bytes, store_->room(), st.chunks};
      std::memcpy(t->buf.ptr, &out, sizeof out);
      return done(sizeof out);
    }
  }
  return done(-EOPNOTSUPP);
}

// What is in memory is sent from where it is. Store::lend's result.
int64_t NetServer::lend(NetTask* t) {
  const wire::Desc& d = t->op->desc;
  const bool sum = (t->conn->features & wire::kDataSums) != 0;
  const int64_t n = store_->lend(t->req.key, d.off, d.len, (d.flags & wire::kNoTouch) == 0, sum, &t->lent);
  if (n <= 0) return n;
  t->lent_bytes = uint32_t(n);
  t->session->out_bytes += t->lent_bytes;
  t->op->lent = &t->lent;
  return n;
}

NetServer::Serve NetServer::out_buffer(NetTask* t, uint32_t len, bool no_buffer) {
  NetSession* s = t->session;
  if (!has_share(*s, len)) return Serve::Parked;
  if (no_buffer || !buffers_.get(NetBuffers::Out, len, &t->buf)) return Serve::NoBuffer;
  t->side = NetBuffers::Out;
  s->out_bytes += t->buf.len;
  t->op->buf = t->buf.ptr;
  t->op->buf_len = t->buf.len;
  t->op->fixed = t->buf.fixed;
  return Serve::Done;
}

void NetServer::submit(NetTask* t, Request::Op op, uint32_t off, uint32_t len) {
  const wire::Desc& d = t->op->desc;
  t->state = NetTask::State::Running;
  Request& r = t->req;
  r.op = op;
  r.flags = d.flags;
  static_assert(wire::kDurable == Request::kDurable && wire::kNoTouch == Request::kNoTouch);
  if (op == Request::Op::Put &&
      (t->session->capability.cache(Kind{d.kind}, d.ns) || std::binary_search(cache_.begin(), cache_.end(), d.ns)))
    r.flags |= Request::kEvictable;
  // Changes of files outlive this process once they are answered: whoever made them may have nothing left to make them again.
  if (Kind{d.kind} == Kind::File && wire::mutates(Op{d.op})) r.flags |= Request::kLogged;
  r.off = off;
  r.len = len;
  r.mem = {t->buf.ptr, t->buf.fixed};
  r.done = store_done;
  r.owner = t;
  ++store_ops_;
  store_->submit(&r);
}

void NetServer::store_done(Request* r) {
  auto* t = static_cast<NetTask*>(r->owner);
  NetServer* self = t->server;
  if (self->store_ops_-- == kMaxStoreOps) self->more_ = self->more_ || !self->ring_.empty();
  self->finish(t, r->result);
}

// It has been executed.
void NetServer::finish(NetTask* t, int64_t result) {
  if (t->remembered) {
    for (NetTask* a = t->session->memory.end(t, result); a != nullptr;) {
      NetTask* next = a->next;
      answer(a, result);
      a = next;
    }
  }
  answer(t, result);
}

void NetServer::refuse(NetTask* t, int err) {
  if (t->remembered) {
    if (NetTask* heir = t->session->memory.give_up(t)) enqueue(heir);
  }
  answer(t, err);
}

void NetServer::answer(NetTask* t, int64_t result) {
  ServerOp* op = t->op;
  NetConn* c = t->conn;
  op->result = result;
  if (wire::has_out(Op{op->desc.op}) && result > 0) {
    KVFS_CHECK(result <= (op->lent != nullptr ? int64_t{t->lent_bytes} : int64_t{t->buf.len}));
    KVFS_CHECK(op->lent != nullptr || t->side == NetBuffers::Out);
    op->out_len = uint32_t(result);
    if ((c->features & wire::kDataSums) != 0)
      op->out_sum = op->lent != nullptr ? t->lent.sum
                    : t->req.summed     ? t->req.sum
                                        : wire::data_sum(op->buf, op->out_len);
  }
  uncount(t);
  t->state = NetTask::State::Replied;
  if (++c->replied == 1 && c->receiving == 0) c->progress_ns = now_ns_;
  c->channel->reply(op);
  if (c->dirty) return;
  c->dirty = true;
  dirty_.push_back(c);
}

void NetServer::cancel(ServerChannel* channel, uint64_t batch) {
  auto* c = static_cast<NetConn*>(channel->owner);
  if (c->cancels.size() >= opt_.max_ops) return doom(c, -EPROTO);
  c->cancels.push_back(batch);
  if (c->cancels.size() == 1 && !c->ended) cancelling_.push_back(c);
}

// Once a turn, and all of a connection at once: a flood of cancels costs no more than their frames.
void NetServer::run_cancels() {
  std::vector<NetConn*> list;
  list.swap(cancelling_);
  for (NetConn* c : list) {
    std::sort(c->cancels.begin(), c->cancels.end());
    drop(c, &c->session->queue);
    drop(c, &c->session->jobs);
    c->cancels.clear();
  }
}

void NetServer::drop(NetConn* c, TaskList* from) {
  TaskList stay, go;
  while (!from->empty()) {
    NetTask* t = from->pop();
    const bool gone =
        t->conn == c && (c->ended || std::binary_search(c->cancels.begin(), c->cancels.end(), t->op->batch));
    (gone ? go : stay).push(t);
  }
  *from = stay;
  while (!go.empty()) {
    stats_.cancelled++;
    refuse(go.pop(), -ECANCELED);
  }
}

}  // namespace kvfs
