// store_kill_test.cpp kills a process that writes to a real store and checks what is left: each acknowledged durable change
// is there bit for bit, and a change that was not acknowledged happened whole or not at all.
//
// The child tells through a pipe what it begins and what was acknowledged; both sides feed these messages to a Model.
#include <errno.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../store/check.h"
#include "../store/store.h"
#include "../store/uring_device.h"
#include "sim_device.h"

namespace kvfs {
namespace {

using Bytes = std::vector<uint8_t>;
using State = std::shared_ptr<const Bytes>;  // nullptr: no such chunk
using Op = Request::Op;

constexpr int kRounds = 15;
constexpr uint64_t kDeviceBytes = 192u << 20;
constexpr uint32_t kBlocks = 120, kFiles = 40, kKeys = kBlocks + kFiles;
constexpr uint32_t kInFlight = 24;
constexpr uint32_t kSizes[] = {1, 512, 4096, 5000, 16384, 16384, 20000, 65536, 200000, (1u << 20) + 12345};
constexpr uint32_t kLargest = (1u << 20) + 12345;

uint64_t now_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
}

void fill(uint8_t* p, uint32_t n, uint64_t seed) {
  Rng rng(seed);
  for (uint32_t i = 0; i < n; i += 8) {
    const uint64_t v = rng.next();
    std::memcpy(p + i, &v, std::min<uint32_t>(8, n - i));
  }
}

ChunkKey chunk_key(uint32_t n) {
  ChunkKey k;
  const uint64_t id = n;
  std::memcpy(k.id, &id, sizeof id);
  k.kind = n < kBlocks ? Kind::Block : Kind::File;
  k.key_len = n < kBlocks ? 8 : 16;
  k.ns = n < kBlocks ? 1 : 0;
  return k;
}

struct Msg {  // smaller than PIPE_BUF: written whole or not at all
  enum What : uint8_t { Ready, Intent, Ack, Bad } what;
  Op op;
  bool durable;
  uint32_t key;
  uint32_t off, len;
  uint64_t seed;
  int64_t result;
};

// Per key, the states it went through; those from `lo` on are legal after a kill.
struct Model {
  struct Key {
    std::vector<State> states{nullptr};
    size_t acked = 0, lo = 0;
  };
  std::vector<Key> keys = std::vector<Key>(kKeys);
  std::vector<size_t> at_sync = std::vector<size_t>(kKeys);
  uint64_t acks = 0;

  const State& now(uint32_t k) const { return keys[k].states.back(); }

  void feed(const Msg& m) {
    if (m.op == Op::Sync) {  // everything acknowledged before it began
      for (uint32_t k = 0; k < kKeys; k++) {
        if (m.what == Msg::Intent) at_sync[k] = keys[k].acked;
        if (m.what == Msg::Ack) keys[k].lo = std::max(keys[k].lo, at_sync[k]);
      }
      return;
    }
    Key& key = keys[m.key];
    if (m.what == Msg::Intent) {
      key.states.push_back(after(key.states.back(), m));
    } else {
      acks++;
      key.acked = key.states.size() - 1;
      if (m.durable) key.lo = key.acked;
    }
  }

  static State after(const State& old, const Msg& m) {
    if (m.op == Op::Delete || (m.op == Op::Truncate && m.off == 0)) return nullptr;
    auto b = old ? std::make_shared<Bytes>(*old) : std::make_shared<Bytes>();
    if (m.op == Op::Truncate) {
      if (!old) return nullptr;
      if (m.off < b->size()) b->resize(m.off);
      return b;
    }
    if (b->size() < m.off + m.len) b->resize(m.off + m.len);
    fill(b->data() + m.off, m.len, m.seed);
    return b;
  }

  // After a restart: what is there now is all there is.
  void settle(uint32_t k, const State& s) {
    keys[k] = Key{};
    keys[k].states[0] = s;
  }
};

struct Opened {
  std::unique_ptr<Uring> ring;
  std::unique_ptr<UringDevice> dev;
  std::unique_ptr<Store> store;

