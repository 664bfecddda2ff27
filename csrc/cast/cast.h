#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nanotron_fast {

// The codes of nanotron_fast/moves/dtypes.py.
enum class Dtype : int64_t { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };
constexpr int64_t kNumDtypes = 4;

constexpr int64_t item_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Converts num_elements from source to destination, which do not overlap and need no alignment.
// Rounds to nearest even; infinities stay; NaN stays NaN with the bits that torch gives it.
using CastFunction = void (*)(const std::byte* source, std::byte* destination,
                              int64_t num_elements);

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

}  // namespace nanotron_fast
