// control.h owns the thread that talks to clients on the Unix socket: it admits sessions, makes rings and iovs, opens
// namespaces, and notices a client's death. It never touches chunk data and never waits for I/O or for Python.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../ring/control.h"
#include "namespaces.h"
#include "reactor.h"
#include "shared_memory.h"

namespace kvfs {

struct ControlConfig {
  std::string path;
  uint32_t allowed_uid = KVFS_ANY_UID;  // besides 0 and our own; KVFS_ANY_UID = nobody else
  uint32_t max_sessions = 64;
  uint64_t session_bytes = uint64_t(4) << 30;
  uint64_t total_bytes = 0;  // of all sessions; 0: half of the machine's memory
};

struct ControlStats {
  std::atomic<uint64_t> sessions{0}, rings{0}, iovs{0}, iov_bytes{0};
};

class ControlServer {
 public:
  ControlServer(const ControlConfig& cfg, Reactor* reactor, InodeTable* inodes, Namespaces* ns, Upcalls* upcalls);
  ~ControlServer();
  Status start();
  // Ends every session and returns when all their memory is free. The reactor must still run.
  void stop();

  // Any thread.
  void answer(uint64_t upcall, int err);
  bool uid_ok(uint32_t uid) const;
  // Binds an inode to the session with this token; reply(handle or -errno) runs in the control thread.
  void bind_file(const uint8_t token[16], uint64_t ino, bool can_read, bool can_write, std::function<void(int)> reply);
  // Gives the session with this token memory that it shares with us, mapped at base; reply(id or -errno) runs once it may be
  // used. The mapping is ours from now on, also if this fails.
  void bind_iov(const uint8_t token[16], void* base, uint64_t size, std::function<void(int)> reply);
  uint64_t session_bytes() const { return cfg_.session_bytes; }
  ControlStats& stats() { return stats_; }
  int post_fd() const { return post_fd_; }

 private:
  struct Client {
    uint64_t id = 0;
    int fd = -1;
    uint32_t uid = 0;
    pid_t pid = 0;  // for room_for(); a number used again only makes that stricter
    uint8_t token[16] = {};
    Session* session = nullptr;  // the reactor's
    std::array<Ring*, kMaxRings> rings{};
    std::array<Iov*, kMaxIovs> iovs{};
    std::vector<bool> ns_used, files_used;
    uint64_t bytes = 0, ring_bytes = 0;
    bool busy = false;  // a request is under way: nothing is read until it is answered
    bool closing = false;
    uint64_t upcall = 0;  // under way for `pending`
    CtlRequest pending{};
    std::shared_ptr<std::atomic<bool>> cancelled;  // of the memory being populated; the session outlives that
  };

  void run();
  void post(std::function<void()> fn);
  void run_posted();
  // One process gets half of all sessions at most, so that none keeps the others out.
  bool room_for(pid_t pid) const;
  void accept_some();
  void on_client(Client* c, uint32_t events);
  void handle(Client* c, const CtlRequest& q);
  void reply(Client* c, const CtlRequest& q, int err, uint32_t id = 0, uint64_t a = 0, const int* fds = nullptr,
             int nfds = 0);
  void ring_create(Client* c, const CtlRequest& q);
  void ring_destroy(Client* c, const CtlRequest& q);
  void ring_event(Client* c, const CtlRequest& q);
  void iov_create(Client* c, const CtlRequest& q);
  void iov_ready(Client* c, const CtlRequest& q, int err, int fd, void* mem, uint64_t bytes);
  void iov_free(Client* c, const CtlRequest& q);
  void ns_open(Client* c, const CtlRequest& q, bool may_ask);
  void drop(Client* c);
  void end_session(Client* c);
  Client* find(uint64_t id);
  Client* find_token(const uint8_t token[16]);
  void free_ring(Ring* r);
  void free_iov(Iov* v);

  ControlConfig cfg_;
  Reactor* reactor_;
  InodeTable* inodes_;
  Namespaces* ns_;
  Upcalls* upcalls_;
  int listen_fd_ = -1, epoll_fd_ = -1, post_fd_ = -1;
  std::thread thread_;
  std::mutex post_mu_;
  std::vector<std::function<void()>> posted_;
  bool stopping_ = false;
  Populator populator_;
  uint64_t last_id_ = 0;
  std::map<uint64_t, std::unique_ptr<Client>> clients_;  // <= max_sessions, those being freed included
  ControlStats stats_;
};

}  // namespace kvfs
