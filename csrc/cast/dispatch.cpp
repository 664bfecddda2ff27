#include <cstdlib>
#include <stdexcept>

#include "cast/table.h"

namespace nanotron_fast {

namespace {

const CastTable& casts_of([[maybe_unused]] SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return kAvx512Casts;
  if (level == SimdLevel::kAvx2) return kAvx2Casts;
#endif
  return kScalarCasts;
}

}  // namespace

std::vector<SimdLevel> supported_simd_levels() {
  std::vector<SimdLevel> levels{SimdLevel::kScalar};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    levels.push_back(SimdLevel::kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      levels.push_back(SimdLevel::kAvx512);
    }
  }
#endif
  return levels;
}

const char* name_of(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

SimdLevel parse_simd_level(const std::string& name) {
  std::string supported;
  for (const SimdLevel level : supported_simd_levels()) {
    if (name == name_of(level)) return level;
    supported += std::string(supported.empty() ? "" : ", ") + name_of(level);
  }
  throw std::invalid_argument("SIMD level '" + name + "': this processor has " + supported);
}

SimdLevel default_simd_level() {
  const char* forced = std::getenv("NANOTRON_FAST_SIMD");
  if (forced != nullptr && *forced != '\0') return parse_simd_level(forced);
  return supported_simd_levels().back();
}

bool can_cast(Dtype source, Dtype destination) {
  return source == destination || (source < Dtype::kFloat64 && destination < Dtype::kFloat64);
}

bool can_dequantise(Dtype source, Dtype destination) {
  return is_quantised(source) && destination < Dtype::kFloat64;
}

DequantiseFunction find_dequantise(Dtype source, Dtype destination, SimdLevel level) {
  const auto code = static_cast<size_t>(source) - static_cast<size_t>(Dtype::kE4M3);
  return casts_of(level).dequantise[code][static_cast<size_t>(destination)];
}

CastFunction find_cast(Dtype source, Dtype destination, SimdLevel level) {
  const CastTable& table = casts_of(level);
  switch (source) {
    case Dtype::kBFloat16:
      return destination == Dtype::kFloat16 ? table.bfloat16_to_float16 : table.bfloat16_to_float32;
    case Dtype::kFloat16:
      return destination == Dtype::kBFloat16 ? table.float16_to_bfloat16 : table.float16_to_float32;
    default:
      return destination == Dtype::kBFloat16 ? table.float32_to_bfloat16 : table.float32_to_float16;
  }
}

}  // namespace nanotron_fast
