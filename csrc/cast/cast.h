#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nanotron_fast {

// The codes of nanotron_fast/moves/dtypes.py, and behind them those of moves/scales.py: what the
// bytes of a quantised source stand for.
enum class Dtype : int64_t {
  kBFloat16 = 0,
  kFloat16 = 1,
  kFloat32 = 2,
  kFloat64 = 3,
  kE4M3 = 4,
  kE2M1Low = 5,
  kE2M1High = 6
};
constexpr int64_t kNumDtypes = 7;

constexpr bool is_quantised(Dtype dtype) { return dtype > Dtype::kFloat64; }

constexpr int64_t item_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : is_quantised(dtype) ? 1 : 2;
}

// Converts num_elements from source to destination, which do not overlap and need no alignment.
// Rounds to nearest even; infinities stay; NaN stays NaN with the bits that torch gives it.
using CastFunction = void (*)(const std::byte* source, std::byte* destination,
                              int64_t num_elements);

// Writes the values of num_elements bytes of a quantised source that have one scale. The product is
// taken in float32 and rounded once. What E2M1 stands for counts twice: its scales are halved.
using DequantiseFunction = void (*)(const std::byte* codes, std::byte* destination,
                                    int64_t num_elements, float scale);

enum class SimdLevel { kScalar, kAvx2, kAvx512 };

// The levels that this processor can run, weakest first.
std::vector<SimdLevel> supported_simd_levels();
// The strongest of them, or the one that NANOTRON_FAST_SIMD=scalar|avx2|avx512 names.
SimdLevel default_simd_level();
const char* name_of(SimdLevel level);
// Throws std::invalid_argument on an unknown name or one that this processor cannot run.
SimdLevel parse_simd_level(const std::string& name);

// True for every pair among bfloat16, float16 and float32, and for equal dtypes.
bool can_cast(Dtype source, Dtype destination);
// The function for a pair of different dtypes that can_cast accepts.
CastFunction find_cast(Dtype source, Dtype destination, SimdLevel level);

// True for what is quantised, to bfloat16, float16 and float32.
bool can_dequantise(Dtype source, Dtype destination);
// The function for a pair that can_dequantise accepts.
DequantiseFunction find_dequantise(Dtype source, Dtype destination, SimdLevel level);

}  // namespace nanotron_fast
