// size_class.h owns the slot sizes of the store. A slot holds a payload of up to class_bytes(c) bytes and, above 8 KiB,
// a 512-byte trailer. 128 classes: multiples of 512 up to 8 KiB (16), then 16 steps per doubling up to 1 MiB (112).
// Longer chunks are cut into 1 MiB pieces by the caller.
#pragma once

#include <bit>
#include <cstdint>

namespace kvfs {

constexpr uint32_t kSizeClasses = 128;
constexpr uint32_t kMaxSlotPayload = 1u << 20;
constexpr uint32_t kTrailerBytes = 512;

// Payload bytes of class c < kSizeClasses; a multiple of 512.
constexpr uint32_t class_bytes(uint32_t c) {
  if (c < 16) return (c + 1) * 512;
  const uint32_t doubling = (c - 16) / 16, step = (c - 16) % 16 + 1;
  return (16 + step) << (9 + doubling);
}

constexpr uint32_t trailer_bytes(uint32_t c) { return c < 16 ? 0 : kTrailerBytes; }

// Whole slot: payload and trailer.
constexpr uint32_t slot_bytes(uint32_t c) { return class_bytes(c) + trailer_bytes(c); }

// Smallest class whose payload holds len bytes; len 1..kMaxSlotPayload (0 counts as 1).
constexpr uint8_t class_of(uint32_t len) {
  if (len <= 8192) return static_cast<uint8_t>(len == 0 ? 0 : (len - 1) / 512);
  const uint32_t l = len - 1;  // in [8 KiB << doubling, 16 KiB << doubling)
  const uint32_t doubling = static_cast<uint32_t>(std::bit_width(l)) - 14;
  return static_cast<uint8_t>(16 + doubling * 16 + ((l >> (9 + doubling)) & 15));
}

}  // namespace kvfs
