#pragma once

#include <cstdint>
#include <cstring>

#include "cast/cast.h"

// The conversions of one value, from its bits to bits. They define what every instruction set
// computes, and finish the tails of the SIMD loops. Force-inlined: each translation unit compiles
// them for its own instruction set, and no copy of one may be linked in place of another's.
#define NANOTRON_FAST_INLINE static inline __attribute__((always_inline))

namespace nanotron_fast::scalar {

NANOTRON_FAST_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

NANOTRON_FAST_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

NANOTRON_FAST_INLINE uint32_t bfloat16_to_float32(uint16_t bits) {
  return static_cast<uint32_t>(bits) << 16;
}

// NaN becomes 0xffff, as in torch's vectorised code.
NANOTRON_FAST_INLINE uint16_t float32_to_bfloat16(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return static_cast<uint16_t>(is_nan ? 0xffffu : rounded);
}

// NaN keeps its payload and is made quiet. No operand is a denormal float: torch may have told the
// processor to take those for zero.
NANOTRON_FAST_INLINE uint32_t float16_to_float32(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude > 0x7c00u) return sign | 0x7fc00000u | (magnitude << 13);
  if (magnitude == 0x7c00u) return sign | 0x7f800000u;
  if (magnitude >= 0x400u) return sign | ((magnitude << 13) + 0x38000000u);
  return sign | bits_from_float(static_cast<float>(magnitude) * 0x1.0p-24f);
}

NANOTRON_FAST_INLINE uint16_t float32_to_float16(uint32_t bits) {
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the result is subnormal
    // Adding 0.5 leaves the mantissa rounded to units of 2^-24 in the low bits.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

NANOTRON_FAST_INLINE uint16_t bfloat16_to_float16(uint16_t bits) {
  return float32_to_float16(bfloat16_to_float32(bits));
}

// NaN becomes 0x7fc0, as in torch for this pair.
NANOTRON_FAST_INLINE uint16_t float16_to_bfloat16(uint16_t bits) {
  if ((bits & 0x7fffu) > 0x7c00u) return 0x7fc0u;
  return float32_to_bfloat16(float16_to_float32(bits));
}

// The value of a byte of a quantised source. That of E2M1 is twice what it stands for.
template <Dtype kCode>
NANOTRON_FAST_INLINE float value_of(uint8_t byte) {
  if constexpr (kCode == Dtype::kE4M3) {
    const uint32_t sign = (byte & 0x80u) << 24;
    if ((byte & 0x7fu) == 0x7fu) return float_from_bits(sign | 0x7ff00000u);
    // The same bits are those of a float16 that is 256 times smaller.
    const auto half = static_cast<uint16_t>((byte & 0x80u) << 8 | (byte & 0x7fu) << 7);
    return float_from_bits(float16_to_float32(half)) * 0x1.0p8f;
  } else {
    const unsigned nibble = kCode == Dtype::kE2M1Low ? byte & 15u : byte >> 4;
    const auto half = static_cast<uint16_t>((nibble & 8u) << 12 | (nibble & 7u) << 9);
    return float_from_bits(float16_to_float32(half)) * 0x1.0p15f;
  }
}

// The bits of a float in another dtype, as wide as that is.
template <Dtype kDestination>
NANOTRON_FAST_INLINE auto narrow(float value) {
  const uint32_t bits = bits_from_float(value);
  if constexpr (kDestination == Dtype::kBFloat16) return float32_to_bfloat16(bits);
  if constexpr (kDestination == Dtype::kFloat16) return float32_to_float16(bits);
  if constexpr (kDestination == Dtype::kFloat32) return bits;
}

}  // namespace nanotron_fast::scalar

// Defines the loop over one conversion; ATTRIBUTES names the instruction set to compile it for.
#define NANOTRON_FAST_CAST_LOOP(NAME, FROM, TO, ATTRIBUTES)                              \
  ATTRIBUTES static void NAME(const std::byte* source, std::byte* destination,           \
                              int64_t num_elements) {                                    \
    for (int64_t i = 0; i < num_elements; ++i) {                                         \
      FROM from;                                                                         \
      std::memcpy(&from, source + i * static_cast<int64_t>(sizeof(FROM)), sizeof(FROM)); \
      const TO to = scalar::NAME(from);                                                  \
      std::memcpy(destination + i * static_cast<int64_t>(sizeof(TO)), &to, sizeof(TO));  \
    }                                                                                    \
  }
