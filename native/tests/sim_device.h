// sim_device.h owns the storage of tests: a device in memory that completes operations in random order, records what was
// written and flushed, injects faults, and builds every image a power loss could have left. Deterministic for a seed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "../store/device.h"

namespace kvfs {

struct Rng {  // splitmix64
  uint64_t s;
  explicit Rng(uint64_t seed) : s(seed) {}
  uint64_t next() {
    uint64_t z = (s += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t below(uint64_t n) { return n == 0 ? 0 : next() % n; }  // 0..n-1
};

// Sparse bytes, zero where never written; copies share pages until one side writes.
class SimImage {
 public:
  static constexpr uint32_t kPage = 4096;
  void read(uint64_t off, void* out, size_t len) const;
  void write(uint64_t off, const void* in, size_t len);
  void flip_bit(uint64_t off, unsigned bit);
  bool operator==(const SimImage& o) const;

 private:
  using Page = std::array<uint8_t, kPage>;
  std::unordered_map<uint64_t, std::shared_ptr<Page>> pages_;
};

struct SimOptions {
  uint64_t size = 64ull << 20;
  uint32_t align = 4096;     // 512 or 4096
  uint32_t mem_align = 512;  // of mem_ok
  uint64_t seed = 1;
  bool record = true;  // keep the trace (the data of all writes)
};

struct SimFault {
  Io::Op op = Io::Op::Write;
  uint64_t skip = 0;     // this many operations of the kind pass first (counted from add_fault, at submission)
  uint64_t count = 1;    // then this many fail (UINT64_MAX: all)
  int err = 5;           // errno they fail with
  bool partial = false;  // a write changes some of its sectors before it fails (a short transfer)
};

class SimDevice final : public Device {
 public:
  // What happened, in order. A write is durable at crash point n if its Done lies before a FlushStart whose FlushDone is
  // among the first n events; the first such flush decides, and if it failed the write never becomes durable.
  struct Event {
    enum class What : uint8_t { WriteStart, WriteDone, FlushStart, FlushDone };
    What what;
    bool ok = true;                                    // Done: succeeded
    size_t start = 0;                                  // Done: index of its Start event
    uint64_t off = 0;                                  // WriteStart
    std::shared_ptr<const std::vector<uint8_t>> data;  // WriteStart
  };
  enum class Fate : uint8_t {
    Lost,
    Whole,
    Torn
  };  // of a write that is not durable; Torn: a random set of 512-byte sectors

  explicit SimDevice(const SimOptions& opt);
  SimDevice(const SimOptions& opt, SimImage image);  // starts from these contents (a crash image)
  ~SimDevice() override;

  uint64_t size() const override { return opt_.size; }
  uint32_t align() const override { return opt_.align; }
  bool mem_ok(const void* p) const override { return reinterpret_cast<uintptr_t>(p) % opt_.mem_align == 0; }
  void submit(Io* io) override;
  unsigned poll(bool wait) override;  // finishes a random number (>= 1) of what is in flight, in random order
  unsigned inflight() const override { return static_cast<unsigned>(queue_.size()); }

  void hold(bool on) { hold_ = on; }  // while on, poll(false) finishes nothing
  void add_fault(const SimFault& f) { faults_.push_back(f); }
  void clear_faults();
  void fail_writes_after(uint64_t n, int err);  // the device is gone: writes and flushes after the next n writes fail

  SimImage& image() { return image_; }  // what a reader sees now
  const std::vector<Event>& trace() const { return trace_; }
  // Forgets the past: contents now count as durable. Nothing in flight.
  void reset_trace();
  // Crash after the first n events (0..trace().size()): indexes of the writes whose fate is open.
  std::vector<size_t> open_writes(size_t n) const;
  SimImage crash_image(size_t n, Rng& rng) const;                                  // random fates
  SimImage crash_image(size_t n, const std::vector<Fate>& fates, Rng& rng) const;  // one fate per open_writes(n)

  uint64_t reads() const { return reads_; }
  uint64_t writes() const { return writes_; }
  uint64_t flushes() const { return flushes_; }
  // Caller mistakes: writes that overlapped another write in flight; buffers that changed while being written.
  uint64_t overlapping_writes() const { return overlaps_; }
  uint64_t changed_buffers() const { return changed_; }

 private:
  struct Pending {
    Io* io;
    int err;
    bool partial;
    size_t start;  // index in trace_, or SIZE_MAX
    std::shared_ptr<const std::vector<uint8_t>> data;
  };
  void finish(Pending p);

  SimOptions opt_;
  Rng rng_;
  SimImage image_, base_;
  std::vector<Pending> queue_;
  std::vector<Event> trace_;
  std::vector<SimFault> faults_;
  bool hold_ = false;
  uint64_t until_gone_ = UINT64_MAX;  // writes
  int gone_err_ = 0;
  uint64_t reads_ = 0, writes_ = 0, flushes_ = 0, overlaps_ = 0, changed_ = 0;
};

}  // namespace kvfs
