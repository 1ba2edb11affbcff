// reactor.h owns the one thread that serves rings: it takes SQEs, checks them against the session's tables, drives the
// Store, and posts completions. Sessions, rings and iovs are made by the control thread and handed over with post();
// from then on only the reactor touches them, until it hands them back through the `done` of close_*().
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../ring/queue.h"
#include "../store/clock.h"
#include "../store/store.h"
#include "../store/uring_device.h"
#include "inode_table.h"
#include "namespaces.h"
#include "source.h"
#include "spin.h"
#include "write_back.h"

namespace kvfs {

constexpr unsigned kMaxRings = 256;            // per session, of kMaxRingBytes together
constexpr unsigned kMaxIovs = 256;             // per session
constexpr unsigned kMaxNs = 1024;              // namespace handles per session
constexpr unsigned kMaxFiles = 4096;           // file handles per session
constexpr unsigned kMaxOps = 1 << 16;          // store requests under way, all rings together
constexpr uint64_t kMaxRingBytes = 10u << 20;  // per session: 17 of the largest rings
constexpr uint64_t kFixedMax = 1u << 30;
constexpr uint64_t kDirtyBytes = 128u << 20;  // of files: acknowledged, not in the store

struct Iov {
  char* base = nullptr;
  uint64_t size = 0;
  std::vector<int> fixed;  // registered buffer of each GiB, -1 = none
  uint32_t refs = 0;       // operations under way
  bool closing = false;
  int guard = -1;  // slot in bus_guard.h: memory of the client's own
};

struct Session;
class FuseChannel;

struct Ring {
  DaemonRing q;
  void* mem = nullptr;
  uint64_t bytes = 0;
  int wake_fd = -1;               // the client writes it when sq_need_wake is set
  std::atomic<int> event_fd{-1};  // a socket to write to when the client waits on its other end (-1: it has none)
  int notify_fd = -1;             // in-process ring: eventfd written instead of a futex wake (-1: futex)
  Session* session = nullptr;     // null: in-process
  FuseChannel* fuse = nullptr;    // stands for the mount: completions go there, there are no queues
  int poll_handle = -1;           // of wake_fd in the Uring
  bool closing = false;
  uint32_t ready = 0;  // SQEs to take this turn
};

struct NsHandle {
  uint32_t ns_id = 0;
  bool used = false, evictable = false, rdonly = false;
};

struct FileHandle {
  InodeRef inode;
  bool can_read = false, can_write = false;
};

struct Session {
  std::array<Iov*, kMaxIovs> iovs{};
  std::array<Ring*, kMaxRings> rings{};
  std::vector<NsHandle> ns;
  std::vector<FileHandle> files;
};

struct ReactorStats {
  uint64_t sqes = 0, bad_sqes = 0, broken_rings = 0, sleeps = 0, turns = 0;
};

struct Job;

// One store request on behalf of a ring's SQE, or of one piece of a Job.
struct Op {
  Request req;
  class Reactor* reactor = nullptr;
  Ring* ring = nullptr;
  Iov* iov = nullptr;
  Job* job = nullptr;
  DirtyChunk* dirty = nullptr;  // pinned: its pages go over what was read
  uint64_t user_data = 0;
  bool only_existence = false;  // Lookup: whoever asked does not want the length
  Op* next = nullptr;
};

// An operation that needs many store requests or many steps: file ranges, deletes, scans. At most kJobWidth requests
// under way at once.
struct Job {
  enum class Type : uint8_t { Read, Write, Truncate, Punch, Delete, NsDelete, InodeDelete, Scan, Fsync, Land, Sync };
  Type type = Type::Read;
  uint8_t flags = 0;
  Kind kind = Kind::File;
  Ring* ring = nullptr;
  Iov* iov = nullptr;
  uint64_t user_data = 0;
  InodeRef inode;
  uint64_t ino = 0;
  uint64_t off = 0, pos = 0, end = 0;  // bytes of the file
  char* mem = nullptr;
  Lender* lender = nullptr;  // of `mem`
  uint64_t cursor = 0;
  uint32_t ns = 0;
  uint32_t pending = 0;
  bool generated = false;
  uint32_t flushes = 0;                   // of dirty pages, that it waits for
  bool drained = false;                   // has waited for them
  bool logging = false;                   // waits for the journal
  Request::Op last = Request::Op::Flush;  // Fsync, Sync: what follows the flushes
  // Writes and truncations, which take turns on the inode: see enter().
  bool is_write = false;  // whatever phase it is in
  bool alone = false;     // a truncation, a punch, or a write that clears: has the inode to itself
  bool punching = false;  // a punch, whatever phase it is in
  bool held = false;      // its turn has not come
  bool in_turn = false;
  bool begun = false;              // alone: the range is known
  bool clearing = false;           // a failed write, now removing what it left beyond the end of the file
  bool asked = false;              // waits for the answer to an upcall
  bool settled = false;            // the upcall is answered
  int64_t err = 0;                 // first error that counts
  int64_t result = 0;              // Write: what the client is told
  uint64_t fail_pos = UINT64_MAX;  // Write: lowest file offset that failed
  uint32_t packed = 0, room = 0;   // Scan: bytes
  bool no_holes = false;           // Read: holes are errors
};
constexpr uint32_t kJobWidth = 64;
constexpr uint32_t kScanBudget = 4096;  // index entries examined per job and turn

class Reactor {
 public:
  // Everything given must outlive the Reactor. dev may be null (stores without a device, in tests).
  Reactor(Uring* uring, Device* dev, Store* store, InodeTable* inodes, Upcalls* upcalls,
          uint64_t dirty_bytes = kDirtyBytes);
  ~Reactor();
  Status init();

