// size_class_test.cpp checks every length against the table of slot sizes.
#include "../store/size_class.h"

#include <gtest/gtest.h>

namespace kvfs {
namespace {

TEST(SizeClass, EveryLengthGetsTheSmallestFittingClass) {
  for (uint32_t len = 1; len <= kMaxSlotPayload; ++len) {
    const uint32_t c = class_of(len);
    ASSERT_LT(c, kSizeClasses);
    ASSERT_GE(class_bytes(c), len);
    if (c > 0) {
      ASSERT_LT(class_bytes(c - 1), len);
    }
  }
  EXPECT_EQ(class_of(0), 0);
}

TEST(SizeClass, LossIsAtMostAnEighth) {
  double worst = 0;
  for (uint32_t len = 4096; len <= kMaxSlotPayload; ++len) {
    const double loss = static_cast<double>(slot_bytes(class_of(len)) - len) / len;
    if (loss > worst) worst = loss;
  }
  EXPECT_LE(worst, 0.125);
  RecordProperty("worst", std::to_string(worst));
}

TEST(SizeClass, SlotsAreWholeSectorsAndTrailersHoldTheChecksums) {
  for (uint32_t c = 0; c < kSizeClasses; ++c) {
    ASSERT_EQ(class_bytes(c) % 512, 0u);
    ASSERT_EQ(trailer_bytes(c), class_bytes(c) <= 8192 ? 0u : 512u);
    if (c > 0) {
      ASSERT_GT(class_bytes(c), class_bytes(c - 1));
    }
  }
}

}  // namespace
}  // namespace kvfs
