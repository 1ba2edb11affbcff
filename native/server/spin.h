// spin.h owns when a reactor looks for events for a while instead of sleeping until one comes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kvfs {

// Whether to spin for events of one kind. What finds one earns a credit, what does not costs four. Two sides that sleep between
// any two messages are as stable as two that are awake, and one spin alone shows nothing, for the other's CPU sleeps deeply by
// then: without credit several are tried in a row, the more seldom the more often that was in vain.
class SpinCredit {
 public:
  explicit SpinCredit(int credit = kTrial) : credit_(credit) {}
  bool pays() {
    if (credit_ > 0) return true;
    if (++rounds_ < trial_after_) return false;
    rounds_ = 0;
    trial_after_ = std::min(2 * trial_after_, kTrialMax);
    credit_ = kTrial;
    return true;
  }
  void found() {
    if (credit_ < kMost && ++credit_ == kMost) trial_after_ = kTrialMin;
  }
  void missed() { credit_ = std::max(credit_ - 4, 0); }

 private:
  static constexpr int kTrial = 32, kMost = 64;
  static constexpr uint32_t kTrialMin = 64, kTrialMax = 4096;  // idle rounds between trials
  int credit_;
  uint32_t rounds_ = 0, trial_after_ = kTrialMin;
};

// When the first answer of another machine is due, for somebody who asked with nothing else under way: from a little before it
// takes as long as it usually does. A thread that wakes by itself then and looks is awake when the answer comes, on a CPU of its
// own; one that sleeps is woken on a halted CPU, or on the sender's. (The kernel's hybrid polling does so for disks.)
class FirstAnswer {
 public:
  static constexpr uint64_t kSleepNs = 150'000;  // what comes sooner is not worth a sleep
  static constexpr uint64_t kEarlyNs = 100'000, kLateMinNs = 20'000, kLateMaxNs = 250'000;

  void asked(uint64_t now) {
    asked_ns_ = now;
    looks_ = usual_ns_ != 0 && credit_.pays();
  }
  bool awaited() const { return asked_ns_ != 0; }
  // With the first answer: a median, as single ones may take any time.
  void came(uint64_t now) {
    const uint64_t took = now - asked_ns_, step = usual_ns_ / 32 + 1;
    usual_ns_ = usual_ns_ == 0 ? took : took > usual_ns_ ? usual_ns_ + step : usual_ns_ - step;
    asked_ns_ = 0;
    looks_ = false;
  }
  // Between from() and to() it pays to look. Both 0: not now.
  uint64_t from() const {
    if (!looks_) return 0;
    return usual_ns_ < kSleepNs ? asked_ns_ : asked_ns_ + usual_ns_ - std::min(usual_ns_ / 4, kEarlyNs);
  }
  uint64_t to() const { return looks_ ? asked_ns_ + usual_ns_ + std::clamp(usual_ns_ / 2, kLateMinNs, kLateMaxNs) : 0; }
  void found() { credit_.found(); }
  void missed() {
    credit_.missed();
    looks_ = false;
  }

 private:
  SpinCredit credit_;
  bool looks_ = false;
  uint64_t asked_ns_ = 0, usual_ns_ = 0;
};

}  // namespace kvfs
