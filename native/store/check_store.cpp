// check_store.cpp: the offline check; see check_store.h. It recovers as recovery.cpp does, but goes on where that refuses,
// remembering what it met. A repair is a checkpoint of what is left, so it is as atomic as any: a crash leaves the store
// as before or as after.
#include "check_store.h"

#include <errno.h>

#include <algorithm>
#include <map>
#include <unordered_set>

#include "store_impl.h"

namespace kvfs {

class Checker {
 public:
  Checker(Device& dev, const CheckOptions& opt, CheckReport* out)
      : dev_(dev), opt_(opt), out_(*out), s_(dev, {.high_watermark = 2, .read_only = !opt.repair}) {}  // evicts nothing
  Status run();

 private:
  struct Bad {
    Problem problem;
    uint64_t where;
  };
  struct Segment {  // one being read whole
    explicit Segment(uint64_t bytes) : buf(bytes), ios((bytes + kIo - 1) / kIo) {}
    AlignedBuf buf;
    std::vector<Io> ios;
    uint32_t pending = 0;
    bool failed = false;
  };
  static constexpr uint64_t kIo = 1u << 20;

  void add(Problem p, const ChunkKey& key, uint32_t length, uint64_t where);
  void add_chunk(Problem p, uint32_t id) { add(p, s_.index_.key_of(id), s_.index_.at(id).len(), id_off(id)); }
  uint64_t id_off(uint32_t id) const { return s_.index_.at(id).loc() * 512; }
  uint32_t piece_len(uint32_t id) const {
    return s_.index_.key_of(id).rsv[0] == 0 ? std::min(s_.index_.at(id).len(), kPieceMax) : s_.index_.at(id).len();
  }
  Record record(uint32_t id) const;
  Status supers();
  void pages();
  Status journal();
  Status verify();
  void read_segment(Segment* s, uint32_t seg);
  bool wait_segment(Segment* s);
  void verify_segment(const uint32_t* ids, size_t n, const uint8_t* bytes, uint32_t seg);
  void claims();
  void claimed_twice(const std::vector<uint32_t>& refused);
  void pieces();
  void orphans();
  void drop();
  void salvage();
  void try_salvage(const Record& rec);
  Status write();

