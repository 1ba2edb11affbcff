// fuzz_store_image.cpp feeds the store damaged and forged device images: whatever is on the device, opening it, reading all
// of it, changing it, checking and mending it must end with a result, never with a crash, a hang or an I/O outside the device.
//
// Input: one byte that chooses the image and the options, then patches (what, which, where, bytes). Afterwards superblocks,
// checkpoint pages and journal groups get right checksums again, so that patches reach the code behind them.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../store/check.h"
#include "../store/check_store.h"
#include "../store/layout.h"
#include "../store/store.h"
#include "../tests/sim_device.h"

namespace kvfs {
namespace {

constexpr uint64_t kSize = 8u << 20;  // nearly full: recovery has to find room for its checkpoint
constexpr uint32_t kLargest = 2u << 20;

SimOptions options(uint32_t align) {
  SimOptions o;
  o.size = kSize;
  o.align = align;
  o.record = false;
  return o;
}

ChunkKey make_key(Kind kind, uint64_t n) {
  ChunkKey k;
  k.kind = kind;
  k.key_len = kind == Kind::Block ? 8 : 16;
  k.ns = kind == Kind::Block ? 1 : 0;
  std::memcpy(k.id, &n, sizeof n);
  return k;
}

struct Runner {
  SimDevice& dev;
  Store& store;
  uint64_t now = 1;

