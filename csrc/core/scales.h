#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nanotron_fast {

// The codes of nanotron_fast/moves/scales.py.
enum class ScaleDtype : int64_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kE8M0 = 3,      // 2^(byte - 127), and NaN for 255
  kExponent = 4,  // the same, but infinite for 255
  kMicro = 5      // of E2M1, whose values count twice: 2^(byte - 128)
};
constexpr int64_t kNumScaleDtypes = 6;

// Where the scales of one quantised tensor lie: one for each block of a matrix, row by row. Blocks
// at the right and the lower edge may be cut short, and none reaches into the next matrix of a
// stack. nanotron_fast/moves/scales.py says the same; a row of its table has the fields up to
// block_columns, in this order.
struct Scales {
  static constexpr int kNumColumns = 8;

  int64_t source_file;
  int64_t offset_bytes;
  ScaleDtype dtype;
  int64_t codes_offset_bytes;  // of the tensor's first code, in the file of the codes
  int64_t rows, columns;       // of each matrix, in codes
  int64_t block_rows, block_columns;
  int64_t grid_rows, grid_columns;  // of the scales of each matrix

  int64_t item() const {
    return dtype == ScaleDtype::kFloat32 ? 4 : dtype <= ScaleDtype::kFloat16 ? 2 : 1;
  }
  // The row of scales that a code has its own in, by the code's place in the tensor.
  int64_t grid_row(int64_t position) const {
    const int64_t row = position / columns;
    return row / rows * grid_rows + row % rows / block_rows;
  }
};

// Reads a row-major (num_scales, Scales::kNumColumns) table. Throws PlanError on a number that is
// out of its range, or an unknown file.
std::vector<Scales> parse_scales(const int64_t* table, int64_t num_scales,
                                 const std::vector<int64_t>& source_sizes_bytes);

// Throws PlanError where the codes from position first to last, or their scales, are not in the
// tensor. `name` is that of the move.
void check_positions(const Scales& scales, int64_t first, int64_t last, int64_t scale_file_bytes,
                     const std::string& name);

// The rows of scales of the codes from position first to last, as they lie in their file.
struct ScaleRange {
  int64_t first_row;
  int64_t num_scales;
  int64_t offset_bytes;
  int64_t num_bytes;
};
ScaleRange range_of(const Scales& scales, int64_t first, int64_t last);

// Widens num_scales stored scales. `stored` needs no alignment.
void widen_scales(const Scales& scales, const std::byte* stored, int64_t num_scales,
                  float* widened);

}  // namespace nanotron_fast