  Device& dev_;
  const CheckOptions& opt_;
  CheckReport& out_;
  StoreImpl s_;
  bool super_bad_[2] = {};
  bool lost_ = false;                 // records are missing: what is left may be outdated
  std::unordered_set<uint32_t> bad_;  // ids to drop
  std::vector<bool> claimed_;         // by id: holds its slot
  std::unique_ptr<AlignedBuf> journal_;
  std::map<uint64_t, const GroupHeader*> old_;  // groups from before the checkpoint, by seq
  uint64_t last_seq_ = 0;                       // highest of any group
};

void Checker::add(Problem p, const ChunkKey& key, uint32_t length, uint64_t where) {
  out_.counts[static_cast<uint32_t>(p)]++;
  if (out_.findings.size() < CheckReport::kMaxFindings) out_.findings.push_back({p, length, key, where});
}

Record Checker::record(uint32_t id) const {
  const Entry& e = s_.index_.at(id);
  Record r{};
  r.type = Record::kPut;
  r.slot_class = s_.segment_class_[s_.alloc_->segment_of(e.loc() * 512)];
  r.length = e.len();
  r.key = s_.index_.key_of(id);
  r.loc = e.loc();
  r.checksum = e.csum;
  return r;
}

Status Checker::supers() {
  bool ours = false;
  for (int i = 0; i < 2; i++) {
    AlignedBuf b(kBlock);
    const auto* sb = b.as<SuperBlock>();
    super_bad_[i] = dev_.size() < kSuperOff[i] + kBlock || s_.sync_io(Io::Op::Read, b.p, kBlock, kSuperOff[i]) < 0;
    if (!super_bad_[i]) {
      ours = ours || sb->magic == kSuperMagic;
      super_bad_[i] = sb->magic != kSuperMagic || sb->checksum != xxh3(sb, offsetof(SuperBlock, checksum));
    }
  }
  if (super_bad_[0] && super_bad_[1] && !ours) return {EMEDIUMTYPE, "this is not a kvfs store"};
  if (Status st = s_.load_super(); st.err) return st;
  for (int i = 0; i < 2; i++)
    if (super_bad_[i]) add(Problem::SuperDamaged, {}, 0, static_cast<uint64_t>(i));
  out_.closed = s_.super_.clean != 0;
  return {};
}

void Checker::pages() {
  AlignedBuf b(kCheckpointPage);
  const SuperBlock& super = s_.super_;
  for (uint32_t page = 0; page < super.checkpoint_pages; page++) {
    const uint64_t off = s_.geo_.page_off(super.checkpoint_segment, page);
    auto* h = b.as<PageHeader>();
    if (s_.sync_io(Io::Op::Read, b.p, kCheckpointPage, off) < 0 || !s_.valid_page(h, page)) {
      add(Problem::PageDamaged, {}, 0, page);
      lost_ = true;
      continue;
    }
    const auto* rec = reinterpret_cast<const Record*>(h + 1);
    for (uint32_t k = 0; k < h->records; k++) {
      if (sane(rec[k], s_.geo_) && rec[k].type == Record::kPut)
        s_.apply(rec[k]);
      else
        add(Problem::RecordImpossible, {}, 0, off);
    }
  }
}

Status Checker::journal() {
  const uint64_t bytes = s_.geo_.journal_bytes, start = s_.super_.start_seq;
  journal_ = std::make_unique<AlignedBuf>(bytes);
  auto* j = journal_->as<uint8_t>();
  for (uint64_t at = 0; at < bytes; at += kIo) {
    const uint64_t n = std::min(kIo, bytes - at);
    if (s_.sync_io(Io::Op::Read, j + at, static_cast<uint32_t>(n), kJournalOff + at) == 0) continue;
    for (uint64_t k = at; k < at + n; k += kBlock)  // save what can be read
      if (s_.sync_io(Io::Op::Read, j + k, kBlock, kJournalOff + k) < 0) std::memset(j + k, 0, kBlock);
  }
  std::map<uint64_t, const GroupHeader*> groups;
  uint64_t flushed = start - 1;
  for (uint64_t at = 0; at < bytes; at += kBlock) {
    const GroupHeader* h = s_.valid_group(j, at);
    if (!h || h->seq >= UINT64_MAX / 2) continue;
    last_seq_ = std::max(last_seq_, h->seq);
    if (h->seq < start) {
      old_[h->seq] = h;
    } else if (h->seq < start + kSeqGap / 2) {
      groups[h->seq] = h;
      if (h->flushed_seq < h->seq) flushed = std::max(flushed, h->flushed_seq);
    }
  }
  last_seq_ = std::max(last_seq_, start);
  uint64_t next = start;
  for (auto& [seq, h] : groups) {
    if (seq > next && seq <= flushed + 1 && next <= flushed) {
      add(Problem::GroupDamaged, {}, static_cast<uint32_t>(std::min(seq, flushed + 1) - next), next);
      lost_ = true;
      next = seq;
    }
    if (seq > next) break;  // the lost tail
    bool possible = true;
    const auto* rec = reinterpret_cast<const Record*>(h + 1);
    for (uint32_t i = 0; i < h->records; i++) {
      const bool ok = sane(rec[i], s_.geo_);
      if (!ok) add(Problem::RecordImpossible, {}, 0, kJournalOff + (reinterpret_cast<const uint8_t*>(h) - j));
      if (ok && seq <= flushed) s_.apply(rec[i]);
      possible = possible && ok;
    }
    if (seq > flushed && possible) s_.apply_unflushed(h);
    next = seq + 1;
  }
  if (next <= flushed) {
    add(Problem::GroupDamaged, {}, static_cast<uint32_t>(flushed - next + 1), next);
    lost_ = true;
  }
  return s_.applied();
}

// ---- data

void Checker::read_segment(Segment* s, uint32_t seg) {
  const uint64_t stride = s_.geo_.stride();
  s->failed = false;
  for (size_t i = 0; i < s->ios.size(); i++) {
    Io& io = s->ios[i];
    io = Io{};
    io.mem = {s->buf.as<uint8_t>() + i * kIo, -1};
    io.len = static_cast<uint32_t>(std::min(kIo, stride - i * kIo));
    io.off = s_.geo_.segment_off(seg) + i * kIo;
    io.owner = s;
    io.done = [](Io* x) {
      auto* t = static_cast<Segment*>(x->owner);
      t->pending--;
      t->failed = t->failed || x->result < 0;
    };
    s->pending++;
    dev_.submit(&io);
  }
}

bool Checker::wait_segment(Segment* s) {
  while (s->pending) dev_.poll(true);
  return !s->failed;
}

// bytes: the whole segment, or nullptr: chunk by chunk.
void Checker::verify_segment(const uint32_t* ids, size_t n, const uint8_t* bytes, uint32_t seg) {
  const uint64_t base = s_.geo_.segment_off(seg);
  for (size_t i = 0; i < n; i++) {
    const Record rec = record(ids[i]);
    const uint32_t len = piece_len(ids[i]);
    const uint64_t in = rec.loc * 512 - base;
    bool good = false;
    if (!bytes) {
      good = s_.data_matches(rec);
    } else if (in + len <= s_.geo_.stride()) {
      const uint64_t trailer = trailer_bytes(class_of(len)) ? s_.trailer_place(rec) : 0;
      const auto* tr = trailer ? reinterpret_cast<const Trailer*>(bytes + (trailer - base)) : nullptr;
      good = s_.content_matches(rec, bytes + in, tr);
    }
    if (!good) {
      add_chunk(Problem::DataDamaged, ids[i]);
      bad_.insert(ids[i]);
    }
    out_.verified_bytes += len;
    if (opt_.done) *opt_.done += len;
  }
}

// Everything in the order it lies on the device: segments that are used by a quarter or more are read whole, the next one
// while this one is compared.
Status Checker::verify() {
  std::vector<uint32_t> ids;
  uint64_t total = 0;
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!s_.index_.live(id)) continue;
    ids.push_back(id);
    total += piece_len(id);
  }
  if (opt_.total) *opt_.total = total;
  std::sort(ids.begin(), ids.end(),
            [&](uint32_t a, uint32_t b) { return s_.index_.at(a).loc() < s_.index_.at(b).loc(); });
  struct Run {
    uint32_t seg;
    size_t from, to;
    bool whole;
  };
  auto run_at = [&](size_t from) {
    Run r{s_.alloc_->segment_of(id_off(ids[from])), from, from, false};
    uint64_t used = 0;
    for (; r.to < ids.size() && s_.alloc_->segment_of(id_off(ids[r.to])) == r.seg; r.to++) used += piece_len(ids[r.to]);
    r.whole = used >= s_.geo_.stride() / 4;
    return r;
  };
  if (ids.empty()) return {};
  Segment bufs[2] = {Segment(s_.geo_.stride()), Segment(s_.geo_.stride())};
  unsigned which = 0;
  Run now = run_at(0);
  if (now.whole) read_segment(&bufs[which], now.seg);
  for (;;) {
    const bool more = now.to < ids.size();
    const Run next = more ? run_at(now.to) : Run{};
    if (more && next.whole) read_segment(&bufs[which ^ 1], next.seg);
    const bool there = now.whole && wait_segment(&bufs[which]);
    const bool stop = opt_.cancel && *opt_.cancel;
    if (!stop)
      verify_segment(&ids[now.from], now.to - now.from, there ? bufs[which].buf.as<uint8_t>() : nullptr, now.seg);
    if (!more || stop) {
      wait_segment(&bufs[which ^ 1]);
      return stop ? Status{ECANCELED, "the check was interrupted"} : Status{};
    }
    now = next;
    which ^= 1;
  }
}

