// connector.h owns the threads on which connections begin, and the kinds of connections there are.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../store/uring_device.h"
#include "network.h"

namespace kvfs {

// A kind of connection.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual wire::Transport kind() const = 0;
  virtual std::vector<Route> routes(const wire::MapEndpoint& e) = 0;
  // Makes the connection and exchanges hellos; sets what came of it in `d`. Blocks until deadline_ns at most. Any thread.
  virtual void dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>& capability,
                    uint64_t deadline_ns) = 0;
  virtual std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) = 0;
  virtual void memory(void* base, size_t len, bool add) = 0;
};

struct ConnectorOptions {
  std::vector<uint8_t> capability;  // at most wire::kMaxCapability bytes
  uint64_t features = wire::kFeatures;
};

// Bounds: kThreads attempts at once, the others wait; the asker has one per rail and one for the map.
class Connector final : public Network {
 public:
  static constexpr unsigned kThreads = 8;
  Connector(Uring* uring, ConnectorOptions opt);
  ~Connector() override;                                                           // waits for attempts under way
  void add(std::unique_ptr<Transport> t) { transports_.push_back(std::move(t)); }  // before the first dial()
  Status init();

  std::vector<Route> routes(const wire::MapEndpoint& e) override;
  void dial(std::unique_ptr<Dial> d) override;
  std::unique_ptr<Dial> taken() override;
  std::unique_ptr<ClientChannel> channel(Dial* d, const ChannelLimits& limits) override;
  void memory(void* base, size_t len, bool add) override;
  void wait(uint64_t timeout_ns) override;
  uint64_t now_ns() override;

 private:
  Transport* of(const wire::MapEndpoint& e);
  void run();
  void attempt(Dial* d);

  Uring* uring_;
  ConnectorOptions opt_;
  uint8_t client_[16];
  std::vector<std::unique_ptr<Transport>> transports_;
  int fd_ = -1, poll_ = -1;  // readable: something has been done
  std::mutex mu_;
  std::condition_variable cv_;
  std::deque<std::unique_ptr<Dial>> waiting_, done_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace kvfs
