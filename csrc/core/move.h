#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cast/cast.h"
#include "core/scales.h"

namespace nanotron_fast {

// What stands in which column of a table's row. nanotron_fast/moves/row.py names the same columns,
// and a test holds the two to each other.
struct Column {
  static constexpr int kSource = 0;
  static constexpr int kSourceOffset = 1;
  static constexpr int kDestination = 2;
  static constexpr int kDestinationOffset = 3;
  // The first of three, one for each dimension.
  static constexpr int kSizes = 4;
  static constexpr int kSourceStrides = 7;
  static constexpr int kDestinationStrides = 10;
  static constexpr int kSourceDtype = 13;
  static constexpr int kDestinationDtype = 14;
  // The row of the source's scales in their own table, or Move::kUnscaled.
  static constexpr int kScales = 15;
};

// One 3-D strided copy between two files, or a fill with zero bytes where source_file is kFill.
// Offsets are absolute and in bytes; sizes and strides are in elements. Both sides may be cast. A
// source may be quantised: then each element is the value of its code times the scale of its block.
struct Move {
  static constexpr int64_t kFill = -1;
  static constexpr int kUnscaled = -1;
  static constexpr int kNumColumns = 16;

  int64_t source_file;
  int64_t source_offset_bytes;
  int64_t destination_file;
  int64_t destination_offset_bytes;
  std::array<int64_t, 3> sizes;
  std::array<int64_t, 3> source_strides;
  std::array<int64_t, 3> destination_strides;
  Dtype source_dtype;
  Dtype destination_dtype;
  int64_t scales = kUnscaled;

  bool is_fill() const { return source_file == kFill; }
  bool is_scaled() const { return scales != kUnscaled; }
  int64_t num_elements() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// What is to be done, as the caller gives it: a row-major (num_moves, Move::kNumColumns) table, and
// one of (num_scales, Scales::kNumColumns) for the sources that are quantised.
struct MoveTable {
  const int64_t* moves;
  int64_t num_moves;
  const int64_t* scales = nullptr;
  int64_t num_scales = 0;
};

// Throws PlanError on an unknown file, dtype, a negative number, or a move that leaves its file or
// whose scales leave theirs. `scales` are those of the table; without them no source is quantised.
std::vector<Move> parse_moves(const int64_t* table, int64_t num_moves,
                              const std::vector<int64_t>& source_sizes_bytes,
                              const std::vector<int64_t>& destination_sizes_bytes,
                              const std::vector<Scales>& scales = {});

// The same move with its dimensions in order of falling destination stride, neighbours merged
// where both sides allow, and unit dimensions last. Afterwards sizes[0] counts its "rows".
Move normalize(Move move);

// The place in its tensor of the first code that a move with scales reads.
inline int64_t first_position(const Move& move, const Scales& scales) {
  return move.source_offset_bytes - scales.codes_offset_bytes;
}

// Elements from the first to the last that the dimensions from first_dim on touch, ends included.
int64_t span_elements(const Move& move, const std::array<int64_t, 3>& strides, int first_dim);

}  // namespace nanotron_fast
