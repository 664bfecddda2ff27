#include "core/scales.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cast/cast.h"
#include "core/error.h"

namespace nanotron_fast {

std::vector<Scales> parse_scales(const int64_t* table, int64_t num_scales,
                                 const std::vector<int64_t>& source_sizes_bytes) {
  std::vector<Scales> result;
  for (int64_t index = 0; index < num_scales; ++index) {
    const int64_t* row = table + index * Scales::kNumColumns;
    const std::string name = "scales " + std::to_string(index) + ": ";
    Scales scales{row[0], row[1], ScaleDtype{}, row[3], row[4], row[5], row[6], row[7], 0, 0};
    if (scales.source_file < 0 ||
        scales.source_file >= static_cast<int64_t>(source_sizes_bytes.size())) {
      throw PlanError(name + "source file " + std::to_string(scales.source_file) +
                      " is not one of " + std::to_string(source_sizes_bytes.size()));
    }
    if (row[2] < 0 || row[2] >= kNumScaleDtypes) {
      throw PlanError(name + "unknown dtype code " + std::to_string(row[2]));
    }
    scales.dtype = static_cast<ScaleDtype>(row[2]);
    if (scales.offset_bytes < 0 || scales.codes_offset_bytes < 0) {
      throw PlanError(name + "offset is negative");
    }
    int64_t codes;
    if (scales.rows < 1 || scales.columns < 1 || scales.block_rows < 1 ||
        scales.block_columns < 1 || __builtin_mul_overflow(scales.rows, scales.columns, &codes)) {
      throw PlanError(name + "blocks of " + std::to_string(scales.block_rows) + " x " +
                      std::to_string(scales.block_columns) + " codes in matrices of " +
                      std::to_string(scales.rows) + " x " + std::to_string(scales.columns));
    }
    scales.grid_rows = (scales.rows - 1) / scales.block_rows + 1;
    scales.grid_columns = (scales.columns - 1) / scales.block_columns + 1;
    result.push_back(scales);
  }
  return result;
}

void check_positions(const Scales& scales, int64_t first, int64_t last, int64_t scale_file_bytes,
                     const std::string& name) {
  if (first < 0) throw PlanError(name + ": it begins before the tensor of its scales");
  // There are no more scales than codes up to the end of the last one's row of blocks.
  int64_t scales_end, end;
  if (__builtin_mul_overflow(scales.grid_row(last) + 1, scales.grid_columns, &scales_end) ||
      __builtin_mul_overflow(scales_end, scales.item(), &end) ||
      __builtin_add_overflow(end, scales.offset_bytes, &end)) {
    throw PlanError(name + ": the extent of its scales overflows");
  }
  if (end > scale_file_bytes) {
    throw PlanError(name + ": its scales end at byte " + std::to_string(end) + " of a file of " +
                    std::to_string(scale_file_bytes));
  }
}

ScaleRange range_of(const Scales& scales, int64_t first, int64_t last) {
  const int64_t first_row = scales.grid_row(first);
  const int64_t num_scales = (scales.grid_row(last) + 1 - first_row) * scales.grid_columns;
  return {first_row, num_scales,
          scales.offset_bytes + first_row * scales.grid_columns * scales.item(),
          num_scales * scales.item()};
}

namespace {

// 2^(byte - bias), whatever torch has told the processor to do with what is subnormal.
float power_of_two(uint8_t byte, int bias) {
  const int exponent = static_cast<int>(byte) - bias;
  const uint32_t bits = exponent > -127 ? static_cast<uint32_t>(exponent + 127) << 23
                                        : uint32_t{1} << (exponent + 149);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void widen_scales(const Scales& scales, const std::byte* stored, int64_t num_scales,
                  float* widened) {
  auto* const out = reinterpret_cast<std::byte*>(widened);
  switch (scales.dtype) {
    case ScaleDtype::kFloat32:
      std::memcpy(out, stored, static_cast<size_t>(num_scales) * sizeof(float));
      return;
    case ScaleDtype::kBFloat16:
      find_cast(Dtype::kBFloat16, Dtype::kFloat32, SimdLevel::kScalar)(stored, out, num_scales);
      return;
    case ScaleDtype::kFloat16:
      find_cast(Dtype::kFloat16, Dtype::kFloat32, SimdLevel::kScalar)(stored, out, num_scales);
      return;
    default:
      break;
  }
  const int bias = scales.dtype == ScaleDtype::kMicro ? 128 : 127;
  for (int64_t i = 0; i < num_scales; ++i) {
    const auto byte = static_cast<uint8_t>(stored[i]);
    widened[i] = byte == 255 && scales.dtype == ScaleDtype::kE8M0
                     ? std::numeric_limits<float>::quiet_NaN()
                     : power_of_two(byte, bias);
  }
}

}  // namespace nanotron_fast