  // The kernel lets go of a killed process's file, and so of its lock, when its last operation has ended.
  Status device(const std::string& path, uint64_t create) {
    if (Status s = Uring::create({}, &ring); s.err) return s;
    DeviceOptions opt;
    opt.create_bytes = create;
    opt.allow_buffered = true;
    const uint64_t until = now_ns() + 5000000000u;
    Status s = UringDevice::open(*ring, path, opt, &dev);
    while (s.err == EBUSY && now_ns() < until) {
      usleep(2000);
      s = UringDevice::open(*ring, path, opt, &dev);
    }
    return s;
  }
  Status open(const std::string& path, bool read_only) {
    if (Status s = device(path, 0); s.err) return s;
    StoreOptions opt;
    opt.read_only = read_only;
    opt.lazy_ms = 50;
    return Store::open(*dev, opt, &store);
  }
  void turn() {
    store->tick(now_ns());
    dev->poll(!store->busy() && dev->inflight() > 0);
  }
  int64_t get(const ChunkKey& key, uint8_t* mem, uint32_t len) {
    Request r;
    bool done = false;
    r.op = Op::Get;
    r.key = key;
    r.len = len;
    r.mem = {mem, -1};
    r.owner = &done;
    r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
    store->submit(&r);
    while (!done) turn();
    return r.result;
  }
};

// The process that gets killed.
class Child {
 public:
  Child(const std::string& path, int out, Model& model, uint64_t seed)
      : path_(path), out_(out), model_(model), rng_(seed), ops_(kInFlight), busy_(kKeys) {}

  [[noreturn]] void run() {
    if (Status s = o_.open(path_, false); s.err) bad(s.err);
    send({Msg::Ready, Op::Get, false, 0, 0, 0, 0, 0});
    for (Slot& s : ops_) {
      void* p = nullptr;
      KVFS_CHECK(posix_memalign(&p, 4096, (kLargest + 8191) / 4096 * 4096) == 0);
      s.mem = static_cast<uint8_t*>(p);
      s.child = this;
    }
    for (;;) {
      for (Slot& s : ops_)
        if (!s.active) begin(s);
      o_.turn();
    }
  }

 private:
  struct Slot {
    Request r;
    Msg m;
    uint8_t* mem = nullptr;
    bool active = false;
    Child* child = nullptr;
  };

  void send(const Msg& m) {
    if (write(out_, &m, sizeof m) != static_cast<ssize_t>(sizeof m)) _exit(3);
  }
  [[noreturn]] void bad(int64_t result) {
    send({Msg::Bad, Op::Get, false, 0, 0, 0, 0, result});
    _exit(2);
  }

  void begin(Slot& s) {
    const auto k = static_cast<uint32_t>(rng_.below(kKeys));
    Msg m{Msg::Intent, Op::Get, rng_.below(4) != 0, k, 0, 0, rng_.next(), 0};
    if (!sync_ && rng_.below(200) == 0) {
      m.op = Op::Sync;
      sync_ = true;
    } else if (busy_[k]) {
      return;
    } else if (model_.now(k) && rng_.below(4) == 0) {
      m.len = kLargest;
    } else if (k < kBlocks) {
      m.op = model_.now(k) ? Op::Delete : Op::Put;
      if (m.op == Op::Put) m.len = kSizes[rng_.below(std::size(kSizes))];
    } else if (rng_.below(8) == 0) {
      m.op = Op::Truncate;
      m.off = static_cast<uint32_t>(rng_.below(3) * 10000);
    } else {
      m.op = Op::Write;
      m.off = rng_.below(2) ? 0 : static_cast<uint32_t>(rng_.below(kFileChunk - 1));
      m.len = static_cast<uint32_t>(1 + rng_.below(kFileChunk - m.off));
    }
    if (m.op != Op::Sync) busy_[k] = true;
    if (m.op != Op::Get) {
      send(m);
      model_.feed(m);
    }
    if (m.op == Op::Put || m.op == Op::Write) fill(s.mem, m.len, m.seed);
    s.m = m;
    s.active = true;
    s.r = Request{};
    s.r.op = m.op;
    s.r.flags = m.durable ? Request::kDurable : 0;
    s.r.key = chunk_key(k);
    s.r.off = m.off;
    s.r.len = m.len;
    s.r.mem = {s.mem, -1};
    s.r.owner = &s;
    s.r.done = [](Request* r) {
      Slot* slot = static_cast<Slot*>(r->owner);
      slot->child->end(*slot);
    };
    o_.store->submit(&s.r);
  }

