// fuse_channel_test.cpp tests what the node between the kernel and the daemon's libfuse serves, what it passes on, and how
// it ends.
#include <algorithm>
#include <thread>

#include "file_client.h"
#include "fuse_channel_fixture.h"

namespace {

TEST_F(FuseChannelTest, ServesReadsAndWritesOfOpenInodes) {
  expect_answer(read_request(kIno, 0, 4096), 0, "");
  std::string model;
  unsigned seed = 0;
  for (size_t size : {1, 4096, 4097, 70001, 131072}) {
    const size_t off = model.size() * 2;
    const std::string data = noise(size, ++seed);
    expect_written(kIno, off, data);
    model.resize(off, '\0');
    model += data;
    EXPECT_EQ(kvfs_node_inode_size(node_, kIno), int64_t(model.size()));
  }
  for (size_t off = 0; off < model.size() + 200000; off += 100003)
    expect_answer(read_request(kIno, off, 150000), 0, off < model.size() ? model.substr(off, 150000) : "");
  expect_answer(write_request(kIno, uint64_t(INT64_MAX), "x"), -EFBIG);
  expect_answer(read_request(kIno, UINT64_MAX, 1), -EFBIG);
  expect_written(kIno, 3, "");
  expect_nothing(daemon_);
}

TEST_F(FuseChannelTest, ServesTheLongestRequest) {
  if (!privileged()) GTEST_SKIP() << "needs long messages";
  const std::string data = noise(FuseChannel::kMaxIo);
  expect_written(kIno, 12345, data);
  expect_answer(read_request(kIno, 12345, FuseChannel::kMaxIo), 0, data);
  expect_passed_on(read_request(kIno, 0, FuseChannel::kMaxIo + 1));
  expect_passed_on(write_request(kIno, 0, data + "1"));
  expect_passed_on(write_request(kView, 0, data));
  expect_nothing(kernel_);
}

TEST_F(FuseChannelTest, PassesOnEverythingElseUnchanged) {
  for (uint64_t ino : {kUnknown, kView}) {
    expect_passed_on(read_request(ino, 0, 4096));
    expect_passed_on(write_request(ino, 7, noise(5000)));
    expect_passed_on(write_request(ino, 7, ""));
  }
  for (size_t n = 0; n < 200; ++n) expect_passed_on(request(FUSE_LOOKUP, 1, noise(n, unsigned(n))));
  for (uint32_t op : std::vector<uint32_t>{FUSE_SETATTR, FUSE_SETXATTR, FUSE_OPEN, FUSE_RELEASE, FUSE_FSYNC,
                                           FUSE_READDIR, FUSE_RENAME2, FUSE_FALLOCATE, FUSE_DESTROY, 4096})
    expect_passed_on(request(op, kIno, noise(64)));
  expect_passed_on(request(FUSE_SETXATTR, kIno, noise(66000)));
  expect_nothing(kernel_);
}

TEST_F(FuseChannelTest, RelaysTheDaemonsAnswersButNoNotifications) {
  for (size_t n : {0, 1, 40, 5000, 120000}) {
    const std::string m = answer(n + 2, n == 1 ? -ENOENT : 0, noise(n));
    put(daemon_, answer(0, FUSE_NOTIFY_INVAL_INODE, noise(24)));
    put(daemon_, "short");
    put(daemon_, m);
    EXPECT_TRUE(get(kernel_) == m);
  }
  if (privileged()) {
    const std::string m = answer(4, 0, noise(FuseChannel::kMaxIo));
    put(daemon_, m);
    EXPECT_TRUE(get(kernel_) == m);
  }
  // More at once than it takes in a turn, and in their order.
  for (uint64_t i = 1; i < 200; ++i) put(daemon_, answer(i, 0));
  for (uint64_t i = 1; i < 200; ++i) EXPECT_EQ(next_answer().head.unique, i);
  expect_nothing(kernel_);
}

TEST_F(FuseChannelTest, BoundsWhatInitAgreesOn) {
  fuse_init_out init{};
  init.major = 7;
  init.minor = 31;
  init.max_readahead = 77;
  init.flags = 0x1234;
  init.max_background = 5;
  init.max_write = 16 << 20;
  init.max_pages = 4096;
  auto agreed = [&](const std::string& said) {
    expect_passed_on(request(FUSE_INIT, 0, noise(64)));
    put(daemon_, answer(unique_, 0, said));
    const std::string body = next_answer().body;
    EXPECT_EQ(body.size(), said.size());
    fuse_init_out out{};
    memcpy(&out, body.data(), std::min(sizeof out, body.size()));
    return out;
  };
  fuse_init_out out = agreed(bytes(init));
  EXPECT_EQ(out.max_background, FuseChannel::kSlots);
  EXPECT_LT(out.congestion_threshold, FuseChannel::kSlots);
  EXPECT_LE(out.max_write, FuseChannel::kMaxIo);
  EXPECT_EQ(out.max_pages * 4096u, out.max_write);
  EXPECT_EQ(out.max_readahead, 77u);
  EXPECT_EQ(out.flags, 0x1234u);
  const uint64_t asked = unique_;
  put(daemon_, answer(asked, 0, bytes(init)));  // only the answer to INIT
  EXPECT_TRUE(next_answer().body == bytes(init));
  expect_passed_on(request(FUSE_GETATTR, 1, noise(16)));
  put(daemon_, answer(unique_, 0, bytes(init)));
  EXPECT_TRUE(next_answer().body == bytes(init));

  init.max_write = 4096;
  init.max_pages = 1;
  out = agreed(bytes(init));  // less than the bounds stays
  EXPECT_EQ(out.max_write, 4096u);
  EXPECT_EQ(out.max_pages, 1);

  const std::string old = bytes(init).substr(0, 24);  // of an old protocol
  expect_passed_on(request(FUSE_INIT, 0, noise(64)));
  put(daemon_, answer(unique_, 0, old));
  EXPECT_TRUE(next_answer().body == old);
  expect_passed_on(request(FUSE_INIT, 0, noise(64)));
  put(daemon_, answer(unique_, -EPROTO));
  EXPECT_EQ(next_answer().head.error, -EPROTO);
}

TEST_F(FuseChannelTest, ASmallSocketMakesSmallRequests) {
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
  close_kernel();
  close_daemon();
  ASSERT_EQ(begin(100 << 10), 0);
  fuse_init_out init{};
  init.max_write = 1 << 20;
  init.max_pages = 256;
  expect_passed_on(request(FUSE_INIT, 0, noise(64)));
  put(daemon_, answer(unique_, 0, bytes(init)));
  const std::string body = next_answer().body;
  ASSERT_EQ(body.size(), sizeof init);
  memcpy(&init, body.data(), sizeof init);
  EXPECT_EQ(init.max_write, 128u << 10);
  EXPECT_EQ(init.max_pages, 32);
  for (int i = 0; i < 10; ++i) expect_passed_on(write_request(kView, 0, noise(init.max_write)));
}

TEST_F(FuseChannelTest, RefusesASocketThatCannotHoldARequest) {
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
  close_kernel();
  close_daemon();
  EXPECT_EQ(begin(2048), -ENOBUFS);
  EXPECT_EQ(get(kernel_), "");  // closed
  EXPECT_EQ(get(daemon_), "");
  close_kernel();
  close_daemon();
  int file = open("/dev/null", O_RDWR | O_CLOEXEC), k[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, k), 0);
  EXPECT_EQ(kvfs_node_fuse_start(node_, k[1], file, nullptr, 0), -ENOTSOCK);
  EXPECT_EQ(get(k[0]), "");
  close(k[0]);
  ASSERT_EQ(begin(), 0);
  expect_serves();
}

