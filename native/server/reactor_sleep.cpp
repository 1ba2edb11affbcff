// reactor_sleep.cpp owns when the reactor sleeps, for how long, and for what it looks before.
#include <utility>

#include "fuse_channel.h"
#include "reactor.h"

namespace kvfs {

namespace {
constexpr uint64_t kShortSpinNs = 4000;     // less than a sleep and a wake cost
constexpr uint64_t kMountSpinNs = 60000;    // as long as a CPU takes to sleep and wake here
constexpr uint64_t kSpinNs = 15000;         // about two round trips of a memory hit; longer only burns a shared core
constexpr uint64_t kServerSpinNs = 200000;  // in which a client is back that takes batch after batch
constexpr uint64_t kAnswerSpinNs = 60000;   // between two frames of answers that are read from a disk
constexpr unsigned kBusyDepth = 16;         // device operations in flight from which a sleep is for several of them
constexpr unsigned kMaxReap = 16;
constexpr uint64_t kBusyNs = 200000;
}  // namespace

bool Reactor::work_waiting() {
  if (has_posted_.load(std::memory_order_acquire) || job_ready_ || store_->busy() || write_back_.busy()) return true;
  if (fuse_ != nullptr && fuse_->ready() && ops_live_ < kMaxOps) return true;
  for (const Source* src : sources_) {
    if (src->ready()) return true;
  }
  for (Ring* r : rings_) {
    if (!r->closing && r->q.can_take() && ops_live_ < kMaxOps) return true;
  }
  return false;
}

uint64_t Reactor::deadline_ns() const {
  uint64_t at = std::min(store_->deadline_ns(), write_back_.deadline_ns());
  for (const Source* src : sources_) at = std::min(at, src->deadline_ns());
  return at;
}

// True: there is work. False: time to sleep, which is short if something has happened meanwhile.
bool Reactor::spin() {
  if ((rings_.empty() && sources_.empty() && !first_answer_.awaited()) || deadline_ns() <= monotonic_ns()) return false;
  // Of answers of other machines the next are near when some have just come; before the first they may be far.
  const bool more = std::exchange(came_, false) && ops_live_ > 0;
  const uint64_t now = monotonic_ns();
  if (const uint64_t to = first_answer_.to(); !more && to != 0)
    return now >= first_answer_.from() && now < to && watch(first_answer_, to);
  SpinCredit& credit = more ? answer_credit_ : spin_credit_;
  const bool longer = credit.pays();
  // A little even so, unless it is known to be in vain: a client that has just been answered is often back before we could
  // fall asleep.
  if (!longer && ops_live_ > 0) return false;
  const uint64_t most = more ? kAnswerSpinNs : !sources_.empty() ? kServerSpinNs : kSpinNs;
  return watch(credit, now + (longer ? most : kShortSpinNs));
}

// As spin().
template <typename Credit>
bool Reactor::watch(Credit& credit, uint64_t until) {
  // Of what the kernel has not been told of nothing comes.
  if (networked() && uring_->submit_and_wait(0) > 0) return true;
  do {
    for (int i = 0; i < 32; ++i) {
      const bool events =
          (fuse_ != nullptr || networked()) && uring_->has_events();  // sleep() takes them without sleeping
      if (events || work_waiting()) {
        credit.found();
        return !events;
      }
      cpu_relax();
    }
  } while (monotonic_ns() < until);
  credit.missed();
  return false;
}

// A program that waits for the mount is often back soon after its answer, and finding us awake spares two wakes of a sleeping
// CPU, for its own does not fall asleep deeply either.
bool Reactor::spin_for_mount() {
  if (fuse_ == nullptr || !fuse_->quick() || deadline_ns() <= monotonic_ns() || !mount_credit_.pays()) return false;
  const uint64_t end = monotonic_ns() + kMountSpinNs;
  do {
    if (fuse_->look() || work_waiting()) {
      mount_credit_.found();
      return true;
    }
    for (int i = 0; i < 32; ++i) cpu_relax();
  } while (monotonic_ns() < end);
  mount_credit_.missed();
  return false;
}

void Reactor::sleep() {
  // With much in flight the next completions are near: clients need not wake us, and one wake for several completions
  // saves most of what sleeping costs. Bounded by kBusyNs.
  const unsigned inflight = dev_ != nullptr ? dev_->inflight() : 0;
  const unsigned min = inflight < kBusyDepth ? 1 : inflight / 8 < kMaxReap ? inflight / 8 : kMaxReap;
  if (inflight < kBusyDepth) {
    for (Ring* r : rings_) r->q.need_wake(true);
    full_fence();  // flags before tails, see ClientRing::publish
  }
  uint64_t timeout = 0;
  if (!work_waiting()) {
    uint64_t deadline = deadline_ns(), now = monotonic_ns();
    timeout = deadline == UINT64_MAX ? UINT64_MAX : deadline > now ? deadline - now : 0;
    if (!closing_.empty() && timeout > 1000000) timeout = 1000000;
    if (const uint64_t from = first_answer_.from(); from > now) timeout = std::min(timeout, from - now);
    // A full CQ is emptied without a wake from the client: look again soon while SQEs wait behind one.
    for (Ring* r : rings_) {
      if (!r->closing && r->q.has_sqes() && timeout > 200000) timeout = 200000;
    }
  }
  if (inflight >= kBusyDepth && timeout > kBusyNs) timeout = kBusyNs;
  ++stats_.sleeps;
  uring_->submit_and_wait(timeout, min);
  if (inflight < kBusyDepth) {
    for (Ring* r : rings_) r->q.need_wake(false);
  }
}

}  // namespace kvfs
