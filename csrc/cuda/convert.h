#pragma once

#include <cstdint>
#include <cstring>

// Casts of one element from its bits to bits, the same that csrc/cast makes: tests compare them for
// every pattern. In integers, so that neither flags of the compiler nor the processor's handling of
// NaN and subnormals can change a bit, and so that the host can run what the device runs.
#if defined(__CUDACC__)
#define NANOTRON_FAST_DEVICE __device__ __forceinline__
#define NANOTRON_FAST_UNROLL(TIMES) _Pragma(TIMES)
#else
#define NANOTRON_FAST_DEVICE inline
#define NANOTRON_FAST_UNROLL(TIMES)
#endif

namespace nanotron_fast::device {

NANOTRON_FAST_DEVICE float as_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

NANOTRON_FAST_DEVICE uint32_t as_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

// Elements that keep their dtype.
template <typename Bits>
struct Same {
  using Source = Bits;
  using Destination = Bits;
  static NANOTRON_FAST_DEVICE Bits convert(Bits bits) { return bits; }
};

struct BFloat16ToFloat32 {
  using Source = uint16_t;
  using Destination = uint32_t;
  static NANOTRON_FAST_DEVICE uint32_t convert(uint16_t bits) { return uint32_t{bits} << 16; }
};

struct Float32ToBFloat16 {
  using Source = uint32_t;
  using Destination = uint16_t;
  static NANOTRON_FAST_DEVICE uint16_t convert(uint32_t bits) {
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0xffffu : rounded);
  }
};

struct Float16ToFloat32 {
  using Source = uint16_t;
  using Destination = uint32_t;
  static NANOTRON_FAST_DEVICE uint32_t convert(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    // A subnormal is a whole number of 2^-24, which a float holds exactly.
    const uint32_t small = as_bits(static_cast<float>(magnitude) * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + 0x38000000u;
    const uint32_t special = magnitude << 13 | (magnitude > 0x7c00u ? 0x7fc00000u : 0x7f800000u);
    return sign | (magnitude < 0x400u ? small : magnitude < 0x7c00u ? normal : special);
  }
};

struct Float32ToFloat16 {
  using Source = uint32_t;
  using Destination = uint16_t;
  static NANOTRON_FAST_DEVICE uint16_t convert(uint32_t bits) {
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Next to 0.5 a float counts in units of 2^-24, as a subnormal half does.
    const uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    const uint32_t special =
        magnitude > 0x7f800000u ? 0x7e00u | (magnitude >> 13 & 0x3ffu) : 0x7c00u;
    const uint32_t half = magnitude < 0x38800000u   ? small
                          : magnitude < 0x477ff000u ? normal  // 65520 and more are infinite
                                                    : special;
    return static_cast<uint16_t>(sign | half);
  }
};

struct BFloat16ToFloat16 {
  using Source = uint16_t;
  using Destination = uint16_t;
  static NANOTRON_FAST_DEVICE uint16_t convert(uint16_t bits) {
    return Float32ToFloat16::convert(BFloat16ToFloat32::convert(bits));
  }
};

struct Float16ToBFloat16 {
  using Source = uint16_t;
  using Destination = uint16_t;
  static NANOTRON_FAST_DEVICE uint16_t convert(uint16_t bits) {
    const uint16_t value = Float32ToBFloat16::convert(Float16ToFloat32::convert(bits));
    return (bits & 0x7fffu) > 0x7c00u ? uint16_t{0x7fc0u} : value;
  }
};

}  // namespace nanotron_fast::device
