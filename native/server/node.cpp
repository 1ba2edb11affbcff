// node.cpp owns the C ABI of kvfs_node.h: it starts and stops the reactor thread with its device and store, the control
// and file servers, and the daemon's own two rings.
#include "node.h"

#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace kvfs {
namespace {

constexpr uint32_t kOwnEntries = 4096;
constexpr uint32_t kCallEntries = 64;
constexpr uint64_t kMemoryAhead = 128u << 20;  // the KV of a prompt of 8,192 tokens of a small model, and some
constexpr uint64_t kCallSpinNs = 8000;

}  // namespace
}  // namespace kvfs

using namespace kvfs;  // NOLINT: the C functions below

// The reactor thread: everything that uses the io_uring is created, used and destroyed here.
void kvfs_node::run() {
  if (pin_cpu != 0) {
    cpu_set_t one;
    CPU_ZERO(&one);
    if (pin_cpu <= CPU_SETSIZE) CPU_SET(pin_cpu - 1, &one);
    if (sched_setaffinity(0, sizeof one, &one) != 0)
      return opened.set({EINVAL, "the reactor cannot run on CPU " + std::to_string(pin_cpu - 1)});
  }
  std::unique_ptr<Uring> uring;
  std::unique_ptr<UringDevice> dev;
  std::unique_ptr<Store> st;
  Status s = Uring::create(UringOptions{}, &uring);
  if (s.err == 0 && remote) {
    s = remote->open(uring.get(), &namespaces, &st);
  } else if (s.err == 0) {
    DeviceOptions d;
    d.read_only = store_opt.read_only;
    s = UringDevice::open(*uring, data_path, d, &dev);
    if (s.err == 0) s = Store::open(*dev, store_opt, &st);
  }
  if (s.err != 0) return opened.set(s);
  Status end;
  {
    Reactor r(uring.get(), dev.get(), st.get(), &inodes, &upcalls, dirty_bytes);
    s = r.init();
    if (s.err == 0) {
      r.add_ring(&own.daemon);
      r.add_ring(&calls.daemon);
      reactor = &r;
      store = st.get();
      ring = uring.get();
    }
    opened.set(s);
    if (s.err == 0) r.run();
    end = st->close();
  }
  if (s.err == 0) closed.set(end);
}

int kvfs_node_format(const char* path, uint64_t size, uint32_t segment_bytes, uint64_t journal_bytes, char* err,
                     size_t err_len) {
  std::unique_ptr<Uring> uring;
  std::unique_ptr<UringDevice> dev;
  Status s = Uring::create(UringOptions{}, &uring);
  if (s.err == 0) {
    DeviceOptions d;
    d.create_bytes = size;
    s = UringDevice::open(*uring, path, d, &dev);
  }
  if (s.err == 0) {
    FormatOptions f;
    f.size = size;
    f.segment_bytes = segment_bytes;
    f.journal_bytes = journal_bytes;
    s = Store::format(*dev, f);
  }
  return s.err == 0 ? 0 : fail(s, err, err_len);
}

int kvfs_node_start(const kvfs_node_config* cfg, kvfs_node** out, char* err, size_t err_len) {
  *out = nullptr;
  if (cfg == nullptr || (cfg->data_path == nullptr) == (cfg->remote == nullptr))
    return fail({EINVAL, "no data path given, or chunk servers too"}, err, err_len);
  auto n = std::make_unique<kvfs_node>();
  if (cfg->remote != nullptr) {
    n->remote = std::make_unique<RemoteNode>();
    const Status s = n->remote->take(*cfg->remote);
    if (s.err != 0) return fail(s, err, err_len);
    n->upcalls.set_names_known();  // by the map
  } else {
    n->data_path = cfg->data_path;
  }
  n->store_opt.memory_bytes = cfg->memory_bytes;
  n->store_opt.memory_ahead = kMemoryAhead;
  if (cfg->dirty_bytes != 0) n->dirty_bytes = cfg->dirty_bytes;
  n->pin_cpu = cfg->pin_cpu;
  n->store_opt.verify = cfg->verify != 0;
  n->store_opt.read_only = cfg->read_only != 0;
  if (cfg->high_watermark > 0) n->store_opt.high_watermark = cfg->high_watermark;
  if (cfg->low_watermark > 0) n->store_opt.low_watermark = cfg->low_watermark;
  if (!n->own.make(kOwnEntries, true) || !n->calls.make(kCallEntries, false) || n->upcalls.fd() < 0)
    return fail({ENOMEM, "cannot make the daemon's own rings"}, err, err_len);
  n->thread = std::thread([p = n.get()] { p->run(); });
  Status s = n->opened.get();
  if (s.err != 0) {
    n->thread.join();
    return fail(s, err, err_len);
  }
  if (cfg->socket_path != nullptr) {
    ControlConfig c;
    c.path = cfg->socket_path;
    c.allowed_uid = cfg->allowed_uid;
    if (cfg->max_sessions != 0) c.max_sessions = cfg->max_sessions;
    if (cfg->session_bytes != 0) c.session_bytes = cfg->session_bytes;
    n->control = std::make_unique<ControlServer>(c, n->reactor, &n->inodes, &n->namespaces, &n->upcalls);
    s = n->control->start();
    if (s.err == 0) {
      n->files = std::make_unique<FileServer>(c.path + ".fd", n->control.get());
      n->files->set_mount(cfg->mount_dev);
      s = n->files->start();
    }
    if (s.err != 0) {
      kvfs_node_stop(n.release(), nullptr, 0);
      return fail(s, err, err_len);
    }
  }
  *out = n.release();
  return 0;
}