  // The thread's body: returns after stop(), with nothing in flight.
  void run();
  void stop();

  // Runs fn in the reactor thread soon. Any thread.
  void post(std::function<void()> fn);

  // Below: reactor thread only (inside post).
  void add_ring(Ring* r);
  bool add_iov(Iov* v);  // registers its memory; false: not all of it could be
  // `done` runs in the reactor thread once nothing is in flight on it; the memory is the caller's again.
  void close_ring(Ring* r, std::function<void()> done);
  void close_iov(Iov* v, std::function<void()> done);
  void close_session(Session* s, std::function<void()> done);
  // Takes an operation of `r` that did not come through its queues; ends in FuseChannel::done. The memory of a write may
  // be kept on loan after that.
  void take(Ring* r, const kvfs_sqe& s, Lender* lender) {
    lender_ = lender;
    dispatch(r, s);
    lender_ = nullptr;
  }
  void set_fuse(FuseChannel* f);
  void close_fuse(std::function<void()> done);
  void close_file(InodeRef inode);  // one reference of the table, once writes under way have ended
  void answered(uint64_t upcall, int err);
  void end_upcalls();  // those under way count as answered, and no more are made
  void set_evictable(uint32_t ns_id, bool on);
  bool evictable(uint32_t ns_id) const { return ns_id < evictable_.size() && evictable_[ns_id]; }
  void add_source(Source* s) { sources_.push_back(s); }
  void remove_source(Source* s) { std::erase(sources_, s); }  // idle, and not from one of its calls
  // A descriptor of the inode was closed: what was written goes to the store soon. The first error of what could not go.
  int64_t closed(uint64_t ino) {
    write_back_.kick(ino);
    return write_back_.take_error(ino);
  }
  bool space_short() const { return space_short_.load(std::memory_order_relaxed); }  // any thread
  const ReactorStats& stats() const { return stats_; }
  const WriteBack& write_back() const { return write_back_; }
  Store* store() { return store_; }
  Uring* uring() { return uring_; }
  size_t ring_count() const { return rings_.size(); }

 private:
  void look(Ring* r);
  bool hint(Ring* r, const kvfs_sqe& s, ChunkKey* out);
  void drain(Ring* r);
  void dispatch(Ring* r, const kvfs_sqe& s);
  int start_block(Ring* r, const kvfs_sqe& s);
  void ask_length(Ring* r, const kvfs_sqe& s, const ChunkKey& key, bool only_existence);
  int start_file(Ring* r, const kvfs_sqe& s);
  int resolve_ns(Ring* r, const kvfs_sqe& s, NsHandle* out);
  int resolve_mem(Ring* r, const kvfs_sqe& s, uint64_t len, Iov** iov, MemRef* mem);
  void finish(Ring* r, uint64_t user_data, int64_t result);

