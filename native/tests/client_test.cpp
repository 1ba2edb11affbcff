// client_test.cpp tests libkvfs against a real node: blocks end to end, limits, errors, fork, death, many threads.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "node_fixture.h"

namespace {

uint64_t now() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return uint64_t(ts.tv_sec) * kSec + uint64_t(ts.tv_nsec);
}

struct Client {
  kvfs_client* c = nullptr;
  kvfs_ring* r = nullptr;
  kvfs_iov v{};
  int ns = -1;
  explicit Client(const std::string& sock, uint32_t entries = 128, uint64_t bytes = 8u << 20) {
    EXPECT_EQ(kvfs_open(sock.c_str(), &c), 0);
    EXPECT_EQ(kvfs_ring_create(c, entries, &r), 0);
    EXPECT_EQ(kvfs_iov_alloc(c, bytes, 0, &v), 0);
    ns = kvfs_ns_open(c, "t", "cache", 0);
    EXPECT_GE(ns, 0);
  }
  ~Client() { kvfs_close(c); }
  char* mem() { return static_cast<char*>(v.base); }
};

void fill(char* p, size_t n, uint64_t seed) {
  for (size_t i = 0; i < n; ++i) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    p[i] = char(seed >> 56);
  }
}

TEST_F(NodeTest, PutGetExistsEvict) {
  Client k(sock_);
  constexpr int kN = 500;
  std::vector<std::string> keys;
  std::vector<kvfs_block> b(kN);
  std::string expect(kN * 4096, 0);
  for (int i = 0; i < kN; ++i) keys.push_back("key" + std::to_string(i));
  for (int i = 0; i < kN; ++i) {
    b[i].key = keys[i].data();
    b[i].key_len = uint32_t(keys[i].size());
    b[i].len = 1 + uint32_t(i * 8) % 4096;
    b[i].value_off = uint64_t(i) * 4096;
    fill(k.mem() + b[i].value_off, b[i].len, uint64_t(i));
  }
  memcpy(expect.data(), k.mem(), expect.size());
  ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, b.data(), kN, 0, 10 * kSec), kN);
  for (auto& x : b) ASSERT_EQ(x.status, 1);
  ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, b.data(), kN, KVFS_SQE_DURABLE, 10 * kSec), kN);
  for (auto& x : b) ASSERT_EQ(x.status, 0);
  memset(k.mem(), 0xee, kN * 4096);
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, b.data(), kN, 10 * kSec), kN);
  for (int i = 0; i < kN; ++i) {
    ASSERT_EQ(b[i].status, int64_t(b[i].len));
    ASSERT_EQ(memcmp(k.mem() + b[i].value_off, expect.data() + b[i].value_off, b[i].len), 0) << i;
    if (b[i].len < 4096) {
      ASSERT_EQ(uint8_t(k.mem()[b[i].value_off + b[i].len]), 0xee);
    }
  }
  ASSERT_EQ(kvfs_exists(k.r, k.ns, b.data(), kN, 10 * kSec), kN);
  for (auto& x : b) ASSERT_EQ(x.status, int64_t(x.len));
  // Same key, another length; another namespace; a missing key; a key that is too long.
  b[0].len += 1;
  ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, b.data(), 1, 0, kSec), 0);
  ASSERT_EQ(b[0].status, -EEXIST);
  b[0].len -= 1;
  int other = kvfs_ns_open(k.c, "t", "other", KVFS_NS_RDONLY);
  ASSERT_GE(other, 0);
  ASSERT_EQ(kvfs_get(k.r, other, &k.v, b.data(), 1, kSec), 0);
  ASSERT_EQ(b[0].status, -ENOENT);
  ASSERT_EQ(kvfs_put(k.r, other, &k.v, b.data(), 1, 0, kSec), 0);
  ASSERT_EQ(b[0].status, -EACCES);
  b[0].key_len = 33;
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, b.data(), 2, kSec), 1);
  ASSERT_EQ(b[0].status, -EINVAL);
  b[0].key_len = 4;
  ASSERT_EQ(kvfs_evict(k.r, k.ns, b.data(), kN, 10 * kSec), kN);
  ASSERT_EQ(kvfs_exists(k.r, k.ns, b.data(), kN, 10 * kSec), 0);
  for (auto& x : b) ASSERT_EQ(x.status, -ENOENT);
}

