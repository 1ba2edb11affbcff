// store_fixture.h owns what the store's tests share: keys, contents, aligned memory and an open store on a simulated device.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../store/checksum.h"
#include "../store/store.h"
#include "sim_device.h"

namespace kvfs {

using Bytes = std::vector<uint8_t>;

inline ChunkKey block_key(uint64_t n, uint32_t ns = 1) {
  ChunkKey k;
  k.kind = Kind::Block;
  k.key_len = 8;
  k.ns = ns;
  std::memcpy(k.id, &n, sizeof n);
  return k;
}

inline Bytes pattern(uint64_t seed, size_t n) {
  Bytes b(n);
  Rng rng(seed);
  for (size_t i = 0; i < n; i += 8) {
    const uint64_t v = rng.next();
    std::memcpy(&b[i], &v, std::min<size_t>(8, n - i));
  }
  return b;
}

// Memory aligned for direct I/O, off by `skew` bytes to force bouncing.
struct Mem {
  explicit Mem(size_t n, size_t skew = 0) : skew_(skew) {
    void* p = nullptr;
    if (posix_memalign(&p, 4096, (n + skew + 4096) / 4096 * 4096 + 4096) != 0) std::abort();
    base_ = static_cast<uint8_t*>(p);
  }
  ~Mem() { free(base_); }
  Mem(const Mem&) = delete;
  Mem& operator=(const Mem&) = delete;
  uint8_t* get() const { return base_ + skew_; }
  uint8_t* base_;
  size_t skew_;
};

inline SimOptions sim(uint64_t seed, uint64_t size = 64u << 20, uint32_t align = 512) {
  SimOptions o;
  o.size = size;
  o.align = align;
  o.seed = seed;
  return o;
}

constexpr FormatOptions kSmall{.size = 0, .segment_bytes = 1u << 20, .journal_bytes = 1u << 20};

struct Harness {
  // Without the DRAM tier, so that reads reach the device.
  explicit Harness(SimDevice& d, StoreOptions o = {.memory_bytes = 0}) : dev(d), opt(o) {}
  Status open() { return Store::open(dev, opt, &store); }
  void turn() {
    now += 1000000;
    store->tick(now);
    asleep = !store->busy() && dev.inflight() == 0 && store->deadline_ns() == UINT64_MAX;
    dev.poll(false);
  }
  int64_t run(Request::Op op, const ChunkKey& key, void* mem, uint32_t off, uint32_t len, uint8_t flags = 0) {
    Request r;
    r.op = op;
    r.key = key;
    r.off = off;
    r.len = len;
    r.mem = {mem, -1};
    r.flags = flags;
    bool done = false;
    r.owner = &done;
    r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
    store->submit(&r);
    until([&] { return done; });
    summed = r.summed;
    if (op == Request::Op::Get && r.summed && r.result > 0) {
      EXPECT_EQ(r.sum, xxh3(mem, size_t(r.result)));
    }
    return r.result;
  }
  template <typename F>
  void until(F ended) {
    for (int i = 0; !ended(); i++) {
      turn();
      if (i > 200000 || (asleep && !ended())) {
        ADD_FAILURE() << (asleep ? "nothing would ever wake the store" : "a request never completed");
        std::abort();
      }
    }
  }
  int64_t put(const ChunkKey& k, const Bytes& v, uint8_t flags = 0, size_t skew = 0) {
    Mem m(v.size(), skew);
    std::memcpy(m.get(), v.data(), v.size());
    return run(Request::Op::Put, k, m.get(), 0, static_cast<uint32_t>(v.size()), flags);
  }
  int64_t write(const ChunkKey& k, uint32_t off, const Bytes& v, uint8_t flags = 0) {
    Mem m(v.size());
    std::memcpy(m.get(), v.data(), v.size());
    return run(Request::Op::Write, k, m.get(), off, static_cast<uint32_t>(v.size()), flags);
  }
  // The bytes, or the error.
  int64_t get(const ChunkKey& k, uint32_t off, uint32_t len, Bytes* out, size_t skew = 0) {
    Mem m(len, skew);
    const int64_t n = run(Request::Op::Get, k, m.get(), off, len);
    if (n >= 0) out->assign(m.get(), m.get() + n);
    return n;
  }
  SimDevice& dev;
  StoreOptions opt;
  std::unique_ptr<Store> store;
  uint64_t now = 1;
  bool summed = false;  // the last one came with its sum
  bool asleep = false;  // after the last tick, whoever drives the store could have slept for ever
};

}  // namespace kvfs
