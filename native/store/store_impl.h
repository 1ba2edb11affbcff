// store_impl.h owns the state of one open store; its functions live in store.cpp (open, close, dispatch), ops.cpp (chunk
// operations), commit.cpp (journal, barriers, checkpoint) and recovery.cpp. Nobody outside native/store includes it.
#pragma once

#include <stdlib.h>

#include <deque>
#include <memory>
#include <unordered_map>

#include "allocator.h"
#include "check.h"
#include "evict.h"
#include "index.h"
#include "layout.h"
#include "memory_tier.h"
#include "store.h"

namespace kvfs {

struct KeyHash {
  size_t operator()(const ChunkKey& k) const { return xxh3(&k, sizeof k); }
};

// Memory for direct I/O, as long as the object.
struct AlignedBuf {
  explicit AlignedBuf(size_t n) { KVFS_CHECK(posix_memalign(&p, kBlock, n) == 0); }
  ~AlignedBuf() { free(p); }
  AlignedBuf(const AlignedBuf&) = delete;
  AlignedBuf& operator=(const AlignedBuf&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(p);
  }
  void* p = nullptr;
};

// Whether a record read from the device is a possible one.
bool sane(const Record& r, const Geometry& geo);

inline ChunkKey piece_key(ChunkKey key, uint32_t piece) {
  key.rsv[0] = static_cast<uint8_t>(piece);
  return key;
}
inline uint32_t pieces_of(uint32_t len) { return (len + kPieceMax - 1) / kPieceMax; }

// Aligned scratch memory, recycled by size. Bounded by the operations in flight.
class BufferPool {
 public:
  ~BufferPool();
  void* get(uint32_t bytes);
  void put(void* p, uint32_t bytes);

 private:
  static constexpr uint32_t kKeep = 64;  // buffers kept per size
  static uint32_t bin(uint32_t bytes);
  std::vector<void*> bins_[16];  // 512 B << i
};

// Sub-block checksums of recently written or read slots, so that a small read needs no second I/O: sets of kWays, in which
// whichever comes round next makes room. Memory is touched as it fills.
class SumsCache {
 public:
  struct Line {
    uint32_t count;
    uint64_t sum[kTrailerSums];
  };
  explicit SumsCache(uint32_t lines)
      : tags_(lines), lines_(static_cast<Line*>(calloc(lines, sizeof(Line)))), mask_(lines / kWays - 1) {
    KVFS_CHECK(lines_ != nullptr);
  }
  const Line* find(uint64_t off) const {
    const uint32_t at = set(off);
    for (uint32_t i = at; i < at + kWays; i++) {
      if (tags_[i] == off) return &lines_.get()[i];
    }
    return nullptr;
  }
  void fill(uint64_t off, const Trailer& t) {
    const uint32_t at = set(off);
    uint32_t place = at + next_++ % kWays;
    for (uint32_t i = at; i < at + kWays; i++) {
      if (tags_[i] == 0) place = i;
    }
    for (uint32_t i = at; i < at + kWays; i++) {
      if (tags_[i] == off) place = i;
    }
    tags_[place] = off;
    lines_.get()[place].count = t.sums;
    std::memcpy(lines_.get()[place].sum, t.sum, sizeof(uint64_t) * t.sums);
  }
  void drop(uint64_t off) {
    const uint32_t at = set(off);
    for (uint32_t i = at; i < at + kWays; i++) {
      if (tags_[i] == off) tags_[i] = 0;
    }
  }

 private:
  static constexpr uint32_t kWays = 4;
  struct Free {
    void operator()(Line* l) const { free(l); }
  };
  uint32_t set(uint64_t off) const {
    return (static_cast<uint32_t>((off / 512 * 0x9e3779b97f4a7c15ULL) >> 40) & mask_) * kWays;
  }
  std::vector<uint64_t> tags_;  // device offset of the slot, 0 = empty
  std::unique_ptr<Line, Free> lines_;
  uint32_t mask_, next_ = 0;
};

class StoreImpl final : public Store {
 public:
  StoreImpl(Device& dev, const StoreOptions& opt);
  ~StoreImpl() override;

