// source.h owns what a reactor asks of something besides rings that it serves. All calls are on the reactor thread.
#pragma once

#include <cstdint>

namespace kvfs {

class Source {
 public:
  virtual ~Source() = default;
  virtual void pump() = 0;                   // each turn, before the store's tick: takes what has come
  virtual void publish() = 0;                // each turn, after it: sends what is done
  virtual bool ready() const = 0;            // pump() has work that waits for nothing
  virtual bool idle() const = 0;             // nothing is under way: the reactor may end
  virtual uint64_t deadline_ns() const = 0;  // when pump() must run next (CLOCK_MONOTONIC), UINT64_MAX = never
};

}  // namespace kvfs