// ---- structure

void Checker::claims() {
  claimed_.assign(uint64_t{s_.index_.capacity()} + 1, false);
  std::vector<uint32_t> refused;
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!s_.index_.live(id) || bad_.contains(id)) continue;
    const uint8_t cls = s_.segment_class_[s_.alloc_->segment_of(id_off(id))];
    if (piece_len(id) <= class_bytes(cls) && s_.alloc_->claim(id_off(id), cls))
      claimed_[id] = true;
    else
      refused.push_back(id);
  }
  if (!refused.empty()) claimed_twice(refused);
}

// Of several claims to a slot the first whose data is there is right. What claims no slot at all is wrong.
void Checker::claimed_twice(const std::vector<uint32_t>& refused) {
  std::map<uint64_t, uint32_t> holder;
  for (uint32_t id : refused) holder[id_off(id)] = 0;
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!claimed_[id]) continue;
    if (auto it = holder.find(id_off(id)); it != holder.end()) it->second = id;
  }
  for (auto& [off, id] : holder) {
    if (!id || s_.data_matches(record(id))) continue;
    add_chunk(Problem::SlotTwice, id);
    bad_.insert(id);
    claimed_[id] = false;
    s_.alloc_->release(off);
    id = 0;
  }
  for (uint32_t id : refused) {
    uint32_t& held = holder[id_off(id)];
    const uint8_t cls = s_.segment_class_[s_.alloc_->segment_of(id_off(id))];
    if (!held && piece_len(id) <= class_bytes(cls) && s_.data_matches(record(id)) &&
        s_.alloc_->claim(id_off(id), cls)) {
      held = id;
      claimed_[id] = true;
      continue;
    }
    add_chunk(Problem::SlotTwice, id);
    bad_.insert(id);
  }
}