  Status recover();
  Status close() override;
  void submit(Request* r) override;
  void tick(uint64_t now_ns) override;
  uint64_t deadline_ns() const override;
  bool busy() const override;
  int64_t lookup(const ChunkKey& key, ChunkInfo* info) override;
  void prefetch(const ChunkKey* keys, uint32_t n) override;
  int64_t lend(const ChunkKey& key, uint32_t off, uint32_t len, bool touch, bool sum, Lent* out) override;
  void give_back(Lent* lent) override;
  std::span<const uint8_t> lendable() const override {
    return {tier_.memory(), uint64_t{tier_.frames()} * MemoryTier::kFrame};
  }
  bool scan(uint64_t* cursor, uint32_t budget, Kind kind, uint32_t ns,
            const std::function<bool(const ChunkInfo&)>& fn) override;
  StoreStats stats() const override;
  uint64_t room() const override;
  uint64_t logged() const override { return last_seq(); }
  uint64_t written() const override { return failed_ != 0 ? UINT64_MAX : written_seq_; }

 private:
  friend struct ReadOp;
  friend struct WriteOp;
  friend class Checker;  // check_store.cpp

  // store.cpp
  void complete(Request* r, int64_t result);
  void start(Request* r);
  void run_completed();
  int sync_io(Io::Op op, void* buf, uint32_t len, uint64_t off);

  // ops.cpp
 public:
  struct Piece {  // of a read or a write
    Io data, trailer;
    struct ReadOp* read = nullptr;
    struct WriteOp* write = nullptr;
    uint64_t off = 0;  // device offset of the slot
    uint32_t id = 0;   // read: the piece's entry
    uint32_t len = 0;  // bytes of the piece
    uint64_t csum = 0;
    uint32_t region = 0;  // read: first byte read; region_len bytes follow
    uint32_t region_len = 0;
    uint32_t from = 0, to = 0;  // read: bytes of the piece wanted
    uint8_t* user = nullptr;
    void* bounce = nullptr;
    uint32_t bounce_len = 0;
    Trailer* tr = nullptr;  // a buffer of trailer_io_ bytes
    bool sums_cached = false;
  };

 private:
  Piece* piece_get();
  void piece_put(Piece* p);
  struct ReadOp* read_get();
  void read_put(struct ReadOp* op);
  struct WriteOp* write_get(Request* r);
  void start_get(Request* r);
  void read_chunk(struct ReadOp* op, uint32_t id, uint32_t off, uint32_t n, uint8_t* dst, int fixed);
  static void on_read_io(Io* io);
  void finish_piece_read(Piece* p);
  void start_put(Request* r);
  void start_write(Request* r);
  void start_truncate(Request* r);
  void start_delete(Request* r);
  void write_merged(struct WriteOp* op);
  void launch_write(struct WriteOp* op);
  void write_piece(Piece* p, const ChunkKey& key, const uint8_t* src);
  static void on_write_io(Io* io);
  void commit_write(struct WriteOp* op);
  void fail_write(struct WriteOp* op, int err);
  void retire(struct WriteOp* op);
  bool lock(Request* r);           // false: queued behind another mutation of the same key
  void lock(const ChunkKey& key);  // of a chunk that is not locked
  void unlock(const ChunkKey& key);
  uint32_t drop_chunk(uint32_t id, uint64_t seq_hint);  // removes index entries + slots, journals; pieces dropped
  bool needs_stall() const;

  // memory.cpp: the DRAM tier
  bool read_cached(uint32_t id, uint32_t off, uint32_t n, uint8_t* dst, bool touch);
  bool wants_copy(const Piece* p);
  bool verify_and_keep(const Piece* p, const uint64_t* sums, bool keep);
  uint64_t keep_pages(uint32_t id, uint32_t len, uint32_t from, const uint8_t* data, uint32_t n, bool sum = false);
  void keep_written(const struct WriteOp* op, const Piece* p, uint32_t id);
  void drop_pages(uint32_t id);
  bool sum_lent(uint32_t id, uint32_t off, uint32_t n, Lent* out);

