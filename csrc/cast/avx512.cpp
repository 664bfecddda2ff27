#if defined(__x86_64__)

// GCC 12 warns about the deliberately undefined operands inside its own intrinsics.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>

#include "cast/scalar.h"
#include "cast/table.h"

#define NANOTRON_FAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,f16c")))

namespace nanotron_fast {

namespace {

constexpr int64_t kLanes = 16;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

NANOTRON_FAST_AVX512 inline __m256i load_halves(const std::byte* source) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
}

NANOTRON_FAST_AVX512 inline void store_halves(std::byte* destination, __m256i halves) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(destination), halves);
}

NANOTRON_FAST_AVX512 inline __m512i widen_bfloat16(const std::byte* source) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(source)), 16);
}

// Rounds to bfloat16; lanes that are NaN get nan_bits.
NANOTRON_FAST_AVX512 inline __m256i narrow_bfloat16(__m512 wide, int nan_bits) {
  const __m512i bits = _mm512_castps_si512(wide);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(wide, wide, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(nan_bits)));
}

NANOTRON_FAST_AVX512 void bfloat16_to_float32(const std::byte* source, std::byte* destination,
                                              int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    _mm512_storeu_si512(destination + 4 * i, widen_bfloat16(source + 2 * i));
  }
  kScalarCasts.bfloat16_to_float32(source + 2 * i, destination + 4 * i, num_elements - i);
}

NANOTRON_FAST_AVX512 void bfloat16_to_float16(const std::byte* source, std::byte* destination,
                                              int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m512 wide = _mm512_castsi512_ps(widen_bfloat16(source + 2 * i));
    store_halves(destination + 2 * i, _mm512_cvtps_ph(wide, kNearest));
  }
  kScalarCasts.bfloat16_to_float16(source + 2 * i, destination + 2 * i, num_elements - i);
}

NANOTRON_FAST_AVX512 void float16_to_float32(const std::byte* source, std::byte* destination,
                                             int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    _mm512_storeu_ps(destination + 4 * i, _mm512_cvtph_ps(load_halves(source + 2 * i)));
  }
  kScalarCasts.float16_to_float32(source + 2 * i, destination + 4 * i, num_elements - i);
}

NANOTRON_FAST_AVX512 void float16_to_bfloat16(const std::byte* source, std::byte* destination,
                                              int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m512 wide = _mm512_cvtph_ps(load_halves(source + 2 * i));
    store_halves(destination + 2 * i, narrow_bfloat16(wide, 0x7fc0));
  }
  kScalarCasts.float16_to_bfloat16(source + 2 * i, destination + 2 * i, num_elements - i);
}

NANOTRON_FAST_AVX512 void float32_to_bfloat16(const std::byte* source, std::byte* destination,
                                              int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    store_halves(destination + 2 * i, narrow_bfloat16(_mm512_loadu_ps(source + 4 * i), 0xffff));
  }
  kScalarCasts.float32_to_bfloat16(source + 4 * i, destination + 2 * i, num_elements - i);
}

NANOTRON_FAST_AVX512 void float32_to_float16(const std::byte* source, std::byte* destination,
                                             int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    store_halves(destination + 2 * i, _mm512_cvtps_ph(_mm512_loadu_ps(source + 4 * i), kNearest));
  }
  kScalarCasts.float32_to_float16(source + 4 * i, destination + 2 * i, num_elements - i);
}

// 16 codes as float32. The bits of either type are those of a float16 that is smaller by a power of
// two, which is exact to multiply by.
template <Dtype kCode>
NANOTRON_FAST_AVX512 inline __m512 values_of(const std::byte* codes) {
  const __m256i bytes =
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  if constexpr (kCode == Dtype::kE4M3) {
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
    const __m256i size = _mm256_and_si256(bytes, _mm256_set1_epi16(0x7f));
    const __m256i half = _mm256_or_si256(sign, _mm256_slli_epi16(size, 7));
    const __m512 wide = _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(0x1.0p8f));
    const __mmask16 is_nan = _mm256_cmpeq_epi16_mask(size, _mm256_set1_epi16(0x7f));
    const __m512i nan = _mm512_or_si512(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sign), 16),
                                        _mm512_set1_epi32(0x7ff00000));
    return _mm512_mask_blend_ps(is_nan, wide, _mm512_castsi512_ps(nan));
  } else {
    const __m256i nibbles = kCode == Dtype::kE2M1High
                                ? _mm256_srli_epi16(bytes, 4)
                                : _mm256_and_si256(bytes, _mm256_set1_epi16(15));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(nibbles, _mm256_set1_epi16(8)), 12);
    const __m256i size = _mm256_slli_epi16(_mm256_and_si256(nibbles, _mm256_set1_epi16(7)), 9);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, size)), _mm512_set1_ps(0x1.0p15f));
  }
}

template <Dtype kCode, Dtype kDestination>
NANOTRON_FAST_AVX512 void dequantise(const std::byte* codes, std::byte* destination,
                                     int64_t num_elements, float scale) {
  const __m512 factor = _mm512_set1_ps(scale);
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m512 product = _mm512_mul_ps(values_of<kCode>(codes + i), factor);
    if constexpr (kDestination == Dtype::kBFloat16) {
      store_halves(destination + 2 * i, narrow_bfloat16(product, 0xffff));
    } else if constexpr (kDestination == Dtype::kFloat16) {
      store_halves(destination + 2 * i, _mm512_cvtps_ph(product, kNearest));
    } else {
      _mm512_storeu_ps(destination + 4 * i, product);
    }
  }
  kScalarCasts.dequantise[static_cast<int>(kCode) -
                          static_cast<int>(Dtype::kE4M3)][static_cast<int>(kDestination)](
      codes + i, destination + i * item_size(kDestination), num_elements - i, scale);
}

}  // namespace

const CastTable kAvx512Casts{bfloat16_to_float32,           bfloat16_to_float16, float16_to_float32,
                             float16_to_bfloat16,           float32_to_bfloat16, float32_to_float16,
                             NANOTRON_FAST_DEQUANTISE_TABLE};

}  // namespace nanotron_fast

#endif