TEST_F(FuseChannelTest, AFlushSendsWhatWasWrittenToTheStore) {
  const std::string body = noise(24);
  expect_answer(request(FUSE_FLUSH, kIno, body), 0);
  expect_written(kIno, 0, "abc");
  expect_answer(request(FUSE_FLUSH, kIno, body), 0);
  for (int i = 0; i < 2000 && stats().dirty_bytes != 0; ++i) usleep(100);  // far less than dirty pages live otherwise
  EXPECT_EQ(stats().dirty_bytes, 0u);
  EXPECT_EQ(stats().file_chunks, 1u);
  expect_passed_on(request(FUSE_FLUSH, kUnknown, body));
  expect_passed_on(request(FUSE_FLUSH, kView, body));
}

TEST_F(FuseChannelTest, AnswersForTheCapabilityOnlyWhereThereIsNone) {
  constexpr char kName[] = "security.capability";
  expect_passed_on(xattr_request(kIno, kName));
  ASSERT_EQ(kvfs_node_inode_no_capability(node_, kIno, 1), 0);
  expect_answer(xattr_request(kIno, kName), -ENODATA);
  expect_answer(xattr_request(kIno, kName, 0), -ENODATA);
  for (const char* name : {"security.capabilitx", "security.capabilit", "security.capability2", "user.name", ""})
    expect_passed_on(xattr_request(kIno, name));
  expect_passed_on(xattr_request(kUnknown, kName));
  std::string other = xattr_request(kIno, kName);
  uint32_t lists = FUSE_LISTXATTR;
  memcpy(other.data() + offsetof(fuse_in_header, opcode), &lists, sizeof lists);
  expect_passed_on(other);
  ASSERT_EQ(kvfs_node_inode_no_capability(node_, kIno, 0), 0);
  expect_passed_on(xattr_request(kIno, kName));
  EXPECT_EQ(kvfs_node_inode_no_capability(node_, kUnknown, 1), -ENOENT);
}

