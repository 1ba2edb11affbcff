// op.h owns one operation of the remote store from its arrival to its end, and the lists it stands in meanwhile.
#pragma once

#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "../store/check.h"
#include "../transport/channel.h"

namespace kvfs {

class Peer;
struct Connection;
struct RemoteOp;

struct OpLink {
  RemoteOp *prev = nullptr, *next = nullptr;
};

// One request that goes to several targets.
struct FanOut {
  Request* req = nullptr;
  uint32_t left = 0;   // parts without an answer
  int64_t result = 0;  // the first error
};

struct RemoteOp {
  enum class State : uint8_t {
    Turn,    // waits for an earlier change of its chunk
    Queued,  // at its peer
    Sent,    // the channel's
    Parked,  // waits for a newer map
  };
  NetOp net;
  Request* req = nullptr;  // null: a part of `all`, or a question of our own
  FanOut* all = nullptr;
  Peer* peer = nullptr;
  Connection* conn = nullptr;
  State state = State::Turn;
  bool in_turn = false;    // stands in the list of changes of chunks
  bool sent = false;       // once or more: a server may have executed it
  bool unknown = false;    // came back unanswered once or more: nobody knows whether it was executed
  bool again = false;      // was sent, and then given another seq: nobody remembers the first answer
  bool expired = false;    // its deadline has passed while it was the channel's
  bool existence = false;  // Lookup in place of a Get of no bytes
  uint8_t damaged = 0;     // how often its payload was
  uint8_t stale = 0;       // how often a server had a newer map
  uint64_t session = 0;    // of the peer: of desc.seq
  uint64_t deadline = 0;
  uint32_t map_version = 0;  // by which its peer was chosen
  uint64_t mark = 0;         // Flush, Sync: LazyWrites::mark() when it set out
  uint32_t target = 0;       // Scan: index of the target that is being asked
  OpLink queue;              // of the peer, of those who wait for a map, or of the store's new ones
  OpLink timed;              // by deadline
  RemoteOp* turn = nullptr;  // next in the list of changes
};

// Intrusive: an operation stands in at most one list per link.
template <OpLink RemoteOp::*L>
class OpList {
 public:
  bool empty() const { return head_ == nullptr; }
  RemoteOp* front() const { return head_; }
  void push_back(RemoteOp* op) { put(op, tail_, nullptr); }
  void push_front(RemoteOp* op) { put(op, nullptr, head_); }
  void erase(RemoteOp* op) {
    OpLink& l = op->*L;
    (l.prev != nullptr ? (l.prev->*L).next : head_) = l.next;
    (l.next != nullptr ? (l.next->*L).prev : tail_) = l.prev;
    l = {};
  }
  RemoteOp* pop() {
    RemoteOp* op = head_;
    if (op != nullptr) erase(op);
    return op;
  }

 private:
  void put(RemoteOp* op, RemoteOp* prev, RemoteOp* next) {
    op->*L = {prev, next};
    (prev != nullptr ? (prev->*L).next : head_) = op;
    (next != nullptr ? (next->*L).prev : tail_) = op;
  }
  RemoteOp *head_ = nullptr, *tail_ = nullptr;
};
using OpQueue = OpList<&RemoteOp::queue>;
using OpTimes = OpList<&RemoteOp::timed>;

// As many as were ever needed at once: bounded by what the reactor has under way (times the targets of its few fan-outs).
class OpPool {
 public:
  RemoteOp* get() {
    if (free_.empty()) {
      constexpr size_t kSlab = 256;
      slabs_.push_back(std::make_unique<RemoteOp[]>(kSlab));
      for (size_t i = 0; i < kSlab; ++i) free_.push_back(&slabs_.back()[i]);
    }
    RemoteOp* op = free_.back();
    free_.pop_back();
    *op = RemoteOp{};
    ++live_;
    return op;
  }
  void put(RemoteOp* op) {
    free_.push_back(op);
    --live_;
  }
  size_t live() const { return live_; }

 private:
  std::vector<std::unique_ptr<RemoteOp[]>> slabs_;
  std::vector<RemoteOp*> free_;
  size_t live_ = 0;
};

// Bytes that all servers together may be sending to us: who reads from many servers at once would otherwise be sent more
// than its link takes. Who finds no room stands in line, so that nobody, and no large read, is overtaken for ever.
class Window {
 public:
  struct Place {
    bool in_line = false;
  };
  explicit Window(uint64_t limit) : limit_(limit) {}
  bool take(Place* who, uint64_t n) {
    if ((line_.empty() || line_.front() == who) && (used_ == 0 || used_ + n <= limit_)) {
      leave(who);
      used_ += n;
      return true;
    }
    if (!std::exchange(who->in_line, true)) line_.push_back(who);
    return false;
  }
  void leave(Place* who) {
    if (std::exchange(who->in_line, false)) std::erase(line_, who);
  }
  void give(uint64_t n) {
    KVFS_CHECK(n <= used_);
    used_ -= n;
  }
  uint64_t used() const { return used_; }

 private:
  uint64_t limit_, used_ = 0;
  std::deque<Place*> line_;
};

}  // namespace kvfs
