// A whole node against a chunk server over RDMA, both in this process; between real devices, as rdma_test.cpp.
#include <sys/mman.h>

#include <thread>

#include "../ffi/kvfs_net.h"
#include "../ffi/kvfs_remote.h"
#include "net_capability.h"
#include "node_fixture.h"
#include "rdma_fixture.h"
#include "remote_sim.h"

namespace kvfs {
namespace {

using testing_net::Issuer;
constexpr uint32_t kCacheNs = 1;
constexpr uint32_t kRails = 2;  // ports of the client that reach the server's address
constexpr wire::Grant kAll{wire::kAnyNamespace, wire::kBlocks | wire::kFiles, wire::kAllRights, 0, 0};

class RdmaNodeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (std::getenv("KVFS_RDMA_VM") == nullptr) GTEST_SKIP() << "runs in a virtual machine: make test-rdma";
    alarm(200);
    verbs_ = load_verbs(&why);
    ASSERT_NE(verbs_, nullptr) << why;
    ASSERT_TRUE(rdma_ports(*verbs_, &ports_));
    char tmp[] = "/var/tmp/kvfs-rdma-XXXXXX";
    ASSERT_NE(mkdtemp(tmp), nullptr);
    dir_ = tmp;
    char err[256] = "";
    map_ = sim_map(1, 1);
    wire::MapNamespace ns{};
    ns.id = kCacheNs;
    ns.cls = 1;
    strcpy(ns.tenant, "t");
    strcpy(ns.name, "cache");
    map_.namespaces.push_back(ns);
    const std::string path = dir_ + "/data";
    ASSERT_EQ(kvfs_node_format(path.c_str(), 256u << 20, 0, 0, err, sizeof err), 0) << err;
    kvfs_node_config c{};
    c.data_path = path.c_str();
    c.memory_bytes = 16u << 20;
    ASSERT_EQ(kvfs_node_start(&c, &target_, err, sizeof err), 0) << err;
    serve();
    wire::MapTarget& t = map_.targets[0];
    t.endpoints = 2;
    t.endpoint[0].port = uint16_t(tcp_);
    memcpy(t.endpoint[0].address, "\x7f\0\0\1", 4);
    t.endpoint[1] = t.endpoint[0];
    t.endpoint[1].transport = uint8_t(wire::Transport::Rdma);
    t.endpoint[1].port = uint16_t(rdma_);
    memcpy(t.endpoint[1].address, "\x0a\x5a\0\3", 4);
    map_.version = 2;
    const Bytes b = map_bytes(map_);
    ASSERT_EQ(kvfs_server_set_map(server_, b.data(), b.size(), err, sizeof err), 0) << err;
  }
  void TearDown() override {
    if (dir_.empty()) return;
    char err[256] = "";
    EXPECT_EQ(kvfs_node_stop(node_, err, sizeof err), 0) << err;
    kvfs_server_stop(server_);
    EXPECT_EQ(kvfs_node_stop(target_, err, sizeof err), 0) << err;
    std::filesystem::remove_all(dir_);
    alarm(0);
  }
  // At its ports, if it had some.
  void serve() {
    char err[256] = "";
    const Bytes b = map_bytes(map_);
    kvfs_server_config c{};
    c.targets = &target_;
    c.target_count = 1;
    c.auth_key = issuer_.key;
    c.map = b.data();
    c.map_bytes = b.size();
    c.buffer_bytes = 64u << 20;
    c.data_sums = 1;
    ASSERT_EQ(kvfs_server_start(&c, &server_, err, sizeof err), 0) << err;
    tcp_ = kvfs_server_listen(server_, ("tcp://127.0.0.1:" + std::to_string(tcp_)).c_str(), err, sizeof err);
    ASSERT_GT(tcp_, 0) << err;
    rdma_ = kvfs_server_listen(server_, ("rdma://10.90.0.3:" + std::to_string(rdma_)).c_str(), err, sizeof err);
    ASSERT_GT(rdma_, 0) << err;
  }
  void begin(const char* rails = "rxe0,eth1") {
    const Bytes b = map_bytes(map_);
    const auto capability = issuer_.make({kAll});
    kvfs_remote_config r{};
    r.map = b.data();
    r.map_bytes = b.size();
    r.capability = capability.data();
    r.capability_bytes = capability.size();
    r.transport = 2;
    r.data_sums = 1;
    r.rails = rails;
    kvfs_node_config c{};
    c.remote = &r;
    char err[256] = "";
    ASSERT_EQ(kvfs_node_start(&c, &node_, err, sizeof err), 0) << err;
  }
  int64_t call(uint8_t op, uint64_t key, void* mem, uint32_t len) {
    kvfs_sqe s{};
    s.opcode = op;
    s.handle = kCacheNs;
    s.iov = KVFS_IOV_INPROC;
    s.iov_off = reinterpret_cast<uintptr_t>(mem);
    s.len = len;
    s.key_len = 8;
    memcpy(s.key, &key, sizeof key);
    return kvfs_node_call(node_, &s, 60 * kSec);
  }
  void round_trips(uint64_t from) {
    for (const uint32_t size : {1u, 4096u, 16384u, 65536u, 1u << 20, 16u << 20}) {
      const Bytes v = pattern(from + size, size);
      ASSERT_EQ(call(KVFS_OP_PUT, from + size, const_cast<uint8_t*>(v.data()), size), 1) << size;
      Bytes got(size);
      ASSERT_EQ(call(KVFS_OP_GET, from + size, got.data(), size), int64_t(size));
      ASSERT_EQ(got, v);
    }
  }
  // What the server says to who asks for this session of this target.
  int knock(uint8_t session, uint32_t target) {
    std::unique_ptr<RdmaDevice> device;
    const auto port = std::ranges::find(ports_, "rxe0", &RdmaPort::device);
    EXPECT_TRUE(RdmaDevice::open(*verbs_, "rxe0", RdmaDevice::Role::Client, {}, &device));
    RdmaDial d;
    auto* to = reinterpret_cast<sockaddr_in*>(&d.destination);
    to->sin_family = AF_INET;
    to->sin_port = htons(uint16_t(rdma_));
    inet_pton(AF_INET, "10.90.0.3", &to->sin_addr);
    d.device = device.get();
    d.source = *port->source_for(reinterpret_cast<const sockaddr*>(to));
    d.hello.target = target;
    memset(d.hello.session, session, sizeof d.hello.session);
    d.deadline_ns = clock_now() + 10'000'000'000u;
    std::unique_ptr<RdmaConnection> c;
    bool answered = false;
    const int err = rdma_connect(d, &c, &answered);
    EXPECT_TRUE(answered || err == 0);
    return err;
  }

