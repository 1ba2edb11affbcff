// size_class.cpp: compile-time checks of the table in size_class.h.
#include "size_class.h"

namespace kvfs {

static_assert(class_bytes(0) == 512 && class_bytes(7) == 4096 && class_bytes(15) == 8192);
static_assert(class_bytes(16) == 8704 && class_bytes(31) == 16384 && class_bytes(kSizeClasses - 1) == kMaxSlotPayload);
static_assert(class_of(1) == 0 && class_of(512) == 0 && class_of(513) == 1 && class_of(8192) == 15);
static_assert(class_of(8193) == 16 && class_of(16384) == 31 && class_of(16385) == 32 &&
              class_of(kMaxSlotPayload) == 127);

}  // namespace kvfs
