// server_test.cpp tests the node's own rings (inode and namespace operations) and file handles of other processes.
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "../ring/unix_address.h"
#include "node_fixture.h"

namespace {

class ServerTest : public NodeTest {
 protected:
  int64_t inode(uint8_t op, uint64_t ino, uint64_t off, const void* mem = nullptr, uint32_t len = 0) {
    kvfs_sqe s = inode_sqe(op, ino, off, mem, len);
    return kvfs_node_call(node_, &s, 20 * kSec);
  }
  int64_t block(uint8_t op, uint32_t ns, const std::string& key, void* mem, uint32_t len) {
    kvfs_sqe s{};
    s.opcode = op;
    s.handle = ns;
    s.iov = KVFS_IOV_INPROC;
    s.iov_off = reinterpret_cast<uintptr_t>(mem);
    s.len = len;
    s.key_len = uint8_t(key.size());
    memcpy(s.key, key.data(), key.size());
    return kvfs_node_call(node_, &s, 20 * kSec);
  }
};

// Random writes, truncations and reads of one inode against a plain string.
TEST_F(ServerTest, InodeAgainstModel) {
  std::mt19937_64 rng(1);
  std::string model;
  ASSERT_EQ(kvfs_node_inode_open(node_, 7, 0), 0);
  std::vector<char> buf(400000);
  for (int step = 0; step < 4000; ++step) {
    uint64_t off = rng() % (step % 4 == 0 ? 20000 : 600000);
    uint32_t len = uint32_t(rng() % (step % 3 == 0 ? 300000 : step % 3 == 1 ? 5000 : 50));
    switch (rng() % 4) {
      case 0:
      case 1: {
        for (uint32_t i = 0; i < len; ++i) buf[i] = char(rng());
        ASSERT_EQ(inode(KVFS_OP_INODE_WRITE, 7, off, buf.data(), len), int64_t(len));
        if (len > 0) {
          if (model.size() < off + len) model.resize(off + len, 0);
          memcpy(model.data() + off, buf.data(), len);
        }
        break;
      }
      case 2: {
        int64_t want = off >= model.size() ? 0 : std::min<int64_t>(len, int64_t(model.size() - off));
        ASSERT_EQ(inode(KVFS_OP_INODE_READ, 7, off, buf.data(), len), want) << step;
        if (want > 0) {
          ASSERT_EQ(memcmp(buf.data(), model.data() + off, size_t(want)), 0) << step;
        }
        break;
      }
      default:
        if (step % 5 == 0) {
          ASSERT_EQ(inode(KVFS_OP_INODE_TRUNCATE, 7, off), 0);
          model.resize(off, 0);
        } else if (step % 7 == 0) {
          ASSERT_EQ(inode(KVFS_OP_INODE_FSYNC, 7, 0), 0);
        }
        break;
    }
    ASSERT_EQ(kvfs_node_inode_size(node_, 7), int64_t(model.size()));
  }
  uint64_t size = 0, written_ns = 0;
  ASSERT_EQ(inode(KVFS_OP_INODE_LAND, 7, 0), 0);
  ASSERT_EQ(kvfs_node_inode_take(node_, 7, &size, &written_ns), 0);
  EXPECT_EQ(size, model.size());
  EXPECT_NE(written_ns, 0u);
  ASSERT_EQ(kvfs_node_inode_take(node_, 7, &size, &written_ns), 0);
  EXPECT_EQ(written_ns, 0u);
  ASSERT_EQ(inode(KVFS_OP_INODE_FSYNC, 7, 0), 0);
  // After a restart the same bytes.
  stop();
  start();
  ASSERT_EQ(kvfs_node_inode_open(node_, 7, model.size()), 0);
  std::string all(model.size(), 1);
  ASSERT_EQ(inode(KVFS_OP_INODE_READ, 7, 0, all.data(), uint32_t(all.size())), int64_t(all.size()));
  ASSERT_EQ(all, model);
  ASSERT_EQ(inode(KVFS_OP_INODE_DELETE, 7, model.size()), 0);
  ASSERT_EQ(stats().file_chunks, 0u);
  EXPECT_EQ(kvfs_node_inode_close(node_, 7), 0);
  EXPECT_EQ(inode(KVFS_OP_INODE_READ, 7, 0, all.data(), 10), -EBADF);
}

TEST_F(ServerTest, HugeSparseFile) {
  ASSERT_EQ(kvfs_node_inode_open(node_, 8, 0), 0);
  char x[10] = "123456789";
  uint64_t far = uint64_t(1) << 60;
  ASSERT_EQ(inode(KVFS_OP_INODE_WRITE, 8, 5, x, 10), 10);
  ASSERT_EQ(inode(KVFS_OP_INODE_WRITE, 8, far, x, 10), 10);
  ASSERT_EQ(inode(KVFS_OP_INODE_WRITE, 8, INT64_MAX - 5, x, 10), -EFBIG);
  std::string hole(30u << 20, 1);
  ASSERT_EQ(inode(KVFS_OP_INODE_READ, 8, 1u << 20, hole.data(), uint32_t(hole.size())), int64_t(hole.size()));
  ASSERT_EQ(hole.find_first_not_of('\0'), std::string::npos);
  ASSERT_EQ(inode(KVFS_OP_INODE_TRUNCATE, 8, 10), 0);
  ASSERT_EQ(inode(KVFS_OP_INODE_LAND, 8, 0), 0);
  EXPECT_EQ(stats().file_chunks, 1u);
  char y[20] = {};
  ASSERT_EQ(inode(KVFS_OP_INODE_READ, 8, 0, y, 20), 10);
  EXPECT_EQ(memcmp(y + 5, x, 5), 0);
  ASSERT_EQ(inode(KVFS_OP_INODE_DELETE, 8, far + 10), 0);
  EXPECT_EQ(stats().file_chunks, 0u);
}

TEST_F(ServerTest, NamespaceDeleteLeavesOthers) {
  std::string v(5000, 'v');
  for (int i = 0; i < 500; ++i) {
    ASSERT_EQ(block(KVFS_OP_PUT, 1, "k" + std::to_string(i), v.data(), 5000), 1);
    ASSERT_EQ(block(KVFS_OP_PUT, 2, "k" + std::to_string(i), v.data(), 100), 1);
  }
  kvfs_sqe s{};
  s.opcode = KVFS_OP_NS_DELETE;
  s.handle = 1;
  ASSERT_EQ(kvfs_node_call(node_, &s, 20 * kSec), 0);
  for (int i = 0; i < 500; ++i) {
    ASSERT_EQ(block(KVFS_OP_EXISTS, 1, "k" + std::to_string(i), nullptr, 0), -ENOENT);
    ASSERT_EQ(block(KVFS_OP_EXISTS, 2, "k" + std::to_string(i), nullptr, 0), 100);
  }
  s.opcode = KVFS_OP_SYNC;
  ASSERT_EQ(kvfs_node_call(node_, &s, 20 * kSec), 0);
  s.opcode = KVFS_OP_CHECKPOINT;
  ASSERT_EQ(kvfs_node_call(node_, &s, 20 * kSec), 0);
}

TEST_F(ServerTest, SubmitReapWithEventFd) {
  constexpr int kN = 10000;
  std::vector<bool> seen(kN);
  int sent = 0, got = 0;
  while (got < kN) {
    while (sent < kN) {
      kvfs_sqe s{};
      s.opcode = KVFS_OP_NOP;
      s.user_data = uint64_t(sent);
      if (kvfs_node_submit(node_, &s, 1) != 1) break;
      ++sent;
    }
    pollfd p{kvfs_node_event_fd(node_), POLLIN, 0};
    ASSERT_EQ(poll(&p, 1, 5000), 1);
    kvfs_cqe c[100];
    int n = kvfs_node_reap(node_, c, 100);
    ASSERT_GE(n, 0);
    for (int i = 0; i < n; ++i) {
      ASSERT_EQ(c[i].result, 0);
      ASSERT_FALSE(seen[c[i].user_data]);
      seen[c[i].user_data] = true;
    }
    got += n;
  }
}

TEST_F(ServerTest, FileHandles) {
  std::string path = dir_ + "/file";
  int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  ASSERT_GE(fd, 0);
  struct stat st;
  ASSERT_EQ(fstat(fd, &st), 0);
  kvfs_client* c;
  ASSERT_EQ(kvfs_open(sock_.c_str(), &c), 0);
  EXPECT_EQ(kvfs_file_register(c, fd), -ESTALE);  // not open in the mount
  ASSERT_EQ(kvfs_node_inode_open(node_, st.st_ino, 0), 0);
  int h = kvfs_file_register(c, fd);
  ASSERT_GE(h, 0);
  int ro = open(path.c_str(), O_RDONLY | O_CLOEXEC), op = open(path.c_str(), O_PATH | O_CLOEXEC);
  int hr = kvfs_file_register(c, ro);
  ASSERT_GE(hr, 0);
  EXPECT_EQ(kvfs_file_register(c, op), -EBADF);
  int other = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(kvfs_file_register(c, other), -EXDEV);
  for (int f : {fd, ro, op, other}) close(f);
  kvfs_ring* r;
  kvfs_iov v;
  ASSERT_EQ(kvfs_ring_create(c, 8, &r), 0);
  ASSERT_EQ(kvfs_iov_alloc(c, 1 << 20, 0, &v), 0);
  auto call = [&](uint8_t op_, int handle, uint64_t off, uint32_t len, uint64_t at) {
    kvfs_sqe* s = kvfs_prep(r);
    s->opcode = op_;
    s->handle = uint32_t(handle);
    s->iov = v.id;
    s->iov_off = at;
    s->off = off;
    s->len = len;
    kvfs_submit(r);
    kvfs_cqe q{};
    EXPECT_EQ(kvfs_wait(r, &q, 1, 1, 10 * kSec), 1);
    return q.result;
  };
  char* m = static_cast<char*>(v.base);
  for (int i = 0; i < 200000; ++i) m[i] = char(i * 7);
  EXPECT_EQ(call(KVFS_OP_WRITE, h, 1000, 200000, 0), 200000);
  EXPECT_EQ(call(KVFS_OP_WRITE, hr, 0, 10, 0), -EBADF);
  std::thread store([this] { answer_upcall(KVFS_UPCALL_STORE, 0); });  // the file has grown
  EXPECT_EQ(call(KVFS_OP_FSYNC, h, 0, 0, 0), 0);
  store.join();
  EXPECT_EQ(call(KVFS_OP_FSYNC, h, 0, 0, 0), 0);  // and is known to: nobody is asked
  EXPECT_EQ(call(KVFS_OP_READ, hr, 1000, 300000, 300000), 200000);
  EXPECT_EQ(memcmp(m, m + 300000, 200000), 0);
  // The mount's side sees the same bytes.
  std::string in(201000, 1);
  EXPECT_EQ(inode(KVFS_OP_INODE_READ, st.st_ino, 0, in.data(), 201000), 201000);
  EXPECT_EQ(memcmp(in.data() + 1000, m, 200000), 0);
  EXPECT_EQ(kvfs_file_unregister(c, hr), 0);
  EXPECT_EQ(call(KVFS_OP_READ, hr, 0, 1, 0), -EBADF);
  EXPECT_EQ(call(KVFS_OP_READ, h, 0, 1, 0), 1);
  kvfs_close(c);
  ASSERT_TRUE(wait_sessions(0));
  EXPECT_EQ(kvfs_node_inode_close(node_, st.st_ino), 0);  // the session's references are gone
}

// A client keeps its connection for descriptors. The daemon closes the oldest when too many come: the client makes another.
TEST_F(ServerTest, DescriptorsAfterTheirConnectionWasClosed) {
  const std::string path = dir_ + "/file";
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  ASSERT_GE(fd, 0);
  struct stat st;
  ASSERT_EQ(fstat(fd, &st), 0);
  ASSERT_EQ(kvfs_node_inode_open(node_, st.st_ino, 0), 0);
  kvfs_client* c;
  ASSERT_EQ(kvfs_open(sock_.c_str(), &c), 0);
  const auto open_now = [] {
    const auto all = std::filesystem::directory_iterator("/proc/self/fd");
    return std::distance(begin(all), end(all));
  };
  std::vector<int> others;
  sockaddr_un addr{};
  addr.sun_family = AF_UNIX;
  const std::string to = sock_ + ".fd";
  memcpy(addr.sun_path, to.data(), to.size());
  ptrdiff_t descriptors = 0;
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < 70; ++i) {
      const int s = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
      ASSERT_EQ(connect(s, reinterpret_cast<sockaddr*>(&addr), sizeof addr), 0);
      others.push_back(s);
      if (i % 16 != 15 && i != 69) continue;
      const int h = kvfs_file_register(c, fd);
      ASSERT_GE(h, 0) << round << " " << i;
      EXPECT_EQ(kvfs_file_unregister(c, h), 0);
      EXPECT_EQ(kvfs_file_register(c, 1 << 20), -EBADF);  // not a descriptor: the connection stays
    }
    for (int s : others) close(s);
    others.clear();
    usleep(20000);  // the node, which is this process, closes its ends
    if (round == 1) descriptors = open_now();
    if (round > 1) {
      EXPECT_LE(open_now(), descriptors + 2);
    }
  }
  kvfs_close(c);
  close(fd);
  ASSERT_TRUE(wait_sessions(0));
  EXPECT_EQ(kvfs_node_inode_close(node_, st.st_ino), 0);
}

