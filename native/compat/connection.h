// connection.h owns what the calls of one process share: a session with each mount's daemon, made when it is first needed,
// its idle rings and the memory it shares. A session that has lost its daemon is replaced at the next call that needs one;
// a forked child starts with none.
//
// Locks: Registry's, then Connection's. Neither is held while an operation is waited for.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../include/kvfs.h"

namespace kvfs::compat {

class Connection;

// Memory that a session shares with the daemon, as long as somebody holds it.
class Area {
 public:
  Area(kvfs_client* client, const kvfs_iov& iov, const kvfs_place& place) : client_(client), iov_(iov), place_(place) {}
  ~Area() { release(); }
  Area(const Area&) = delete;
  Area& operator=(const Area&) = delete;

  bool holds(uintptr_t from, uint64_t bytes) const { return from >= base() && bytes <= end() - from && from < end(); }
  bool meets(uintptr_t from, uint64_t bytes) const { return from < end() && base() < from + bytes; }
  uintptr_t base() const { return reinterpret_cast<uintptr_t>(iov_.base); }
  uintptr_t end() const { return base() + iov_.size; }
  uint16_t id() const { return iov_.id; }
  const kvfs_place& place() const { return place_; }
  // Not to be used for new operations.
  bool retired() const { return retired_.load(std::memory_order_acquire); }
  void retire() { retired_.store(true, std::memory_order_release); }
  // Returns when the daemon does not use it any more.
  void release();

 private:
  friend class Connection;
  kvfs_client* client_;
  kvfs_iov iov_;
  kvfs_place place_;
  uint64_t used_ = 0;  // Connection::clock_ when it was last asked for
  std::atomic<bool> retired_{false}, released_{false};
};

class Connection {
 public:
  static constexpr size_t kIdleRings = 16;  // each costs the daemon a look per turn

  Connection(kvfs_client* client, uint64_t dev) : client_(client), dev_(dev) {}
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  kvfs_client* client() const { return client_; }
  uint64_t dev() const { return dev_; }
  bool alive() const { return kvfs_alive(client_) == 1; }

  // A ring with nothing in flight, of at least min(entries, KVFS_RING_MAX_ENTRIES). 0 or -errno.
  int take_ring(uint32_t entries, kvfs_ring** out);
  // Takes back a ring; `idle`: with nothing in flight.
  void give_ring(kvfs_ring* ring, bool idle);

  // The shared area that holds [base, base + bytes), shared now if it is not. 0 or -errno.
  int share(void* base, uint64_t bytes, std::shared_ptr<Area>* out);
  // Forgets areas that [base, base + bytes) meets and that are not the file now mapped there (`place`).
  void check(void* base, uint64_t bytes, const kvfs_place& place);
  // Ends the sharing of what lies within [base, base + bytes); returns when the daemon is done with it.
  void forget(void* base, uint64_t bytes);

 private:
  struct Idle {
    kvfs_ring* ring;
    uint32_t entries;
  };
  bool drop_oldest();

  kvfs_client* const client_;
  const uint64_t dev_;
  std::mutex mu_;
  std::vector<Idle> idle_;                    // <= kIdleRings; the last given back is the first to go out
  std::map<kvfs_ring*, uint32_t> entries_;    // of rings that are out, <= the session's limit
  std::vector<std::shared_ptr<Area>> areas_;  // <= the session's limit
  uint64_t clock_ = 0;
};

class Registry {
 public:
  // The session with the daemon of a mount. 0 or -errno.
  int connect(const char* mount_point, std::shared_ptr<Connection>* out);
  // ... of the mount that a descriptor is on; -EBADF: on none.
  int connect_fd(int fd, std::shared_ptr<Connection>* out);
  // Whether there is a session with the mount that has this device number.
  bool connected(uint64_t dev);
  // Connection::forget and check on every session.
  void forget(void* base, uint64_t bytes);
  void check(void* base, uint64_t bytes, const kvfs_place& place);
  // Names of shared memory that this process made: unlinked one by one, or the rest at the process's end.
  void add_name(const std::string& path);
  void unlink_name(const std::string& path);
  void unlink_names();

 private:
  friend Registry& registry();
  Registry();
  std::unique_lock<std::mutex> enter();
  std::shared_ptr<Connection> find(uint64_t dev);
  int make(const char* mount_point, uint64_t dev, std::shared_ptr<Connection>* out);
  std::vector<std::shared_ptr<Connection>> all();

  std::mutex mu_;
  uint32_t generation_ = 0;                                      // to which connections_ and names_ belong
  std::set<std::string> names_;                                  // one per iov that is there
  std::map<uint64_t, std::shared_ptr<Connection>> connections_;  // by device; one per mount that was used
};

// The process's. Never destroyed: threads may still be at work when the process ends.
Registry& registry();

// Changes in a forked child.
uint32_t generation();

}  // namespace kvfs::compat
