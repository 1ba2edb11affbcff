// ring_bench.cpp is the client process of `kvfs bench`, and usable by hand: it reads or writes blocks of one namespace, or
// pieces of one file, through libkvfs and prints one line of JSON. Usage: ring_bench SOCKET NAMESPACE [options], see usage().
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <cinttypes>
#include <memory>
#include <vector>

#include "../include/kvfs.h"

namespace {

constexpr char kUsage[] =
    "usage: ring_bench SOCKET TENANT/NAME [options]\n"
    "       ring_bench SOCKET FILE --op read|write [options]   (a file on the mount, in pieces of SIZE)\n"
    "  --op get|put|evict|exists|read|write\n"
    "                  get, read: random ones of the range; the others: each one once, in order (default get)\n"
    "  --size BYTES    of a block, 8 to 16M, such as 4096 or 1M; a multiple of 8 (default 4096)\n"
    "  --depth N       operations in flight, 1 to 1024 (default 64)\n"
    "  --batch         hand over DEPTH at once and wait for all of them, instead of replacing each one that ends\n"
    "  --reap N        completions to wait for each time, 1 to DEPTH (default 1; --batch: 16)\n"
    "  --first N       number of the range's first key or piece (default 0)\n"
    "  --count N       keys or pieces in the range (default 1000)\n"
    "  --seconds S     stop after S seconds; 0: after the range, or after COUNT operations (default 0)\n"
    "  --durable       puts, writes and evictions complete when they would survive a loss of power\n"
    "  --verify        compare every byte read; without it, the eight that name the block\n"
    "  --huge          memory on 2 MiB pages\n"
    "  --daemon PID    count that process's CPU time too\n"
    "  --seed N        of the random order (default 1)\n";

constexpr int kMaxDepth = 1024;
constexpr size_t kPart = 16;  // of a batch
constexpr uint32_t kPage = 4096;
constexpr uint64_t kTimeoutNs = 60000000000u;
constexpr int kBucketsPerOctave = 16, kBuckets = 64 * kBucketsPerOctave;

struct Options {
  const char* socket = nullptr;
  const char* target = nullptr;  // namespace or file
  uint8_t op = KVFS_OP_GET;
  const char* op_name = "get";
  uint32_t size = 4096;
  int depth = 64;
  int reap = 0;
  bool batch = false, durable = false, verify = false, huge = false;
  uint64_t first = 0, count = 1000, seed = 1;
  double seconds = 0;
  pid_t daemon = 0;
};

[[noreturn]] void die(const char* what, int err) {
  fprintf(stderr, "ring_bench: %s: %s\n", what, strerror(err));
  exit(1);
}

[[noreturn]] void usage(const char* what) {
  fprintf(stderr, "ring_bench: %s\n%s", what, kUsage);
  exit(2);
}

uint64_t now_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
}

