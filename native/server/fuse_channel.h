// fuse_channel.h owns the mount's connection to the kernel. Requests are read here; reads and writes of open files are
// served by the reactor at once, and everything else goes to the daemon's libfuse as whole messages over a socket, whose
// answers come back the same way. So the daemon is a complete FUSE server that is asked less. Some requests may be given to
// a second socket, whose reader answers the kernel itself. Reactor thread only.
#pragma once

#include <linux/fuse.h>

#include <array>
#include <cstdint>
#include <memory>

#include "attr_table.h"
#include "entry_table.h"
#include "reactor.h"

namespace kvfs {

class FuseChannel {
 public:
  static constexpr unsigned kSlots = 64;             // requests read and neither answered nor passed on
  static constexpr uint32_t kMaxIo = 1 << 20;        // bytes of one read or write
  static constexpr unsigned kBudget = 16;            // requests, and answers of the daemon, per turn
  static constexpr unsigned kMaxLent = kSlots / 2;   // whose memory is on loan to the write-back cache
  static constexpr unsigned kAheads = kSlots / 4;    // reads made before they are asked for
  static constexpr unsigned kStreams = 16;           // readers whose order is watched
  static constexpr unsigned kAheadDepth = 2;         // of one reader
  static constexpr uint32_t kStreamIo = 128u << 10;  // bytes from which a request belongs to a stream

  // `kernel` is /dev/fuse after the mount, `daemon` the near end of a socketpair of SOCK_SEQPACKET; both are closed with
  // the channel. They are made non-blocking.
  FuseChannel(int kernel, int daemon, Reactor* reactor, Uring* uring, InodeTable* inodes, Upcalls* upcalls);
  ~FuseChannel();
  FuseChannel(const FuseChannel&) = delete;
  FuseChannel& operator=(const FuseChannel&) = delete;
  Status init();

  // Requests on the tree's inodes whose opcode is a bit of `opcodes` go to `direct` instead of the daemon's libfuse. It is
  // closed with the channel.
  void set_direct(int direct, uint64_t opcodes);

  // What the daemon leaves here to be answered without it. Thread-safe, as long as the channel or the pointer lives.
  struct Left {
    AttrTable attrs;
    EntryTable entries;
  };
  std::shared_ptr<Left> left() const { return left_; }

  void pump();         // once per turn
  bool ready() const;  // pump() has something to do
  // The last request was answered without the daemon and was no read: the next may be near. After reads waiting awake only
  // costs: depth 1 lost 20 % of 4 KiB reads.
  bool quick() const { return quick_; }
  // Takes what has come without being told of it. False: nothing had.
  bool look();
  // No request is read any more.
  void stop();
  bool idle() const { return used_ == 0; }
  void tell_memory(Store* store, bool add) const;  // of its slots: Store::memory
  // The end of an operation of slot `slot`, from the reactor.
  void done(uint64_t slot, int64_t result);

 private:
  // A request as the kernel gave it. What follows the head of a write begins at `data`, which is aligned for direct I/O.
  struct Ahead;
  struct Slot {
    Lender lender;  // first: it stands for the slot
    FuseChannel* channel = nullptr;
    bool answered = false;
    Ahead* ahead = nullptr;  // it is a read of ours
    struct {
      fuse_in_header in;
      union {
        fuse_read_in read;
        fuse_write_in write;
        fuse_getxattr_in getxattr;
        fuse_batch_forget_in forgets;
        char bytes[40];
      };
    } head;
    char* data = nullptr;
    size_t length = 0;
    Slot* next = nullptr;
  };
  // A read made before the kernel asks for it. It is as good as a new one while the inode's `changes` stay.
  struct Ahead {
    Slot* slot = nullptr;  // null: unused
    InodeRef inode;
    uint64_t off = 0, changes = 0, since = 0;
    uint32_t len = 0;
    bool ready = false, dropped = false;
    int64_t result = 0;
    Slot* waiter = nullptr;  // the request that it is for, if that came first
  };
  struct Stream {
    uint64_t ino = 0, fh = 0, next = 0, since = 0;
  };
  static_assert(sizeof(Slot::head) == sizeof(fuse_in_header) + sizeof(fuse_write_in));

  unsigned read_requests();  // how many were there
  void take(Slot* s);
  bool serve(Slot* s, uint8_t opcode, uint64_t off, uint32_t len);
  void send(Slot* s, uint8_t opcode, uint8_t flags, uint64_t ino, uint64_t off, uint32_t len);
  bool read(Slot* s);
  bool from_ahead(Slot* s);
  void follow(uint64_t ino, uint64_t fh, uint64_t off, uint32_t len);
  void read_ahead(const InodeRef& inode, uint64_t off, uint32_t len);
  Ahead* find_ahead(uint64_t ino, uint64_t off);
  Ahead* new_ahead();
  void ahead_done(Ahead* a, int64_t result);
  void give(Ahead* a, Slot* s);
  void drop(Ahead* a);
  void end(Ahead* a);
  Slot* new_slot();
  static void loan_over(Lender* l);
  bool answer_xattr(Slot* s);
  bool answer_lookup(Slot* s);
  bool only_plain_forgets(const Slot* s);
  int receiver(const Slot* s) const;
  void pass_on(Slot* s);
  void relay_answers();
  void patch_init(char* answer, size_t length);
  void reply(Slot* s, int error, const void* body, size_t bytes);
  void release(Slot* s);
  void kernel_gone();
  static void on_kernel(void* self, uint32_t revents);
  static void on_daemon(void* self, uint32_t revents);
  static void on_room(void* self, uint32_t revents);

  const int kernel_, daemon_;
  int direct_ = -1;
  uint64_t direct_opcodes_ = 0;
  Reactor* reactor_;
  Uring* uring_;
  InodeTable* inodes_;
  Upcalls* upcalls_;
  const std::shared_ptr<Left> left_ = std::make_shared<Left>();
  Ring ring_;  // stands for us where the reactor names an operation's origin
  char* memory_ = nullptr;
  size_t memory_bytes_ = 0;
  std::unique_ptr<char[]> answer_;
  std::unique_ptr<Slot[]> slots_;
  Slot* free_ = nullptr;
  unsigned used_ = 0, lent_ = 0;
  std::array<Ahead, kAheads> aheads_;
  std::array<Stream, kStreams> streams_;
  uint64_t clock_ = 0;       // for `since`
  Slot* blocked_ = nullptr;  // its receiver's socket is full; nothing is read meanwhile
  uint32_t message_max_ = 0;
  uint64_t init_unique_ = 0;
  int epoll_ = -1;  // of kernel_
  int kernel_poll_ = -1, daemon_poll_ = -1, room_poll_ = -1;
  bool kernel_ready_ = true, daemon_ready_ = false;
  bool gone_ = false, stopped_ = false;
  bool quick_ = false;
};

}  // namespace kvfs
