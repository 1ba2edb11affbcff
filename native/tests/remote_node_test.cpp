// Nodes whose chunks are on chunk servers, over real sockets: a whole node against servers in this process.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <thread>

#include "../ffi/kvfs_net.h"
#include "../ffi/kvfs_remote.h"
#include "../server/reactor.h"
#include "../wire/map.h"
#include "net_capability.h"
#include "node_fixture.h"
#include "remote_sim.h"

namespace kvfs {
namespace {

using testing_net::Issuer;
constexpr uint32_t kCacheNs = 1, kVolumeNs = 9, kDeadlineMs = 3000;
constexpr wire::Grant kAll{wire::kAnyNamespace, wire::kBlocks | wire::kFiles, wire::kAllRights, 0, 0};

// One chunk server with a target of its own.
struct Server {
  kvfs_node* node = nullptr;
  kvfs_server* server = nullptr;
  int port = 0;
};

class RemoteNodeTest : public ::testing::Test {
 protected:
  static constexpr size_t kServers = 2;
  void SetUp() override {
    alarm(200);
    char tmp[] = "/var/tmp/kvfs-remote-XXXXXX";
    ASSERT_NE(mkdtemp(tmp), nullptr);
    dir_ = tmp;
    char err[256] = "";
    map_ = sim_map(kServers, 1);
    wire::MapNamespace ns{};
    ns.id = kCacheNs;
    ns.cls = 1;
    strcpy(ns.tenant, "t");
    strcpy(ns.name, "cache");
    map_.namespaces.push_back(ns);
    ns.id = kVolumeNs;
    ns.cls = 3;
    strcpy(ns.name, "files");
    map_.namespaces.push_back(ns);
    for (size_t i = 0; i < kServers; ++i) {
      const std::string path = dir_ + "/data" + std::to_string(i);
      ASSERT_EQ(kvfs_node_format(path.c_str(), 256u << 20, 0, 0, err, sizeof err), 0) << err;
      kvfs_node_config c{};
      c.data_path = path.c_str();
      c.memory_bytes = 16u << 20;
      c.verify = 1;
      ASSERT_EQ(kvfs_node_start(&c, &servers_[i].node, err, sizeof err), 0) << err;
      serve(i);
      map_.targets[i].endpoint[0].port = uint16_t(servers_[i].port);
      map_.targets[i].endpoint[0].address[3] = 1;
    }
    map_.version = 2;
    const Bytes b = map_bytes(map_);
    for (Server& s : servers_) ASSERT_EQ(kvfs_server_set_map(s.server, b.data(), b.size(), err, sizeof err), 0) << err;
  }
  // At its port, if it had one.
  void serve(size_t i) {
    Server& s = servers_[i];
    char err[256] = "";
    const Bytes b = map_bytes(map_);
    kvfs_server_config c{};
    c.targets = &s.node;
    c.target_count = 1;
    c.auth_key = issuer_.key;
    c.map = b.data();
    c.map_bytes = b.size();
    c.buffer_bytes = 64u << 20;
    c.data_sums = 1;
    ASSERT_EQ(kvfs_server_start(&c, &s.server, err, sizeof err), 0) << err;
    s.port = kvfs_server_listen(s.server, ("tcp://127.0.0.1:" + std::to_string(s.port)).c_str(), err, sizeof err);
    ASSERT_GT(s.port, 0) << err;
  }
  void away(size_t i) {
    kvfs_server_stop(servers_[i].server);
    servers_[i].server = nullptr;
  }
  int begin(const std::vector<uint8_t>& capability, std::string* message = nullptr) {
    const Bytes b = map_bytes(map_);
    kvfs_remote_config r{};
    r.map = b.data();
    r.map_bytes = b.size();
    r.capability = capability.data();
    r.capability_bytes = capability.size();
    r.file_ns = kVolumeNs;
    r.deadline_ms = kDeadlineMs;
    r.data_sums = sums_;
    kvfs_node_config c{};
    sock_ = dir_ + "/sock";
    c.socket_path = sock_.c_str();
    c.allowed_uid = KVFS_ANY_UID;
    c.remote = &r;
    char err[256] = "";
    const int rc = kvfs_node_start(&c, &node_, err, sizeof err);
    if (message != nullptr) *message = err;
    return rc;
  }
  void TearDown() override {
    char err[256] = "";
    EXPECT_EQ(kvfs_node_stop(node_, err, sizeof err), 0) << err;
    for (Server& s : servers_) {
      kvfs_server_stop(s.server);
      EXPECT_EQ(kvfs_node_stop(s.node, err, sizeof err), 0) << err;
    }
    std::filesystem::remove_all(dir_);
    alarm(0);
  }
  int64_t call(uint8_t op, uint64_t key, void* mem, uint32_t len, uint64_t off = 0, uint8_t flags = 0) {
    kvfs_sqe s{};
    s.opcode = op;
    s.flags = flags;
    s.handle = op < KVFS_OP_INODE_READ ? kCacheNs : 0;
    s.iov = KVFS_IOV_INPROC;
    s.iov_off = reinterpret_cast<uintptr_t>(mem);
    s.off = off;
    s.len = len;
    if (op < KVFS_OP_INODE_READ) s.key_len = 8;
    memcpy(s.key, &key, sizeof key);
    return kvfs_node_call(node_, &s, 60 * kSec);
  }
  uint64_t chunks(size_t i) {
    struct kvfs_node_stats s;
    EXPECT_EQ(kvfs_node_stats(servers_[i].node, &s), 0);
    return s.chunks;
  }

