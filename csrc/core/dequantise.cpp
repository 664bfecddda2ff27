#include "core/dequantise.h"

#include <algorithm>
#include <vector>

namespace nanotron_fast {

void LoadedScales::load(const Scales& scales, const File& file, int64_t first, int64_t last) {
  const ScaleRange range = range_of(scales, first, last);
  scales_ = &scales;
  first_row_ = range.first_row;
  stored_.resize(static_cast<size_t>(range.num_bytes));
  widened_.resize(static_cast<size_t>(range.num_scales));
  file.pread_exact(stored_.data(), range.num_bytes, range.offset_bytes);
  widen_scales(scales, stored_.data(), range.num_scales, widened_.data());
}

void LoadedScales::dequantise(const std::byte* codes, int64_t position, int64_t num_elements,
                              std::byte* destination, int64_t destination_item,
                              DequantiseFunction function) const {
  const Scales& scales = *scales_;
  int64_t column = position % scales.columns;
  while (num_elements > 0) {
    const float* const row =
        widened_.data() + (scales.grid_row(position) - first_row_) * scales.grid_columns;
    const int64_t row_elements = std::min(num_elements, scales.columns - column);
    int64_t block = column / scales.block_columns;
    int64_t left_in_block = scales.block_columns - column % scales.block_columns;
    for (int64_t done = 0; done < row_elements;) {
      const int64_t count = std::min(left_in_block, row_elements - done);
      function(codes, destination, count, row[block++]);
      codes += count;
      destination += count * destination_item;
      done += count;
      left_in_block = scales.block_columns;
    }
    position += row_elements;
    num_elements -= row_elements;
    column = 0;
  }
}

namespace {

// A run becomes values here where they do not lie beside each other in the destination.
constexpr int64_t kTile = 64;

// What lays out values that are there already.
StridedCopy of_values(const std::array<int64_t, 3>& sizes, const std::array<int64_t, 3>& from,
                      const std::array<int64_t, 3>& to, Dtype dtype) {
  return {sizes, from, to, dtype, dtype};
}

}  // namespace

void dequantise_strided(const StridedCopy& copy, const Positions& positions,
                        const LoadedScales& scales, const std::byte* source, std::byte* destination,
                        SimdLevel level) {
  const int64_t item = item_size(copy.destination_dtype);
  const DequantiseFunction function =
      find_dequantise(copy.source_dtype, copy.destination_dtype, level);
  // Along `run` codes lie beside each other; `across` is where the destination runs on, or what is
  // longer, of the two others.
  int run = 0;
  for (int dim = 1; dim < 3; ++dim) {
    const bool runs_on = copy.sizes[dim] > 1 && positions.strides[dim] == 1;
    if (runs_on || (copy.sizes[run] == 1 && copy.sizes[dim] > 1)) run = dim;
  }
  const bool has_runs = positions.strides[run] == 1 || copy.sizes[run] == 1;
  int across = (run + 1) % 3, outer = (run + 2) % 3;
  const auto is_better = [&](int a, int b) {
    if ((copy.sizes[a] == 1) != (copy.sizes[b] == 1)) return copy.sizes[b] == 1;
    return copy.destination_strides[a] < copy.destination_strides[b];
  };
  if (is_better(outer, across)) std::swap(across, outer);
  const bool is_plain = has_runs && (copy.destination_strides[run] == 1 || copy.sizes[run] == 1);

  alignas(64) std::byte tile[kTile * kTile * 4];
  // A single run is taken in long pieces.
  const int64_t tile_rows = copy.sizes[across] == 1 ? kTile * kTile : kTile;
  for (int64_t i = 0; i < copy.sizes[outer]; ++i) {
    const int64_t from_i = i * copy.source_strides[outer];
    const int64_t at_i = positions.first + i * positions.strides[outer];
    std::byte* const to_i = destination + i * copy.destination_strides[outer] * item;
    if (is_plain) {
      for (int64_t j = 0; j < copy.sizes[across]; ++j) {
        scales.dequantise(source + from_i + j * copy.source_strides[across],
                          at_i + j * positions.strides[across], copy.sizes[run],
                          to_i + j * copy.destination_strides[across] * item, item, function);
      }
      continue;
    }
    for (int64_t j = 0; j < copy.sizes[across]; j += kTile) {
      const int64_t columns = std::min(kTile, copy.sizes[across] - j);
      for (int64_t k = 0; k < copy.sizes[run]; k += tile_rows) {
        const int64_t rows = std::min(tile_rows, copy.sizes[run] - k);
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t from =
              from_i + (j + c) * copy.source_strides[across] + k * copy.source_strides[run];
          const int64_t at =
              at_i + (j + c) * positions.strides[across] + k * positions.strides[run];
          std::byte* const values = tile + c * tile_rows * item;
          if (has_runs) {
            scales.dequantise(source + from, at, rows, values, item, function);
            continue;
          }
          for (int64_t r = 0; r < rows; ++r) {
            scales.dequantise(source + from + r * copy.source_strides[run],
                              at + r * positions.strides[run], 1, values + r * item, item,
                              function);
          }
        }
        copy_strided(
            of_values({1, rows, columns}, {1, 1, tile_rows},
                      {1, copy.destination_strides[run], copy.destination_strides[across]},
                      copy.destination_dtype),
            tile,
            to_i +
                (k * copy.destination_strides[run] + j * copy.destination_strides[across]) * item,
            level);
      }
    }
  }
}

}  // namespace nanotron_fast