  // space.cpp: eviction and waiting for space
  uint64_t taken_bytes() const;
  uint64_t high_mark() const;
  bool can_evict() const;
  void keep_room();
  void evict_step(uint32_t budget);
  uint64_t checkpoint_need(uint32_t more) const;
  uint32_t reserve_segments(uint32_t more) const;
  void wait_for_space(Request* r);
  void retry_space_waiters();
  bool space_may_come() const;
  bool can_defragment() const { return !defrag_barren_ || drain_ != Allocator::kNone; }

  // move.cpp
  void defragment_step();
  void end_drain();
  bool move_piece(uint32_t id);
  void commit_move(struct WriteOp* op);

  // commit.cpp
  uint64_t log(const Record* recs, uint32_t n);  // sequence number that makes them durable once flushed
  void wait_durable(Request* r, uint64_t seq);
  void conclude(Request* r, uint64_t seq, int64_t result);
  uint64_t hold_until() const;
  void write_group();
  static void on_group(Io* io);
  void start_flush();
  static void on_flush(Io* io);
  void quarantine(uint64_t off, uint64_t seq);
  void free_quarantined();
  void fail(int err);
  void checkpoint_start();
  void checkpoint_step();
  void checkpoint_no_room();
  static void on_checkpoint_page(Io* io);
  static void on_checkpoint_io(Io* io);
  void checkpoint_next();
  Record record_of(uint32_t id) const;
  uint64_t last_seq() const { return open_.empty() ? next_seq_ - 1 : next_seq_ + open_.size() - 1; }
  uint64_t journal_used() const { return head_v_ - tail_v_; }

  // recovery.cpp
  Status load_super();
  Status load_checkpoint();
  Status replay();
  bool data_matches(const Record& rec);
  static bool content_matches(const Record& rec, const uint8_t* data, const Trailer* tr);
  uint64_t trailer_place(const Record& rec) const;
  bool valid_page(PageHeader* h, uint32_t page) const;
  GroupHeader* valid_group(uint8_t* journal, uint64_t at) const;
  void apply_unflushed(const GroupHeader* h);
  void apply(const Record& rec);  // what does not fit into the index is left out, apply_err_ says so
  Status applied() const;
  Status claim_all();
  int write_super();
  Status checkpoint_now();

  Device& dev_;
  StoreOptions opt_;
  Geometry geo_;
  SuperBlock super_{};
  Index index_;
  Evictor evictor_{index_};
  std::unique_ptr<Allocator> alloc_;
  BufferPool pool_;
  SumsCache sums_;
  MemoryTier tier_;
  std::vector<uint8_t> copy_;  // one sub-block, out of its owner's reach
  uint32_t trailer_io_;        // bytes of a trailer I/O: 512 or the device's block
  uint64_t now_ns_ = 0;
  uint32_t wall_s_ = 0;
  int failed_ = 0;  // errno: the journal can't be written any more; mutations fail, reads go on
  bool recovered_ = false;
  int apply_err_ = 0;                   // errno of the first record that the index did not take
  std::vector<uint8_t> segment_class_;  // recovery only: by the newest record that names a slot in the segment

  Request* done_head_ = nullptr;
  Request* done_tail_ = nullptr;
  struct Waiters {
    Request* head = nullptr;
    Request* tail = nullptr;
  };
  using Locks = std::unordered_map<ChunkKey, Waiters, KeyHash>;
  Locks locks_;
  std::vector<Locks::node_type> lock_nodes_;  // free list
  // Free lists, of kKeepOps at most.
  static constexpr size_t kKeepOps = 4096;
  std::vector<Piece*> pieces_;
  std::vector<struct ReadOp*> reads_;
  std::vector<struct WriteOp*> writes_;
  std::deque<Request*> stalled_;     // wait for journal space
  std::deque<Request*> space_wait_;  // wait for a slot
  uint32_t ops_ = 0;                 // reads and writes in flight
  uint32_t writes_in_flight_ = 0;
  bool evicting_ = false;  // down to low_mark_
  uint64_t low_mark_ = 0;  // bytes
  uint64_t barren_ = 0;    // ids looked at since something was evicted

