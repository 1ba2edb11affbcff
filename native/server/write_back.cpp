// write_back.cpp owns the way of dirty pages: taken, laid over reads, gathered into one write per chunk, dropped.
#include "write_back.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "../store/check.h"
#include "reactor.h"

namespace kvfs {

namespace {
constexpr size_t kMaxErrors = 4096;  // inodes whose lost bytes are still to be reported

// Calls f(page number, first byte, end) for the pages of [off, off + len), bytes counted within the page.
template <typename F>
bool each_page(uint32_t off, uint32_t len, F f) {
  for (uint32_t at = off, end = off + len; at < end;) {
    const uint32_t k = at / kDirtyPage, a = at % kDirtyPage, b = std::min(kDirtyPage, end - k * kDirtyPage);
    if (!f(k, a, b)) return false;
    at = k * kDirtyPage + b;
  }
  return true;
}
}  // namespace

WriteBack::WriteBack(Store* store, uint64_t budget, const Listener& listener)
    : store_(store), listener_(listener), page_limit_(budget / kDirtyPage) {
  memory_bytes_ = page_limit_ * kDirtyPage + kFlushes * uint64_t{kFileChunk};
  void* m = mmap(nullptr, memory_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) {  // then every write goes to the store at once
    page_limit_ = memory_bytes_ = 0;
    return;
  }
  memory_ = static_cast<char*>(m);
  flushes_ = std::make_unique<Flush[]>(kFlushes);
  for (unsigned i = 0; i < kFlushes; ++i) {
    flushes_[i].owner = this;
    flushes_[i].buffer = memory_ + page_limit_ * kDirtyPage + i * uint64_t{kFileChunk};
    buffers_.push_back(&flushes_[i]);
    store_->memory(flushes_[i].buffer, kFileChunk, true);
  }
}

WriteBack::~WriteBack() {
  KVFS_CHECK(inodes_.empty());
  if (memory_ == nullptr) return;
  for (unsigned i = 0; i < kFlushes; ++i) store_->memory(flushes_[i].buffer, kFileChunk, false);
  munmap(memory_, memory_bytes_);
}

// Each chunk that waits may need a new slot while its old one is still kept for a crash.
bool WriteBack::safe() const {
  constexpr uint64_t kMargin = 16u << 20;
  return page_limit_ >= kChunkPages && store_->room() > kMargin + (chunks_ + 1) * 2 * (kFileChunk + kDirtyPage);
}

DirtyChunk* WriteBack::find(uint64_t ino, uint64_t index) const {
  if (inodes_.empty()) return nullptr;
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return nullptr;
  const auto c = i->second.find(index);
  return c == i->second.end() ? nullptr : c->second.get();
}

DirtyChunk* WriteBack::find_newer(uint64_t ino, uint64_t index) const {
  DirtyChunk* c = find(ino, index);
  return c != nullptr && c->only_kept() ? nullptr : c;
}

uint64_t WriteBack::first_held(uint64_t ino, uint64_t from) const {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return UINT64_MAX;
  for (auto c = i->second.lower_bound(from); c != i->second.end(); ++c) {
    if (!c->second->only_kept()) return c->first * kFileChunk;
  }
  return UINT64_MAX;
}

DirtyChunk* WriteBack::make(uint64_t ino, uint64_t index) {
  auto& slot = inodes_[ino][index];
  if (!slot) {
    slot = std::make_unique<DirtyChunk>();
    slot->ino = ino;
    slot->index = index;
    ++chunks_;
  }
  return slot.get();
}

WriteBack::Taken WriteBack::take(uint64_t ino, uint64_t index, uint32_t off, uint32_t len, const char* src,
                                 uint64_t now_ns) {
  KVFS_CHECK(len != 0 && off + len <= kFileChunk);
  DirtyChunk* c = find(ino, index);
  if (c != nullptr && (c->lender != nullptr || c->only_kept())) return Taken::Gap;
  uint64_t fresh = 0;
  const bool joins = each_page(off, len, [&](uint32_t k, uint32_t a, uint32_t b) {
    const DirtyPage* p = c != nullptr ? &c->pages[k] : nullptr;
    if (p == nullptr || p->mem == nullptr) return ++fresh, true;
    return a <= p->to && b >= p->from;
  });
  if (!joins) return Taken::Gap;
  if (pages_used_ + fresh > page_limit_) return Taken::NoRoom;
  c = make(ino, index);
  if (c->dirty == 0) c->since_ns = now_ns;
  each_page(off, len, [&](uint32_t k, uint32_t a, uint32_t b) {
    DirtyPage& p = c->pages[k];
    if (p.mem == nullptr) {
      if (free_pages_.empty()) free_pages_.push_back(memory_ + pages_made_++ * kDirtyPage);
      p.mem = free_pages_.back();
      free_pages_.pop_back();
      p.from = uint16_t(a);
      p.to = uint16_t(b);
      ++pages_used_;
      ++c->held;
    } else {
      p.from = std::min(p.from, uint16_t(a));
      p.to = std::max(p.to, uint16_t(b));
    }
    memcpy(p.mem + a, src + (k * kDirtyPage + a - off), b - a);
    if (!p.dirty) ++c->dirty;
    p.dirty = true;
    return true;
  });
  if (c->flushing || c->queued) return Taken::Yes;
  const auto whole = [](const DirtyPage& p) { return p.dirty && p.from == 0 && p.to == kDirtyPage; };
  if (c->dirty == kChunkPages && std::all_of(std::begin(c->pages), std::end(c->pages), whole)) {
    queue(c);  // nothing is gained by waiting
  } else if (!linked(c)) {
    link(c);
  }
  return Taken::Yes;
}

void WriteBack::adopt(uint64_t ino, uint64_t index, char* mem, Lender* lender) {
  DirtyChunk* c = make(ino, index);
  KVFS_CHECK(c->held == 0 && !c->flushing && !c->queued);
  for (uint32_t k = 0; k < kChunkPages; ++k) c->pages[k] = {mem + k * kDirtyPage, 0, kDirtyPage, true};
  c->held = c->dirty = kChunkPages;
  pages_lent_ += kChunkPages;
  c->lender = lender;
  ++lender->loans;
  queue(c);
}

bool WriteBack::covers(const DirtyChunk& c, uint32_t off, uint32_t len) {
  return each_page(off, len, [&](uint32_t k, uint32_t a, uint32_t b) {
    const DirtyPage& p = c.pages[k];
    return p.mem != nullptr && p.from <= a && p.to >= b;
  });
}

uint32_t WriteBack::end_of(const DirtyChunk& c) {
  uint32_t end = 0;
  for (uint32_t k = 0; k < kChunkPages; ++k) {
    if (c.pages[k].mem != nullptr) end = k * kDirtyPage + c.pages[k].to;
  }
  return end;
}

void WriteBack::overlay(const DirtyChunk& c, uint32_t off, uint32_t len, char* dst) {
  each_page(off, len, [&](uint32_t k, uint32_t a, uint32_t b) {
    const DirtyPage& p = c.pages[k];
    a = std::max<uint32_t>(a, p.from);
    b = std::min<uint32_t>(b, p.to);
    if (p.mem != nullptr && a < b) memcpy(dst + (k * kDirtyPage + a - off), p.mem + a, b - a);
    return true;
  });
}

void WriteBack::unpin(DirtyChunk* c) {
  KVFS_CHECK(c->readers != 0);
  --c->readers;
  if (c->readers == 0 && !c->flushing) tell(&c->now, 0);  // who waits for the pages to go
  settle(c);
}

// ---- waiting

void WriteBack::await_chunk(DirtyChunk* c, Job* j) {
  if (c->dirty == 0 && !c->flushing && c->readers == 0) return;
  ++j->flushes;
  (c->dirty != 0 ? c->next : c->now).push_back(j);
  if (!c->flushing && c->dirty != 0) queue(c);
}

void WriteBack::await_inode(uint64_t ino, Job* j) {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return;
  for (auto& [index, c] : i->second) await_chunk(c.get(), j);
}

void WriteBack::await_all(Job* j) {
  for (auto& [ino, chunks] : inodes_) {
    for (auto& [index, c] : chunks) await_chunk(c.get(), j);
  }
}

void WriteBack::await_flights(uint64_t ino, uint64_t first, Job* j) {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return;
  for (auto c = i->second.lower_bound(first); c != i->second.end(); ++c) {
    if (!c->second->flushing) continue;
    ++j->flushes;
    c->second->now.push_back(j);
  }
}

void WriteBack::await_room(Job* j) {
  ++j->flushes;
  room_.push_back(j);
}

void WriteBack::tell(std::vector<Job*>* waiting, int64_t err) {
  for (Job* j : std::exchange(*waiting, {})) listener_.landed(listener_.owner, j, err);
}

void WriteBack::kick(uint64_t ino) {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return;
  for (auto& [index, c] : i->second) {
    if (c->dirty != 0 && !c->flushing) queue(c.get());
  }
}

void WriteBack::kick_all() {
  while (oldest_ != nullptr) queue(oldest_);
}

// ---- going to the store

void WriteBack::link(DirtyChunk* c) {
  c->older = youngest_;
  (youngest_ != nullptr ? youngest_->younger : oldest_) = c;
  youngest_ = c;
}

void WriteBack::unlink(DirtyChunk* c) {
  if (!linked(c)) return;
  (c->older != nullptr ? c->older->younger : oldest_) = c->younger;
  (c->younger != nullptr ? c->younger->older : youngest_) = c->older;
  c->older = c->younger = nullptr;
}

void WriteBack::queue(DirtyChunk* c) {
  KVFS_CHECK(!c->flushing);
  unlink(c);
  if (c->queued) return;
  c->queued = true;
  queue_.push_back(c);
}

void WriteBack::tick(uint64_t now_ns) {
  if (oldest_ != nullptr && !safe()) kick_all();
  while (oldest_ != nullptr && now_ns >= oldest_->since_ns + kMaxAgeNs) queue(oldest_);
  while (oldest_ != nullptr && pages_used_ > page_limit_ / 2 && queue_.size() < buffers_.size()) queue(oldest_);
  while (!queue_.empty() && !buffers_.empty()) {
    DirtyChunk* c = queue_.front();
    queue_.pop_front();
    c->queued = false;
    if (c->dirty != 0) {
      start(c);
    } else {
      settle(c);
    }
  }
}

uint64_t WriteBack::deadline_ns() const { return oldest_ == nullptr ? UINT64_MAX : oldest_->since_ns + kMaxAgeNs; }

void WriteBack::start(DirtyChunk* c) {
  Flush* f = buffers_.back();
  buffers_.pop_back();
  f->chunk = c;
  c->flushing = true;
  // One range without a hole goes as it is; the store puts it over what it has.
  uint32_t first = kChunkPages, last = 0;
  for (uint32_t k = 0; k < kChunkPages; ++k) {
    if (!c->pages[k].dirty) continue;
    first = std::min(first, k);
    last = k;
  }
  bool one = true;
  for (uint32_t k = first; k <= last && one; ++k) {
    const DirtyPage& p = c->pages[k];
    one = p.mem != nullptr && (k == first || p.from == 0) && (k == last || p.to == kDirtyPage);
  }
  if (one) {
    const uint32_t off = first * kDirtyPage + c->pages[first].from, end = last * kDirtyPage + c->pages[last].to;
    if (c->lender != nullptr) {
      set_out(c);
      return send(f, off, end, c->pages[first].mem + c->pages[first].from);
    }
    gather(c, f->buffer, off, end);
    return send(f, off, end, f->buffer);
  }
  // Nothing may change the chunk in the store between our read and our write: this waits its turn behind what is under
  // way there (a truncation to more than it has changes nothing), and no other write sets out while we are on our way.
  submit(f, Request::Op::Truncate, kFileChunk, 0, nullptr, on_turn);
}

void WriteBack::submit(Flush* f, Request::Op op, uint32_t off, uint32_t len, char* mem, RequestDone done) {
  Request& q = f->req;
  q = Request{};
  q.op = op;
  // A stream: it would only push others out of memory.
  if (op == Request::Op::Write && len == kFileChunk) q.flags = Request::kNoTouch;
  q.key = file_key(f->chunk->ino, f->chunk->index);
  q.off = off;
  q.len = len;
  q.mem.ptr = mem;
  q.done = done;
  q.owner = f;
  store_->submit(&q);
}

void WriteBack::on_turn(Request* r) {
  auto* f = static_cast<Flush*>(r->owner);
  if (r->result < 0) return on_base(r);
  memset(f->buffer, 0, kFileChunk);
  f->owner->submit(f, Request::Op::Get, 0, kFileChunk, f->buffer, on_base);
}

// What the store has is here: the new bytes go over it.
void WriteBack::on_base(Request* r) {
  auto* f = static_cast<Flush*>(r->owner);
  DirtyChunk* c = f->chunk;
  uint32_t end = r->result > 0 ? uint32_t(r->result) : 0;
  for (uint32_t k = 0; k < kChunkPages; ++k) {
    if (c->pages[k].mem != nullptr) end = std::max(end, k * kDirtyPage + c->pages[k].to);
  }
  f->owner->gather(c, f->buffer, 0, end);
  if (r->result < 0 && r->result != -ENOENT) return f->owner->over(f, r->result);
  f->owner->send(f, 0, end, f->buffer);
}

void WriteBack::gather(DirtyChunk* c, char* buffer, uint32_t off, uint32_t end) {
  overlay(*c, off, end - off, buffer);
  set_out(c);
}

// What is dirty is on its way from here on.
void WriteBack::set_out(DirtyChunk* c) {
  for (DirtyPage& p : c->pages) p.dirty = false;
  c->dirty = 0;
  c->now.insert(c->now.end(), c->next.begin(), c->next.end());
  c->next.clear();
}

void WriteBack::send(Flush* f, uint32_t off, uint32_t end, char* src) {
  submit(f, Request::Op::Write, off, end - off, src, on_written);
}

void WriteBack::on_written(Request* r) {
  auto* f = static_cast<Flush*>(r->owner);
  f->owner->over(f, r->result);
}

void WriteBack::over(Flush* f, int64_t result) {
  DirtyChunk* c = f->chunk;
  f->chunk = nullptr;
  buffers_.push_back(f);
  c->flushing = false;
  listener_.moved(listener_.owner, c->ino);
  if (result < 0) {
    ++lost_;
    bool reported = false;
    for (const Job* j : c->now) reported = reported || j->type == Job::Type::Fsync || j->type == Job::Type::Sync;
    if (!reported && errors_.size() < kMaxErrors) errors_.try_emplace(c->ino, result);
  }
  tell(&c->now, result < 0 ? result : 0);
  if (c->dirty != 0) {
    if (c->next.empty()) {
      link(c);
    } else {
      queue(c);
    }
  }
  settle(c);
}

int64_t WriteBack::take_error(uint64_t ino) {
  const auto e = errors_.find(ino);
  if (e == errors_.end()) return 0;
  const int64_t error = e->second;
  errors_.erase(e);
  return error;
}

// ---- going away

void WriteBack::cut(uint64_t ino, uint64_t size) {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return;
  std::vector<DirtyChunk*> touched;
  for (auto c = i->second.lower_bound(size / kFileChunk); c != i->second.end(); ++c) touched.push_back(c->second.get());
  for (DirtyChunk* c : touched) {
    KVFS_CHECK(!c->flushing);
    for (uint32_t k = 0; k < kChunkPages; ++k) {
      DirtyPage& p = c->pages[k];
      const uint64_t base = c->index * kFileChunk + k * kDirtyPage;
      if (p.mem == nullptr || base + p.to <= size) continue;
      if (base + p.from >= size) {
        drop_page(c, k);
      } else {
        p.to = uint16_t(size - base);
      }
    }
    dropped(c);
  }
  listener_.moved(listener_.owner, ino);
}

void WriteBack::drop(uint64_t ino, uint64_t first, uint64_t end) {
  const auto i = inodes_.find(ino);
  if (i == inodes_.end()) return;
  std::vector<DirtyChunk*> touched;
  for (auto c = i->second.lower_bound(first); c != i->second.end() && c->first < end; ++c)
    touched.push_back(c->second.get());
  for (DirtyChunk* c : touched) {
    KVFS_CHECK(!c->flushing);
    for (DirtyPage& p : c->pages) {
      if (!p.dirty) continue;
      if (c->readers != 0) memset(p.mem + p.from, 0, size_t(p.to - p.from));  // or older bytes would come to light
      p.dirty = false;
      --c->dirty;
    }
    dropped(c);
  }
  listener_.moved(listener_.owner, ino);
}

// Some of its pages may have been.
void WriteBack::dropped(DirtyChunk* c) {
  if (c->dirty == 0) {
    unlink(c);
    tell(&c->next, 0);
  }
  settle(c);
}

void WriteBack::drop_page(DirtyChunk* c, uint32_t k) {
  DirtyPage& p = c->pages[k];
  if (p.dirty) --c->dirty;
  if (c->lender == nullptr) {
    free_pages_.push_back(p.mem);
    --pages_used_;
  } else {
    --pages_lent_;
  }
  p = DirtyPage{};
  --c->held;
}

// Drops what nobody needs any more: pages that the store has, then the chunk.
void WriteBack::settle(DirtyChunk* c) {
  if (c->flushing || c->readers != 0) return;
  for (uint32_t k = 0; k < kChunkPages; ++k) {
    if (c->pages[k].mem != nullptr && !c->pages[k].dirty) drop_page(c, k);
  }
  if (pages_used_ < page_limit_) tell(&room_, 0);
  if (c->held != 0) return;
  if (Lender* l = std::exchange(c->lender, nullptr); l != nullptr && --l->loans == 0) l->returned(l);
  if (c->queued) return;
  KVFS_CHECK(c->next.empty() && c->now.empty());
  unlink(c);
  --chunks_;
  const auto i = inodes_.find(c->ino);
  i->second.erase(c->index);
  if (i->second.empty()) inodes_.erase(i);
}

}  // namespace kvfs
