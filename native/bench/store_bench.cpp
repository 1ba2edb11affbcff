// store_bench.cpp measures the chunk store alone on a real file or device: random 4 KiB gets from the device and from the
// DRAM tier, durable 4 KiB puts, 1 MiB puts and gets, and the time to reopen a store with many chunks. Usage: store_bench PATH [SIZE_MiB] [CHUNKS_FOR_REOPEN].
// Prints one line per figure; compare with fio on the same file system in the same minutes.
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

#include "../store/check.h"
#include "../store/store.h"
#include "../store/uring_device.h"

using namespace kvfs;

namespace {

uint64_t now_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
}

double cpu_s() {
  rusage ru;
  getrusage(RUSAGE_SELF, &ru);
  return static_cast<double>(ru.ru_utime.tv_sec + ru.ru_stime.tv_sec) +
         static_cast<double>(ru.ru_utime.tv_usec + ru.ru_stime.tv_usec) / 1e6;
}

uint64_t g_rng = 88172645463325252ull;
uint64_t rnd() {
  g_rng ^= g_rng << 13;
  g_rng ^= g_rng >> 7;
  g_rng ^= g_rng << 17;
  return g_rng;
}

ChunkKey key_of(uint64_t n, uint32_t ns) {
  ChunkKey k;
  k.key_len = 8;
  k.ns = ns;
  memcpy(k.id, &n, 8);
  return k;
}

struct Bench {
  Uring* ring = nullptr;
  UringDevice* dev = nullptr;
  Store* store = nullptr;
  std::vector<Request*> idle;
  uint64_t finished = 0, failed = 0;

  void turn() {
    store->tick(now_ns());
    ring->submit_and_wait(store->busy() || dev->inflight() == 0 ? 0 : 1000000);
  }
  // Keeps `depth` requests in flight until `total` are done or `seconds` have passed; next() fills one in.
  template <typename Next>
  void run(const char* name, unsigned depth, uint32_t bytes, uint64_t total, double seconds, Next next) {
    std::vector<Request> reqs(depth);
    const size_t stride = (bytes + 4095) / 4096 * 4096;
    void* mem = nullptr;
    KVFS_CHECK(posix_memalign(&mem, 4096, stride * depth) == 0);
    for (size_t i = 0; i < stride * depth; i += 8) {
      const uint64_t v = rnd();
      memcpy(static_cast<char*>(mem) + i, &v, 8);
    }
    const int fixed = ring->register_buffer(mem, stride * depth);
    idle.clear();
    for (unsigned i = 0; i < depth; i++) {
      reqs[i].mem = {static_cast<char*>(mem) + i * stride, fixed};
      reqs[i].owner = this;
      reqs[i].done = [](Request* r) {
        auto* b = static_cast<Bench*>(r->owner);
        b->finished++;
        if (r->result < 0) b->failed++;
        b->idle.push_back(r);
      };
      idle.push_back(&reqs[i]);
    }
    finished = failed = 0;
    uint64_t started = 0;
    const uint64_t begin = now_ns();
    const double cpu = cpu_s();
    const auto stop = static_cast<uint64_t>(seconds * 1e9);
    while (finished < started || started == 0 || !idle.empty()) {
      const bool more = started < total && now_ns() - begin < stop;
      while (more && !idle.empty() && started < total) {
        Request* r = idle.back();
        idle.pop_back();
        next(r, started++);
        r->len = bytes;
        store->submit(r);
      }
      if (!more && finished == started) break;
      turn();
    }
    const double s = static_cast<double>(now_ns() - begin) / 1e9;
    printf("%-28s %9.0f /s  %7.0f MB/s  cpu %5.2f us each  (%lu done, %lu failed)\n", name,
           static_cast<double>(finished) / s, static_cast<double>(finished) * bytes / s / 1e6,
           (cpu_s() - cpu) / static_cast<double>(finished) * 1e6, finished, failed);
    fflush(stdout);
    if (fixed >= 0) ring->unregister_buffer(fixed);
    free(mem);
  }

