// net_listener.h owns the thread of a chunk server that meets strangers: it accepts connections, reads their Hellos, checks
// capabilities and hands who may come in to the reactor of the target that is asked for. Nothing of a connection reaches a
// reactor before that.
//
// Bounds: kMaxListeners listeners; kMaxHandshakes connections that are not through yet, those handed to a reactor and not
// yet looked at included, each for at most kHandshakeNs and 64 + wire::kMaxCapability bytes from it. While there are that
// many nobody is accepted: the kernel's backlog waits.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../transport/tcp_connect.h"
#include "../wire/capability.h"
#include "../wire/map.h"
#include "net_server.h"

namespace kvfs {

class Reactor;

constexpr uint32_t kMaxListeners = 32;
constexpr uint32_t kMaxHandshakes = 128;
constexpr uint64_t kHandshakeNs = 5000000000u;

// The cluster map that clients are given.
struct ServedMap {
  std::vector<uint8_t> bytes;
  uint32_t version = 0;
};

// Where admitted connections go. Both outlive the listener.
struct NetTarget {
  Reactor* reactor = nullptr;
  NetServer* server = nullptr;
};

// Something else that the thread waits for: listeners of other transports. Its calls run on the listener thread.
class ListenerHook {
 public:
  virtual ~ListenerHook() = default;
  virtual int fd() const = 0;  // readable when ready() has something to do
  virtual void ready() = 0;
};

class NetListener {
 public:
  // key: Ed25519 public key, or null: nobody's rights are checked.
  NetListener(std::vector<NetTarget> targets, const uint8_t* key, const NetServerOptions& opt);
  ~NetListener();
  Status start();
  // Accepts nobody any more and drops who is not through; what was posted to reactors is there before it returns.
  void stop();

  // "tcp://HOST:PORT", see kvfs_server_listen. Any thread. The port, or -errno.
  int listen_tcp(const std::string& url, std::string* why);
  // "shm://NAME": 0 or -errno. Any thread.
  int listen_shm(const std::string& url, std::string* why);
  int add_hook(std::unique_ptr<ListenerHook> hook);  // before or after start(); 0 or -errno
  void set_map(std::shared_ptr<const ServedMap> map);
  std::shared_ptr<const ServedMap> map() const;

  // What a Hello with its capability is worth: 0 and the rights, or -errno of HelloReply. Any thread.
  int examine(const wire::Hello& hello, const std::vector<uint8_t>& capability, wire::Capability* out) const;
  const NetTarget& target(uint32_t n) const { return targets_[n]; }
  void add_stats(kvfs_net_stats* out) const;

 private:
  struct Peer {  // a connection that is not through yet
    explicit Peer(int fd) : shake(fd) {}
    ServerHandshake shake;
    uint64_t deadline_ns = 0;
    bool writing = false;
  };
  int add_listener(int fd);  // under mu_; 0 or -errno
  void run();
  void accept_some(int listener);
  void go_on(Peer* p);
  void heard(Peer* p);
  void refuse(Peer* p, int err);
  void write_more(Peer* p);
  void hand_over(Peer* p, wire::Capability capability);
  void forget(Peer* p, bool close_fd);
  void listen_or_not();
  void drop_late();

  const std::vector<NetTarget> targets_;
  const bool checks_;
  std::array<uint8_t, wire::kPublicKeyBytes> key_{};
  const NetServerOptions opt_;
  int epoll_ = -1, wake_ = -1;
  std::thread thread_;
  std::atomic<bool> stop_{false};
  mutable std::mutex mu_;
  std::vector<int> listeners_;                        // by mu_
  std::vector<std::string> paths_;                    // by mu_: of Unix sockets
  std::vector<std::unique_ptr<ListenerHook>> hooks_;  // by mu_
  std::shared_ptr<const ServedMap> map_;              // by mu_
  bool listening_ = true;                             // by mu_: the epoll set has the listeners
  std::vector<std::unique_ptr<Peer>> peers_;
  std::shared_ptr<std::atomic<uint32_t>> handed_ = std::make_shared<std::atomic<uint32_t>>(0);
  std::atomic<uint64_t> refused_{0}, protocol_errors_{0};
};

// "tcp://HOST:PORT" with a numeric host: 0 and the address, or -EINVAL.
int parse_listen_url(const std::string& url, const char* scheme, sockaddr_storage* out, socklen_t* len);

}  // namespace kvfs
