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

}  // namespace

const CastTable kAvx512Casts{bfloat16_to_float32, bfloat16_to_float16, float16_to_float32,
                             float16_to_bfloat16, float32_to_bfloat16, float32_to_float16};

}  // namespace nanotron_fast

#endif
