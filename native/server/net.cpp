// net.cpp owns the C ABI of kvfs_net.h: it puts network servers on the reactors of nodes and a listener before them.
#include "../ffi/kvfs_net.h"

#include <fcntl.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "../store/checksum.h"
#include "net_listener.h"
#include "net_rdma.h"
#include "net_server.h"
#include "node.h"

using namespace kvfs;  // NOLINT: the C functions below

namespace {

constexpr uint32_t kMaxServed = 64;  // targets of one server

Status read_map(const void* map, size_t bytes, std::shared_ptr<const ServedMap>* out, std::vector<uint32_t>* cache) {
  wire::ClusterMap m;
  if (map == nullptr) return {EINVAL, "no cluster map given"};
  if (const int err = wire::parse_map(map, bytes, &m); err != 0) return {-err, "the cluster map is not well-formed"};
  auto served = std::make_shared<ServedMap>();
  const auto* b = static_cast<const uint8_t*>(map);
  served->bytes.assign(b, b + bytes);
  served->version = m.version;
  for (const wire::MapNamespace& n : m.namespaces)
    if (n.cls == 1) cache->push_back(n.id);
  std::sort(cache->begin(), cache->end());
  *out = std::move(served);
  return {};
}

// The machine's boot, then this run of the server: whoever sees another run of the same boot knows that power was not lost.
bool name_boot(std::array<uint8_t, 16>* out) {
  if (getrandom(out->data(), out->size(), 0) != ssize_t(out->size())) return false;
  char id[64];
  const int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return true;
  const ssize_t n = read(fd, id, sizeof id);
  close(fd);
  if (n <= 0) return true;
  const uint64_t machine = xxh3(id, size_t(n));
  memcpy(out->data(), &machine, sizeof machine);
  return true;
}

}  // namespace

struct kvfs_server {
  std::vector<kvfs_node*> nodes;
  std::vector<std::unique_ptr<NetServer>> servers;  // made, used and destroyed on their nodes' reactors
  std::unique_ptr<RdmaServing> rdma;
  std::unique_ptr<NetListener> listener;  // its hooks are of `rdma`

  void end();
};

// In this order: nobody comes in any more, everybody goes, nothing refers to the servers.
void kvfs_server::end() {
  if (listener) listener->stop();
  std::vector<std::shared_ptr<Box<bool>>> left;
  for (size_t i = 0; i < servers.size(); ++i) {
    left.push_back(std::make_shared<Box<bool>>());
    nodes[i]->reactor->post([s = servers[i].get(), box = left.back()] { s->stop([box] { box->set(true); }); });
  }
  for (const auto& box : left) box->get();
  for (size_t i = 0; i < servers.size(); ++i) {
    in_reactor(nodes[i]->reactor, [r = nodes[i]->reactor, s = &servers[i], rdma = rdma.get(), i] {
      r->remove_source(s->get());
      if (rdma != nullptr) rdma->end(uint32_t(i));  // before the buffers that its devices know
      s->reset();
      return true;
    });
  }
  servers.clear();
}

int kvfs_server_start(const kvfs_server_config* cfg, kvfs_server** out, char* err, size_t err_len) {
  *out = nullptr;
  if (cfg == nullptr || cfg->targets == nullptr || cfg->target_count == 0 || cfg->target_count > kMaxServed)
    return fail({EINVAL, "a chunk server has 1.." + std::to_string(kMaxServed) + " targets"}, err, err_len);
  std::shared_ptr<const ServedMap> map;
  std::vector<uint32_t> cache;
  if (const Status s = read_map(cfg->map, cfg->map_bytes, &map, &cache); s.err != 0) return fail(s, err, err_len);
  NetServerOptions opt;
  if (cfg->buffer_bytes != 0) opt.buffer_bytes = cfg->buffer_bytes;
  if (cfg->max_sessions != 0) opt.max_sessions = cfg->max_sessions;
  if (cfg->keep_ms != 0) opt.keep_ms = cfg->keep_ms;
  opt.features = cfg->data_sums != 0 ? wire::kDataSums : 0;
  if (!name_boot(&opt.boot)) return fail({EIO, "no random numbers"}, err, err_len);

  auto s = std::make_unique<kvfs_server>();
  s->nodes.assign(cfg->targets, cfg->targets + cfg->target_count);
  std::vector<NetTarget> targets;
  for (kvfs_node* n : s->nodes) {
    if (n == nullptr || n->store->remote())
      return s->end(), fail({EINVAL, "a target is a node with a store of its own"}, err, err_len);
    std::unique_ptr<NetServer> made;
    const Status st = in_reactor(n->reactor, [&] {
      made = std::make_unique<NetServer>(n->ring, n->store, opt);
      Status init = made->init();
      if (init.err != 0) {
        made.reset();
        return init;
      }
      made->set_map(map->version, cache);
      n->reactor->add_source(made.get());
      return init;
    });
    if (st.err != 0) return s->end(), fail(st, err, err_len);
    targets.push_back({n->reactor, made.get()});
    s->servers.push_back(std::move(made));
  }
  s->rdma = std::make_unique<RdmaServing>(targets);
  s->listener = std::make_unique<NetListener>(std::move(targets), cfg->auth_key, opt);
  s->listener->set_map(map);
  if (const Status st = s->listener->start(); st.err != 0) return s->end(), fail(st, err, err_len);
  *out = s.release();
  return 0;
}

int kvfs_server_listen(kvfs_server* s, const char* url, char* err, size_t err_len) {
  if (s == nullptr || url == nullptr) return -EINVAL;
  std::string why;
  int port;
  if (strncmp(url, "rdma:", 5) == 0) {
    port = s->rdma->listen(url, s->listener.get(), &why);
  } else if (strncmp(url, "shm:", 4) == 0) {
    port = s->listener->listen_shm(url, &why);
  } else {
    port = s->listener->listen_tcp(url, &why);
  }
  return port >= 0 ? port : fail({-port, why}, err, err_len);
}

int kvfs_server_set_map(kvfs_server* s, const void* map, size_t map_bytes, char* err, size_t err_len) {
  std::shared_ptr<const ServedMap> served;
  std::vector<uint32_t> cache;
  if (const Status st = read_map(map, map_bytes, &served, &cache); st.err != 0) return fail(st, err, err_len);
  if (served->version < s->listener->map()->version)
    return fail({ESTALE, "the cluster map is older than the one that is served"}, err, err_len);
  // Clients must find the map before they are told that theirs is old.
  s->listener->set_map(served);
  for (size_t i = 0; i < s->servers.size(); ++i) {
    in_reactor(s->nodes[i]->reactor, [n = s->servers[i].get(), &served, &cache] {
      n->set_map(served->version, cache);
      return true;
    });
  }
  return 0;
}

int kvfs_server_stats(kvfs_server* s, kvfs_net_stats* out) {
  memset(out, 0, sizeof *out);
  for (size_t i = 0; i < s->servers.size(); ++i) {
    in_reactor(s->nodes[i]->reactor, [n = s->servers[i].get(), out] {
      n->add_stats(out);
      return true;
    });
  }
  s->listener->add_stats(out);
  s->rdma->add_stats(out);
  return 0;
}

void kvfs_server_stop(kvfs_server* s) {
  if (s == nullptr) return;
  s->end();
  delete s;
}