TEST_F(NodeTest, LargeValuesAndRanges) {
  Client k(sock_, 16, 34u << 20);
  kvfs_block b{};
  b.key = "big";
  b.key_len = 3;
  b.len = KVFS_VALUE_MAX;
  fill(k.mem(), b.len, 7);
  std::string expect(k.mem(), b.len);
  ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, &b, 1, KVFS_SQE_DURABLE, 20 * kSec), 1);
  b.value_off = 17u << 20;
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, &b, 1, 20 * kSec), 1) << b.status;
  ASSERT_EQ(memcmp(k.mem() + b.value_off, expect.data(), expect.size()), 0);
  for (uint64_t off : {uint64_t(1), uint64_t(5000), uint64_t(65536), uint64_t(KVFS_VALUE_MAX - 10)}) {
    b.off = off;
    b.len = 9000;
    ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, &b, 1, 20 * kSec), 1);
    int64_t want = std::min<int64_t>(9000, int64_t(KVFS_VALUE_MAX - off));
    ASSERT_EQ(b.status, want);
    ASSERT_EQ(memcmp(k.mem() + b.value_off, expect.data() + off, size_t(want)), 0);
  }
  b.off = KVFS_VALUE_MAX;
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, &b, 1, kSec), 1);
  ASSERT_EQ(b.status, 0);
  b.off = 0;
  b.len = KVFS_VALUE_MAX + 1;
  b.value_off = 0;
  ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, &b, 1, 0, kSec), 0);
  ASSERT_EQ(b.status, -EINVAL);
  b.len = 4096;
  b.value_off = k.v.size - 4095;
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, &b, 1, kSec), 0);
  ASSERT_EQ(b.status, -EFAULT);
}

TEST_F(NodeTest, SurvivesRestart) {
  {
    Client k(sock_);
    kvfs_block b{"x", 1, 5000, 0, 0, 0};
    fill(k.mem(), 5000, 3);
    ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, &b, 1, 0, kSec), 1);
  }
  stop();
  start();
  Client k(sock_);
  kvfs_block b{"x", 1, 8192, 0, 0, 0};
  ASSERT_EQ(kvfs_get(k.r, k.ns, &k.v, &b, 1, kSec), 1);
  ASSERT_EQ(b.status, 5000);
  std::string want(5000, 0);
  fill(want.data(), 5000, 3);
  ASSERT_EQ(memcmp(k.mem(), want.data(), 5000), 0);
}

TEST_F(NodeTest, Scan) {
  Client k(sock_);
  std::vector<std::string> keys;
  for (int i = 0; i < 300; ++i) keys.push_back("scan" + std::to_string(i));
  for (auto& key : keys) {
    kvfs_block b{key.data(), uint32_t(key.size()), 100, 0, 0, 0};
    ASSERT_EQ(kvfs_put(k.r, k.ns, &k.v, &b, 1, 0, kSec), 1);
  }
  std::vector<std::string> seen;
  uint64_t cursor = 0;
  for (int rounds = 0; rounds < 1000; ++rounds) {
    kvfs_sqe* s = kvfs_prep(k.r);
    ASSERT_NE(s, nullptr);
    s->opcode = KVFS_OP_SCAN;
    s->handle = uint32_t(k.ns);
    s->iov = k.v.id;
    s->off = cursor;
    s->len = 64 * 64;
    kvfs_submit(k.r);
    kvfs_cqe c;
    ASSERT_EQ(kvfs_wait(k.r, &c, 1, 1, 5 * kSec), 1);
    ASSERT_GE(c.result, 0);
    if (c.result == 0) break;
    auto* e = reinterpret_cast<kvfs_scan_entry*>(k.mem());
    int n = int(c.result / 64);
    for (int i = 0; i < n; ++i) {
      seen.emplace_back(reinterpret_cast<char*>(e[i].key), e[i].key_len);
      ASSERT_EQ(e[i].length, 100u);
    }
    cursor = e[n - 1].cursor;
  }
  std::sort(seen.begin(), seen.end());
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  std::sort(keys.begin(), keys.end());
  ASSERT_EQ(seen, keys);
}

