// channel_fixture.h owns both ends of a channel in one loop for tests: MapHandler, a server that keeps chunks in a map and can
// be told to dawdle, and Caller, a client that keeps what its operations own in exactly sized heap blocks (so that ASan sees a
// byte too many) and counts how often each comes back.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../store/check.h"
#include "../transport/channel.h"

namespace kvfs {

using Bytes = std::vector<uint8_t>;

// Two connected TCP sockets on the loopback; with a small receive buffer at `second` if asked for.
inline void tcp_pair(int out[2], int small_buffer = 0) {
  const int l = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t n = sizeof a;
  if (small_buffer > 0) setsockopt(l, SOL_SOCKET, SO_RCVBUF, &small_buffer, sizeof small_buffer);
  KVFS_CHECK(bind(l, reinterpret_cast<sockaddr*>(&a), n) == 0 && listen(l, 1) == 0);
  KVFS_CHECK(getsockname(l, reinterpret_cast<sockaddr*>(&a), &n) == 0);
  out[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (small_buffer > 0) setsockopt(out[0], SOL_SOCKET, SO_SNDBUF, &small_buffer, sizeof small_buffer);
  KVFS_CHECK(connect(out[0], reinterpret_cast<sockaddr*>(&a), n) == 0);
  out[1] = accept(l, nullptr, nullptr);
  KVFS_CHECK(out[1] >= 0);
  ::close(l);
}

inline std::string chunk_name(const wire::Desc& d) {
  return std::string(reinterpret_cast<const char*>(&d.kind), 2) + std::to_string(d.ns) + ":" +
         std::string(reinterpret_cast<const char*>(d.key), sizeof d.key);
}

class MapHandler : public ChannelHandler {
 public:
  std::map<std::string, Bytes> chunks;
  uint64_t features = wire::kFeatures;
  uint64_t room = UINT64_MAX;  // bytes of buffers for payload that may be out
  uint32_t answers = 256;      // replied to in one call of answer(); in random order if `shuffle`
  bool shuffle = false, hold = false;
  std::vector<ServerOp*> waiting;
  std::vector<uint64_t> cancelled;
  uint64_t taken = 0, released_ops = 0, refused = 0, out = 0;
  int ended_with = 1;
  uint32_t ended_times = 0;
  std::vector<int> errors;  // take()'s
  std::mt19937_64 rng{7};

  bool buffer(ServerOp* op) override {
    if (out + op->desc.len > room && out != 0) {
      ++refused;
      return false;
    }
    allot(op, op->desc.len);
    return true;
  }
  void take(ServerOp* op, int err) override {
    ++taken;
    if (err != 0) errors.push_back(err);
    op->result = err != 0 ? err : execute(op);
    waiting.push_back(op);
  }
  void cancel(ServerChannel*, uint64_t batch) override {
    cancelled.push_back(batch);
    for (ServerOp* op : waiting) {
      if (op->batch != batch) continue;
      op->result = -ECANCELED;
      op->out_len = 0;
    }
  }
  void released(ServerOp* op) override {
    ++released_ops;
    if (op->buf == nullptr) return;
    out -= op->buf_len;
    room_came_ = true;
    std::memset(op->buf, 0xdd, op->buf_len);
    delete[] op->buf;
  }
  void ended(ServerChannel*, int err) override {
    ended_with = err;
    ++ended_times;
  }
  void answer(ServerChannel* c) {
    if (hold) return;
    if (shuffle) std::shuffle(waiting.begin(), waiting.end(), rng);
    uint32_t n = answers;
    while (!waiting.empty() && n-- > 0) {
      ServerOp* op = waiting.back();
      waiting.pop_back();
      c->reply(op);
    }
    c->flush();
    if (room_came_) c->resume();
    room_came_ = false;
  }

 protected:
  void allot(ServerOp* op, uint32_t n) {
    op->buf = new uint8_t[n];
    op->buf_len = n;
    out += n;
  }
  void give(ServerOp* op, const uint8_t* p, size_t n) {
    allot(op, static_cast<uint32_t>(n));
    std::memcpy(op->buf, p, n);
    op->out_len = static_cast<uint32_t>(n);
    if ((features & wire::kDataSums) != 0) op->out_sum = wire::data_sum(p, n);
  }
  int64_t execute(ServerOp* op) {
    const wire::Desc& d = op->desc;
    const std::string name = chunk_name(d);
    const auto it = chunks.find(name);
    switch (wire::Op{d.op}) {
      case wire::Op::Get: {
        if (it == chunks.end()) return -ENOENT;
        const Bytes& b = it->second;
        if (d.off >= b.size()) return 0;
        const size_t n = std::min<size_t>(d.len, b.size() - d.off);
        give(op, b.data() + d.off, n);
        return static_cast<int64_t>(n);
      }
      case wire::Op::Put:
        if (it != chunks.end()) return it->second.size() == d.len ? 0 : -EEXIST;
        chunks[name].assign(op->buf, op->buf + d.len);
        return 1;
      case wire::Op::Write: {
        Bytes& b = chunks[name];
        if (b.size() < d.off + d.len) b.resize(d.off + d.len);
        std::memcpy(b.data() + d.off, op->buf, d.len);
        return d.len;
      }
      case wire::Op::Truncate:
        if (d.off == 0) chunks.erase(name);
        if (d.off != 0) chunks[name].resize(d.off);
        return 0;
      case wire::Op::Delete:
        return chunks.erase(name) != 0 ? 0 : -ENOENT;
      case wire::Op::Lookup:
        return it == chunks.end() ? -ENOENT : static_cast<int64_t>(it->second.size());
      case wire::Op::Scan: {
        const wire::ScanRecord rec{UINT64_MAX, chunks.size(), 1, 2, 0, {}, {}};
        if (chunks.empty()) return 0;
        give(op, reinterpret_cast<const uint8_t*>(&rec), sizeof rec);
        return sizeof rec;
      }
      case wire::Op::Stat: {
        const wire::TargetStat st{1000, 500, 400, chunks.size()};
        give(op, reinterpret_cast<const uint8_t*>(&st), sizeof st);
        return sizeof st;
      }
      case wire::Op::Flush:
      case wire::Op::Sync:
      case wire::Op::Purge:
        return 0;
    }
    return -EOPNOTSUPP;
  }

 private:
  bool room_came_ = false;  // since resume() was called
};

// An operation and its memory.
struct Call {
  NetOp op;
  std::unique_ptr<uint8_t[]> mem;
  Bytes expect;  // of a Get
  uint32_t back = 0;
  void (*then)(Call*) = nullptr;
  void* arg = nullptr;

  explicit Call(wire::Op code, uint64_t key = 0, uint32_t len = 0, uint32_t off = 0) {
    static uint64_t seq = 0;
    op.desc.op = uint8_t(code);
    op.desc.kind = uint8_t(Kind::Block);
    op.desc.len = len;
    op.desc.off = off;
    if (wire::mutates(code)) op.desc.seq = ++seq;
    const bool file = code == wire::Op::Write || code == wire::Op::Truncate || code == wire::Op::Flush;
    if (file) op.desc.kind = uint8_t(Kind::File);
    if (code != wire::Op::Sync && code != wire::Op::Scan && code != wire::Op::Stat && code != wire::Op::Purge) {
      op.desc.key_len = 16;
      std::memcpy(op.desc.key, &key, sizeof key);
    }
    if (code == wire::Op::Purge) op.desc.ns = 3;
    if (wire::has_in(code) || wire::has_out(code)) {
      mem.reset(new uint8_t[len]);
      std::memset(mem.get(), 0xa5, len);
      op.mem.ptr = mem.get();
    }
    op.owner = this;
    op.done = [](NetOp* o) {
      auto* c = static_cast<Call*>(o->owner);
      ++c->back;
      if (c->then != nullptr) c->then(c);
    };
  }
  bool ended() const { return back != 0; }
};
using Calls = std::vector<std::unique_ptr<Call>>;

inline Bytes pattern(uint64_t key, size_t n) {
  std::mt19937_64 r(key * 2654435761u + n);
  Bytes b(n);
  for (size_t i = 0; i < n; i += 8) {
    const uint64_t v = r();
    std::memcpy(b.data() + i, &v, std::min<size_t>(8, n - i));
  }
  return b;
}

}  // namespace kvfs
