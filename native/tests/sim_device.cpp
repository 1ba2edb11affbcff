// sim_device.cpp: the simulated device; see sim_device.h.
#include "sim_device.h"

#include <algorithm>
#include <cstring>

#include "../store/check.h"

namespace kvfs {
namespace {

constexpr uint32_t kSector = 512;

// Writes a random set of the data's sectors, possibly none.
void write_torn(SimImage& image, uint64_t off, const std::vector<uint8_t>& data, Rng& rng) {
  for (size_t at = 0; at < data.size(); at += kSector) {
    if (rng.below(2) == 0) image.write(off + at, data.data() + at, std::min<size_t>(kSector, data.size() - at));
  }
}

}  // namespace

void SimImage::read(uint64_t off, void* out, size_t len) const {
  auto* to = static_cast<uint8_t*>(out);
  while (len > 0) {
    const size_t in = off % kPage, n = std::min<size_t>(len, kPage - in);
    const auto it = pages_.find(off / kPage);
    if (it == pages_.end()) {
      std::memset(to, 0, n);
    } else {
      std::memcpy(to, it->second->data() + in, n);
    }
    to += n, off += n, len -= n;
  }
}

void SimImage::write(uint64_t off, const void* in, size_t len) {
  const auto* from = static_cast<const uint8_t*>(in);
  while (len > 0) {
    const size_t at = off % kPage, n = std::min<size_t>(len, kPage - at);
    std::shared_ptr<Page>& page = pages_[off / kPage];
    if (!page) {
      page = std::make_shared<Page>();
      page->fill(0);
    } else if (page.use_count() > 1) {
      page = std::make_shared<Page>(*page);
    }
    std::memcpy(page->data() + at, from, n);
    from += n, off += n, len -= n;
  }
}

void SimImage::flip_bit(uint64_t off, unsigned bit) {
  uint8_t b;
  read(off, &b, 1);
  b ^= static_cast<uint8_t>(1u << (bit % 8));
  write(off, &b, 1);
}

bool SimImage::operator==(const SimImage& o) const {
  const Page zero{};
  const auto covered = [&zero](const SimImage& a, const SimImage& b) {
    for (const auto& [n, page] : a.pages_) {
      const auto it = b.pages_.find(n);
      if (it != b.pages_.end() ? it->second != page && *it->second != *page : *page != zero) return false;
    }
    return true;
  };
  return covered(*this, o) && covered(o, *this);
}

SimDevice::SimDevice(const SimOptions& opt) : SimDevice(opt, SimImage()) {}

SimDevice::SimDevice(const SimOptions& opt, SimImage image)
    : opt_(opt), rng_(opt.seed), image_(std::move(image)), base_(image_) {
  KVFS_CHECK(opt.align == 512 || opt.align == 4096);
  KVFS_CHECK(opt.size % opt.align == 0);
}

SimDevice::~SimDevice() = default;

void SimDevice::submit(Io* io) {
  KVFS_CHECK(io->done != nullptr);
  Pending p{io, 0, false, SIZE_MAX, nullptr};
  if (io->op != Io::Op::Flush) {
    KVFS_CHECK(io->len > 0 && io->len % opt_.align == 0 && io->off % opt_.align == 0);
    KVFS_CHECK(io->off <= opt_.size && io->len <= opt_.size - io->off);
    KVFS_CHECK(mem_ok(io->mem.ptr));
  }
  for (SimFault& f : faults_) {
    if (f.op != io->op) continue;
    if (f.skip > 0) {
      --f.skip;
    } else if (f.count > 0) {
      if (f.count != UINT64_MAX) --f.count;
      if (p.err == 0) p.err = f.err, p.partial = f.partial;
    }
  }
  if (io->op != Io::Op::Read && until_gone_ != UINT64_MAX) {
    if (until_gone_ == 0) {
      p.err = gone_err_;
    } else if (io->op == Io::Op::Write) {
      --until_gone_;
    }
  }
  if (io->op == Io::Op::Write) {
    for (const Pending& q : queue_) {
      overlaps_ += q.io->op == Io::Op::Write && q.io->off < io->off + io->len && io->off < q.io->off + q.io->len;
    }
    const auto* bytes = static_cast<const uint8_t*>(io->mem.ptr);
    p.data = std::make_shared<const std::vector<uint8_t>>(bytes, bytes + io->len);
  }
  if (opt_.record && io->op != Io::Op::Read) {
    p.start = trace_.size();
    Event e{};
    e.what = io->op == Io::Op::Write ? Event::What::WriteStart : Event::What::FlushStart;
    e.off = io->off;
    e.data = p.data;
    trace_.push_back(std::move(e));
  }
  queue_.push_back(std::move(p));
}

unsigned SimDevice::poll(bool wait) {
  if (queue_.empty() || (hold_ && !wait)) return 0;
  const unsigned n = 1 + static_cast<unsigned>(rng_.below(queue_.size()));
  for (unsigned i = 0; i < n; ++i) {  // callbacks may add operations; those may finish too
    const size_t pick = rng_.below(queue_.size());
    Pending p = std::move(queue_[pick]);
    queue_[pick] = std::move(queue_.back());
    queue_.pop_back();
    finish(std::move(p));
  }
  return n;
}

void SimDevice::finish(Pending p) {
  Io* io = p.io;
  switch (io->op) {
    case Io::Op::Read:
      ++reads_;
      if (p.err == 0) image_.read(io->off, io->mem.ptr, io->len);
      break;
    case Io::Op::Write:
      ++writes_;
      changed_ += std::memcmp(p.data->data(), io->mem.ptr, io->len) != 0;
      if (p.err == 0) {
        image_.write(io->off, p.data->data(), p.data->size());
      } else if (p.partial) {
        write_torn(image_, io->off, *p.data, rng_);
      }
      break;
    case Io::Op::Flush:
      ++flushes_;
      break;
  }
  if (p.start != SIZE_MAX) {
    Event e{};
    e.what = io->op == Io::Op::Write ? Event::What::WriteDone : Event::What::FlushDone;
    e.ok = p.err == 0;
    e.start = p.start;
    trace_.push_back(std::move(e));
  }
  io->result = -p.err;
  io->done(io);
}

void SimDevice::fail_writes_after(uint64_t n, int err) {
  until_gone_ = n;
  gone_err_ = err;
}

void SimDevice::clear_faults() {
  faults_.clear();
  until_gone_ = UINT64_MAX;
}

void SimDevice::reset_trace() {
  KVFS_CHECK(queue_.empty());
  trace_.clear();
  base_ = image_;
}

std::vector<size_t> SimDevice::open_writes(size_t n) const {
  KVFS_CHECK(n <= trace_.size());
  // A failed flush drops what it should have written from the cache that a later flush writes, as Linux does after a
  // failed fsync: such a write stays open for good.
  enum : uint8_t { kOpen, kDurable, kDropped };
  std::vector<uint8_t> state(n);
  for (size_t i = 0; i < n; ++i) {
    if (trace_[i].what != Event::What::FlushDone) continue;
    for (size_t k = 0; k < trace_[i].start; ++k) {
      if (trace_[k].what != Event::What::WriteDone || !trace_[k].ok) continue;
      uint8_t& s = state[trace_[k].start];
      if (s == kOpen) s = trace_[i].ok ? kDurable : kDropped;
    }
  }
  std::vector<size_t> open;
  for (size_t i = 0; i < n; ++i) {
    if (trace_[i].what == Event::What::WriteStart && state[i] != kDurable) open.push_back(i);
  }
  return open;
}

SimImage SimDevice::crash_image(size_t n, Rng& rng) const {
  // Per image a bias, so that "almost nothing" and "almost everything arrived" are as common as a mixture.
  const uint64_t lost = rng.below(101), torn = rng.below(3) == 0 ? rng.below(101) : 0;
  std::vector<Fate> fates(open_writes(n).size());
  for (Fate& f : fates) {
    f = rng.below(100) < lost ? Fate::Lost : rng.below(100) < torn ? Fate::Torn : Fate::Whole;
  }
  return crash_image(n, fates, rng);
}

SimImage SimDevice::crash_image(size_t n, const std::vector<Fate>& fates, Rng& rng) const {
  const std::vector<size_t> open = open_writes(n);
  KVFS_CHECK(open.size() == fates.size());
  SimImage image = base_;
  size_t next = 0;
  for (size_t i = 0; i < n; ++i) {
    const Event& e = trace_[i];
    if (e.what != Event::What::WriteStart) continue;
    Fate fate = Fate::Whole;
    if (next < open.size() && open[next] == i) fate = fates[next++];
    if (fate == Fate::Whole) image.write(e.off, e.data->data(), e.data->size());
    if (fate == Fate::Torn) write_torn(image, e.off, *e.data, rng);
  }
  return image;
}

}  // namespace kvfs