  Issuer issuer_;
  wire::ClusterMap map_;
  std::string dir_, sock_;
  Server servers_[kServers];
  uint32_t sums_ = 1;  // asked for
  kvfs_node* node_ = nullptr;
};

TEST_F(RemoteNodeTest, BlocksAndFilesOfManySizesComeBackFromAllServers) {
  ASSERT_EQ(begin(issuer_.make({kAll})), 0);
  for (const size_t size : {1u, 100u, 4096u, 65536u, 1u << 20, 16u << 20}) {
    const Bytes v = pattern(size, size);
    ASSERT_EQ(call(KVFS_OP_PUT, size, const_cast<uint8_t*>(v.data()), uint32_t(size)), 1) << size;
    Bytes got(size);
    ASSERT_EQ(call(KVFS_OP_GET, size, got.data(), uint32_t(size)), int64_t(size));
    EXPECT_EQ(got, v);
    EXPECT_EQ(call(KVFS_OP_EXISTS, size, nullptr, 0), int64_t(size));
  }
  EXPECT_EQ(call(KVFS_OP_EXISTS, 12345, nullptr, 0), -ENOENT);
  EXPECT_EQ(call(KVFS_OP_EVICT, 100, nullptr, 0), 0);
  EXPECT_EQ(call(KVFS_OP_EXISTS, 100, nullptr, 0), -ENOENT);
  ASSERT_EQ(kvfs_node_inode_open(node_, 77, 0), 0);
  const Bytes v = pattern(5, 3'000'000);
  ASSERT_EQ(call(KVFS_OP_INODE_WRITE, 77, const_cast<uint8_t*>(v.data()), uint32_t(v.size())), int64_t(v.size()));
  // Parts that are not whole chunks, over what is there.
  Bytes part = pattern(6, 10'000);
  ASSERT_EQ(call(KVFS_OP_INODE_WRITE, 77, part.data(), uint32_t(part.size()), 99'999), int64_t(part.size()));
  ASSERT_EQ(call(KVFS_OP_INODE_FSYNC, 77, nullptr, 0), 0);
  Bytes want = v, got(v.size());
  std::copy(part.begin(), part.end(), want.begin() + 99'999);
  ASSERT_EQ(call(KVFS_OP_INODE_READ, 77, got.data(), uint32_t(got.size())), int64_t(got.size()));
  EXPECT_EQ(got, want);
  for (size_t i = 0; i < kServers; ++i) EXPECT_GT(chunks(i), 10u);
  ASSERT_EQ(call(KVFS_OP_INODE_TRUNCATE, 77, nullptr, 0, 1000), 0);
  ASSERT_EQ(call(KVFS_OP_INODE_READ, 77, got.data(), uint32_t(got.size())), 1000);
  ASSERT_EQ(call(KVFS_OP_INODE_DELETE, 77, nullptr, 0, 3'000'000), 0);
  ASSERT_EQ(kvfs_node_inode_close(node_, 77), 0);
  ASSERT_EQ(call(KVFS_OP_SYNC, 0, nullptr, 0), 0);
  kvfs_rail_stats rails[8];
  ASSERT_EQ(kvfs_node_rails(node_, rails, 8), int(kServers));
  for (size_t i = 0; i < kServers; ++i) {
    EXPECT_EQ(rails[i].up, 1u);
    EXPECT_GT(rails[i].bytes_out, 100'000u);
    EXPECT_EQ(std::string(rails[i].name), "tcp://127.0.0.1:" + std::to_string(servers_[i].port));
  }
  ASSERT_EQ(kvfs_node_rails(servers_[0].node, rails, 8), -EOPNOTSUPP);
}

TEST_F(RemoteNodeTest, AServerThatIsAwayCostsTheDeadlineAndComesBack) {
  ASSERT_EQ(begin(issuer_.make({kAll})), 0);
  Bytes v = pattern(1, 1000);
  for (uint64_t k = 1; k <= 20; ++k) ASSERT_EQ(call(KVFS_OP_PUT, k, v.data(), 1000), 1);
  away(0);
  int failed = 0;
  const uint64_t begin_ns = monotonic_ns();
  uint64_t lost = 0;
  for (uint64_t k = 1; k <= 20 && failed == 0; ++k) {
    const int64_t r = call(KVFS_OP_GET, k, v.data(), 1000);
    if (r == 1000) continue;
    EXPECT_TRUE(r == -ETIMEDOUT || r == -EREMOTEIO) << r;
    ++failed;
    lost = k;
  }
  ASSERT_EQ(failed, 1);
  EXPECT_GE(monotonic_ns() - begin_ns, uint64_t{kDeadlineMs} * 1'000'000);
  serve(0);
  EXPECT_EQ(call(KVFS_OP_GET, lost, v.data(), 1000), 1000);
  // What was acknowledged and not made durable may be gone with the run of the server that is over: told once.
  EXPECT_EQ(call(KVFS_OP_SYNC, 0, nullptr, 0), -EIO);
  EXPECT_EQ(call(KVFS_OP_SYNC, 0, nullptr, 0), 0);
}

// Servers that end and begin again while operations never pause: each ends well or in time, and what was put is there.
TEST_F(RemoteNodeTest, RestartsUnderLoad) {
  ASSERT_EQ(begin(issuer_.make({kAll})), 0);
  std::atomic<bool> stop{false};
  std::thread restarts([&] {
    for (size_t i = 0; !stop; ++i) {
      usleep(150'000);
      away(i % kServers);
      serve(i % kServers);
    }
  });
  std::vector<uint64_t> there;
  const uint64_t end = monotonic_ns() + 4 * kSec;
  uint64_t k = 0;
  while (monotonic_ns() < end) {
    Bytes v = pattern(++k, 5000);
    const int64_t r = call(KVFS_OP_PUT, k, v.data(), 5000, 0, KVFS_SQE_DURABLE);
    ASSERT_TRUE(r == 1 || r == 0 || r == -ETIMEDOUT || r == -EREMOTEIO) << r;
    if (r >= 0) there.push_back(k);
  }
  stop = true;
  restarts.join();
  EXPECT_GT(there.size(), 10u);
  for (const uint64_t n : there) {
    Bytes got(5000);
    ASSERT_EQ(call(KVFS_OP_GET, n, got.data(), 5000), 5000);
    EXPECT_EQ(got, pattern(n, 5000));
  }
}

// While another client of the node is served, one makes its memory shorter under transfers of its own: no connection ends.
class RemoteMemoryTest : public RemoteNodeTest {
 protected:
  static constexpr uint32_t kLen = 65536, kBlocks = 16;
  static constexpr uint64_t kSize = uint64_t{kLen} * kBlocks;
  void SetUp() override {
    RemoteNodeTest::SetUp();
#if defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "a mapping replaced in a SIGBUS handler is beyond ThreadSanitizer's model";
#endif
  }
  struct Client {
    kvfs_client* c = nullptr;
    kvfs_ring* r = nullptr;
    int ns = -1;
    explicit Client(const std::string& sock) {
      EXPECT_EQ(kvfs_open(sock.c_str(), &c), 0);
      EXPECT_EQ(kvfs_ring_create(c, 32, &r), 0);
      ns = kvfs_ns_open(c, "t", "cache", 0);
      EXPECT_GE(ns, 0);
    }
    ~Client() { kvfs_close(c); }
    Client(const Client&) = delete;
    Client& operator=(const Client&) = delete;
  };
  struct Keys {
    std::vector<std::string> text;
    std::vector<kvfs_block> blocks;
    Keys(const std::string& prefix, uint64_t at) {
      for (uint32_t i = 0; i < kBlocks; ++i) text.push_back(prefix + std::to_string(i));
      for (const std::string& t : text) {
        blocks.push_back({t.data(), uint32_t(t.size()), kLen, at, 0, 0});
        at += kLen;
      }
    }
  };
  // Gets and puts of memory of its own that ends in the middle of a block.
  void hostile(int round) {
    Client c(sock_);
    kvfs_iov own;
    const int fd = memfd_create("engine", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(fd, off_t(kSize)), 0);
    void* mem = mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ASSERT_EQ(kvfs_iov_register(c.c, mem, kSize, &own), 0);
    const bool put = round % 2 != 0, before = round % 4 < 2;
    Keys keys(put ? "h" + std::to_string(round) + "-" : "k", 0);
    kvfs_batch batch{};
    batch.blocks = keys.blocks.data();
    batch.n = kBlocks;
    batch.opcode = put ? KVFS_OP_PUT : KVFS_OP_GET;
    batch.handle = c.ns;
    batch.iov = own.id;
    if (before) {
      ASSERT_EQ(ftruncate(fd, 300'000), 0);
    }
    ASSERT_EQ(kvfs_batch_submit(c.r, &batch), 0);
    if (!before) {
      ASSERT_EQ(ftruncate(fd, 300'000), 0);
    }
    kvfs_batch* ended;
    ASSERT_EQ(kvfs_batch_wait(c.r, &ended, 1, 10 * kSec), 1);
    for (const kvfs_block& b : keys.blocks)
      EXPECT_TRUE(b.status == (put ? 1 : kLen) || b.status == -EFAULT) << b.status << " in round " << round;
    munmap(mem, kSize);
    close(fd);
  }
  uint64_t connections_made() {
    uint64_t n = 0;
    for (const Server& s : servers_) {
      kvfs_net_stats st{};
      EXPECT_EQ(kvfs_server_stats(s.server, &st), 0);
      n += st.connections_opened;
    }
    return n;
  }
  void truncated_memory_hurts_nobody_else() {
    ASSERT_EQ(begin(issuer_.make({kAll})), 0);
    ASSERT_EQ(kvfs_node_ns_put(node_, "t", "cache", kCacheNs, 1, KVFS_ANY_UID), 0);
    Client good(sock_);
    kvfs_iov v;
    ASSERT_EQ(kvfs_iov_alloc(good.c, 4 << 20, 0, &v), 0);
    const Bytes want = pattern(1, kSize);
    memcpy(v.base, want.data(), kSize);
    Keys keys("k", 0), mine("k", kSize);
    ASSERT_EQ(kvfs_put(good.r, good.ns, &v, keys.blocks.data(), kBlocks, 0, 10 * kSec), int(kBlocks));
    usleep(300'000);  // all connections are there
    const uint64_t made = connections_made();
    std::atomic<bool> stop{false};
    std::thread other([&] {
      for (int round = 0; round < 20 && !HasFatalFailure(); ++round) hostile(round);
      stop = true;
    });
    auto* got = static_cast<uint8_t*>(v.base) + kSize;
    uint64_t slowest = 0, bad = 0;
    while (!stop) {
      memset(got, 0, kSize);
      const uint64_t at = monotonic_ns();
      bad += kvfs_get(good.r, good.ns, &v, mine.blocks.data(), kBlocks, 10 * kSec) != int(kBlocks);
      slowest = std::max(slowest, monotonic_ns() - at);
      bad += memcmp(got, want.data(), kSize) != 0;
    }
    other.join();
    EXPECT_EQ(bad, 0u);
    EXPECT_LT(slowest, 2 * kSec);
    EXPECT_EQ(connections_made(), made);
  }
};

TEST_F(RemoteMemoryTest, TruncatedMemoryHurtsNobodyElse) { truncated_memory_hurts_nobody_else(); }

TEST_F(RemoteMemoryTest, TruncatedMemoryHurtsNobodyElseWithoutSums) {
  sums_ = 0;
  truncated_memory_hurts_nobody_else();
}

TEST_F(RemoteMemoryTest, TruncatedMemoryHurtsNobodyElseOverSharedMemory) {
  setenv("KVFS_SHM_DIR", dir_.c_str(), 1);
  map_.version = 3;
  char err[256] = "";
  for (size_t i = 0; i < kServers; ++i) {
    const std::string name = "server" + std::to_string(i);
    ASSERT_GE(kvfs_server_listen(servers_[i].server, ("shm://" + name).c_str(), err, sizeof err), 0) << err;
    wire::MapTarget& t = map_.targets[i];
    wire::MapEndpoint& e = t.endpoint[t.endpoints++];
    e = {};
    e.transport = uint8_t(wire::Transport::Shm);
    std::memcpy(e.address, name.data(), name.size());
  }
  const Bytes b = map_bytes(map_);
  for (Server& s : servers_) ASSERT_EQ(kvfs_server_set_map(s.server, b.data(), b.size(), err, sizeof err), 0) << err;
  truncated_memory_hurts_nobody_else();
  kvfs_rail_stats rails[8];
  const int n = kvfs_node_rails(node_, rails, 8);
  uint64_t in = 0;
  for (int i = 0; i < n; ++i) in += std::string(rails[i].name).starts_with("shm://") ? rails[i].bytes_in : 0;
  EXPECT_GT(in, kSize);
  unsetenv("KVFS_SHM_DIR");
}

TEST_F(RemoteNodeTest, AStaleMapIsReplaced) {
  ASSERT_EQ(begin(issuer_.make({kAll})), 0);
  Bytes v = pattern(1, 1000);
  for (auto& t : map_.slots) t = 1;
  map_.version = 3;
  const Bytes b = map_bytes(map_);
  char err[256] = "";
  for (Server& s : servers_) ASSERT_EQ(kvfs_server_set_map(s.server, b.data(), b.size(), err, sizeof err), 0) << err;
  const uint64_t before = chunks(0);
  for (uint64_t k = 1; k <= 20; ++k) ASSERT_EQ(call(KVFS_OP_PUT, k, v.data(), 1000), 1);
  EXPECT_EQ(chunks(0), before);
  EXPECT_EQ(chunks(1), 20u);
}

TEST_F(RemoteNodeTest, StartsThatCannotWorkSayWhy) {
  std::string why;
  EXPECT_EQ(begin(Issuer{}.make({kAll}), &why), -EACCES);
  EXPECT_NE(why.find("capability"), std::string::npos) << why;
  const auto good = issuer_.make({kAll});
  char err[256] = "";
  const std::string url = "tcp://127.0.0.1:" + std::to_string(servers_[0].port);
  Bytes map(wire::kMaxMap);
  const int n = kvfs_fetch_map(url.c_str(), good.data(), good.size(), map.data(), map.size(), 5000, err, sizeof err);
  ASSERT_GT(n, 0) << err;
  map.resize(size_t(n));
  EXPECT_EQ(map, map_bytes(map_));
  EXPECT_EQ(kvfs_fetch_map(url.c_str(), good.data(), good.size(), map.data(), 10, 5000, err, sizeof err), -EMSGSIZE);
  for (const char* bad : {"", "tcp://", "tcp://host:1", "rdma://127.0.0.1:1", "tcp://127.0.0.1:0", "tcp://[::1:5"})
    EXPECT_EQ(kvfs_fetch_map(bad, nullptr, 0, map.data(), map.size(), 100, err, sizeof err), -EINVAL) << bad;
  EXPECT_EQ(kvfs_fetch_map("tcp://127.0.0.1:1", nullptr, 0, map.data(), map.size(), 1000, err, sizeof err),
            -ECONNREFUSED);
  kvfs_remote_config r{};
  kvfs_node_config c{};
  c.remote = &r;
  EXPECT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), -EPROTO);
  map = map_bytes(map_);
  r.map = map.data();
  r.map_bytes = map.size();
  r.transport = 2;  // to servers that have TCP alone
  EXPECT_LT(kvfs_node_start(&c, &node_, err, sizeof err), 0);
  EXPECT_NE(std::string(err).find("RDMA"), std::string::npos) << err;
  c.data_path = "x";
  EXPECT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), -EINVAL);
}

}  // namespace
}  // namespace kvfs
