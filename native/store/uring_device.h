// uring_device.h owns the real storage: Uring, one io_uring in which a reactor waits for disks, sockets and eventfds alike,
// and UringDevice, a block device or preallocated regular file on it, opened O_DIRECT and locked.
// A Uring and its devices belong to the thread that created the Uring.
#pragma once

#include <liburing.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "store.h"

namespace kvfs {

class UringDevice;

struct UringOptions {
  unsigned entries = 256;      // device operations in the kernel at once, all devices together; more wait in a list
  bool single_issuer = true;   // false: another thread than the creating one may use it (one at a time)
  bool defer_taskrun = false;  // with single_issuer: completions run only inside submit_and_wait
};

// One operation on a socket. The owner's; from Uring::submit(NetIo*) until `done` the ring's, as is all it points to.
// The socket must not be O_NONBLOCK, or the kernel answers -EAGAIN instead of waiting.
struct alignas(8) NetIo {
  enum class Op : uint8_t {
    RecvMsg,  // to msg's iovecs; with MSG_WAITALL all of them, unless the peer or an error ends it
    SendMsg,  // from msg's iovecs
    Nop       // `done` from the next submit_and_wait, with result 0
  };
  Op op = Op::Nop;
  int fd = -1;
  int flags = 0;  // MSG_*
  msghdr* msg = nullptr;
  int32_t result =
      0;  // bytes, which may be fewer than asked for: also after cancel(); 0: the peer has ended; or -errno
  void (*done)(NetIo*) = nullptr;
  void* owner = nullptr;

 private:
  friend class Uring;
  enum class State : uint8_t { Idle, Waiting, Kernel };
  State state = State::Idle;
  bool cancelled = false;
  uint32_t retries = 0;
  NetIo* next = nullptr;  // of those that wait for room in the submission queue
};

class Uring {
 public:
  static constexpr unsigned kBuffers = 1024;  // registered buffers
  static constexpr unsigned kFiles = 64;      // devices
  static constexpr unsigned kPolls = 4096;    // watched descriptors
  using PollReady = void (*)(void* owner, uint32_t revents);

  static Status create(const UringOptions& opt, std::unique_ptr<Uring>* out);
  ~Uring();
  Uring(const Uring&) = delete;
  Uring& operator=(const Uring&) = delete;

  // Pins [p, p+len) (len <= 1 GiB) for MemRef::fixed. Returns the index or -errno (-ENOSPC: table full).
  int register_buffer(void* p, size_t len);
  // The caller has no I/O on it in flight any more.
  int unregister_buffer(int idx);

  // Calls ready(owner, revents) from submit_and_wait whenever fd becomes readable, or whatever `events` says (multishot
  // poll: edge-like, so the callback drains the fd). Returns a handle >= 0 or -errno. After remove_poll no call comes any
  // more, at once.
  int add_poll(int fd, PollReady ready, void* owner, uint32_t events = POLLIN);
  void remove_poll(int handle);

  // Any number, each with one place in the kernel; those that find no room in the submission queue wait in a list.
  void submit(NetIo* io);
  // A submitted operation ends soon: with what was moved until then, or -ECANCELED; or as if this had not been called.
  void cancel(NetIo* io);

  // Sends what is queued and, if nothing has happened yet, waits up to timeout_ns (0 = do not wait, UINT64_MAX = forever), runs
  // the callbacks. Returns how many device and socket operations finished plus poll callbacks ran, or -errno (-EINTR is 0).
  // Waits for `min` of them (a busy reactor is woken once per handful), the timeout notwithstanding.
  int submit_and_wait(uint64_t timeout_ns, unsigned min = 1);
  // Something has happened that submit_and_wait would tell of, or make ready: completions wait for a call of ours.
  bool has_events() const;

 private:
  friend class UringDevice;
  struct Op {
    Io* io;
    UringDevice* dev;
    uint32_t moved;    // bytes done so far
    uint32_t retries;  // EAGAIN
    Op* next;          // free list, or list of operations to send again
  };
  struct Poll {
    int fd = -1;
    uint32_t events = POLLIN;
    uint32_t gen = 0;    // of the handle's user, so that a late event of the last one is dropped
    bool live = false;   // somebody wants events
    bool armed = false;  // the kernel has a request of this generation
    PollReady ready = nullptr;
    void* owner = nullptr;
  };

  Uring() = default;
  io_uring_sqe* sqe();
  bool prep(Op* op);
  bool arm(uint32_t idx);
  void start(UringDevice* dev, Io* io);
  void resend(Op* op);
  void pump();
  void finish(Op* op, int32_t result);
  void on_op(Op* op, int32_t res);
  bool prep(NetIo* io);
  void wait_for_room(NetIo* io);
  void on_net(NetIo* io, int32_t res);
  bool end_net(NetIo* io);
  void end_poll(uint64_t user_data);
  void on_poll(uint64_t user_data, int32_t res, uint32_t flags);
  void reap();

  io_uring ring_{};
  bool ready_ = false;
  bool buffers_ok_ = false, files_ok_ = false;  // the kernel has the tables
  unsigned events_ = 0;
  unsigned next_dev_ = 0;  // whose waiting operations are first to start
  std::vector<Op> ops_;
  Op* free_ops_ = nullptr;
  Op* resend_head_ = nullptr;
  Op** resend_tail_ = &resend_head_;
  NetIo* net_head_ = nullptr;  // submitted, not in the submission queue yet
  NetIo** net_tail_ = &net_head_;
  std::vector<NetIo*> net_cancel_;  // to be cancelled when there is room to say so
  std::vector<UringDevice*> devs_ = std::vector<UringDevice*>(kFiles);
  std::vector<bool> buffers_ = std::vector<bool>(kBuffers);
  std::vector<Poll> polls_;
  std::vector<uint32_t> free_polls_;
  std::vector<uint32_t> rearm_;  // polls without a request in the kernel
};

struct DeviceOptions {
  uint64_t create_bytes = 0;  // regular file: create if absent or empty, of this size; 0 = must exist
  bool read_only = false;
  bool allow_buffered = false;  // tests on file systems without O_DIRECT (tmpfs): go through the page cache
};

class UringDevice final : public Device {
 public:
  // EBUSY: in use by another process. EINVAL/EOPNOTSUPP: not a device or regular file, no O_DIRECT.
  static Status open(Uring& ring, const std::string& path, const DeviceOptions& opt, std::unique_ptr<UringDevice>* out);
  ~UringDevice() override;  // nothing in flight

  uint64_t size() const override { return size_; }
  uint32_t align() const override { return align_; }
  bool mem_ok(const void* p) const override { return (reinterpret_cast<uintptr_t>(p) & (mem_align_ - 1)) == 0; }
  void submit(Io* io) override;
  unsigned poll(bool wait) override;
  unsigned inflight() const override { return inflight_; }

  bool direct() const { return direct_; }
  Uring& ring() { return ring_; }

 private:
  friend class Uring;
  explicit UringDevice(Uring& ring) : ring_(ring) {}

  Uring& ring_;
  int fd_ = -1;
  int slot_ = -1;  // registered file
  bool direct_ = true;
  uint64_t size_ = 0;
  uint32_t align_ = 4096;
  uint32_t mem_align_ = 512;
  unsigned inflight_ = 0;
  uint64_t finished_ = 0;
  Io* wait_head_ = nullptr;  // submitted, no free Op yet
  Io** wait_tail_ = &wait_head_;
};

}  // namespace kvfs