  void end(Slot& s) {
    const int64_t want = s.m.op == Op::Put ? 1 : s.m.op == Op::Write ? s.m.len : 0;
    if (s.m.op == Op::Get) {
      const State& state = model_.now(s.m.key);
      if (s.r.result != static_cast<int64_t>(state->size())) bad(s.r.result < 0 ? s.r.result : -EILSEQ);
      if (std::memcmp(s.mem, state->data(), state->size()) != 0) bad(-EILSEQ);
    } else {
      if (s.r.result != want) bad(s.r.result < 0 ? s.r.result : -EPROTO);
      Msg m = s.m;
      m.what = Msg::Ack;
      send(m);
      model_.feed(m);
    }
    if (s.m.op == Op::Sync)
      sync_ = false;
    else
      busy_[s.m.key] = false;
    s.active = false;
  }

  std::string path_;
  int out_;
  Model& model_;
  Rng rng_;
  Opened o_;
  std::vector<Slot> ops_;
  std::vector<bool> busy_;
  bool sync_ = false;
};

class StoreKill : public testing::Test {
 protected:
  void SetUp() override {
    const char* base = std::getenv("TMPDIR");
    dir_ = std::string(base != nullptr ? base : "/tmp") + "/kvfs-kill-XXXXXX";
    ASSERT_NE(mkdtemp(dir_.data()), nullptr);
    path_ = dir_ + "/store";
    Opened o;
    const Status s = o.device(path_, kDeviceBytes);
    if (s.err == ENOSYS || s.err == EPERM) GTEST_SKIP() << s.message;
    ASSERT_EQ(s.err, 0) << s.message;
    direct_ = o.dev->direct();
    FormatOptions f;  // small journal and segments: checkpoints and reuse happen all the time
    f.segment_bytes = 1u << 20;
    f.journal_bytes = 1u << 20;
    ASSERT_EQ(Store::format(*o.dev, f).err, 0);
  }
  void TearDown() override {
    unlink(path_.c_str());
    rmdir(dir_.c_str());
  }

  // Runs a child for `ms` after it is ready (or after its start) and kills it; the model learns what the child told.
  void run_and_kill(uint64_t seed, uint64_t ms, bool from_start) {
    int fd[2];
    ASSERT_EQ(pipe(fd), 0);
    const pid_t parent = getpid();
    const pid_t pid = fork();
    ASSERT_GE(pid, 0);
    if (pid == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (getppid() != parent) _exit(4);
      close(fd[0]);
      Child(path_, fd[1], model_, seed).run();
    }
    close(fd[1]);
    uint64_t until = now_ns() + (from_start ? ms * 1000000u : 10000000000u);
    bool ready = from_start, ended = false;
    Bytes buf(64 * sizeof(Msg));
    size_t have = 0;
    for (bool killed = false; !ended;) {
      const uint64_t now = now_ns();
      if (!killed && now >= until) {
        kill(pid, SIGKILL);
        killed = true;
      }
      pollfd p{fd[0], POLLIN, 0};
      const int wait = killed ? -1 : static_cast<int>(std::min<uint64_t>((until - now) / 1000000u + 1, 1000));
      if (::poll(&p, 1, wait) <= 0) continue;
      const ssize_t n = read(fd[0], buf.data() + have, buf.size() - have);
      if (n <= 0) {
        ended = true;
        break;
      }
      have += static_cast<size_t>(n);
      size_t at = 0;
      for (; have - at >= sizeof(Msg); at += sizeof(Msg)) {
        Msg m;
        std::memcpy(&m, buf.data() + at, sizeof m);
        if (m.what == Msg::Bad) {
          ADD_FAILURE() << "the child saw a wrong result: " << m.result << " "
                        << std::strerror(static_cast<int>(-m.result));
        } else if (m.what == Msg::Ready) {
          if (!ready) until = now_ns() + ms * 1000000u;
          ready = true;
        } else {
          model_.feed(m);
        }
      }
      std::memmove(buf.data(), buf.data() + at, have - at);
      have -= at;
    }
    close(fd[0]);
    int status = 0;
    ASSERT_EQ(waitpid(pid, &status, 0), pid);
    EXPECT_TRUE(ready) << "the child did not open the store within 10 s";
    EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << "the child ended by itself: " << status;
  }

