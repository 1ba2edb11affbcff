// rdma_bench measures gets over RDMA from the server's memory, both ends in this process on threads of their own, between
// two devices: rdma_bench CLIENT-ADDRESS SERVER-ADDRESS BYTES DEPTH SECONDS. Prints MB/s. Compare with ib_write_bw of the
// same size in the same minute; docs/rdma.md.
#include <arpa/inet.h>
#include <poll.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>
#include <utility>
#include <vector>

#include "transport/rdma_client.h"
#include "transport/rdma_connect.h"
#include "transport/rdma_server.h"

namespace kvfs {
namespace {

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1'000'000'000u + uint64_t(t.tv_nsec);
}

[[noreturn]] void die(const char* what, int err) {
  std::fprintf(stderr, "rdma_bench: %s: %s\n", what, std::strerror(err));
  std::exit(1);
}

uint8_t* memory(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (p == MAP_FAILED) die("no memory", errno);
  return static_cast<uint8_t*>(p);
}

// Answers every Get from one block.
class Handler : public ChannelHandler {
 public:
  explicit Handler(uint8_t* block) : block_(block) {}
  bool buffer(ServerOp*) override { return false; }
  void take(ServerOp* op, int err) override {
    op->buf = block_;
    op->result = err != 0 ? err : op->desc.len;
    op->out_len = err != 0 ? 0 : op->desc.len;
    op->channel->reply(op);
    dirty = true;
  }
  void cancel(ServerChannel*, uint64_t) override {}
  void released(ServerOp*) override {}
  void ended(ServerChannel*, int) override {}
  bool dirty = false;

