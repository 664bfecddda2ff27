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

NANOTRON_FAST_AVX2 void float16_to_bfloat16(const std::byte* source, std::byte* destination,
                                            int64_t num_elements) {
  int64_t i = 0;
  for (; i + kLanes <= num_elements; i += kLanes) {
    const __m256 wide = _mm256_cvtph_ps(load_halves(source + 2 * i));
    const __m256i bits = _mm256_castps_si256(wide);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(wide, wide, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), is_nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
    store_halves(destination + 2 * i, _mm256_castsi256_si128(packed));
  }
  kScalarCasts.float16_to_bfloat16(source + 2 * i, destination + 2 * i, num_elements - i);
}

}  // namespace

const CastTable kAvx2Casts{bfloat16_to_float32, bfloat16_to_float16, float16_to_float32,
                           float16_to_bfloat16, float32_to_bfloat16, float32_to_float16};

}  // namespace nanotron_fast

#endif