void Checker::pieces() {
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!s_.index_.live(id)) continue;
    const Entry& e = s_.index_.at(id);
    ChunkKey other = s_.index_.key_of(id);
    if (other.rsv[0] != 0) {
      const uint64_t at = uint64_t{other.rsv[0]} * kPieceMax;
      other.rsv[0] = 0;
      const Entry* head = s_.index_.find(other);
      if (head && head->len() > at) continue;
      add_chunk(Problem::PieceStray, id);
      bad_.insert(id);
      continue;
    }
    for (uint32_t k = 1; k * kPieceMax < e.len(); k++) {
      other.rsv[0] = static_cast<uint8_t>(k);
      const Entry* piece = s_.index_.find(other);
      if (piece && piece->len() == std::min(e.len() - k * kPieceMax, kPieceMax)) continue;
      add_chunk(Problem::PieceMissing, id);
      bad_.insert(id);
      break;
    }
  }
}

void Checker::orphans() {
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!s_.index_.live(id) || bad_.contains(id)) continue;
    const ChunkKey key = s_.index_.key_of(id);
    if (key.rsv[0] != 0) continue;
    if (key.kind == Kind::Block) {
      if (std::binary_search(opt_.namespaces.begin(), opt_.namespaces.end(), key.ns)) continue;
      add_chunk(Problem::NamespaceUnknown, id);
    } else {
      uint64_t ino, chunk;
      std::memcpy(&ino, key.id, 8);
      std::memcpy(&chunk, key.id + 8, 8);
      const auto it = std::lower_bound(opt_.files.begin(), opt_.files.end(), std::pair<uint64_t, uint64_t>{ino, 0});
      const bool known = it != opt_.files.end() && it->first == ino;
      if (known && chunk <= it->second / kFileChunk && chunk * kFileChunk < it->second) continue;
      add_chunk(known ? Problem::BeyondSize : Problem::InodeUnknown, id);
    }
    bad_.insert(id);
  }
}

// Takes the bad chunks out, each with all its pieces.
void Checker::drop() {
  std::unordered_set<uint32_t> all;
  for (uint32_t id : bad_) {
    ChunkKey key = s_.index_.key_of(id);
    for (uint32_t k = 0; k < kMaxPieces; k++) {
      key.rsv[0] = static_cast<uint8_t>(k);
      if (const uint32_t other = s_.index_.id_of(key)) all.insert(other);
    }
  }
  for (uint32_t id : all) {
    if (claimed_[id]) s_.alloc_->release(id_off(id));
    s_.index_.erase(id);
  }
}

// ---- repair

void Checker::try_salvage(const Record& rec) {
  if (s_.index_.id_of(rec.key) || !s_.data_matches(rec)) return;
  if (!s_.alloc_->claim(rec.loc * 512, rec.slot_class)) return;  // somebody else's by now
  s_.apply(rec);
}

