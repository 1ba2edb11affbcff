// hostile_test.cpp tests that a client that writes anything into its ring memory and socket hurts nobody but itself.
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <random>
#include <thread>
#include <vector>

#include "../client/client.h"
#include "node_fixture.h"

namespace {

class HostileTest : public NodeTest {
 protected:
  // Runs `evil` in a child until killed, while a good client writes and verifies here: `rounds` times, and on until the
  // daemon has seen `bad_sqes`.
  template <typename F>
  void run_against(F evil, int rounds, uint64_t bad_sqes = 0) {
    const pid_t pid = fork_client(evil);
    kvfs_client* c;
    kvfs_ring* r;
    kvfs_iov v;
    ASSERT_EQ(kvfs_open(sock_.c_str(), &c), 0);
    ASSERT_EQ(kvfs_ring_create(c, 64, &r), 0);
    ASSERT_EQ(kvfs_iov_alloc(c, 1 << 20, 0, &v), 0);
    int ns = kvfs_ns_open(c, "t", "other", 0);
    ASSERT_GE(ns, 0);
    char* m = static_cast<char*>(v.base);
    for (int i = 0; i < rounds || (stats().bad_sqes < bad_sqes && i < 100 * rounds); ++i) {
      uint64_t keys[32];
      kvfs_block b[32] = {};
      for (uint64_t j = 0; j < 32; ++j) {
        keys[j] = uint64_t(i) * 32 + j + 1;
        b[j].key = &keys[j];
        b[j].key_len = 8;
        b[j].len = 8000;
        b[j].value_off = j * 16384;
        memset(m + b[j].value_off, int(keys[j] * 31), 8000);
      }
      ASSERT_EQ(kvfs_put(r, ns, &v, b, 32, 0, 20 * kSec), 32);
      memset(m, 0x55, 1 << 20);
      ASSERT_EQ(kvfs_get(r, ns, &v, b, 32, 20 * kSec), 32);
      for (uint64_t j = 0; j < 32; ++j) {
        for (int k = 0; k < 8000; k += 97) ASSERT_EQ(m[b[j].value_off + k], char(keys[j] * 31));
        for (int k = 8000; k < 16384; k += 61) ASSERT_EQ(m[b[j].value_off + k], 0x55);  // nobody else wrote here
      }
      ASSERT_EQ(kvfs_evict(r, ns, b, 32, 20 * kSec), 32);
    }
    kvfs_close(c);
    kill(pid, SIGKILL);
    int st = 0;
    waitpid(pid, &st, 0);
    EXPECT_TRUE((WIFSIGNALED(st) && WTERMSIG(st) == SIGKILL) || (WIFEXITED(st) && WEXITSTATUS(st) == 0)) << st;
    ASSERT_TRUE(wait_sessions(0));
    auto s = stats();
    EXPECT_EQ(s.rings, 2u);
    EXPECT_EQ(s.iov_bytes, 0u);
  }
  // -1: there is no descriptor left, or nobody listens.
  static int connect_to(const std::string& path) {
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    memcpy(a.sun_path, path.data(), path.size());
    const int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, reinterpret_cast<sockaddr*>(&a), sizeof a) == 0) return fd;
    close(fd);
    return -1;
  }
  static void wake(kvfs_ring* r) {
    uint64_t one = 1;
    (void)!write(r->wake_fd, &one, sizeof one);
  }
};

// Nearly valid SQEs: every field is now and then random.
TEST_F(HostileTest, RandomSqes) {
  run_against(
      [&] {
        std::mt19937_64 rng(getpid());
        kvfs_client* c;
        kvfs_ring* r;
        kvfs_iov v;
        if (kvfs_open(sock_.c_str(), &c) != 0 || kvfs_ring_create(c, 256, &r) != 0 ||
            kvfs_iov_alloc(c, 1 << 20, 0, &v) != 0)
          _exit(1);
        if (kvfs_ns_open(c, "t", "cache", 0) != 0) _exit(2);
        for (;;) {
          while (kvfs_sqe* s = kvfs_prep(r)) {
            s->opcode = uint8_t(rng() % 8 == 0 ? rng() : rng() % 48);
            s->flags = uint8_t(rng() % 8 == 0 ? rng() : rng() & 5);
            s->iov = uint16_t(rng() % 8 == 0 ? rng() : rng() % 16 == 0 ? 0xffff : 0);
            s->handle = uint32_t(rng() % 8 == 0 ? rng() : 0);
            s->iov_off = rng() % 8 == 0 ? rng() : rng() % (1 << 20);
            s->off = rng() % 4 == 0 ? rng() : rng() % 70000;
            s->len = uint32_t(rng() % 8 == 0 ? rng() : rng() % 70000);
            s->key_len = uint8_t(rng() % 8 == 0 ? rng() : 8);
            s->key[0] = uint8_t(rng());
            if (rng() % 16 == 0) s->rsv1[rng() % 24] = 1;
            if (rng() % 16 == 0) s->key[rng() % 32] = uint8_t(rng());
          }
          kvfs_submit(r);
          kvfs_cqe q[64];
          if (kvfs_wait(r, q, 1, 64, kSec) < 0) _exit(3);
        }
      },
      150, 101);
  EXPECT_GT(stats().bad_sqes, 100u);
}

