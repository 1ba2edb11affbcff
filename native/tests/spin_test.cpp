// When it pays to look for events instead of sleeping: for the first answer of another machine, and in general.
#include "../server/spin.h"

#include <gtest/gtest.h>

#include <random>

namespace kvfs {
namespace {

constexpr uint64_t kUs = 1000, kMs = 1000 * kUs;

struct Clock {
  FirstAnswer first;
  uint64_t now = 1000 * kMs;
  uint64_t looked = 0, hits = 0, misses = 0;  // looked: ns

  // One exchange in which the answer takes so long, as a reactor goes through it.
  void exchange(uint64_t took) {
    first.asked(now);
    const uint64_t from = first.from(), to = first.to(), at = now + took;
    if (to != 0) {
      EXPECT_GE(from, now);
      EXPECT_LT(from, to);
      if (at > to) {
        first.missed();
        ++misses;
        EXPECT_EQ(first.to(), 0u) << "once for each answer";
      } else if (at >= from) {
        first.found();
        ++hits;
      }
      looked += at < from ? 0 : std::min(at, to) - from;
    }
    now = at;
    first.came(now);
    EXPECT_FALSE(first.awaited());
    EXPECT_EQ(first.from(), 0u);
    EXPECT_EQ(first.to(), 0u);
    now += 50 * kUs;
  }
};

TEST(FirstAnswerTest, NobodyLooksBeforeAnAnswerHasShownHowLongItTakes) {
  FirstAnswer f;
  EXPECT_FALSE(f.awaited());
  f.asked(5 * kMs);
  EXPECT_TRUE(f.awaited());
  EXPECT_EQ(f.to(), 0u);
  f.came(6 * kMs);
  f.asked(7 * kMs);
  EXPECT_EQ(f.from(), 8 * kMs - FirstAnswer::kEarlyNs);
  EXPECT_EQ(f.to(), 8 * kMs + FirstAnswer::kLateMaxNs);
}

TEST(FirstAnswerTest, WhatComesSoonIsWaitedForAtOnce) {
  Clock c;
  c.exchange(40 * kUs);
  c.first.asked(c.now);
  EXPECT_EQ(c.first.from(), c.now);
  EXPECT_EQ(c.first.to(), c.now + 40 * kUs + FirstAnswer::kLateMinNs);
}

TEST(FirstAnswerTest, ALookIsShortHoweverLongTheAnswerTakes) {
  for (const uint64_t usual : {100 * kUs, 140 * kUs, 160 * kUs, 500 * kUs, 5 * kMs, 3000 * kMs}) {
    Clock c;
    c.exchange(usual);
    c.first.asked(c.now);
    EXPECT_LE(c.first.to() - c.first.from(), FirstAnswer::kEarlyNs + FirstAnswer::kLateMaxNs) << usual;
    EXPECT_GT(c.first.to(), c.now + usual);
  }
}

TEST(FirstAnswerTest, SingleAnswersThatTakeLongDoNotMoveTheWindow) {
  std::mt19937_64 random(1);
  Clock c;
  for (int i = 0; i < 2000; ++i) c.exchange(random() % 20 == 0 ? 80 * kMs : 450 * kUs + random() % (100 * kUs));
  EXPECT_GT(c.hits, 1800u);
  EXPECT_LT(c.looked / 2000, 200 * kUs);
}

TEST(FirstAnswerTest, TheWindowFollowsAServerThatBecomesSlowerOrFaster) {
  Clock c;
  for (const uint64_t usual : {400 * kUs, 1600 * kUs, 200 * kUs}) {
    for (int i = 0; i < 300; ++i) c.exchange(usual);
    const uint64_t before = c.hits;
    for (int i = 0; i < 100; ++i) c.exchange(usual);
    EXPECT_GE(c.hits, before + 90) << usual;
  }
}

TEST(FirstAnswerTest, AnswersThatNobodyCanForeseeAreSleptFor) {
  std::mt19937_64 random(2);
  Clock c;
  for (int i = 0; i < 20'000; ++i) c.exchange(200 * kUs + random() % (20 * kMs));
  EXPECT_LT(c.misses, 400u);
  EXPECT_LT(c.looked / 20'000, 10 * kUs);
}

TEST(SpinCreditTest, ASpinThatPaysGoesOn) {
  SpinCredit credit;
  for (int i = 0; i < 1000; ++i) {
    ASSERT_TRUE(credit.pays());
    credit.found();
  }
}

TEST(SpinCreditTest, SpinsInVainBecomeRareAndComeBackWhenOnesPay) {
  SpinCredit credit;
  int spins = 0;
  for (int i = 0; i < 100'000; ++i) {
    if (!credit.pays()) continue;
    ++spins;
    credit.missed();
  }
  EXPECT_GT(spins, 50) << "it is tried again and again";
  EXPECT_LT(spins, 1000);
  int rounds = 0;
  for (int streak = 0; streak < 100; ++rounds) {
    ASSERT_LT(rounds, 10'000);
    streak = credit.pays() ? streak + 1 : 0;
    if (streak != 0) credit.found();
  }
}

}  // namespace
}  // namespace kvfs
