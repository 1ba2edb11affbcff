// store.h owns the chunk store's interface: one Store is one target on one Device, used by one reactor thread.
// All data operations are asynchronous Requests; completions run from Store::tick() or from the device's poll().
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "device.h"

namespace kvfs {

constexpr uint32_t kMaxChunk = 16u << 20;    // bytes
constexpr uint32_t kFileChunk = 64u << 10;   // bytes of a file's chunk
constexpr uint32_t kSubBlockMin = 4u << 10;  // smallest checksum unit of chunks above 8 KiB

enum class Kind : uint8_t { Block = 1, File = 2 };

// 40 bytes. Block: ns = namespace id, key_len = 1..32 (33: hash of a longer key), id = key zero-padded.
// File: ns = 0, key_len = 16, id = inode (u64 LE), chunk index (u64 LE), zeros.
struct ChunkKey {
  Kind kind = Kind::Block;
  uint8_t key_len = 0;
  uint8_t rsv[2] = {0, 0};
  uint32_t ns = 0;
  uint8_t id[32] = {};
  bool operator==(const ChunkKey&) const = default;
};
static_assert(sizeof(ChunkKey) == 40);

inline ChunkKey file_key(uint64_t ino, uint64_t index) {
  ChunkKey k;
  k.kind = Kind::File;
  k.key_len = 16;
  std::memcpy(k.id, &ino, 8);
  std::memcpy(k.id + 8, &index, 8);
  return k;
}

struct Request;
using RequestDone = void (*)(Request*);

struct Request {
  enum class Op : uint8_t {
    Get,    // sealed or file chunk: bytes [off, off+len) -> mem. result = bytes (short at the end), -ENOENT, -EIO
    Put,    // sealed create-if-absent. 1 written, 0 existed with the same length, -EEXIST, -ENOSPC, -ENOMEM ...
    Write,  // file chunk: overwrite/extend [off, off+len) (off+len <= kFileChunk). Visible at completion. result = len
    Truncate,    // file chunk: new length = off (0 deletes). Bytes beyond are gone: a later extension reads zeros. 0
    Delete,      // 0 or -ENOENT
    Flush,       // file chunks of inode key.id[0..8): journal + barrier. 0
    Sync,        // everything acknowledged so far. 0
    Checkpoint,  // 0
    // Of stores with remote() only; others have lookup() and scan():
    Lookup,  // length or -ENOENT
    Scan,  // chunks of (key.kind, key.ns), from the cursor in key.id[0..8) on, as kvfs_scan_entry to mem. Bytes, 0 = end
    Purge  // File: chunks [key.id[8..16), key.id[16..24)) of inode key.id[0..8). Block: all of key.ns. 0
  };
  static constexpr uint8_t kDurable = 1;    // complete only when it survives power loss
  static constexpr uint8_t kNoTouch = 2;    // not an access for eviction
  static constexpr uint8_t kEvictable = 4;  // Put: belongs to a cache namespace
  static constexpr uint8_t kLogged = 8;     // complete only when it survives the end of this process
  Op op = Op::Get;
  uint8_t flags = 0;
  ChunkKey key;
  uint32_t off = 0;  // bytes within the chunk
  uint32_t len = 0;  // bytes
  MemRef mem;
  int64_t result = 0;
  uint64_t sum = 0;     // of a Get that is summed: XXH3-64 of the bytes read, which they have been verified by
  bool summed = false;  // set by the store, if it knows that
  RequestDone done = nullptr;
  void* owner = nullptr;
  Request* next = nullptr;      // the owner's while idle, the store's while submitted
  alignas(8) uint8_t priv[64];  // the store's scratch
};

// A chunk's bytes where the DRAM tier keeps them, for whoever sends them on: Store::lend.
struct Lent {
  struct Part {
    const uint8_t* ptr;
    uint32_t len;
  };
  static constexpr uint32_t kMaxBytes = 4u << 20;
  static constexpr uint32_t kMaxParts = 512;  // pages that lie side by side are one part
  std::vector<Part> parts;
  std::vector<uint32_t> pins;  // the tier's
  uint32_t length = 0;         // of the whole chunk
  uint64_t sum = 0;            // XXH3-64 of the parts, one behind the other
};

struct ChunkInfo {
  ChunkKey key;
  uint32_t length;
  uint32_t version;
  uint32_t mtime;  // seconds since 1970
};

struct FormatOptions {
  uint64_t size = 0;           // bytes to use; 0 = whole device
  uint32_t segment_bytes = 0;  // power of two, 1..64 MiB; 0 = chosen from size, 2..16 MiB
  uint64_t journal_bytes = 0;  // 0 = chosen: size/64 clamped to [4 MiB, 64 MiB]
};

struct StoreOptions {
  uint64_t memory_bytes = 64u << 20;  // DRAM tier of hot pages, and 0.9 % more for its bookkeeping (0 = off)
  uint64_t memory_ahead = 0;          // of these, bytes that a thread gives their pages before they are used
  bool verify = true;                 // check XXH3 on every device read
  double high_watermark = 0.95;       // fraction of data space where eviction of cache blocks starts
  double low_watermark = 0.92;
  uint32_t lazy_ms = 500;  // a lazy operation is on stable storage within this time
  bool read_only = false;  // fsck: recover in memory, write nothing
};

struct StoreStats {
  uint64_t chunks, block_chunks, file_chunks;
  uint64_t data_bytes;      // sum of chunk lengths
  uint64_t slot_bytes;      // sum of the slots that hold them
  uint64_t capacity_bytes;  // all segments
  uint64_t free_bytes;      // free segments + free slots
  uint64_t reserved_bytes;  // of these, kept for checkpoints: nothing else can use them
  uint64_t free_segments, total_segments;
  uint64_t index_bytes;  // memory of the index, all of it
  uint64_t gets, get_hits, puts, puts_existed, deletes, writes, evictions, checksum_errors, io_errors;
  uint64_t space_waits;                                                 // puts and writes that found no slot at once
  uint64_t mem_hits, mem_bytes;                                         // DRAM tier
  uint64_t journal_groups, journal_bytes, checkpoints, flushes, moves;  // moves: chunks relocated by defragmentation
  uint64_t bytes_read, bytes_written;                                   // of users
};

// Errors of open/format: errno plus one sentence for people.
struct Status {
  int err = 0;
  std::string message;
  explicit operator bool() const { return err == 0; }
};

class Store {
 public:
  static Status format(Device& dev, const FormatOptions& opt);
  // Recovers and returns a ready store; drives dev.poll itself. EUCLEAN: damaged, fsck needed. EPROTO: other version.
  static Status open(Device& dev, const StoreOptions& opt, std::unique_ptr<Store>* out);
  virtual ~Store() = default;
  // Final checkpoint and clean mark; drives dev.poll itself. The store accepts nothing afterwards.
  virtual Status close() = 0;