int kvfs_node_stop(kvfs_node* n, char* err, size_t err_len) {
  if (n == nullptr) return 0;
  if (n->files) n->files->stop();
  kvfs_node_fuse_stop(n);
  Reactor* r = n->reactor;
  r->post([r] { r->end_upcalls(); });  // nobody answers any more
  if (n->control) n->control->stop();
  r->post([r, n] {
    r->close_ring(&n->own.daemon, [] {});
    r->close_ring(&n->calls.daemon, [] {});
  });
  r->stop();
  Status s = n->closed.get();
  n->thread.join();
  n->files.reset();
  n->control.reset();
  delete n;
  return s.err == 0 ? 0 : fail(s, err, err_len);
}

int kvfs_node_submit(kvfs_node* n, const kvfs_sqe* sqes, int count) {
  std::lock_guard<std::mutex> g(n->own.mu);
  int i = 0;
  for (; i < count; ++i) {
    kvfs_sqe* s = n->own.client.next();
    if (s == nullptr) break;
    *s = sqes[i];
  }
  n->own.publish();
  return i;
}

int kvfs_node_event_fd(kvfs_node* n) { return n->own.daemon.notify_fd; }

int kvfs_node_reap(kvfs_node* n, kvfs_cqe* out, int max) {
  if (max <= 0) return -EINVAL;
  std::lock_guard<std::mutex> g(n->own.mu);
  uint64_t v;
  ssize_t io = read(n->own.daemon.notify_fd, &v, sizeof v);
  int got = n->own.client.pop(out, max);
  if (got == max && n->own.client.ready() > 0) {  // keep it readable for the rest
    v = 1;
    io = write(n->own.daemon.notify_fd, &v, sizeof v);
  }
  (void)io;
  return got;
}

int64_t kvfs_node_call(kvfs_node* n, const kvfs_sqe* sqe, uint64_t timeout_ns) {
  std::lock_guard<std::mutex> g(n->calls.mu);
  ClientRing& c = n->calls.client;
  kvfs_cqe cqe;
  uint64_t start = monotonic_ns(), id = n->next_call++;
  uint64_t deadline = timeout_ns < UINT64_MAX - start ? start + timeout_ns : UINT64_MAX;
  bool sent = false;
  for (;;) {
    while (c.pop(&cqe, 1) == 1) {  // late completions of calls that timed out are dropped
      if (cqe.user_data == id) return cqe.result;
    }
    if (!sent) {
      if (kvfs_sqe* s = c.next()) {
        *s = *sqe;
        s->user_data = id;
        n->calls.publish();
        sent = true;
        continue;
      }
    }
    uint64_t now = monotonic_ns();
    if (now >= deadline) return -ETIMEDOUT;
    if (now - start < kCallSpinNs) {
      for (int i = 0; i < 16 && c.ready() == 0; ++i) cpu_relax();
      continue;
    }
    uint32_t tail = c.arm();
    if (tail == c.cq_head()) {
      uint64_t left = deadline == UINT64_MAX ? 1000000000 : deadline - now;
      timespec ts{time_t(left / 1000000000u), long(left % 1000000000u)};
      syscall(SYS_futex, c.futex_word(), FUTEX_WAIT, tail, &ts, nullptr, 0);
    }
    c.disarm();
  }
}

