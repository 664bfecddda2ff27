#if defined(__x86_64__)

#include <immintrin.h>

#include "cast/scalar.h"
#include "cast/table.h"

#define NANOTRON_FAST_AVX2 __attribute__((target("avx2,f16c")))

namespace nanotron_fast {

namespace {

constexpr int64_t kLanes = 8;

// Between bfloat16 and float32 the plain loop vectorises by itself.
NANOTRON_FAST_CAST_LOOP(bfloat16_to_float32, uint16_t, uint32_t, NANOTRON_FAST_AVX2)
NANOTRON_FAST_CAST_LOOP(float32_to_bfloat16, uint32_t, uint16_t, NANOTRON_FAST_AVX2)

NANOTRON_FAST_AVX2 inline __m128i load_halves(const std::byte* source) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
}

NANOTRON_FAST_AVX2 inline void store_halves(std::byte* destination, __m128i halves) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(destination), halves);
}

NANOTRON_FAST_AVX2 void float16_to_float32(const std::byte* source, std::byte* destination,
                                           int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    _mm256_storeu_ps(reinterpret_cast<float*>(destination + 4 * i),
                     _mm256_cvtph_ps(load_halves(source + 2 * i)));
  }
  kScalarCasts.float16_to_float32(source + 2 * i, destination + 4 * i, num_elements - i);
}

NANOTRON_FAST_AVX2 void float32_to_float16(const std::byte* source, std::byte* destination,
                                           int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m256 wide = _mm256_loadu_ps(reinterpret_cast<const float*>(source + 4 * i));
    store_halves(destination + 2 * i, _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
  kScalarCasts.float32_to_float16(source + 4 * i, destination + 2 * i, num_elements - i);
}

NANOTRON_FAST_AVX2 void bfloat16_to_float16(const std::byte* source, std::byte* destination,
                                            int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(source + 2 * i)), 16);
    store_halves(destination + 2 * i,
                 _mm256_cvtps_ph(_mm256_castsi256_ps(wide), _MM_FROUND_TO_NEAREST_INT));
  }
  kScalarCasts.bfloat16_to_float16(source + 2 * i, destination + 2 * i, num_elements - i);
}

// Rounds to bfloat16; lanes that are NaN get nan_bits.
NANOTRON_FAST_AVX2 inline __m128i narrow_bfloat16(__m256 wide, int nan_bits) {
  const __m256i bits = _mm256_castps_si256(wide);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(wide, wide, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(nan_bits), is_nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  return _mm256_castsi256_si128(packed);
}

NANOTRON_FAST_AVX2 void float16_to_bfloat16(const std::byte* source, std::byte* destination,
                                            int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m256 wide = _mm256_cvtph_ps(load_halves(source + 2 * i));
    store_halves(destination + 2 * i, narrow_bfloat16(wide, 0x7fc0));
  }
  kScalarCasts.float16_to_bfloat16(source + 2 * i, destination + 2 * i, num_elements - i);
}

// 8 codes as float32. The bits of either type are those of a float16 that is smaller by a power of
// two, which is exact to multiply by.
template <Dtype kCode>
NANOTRON_FAST_AVX2 inline __m256 values_of(const std::byte* codes) {
  const __m128i bytes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  if constexpr (kCode == Dtype::kE4M3) {
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi16(0x80)), 8);
    const __m128i size = _mm_and_si128(bytes, _mm_set1_epi16(0x7f));
    const __m256 wide = _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, _mm_slli_epi16(size, 7))),
                                      _mm256_set1_ps(0x1.0p8f));
    const __m256i is_nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(size, _mm_set1_epi16(0x7f)));
    const __m256i nan = _mm256_or_si256(_mm256_slli_epi32(_mm256_cvtepu16_epi32(sign), 16),
                                        _mm256_set1_epi32(0x7ff00000));
    return _mm256_blendv_ps(wide, _mm256_castsi256_ps(nan), _mm256_castsi256_ps(is_nan));
  } else {
    const __m128i nibbles = kCode == Dtype::kE2M1High ? _mm_srli_epi16(bytes, 4)
                                                      : _mm_and_si128(bytes, _mm_set1_epi16(15));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(nibbles, _mm_set1_epi16(8)), 12);
    const __m128i size = _mm_slli_epi16(_mm_and_si128(nibbles, _mm_set1_epi16(7)), 9);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, size)), _mm256_set1_ps(0x1.0p15f));
  }
}

template <Dtype kCode, Dtype kDestination>
NANOTRON_FAST_AVX2 void dequantise(const std::byte* codes, std::byte* destination,
                                   int64_t num_elements, float scale) {
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m256 product = _mm256_mul_ps(values_of<kCode>(codes + i), factor);
    if constexpr (kDestination == Dtype::kBFloat16) {
      store_halves(destination + 2 * i, narrow_bfloat16(product, 0xffff));
    } else if constexpr (kDestination == Dtype::kFloat16) {
      store_halves(destination + 2 * i, _mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
    } else {
      _mm256_storeu_ps(reinterpret_cast<float*>(destination + 4 * i), product);
    }
  }
  kScalarCasts.dequantise[static_cast<int>(kCode) -
                          static_cast<int>(Dtype::kE4M3)][static_cast<int>(kDestination)](
      codes + i, destination + i * item_size(kDestination), num_elements - i, scale);
}

}  // namespace

const CastTable kAvx2Casts{bfloat16_to_float32,           bfloat16_to_float16, float16_to_float32,
                           float16_to_bfloat16,           float32_to_bfloat16, float32_to_float16,
                           NANOTRON_FAST_DEQUANTISE_TABLE};

}  // namespace nanotron_fast

#endif