TEST_F(NodeTest, CreateDestroyIsCheap) {
  kvfs_client* c;
  ASSERT_EQ(kvfs_open(sock_.c_str(), &c), 0);
  std::vector<uint64_t> t;
  for (int i = 0; i < 200; ++i) {
    uint64_t t0 = now();
    kvfs_ring* r;
    ASSERT_EQ(kvfs_ring_create(c, 64, &r), 0);
    ASSERT_EQ(kvfs_ring_destroy(r), 0);
    t.push_back(now() - t0);
  }
  std::sort(t.begin(), t.end());
  printf("ring create+destroy: median %.1f us, p90 %.1f us\n", double(t[100]) / 1e3, double(t[180]) / 1e3);
  kvfs_iov v;
  uint64_t t0 = now();
  ASSERT_EQ(kvfs_iov_alloc(c, 64u << 20, 0, &v), 0);
  uint64_t t1 = now();
  ASSERT_EQ(kvfs_iov_free(c, &v), 0);
  printf("iov of 64 MiB: alloc %.2f ms, free %.2f ms\n", double(t1 - t0) / 1e6, double(now() - t1) / 1e6);
  kvfs_close(c);
  ASSERT_TRUE(wait_sessions(0));
  auto s = stats();
  EXPECT_EQ(s.iovs, 0u);
  EXPECT_EQ(s.iov_bytes, 0u);
  EXPECT_EQ(s.rings, 2u);  // the daemon's own
}

TEST_F(NodeTest, Limits) {
  Client k(sock_);
  std::vector<kvfs_ring*> rings;
  kvfs_ring* r;
  int err = 0;
  while ((err = kvfs_ring_create(k.c, 2, &r)) == 0) rings.push_back(r);
  EXPECT_EQ(err, -EMFILE);
  EXPECT_EQ(rings.size(), 255u);
  for (kvfs_ring* x : rings) ASSERT_EQ(kvfs_ring_destroy(x), 0);
  rings.clear();
  while ((err = kvfs_ring_create(k.c, KVFS_RING_MAX_ENTRIES, &r)) == 0) rings.push_back(r);
  EXPECT_EQ(err, -EMFILE);
  EXPECT_EQ(rings.size(), 17u);
  ASSERT_EQ(kvfs_ring_destroy(rings[0]), 0);  // what it took is free again
  EXPECT_EQ(kvfs_ring_create(k.c, KVFS_RING_MAX_ENTRIES, &r), 0);
  EXPECT_EQ(kvfs_ring_create(k.c, 3, &r), -EINVAL);
  kvfs_iov v;
  EXPECT_EQ(kvfs_iov_alloc(k.c, uint64_t(1) << 36, 0, &v), -EDQUOT);
  EXPECT_EQ(kvfs_ns_open(k.c, "t", "a/b", 0), -EINVAL);
  EXPECT_EQ(kvfs_ns_open(k.c, "..", "a", 0), -EINVAL);
  EXPECT_EQ(kvfs_ns_close(k.c, 77), -EBADF);
  kvfs_cqe c;
  EXPECT_EQ(kvfs_wait(k.r, &c, 1, 1, kSec), -EDEADLK);
}

TEST_F(NodeTest, Upcall) {
  std::thread t([&] {
    for (int done = 0; done < 2;) {
      kvfs_upcall u;
      if (kvfs_node_next_upcall(node_, &u) == 0) {
        usleep(500);
        continue;
      }
      ++done;
      if (strcmp(u.name, "new") == 0) {
        kvfs_node_ns_put(node_, u.tenant, u.name, 9, 1, KVFS_ANY_UID);
        kvfs_node_answer(node_, u.id, 0);
      } else {
        kvfs_node_answer(node_, u.id, -EPERM);
      }
    }
  });
  Client k(sock_);
  EXPECT_GE(kvfs_ns_open(k.c, "t", "new", 0), 0);
  EXPECT_EQ(kvfs_ns_open(k.c, "t", "bad", 0), -EPERM);
  t.join();
}

TEST_F(NodeTest, ForkedChildGetsAnError) {
  Client k(sock_);
  pid_t pid = fork();
  if (pid == 0) {
    kvfs_cqe c;
    kvfs_block b{"x", 1, 1, 0, 0, 0};
    kvfs_iov v;
    bool ok = kvfs_submit(k.r) == -ECHILD && kvfs_peek(k.r, &c, 1) == -ECHILD && kvfs_prep(k.r) == nullptr &&
              kvfs_exists(k.r, k.ns, &b, 1, kSec) == -ECHILD && kvfs_iov_alloc(k.c, 1, 0, &v) == -ECHILD;
    _exit(ok ? 0 : 1);
  }
  int st = 0;
  ASSERT_EQ(waitpid(pid, &st, 0), pid);
  EXPECT_EQ(st, 0);
  kvfs_block b{"x", 1, 1, 0, 0, 0};
  EXPECT_EQ(kvfs_exists(k.r, k.ns, &b, 1, kSec), 0);
  EXPECT_EQ(b.status, -ENOENT);
}

