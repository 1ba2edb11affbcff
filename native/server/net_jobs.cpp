// net_jobs.cpp owns scans and purges for the network: operations of many steps, of which only kJobBudget index entries a
// turn are taken, so that others wait for none of them.
#include <algorithm>
#include <cerrno>
#include <cstddef>

#include "../store/check.h"
#include "net_server.h"

namespace kvfs {

namespace {
uint64_t u64_at(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
}  // namespace

// Sessions take turns for the places.
void NetServer::start_jobs() {
  for (size_t n = job_wait_.size(); n != 0 && jobs_.size() < kMaxJobs; --n) {
    NetSession* s = job_wait_.front();
    job_wait_.pop_front();
    if (s->jobs_running < kMaxSessionJobs && !s->jobs.empty()) {
      NetTask* t = s->jobs.pop();
      ++s->jobs_running;
      t->state = NetTask::State::Running;
      const wire::Desc& d = t->op->desc;
      t->cursor = d.cursor;
      if (wire::Op{d.op} == wire::Op::Purge && Kind{d.kind} == Kind::File) {
        t->pos = u64_at(d.key + 8);
        t->end = std::max(u64_at(d.key + 16), t->pos);
        // Name by name where that is less than walking the whole index.
        t->walk = t->end - t->pos > std::max<uint64_t>(store_->stats().chunks, kJobBudget);
      } else {
        t->walk = true;
      }
      jobs_.push_back(t);
    }
    s->jobs_listed = !s->jobs.empty();
    if (s->jobs_listed) job_wait_.push_back(s);
  }
}

void NetServer::step_jobs() {
  jobs_ready_ = false;
  if (jobs_.empty()) return;
  const auto budget = uint32_t(kJobBudget / jobs_.size());
  std::vector<NetTask*> ended;
  for (NetTask* t : jobs_) {
    const bool scan = wire::Op{t->op->desc.op} == wire::Op::Scan;
    if (!t->generated) scan ? step_scan(t, budget) : step_purge(t, budget);
    if (t->generated && t->pending == 0) {
      ended.push_back(t);
    } else if (!t->generated && t->pending < kPurgeWidth) {
      jobs_ready_ = true;
    }
  }
  for (NetTask* t : ended) {
    std::erase(jobs_, t);
    --t->session->jobs_running;
    finish(t, t->err != 0 ? t->err : int64_t{t->packed});
    jobs_ready_ = true;  // others may have its place
  }
}

void NetServer::step_scan(NetTask* t, uint32_t budget) {
  const wire::Desc& d = t->op->desc;
  const auto room = uint32_t(d.len / sizeof(wire::ScanRecord) * sizeof(wire::ScanRecord));
  const uint64_t start = t->cursor;
  bool full = false;
  const bool more = store_->scan(&t->cursor, budget, Kind{d.kind}, d.ns, [&](const ChunkInfo& c) {
    if (t->packed == room) {
      full = true;
      return false;
    }
    wire::ScanRecord r{};
    r.cursor = start;  // going on from here repeats records, but never misses one
    r.length = c.length;
    r.mtime = c.mtime;
    r.version = c.version;
    r.key_len = c.key.key_len;
    std::memcpy(r.key, c.key.id, sizeof r.key);
    std::memcpy(t->buf.ptr + t->packed, &r, sizeof r);
    t->packed += uint32_t(sizeof r);
    return true;
  });
  if (!more) t->cursor = UINT64_MAX;
  if (more && !full && t->packed != room) return;
  t->generated = true;
  if (t->packed == 0) return;
  uint8_t* last = t->buf.ptr + t->packed - sizeof(wire::ScanRecord);
  std::memcpy(last + offsetof(wire::ScanRecord, cursor), &t->cursor, sizeof t->cursor);
}

void NetServer::step_purge(NetTask* t, uint32_t budget) {
  const wire::Desc& d = t->op->desc;
  const bool file = Kind{d.kind} == Kind::File;
  const uint64_t ino = u64_at(d.key);
  uint32_t room = kPurgeWidth - t->pending;
  if (!t->walk) {
    ChunkKey key = file_key(ino, 0);
    key.ns = d.ns;
    ChunkInfo info;
    for (; t->pos < t->end && room != 0 && budget != 0; ++t->pos, --budget) {
      std::memcpy(key.id + 8, &t->pos, sizeof t->pos);
      if (store_->lookup(key, &info) < 0) continue;
      delete_chunk(t, key);
      --room;
    }
    t->generated = t->pos == t->end;
    return;
  }
  // Collected first: the index must not change under the walk.
  ChunkKey keys[kPurgeWidth];
  uint32_t n = 0;
  if (room == 0) return;
  const bool more = store_->scan(&t->cursor, budget, Kind{d.kind}, d.ns, [&](const ChunkInfo& c) {
    if (n == room) return false;
    const uint64_t index = u64_at(c.key.id + 8);
    if (file && (u64_at(c.key.id) != ino || index < t->pos || index >= t->end)) return true;
    keys[n++] = c.key;
    return true;
  });
  for (uint32_t i = 0; i < n; ++i) delete_chunk(t, keys[i]);
  t->generated = !more;
}

void NetServer::delete_chunk(NetTask* t, const ChunkKey& key) {
  Child* c = free_children_;
  KVFS_CHECK(c != nullptr);  // kMaxJobs times kPurgeWidth
  free_children_ = c->next;
  c->purge = t;
  c->req = Request{};
  c->req.op = Request::Op::Delete;
  c->req.flags = t->op->desc.flags;
  if (key.kind == Kind::File) c->req.flags |= Request::kLogged;
  c->req.key = key;
  c->req.done = child_done;
  c->req.owner = c;
  ++t->pending;
  store_->submit(&c->req);
}

// It does no more than what is under way.
void NetServer::give_up_job(NetTask* t) {
  t->generated = true;
  if (t->err == 0) t->err = -ECANCELED;
  jobs_ready_ = true;
}

void NetServer::child_done(Request* r) {
  auto* c = static_cast<Child*>(r->owner);
  NetTask* t = c->purge;
  NetServer* self = t->server;
  if (r->result < 0 && r->result != -ENOENT && t->err == 0) t->err = r->result;
  --t->pending;
  self->jobs_ready_ = true;
  c->next = self->free_children_;
  self->free_children_ = c;
}

}  // namespace kvfs