TEST_F(FuseChannelTest, GivesEachEntryThatWasLeftOnce) {
  auto entry = [](uint64_t ino, const std::string& name) {
    fuse_entry_out e{};
    e.nodeid = e.attr.ino = ino;
    e.attr.size = ino * 10;
    fuse_dirent d{};
    d.ino = ino;
    d.namelen = uint32_t(name.size());
    std::string s = bytes(e) + bytes(d) + name;
    s.resize(sizeof e + FUSE_DIRENT_ALIGN(sizeof d + name.size()));
    return s;
  };
  auto leave = [&](uint64_t parent, const std::string& entries) {
    return kvfs_node_fuse_entries(node_, parent, entries.data(), entries.size());
  };
  auto lookup = [&](uint64_t parent, const std::string& name) {
    return request(FUSE_LOOKUP, parent, name + std::string(1, '\0'));
  };
  auto answer_of = [&](uint64_t ino, const std::string& name) {
    return entry(ino, name).substr(0, sizeof(fuse_entry_out));
  };
  const std::string longest(255, 'n'), in_head(39, 'h'), beyond(40, 'b');
  ASSERT_EQ(leave(1, entry(100, "a") + entry(101, longest) + entry(102, in_head) + entry(103, beyond)), 0);
  ASSERT_EQ(leave(2, entry(104, "a") + entry(kIno, "open") + entry(105, "changed") + entry(106, "old")), 0);
  expect_answer(lookup(1, longest), 0, answer_of(101, longest));
  expect_answer(lookup(1, in_head), 0, answer_of(102, in_head));
  expect_answer(lookup(1, beyond), 0, answer_of(103, beyond));
  expect_answer(lookup(2, "a"), 0, answer_of(104, "a"));
  expect_answer(lookup(1, "a"), 0, answer_of(100, "a"));
  expect_passed_on(lookup(1, "a"));
  expect_passed_on(lookup(2, longest));
  expect_passed_on(lookup(2, "open"));  // only the daemon knows its size
  ASSERT_EQ(kvfs_node_fuse_entry_changed(node_, 105), 0);
  ASSERT_EQ(kvfs_node_fuse_entry_changed(node_, 999), 0);
  expect_passed_on(lookup(2, "changed"));
  // An inode has one name here, and a name one inode.
  ASSERT_EQ(leave(2, entry(106, "new") + entry(107, "x") + entry(108, "x")), 0);
  expect_passed_on(lookup(2, "old"));
  ASSERT_EQ(kvfs_node_fuse_entry_changed(node_, 107), 0);
  expect_answer(lookup(2, "new"), 0, answer_of(106, "new"));
  expect_answer(lookup(2, "x"), 0, answer_of(108, "x"));
  expect_passed_on(lookup(KVFS_VIEW_INO | 1, "x"));
  expect_passed_on(request(FUSE_LOOKUP, 2, "no end"));

  EXPECT_NE(leave(1, entry(100, "a").substr(1)), 0);
  EXPECT_NE(leave(1, entry(100, std::string(256, 'n'))), 0);
  EXPECT_NE(leave(1, entry(100, "")), 0);
  std::string many;
  for (uint64_t i = 0; i < kvfs::EntryTable::kMost; ++i) many += entry(1000 + i, std::to_string(i));
  EXPECT_EQ(leave(3, many), 0);
  EXPECT_EQ(leave(3, entry(999, "one more")), -ENOSPC);
  EXPECT_EQ(leave(3, entry(1000, "another name")), 0);  // takes its own place
  expect_answer(lookup(3, "77"), 0, answer_of(1077, "77"));
  EXPECT_EQ(leave(3, entry(999, "one more")), 0);
}