  const VerbsTable* verbs_ = nullptr;
  std::vector<RdmaPort> ports_;
  Issuer issuer_;
  wire::ClusterMap map_;
  std::string dir_;
  kvfs_node *target_ = nullptr, *node_ = nullptr;
  kvfs_server* server_ = nullptr;
  int tcp_ = 0, rdma_ = 0;
};

TEST_F(RdmaNodeTest, AllDataGoesOverRdmaAndAllPortsThatWereChosen) {
  begin();
  kvfs_rail_stats rails[8];
  for (uint64_t n = 1; n < 50; ++n) {
    round_trips(n << 32);
    ASSERT_EQ(kvfs_node_rails(node_, rails, 8), int(kRails + 1));
    if (std::all_of(rails, rails + kRails + 1, [](auto& r) { return r.transport == 1 || r.bytes_in > 0; })) break;
  }
  for (const kvfs_rail_stats& r : std::vector(rails, rails + kRails + 1)) {
    EXPECT_EQ(r.up, 1u) << r.name;
    EXPECT_EQ(r.bytes_in > 0, r.transport == 2) << r.name;
  }
  kvfs_net_stats s;
  ASSERT_EQ(kvfs_server_stats(server_, &s), 0);
  EXPECT_GE(s.rdma, 10u);
  EXPECT_EQ(s.protocol_errors, 0u);
}

TEST_F(RdmaNodeTest, AServerStopsWhileItsClientsAreConnectedAndIsFoundAgain) {
  begin();
  round_trips(1ull << 32);
  std::thread back([&] {
    kvfs_server_stop(server_);
    serve();
  });
  round_trips(2ull << 32);
  back.join();
  round_trips(3ull << 32);
}

TEST_F(RdmaNodeTest, StrangersAreToldWhyAndCostNobodyElseAnything) {
  begin();
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(knock(7, 0), -ESTALE) << "no such session";
    EXPECT_EQ(knock(7, 9), -ENODEV) << "no such target";
  }
  round_trips(1ull << 32);
  kvfs_net_stats s;
  ASSERT_EQ(kvfs_server_stats(server_, &s), 0);
  EXPECT_EQ(s.refused, 10u);
}

}  // namespace
}  // namespace kvfs