  Op* new_op();
  void free_op(Op* op);
  Job* new_job(Ring* r, const kvfs_sqe& s, Job::Type t);
  bool step(Job* j);  // true: finished and answered
  void enter(Job* j);
  void leave(Job* j);
  void begin_alone(Job* j);
  bool end_write(Job* j);
  bool settle(Job* j);
  void note_landed(const InodeRef& inode);
  void advance_landed();
  void ask_drop(const InodeRef& inode);
  void step_range(Job* j);
  void step_punch(Job* j);
  bool zero_piece(Job* j, uint64_t at, uint32_t len);
  void step_chunks(Job* j);
  void step_scan_delete(Job* j);
  bool issue_purge(Job* j);
  void step_scan(Job* j);
  void step_settling(Job* j);
  bool issue(Job* j, Request::Op op, const ChunkKey& key, uint32_t off, uint32_t len, char* mem,
             DirtyChunk* dirty = nullptr);
  bool read_piece(Job* j, uint64_t index, uint32_t in, uint32_t len, char* mem, uint32_t* holes);
  bool write_piece(Job* j, uint64_t index, uint32_t in, uint32_t len, char* mem);
  bool drain_flights(Job* j);
  static void landed(void* self, Job* j, int64_t err);
  static void moved(void* self, uint64_t ino);
  static void op_done(Request* req);
  void piece_done(Op* op);
  bool step_jobs();

  void publish();
  void wake(Ring* r, uint32_t how);
  bool work_waiting();
  uint64_t deadline_ns() const;
  // Something other than the device ends in the io_uring's completions.
  bool networked() const { return !sources_.empty() || store_->remote(); }
  bool spin();
  template <typename Credit>
  bool watch(Credit& credit, uint64_t until);
  bool spin_for_mount();
  void sleep();
  void run_posted();
  void run_closing();
  void unregister(Iov* v);
  static void on_wake(void* owner, uint32_t revents);

  Uring* uring_;
  Device* dev_;
  Store* store_;
  InodeTable* inodes_;
  Upcalls* upcalls_;
  WriteBack write_back_;
  FuseChannel* fuse_ = nullptr;
  std::vector<Source*> sources_;
  Lender* lender_ = nullptr;  // of the operation that is being dispatched
  struct Asked {
    InodeRef inode;
    Job* job = nullptr;  // an fsync; null: the inode's drop
  };
  std::unordered_map<uint64_t, Asked> asked_;  // by upcall
  struct Landing {
    uint64_t seq, upto;  // when the journal is written up to seq, `landed` may be upto
    uint32_t cuts;       // unless the inode was truncated since
    InodeRef inode;
  };
  std::deque<Landing> landing_;
  bool upcalls_ended_ = false;
  int post_fd_ = -1;
  int poll_handle_ = -1;

  std::mutex post_mu_;
  std::vector<std::function<void()>> posted_;
  std::atomic<bool> has_posted_{false};
  std::atomic<bool> stop_{false};
  std::atomic<bool> space_short_{false};

  std::vector<Ring*> rings_;
  std::vector<std::function<bool()>> closing_;  // each tries to finish; true: done
  std::vector<Job*> jobs_;
  std::vector<std::unique_ptr<Op[]>> slabs_;
  Op* free_ops_ = nullptr;
  unsigned ops_made_ = 0, ops_live_ = 0;
  std::vector<bool> evictable_;  // by namespace id
  uint32_t drain_from_ = 0;
  bool job_ready_ = false;  // a job may go on without waiting for I/O
  bool came_ = false;       // an operation has ended since the last spin
  SpinCredit spin_credit_, answer_credit_, mount_credit_{0};
  FirstAnswer first_answer_;
  ReactorStats stats_;
};

}  // namespace kvfs