  // defragmentation: the segment being emptied
  static constexpr uint32_t kMaxMoves = 16;  // in flight
  uint32_t drain_ = Allocator::kNone;
  uint32_t drain_id_ = 0, moves_ = 0;
  bool drain_stuck_ = false;    // no slot to move to, or an unreadable chunk
  bool drain_skipped_ = false;  // a chunk was being changed
  bool defrag_fresh_ = false;   // a chunk was dropped since segments were last marked stuck
  bool defrag_barren_ = false;  // nothing to gain until something else is freed

  // journal
  std::deque<std::vector<Record>> open_;  // groups not yet handed to the device; the first gets next_seq_
  static constexpr uint64_t kDurableHoldNs = 500000, kLazyHoldNs = 2000000;
  bool closing_ = false;
  uint64_t open_since_ = 0;  // when the first of them began to fill
  uint64_t next_seq_ = 1;
  uint64_t written_seq_ = 0, flushed_seq_ = 0, flush_target_ = 0;
  uint64_t head_v_ = 0, tail_v_ = 0;
  bool group_busy_ = false, flush_busy_ = false, flush_wanted_ = false;
  uint64_t group_v_ = 0, group_seq_ = 0;
  void* group_buf_ = nullptr;
  Io group_io_, flush_io_;
  uint64_t lazy_since_ = 0;  // when the oldest unflushed record was logged; 0 = none
  uint64_t unflushed_bytes_ = 0;
  struct DurableWait {
    Request* r;
    uint64_t seq;
  };
  std::deque<DurableWait> durable_;
  std::deque<DurableWait> logged_;  // wait for their record to be written
  struct Quarantined {
    uint64_t off, seq, epoch;
  };
  std::deque<Quarantined> quarantine_;
  uint64_t quarantined_bytes_ = 0;
  uint64_t epoch_ = 1, epoch_base_ = 1;
  std::deque<uint32_t> epoch_reads_{0};  // reads in flight by epoch, from epoch_base_

  // checkpoint
  enum class Ck : uint8_t { Idle, Scan, Journal, Flush, SuperA, FlushA, SuperB, FlushB };
  Ck ck_ = Ck::Idle;
  bool ck_wanted_ = false;
  uint32_t ck_id_ = 0, ck_pages_inflight_ = 0;
  uint64_t ck_seq_ = 0;
  int ck_err_ = 0;
  uint64_t ck_from_seq_ = 0;     // last_seq() when the scan began
  bool ck_calm_ = false;         // mutations wait: the last scan met too much twice
  uint32_t ck_short_ = kEnough;  // free segments when the last checkpoint found them too few
  static constexpr uint32_t kEnough = UINT32_MAX;
  SuperBlock ck_super_{};
  Io ck_io_;
  static constexpr uint32_t kCkDepth = 4;
  struct CkPage {
    Io io;
    void* buf = nullptr;
    bool busy = false;
  } ck_page_[kCkDepth];
  CkPage* ck_fill_ = nullptr;  // the page being filled
  std::vector<Request*> ck_waiters_;

  StoreStats st_{};
};

struct ReadOp {
  Request* r = nullptr;             // a user's Get, or
  void (*done)(ReadOp*) = nullptr;  // an internal read
  void* owner = nullptr;
  StoreImpl* store = nullptr;
  uint64_t epoch = 0;
  uint32_t pending = 0;
  int err = 0;
};

struct WriteOp {
  Request* r = nullptr;
  StoreImpl* store = nullptr;
  uint32_t pending = 0;
  int err = 0;
  uint32_t total = 0;  // bytes of the new chunk
  uint32_t version = 1;
  bool sealed = false;
  uint32_t old_id = 0;   // replaced entry (file chunks); the moved one
  uint64_t old_off = 0;  // move: the slot it leaves
  ChunkKey key;          // move: of the piece (r is null)
  const uint8_t* src = nullptr;
  int fixed = -1;
  void* merged = nullptr;  // read-modify-write buffer
  uint32_t merged_len = 0;
  std::vector<StoreImpl::Piece*> pieces;
};

}  // namespace kvfs
