// net_bench.cpp measures TCP channels alone over loopback: a server channel that answers from memory and a client channel, a
// thread each, beside a plain blocking sender and receiver of messages of the same size. Usage: net_bench [SECONDS per figure].
// One line per figure: operations and MB per second, CPU per operation of both threads, io_uring operations of the client per
// operation, copied bytes. The plain pair runs before and after each 1 MiB figure, and the ratio is the median of rounds.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../store/check.h"
#include "../transport/tcp_client.h"
#include "../transport/tcp_server.h"

using namespace kvfs;

namespace {

constexpr int kRounds = 5;  // of pairs; their median ratio is told

double seconds(clockid_t clock) {
  timespec ts;
  clock_gettime(clock, &ts);
  return static_cast<double>(ts.tv_sec) + static_cast<double>(ts.tv_nsec) / 1e9;
}

void pair(int out[2]) {
  const int l = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in a{};
  a.sin_family = AF_INET;
  a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t n = sizeof a;
  KVFS_CHECK(bind(l, reinterpret_cast<sockaddr*>(&a), n) == 0 && listen(l, 1) == 0);
  getsockname(l, reinterpret_cast<sockaddr*>(&a), &n);
  out[0] = socket(AF_INET, SOCK_STREAM, 0);
  KVFS_CHECK(connect(out[0], reinterpret_cast<sockaddr*>(&a), n) == 0);
  out[1] = accept(l, nullptr, nullptr);
  for (const int i : {0, 1}) {
    const int one = 1;
    setsockopt(out[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  }
  close(l);
}

// Answers every Get from one of a few places in a region that no cache holds.
class Memory : public ChannelHandler {
 public:
  static constexpr size_t kBytes = 256u << 20;
  Memory(bool sums, uint32_t len) : sums_(sums), len_(len), bytes_(kBytes) {
    for (size_t i = 0; i < kBytes; i += 8) bytes_[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    if (sums_)  // as a store has them: it verified what it read
      for (size_t i = 0; i + len <= kBytes; i += len) sum_.push_back(wire::data_sum(&bytes_[i], len));
  }
  bool buffer(ServerOp*) override { return false; }
  void take(ServerOp* op, int err) override {
    KVFS_CHECK(err == 0);
    rng_ = rng_ * 6364136223846793005u + 1442695040888963407u;
    const size_t i = (rng_ >> 33) % (kBytes / len_);
    op->buf = &bytes_[i * len_];
    op->buf_len = op->out_len = len_;
    op->result = len_;
    if (sums_) op->out_sum = sum_[i];
    op->channel->reply(op);
  }
  void cancel(ServerChannel*, uint64_t) override {}
  void released(ServerOp*) override {}
  void ended(ServerChannel*, int) override {}

 private:
  bool sums_;
  uint32_t len_;
  std::vector<uint8_t> bytes_;
  std::vector<uint64_t> sum_;
  uint64_t rng_ = 1;
};

double gets(const char* name, uint32_t len, uint32_t batch, uint32_t depth, bool sums, double secs) {
  int fd[2];
  pair(fd);
  Memory memory(sums, len);
  const uint64_t features = sums ? wire::kFeatures : 0;
  double server_cpu = 0;
  std::thread server([&] {
    std::unique_ptr<Uring> ring;
    KVFS_CHECK(Uring::create(UringOptions{256, true, true}, &ring).err == 0);
    TcpServerLimits limits;
    limits.features = features;
    TcpServerChannel c(*ring, fd[0], memory, limits);
    c.start();
    const double from = seconds(CLOCK_THREAD_CPUTIME_ID);
    while (!c.closed()) {
      ring->submit_and_wait(UINT64_MAX);
      c.flush();
    }
    server_cpu = seconds(CLOCK_THREAD_CPUTIME_ID) - from;
  });
  std::unique_ptr<Uring> ring;
  KVFS_CHECK(Uring::create(UringOptions{256, true, true}, &ring).err == 0);
  ChannelLimits limits;
  limits.max_batch = batch;
  limits.features = features;
  TcpClientChannel c(*ring, fd[1], limits);
  struct Job {
    NetOp op;
    std::vector<Job*>* idle;
  };
  std::vector<uint8_t> mem(size_t{len} * depth);
  std::vector<Job> jobs(depth);
  std::vector<Job*> idle;
  uint64_t done = 0;
  for (uint32_t i = 0; i < depth; ++i) {
    Job& j = jobs[i];
    j.op.desc.op = uint8_t(wire::Op::Get);
    j.op.desc.kind = uint8_t(Kind::Block);
    j.op.desc.key_len = 16;
    j.op.desc.key[0] = static_cast<uint8_t>(i);
    j.op.desc.len = len;
    j.op.mem.ptr = &mem[size_t{len} * i];
    j.idle = &idle;
    j.op.owner = &j;
    j.op.done = [](NetOp* op) {
      KVFS_CHECK(op->answered && op->result == op->desc.len);
      auto* job = static_cast<Job*>(op->owner);
      job->idle->push_back(job);
    };
    idle.push_back(&j);
  }
  const double cpu = seconds(CLOCK_THREAD_CPUTIME_ID), from = seconds(CLOCK_MONOTONIC);
  double now = from;
  while (now < from + secs || c.ops_inflight() != 0) {
    if (idle.size() >= batch && now < from + secs) {
      while (idle.size() >= batch) {
        for (uint32_t i = 0; i < batch; ++i) {
          c.submit(&idle.back()->op);
          idle.pop_back();
          ++done;
        }
      }
      c.flush(1);
    }
    ring->submit_and_wait(UINT64_MAX);
    now = seconds(CLOCK_MONOTONIC);
  }
  const double took = now - from, client_cpu = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
  const ChannelCounters counters = c.counters();
  c.close();
  while (!c.closed()) ring->submit_and_wait(UINT64_MAX);
  server.join();
  const auto n = static_cast<double>(done);
  std::printf("%-34s %9.0f op/s %7.0f MB/s  cpu client %6.2f server %6.2f us/op  calls %.3f/op  copied %.0f B/op\n",
              name, n / took, n * len / took / 1e6, client_cpu / n * 1e6, server_cpu / n * 1e6,
              static_cast<double>(counters.calls) / n, static_cast<double>(counters.copied) / n);
  return n * len / took;
}

// Blocking send() of messages from a region like Memory's, recv(MSG_WAITALL) into one of `depth` places.
double plain(uint32_t len, uint32_t depth, double secs) {
  int fd[2];
  pair(fd);
  std::vector<uint8_t> bytes(Memory::kBytes, 1);
  std::thread sender([&] {
    uint64_t rng = 1;
    for (;;) {
      rng = rng * 6364136223846793005u + 1442695040888963407u;
      const uint8_t* p = &bytes[(rng >> 33) % (Memory::kBytes / len) * len];
      for (size_t at = 0; at < len;) {
        const ssize_t n = send(fd[0], p + at, len - at, MSG_NOSIGNAL);
        if (n <= 0) return;
        at += static_cast<size_t>(n);
      }
    }
  });
  std::vector<uint8_t> mem(size_t{len} * depth);
  const double from = seconds(CLOCK_MONOTONIC);
  double now = from;
  uint64_t n = 0;
  while (now < from + secs) {
    KVFS_CHECK(recv(fd[1], &mem[n % depth * len], len, MSG_WAITALL) == static_cast<ssize_t>(len));
    ++n;
    now = seconds(CLOCK_MONOTONIC);
  }
  close(fd[1]);
  sender.join();
  close(fd[0]);
  const double rate = static_cast<double>(n) * len / (now - from);
  std::printf("%-34s %9.0f op/s %7.0f MB/s\n", "plain sender and receiver", static_cast<double>(n) / (now - from),
              rate / 1e6);
  return rate;
}

}  // namespace

int main(int argc, char** argv) {
  const double secs = argc > 1 ? std::atof(argv[1]) : 2;
  gets("4 KiB, batch 1, depth 1", 4096, 1, 1, true, secs);
  gets("4 KiB, batch 1, depth 64", 4096, 1, 64, true, secs);
  gets("4 KiB, batch 64, depth 64, sums", 4096, 64, 64, true, secs);
  gets("4 KiB, batch 64, depth 256, sums", 4096, 64, 256, true, secs);
  gets("4 KiB, batch 64, depth 256, no sums", 4096, 64, 256, false, secs);
  for (const bool sums : {true, false}) {
    for (const uint32_t depth : {4u, 16u}) {
      char name[64];
      std::snprintf(name, sizeof name, "1 MiB, depth %u, %s", depth, sums ? "sums" : "no sums");
      std::vector<double> ratios;
      for (int round = 0; round < kRounds; ++round) {
        const double before = plain(1 << 20, depth, secs / 2);
        const double rate = gets(name, 1 << 20, 1, depth, sums, secs);
        const double after = plain(1 << 20, depth, secs / 2);
        ratios.push_back(2 * rate / (before + after));
      }
      std::sort(ratios.begin(), ratios.end());
      std::printf("%-34s to the plain pair: %.2f (%.2f .. %.2f)\n", name, ratios[kRounds / 2], ratios.front(),
                  ratios.back());
    }
  }
  return 0;
}