// Records are lost. A block whose older record still fits its data is whole: blocks never change. (One that had been
// deleted may so come back.) A file's chunk does change: an old one might be outdated, and is not taken.
void Checker::salvage() {
  struct Last {
    bool operator()(const ChunkKey& a, const ChunkKey& b) const { return std::memcmp(&a, &b, sizeof a) < 0; }
  };
  std::map<ChunkKey, Record, Last> found;  // newest first: the journal, then pages of older checkpoints
  auto take = [&](const Record& rec) {
    if (sane(rec, s_.geo_) && rec.key.kind == Kind::Block) found.try_emplace(rec.key, rec);
  };
  for (auto it = old_.rbegin(); it != old_.rend(); ++it) {
    const auto* rec = reinterpret_cast<const Record*>(it->second + 1);
    for (uint32_t i = it->second->records; i-- > 0;) take(rec[i]);
  }
  AlignedBuf b(kCheckpointPage);
  auto* h = b.as<PageHeader>();
  for (uint32_t seg = 0; seg < s_.geo_.segments; seg++) {
    for (uint32_t p = 0; p < s_.geo_.pages_per_segment(); p++) {
      const uint64_t off = s_.geo_.segment_off(seg) + uint64_t{p} * kCheckpointPage;
      if (s_.sync_io(Io::Op::Read, b.p, kBlock, off) < 0 || h->magic != kPageMagic || h->uuid != s_.super_.uuid[0])
        break;
      if (s_.sync_io(Io::Op::Read, b.p, kCheckpointPage, off) < 0 || h->generation >= s_.super_.generation ||
          h->records > kPageRecords || h->checksum != sealed_sum(h, kCheckpointPage, &PageHeader::checksum, h))
        continue;
      const auto* rec = reinterpret_cast<const Record*>(h + 1);
      for (uint32_t i = 0; i < h->records; i++) take(rec[i]);
    }
  }
  const uint32_t before = s_.index_.size();
  for (auto& [key, rec] : found)
    if (rec.type == Record::kPut) try_salvage(rec);
  // All pieces, or none.
  claimed_.assign(uint64_t{s_.index_.capacity()} + 1, true);
  bad_.clear();
  const CheckReport so_far = out_;
  pieces();
  out_ = so_far;
  drop();
  out_.salvaged = s_.index_.size() - before;
}

Status Checker::write() {
  uint64_t others = 0;
  for (uint32_t i = 0; i < kProblems; i++)
    if (i != static_cast<uint32_t>(Problem::SuperDamaged)) others += out_.counts[i];
  if (others == 0) {  // the good copy over the bad one; all else stays as it is
    AlignedBuf b(kBlock);
    std::memcpy(b.p, &s_.super_, kBlock);
    for (int i = 0; i < 2; i++) {
      if (!super_bad_[i]) continue;
      if (int e = s_.sync_io(Io::Op::Write, b.p, kBlock, kSuperOff[i]); e < 0)
        return {-e, "writing the superblock failed"};
    }
    if (int e = s_.sync_io(Io::Op::Flush, nullptr, 0, 0); e < 0) return {-e, "writing the superblock failed"};
    return {};
  }
  s_.next_seq_ = last_seq_ + kSeqGap;
  s_.written_seq_ = s_.flushed_seq_ = s_.next_seq_ - 1;
  s_.head_v_ = s_.tail_v_ = s_.super_.journal_start;
  if (Status st = s_.checkpoint_now(); st.err) return st;
  s_.super_.clean = 1;
  if (int e = s_.write_super(); e < 0) return {-e, "writing the superblock failed"};
  return {};
}

Status Checker::run() {
  if (Status st = supers(); st.err) return st;
  pages();
  if (Status st = journal(); st.err) return st;
  const bool impossible = out_.counts[static_cast<uint32_t>(Problem::RecordImpossible)] != 0;
  lost_ = lost_ || impossible;
  // After a loss what is left may be outdated: believe only what its checksums prove.
  if (opt_.data || (opt_.repair && lost_))
    if (Status st = verify(); st.err) return st;
  claims();
  pieces();
  if (opt_.orphans) orphans();
  drop();
  if (opt_.repair && lost_) salvage();
  for (uint32_t id = 1; id <= s_.index_.capacity(); id++) {
    if (!s_.index_.live(id)) continue;
    const ChunkKey key = s_.index_.key_of(id);
    if (key.rsv[0] != 0) continue;
    out_.chunks++;
    (key.kind == Kind::Block ? out_.block_chunks : out_.file_chunks)++;
    out_.data_bytes += s_.index_.at(id).len();
  }
  uint64_t found = 0;
  for (uint64_t n : out_.counts) found += n;
  if (!opt_.repair || found == 0) return {};
  if (opt_.cancel && *opt_.cancel) return {ECANCELED, "the check was interrupted"};
  if (Status st = write(); st.err) return st;
  out_.repaired = true;
  return {};
}

Status check_store(Device& dev, const CheckOptions& opt, CheckReport* out) {
  *out = CheckReport{};
  return std::make_unique<Checker>(dev, opt, out)->run();
}

}  // namespace kvfs
