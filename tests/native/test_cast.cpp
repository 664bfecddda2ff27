// Every cast at every SIMD level against the scalar one, and the scalar one against known bits.

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "cast/cast.h"
#include "check.h"

using namespace nanotron_fast;

namespace {

using Bytes = std::vector<std::byte>;

constexpr Dtype kDtypes[] = {Dtype::kBFloat16, Dtype::kFloat16, Dtype::kFloat32};
constexpr auto kGuard = std::byte{0xa5};

template <typename Bits>
Bytes bytes_of(const std::vector<Bits>& patterns) {
  Bytes bytes(patterns.size() * sizeof(Bits));
  std::memcpy(bytes.data(), patterns.data(), bytes.size());
  return bytes;
}

Bytes all_16_bit_patterns() {
  std::vector<uint16_t> patterns(65536);
  for (size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  return bytes_of(patterns);
}

// Every sign and exponent with the mantissas where rounding turns, then random ones.
Bytes spread_of_32_bit_patterns() {
  std::vector<uint32_t> patterns;
  for (uint32_t high = 0; high < 512; ++high) {
    for (const uint32_t unit : {0x1000u, 0x8000u, 0x2000u, 0x10000u, 0x400000u}) {
      for (const uint32_t mantissa : {unit - 1, unit, unit + 1, 3 * unit - 1, 3 * unit}) {
        patterns.push_back(high << 23 | (mantissa & 0x7fffffu));
      }
    }
    for (int bit = 0; bit < 23; ++bit) patterns.push_back(high << 23 | 1u << bit);
    patterns.push_back(high << 23);
    patterns.push_back(high << 23 | 0x7fffffu);
  }
  std::mt19937 random(7);
  for (int i = 0; i < 300000; ++i) patterns.push_back(static_cast<uint32_t>(random()));
  return bytes_of(patterns);
}

// Casts from and to pointers that are `shift` bytes off, and checks that nothing else is written.
Bytes cast(Dtype from, Dtype to, SimdLevel level, const Bytes& source, size_t shift) {
  const size_t num_elements = source.size() / static_cast<size_t>(item_size(from));
  const size_t num_bytes = num_elements * static_cast<size_t>(item_size(to));
  Bytes shifted(shift, kGuard);
  shifted.insert(shifted.end(), source.begin(), source.end());
  Bytes result(shift + num_bytes + 64, kGuard);
  find_cast(from, to, level)(shifted.data() + shift, result.data() + shift,
                             static_cast<int64_t>(num_elements));
  const auto is_guard = [](std::byte byte) { return byte == kGuard; };
  const auto begin = result.begin() + static_cast<std::ptrdiff_t>(shift);
  const auto end = begin + static_cast<std::ptrdiff_t>(num_bytes);
  CHECK(std::all_of(result.begin(), begin, is_guard));
  CHECK(std::all_of(end, result.end(), is_guard));
  return Bytes(begin, end);
}

void check_pair(Dtype from, Dtype to, SimdLevel level, const Bytes& patterns) {
  const Bytes wanted = cast(from, to, SimdLevel::kScalar, patterns, 0);
  for (const size_t shift : {0, 1, 2, 3, 7}) {
    CHECK(cast(from, to, level, patterns, shift) == wanted);
  }
  const auto source_item = static_cast<std::ptrdiff_t>(item_size(from));
  const auto item = static_cast<std::ptrdiff_t>(item_size(to));
  for (std::ptrdiff_t length = 0; length < 70; ++length) {
    const std::ptrdiff_t start = 0x7be0 + length;  // in fp16: the largest numbers, infinity, NaN
    const Bytes part(patterns.begin() + start * source_item,
                     patterns.begin() + (start + length) * source_item);
    const Bytes want(wanted.begin() + start * item, wanted.begin() + (start + length) * item);
    CHECK(cast(from, to, level, part, static_cast<size_t>(length % 5)) == want);
  }
}

void check_all_pairs(SimdLevel level) {
  const Bytes short_patterns = all_16_bit_patterns(), long_patterns = spread_of_32_bit_patterns();
  for (const Dtype from : kDtypes) {
    for (const Dtype to : kDtypes) {
      CHECK(can_cast(from, to));
      if (from == to) continue;
      check_pair(from, to, level, from == Dtype::kFloat32 ? long_patterns : short_patterns);
    }
  }
}

uint32_t cast_one(Dtype from, Dtype to, SimdLevel level, uint32_t bits) {
  uint32_t result = 0;
  find_cast(from, to, level)(reinterpret_cast<const std::byte*>(&bits),
                             reinterpret_cast<std::byte*>(&result), 1);
  return result;
}

void check_known_bits(SimdLevel level) {
  struct Known {
    Dtype from, to;
    uint32_t bits, wanted;
  };
  const auto bf16 = Dtype::kBFloat16, fp16 = Dtype::kFloat16, fp32 = Dtype::kFloat32;
  const Known known[] = {
      {bf16, fp32, 0x3f80, 0x3f800000}, {bf16, fp32, 0x7f81, 0x7f810000},
      {fp16, fp32, 0x0001, 0x33800000}, {fp16, fp32, 0x83ff, 0xb87fc000},
      {fp16, fp32, 0x0400, 0x38800000}, {fp16, fp32, 0x7bff, 0x477fe000},
      {fp16, fp32, 0xfc00, 0xff800000}, {fp16, fp32, 0x7c01, 0x7fc02000},
      {fp16, bf16, 0x7e00, 0x7fc0},     {fp16, bf16, 0xfc01, 0x7fc0},
      {fp32, bf16, 0x3f808000, 0x3f80}, {fp32, bf16, 0x3f818000, 0x3f82},
      {fp32, bf16, 0x7f7fffff, 0x7f80}, {fp32, bf16, 0xff800001, 0xffff},
      {fp32, fp16, 0x477fefff, 0x7bff}, {fp32, fp16, 0x477ff000, 0x7c00},
      {fp32, fp16, 0x33000000, 0x0000}, {fp32, fp16, 0x33000001, 0x0001},
      {fp32, fp16, 0x387fffff, 0x0400}, {fp32, fp16, 0xff800001, 0xfe00},
      {bf16, fp16, 0x4780, 0x7c00},     {bf16, fp16, 0x7f81, 0x7e08},
  };
  for (const Known& one : known) {
    CHECK(cast_one(one.from, one.to, level, one.bits) == one.wanted);
  }
}

// torch.set_flush_denormal(True) must not reach the casts of a conversion.
void check_ignores_flush_to_zero(SimdLevel level) {
#if defined(__SSE__)
  const unsigned int before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);  // results that are denormal become zero, and so do operands
  const uint32_t in_tail = cast_one(Dtype::kFloat16, Dtype::kFloat32, level, 0x0001);
  const Bytes flushed = cast(Dtype::kFloat16, Dtype::kFloat32, level, all_16_bit_patterns(), 0);
  _mm_setcsr(before);
  CHECK(in_tail == 0x33800000);
  CHECK(flushed == cast(Dtype::kFloat16, Dtype::kFloat32, level, all_16_bit_patterns(), 0));
#else
  (void)level;
#endif
}

}  // namespace

int main() {
  for (const SimdLevel level : supported_simd_levels()) {
    CHECK(parse_simd_level(name_of(level)) == level);
    check_known_bits(level);
    check_all_pairs(level);
    check_ignores_flush_to_zero(level);
  }
  CHECK(can_cast(Dtype::kFloat64, Dtype::kFloat64));
  CHECK(!can_cast(Dtype::kFloat64, Dtype::kFloat32));
  CHECK(!can_cast(Dtype::kBFloat16, Dtype::kFloat64));
  const auto unknown = message_of<std::invalid_argument>([] { parse_simd_level("avx1024"); });
  CHECK(contains(unknown, "avx1024") && contains(unknown, "scalar"));
}