  virtual void submit(Request* r) = 0;
  // Runs group commit, eviction, checkpoint steps. Call once per reactor turn, after dev.poll.
  virtual void tick(uint64_t now_ns) = 0;
  // When tick must run next even if nothing happens (CLOCK_MONOTONIC ns), UINT64_MAX = never.
  virtual uint64_t deadline_ns() const = 0;
  // True if tick() has work that does not wait for I/O.
  virtual bool busy() const = 0;

  // Its chunks are elsewhere: lookup(), scan() and prefetch() know nothing (-ENOENT, the end), Request's last operations
  // ask instead. stats() and room() are what was last heard.
  virtual bool remote() const { return false; }
  // [base, base+len) is, or is no longer, memory of requests: networks that reach into it have to know.
  virtual void memory(void* /*base*/, size_t /*len*/, bool /*add*/) {}
  // Synchronous, memory only. Length in bytes or -ENOENT.
  virtual int64_t lookup(const ChunkKey& key, ChunkInfo* info) = 0;
  // Loads what coming lookups and Gets of these keys will touch into the CPU's caches: index entries, and the first page
  // where the DRAM tier has it. The misses of up to kPrefetch keys overlap. A hint: nothing changes.
  static constexpr uint32_t kPrefetch = 16;
  virtual void prefetch(const ChunkKey* keys, uint32_t n) = 0;
  // Bytes [off, off+len) of a chunk without a copy: fills `out`, empty before, which keeps them as they are until give_back,
  // whatever happens to the chunk. Bytes (short at the end) or -ENOENT, as a Get; -EAGAIN: not all of them are in memory,
  // or too much is lent already: ask with a Get. out->length is set unless -ENOENT, out->sum if asked for: that of the bytes
  // when this range was first lent and summed, while it is remembered. Memory that has lost a bit since does not agree with it.
  virtual int64_t lend(const ChunkKey& key, uint32_t off, uint32_t len, bool touch, bool sum, Lent* out) {
    (void)key, (void)off, (void)len, (void)touch, (void)sum, (void)out;
    return -EAGAIN;
  }
  virtual void give_back(Lent* lent) { (void)lent; }
  // The memory that lend() gives parts of, for whoever must register it with a device; no bytes: there is none.
  virtual std::span<const uint8_t> lendable() const { return {}; }
  // Walks the index from *cursor (0 = start) examining at most `budget` entries; calls fn for chunks of (kind, ns)
  // (ns 0xffffffff = any); fn returns false to stop before consuming that entry. Sets *cursor; returns false at the end.
  // An entry present for the whole scan is reported at least once; callers dedup by key if they must.
  virtual bool scan(uint64_t* cursor, uint32_t budget, Kind kind, uint32_t ns,
                    const std::function<bool(const ChunkInfo&)>& fn) = 0;
  virtual StoreStats stats() const = 0;
  // Bytes that writes surely find, whatever their sizes; 0 when read-only.
  virtual uint64_t room() const = 0;
  // What is acknowledged now survives the process's end once written() is at least what logged() says now. UINT64_MAX:
  // nothing will be written any more.
  virtual uint64_t logged() const = 0;
  virtual uint64_t written() const = 0;
};

}  // namespace kvfs