TEST_F(NodeTest, KilledClientLeavesNothing) {
  for (int round = 0; round < 5; ++round) {
    int p[2];
    ASSERT_EQ(pipe(p), 0);
    const pid_t pid = fork_client([&] {
      Client k(sock_, 256, 32u << 20);
      char c = 1;
      (void)!write(p[1], &c, 1);
      for (uint64_t i = 0;; ++i) {  // puts under way all the time
        kvfs_cqe cq[64];
        uint64_t key = i * 5 + uint64_t(round);
        if (kvfs_prep_block(k.r, KVFS_OP_PUT, 0, k.ns, &key, 8, k.v.id, (i % 512) * 65536, 0, 65536, i) == -EAGAIN) {
          kvfs_submit(k.r);
          kvfs_wait(k.r, cq, 1, 64, kSec);
        }
      }
    });
    char c;
    ASSERT_EQ(read(p[0], &c, 1), 1);
    usleep(20000);
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    close(p[0]);
    close(p[1]);
    ASSERT_TRUE(wait_sessions(0)) << "round " << round;
    auto s = stats();
    EXPECT_EQ(s.rings, 2u);
    EXPECT_EQ(s.iov_bytes, 0u);
  }
}

// The daemon in a child process is killed while the parent waits.
TEST_F(NodeTest, DaemonDeathIsNoticed) {
  stop();
  pid_t pid = fork();
  if (pid == 0) {
    start();
    pause();
    _exit(0);
  }
  kvfs_client* c = nullptr;
  for (int i = 0; i < 2000 && kvfs_open(sock_.c_str(), &c) != 0; ++i) usleep(1000);
  ASSERT_NE(c, nullptr);
  kvfs_ring* r;
  ASSERT_EQ(kvfs_ring_create(c, 16, &r), 0);
  kill(pid, SIGSTOP);  // it takes the submission but can't answer any more
  usleep(2000);
  kvfs_sqe* s = kvfs_prep(r);
  s->opcode = KVFS_OP_NOP;
  kvfs_submit(r);
  kvfs_cqe q;
  EXPECT_EQ(kvfs_wait(r, &q, 1, 1, 20000000), -ETIMEDOUT);
  std::atomic<uint64_t> noticed{0};
  std::atomic<int> result{0};
  std::thread t([&] {
    result = kvfs_wait(r, &q, 1, 1, 10 * kSec);
    noticed = now();
  });
  usleep(30000);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  uint64_t dead = now();
  t.join();
  EXPECT_EQ(result, -EREMOTEIO);
  EXPECT_LT(noticed - dead, 100000000u);
  kvfs_iov v;
  EXPECT_EQ(kvfs_iov_alloc(c, 4096, 0, &v), -EREMOTEIO);
  kvfs_close(c);
}