TEST_F(FuseChannelTest, ListsWithAttributesOnlyWhereTheyAreWantedIfNamesHaveTheirOwnServer) {
  auto flags = [&](uint32_t said) {
    fuse_init_out init{};
    init.flags = said;
    expect_passed_on(request(FUSE_INIT, 0, noise(64)));
    put(daemon_, answer(unique_, 0, bytes(init)));
    memcpy(&init, next_answer().body.data(), sizeof init);
    return init.flags;
  };
  EXPECT_EQ(flags(FUSE_DO_READDIRPLUS), uint32_t(FUSE_DO_READDIRPLUS));
  int direct[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, direct), 0);
  ASSERT_EQ(kvfs_node_fuse_direct(node_, direct[1], 1ull << FUSE_READDIR | 1ull << FUSE_READDIRPLUS), 0);
  EXPECT_EQ(flags(FUSE_DO_READDIRPLUS), uint32_t(FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO));
  EXPECT_EQ(flags(0), 0u);
  for (uint64_t ino : {uint64_t(1), kView}) {
    const std::string names = request(FUSE_READDIR, ino, noise(40));
    ask(names);
    EXPECT_TRUE(get(direct[0]) == names);
  }
  expect_passed_on(request(FUSE_READDIRPLUS, kView, noise(40)));
  close(direct[0]);
}

TEST_F(FuseChannelTest, OnlyForgetsOfTheDaemonsInodesReachIt) {
  const std::string one = bytes(fuse_forget_in{1});
  expect_dropped(request(FUSE_FORGET, kIno, one));
  expect_dropped(request(FUSE_FORGET, kUnknown, one));
  expect_passed_on(request(FUSE_FORGET, kView, one));
  for (size_t count : {0, 1, 2, 3, 4, 7, 100}) {
    std::vector<uint64_t> inos(count, kIno);
    expect_dropped(forgets(inos));
    for (size_t i = 0; i < count; ++i) {
      inos[i] = kView;
      expect_passed_on(forgets(inos));
      inos[i] = kUnknown;
    }
  }
  std::string wrong = forgets({kIno, kIno});
  const uint32_t many = 0xfffffff0;
  memcpy(wrong.data() + sizeof(fuse_in_header), &many, sizeof many);
  expect_passed_on(wrong);
  expect_passed_on(request(FUSE_BATCH_FORGET, 0, "1234567"));
  expect_nothing(kernel_);
}

TEST_F(FuseChannelTest, InterruptsEndThere) {
  expect_dropped(request(FUSE_INTERRUPT, 0, bytes(fuse_interrupt_in{1})));
  expect_nothing(kernel_);
}

TEST_F(FuseChannelTest, MalformedMessagesHurtNothing) {
  std::string lies = read_request(kIno, 0, 10);
  const uint32_t longer = uint32_t(lies.size() + 1);
  memcpy(lies.data(), &longer, sizeof longer);
  expect_dropped(lies);
  for (size_t n = 1; n < sizeof(fuse_in_header); ++n) expect_dropped(noise(n));
  const fuse_read_in read{};
  for (size_t n = 0; n < sizeof read; ++n) {
    expect_passed_on(request(FUSE_READ, kIno, bytes(read).substr(0, n)));
    expect_passed_on(request(FUSE_WRITE, kIno, bytes(read).substr(0, n)));
  }
  expect_passed_on(request(FUSE_READ, kIno, bytes(read) + "x"));
  for (uint32_t size : {0u, 9u, 11u, FuseChannel::kMaxIo, UINT32_MAX}) {
    fuse_write_in w{};
    w.size = size;
    expect_passed_on(request(FUSE_WRITE, kIno, bytes(w) + "0123456789"));
  }
  EXPECT_EQ(kvfs_node_inode_size(node_, kIno), 0);
  expect_nothing(kernel_);
  expect_serves();
}