  int64_t run(Request::Op op, const ChunkKey& key, void* mem, uint32_t off, uint32_t len, uint8_t flags = 0) {
    Request r;
    bool done = false;
    r.op = op;
    r.key = key;
    r.off = off;
    r.len = len;
    r.mem = {mem, -1};
    r.flags = flags;
    r.owner = &done;
    r.done = [](Request* x) { *static_cast<bool*>(x->owner) = true; };
    store.submit(&r);
    int turns = 0;
    while (!done) {
      KVFS_CHECK(++turns < 20000);  // a hang
      store.tick(now += 1000000);
      dev.poll(false);
    }
    return r.result;
  }
};

uint8_t* memory() {
  static uint8_t* p = [] {
    void* m = nullptr;
    KVFS_CHECK(posix_memalign(&m, kBlock, kMaxChunk) == 0);
    for (uint32_t i = 0; i < kMaxChunk; i++) static_cast<uint8_t*>(m)[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
    return static_cast<uint8_t*>(m);
  }();
  return p;
}

// A valid image and where its structures lie.
struct Base {
  SimImage image;
  uint32_t align = 512;
  std::vector<uint64_t> groups, pages;
};

void change(Runner& r, uint64_t first, uint64_t n, uint8_t flags) {
  const uint32_t sizes[] = {100, 512, 4096, 5000, 9000, 65536};
  for (uint64_t i = first; i < first + n; i++) {
    r.run(Request::Op::Put, make_key(Kind::Block, i), memory() + i * 4096, 0, sizes[i % std::size(sizes)], flags);
    r.run(Request::Op::Write, make_key(Kind::File, i), memory() + i * 4096, i % 3 * 500, 3000, flags);
    if (i % 5 == 4) r.run(Request::Op::Delete, make_key(Kind::Block, i - 2), nullptr, 0, 0, flags);
  }
}

// crashed: with a checkpoint, then groups a barrier covered, then some it did not; else closed.
Base make_base(uint32_t align, bool crashed) {
  SimDevice dev(options(align));
  FormatOptions f;
  f.segment_bytes = 1u << 20;
  f.journal_bytes = 1u << 20;
  KVFS_CHECK(Store::format(dev, f));
  std::unique_ptr<Store> store;
  KVFS_CHECK(Store::open(dev, {}, &store));
  Runner r{dev, *store};
  change(r, 0, 8, 0);
  r.run(Request::Op::Put, make_key(Kind::Block, 1000), memory(), 0, (1u << 20) + 5000);
  if (crashed) {
    r.run(Request::Op::Checkpoint, {}, nullptr, 0, 0);
    change(r, 8, 6, Request::kDurable);
    r.run(Request::Op::Delete, make_key(Kind::Block, 1000), nullptr, 0, 0, Request::kDurable);
    r.run(Request::Op::Put, make_key(Kind::Block, 1001), memory(), 0, (1u << 20) + 100);
    change(r, 14, 4, 0);
    for (int i = 0; i < 50; i++) {
      store->tick(r.now);
      dev.poll(false);
    }
  } else {
    KVFS_CHECK(store->close());
  }
  store.reset();
  Base b;
  b.image = dev.image();
  b.align = align;
  for (uint64_t at = kJournalOff; at < kSize; at += kBlock) {
    uint64_t magic;
    b.image.read(at, &magic, sizeof magic);
    if (magic == kGroupMagic) b.groups.push_back(at);
    if (magic == kPageMagic) b.pages.push_back(at);
  }
  KVFS_CHECK(!b.groups.empty() && !b.pages.empty());
  return b;
}

const Base& base(unsigned n) {
  static const Base all[4] = {make_base(512, false), make_base(512, true), make_base(4096, false),
                              make_base(4096, true)};
  return all[n % 4];
}

class Input {
 public:
  Input(const uint8_t* p, size_t n) : p_(p), n_(n) {}
  bool empty() const { return n_ == 0; }
  template <typename T>
  T take() {
    T v{};
    const size_t n = std::min(sizeof v, n_);
    std::memcpy(&v, p_, n);
    skip(n);
    return v;
  }
  const uint8_t* bytes(size_t* n) {
    *n = std::min(*n, n_);
    const uint8_t* p = p_;
    skip(*n);
    return p;
  }

 private:
  void skip(size_t n) { p_ += n, n_ -= n; }
  const uint8_t* p_;
  size_t n_;
};

void patch(const Base& b, SimImage& image, Input& in) {
  const uint8_t what = in.take<uint8_t>(), which = in.take<uint8_t>();
  const auto where = in.take<uint16_t>();
  size_t n = in.take<uint8_t>() % 33;
  const uint8_t* bytes = in.bytes(&n);
  uint64_t at = 0;
  switch (what % 5) {
    case 0:  // superblock (both, or one)
      at = where % (kBlock - 32);
      if (which % 3 != 1) image.write(kSuperOff[0] + at, bytes, n);
      if (which % 3 != 2) image.write(kSuperOff[1] + at, bytes, n);
      return;
    case 1:  // header of a group or page
      at = (which & 1 ? b.groups[which / 2 % b.groups.size()] : b.pages[which / 2 % b.pages.size()]) + where % 64;
      break;
    case 2:  // record of a group
      at = b.groups[which % b.groups.size()] + sizeof(GroupHeader) + where % (2 * sizeof(Record));
      break;
    case 3:  // record of a page
      at = b.pages[which % b.pages.size()] + sizeof(PageHeader) + where % (32 * sizeof(Record));
      break;
    case 4:  // anywhere
      at = (uint64_t{which} << 16 | where) % (kSize - 64);
      break;
  }
  image.write(at, bytes, n);
}

void reseal(const Base& b, SimImage& image) {
  for (uint64_t off : kSuperOff) {
    SuperBlock sb;
    image.read(off, &sb, sizeof sb);
    sb.checksum = xxh3(&sb, offsetof(SuperBlock, checksum));
    image.write(off, &sb, sizeof sb);
  }
  alignas(64) static uint8_t buf[kGroupMax + kBlock];
  for (uint64_t at : b.pages) {
    image.read(at, buf, kCheckpointPage);
    auto* h = reinterpret_cast<PageHeader*>(buf);
    h->checksum = sealed_sum(h, kCheckpointPage, &PageHeader::checksum, h);
    image.write(at, h, sizeof *h);
  }
  for (uint64_t at : b.groups) {
    image.read(at, buf, kGroupMax + kBlock);
    auto* h = reinterpret_cast<GroupHeader*>(buf);
    if (h->bytes < sizeof *h || h->bytes > sizeof buf) continue;
    h->checksum = sealed_sum(h, h->bytes, &GroupHeader::checksum, h);
    image.write(at, h, sizeof *h);
  }
}

// After a repair that was possible the store has nothing unsound.
void mend(SimDevice& dev) {
  CheckOptions opt;
  opt.data = opt.repair = opt.orphans = true;
  opt.namespaces = {1};
  opt.files = {{2, 1 << 20}, {3, 1 << 20}};
  CheckReport report;
  if (!check_store(dev, opt, &report)) return;
  opt.repair = false;
  KVFS_CHECK(check_store(dev, opt, &report));
  KVFS_CHECK(report.findings.empty());
}

void use(SimDevice& dev, Store& store) {
  Runner r{dev, store};
  std::vector<ChunkInfo> found;
  for (Kind kind : {Kind::Block, Kind::File}) {
    uint64_t cursor = 0;
    for (int i = 0; store.scan(&cursor, 100, kind, UINT32_MAX,
                               [&](const ChunkInfo& info) {
                                 found.push_back(info);
                                 return true;
                               });
         i++)
      KVFS_CHECK(i < 10000);
  }
  auto get = [&](const ChunkKey& key, uint32_t off, uint32_t len) {
    static uint8_t* out = [] {
      void* m = nullptr;
      KVFS_CHECK(posix_memalign(&m, kBlock, kMaxChunk) == 0);
      return static_cast<uint8_t*>(m);
    }();
    const int64_t n = r.run(Request::Op::Get, key, out, off, len);
    KVFS_CHECK(n <= int64_t{len});
  };
  for (const ChunkInfo& c : found) {
    KVFS_CHECK(store.lookup(c.key, nullptr) == c.length);
    get(c.key, 0, kMaxChunk);
    get(c.key, c.length / 2, 1);
    if (c.length > kPieceMax) get(c.key, kPieceMax + 4096, 8192);
  }
  for (uint64_t i = 0; i < 3; i++) {  // also where only a later piece may be left
    get(make_key(Kind::Block, 999 + i), 0, kLargest);
    r.run(Request::Op::Put, make_key(Kind::Block, 999 + i), memory(), 0, (1u << 20) + 1, i ? Request::kDurable : 0);
    get(make_key(Kind::Block, 999 + i), 0, kLargest);
  }
  uint32_t n = 0;
  for (const ChunkInfo& c : found) {
    if (++n % 2) continue;
    if (c.key.kind == Kind::File) {
      r.run(Request::Op::Write, c.key, memory(), 100, 5000, n % 4 ? Request::kDurable : 0);
      r.run(Request::Op::Truncate, c.key, nullptr, n % 8 ? 1 : 0, 0);
    } else {
      r.run(Request::Op::Delete, c.key, nullptr, 0, 0, n % 4 ? Request::kDurable : 0);
    }
  }
  r.run(Request::Op::Checkpoint, {}, nullptr, 0, 0);
  for (const ChunkInfo& c : found) get(c.key, 0, kMaxChunk);
  (void)store.close();
}

}  // namespace
}  // namespace kvfs

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvfs;
  Input in(data, size);
  const auto mode = in.take<uint8_t>();
  const Base& b = base(mode);
  SimImage image = b.image;
  for (int i = 0; i < 16 && !in.empty(); i++) patch(b, image, in);
  if (!(mode & 0x80)) reseal(b, image);
  SimDevice dev(options(b.align), std::move(image));
  if (mode & 0x10) mend(dev);
  StoreOptions opt;
  opt.read_only = mode & 0x40;
  opt.verify = !(mode & 0x20);
  std::unique_ptr<Store> store;
  const Status s = Store::open(dev, opt, &store);
  KVFS_CHECK(s.err != 0 || store != nullptr);
  KVFS_CHECK(s.err >= 0);
  if (s.err == 0) use(dev, *store);
  // An untouched image is sound.
  if (size <= 1 && s.err != 0) {
    std::fprintf(stderr, "an untouched image does not open: %d %s\n", s.err, s.message.c_str());
    std::abort();
  }
  return 0;
}
