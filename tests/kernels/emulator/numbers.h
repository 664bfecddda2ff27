// Numbers in registers, which are 64 bits wide.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulator {

template <class To, class From>
To bits_as(From from) {
  To to{};
  std::memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

inline float from_bf16(uint16_t bits) { return bits_as<float>(uint32_t{bits} << 16); }
inline float from_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  const float size = exponent == 31 ? (digits ? NAN : INFINITY)
                     : exponent     ? std::ldexp(static_cast<float>(1024 + digits), exponent - 25)
                                    : std::ldexp(static_cast<float>(digits), -24);
  return bits >> 15 ? -size : size;
}
// Tensor cores leave the last 13 bits out.
inline float from_tf32(uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); }

inline uint16_t to_f16(double number) {
  if (std::isnan(number)) return 0x7fff;
  const uint16_t sign = std::signbit(number) ? 0x8000 : 0;
  int exponent;
  if (std::frexp(number, &exponent) == 0) return sign;
  exponent = std::max(exponent, -13);  // below lie subnormal numbers
  // Ties go to even numbers of steps, as the processor rounds.
  const double steps = std::nearbyint(std::ldexp(std::fabs(number), 11 - exponent));
  if (!(std::ldexp(steps, exponent - 11) < 65520)) return sign | 0x7c00;
  return static_cast<uint16_t>(sign + static_cast<int>(steps) + (exponent + 13) * 1024);
}

// Rounded once: a float that lies between is made odd, so that no tie appears.
inline uint16_t to_bf16(double number) {
  if (std::isnan(number)) return 0x7fff;
  const float nearest = static_cast<float>(number);
  uint32_t bits = bits_as<uint32_t>(nearest);
  if (std::isfinite(nearest) && static_cast<double>(nearest) != number && !(bits & 1)) {
    bits += std::fabs(nearest) < std::fabs(number) ? 1 : -1;
  }
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float without_subnormals(float number) {
  return std::fpclassify(number) == FP_SUBNORMAL ? std::copysign(0.0f, number) : number;
}

inline double without_subnormals(double number) { return number; }

// How a type's numbers lie in a register, and what is computed with.
template <class T>
struct Number {
  using Value = T;
  static T get(uint64_t bits) { return bits_as<T>(bits); }
  static uint64_t put(T value) { return bits_as<uint64_t>(value); }
};

struct Predicate;
template <>
struct Number<Predicate> {
  using Value = uint64_t;
  static uint64_t get(uint64_t bits) { return bits != 0; }
  static uint64_t put(uint64_t value) { return value; }
};

struct Bf16;
template <>
struct Number<Bf16> {
  using Value = double;
  static double get(uint64_t bits) { return from_bf16(static_cast<uint16_t>(bits)); }
  static uint64_t put(double value) { return to_bf16(value); }
};

struct F16;
template <>
struct Number<F16> {
  using Value = double;
  static double get(uint64_t bits) { return from_f16(static_cast<uint16_t>(bits)); }
  static uint64_t put(double value) { return to_f16(value); }
};

}  // namespace emulator