int kvfs_node_ns_put(kvfs_node* n, const char* tenant, const char* name, uint32_t ns_id, int evictable, uint32_t uid) {
  if (tenant == nullptr || name == nullptr || ns_id == UINT32_MAX) return -EINVAL;
  if (strlen(tenant) >= sizeof(kvfs_upcall::tenant) || strlen(name) >= sizeof(kvfs_upcall::name)) return -ENAMETOOLONG;
  NamespaceInfo i;
  i.ns_id = ns_id;
  i.evictable = evictable != 0;
  i.uid = uid;
  n->namespaces.put(tenant, name, i);
  n->reactor->post([r = n->reactor, ns_id, on = i.evictable] { r->set_evictable(ns_id, on); });
  return 0;
}

int kvfs_node_upcall_fd(kvfs_node* n) { return n->upcalls.fd(); }

int kvfs_node_next_upcall(kvfs_node* n, kvfs_upcall* out) { return n->upcalls.next(out) ? 1 : 0; }

int kvfs_node_answer(kvfs_node* n, uint64_t id, int err) {
  if (!n->control) return -EINVAL;
  if (err > 0) err = -err;
  if ((id & Upcalls::kInode) != 0) {
    n->reactor->post([r = n->reactor, id, err] { r->answered(id, err); });
  } else {
    n->control->answer(id, err);
  }
  return 0;
}

int kvfs_node_inode_open(kvfs_node* n, uint64_t ino, uint64_t size) {
  n->inodes.open(ino, size);
  return 0;
}

int kvfs_node_inode_close(kvfs_node* n, uint64_t ino) { return n->inodes.close(ino); }

int64_t kvfs_node_inode_size(kvfs_node* n, uint64_t ino) {
  InodeRef i = n->inodes.find(ino);
  return i ? int64_t(i->size.load(std::memory_order_acquire)) : -ENOENT;
}

int kvfs_node_inode_refs(kvfs_node* n, uint64_t ino) { return n->inodes.refs(ino); }

int kvfs_node_inode_show(kvfs_node* n, uint64_t ino, uint64_t* size, uint64_t* written_ns) {
  InodeRef i = n->inodes.find(ino);
  if (!i) return -ENOENT;
  i->cached.store(true);  // before the size is read: a write that finishes in between drops what we are about to give
  *written_ns = i->written_ns.load(std::memory_order_acquire);
  *size = i->size.load(std::memory_order_acquire);
  return 0;
}

int kvfs_node_inode_landed(kvfs_node* n, uint64_t ino) {
  InodeRef i = n->inodes.find(ino);
  return i ? int(i->landed.load(std::memory_order_acquire) >= i->size.load(std::memory_order_acquire)) : -ENOENT;
}

int kvfs_node_inode_take(kvfs_node* n, uint64_t ino, uint64_t* size, uint64_t* written_ns) {
  InodeRef i = n->inodes.find(ino);
  if (!i) return -ENOENT;
  // The time first: a write that finishes between the two is seen again next time, never lost.
  *written_ns = i->written_ns.exchange(0, std::memory_order_acq_rel);
  *size = std::min(i->size.load(std::memory_order_acquire), i->landed.load(std::memory_order_acquire));
  return 0;
}

int kvfs_node_inode_no_capability(kvfs_node* n, uint64_t ino, int on) {
  InodeRef i = n->inodes.find(ino);
  if (!i) return -ENOENT;
  i->no_capability.store(on != 0, std::memory_order_release);
  return 0;
}

int kvfs_node_fuse_start(kvfs_node* n, int kernel, int daemon, char* err, size_t err_len) {
  std::lock_guard<std::mutex> one(n->fuse_mu);
  auto notify = std::make_shared<SharedFd>(fcntl(kernel, F_DUPFD_CLOEXEC, 0));
  auto made = std::make_unique<FuseChannel>(kernel, daemon, n->reactor, n->ring, &n->inodes, &n->upcalls);
  if (notify->fd < 0) return fail({errno, "no descriptor for the mount's notifications"}, err, err_len);
  if (n->fuse) return fail({EBUSY, "this node serves a mount already"}, err, err_len);
  Status s = in_reactor(n->reactor, [r = n->reactor, c = made.get()] {
    Status made = c->init();
    if (made.err == 0) r->set_fuse(c);
    return made;
  });
  if (s.err != 0) return fail(s, err, err_len);
  n->fuse = std::move(made);
  std::lock_guard<std::mutex> g(n->notify_mu);
  n->notify = std::move(notify);
  n->left = n->fuse->left();
  return 0;
}

int kvfs_node_fuse_direct(kvfs_node* n, int direct, uint64_t opcodes) {
  SharedFd owned(direct);
  if (!n->fuse) return -ENOENT;
  in_reactor(n->reactor, [c = n->fuse.get(), direct, opcodes] { return c->set_direct(direct, opcodes), true; });
  owned.fd = -1;
  return 0;
}

