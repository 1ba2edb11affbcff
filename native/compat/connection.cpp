// connection.cpp owns sessions with daemons and what belongs to them. See connection.h.
#include "connection.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <utility>

#include "files.h"
#include "mounts.h"

namespace kvfs::compat {

namespace {
std::atomic<uint32_t> g_generation{0};

// Few sizes, so that an idle ring fits the next caller.
uint32_t ring_size(uint32_t entries) {
  for (uint32_t n : {64u, 512u}) {
    if (entries <= n) return n;
  }
  return KVFS_RING_MAX_ENTRIES;
}
}  // namespace

uint32_t generation() { return g_generation.load(std::memory_order_relaxed); }

void Area::release() {
  retire();
  if (!released_.exchange(true)) kvfs_iov_free(client_, &iov_);
}

Connection::~Connection() {
  areas_.clear();
  kvfs_close(client_);
}

int Connection::take_ring(uint32_t entries, kvfs_ring** out) {
  const uint32_t size = ring_size(entries);
  std::lock_guard<std::mutex> g(mu_);
  const auto fits = std::find_if(idle_.rbegin(), idle_.rend(), [&](const Idle& i) { return i.entries == size; });
  if (fits != idle_.rend()) {
    *out = fits->ring;
    idle_.erase(std::next(fits).base());
  } else {
    int err = kvfs_ring_create(client_, size, out);
    if (err == -EMFILE && !idle_.empty()) {  // those of other sizes keep ours from being made
      kvfs_ring_destroy(idle_.front().ring);
      idle_.erase(idle_.begin());
      err = kvfs_ring_create(client_, size, out);
    }
    if (err != 0) return err;
  }
  entries_[*out] = size;
  return 0;
}

void Connection::give_ring(kvfs_ring* ring, bool idle) {
  {
    std::lock_guard<std::mutex> g(mu_);
    const uint32_t size = std::exchange(entries_[ring], 0);
    entries_.erase(ring);
    if (idle && idle_.size() < kIdleRings) {
      idle_.push_back({ring, size});
      return;
    }
  }
  kvfs_ring_destroy(ring);
}

bool Connection::drop_oldest() {
  auto oldest = areas_.end();
  for (auto a = areas_.begin(); a != areas_.end(); ++a) {
    if (a->use_count() == 1 && (oldest == areas_.end() || (*a)->used_ < (*oldest)->used_)) oldest = a;
  }
  if (oldest == areas_.end()) return false;
  (*oldest)->release();
  areas_.erase(oldest);
  return true;
}

int Connection::share(void* base, uint64_t bytes, std::shared_ptr<Area>* out) {
  const auto from = reinterpret_cast<uintptr_t>(base);
  std::lock_guard<std::mutex> g(mu_);
  for (auto& a : areas_) {
    if (!a->holds(from, bytes)) continue;
    a->used_ = ++clock_;
    *out = a;
    return 0;
  }
  kvfs_iov iov{};
  kvfs_place place{};
  int err;
  // Wrapped memory is never given back by its owner, so what nobody has used for longest makes room.
  while ((err = kvfs_iov_register(client_, base, bytes, &iov)) == -EMFILE || err == -EDQUOT) {
    if (!drop_oldest()) return err;
  }
  if (err == 0) err = kvfs_iov_place(iov.base, iov.size, &place);
  if (err != 0) return err;
  auto area = std::make_shared<Area>(client_, iov, place);
  area->used_ = ++clock_;
  areas_.push_back(area);
  *out = std::move(area);
  return 0;
}

void Connection::check(void* base, uint64_t bytes, const kvfs_place& place) {
  const auto from = reinterpret_cast<uintptr_t>(base);
  std::lock_guard<std::mutex> g(mu_);
  std::erase_if(areas_, [&](const std::shared_ptr<Area>& a) {
    const kvfs_place& p = a->place();
    // The same file, shifted by the same distance.
    const bool same = p.dev == place.dev && p.ino == place.ino && p.off - a->base() == place.off - from;
    if (!a->meets(from, bytes) || same) return false;
    a->retire();
    return true;
  });
}

void Connection::forget(void* base, uint64_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(base), last = first + bytes;
  const uintptr_t from = first & ~uintptr_t{4095}, to = (last + 4095) & ~uintptr_t{4095};
  std::vector<std::shared_ptr<Area>> going;
  {
    std::lock_guard<std::mutex> g(mu_);
    std::erase_if(areas_, [&](const std::shared_ptr<Area>& a) {
      if (a->base() < from || a->end() > to) return false;
      going.push_back(a);
      return true;
    });
  }
  for (auto& a : going) a->release();
}

Registry::Registry() {
  // A child of a process with threads must not find the locks held by a thread that it does not have.
  pthread_atfork(
      [] {
        registry().mu_.lock();
        files().lock();
      },
      [] {
        files().unlock();
        registry().mu_.unlock();
      },
      [] {
        g_generation.fetch_add(1, std::memory_order_relaxed);
        files().unlock();
        registry().mu_.unlock();
      });
}

// The parent's sessions and memory are the parent's. Iors that a child has of it keep their session.
std::unique_lock<std::mutex> Registry::enter() {
  std::unique_lock<std::mutex> lock(mu_);
  if (std::exchange(generation_, generation()) != generation()) {
    connections_.clear();
    names_.clear();
  }
  return lock;
}

Registry& registry() {
  static auto* const r = new Registry;
  return *r;
}

std::shared_ptr<Connection> Registry::find(uint64_t dev) {
  const auto it = connections_.find(dev);
  if (it == connections_.end()) return nullptr;
  if (it->second->alive()) return it->second;
  connections_.erase(it);
  return nullptr;
}

int Registry::make(const char* mount_point, uint64_t dev, std::shared_ptr<Connection>* out) {
  std::string socket;
  int err = socket_of(mount_point, &socket);
  kvfs_client* client = nullptr;
  if (err != 0) return err == -ENOTCONN ? -EREMOTEIO : err;
  err = kvfs_open(socket.c_str(), &client);
  if (err != 0) return err == -ECONNREFUSED || err == -ENOENT ? -EREMOTEIO : err;  // nobody is there
  *out = connections_[dev] = std::make_shared<Connection>(client, dev);
  return 0;
}

int Registry::connect(const char* mount_point, std::shared_ptr<Connection>* out) {
  uint64_t dev = 0;
  int err = device_of(AT_FDCWD, mount_point, &dev);
  if (err != 0) return err == -ENOTCONN ? -EREMOTEIO : err;
  const auto lock = enter();
  *out = find(dev);
  return *out ? 0 : make(mount_point, dev, out);
}

int Registry::connect_fd(int fd, std::shared_ptr<Connection>* out) {
  uint64_t dev = 0;
  if (device_of(fd, "", &dev) != 0) return -EBADF;
  const auto lock = enter();
  *out = find(dev);
  if (*out) return 0;
  Mount m;
  return mount_of_dev(dev, &m) ? make(m.point.c_str(), dev, out) : -EBADF;
}

bool Registry::connected(uint64_t dev) {
  const auto lock = enter();
  return find(dev) != nullptr;
}

void Registry::add_name(const std::string& path) {
  const auto lock = enter();
  names_.insert(path);
}

void Registry::unlink_name(const std::string& path) {
  unlink(path.c_str());  // again: there is none of that name
  const auto lock = enter();
  names_.erase(path);
}

void Registry::unlink_names() {
  const auto lock = enter();
  for (const std::string& path : names_) unlink(path.c_str());
  names_.clear();
}

std::vector<std::shared_ptr<Connection>> Registry::all() {
  const auto lock = enter();
  std::vector<std::shared_ptr<Connection>> out;
  for (auto& [dev, c] : connections_) out.push_back(c);
  return out;
}

void Registry::forget(void* base, uint64_t bytes) {
  for (auto& c : all()) c->forget(base, bytes);
}

void Registry::check(void* base, uint64_t bytes, const kvfs_place& place) {
  for (auto& c : all()) c->check(base, bytes, place);
}

}  // namespace kvfs::compat