TEST_F(FuseChannelTest, ManyRequestsAtOnceAllGetTheirAnswers) {
  constexpr unsigned kMany = FuseChannel::kSlots * 8;
  ASSERT_GT(kMany, FuseChannel::kSlots);
  const std::string data = noise(4096 * 64);
  expect_written(kIno, 0, data.substr(0, data.size() / 2));
  expect_written(kIno, data.size() / 2, data.substr(data.size() / 2));
  for (int round = 0; round < 2; ++round) {
    std::vector<bool> open(kMany + 1, true);
    std::thread kernel([&] {
      for (unsigned i = 1; i <= kMany; ++i) {
        unique_ = i * 2 - 2;
        const std::string page = data.substr(i % 64 * 4096, 4096);
        ask(i % 3 == 0 ? write_request(kIno, i % 64 * 4096, page) : read_request(kIno, i % 64 * 4096, 4096));
      }
    });
    for (unsigned i = 0; i < kMany; ++i) {
      Answer a = next_answer();
      const uint64_t of = a.head.unique / 2;
      ASSERT_TRUE(of >= 1 && of <= kMany && open[of]) << of;
      open[of] = false;
      EXPECT_EQ(a.head.error, 0);
      if (of % 3 != 0) {
        EXPECT_TRUE(a.body == data.substr(of % 64 * 4096, 4096));
      }
    }
    kernel.join();
  }
  expect_nothing(daemon_);
}

TEST_F(FuseChannelTest, ADaemonThatDoesNotReadLosesNothing) {
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
  close_kernel();
  close_daemon();
  ASSERT_EQ(begin(80 << 10), 0);
  std::vector<std::string> asked;
  for (unsigned i = 0; i < 400; ++i) {
    asked.push_back(request(FUSE_LOOKUP, 1, noise(i * 10, i)));
    ask(asked.back());
  }
  // The node does its other work, and what the daemon says still arrives.
  kvfs_sqe nop{};
  EXPECT_EQ(kvfs_node_call(node_, &nop, 10 * kSec), 0);
  put(daemon_, answer(999, 0));
  EXPECT_EQ(next_answer().head.unique, 999u);
  for (const std::string& m : asked) ASSERT_TRUE(get(daemon_) == m);
  expect_nothing(kernel_);
  expect_serves();
}

TEST_F(FuseChannelTest, ADaemonThatIsGoneFailsWhatItWouldGet) {
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
  close_kernel();
  close_daemon();
  ASSERT_EQ(begin(80 << 10), 0);
  // It goes while requests wait for room in its socket.
  constexpr unsigned kMany = 200;
  for (unsigned i = 0; i < kMany; ++i) ask(request(FUSE_LOOKUP, 1, noise(2000)));
  std::string taken = get(daemon_);
  close_daemon();
  std::vector<bool> failed(kMany + 1);
  ask(request(FUSE_FORGET, kView, bytes(fuse_forget_in{1})));  // has no answer
  ask(request(FUSE_GETATTR, 1, noise(16)));
  for (;;) {
    Answer a = next_answer();
    ASSERT_EQ(a.head.error, -EIO);
    if (a.head.unique == unique_) break;
    ASSERT_LE(a.head.unique / 2, kMany);
    failed[a.head.unique / 2] = true;
  }
  EXPECT_FALSE(failed[1]);
  EXPECT_TRUE(failed[kMany]);
  expect_nothing(kernel_);
  expect_written(kIno, 0, "served all the same");
  expect_answer(read_request(kIno, 0, 6), 0, "served");
}