static std::shared_ptr<FuseChannel::Left> left_of(kvfs_node* n) {
  std::lock_guard<std::mutex> g(n->notify_mu);
  return n->left;
}

int kvfs_node_fuse_attr(kvfs_node* n, uint64_t ino, const void* answer, size_t bytes) {
  const auto left = left_of(n);
  fuse_attr_out out;
  if (!left) return -ENOENT;
  if (answer == nullptr) return left->attrs.set(ino, nullptr), 0;
  if (bytes != sizeof out) return -EINVAL;
  memcpy(&out, answer, sizeof out);
  return left->attrs.set(ino, &out) ? 0 : -ENOSPC;
}

int kvfs_node_fuse_entries(kvfs_node* n, uint64_t parent, const void* entries, size_t bytes) {
  const auto left = left_of(n);
  if (!left) return -ENOENT;
  return left->entries.add(parent, {static_cast<const char*>(entries), bytes}) ? 0 : -ENOSPC;
}

int kvfs_node_fuse_entry_changed(kvfs_node* n, uint64_t ino) {
  const auto left = left_of(n);
  if (!left) return -ENOENT;
  left->entries.forget(ino);
  return 0;
}

int kvfs_node_fuse_stop(kvfs_node* n) {
  std::lock_guard<std::mutex> one(n->fuse_mu);
  if (!n->fuse) return -ENOENT;
  {
    std::lock_guard<std::mutex> g(n->notify_mu);
    n->notify.reset();
    n->left.reset();
  }
  auto ended = std::make_shared<Box<bool>>();
  n->reactor->post([r = n->reactor, ended] { r->close_fuse([ended] { ended->set(true); }); });
  ended->get();
  n->fuse.reset();
  return 0;
}

int kvfs_node_fuse_invalidate(kvfs_node* n, uint64_t ino) {
  std::shared_ptr<SharedFd> to;
  {
    std::lock_guard<std::mutex> g(n->notify_mu);
    to = n->notify;
  }
  if (!to) return -ENOTCONN;
  struct {
    fuse_out_header head;
    fuse_notify_inval_inode_out body;
  } m{};
  m.head.len = sizeof m;
  m.head.error = FUSE_NOTIFY_INVAL_INODE;
  m.body.ino = ino;
  ssize_t done;
  do done = write(to->fd, &m, sizeof m);
  while (done < 0 && errno == EINTR);
  return done < 0 ? -errno : 0;
}

int kvfs_node_set_mount(kvfs_node* n, uint64_t st_dev) {
  if (!n->files) return -EINVAL;
  n->files->set_mount(st_dev);
  return 0;
}

int kvfs_node_space_short(kvfs_node* n) { return n->reactor->space_short() ? 1 : 0; }

int kvfs_node_stats(kvfs_node* n, struct kvfs_node_stats* out) {
  struct Counted {
    StoreStats store;
    ReactorStats reactor;
    uint64_t rings, dirty_bytes;
  };
  const auto [s, rs, rings, dirty_bytes] = in_reactor(n->reactor, [r = n->reactor] {
    return Counted{r->store()->stats(), r->stats(), r->ring_count(), r->write_back().dirty_bytes()};
  });
  memset(out, 0, sizeof *out);
#define COPY(f) out->f = s.f
  COPY(chunks);
  COPY(block_chunks);
  COPY(file_chunks);
  COPY(data_bytes);
  COPY(slot_bytes);
  COPY(capacity_bytes);
  COPY(free_bytes);
  COPY(reserved_bytes);
  COPY(free_segments);
  COPY(total_segments);
  COPY(index_bytes);
  COPY(gets);
  COPY(get_hits);
  COPY(puts);
  COPY(puts_existed);
  COPY(deletes);
  COPY(writes);
  COPY(evictions);
  COPY(checksum_errors);
  COPY(io_errors);
  COPY(mem_hits);
  COPY(mem_bytes);
  COPY(journal_groups);
  COPY(journal_bytes);
  COPY(checkpoints);
  COPY(flushes);
  COPY(moves);
  COPY(bytes_read);
  COPY(bytes_written);
#undef COPY
  out->sqes = rs.sqes;
  out->bad_sqes = rs.bad_sqes;
  out->broken_rings = rs.broken_rings;
  out->sleeps = rs.sleeps;
  out->turns = rs.turns;
  out->rings = rings;
  out->dirty_bytes = dirty_bytes;
  if (n->control) {
    ControlStats& c = n->control->stats();
    out->sessions = c.sessions;
    out->iovs = c.iovs;
    out->iov_bytes = c.iov_bytes;
  }
  return 0;
}