uint64_t mix(uint64_t x) {  // splitmix64: neighbouring numbers give unrelated keys
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// As long as an engine's SHA-256.
void key_of(uint64_t n, uint8_t key[32]) {
  for (int i = 0; i < 4; i++) {
    const uint64_t part = mix(n * 4 + static_cast<uint64_t>(i));
    memcpy(key + i * 8, &part, 8);
  }
}

// Word i of block n. The first names the block; the rest is the same for all blocks of one size, so that writing is
// cheap, and random, so that nothing below can compress it.
uint64_t word_of(uint64_t n, size_t i) { return i == 0 ? mix(n) : mix(i ^ 0x5bd1e995u); }

bool takes(uint8_t op) { return op == KVFS_OP_GET || op == KVFS_OP_READ; }
bool gives(uint8_t op) { return op == KVFS_OP_PUT || op == KVFS_OP_WRITE; }
bool of_file(uint8_t op) { return op == KVFS_OP_READ || op == KVFS_OP_WRITE; }

struct Cpu {
  double user = 0, system = 0;
  long voluntary = 0;
};

Cpu own_cpu() {
  rusage ru;
  getrusage(RUSAGE_SELF, &ru);
  return {static_cast<double>(ru.ru_utime.tv_sec) + static_cast<double>(ru.ru_utime.tv_usec) / 1e6,
          static_cast<double>(ru.ru_stime.tv_sec) + static_cast<double>(ru.ru_stime.tv_usec) / 1e6, ru.ru_nvcsw};
}

// All threads of the process, its io_uring workers included: fields 14 and 15 of /proc/PID/stat.
Cpu cpu_of(pid_t pid) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) die(path, errno);
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  text[n > 0 ? n : 0] = '\0';
  const char* after = strrchr(text, ')');  // the name may hold anything
  unsigned long user = 0, system = 0;
  if (after == nullptr ||
      sscanf(after + 1, " %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
    die(path, EPROTO);
  const auto hz = static_cast<double>(sysconf(_SC_CLK_TCK));
  return {static_cast<double>(user) / hz, static_cast<double>(system) / hz, 0};
}

// Latencies to within 1/16: 16 buckets for each power of two of nanoseconds.
struct Histogram {
  uint64_t buckets[kBuckets] = {};
  uint64_t total = 0;

  static int bucket(uint64_t ns) {
    if (ns < kBucketsPerOctave) return static_cast<int>(ns);
    const int octave = 63 - __builtin_clzll(ns);
    return (octave - 3) * kBucketsPerOctave + static_cast<int>((ns >> (octave - 4)) & (kBucketsPerOctave - 1));
  }
  void add(uint64_t ns) {
    buckets[bucket(ns)]++;
    total++;
  }
  // The lower bound of the bucket that the quantile falls into, in microseconds.
  double us(double quantile) const {
    const auto want = static_cast<uint64_t>(quantile * static_cast<double>(total));
    uint64_t seen = 0;
    for (int i = 0; i < kBuckets; i++) {
      seen += buckets[i];
      if (seen <= want) continue;
      if (i < kBucketsPerOctave) return i / 1e3;
      const int octave = i / kBucketsPerOctave + 3;
      const auto step = static_cast<uint64_t>(i % kBucketsPerOctave + kBucketsPerOctave);
      return static_cast<double>(step << (octave - 4)) / 1e3;
    }
    return 0;
  }
};

struct Slot {
  uint64_t number = 0;  // of the key
  uint64_t started = 0;
};

class Run {
 public:
  Run(const Options& o) : o_(o), slots_(static_cast<size_t>(o.depth)), rng_(mix(o.seed)) {}

  void open() {
    int err = kvfs_open(o_.socket, &client_);
    if (err < 0) die(o_.socket, -err);
    handle_ = of_file(o_.op) ? open_file() : open_namespace();
    if (handle_ < 0) die(o_.target, -handle_);
    stride_ = (static_cast<uint64_t>(o_.size) + 4095) / 4096 * 4096;
    err = kvfs_iov_alloc(client_, stride_ * slots_.size(), o_.huge ? KVFS_IOV_HUGE : 0, &iov_);
    if (err < 0) die("memory", -err);
    uint32_t entries = KVFS_RING_MIN_ENTRIES;
    while (entries < static_cast<uint32_t>(o_.depth)) entries *= 2;
    err = kvfs_ring_create(client_, entries, &ring_);
    if (err < 0) die("ring", -err);
    for (size_t i = 0; i < slots_.size(); i++) {
      for (size_t w = 0; w < stride_ / 8; w++) {
        const uint64_t v =
            gives(o_.op) ? word_of(0, w % (unit() / 8)) : 0;  // touched, so that no page fault is measured
        memcpy(value(i) + w * 8, &v, 8);
      }
    }
  }

  void close() { kvfs_close(client_); }

  void loop() {
    std::vector<int> idle;
    for (int i = o_.depth - 1; i >= 0; i--) idle.push_back(i);
    kvfs_cqe cqe[kMaxDepth];
    const uint64_t begin = now_ns();
    const uint64_t limit = o_.seconds > 0 ? begin + static_cast<uint64_t>(o_.seconds * 1e9) : UINT64_MAX;
    const bool endless = takes(o_.op) && o_.seconds > 0;
    uint64_t now = begin, started = 0;
    const Cpu own = own_cpu(), daemon = o_.daemon != 0 ? cpu_of(o_.daemon) : Cpu{};
    for (;;) {
      // A batch begins when the one before is whole. Its parts go out and are taken in as they come, as kvfs_get does it.
      const bool more = now < limit && (!o_.batch || idle.size() == slots_.size());
      while (more && !idle.empty() && (endless || started < o_.count)) {
        start(idle.back(), started++, now);
        idle.pop_back();
        if (o_.batch && idle.size() % kPart == 0) kvfs_submit(ring_);
      }
      const int busy = o_.depth - static_cast<int>(idle.size());
      if (busy == 0) break;
      kvfs_submit(ring_);
      const int want = o_.reap < busy ? o_.reap : busy;
      const int got = kvfs_wait(ring_, cqe, want, o_.depth, kTimeoutNs);
      if (got < 0) die("wait", -got);
      now = now_ns();
      for (int i = 0; i < got; i++) {
        finish(cqe[i], now);
        idle.push_back(static_cast<int>(cqe[i].user_data));
      }
    }
    seconds_ = static_cast<double>(now - begin) / 1e9;
    const Cpu own_end = own_cpu();
    own_ = {own_end.user - own.user, own_end.system - own.system, own_end.voluntary - own.voluntary};
    if (o_.daemon != 0) {
      const Cpu end = cpu_of(o_.daemon);
      daemon_ = {end.user - daemon.user, end.system - daemon.system, 0};
    }
  }

  void print() const {
    const uint64_t ops = latency_.total;
    const double n = ops > 0 ? static_cast<double>(ops) : 1;
    const double cpu = own_.user + own_.system + daemon_.user + daemon_.system;
    printf("{\"op\": \"%s\", \"size\": %u, \"depth\": %d, \"batch\": %s, \"ops\": %" PRIu64
           ", \"seconds\": %.4f, \"ops_per_s\": %.1f, \"bytes_per_s\": %.0f, \"client_user_s\": %.4f, "
           "\"client_system_s\": %.4f, \"daemon_user_s\": %.4f, \"daemon_system_s\": %.4f, \"cpu_us_per_op\": %.4f, "
           "\"client_sleeps\": %ld, \"p50_us\": %.1f, \"p99_us\": %.1f, \"errors\": %" PRIu64
           ", \"first_error\": %d, \"wrong\": %" PRIu64 ", \"there\": %" PRIu64 "}\n",
           o_.op_name, o_.size, o_.depth, o_.batch ? "true" : "false", ops, seconds_, n / seconds_,
           static_cast<double>(bytes_) / seconds_, own_.user, own_.system, daemon_.user, daemon_.system, cpu / n * 1e6,
           own_.voluntary, latency_.us(0.5), latency_.us(0.99), errors_, first_error_, wrong_, there_);
  }

  bool sound() const { return errors_ == 0 && wrong_ == 0; }

 private:
  int open_namespace() {
    char tenant[256] = "default";
    const char* slash = strchr(o_.target, '/');
    if (slash != nullptr) snprintf(tenant, sizeof tenant, "%.*s", static_cast<int>(slash - o_.target), o_.target);
    return kvfs_ns_open(client_, tenant, slash != nullptr ? slash + 1 : o_.target, 0);
  }

  int open_file() {
    const int fd = ::open(o_.target, O_RDWR | O_CLOEXEC | (o_.op == KVFS_OP_WRITE ? O_CREAT : 0), 0600);
    if (fd < 0) return -errno;
    const int handle = kvfs_file_register(client_, fd);
    ::close(fd);
    return handle;
  }

  char* value(size_t slot) const { return static_cast<char*>(iov_.base) + slot * stride_; }

  void start(int slot, uint64_t nth, uint64_t now) {
    Slot& s = slots_[static_cast<size_t>(slot)];
    if (takes(o_.op)) {
      rng_ ^= rng_ << 13;
      rng_ ^= rng_ >> 7;
      rng_ ^= rng_ << 17;
      s.number = o_.first + rng_ % o_.count;
    } else {
      s.number = o_.first + nth;
    }
    s.started = now;
    const auto at = static_cast<size_t>(slot);
    for (uint32_t done = 0; gives(o_.op) && done < o_.size; done += unit()) {
      const uint64_t name = word_of(name_of(s.number, done), 0);
      memcpy(value(at) + done, &name, 8);
    }
    kvfs_sqe* q = kvfs_prep(ring_);
    if (q == nullptr) die("prepare", EAGAIN);
    q->opcode = o_.op;
    q->flags = o_.durable && !takes(o_.op) ? KVFS_SQE_DURABLE : 0;
    q->handle = static_cast<uint32_t>(handle_);
    q->user_data = at;
    if (takes(o_.op) || gives(o_.op)) {
      q->iov = iov_.id;
      q->iov_off = at * stride_;
      q->len = o_.size;
    }
    if (of_file(o_.op)) {
      q->off = s.number * o_.size;
    } else {
      key_of(s.number, q->key);
      q->key_len = sizeof q->key;
    }
  }

  void finish(const kvfs_cqe& c, uint64_t now) {
    if (c.user_data >= slots_.size()) die("completion", EPROTO);
    const Slot& s = slots_[c.user_data];
    latency_.add(now - s.started);
    if (c.result < 0 || (takes(o_.op) && c.result != o_.size)) {
      if (errors_++ == 0) first_error_ = c.result < 0 ? static_cast<int>(-c.result) : EIO;
      return;
    }
    if (o_.op == KVFS_OP_PUT && c.result == 0) there_++;
    if (takes(o_.op) || gives(o_.op)) bytes_ += o_.size;
    if (takes(o_.op) && !right(s.number, value(c.user_data))) wrong_++;
  }

  bool right(uint64_t number, const char* bytes) const {
    const size_t words = o_.verify ? unit() / 8 : 1;
    for (uint32_t done = 0; done < o_.size; done += unit()) {
      for (size_t i = 0; i < words; i++) {
        uint64_t v;
        memcpy(&v, bytes + done + i * 8, 8);
        if (v != word_of(name_of(number, done), i)) return false;
      }
    }
    return true;
  }

  // What carries a name of its own: a whole block; of a file each page, so that it may be read in other pieces than those
  // it was written in.
  uint32_t unit() const { return of_file(o_.op) ? kPage : o_.size; }
  uint64_t name_of(uint64_t number, uint32_t done) const {
    return of_file(o_.op) ? (number * o_.size + done) / kPage : number;
  }

  const Options& o_;
  kvfs_client* client_ = nullptr;
  kvfs_ring* ring_ = nullptr;
  kvfs_iov iov_ = {};
  int handle_ = -1;  // of namespace or file
  uint64_t stride_ = 0;
  std::vector<Slot> slots_;
  uint64_t rng_;
  Histogram latency_;
  uint64_t bytes_ = 0, errors_ = 0, wrong_ = 0, there_ = 0;
  int first_error_ = 0;
  double seconds_ = 0;
  Cpu own_, daemon_;
};

uint64_t number(const char* text, uint64_t least, uint64_t most, const char* what) {
  char* end = nullptr;
  errno = 0;
  uint64_t v = strtoull(text, &end, 10);
  const uint64_t unit = *end == 'K' ? 1u << 10 : *end == 'M' ? 1u << 20 : 1;
  if (unit > 1) end++;
  if (errno != 0 || end == text || *end != '\0' || v > most / unit || v * unit < least) usage(what);
  return v * unit;
}

Options parse(int argc, char** argv) {
  enum { kOp = 1, kSize, kDepth, kBatch, kReap, kFirst, kCount, kSeconds, kDurable, kVerify, kHuge, kDaemon, kSeed };
  const option known[] = {
      {"op", 1, nullptr, kOp},         {"size", 1, nullptr, kSize},       {"depth", 1, nullptr, kDepth},
      {"batch", 0, nullptr, kBatch},   {"reap", 1, nullptr, kReap},       {"first", 1, nullptr, kFirst},
      {"count", 1, nullptr, kCount},   {"seconds", 1, nullptr, kSeconds}, {"durable", 0, nullptr, kDurable},
      {"verify", 0, nullptr, kVerify}, {"huge", 0, nullptr, kHuge},       {"daemon", 1, nullptr, kDaemon},
      {"seed", 1, nullptr, kSeed},     {nullptr, 0, nullptr, 0}};
  static constexpr struct {
    const char* name;
    uint8_t code;
  } kOps[] = {{"get", KVFS_OP_GET},       {"put", KVFS_OP_PUT},   {"evict", KVFS_OP_EVICT},
              {"exists", KVFS_OP_EXISTS}, {"read", KVFS_OP_READ}, {"write", KVFS_OP_WRITE}};
  Options o;
  for (int c; (c = getopt_long(argc, argv, "", known, nullptr)) != -1;) {
    switch (c) {
      case kOp:
        o.op_name = nullptr;
        for (const auto& op : kOps) {
          if (strcmp(op.name, optarg) != 0) continue;
          o.op = op.code;
          o.op_name = op.name;
        }
        if (o.op_name == nullptr) usage("--op is get, put, evict, exists, read or write");
        break;
      case kSize:
        o.size = static_cast<uint32_t>(number(optarg, 8, KVFS_VALUE_MAX, "--size is 8 to 16M"));
        break;
      case kDepth:
        o.depth = static_cast<int>(number(optarg, 1, kMaxDepth, "--depth is 1 to 1024"));
        break;
      case kBatch:
        o.batch = true;
        break;
      case kReap:
        o.reap = static_cast<int>(number(optarg, 1, kMaxDepth, "--reap is 1 to DEPTH"));
        break;
      case kFirst:
        o.first = number(optarg, 0, UINT64_MAX / 4, "--first is a number");
        break;
      case kCount:
        o.count = number(optarg, 1, UINT64_MAX / 4, "--count is at least 1");
        break;
      case kSeconds:
        o.seconds = atof(optarg);
        if (!(o.seconds >= 0 && o.seconds <= 86400)) usage("--seconds is 0 to 86400");
        break;
      case kDurable:
        o.durable = true;
        break;
      case kVerify:
        o.verify = true;
        break;
      case kHuge:
        o.huge = true;
        break;
      case kDaemon:
        o.daemon = static_cast<pid_t>(number(optarg, 1, 1u << 22, "--daemon is a process id"));
        break;
      case kSeed:
        o.seed = number(optarg, 0, UINT64_MAX, "--seed is a number");
        break;
      default:
        usage("unknown option");
    }
  }
  if (argc - optind != 2) usage("a socket and a namespace or file are needed");
  o.socket = argv[optind];
  o.target = argv[optind + 1];
  if (of_file(o.op) && o.size % kPage != 0) usage("a file's pieces are multiples of 4096 bytes");
  if (o.size % 8 != 0) usage("--size is a multiple of 8");
  if (o.reap == 0) o.reap = o.batch && o.depth > static_cast<int>(kPart) ? static_cast<int>(kPart) : 1;
  if (o.reap > o.depth) usage("--reap is 1 to DEPTH");
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  auto run = std::make_unique<Run>(o);
  run->open();
  run->loop();
  run->print();
  run->close();
  return run->sound() ? 0 : 1;
}