// A program's timers go off while it waits for a daemon that is slow to accept: kvfs_open goes on, and says what came of it.
TEST_F(ServerTest, AConnectThatSignalsInterruptGoesOn) {
  const std::string path = dir_ + "/slow";
  const int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  ASSERT_EQ(kvfs::UnixAddress(path.c_str()).listen_on(listener, 0), 0);
  const int first = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  ASSERT_EQ(kvfs::UnixAddress(path.c_str()).connect_to(first), 0);  // takes the only place
  static std::atomic<int> signals{0};
  signals = 0;
  struct sigaction act {
  }, old{};
  act.sa_handler = [](int) { signals.fetch_add(1); };
  act.sa_flags = SA_RESTART;
  ASSERT_EQ(sigaction(SIGUSR1, &act, &old), 0);
  const pthread_t caller = pthread_self();
  std::thread daemon([&] {
    for (int i = 0; i < 20; ++i) {
      pthread_kill(caller, SIGUSR1);
      usleep(10000);
    }
    close(accept(listener, nullptr, nullptr));
    const int ours = accept(listener, nullptr, nullptr);
    for (int i = 0; i < 20; ++i) {
      pthread_kill(caller, SIGUSR1);
      usleep(10000);
    }
    close(ours);
    close(listener);
  });
  kvfs_client* c = nullptr;
  EXPECT_EQ(kvfs_open(path.c_str(), &c), -EREMOTEIO);  // the accepted connection was closed without an answer
  daemon.join();
  EXPECT_GE(signals.load(), 20);
  close(first);
  sigaction(SIGUSR1, &old, nullptr);
}

TEST_F(ServerTest, ErrorsOfStart) {
  char err[256] = "";
  kvfs_node_config c{};
  kvfs_node* n = nullptr;
  c.data_path = "/nonexistent/data";
  EXPECT_LT(kvfs_node_start(&c, &n, err, sizeof err), 0);
  EXPECT_NE(err[0], 0);
  std::string in_use = data_;
  c.data_path = in_use.c_str();
  err[0] = 0;
  EXPECT_EQ(kvfs_node_start(&c, &n, err, sizeof err), -EBUSY);
  EXPECT_NE(err[0], 0);
}

}  // namespace
