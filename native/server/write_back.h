// write_back.h owns file bytes that were acknowledged and are not in the store yet: pages of 4 KiB, each with the range
// that is new, by chunk. Reads see them, fsync waits for them, and a chunk goes to the store as one write. Reactor thread.
//
// Bounds: `budget` bytes of pages, kFlushes chunks on their way, kMaxAgeNs until a chunk goes of its own accord.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../store/store.h"

namespace kvfs {

struct Job;

constexpr uint32_t kDirtyPage = 4096;
constexpr uint32_t kChunkPages = kFileChunk / kDirtyPage;

// Memory of a request that may stay dirty pages after the request is answered.
struct Lender {
  uint32_t loans = 0;
  void (*returned)(Lender* self) = nullptr;  // the last loan is over
};

struct DirtyPage {
  char* mem = nullptr;
  uint16_t from = 0, to = 0;  // bytes that are held
  bool dirty = false;         // not yet handed to the store; else on its way, or kept for a reader
};

struct DirtyChunk {
  uint64_t ino = 0, index = 0;
  DirtyPage pages[kChunkPages];
  uint32_t held = 0, dirty = 0;  // pages
  Lender* lender = nullptr;      // whose memory all pages are: they go to the store from there
  uint32_t readers = 0;          // store reads under way over which pages will be laid
  bool flushing = false;         // on its way to the store
  bool queued = false;           // in WriteBack::queue_
  uint64_t since_ns = 0;         // when it became dirty
  std::vector<Job*> next, now;   // who waits for the bytes that are dirty, and for those on their way
  DirtyChunk *older = nullptr, *younger = nullptr;
  // For readers that began long ago; the store may have newer bytes by now.
  bool only_kept() const { return dirty == 0 && !flushing; }
};

class WriteBack {
 public:
  static constexpr unsigned kFlushes = 32;
  static constexpr uint64_t kMaxAgeNs = 500'000'000;

  // `landed(job, err)`: one flush that the job waits for is over. `moved(ino)`: first_held() of it may have grown.
  struct Listener {
    void* owner;
    void (*landed)(void* owner, Job* j, int64_t err);
    void (*moved)(void* owner, uint64_t ino);
  };
  WriteBack(Store* store, uint64_t budget, const Listener& listener);
  ~WriteBack();
  WriteBack(const WriteBack&) = delete;
  WriteBack& operator=(const WriteBack&) = delete;

  enum class Taken : uint8_t { Yes, NoRoom, Gap };
  // Takes bytes [off, off + len) of a chunk. NoRoom: try again after a flush. Gap: bytes between these and those of the
  // same page are not known here, so that the chunk must go first; or it is only kept.
  Taken take(uint64_t ino, uint64_t index, uint32_t off, uint32_t len, const char* src, uint64_t now_ns);
  // Takes a whole chunk without a copy: `mem`, aligned for the device, is the lender's and stays as it is until its loan is
  // over. Nothing is held of the chunk.
  void adopt(uint64_t ino, uint64_t index, char* mem, Lender* lender);
  // Whether the store has space for one more chunk beside those that wait.
  bool safe() const;

  // The inode's bytes from chunk `from` up to it are in the store; UINT64_MAX: all are.
  uint64_t first_held(uint64_t ino, uint64_t from = 0) const;

  DirtyChunk* find(uint64_t ino, uint64_t index) const;
  // The same for a read: null also if the store has it all.
  DirtyChunk* find_newer(uint64_t ino, uint64_t index) const;
  static bool covers(const DirtyChunk& c, uint32_t off, uint32_t len);
  // Behind the last byte that is held.
  static uint32_t end_of(const DirtyChunk& c);
  // Lays what is held of [off, off + len) over `dst`, which begins at off.
  static void overlay(const DirtyChunk& c, uint32_t off, uint32_t len, char* dst);
  // A read of the chunk's bytes in the store that overlay() will follow. Until then nothing that is held now is dropped.
  static void pin(DirtyChunk* c) { ++c->readers; }
  void unpin(DirtyChunk* c);

  // The job waits (Job::flushes) for what is dirty or on its way: of one chunk, of an inode, of all.
  void await_chunk(DirtyChunk* c, Job* j);
  void await_inode(uint64_t ino, Job* j);
  void await_all(Job* j);
  void await_room(Job* j);
  // ... for what is on its way, from chunk `first` on.
  void await_flights(uint64_t ino, uint64_t first, Job* j);
  // What is held of the inode goes to the store soon.
  void kick(uint64_t ino);
  void kick_all();
  // Forgets all bytes from `size` on. Nothing from there on is on its way.
  void cut(uint64_t ino, uint64_t size);
  // Forgets the new bytes of chunks [first, end), of which nothing is on its way.
  void drop(uint64_t ino, uint64_t first, uint64_t end);
  // The first error of a flush of the inode since the last call; 0: none.
  int64_t take_error(uint64_t ino);

  void tick(uint64_t now_ns);
  uint64_t deadline_ns() const;
  bool busy() const { return !queue_.empty() && !buffers_.empty(); }
  bool empty() const { return inodes_.empty(); }
  uint64_t dirty_bytes() const { return (pages_used_ + pages_lent_) * kDirtyPage; }
  uint64_t lost() const { return lost_; }

 private:
  struct Flush {
    Request req;
    WriteBack* owner = nullptr;
    DirtyChunk* chunk = nullptr;
    char* buffer = nullptr;
  };
  using Chunks = std::map<uint64_t, std::unique_ptr<DirtyChunk>>;

  DirtyChunk* make(uint64_t ino, uint64_t index);
  void queue(DirtyChunk* c);
  void start(DirtyChunk* c);
  void submit(Flush* f, Request::Op op, uint32_t off, uint32_t len, char* mem, RequestDone done);
  void send(Flush* f, uint32_t off, uint32_t end, char* src);
  void gather(DirtyChunk* c, char* buffer, uint32_t off, uint32_t end);
  void set_out(DirtyChunk* c);
  static void on_turn(Request* r);
  static void on_base(Request* r);
  static void on_written(Request* r);
  void over(Flush* f, int64_t result);
  void drop_page(DirtyChunk* c, uint32_t k);
  void dropped(DirtyChunk* c);
  void settle(DirtyChunk* c);
  void tell(std::vector<Job*>* waiting, int64_t err);
  bool linked(const DirtyChunk* c) const { return c->older != nullptr || c->younger != nullptr || oldest_ == c; }
  void link(DirtyChunk* c);
  void unlink(DirtyChunk* c);

  Store* store_;
  const Listener listener_;
  char* memory_ = nullptr;  // pages, then flush buffers
  uint64_t memory_bytes_ = 0, page_limit_ = 0, pages_made_ = 0, pages_used_ = 0, pages_lent_ = 0, chunks_ = 0;
  std::vector<char*> free_pages_;
  std::unique_ptr<Flush[]> flushes_;
  std::vector<Flush*> buffers_;  // idle ones
  std::unordered_map<uint64_t, Chunks> inodes_;
  std::unordered_map<uint64_t, int64_t> errors_;
  std::deque<DirtyChunk*> queue_;                       // to go at once
  std::vector<Job*> room_;                              // wait for pages
  DirtyChunk *oldest_ = nullptr, *youngest_ = nullptr;  // dirty and not queued
  uint64_t lost_ = 0;
};

}  // namespace kvfs
