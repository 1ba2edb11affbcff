// net_session.h owns what a network server knows of a client: its session, the session's connections, each operation on
// its way, and which changes were made already. All of it belongs to the target's reactor thread.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "../transport/channel.h"
#include "../wire/capability.h"
#include "net_buffers.h"

namespace kvfs {

class NetServer;
struct NetSession;
struct NetConn;

// One operation from when its payload begins to come, or it is taken, until its answer has left.
struct NetTask {
  enum class State : uint8_t {
    Receiving,  // has a buffer, its payload is on its way
    Queued,     // waits for its session's turn
    Attached,   // came a second time while the first is under way: answered with it
    Running,    // in the store, or a job
    Replied,    // the channel has it
  };
  Request req;
  NetServer* server = nullptr;
  NetSession* session = nullptr;
  NetConn* conn = nullptr;
  ServerOp* op = nullptr;
  NetTask* next = nullptr;  // of the queue or list that it is in
  NetBuffers::Buffer buf;
  Lent lent;  // in place of an outgoing buffer
  uint32_t lent_bytes = 0;
  NetBuffers::Side side = NetBuffers::In;
  State state = State::Receiving;
  bool remembered = false;  // its session's memory has it as under way
  // Jobs, which take many steps: scans and purges.
  uint64_t cursor = 0, pos = 0, end = 0;
  uint32_t pending = 0, packed = 0;
  bool walk = false, generated = false;
  int64_t err = 0;
};

struct TaskList {  // FIFO
  NetTask* head = nullptr;
  NetTask* tail = nullptr;
  bool empty() const { return head == nullptr; }
  void push(NetTask* t) {
    t->next = nullptr;
    (head == nullptr ? head : tail->next) = t;
    tail = t;
  }
  NetTask* pop() {
    NetTask* t = head;
    head = t->next;
    t->next = nullptr;
    return t;
  }
};

// Results of the changes that a session asked for, by their numbers: what comes again is answered and not done again.
// Keeps the last `slots` numbers. A client keeps all that it has unanswered within that many numbers.
class AnswerMemory {
 public:
  explicit AnswerMemory(uint32_t slots) : slots_(slots) {}
  enum class Found {
    New,
    UnderWay,   // attach() it
    Answered,   // *result
    Forgotten,  // older than the memory
    Busy,  // the place is taken by one under way that is older than the memory: its client asks for too much at once
    Different,  // the number was another operation's
  };
  Found find(uint64_t seq, uint64_t what, int64_t* result) const;
  void begin(NetTask* t, uint64_t what);  // New: t is the one that is executed
  void attach(NetTask* t);
  // It has been executed. What is answered with it.
  NetTask* end(NetTask* t, int64_t result);
  // It will not be executed: the first of those attached becomes the one (returned), or the number is forgotten (null).
  NetTask* give_up(NetTask* t);
  static uint64_t what(const wire::Desc& d);  // tells two operations apart

 private:
  struct Slot {
    uint64_t seq = 0;
    uint64_t what = 0;
    int64_t result = 0;
    bool undone = false;  // given up: the number is free, those before it are not
    NetTask* running = nullptr;
    NetTask* attached = nullptr;
  };
  Slot& slot(uint64_t seq) { return mem_[size_t(seq % slots_)]; }
  uint32_t slots_;
  std::vector<Slot> mem_;  // made with the first change
};

struct NetConn {
  std::unique_ptr<ServerChannel> channel;  // null: admitted, not yet connected
  NetSession* session = nullptr;
  uint64_t features = 0;
  uint32_t held = 0;         // tasks that exist
  uint32_t unanswered = 0;   // operations that the client waits for
  uint64_t in_bytes = 0;     // payload of these that came from it
  uint32_t receiving = 0;    // of these in State::Receiving
  uint32_t replied = 0;      // of these in State::Replied
  uint64_t progress_ns = 0;  // when something last moved
  bool dirty = false;        // has answers for flush()
  bool waiting = false;      // for a buffer, in its session's list
  bool closing = false;      // close() was called
  bool ended = false;
  int doom = 0;                   // to be closed for this
  std::vector<uint64_t> cancels;  // batches, until the next pump()
};

struct NetSession {
  std::array<uint8_t, 16> id{};
  std::array<uint8_t, 16> client{};
  wire::Capability capability;
  uint64_t features = 0;  // agreed on with its Hello; a connection has these or fewer
  std::vector<NetConn*> conns;
  uint64_t idle_since_ns = 0;  // when its last connection ended
  uint32_t held = 0;           // tasks that exist
  uint32_t unanswered = 0;     // operations that the client waits for
  uint64_t in_bytes = 0;       // payload of these that came from it
  uint64_t out_bytes = 0;      // of buffers towards it
  TaskList queue;
  uint64_t deficit = 0;  // bytes that it may still move in this round
  bool in_ring = false;
  bool over = false;             // its client has a newer one: nothing of it begins any more
  TaskList jobs;                 // wait for a place
  bool jobs_listed = false;      // the server knows
  uint32_t jobs_running = 0;     // have one
  std::deque<NetConn*> in_wait;  // connections that wait for a buffer
  bool in_listed = false;        // for its turn; else it has all that it may have
  AnswerMemory memory;
  explicit NetSession(uint32_t slots) : memory(slots) {}
};

}  // namespace kvfs