TEST_F(FuseChannelTest, TheEndOfTheMountIsToldOnce) {
  kvfs_upcall u{};
  EXPECT_FALSE(upcall(&u, 0));
  expect_serves();
  close_kernel();
  ASSERT_TRUE(upcall(&u, 20000));
  EXPECT_EQ(u.kind, KVFS_UPCALL_UNMOUNTED);
  kvfs_sqe nop{};
  for (int i = 0; i < 100; ++i) EXPECT_EQ(kvfs_node_call(node_, &nop, 10 * kSec), 0);
  EXPECT_FALSE(upcall(&u, 0));
  EXPECT_EQ(kvfs_node_fuse_stop(node_), 0);
  EXPECT_FALSE(upcall(&u, 0));
  EXPECT_EQ(get(daemon_), "");
}

TEST_F(FuseChannelTest, TheEndOfTheMountWithRequestsUnderWay) {
  for (int i = 0; i < 50; ++i) ask(write_request(kIno, uint64_t(i) << 17, noise(100000, unsigned(i))));
  ask(request(FUSE_LOOKUP, 1, noise(10)));
  close_kernel();
  kvfs_upcall u{};
  ASSERT_TRUE(upcall(&u, 20000));
  EXPECT_EQ(u.kind, KVFS_UPCALL_UNMOUNTED);
  EXPECT_EQ(kvfs_node_fuse_stop(node_), 0);
  ASSERT_EQ(begin(), 0);
  expect_serves();
}

TEST_F(FuseChannelTest, ServesOneMountAtATime) {
  const int kernel = std::exchange(kernel_, -1), daemon = std::exchange(daemon_, -1);
  EXPECT_EQ(begin(), -EBUSY);
  EXPECT_EQ(get(kernel_), "");  // closed all the same
  EXPECT_EQ(get(daemon_), "");
  close_kernel();
  close_daemon();
  kernel_ = kernel;
  daemon_ = daemon;
  expect_serves();
  EXPECT_EQ(kvfs_node_fuse_stop(node_), 0);
  EXPECT_EQ(kvfs_node_fuse_stop(node_), -ENOENT);
  EXPECT_EQ(kvfs_node_fuse_invalidate(node_, kIno), -ENOTCONN);
  EXPECT_EQ(get(kernel_), "");
  EXPECT_EQ(get(daemon_), "");
  close_kernel();
  close_daemon();
  ASSERT_EQ(begin(), 0);
  expect_serves();
}

TEST_F(FuseChannelTest, StopsAndStartsFromManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this] {
      for (int i = 0; i < 30; ++i) {
        int k[2], d[2];
        ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, k), 0);
        ASSERT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, d), 0);
        const int rc = kvfs_node_fuse_start(node_, k[1], d[1], nullptr, 0);
        EXPECT_TRUE(rc == 0 || rc == -EBUSY) << rc;
        kvfs_node_fuse_invalidate(node_, kIno);
        kvfs_node_fuse_stop(node_);
        close(k[0]);
        close(d[0]);
      }
    });
  }
  for (std::thread& t : threads) t.join();
}

TEST_F(FuseChannelTest, StopWaitsForWhatIsUnderWay) {
  const std::string data = noise(100000);
  for (int round = 0; round < 20; ++round) {
    for (int i = 0; i < 40; ++i) {
      ask(write_request(kIno, uint64_t(i) * data.size(), data));
      ask(read_request(kIno, 0, 4096));
    }
    if (round % 2 == 1) next_answer();
    ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
    // What was answered was answered in full; then the end.
    for (std::string m = get(kernel_); !m.empty() && m != "error"; m = get(kernel_)) {
      fuse_out_header out{};
      ASSERT_GE(m.size(), sizeof out) << m;
      memcpy(&out, m.data(), sizeof out);
      EXPECT_EQ(out.len, m.size());
      EXPECT_EQ(out.error, 0);
    }
    close_kernel();
    close_daemon();
    ASSERT_EQ(begin(), 0);
  }
  for (int i = 0; i < 40; ++i) ask(write_request(kIno, uint64_t(i) * data.size(), data));  // the node stops under them
}