// The daemon in a child process is stopped for good: nobody who has given it up waits for it.
TEST_F(NodeTest, AbandonedDaemonHoldsNobodyUp) {
  stop();
  pid_t pid = fork();
  if (pid == 0) {
    start();
    pause();
    _exit(0);
  }
  kvfs_client* c = nullptr;
  for (int i = 0; i < 2000 && kvfs_open(sock_.c_str(), &c) != 0; ++i) usleep(1000);
  ASSERT_NE(c, nullptr);
  kvfs_ring *r, *polled;
  ASSERT_EQ(kvfs_ring_create(c, 16, &r), 0);
  ASSERT_EQ(kvfs_ring_create(c, 16, &polled), 0);
  const int fd = kvfs_ring_event_fd(polled);
  ASSERT_GE(fd, 0);
  kvfs_iov v, late;
  ASSERT_EQ(kvfs_iov_alloc(c, 4096, 0, &v), 0);
  void* own = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  const int memory = memfd_create("kvfs-test", MFD_CLOEXEC);
  ASSERT_EQ(ftruncate(memory, 4096), 0);
  ASSERT_EQ(mmap(own, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, memory, 0), own);
  kill(pid, SIGSTOP);
  usleep(2000);
  for (kvfs_ring* each : {r, polled}) {
    kvfs_sqe* s = kvfs_prep(each);
    s->opcode = KVFS_OP_NOP;
    kvfs_submit(each);
  }
  kvfs_arm(polled, 1);
  std::atomic<int> waited{0}, called{0}, shared{0}, readable{0};
  std::thread waits([&] {
    kvfs_cqe q;
    waited = kvfs_wait(r, &q, 1, 1, 60 * kSec);
  });
  std::thread calls([&] { called = kvfs_iov_alloc(c, 4096, 0, &late); });
  std::thread shares([&] { shared = kvfs_iov_register(c, own, 4096, &late); });
  std::thread polls([&] {
    pollfd p{fd, POLLIN, 0};
    readable = poll(&p, 1, 60000);
  });
  usleep(30000);
  const uint64_t begun = now();
  kvfs_abandon(c);
  waits.join();
  calls.join();
  shares.join();
  polls.join();
  EXPECT_EQ(waited, -EREMOTEIO);
  EXPECT_EQ(called, -EREMOTEIO);
  EXPECT_EQ(shared, -EREMOTEIO);
  EXPECT_EQ(readable, 1);
  kvfs_cqe q;
  EXPECT_EQ(kvfs_peek(polled, &q, 1), -EREMOTEIO);
  EXPECT_EQ(kvfs_alive(c), 0);
  EXPECT_EQ(kvfs_iov_free(c, &v), -EREMOTEIO);
  EXPECT_EQ(kvfs_ring_destroy(r), -EREMOTEIO);
  EXPECT_EQ(kvfs_ns_open(c, "t", "cache", 0), -EREMOTEIO);
  EXPECT_EQ(kvfs_iov_register(c, own, 4096, &late), -EREMOTEIO);
  kvfs_close(c);
  EXPECT_LT(now() - begun, 2 * kSec);
  munmap(own, 4096);
  close(memory);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

TEST_F(NodeTest, StopEndsClientsWithAnError) {
  Client k(sock_);
  stop();
  kvfs_sqe* s = kvfs_prep(k.r);
  s->opcode = KVFS_OP_NOP;
  kvfs_submit(k.r);
  kvfs_cqe q;
  EXPECT_EQ(kvfs_wait(k.r, &q, 1, 1, 10 * kSec), -EREMOTEIO);
}

TEST_F(NodeTest, ThreadsWithRingsOfTheirOwn) {
  kvfs_client* c;
  ASSERT_EQ(kvfs_open(sock_.c_str(), &c), 0);
  int ns = kvfs_ns_open(c, "t", "cache", 0);
  ASSERT_GE(ns, 0);
  std::vector<std::thread> ts;
  std::atomic<int> bad{0};
  for (int t = 0; t < 4; ++t) {
    ts.emplace_back([&, t] {
      kvfs_ring* r;
      kvfs_iov v;
      if (kvfs_ring_create(c, 32, &r) != 0 || kvfs_iov_alloc(c, 1 << 20, 0, &v) != 0) {
        ++bad;
        return;
      }
      for (uint64_t i = 0; i < 200; ++i) {
        uint64_t keys[16];
        kvfs_block b[16] = {};
        for (uint64_t j = 0; j < 16; ++j) {
          keys[j] = i << 16 | j << 8 | uint64_t(t);
          b[j].key = &keys[j];
          b[j].key_len = 8;
          b[j].len = 3000;
          b[j].value_off = j * 4096;
          fill(static_cast<char*>(v.base) + j * 4096, 3000, keys[j]);
        }
        if (kvfs_put(r, ns, &v, b, 16, 0, 10 * kSec) != 16) ++bad;
        memset(v.base, 0, 65536);
        if (kvfs_get(r, ns, &v, b, 16, 10 * kSec) != 16) ++bad;
        char want[3000];
        for (uint64_t j = 0; j < 16; ++j) {
          fill(want, 3000, keys[j]);
          if (memcmp(want, static_cast<char*>(v.base) + j * 4096, 3000) != 0) ++bad;
        }
      }
      if (kvfs_ring_destroy(r) != 0 || kvfs_iov_free(c, &v) != 0) ++bad;
    });
  }
  for (auto& t : ts) t.join();
  EXPECT_EQ(bad, 0);
  kvfs_close(c);
}

}  // namespace