  // Random 4 KiB gets of `blocks` blocks put before, in batches as the reactor takes them from a ring: hints for a group
  // of keys, the gets, one turn.
  void resident(const char* name, uint64_t blocks) {
    run("put 4K, for the next", 64, 4096, blocks, 60, [](Request* r, uint64_t i) {
      r->op = Request::Op::Put;
      r->flags = 0;
      r->key = key_of(i, 5);
    });
    for (const uint32_t batch : {64u, 1u}) {
      std::vector<Request> reqs(batch);
      void* mem = nullptr;
      KVFS_CHECK(posix_memalign(&mem, 4096, size_t{4096} * batch) == 0);
      finished = failed = 0;
      const StoreStats before = store->stats();
      const double cpu = cpu_s();
      uint64_t end = now_ns() + 2000000000, begin = now_ns(), started = 0;
      while (now_ns() < end) {
        for (uint32_t i = 0; i < batch; i += Store::kPrefetch) {
          const uint32_t n = batch - i < Store::kPrefetch ? batch - i : Store::kPrefetch;
          ChunkKey keys[Store::kPrefetch];
          for (uint32_t k = 0; k < n; k++) keys[k] = key_of(rnd() % blocks, 5);
          if (n > 1) store->prefetch(keys, n);
          for (uint32_t k = 0; k < n; k++, started++) {
            Request& r = reqs[i + k];
            r = Request{};
            r.key = keys[k];
            r.len = 4096;
            r.mem = {static_cast<char*>(mem) + size_t{4096} * (i + k), -1};
            r.owner = this;
            r.done = [](Request* x) {
              auto* b = static_cast<Bench*>(x->owner);
              b->finished++;
              b->failed += x->result != 4096;
            };
            store->submit(&r);
          }
        }
        while (finished < started) {
          store->tick(now_ns());
          if (finished < started) ring->submit_and_wait(store->busy() ? 0 : 1000000);
        }
      }
      const double s = static_cast<double>(now_ns() - begin) / 1e9;
      printf("get 4K in batches of %2u, %-12s %9.0f /s  cpu %5.2f us each  (%lu done, %lu from memory, %lu failed)\n",
             batch, name, static_cast<double>(finished) / s, (cpu_s() - cpu) / static_cast<double>(finished) * 1e6,
             finished, store->stats().mem_hits - before.mem_hits, failed);
      fflush(stdout);
      free(mem);
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: store_bench PATH [SIZE_MiB] [CHUNKS_FOR_REOPEN]\n");
    return 2;
  }
  const uint64_t size = (argc > 2 ? strtoull(argv[2], nullptr, 10) : 2048) << 20;
  const uint64_t many = argc > 3 ? strtoull(argv[3], nullptr, 10) : 0;
  std::unique_ptr<Uring> ring;
  std::unique_ptr<UringDevice> dev;
  std::unique_ptr<Store> store;
  auto must = [](const Status& s) {
    if (s.err) {
      fprintf(stderr, "store_bench: %s\n", s.message.c_str());
      exit(1);
    }
  };
  must(Uring::create({}, &ring));
  DeviceOptions dopt;
  dopt.create_bytes = size;
  must(UringDevice::open(*ring, argv[1], dopt, &dev));
  must(Store::format(*dev, {}));
  StoreOptions cold;
  cold.memory_bytes = 0;
  must(Store::open(*dev, cold, &store));
  Bench b;
  b.ring = ring.get();
  b.dev = dev.get();
  b.store = store.get();
  const uint64_t n = size / 4 / 4096;
  b.run("put 4K lazy, depth 64", 64, 4096, n, 60, [](Request* r, uint64_t i) {
    r->op = Request::Op::Put;
    r->flags = 0;
    r->key = key_of(i, 1);
  });
  for (int round = 0; round < 3; round++) {
    b.run("get 4K, depth 64", 64, 4096, UINT64_MAX, 3, [n](Request* r, uint64_t) {
      r->op = Request::Op::Get;
      r->key = key_of(rnd() % n, 1);
    });
  }
  b.run("get 4K, depth 1", 1, 4096, UINT64_MAX, 3, [n](Request* r, uint64_t) {
    r->op = Request::Op::Get;
    r->key = key_of(rnd() % n, 1);
  });
  b.run("delete", 64, 0, n, 60, [](Request* r, uint64_t i) {
    r->op = Request::Op::Delete;
    r->key = key_of(i, 1);
  });
  b.run("put 4K durable, depth 64", 64, 4096, n, 5, [](Request* r, uint64_t i) {
    r->op = Request::Op::Put;
    r->flags = Request::kDurable;
    r->key = key_of(i, 2);
  });
  const uint64_t big = size / 4 / (1u << 20);
  b.run("put 1M, depth 8", 8, 1u << 20, big, 20, [](Request* r, uint64_t i) {
    r->op = Request::Op::Put;
    r->flags = 0;
    r->key = key_of(i, 3);
  });
  b.run("get 1M, depth 8", 8, 1u << 20, UINT64_MAX, 3, [big](Request* r, uint64_t) {
    r->op = Request::Op::Get;
    r->key = key_of(rnd() % big, 3);
  });
  must(store->close());
  store.reset();
  for (const uint64_t memory : {0u, 256u << 20}) {
    StoreOptions opt;
    opt.memory_bytes = memory;
    must(Store::format(*dev, {}));
    must(Store::open(*dev, opt, &store));
    b.store = store.get();
    b.resident(memory ? "with memory" : "without", 8192);
    must(store->close());
    store.reset();
  }
  if (many) {
    must(Store::format(*dev, {}));
    must(Store::open(*dev, {}, &store));
    b.store = store.get();
    b.run("put 512 B, for reopening", 64, 512, many, 300, [](Request* r, uint64_t i) {
      r->op = Request::Op::Put;
      r->flags = 0;
      r->key = key_of(i, 4);
    });
    const StoreStats st = store->stats();
    printf("index: %lu chunks, %.2f bytes each\n", st.chunks,
           static_cast<double>(st.index_bytes) / static_cast<double>(st.chunks));
    for (int clean = 0; clean < 2; clean++) {
      if (clean) must(store->close());
      store.reset();  // without close: as after a kill
      const uint64_t begin = now_ns();
      must(Store::open(*dev, {}, &store));
      b.store = store.get();
      printf("reopen %s: %.2f s, %lu chunks\n", clean ? "after a clean stop" : "as after a kill",
             static_cast<double>(now_ns() - begin) / 1e9, store->stats().chunks);
    }
    must(store->close());
  }
  store.reset();
  dev.reset();
  return 0;
}