 private:
  uint8_t* block_;
};

const RdmaPort* port_of(const std::vector<RdmaPort>& ports, const in_addr& a) {
  for (const RdmaPort& p : ports)
    for (const sockaddr_storage& s : p.addresses)
      if (s.ss_family == AF_INET && reinterpret_cast<const sockaddr_in&>(s).sin_addr.s_addr == a.s_addr) return &p;
  die("no port has the address", EADDRNOTAVAIL);
}

void serve(RdmaListener& listener, std::unique_ptr<RdmaDevice> device, uint8_t* block, uint32_t depth) {
  std::unique_ptr<Uring> uring;
  if (const Status s = Uring::create({}, &uring); !s) die("io_uring", s.err);
  device->attach(*uring);
  std::unique_ptr<RdmaConnection> c;
  while (c == nullptr) {
    pollfd p{listener.fd(), POLLIN, 0};
    poll(&p, 1, 100);
    int err = 0;
    listener.take([&](RdmaIncoming in) { c = in.accept(*device, &err); });
    if (err != 0) die("accept", -err);
  }
  Handler handler(block);
  RdmaServerOptions options;
  options.max_ops = depth;
  options.features = 0;
  auto channel = std::make_unique<RdmaServerChannel>(*uring, std::move(c), options, handler);
  channel->start();
  while (!channel->closed()) {
    uring->submit_and_wait(UINT64_MAX);
    if (std::exchange(handler.dirty, false)) channel->flush();
  }
  channel.reset();
  device.reset();  // before the ring that waits for its events
}

struct State {
  uint64_t ops = 0, failed = 0;
  bool stop = false;
  RdmaClientChannel* channel = nullptr;
};

int run(const char* from, const char* to, uint32_t bytes, uint32_t depth, double seconds) {
  std::string why;
  const VerbsTable* verbs = load_verbs(&why);
  if (verbs == nullptr) {
    std::fprintf(stderr, "%s\n", why.c_str());
    return 1;
  }
  std::vector<RdmaPort> ports;
  if (const Status s = rdma_ports(*verbs, &ports); !s) die("ports", s.err);
  sockaddr_in source{}, destination{};
  source.sin_family = destination.sin_family = AF_INET;
  if (inet_pton(AF_INET, from, &source.sin_addr) != 1 || inet_pton(AF_INET, to, &destination.sin_addr) != 1)
    die("address", EINVAL);
  const RdmaPort* mine = port_of(ports, source.sin_addr);
  std::unique_ptr<RdmaDevice> client, server;
  if (const Status s = RdmaDevice::open(*verbs, mine->device, RdmaDevice::Role::Client, {}, &client); !s)
    die(s.message.c_str(), s.err);
  const std::string& theirs = port_of(ports, destination.sin_addr)->device;
  if (const Status s = RdmaDevice::open(*verbs, theirs, RdmaDevice::Role::Server, {}, &server); !s)
    die(s.message.c_str(), s.err);
  std::unique_ptr<RdmaListener> listener;
  if (const Status s = RdmaListener::open(*verbs, reinterpret_cast<sockaddr*>(&destination), &listener); !s)
    die(s.message.c_str(), s.err);
  uint8_t* block = memory(bytes);
  server->memory().declare(block, bytes);
  if (const int err = server->memory().prepare(block); err != 0) die("registering", -err);
  std::thread other([&] { serve(*listener, std::move(server), block, depth); });

  std::unique_ptr<Uring> uring;
  if (const Status s = Uring::create({}, &uring); !s) die("io_uring", s.err);
  client->attach(*uring);
  RdmaDial dial;
  dial.device = client.get();
  dial.port = mine->port;
  std::memcpy(&dial.source, &source, sizeof source);
  destination.sin_port = htons(listener->port());
  std::memcpy(&dial.destination, &destination, sizeof destination);
  dial.deadline_ns = now_ns() + 10'000'000'000u;
  std::unique_ptr<RdmaConnection> c;
  bool answered = false;
  if (const int err = rdma_connect(dial, &c, &answered); err != 0) die("connect", -err);
  uint8_t* into = memory(size_t{bytes} * depth);
  client->memory().declare(into, size_t{bytes} * depth);
  client->memory().prepare(into);
  uint64_t ops_done = 0;
  {
    RdmaClientChannel channel(*uring, std::move(c), {64, 0});
    State state;
    state.channel = &channel;
    std::vector<NetOp> ops(depth);
    for (uint32_t i = 0; i < depth; ++i) {
      wire::Desc& d = ops[i].desc;
      d.op = uint8_t(wire::Op::Get);
      d.kind = uint8_t(Kind::Block);
      d.ns = 1;
      d.key_len = 8;
      d.len = bytes;
      ops[i].mem.ptr = into + size_t{i} * bytes;
      ops[i].owner = &state;
      ops[i].done = [](NetOp* op) {
        auto* s = static_cast<State*>(op->owner);
        op->answered && op->result == op->desc.len ? ++s->ops : ++s->failed;
        if (!s->stop) s->channel->submit(op);
      };
      channel.submit(&ops[i]);
    }
    channel.flush(1);
    const uint64_t begin = now_ns();
    const auto end = begin + uint64_t(seconds * 1e9);
    while (now_ns() < end && channel.error() == 0) {
      uring->submit_and_wait(100'000'000);
      channel.flush(1);
    }
    const double took = double(now_ns() - begin) / 1e9;
    ops_done = state.ops;
    state.stop = true;
    std::printf("%.1f MB/s, %u bytes, depth %u, %.0f gets/s\n", double(ops_done) * bytes / took / 1e6, bytes, depth,
                double(ops_done) / took);
    if (state.failed != 0 || channel.error() != 0) die("failed", -channel.error());
    channel.close();
    while (!channel.closed()) uring->submit_and_wait(100'000'000);
  }
  client.reset();
  other.join();
  return 0;
}

}  // namespace
}  // namespace kvfs

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fprintf(stderr, "usage: rdma_bench CLIENT-ADDRESS SERVER-ADDRESS BYTES DEPTH SECONDS\n");
    return 2;
  }
  return kvfs::run(argv[1], argv[2], uint32_t(std::atoi(argv[3])), uint32_t(std::atoi(argv[4])), std::atof(argv[5]));
}