  // Opens what is left, compares it with the model, and makes it the model.
  void verify(bool read_only) {
    Opened o;
    const Status s = o.open(path_, read_only);
    ASSERT_EQ(s.err, 0) << s.message;
    void* mem = nullptr;
    ASSERT_EQ(posix_memalign(&mem, 4096, 2u << 20), 0);
    for (uint32_t k = 0; k < kKeys; k++) {
      const auto& key = model_.keys[k];
      const int64_t n = o.get(chunk_key(k), static_cast<uint8_t*>(mem), 2u << 20);
      ASSERT_TRUE(n >= 0 || n == -ENOENT) << "key " << k << ": " << n;
      size_t match = SIZE_MAX;
      for (size_t i = 0; i < key.states.size(); i++) {  // the newest that fits
        const State& state = key.states[i];
        if (n < 0 ? state == nullptr
                  : state && n == static_cast<int64_t>(state->size()) &&
                        std::memcmp(mem, state->data(), state->size()) == 0)
          match = i;
      }
      EXPECT_NE(match, SIZE_MAX) << "key " << k << " has bytes that were never written together, length " << n;
      EXPECT_GE(match, key.lo) << "key " << k << " lost an acknowledged change, length " << n;
      if (match != SIZE_MAX) model_.settle(k, State(key.states[match]));
    }
    free(mem);
    std::set<uint64_t> seen;
    for (Kind kind : {Kind::Block, Kind::File}) {
      uint64_t cursor = 0;
      while (o.store->scan(&cursor, 1000, kind, UINT32_MAX, [&](const ChunkInfo& info) {
        uint64_t id;
        std::memcpy(&id, info.key.id, sizeof id);
        EXPECT_TRUE(id < kKeys && info.key == chunk_key(static_cast<uint32_t>(id)) && seen.insert(id).second);
        const State state = id < kKeys ? model_.now(static_cast<uint32_t>(id)) : nullptr;
        EXPECT_EQ(info.length, state ? state->size() : 0);
        return true;
      })) {
      }
    }
    size_t present = 0;
    for (uint32_t k = 0; k < kKeys; k++) present += model_.now(k) != nullptr;
    EXPECT_EQ(seen.size(), present);
    EXPECT_EQ(o.store->stats().chunks, present);
    EXPECT_EQ(o.store->stats().checksum_errors, 0u);
    EXPECT_EQ(o.store->close().err, 0);
  }

  std::string dir_, path_;
  Model model_;
  bool direct_ = false;
};

TEST_F(StoreKill, AcknowledgedSurvivesKill) {
  const uint64_t seed = now_ns();
  SCOPED_TRACE("seed " + std::to_string(seed));
  Rng rng(seed);
  const uint64_t began = now_ns();
  for (int round = 0; round < kRounds; round++) {
    SCOPED_TRACE("round " + std::to_string(round));
    // Every fourth is killed soon after its start, often during recovery.
    const bool from_start = round % 4 == 3;
    run_and_kill(rng.next(), from_start ? rng.below(30) : 20 + rng.below(400), from_start);
    if (HasFailure()) break;
    // Read-only leaves the recovery to the next child, or to the next verification.
    verify(round % 2 == 1);
    if (HasFailure()) break;
  }
  verify(false);
  EXPECT_GT(model_.acks, 200u) << "too little was written for the test to mean anything";
  std::printf("%d kills, %llu changes acknowledged, %s, %.1f s\n", kRounds,
              static_cast<unsigned long long>(model_.acks), direct_ ? "O_DIRECT" : "buffered",
              static_cast<double>(now_ns() - began) / 1e9);
}

}  // namespace
}  // namespace kvfs