// Random bytes over the whole ring, indices included; a new ring when one is given up.
TEST_F(HostileTest, RandomRingMemory) {
  run_against(
      [&] {
        std::mt19937_64 rng(getpid());
        kvfs_client* c;
        if (kvfs_open(sock_.c_str(), &c) != 0) _exit(1);
        kvfs_iov v;
        if (kvfs_iov_alloc(c, 1 << 20, 0, &v) != 0 || kvfs_ns_open(c, "t", "cache", 0) != 0) _exit(2);
        for (;;) {
          kvfs_ring* r;
          if (kvfs_ring_create(c, 64, &r) != 0) _exit(3);
          auto* h = static_cast<kvfs_ring_hdr*>(r->mem);
          for (int i = 0; i < 300; ++i) {
            auto* p = static_cast<volatile uint8_t*>(r->mem);
            for (int k = 0; k < 200; ++k) p[rng() % r->bytes] = uint8_t(rng());
            if (i % 4 == 0) h->sq_tail = uint32_t(h->sq_head + rng() % 65);
            if (i % 8 == 0) h->cq_head = h->cq_tail;
            wake(r);
          }
          kvfs_ring_destroy(r);
        }
      },
      100);
  EXPECT_GT(stats().broken_rings, 0u);
}

// Two threads flip SQE bytes (opcode, iov, offsets) while the daemon copies and checks them.
TEST_F(HostileTest, RacingSqes) {
  run_against(
      [&] {
        kvfs_client* c;
        kvfs_ring* r;
        kvfs_iov v;
        if (kvfs_open(sock_.c_str(), &c) != 0 || kvfs_ring_create(c, 64, &r) != 0 ||
            kvfs_iov_alloc(c, 1 << 20, 0, &v) != 0 || kvfs_ns_open(c, "t", "cache", 0) != 0)
          _exit(1);
        auto* sqes = reinterpret_cast<kvfs_sqe*>(static_cast<char*>(r->mem) + sizeof(kvfs_ring_hdr));
        std::thread flip([&] {
          std::mt19937_64 rng(7);
          for (;;) {
            kvfs_sqe& s = sqes[rng() % 64];
            __atomic_store_n(&s.iov_off, rng() % 2 ? 0 : rng(), __ATOMIC_RELAXED);
            __atomic_store_n(&s.len, uint32_t(rng() % 2 ? 4096 : rng()), __ATOMIC_RELAXED);
            __atomic_store_n(&s.iov, uint16_t(rng() % 2 ? 0 : rng()), __ATOMIC_RELAXED);
            __atomic_store_n(&s.opcode, uint8_t(rng() % 10), __ATOMIC_RELAXED);
            static_cast<volatile char*>(v.base)[rng() % (1 << 20)] = char(rng());
          }
        });
        for (uint64_t i = 0;; ++i) {
          kvfs_cqe q[64];
          if (kvfs_prep_block(r, KVFS_OP_PUT, 0, 0, &i, 8, v.id, 0, 0, 4096, i) == -EAGAIN) {
            kvfs_submit(r);
            if (kvfs_wait(r, q, 1, 64, kSec) < 0) _exit(3);
          }
        }
      },
      150);
}

// Garbage, floods and half-open connections on the control socket.
TEST_F(HostileTest, ControlSocketGarbage) {
  run_against(
      [&] {
        std::mt19937_64 rng(getpid());
        for (uint64_t i = 0;; ++i) {
          const int fd = connect_to(i % 4 == 0 ? sock_ + ".fd" : sock_);
          if (fd < 0) _exit(1);
          for (int k = 0; k < 5; ++k) {
            kvfs::CtlRequest q{};
            q.magic = kvfs::kCtlMagic;
            q.version = kvfs::kCtlVersion;
            q.type = uint16_t(rng() % 12);
            if (q.type == uint16_t(kvfs::Ctl::NsOpen)) q.type = 0;  // would fill the upcall queue, which is bounded
            q.id = uint32_t(rng() % 4 == 0 ? rng() : 0);
            q.a = rng() % 2 ? 64 : rng();
            q.flags = uint32_t(rng() % 3);
            if (rng() % 8 == 0) reinterpret_cast<uint8_t*>(&q)[rng() % sizeof q] ^= uint8_t(rng());
            char buf[300] = {};
            memcpy(buf, &q, sizeof q);
            size_t n = rng() % 8 == 0 ? 1 + rng() % 300 : sizeof q;
            if (send(fd, buf, n, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) break;
            if (rng() % 2) (void)!recv(fd, buf, sizeof buf, MSG_DONTWAIT);
          }
          close(fd);
        }
      },
      100);
}

// Gigabytes are asked for and abandoned: nobody waits for their pages, and none stay.
TEST_F(HostileTest, MemoryAbandoned) {
  run_against(
      [&] {
        for (;;) {
          kvfs_client* c;
          if (kvfs_open(sock_.c_str(), &c) != 0) _exit(1);
          kvfs::CtlRequest q;
          kvfs::init_request(&q, kvfs::Ctl::IovCreate);
          q.a = uint64_t(3) << 30;
          (void)!send(c->sock, &q, sizeof q, MSG_NOSIGNAL);
          usleep(2000);
          kvfs_close(c);
        }
      },
      100);
}

TEST_F(HostileTest, SessionsHoarded) {
  run_against(
      [&] {
        for (;;) {
          if (connect_to(sock_) < 0) pause();
        }
      },
      20);
}

}  // namespace