TEST_F(FuseChannelTest, StopWithRequestsThatWaitForTheDaemon) {
  ASSERT_EQ(kvfs_node_fuse_stop(node_), 0);
  close_kernel();
  close_daemon();
  ASSERT_EQ(begin(80 << 10), 0);
  for (int i = 0; i < 300; ++i) ask(request(FUSE_LOOKUP, 1, noise(2000)));
  kvfs_sqe nop{};
  EXPECT_EQ(kvfs_node_call(node_, &nop, 10 * kSec), 0);
  EXPECT_EQ(kvfs_node_fuse_stop(node_), 0);
}

TEST_F(FuseChannelTest, InvalidationsGoStraightToTheKernel) {
  ASSERT_EQ(kvfs_node_fuse_invalidate(node_, kIno), 0);
  const Answer a = next_answer();
  EXPECT_EQ(a.head.unique, 0u);
  EXPECT_EQ(a.head.error, FUSE_NOTIFY_INVAL_INODE);
  fuse_notify_inval_inode_out n{};
  ASSERT_EQ(a.body.size(), sizeof n);
  memcpy(&n, a.body.data(), sizeof n);
  EXPECT_EQ(n.ino, kIno);
  EXPECT_EQ(n.off, 0);
  EXPECT_EQ(n.len, 0);
  expect_nothing(daemon_);
}

// A client of the ring beside the kernel, on one file.
class FuseAndRingTest : public FuseChannelTest, protected FileClient {
 protected:
  void SetUp() override {
    FuseChannelTest::SetUp();
    ino_ = connect_file(node_, dir_, sock_, 8, 1 << 20);
    ASSERT_NE(ino_, 0u);
  }
  void TearDown() override {
    kvfs_close(client_);
    FuseChannelTest::TearDown();
  }
  std::string ring_read(uint64_t off, uint32_t len) {
    start_op(KVFS_OP_READ, off, len);
    const int64_t n = end_op(20 * kSec);
    return n < 0 ? "error" : std::string(static_cast<char*>(iov_.base), size_t(n));
  }
  void start_ring_write(uint64_t off, const std::string& data) {
    memcpy(iov_.base, data.data(), data.size());
    start_op(KVFS_OP_WRITE, off, uint32_t(data.size()));
  }
  void answer_drop() {
    kvfs_upcall u{};
    ASSERT_TRUE(upcall(&u, 20000));
    EXPECT_EQ(u.kind, KVFS_UPCALL_DROP);
    EXPECT_EQ(u.ino, ino_);
    kvfs_cqe q{};
    EXPECT_EQ(kvfs_peek(ring_, &q, 1), 0);  // not before the kernel's copies are gone
    EXPECT_EQ(kvfs_node_answer(node_, u.id, 0), 0);
  }

  uint64_t ino_ = 0;
};

TEST_F(FuseAndRingTest, AgreeOnTheFilesBytes) {
  std::string model = noise(100000);
  expect_written(ino_, 0, model);
  EXPECT_TRUE(ring_read(0, 200000) == model);
  for (unsigned i = 0; i < 20; ++i) {
    // What the kernel has written, or read, it may hold.
    const std::string data = noise(5000 + i, i);
    const size_t off = i * 7001;
    start_ring_write(off, data);
    answer_drop();
    EXPECT_EQ(end_op(20 * kSec), int64_t(data.size()));
    model.resize(std::max(model.size(), off + data.size()), '\0');
    model.replace(off, data.size(), data);
    start_ring_write(off, data);  // nothing is held now
    EXPECT_EQ(end_op(20 * kSec), int64_t(data.size()));
    kvfs_upcall u{};
    EXPECT_FALSE(upcall(&u, 0));
    expect_answer(read_request(ino_, off, 6000), 0, model.substr(off, 6000));
    if (i % 2 == 1) {
      const std::string more = noise(777, i);
      expect_written(ino_, off + 100, more);
      model.resize(std::max(model.size(), off + 100 + more.size()), '\0');
      model.replace(off + 100, more.size(), more);
    }
    EXPECT_TRUE(ring_read(off, 6000) == model.substr(off, 6000));
  }
  EXPECT_EQ(kvfs_node_inode_size(node_, ino_), int64_t(model.size()));
}

}  // namespace
