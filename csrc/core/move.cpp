#include "core/move.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace nanotron_fast {

namespace {

// The byte just behind the last one that a side of the move touches; throws on overflow.
int64_t end_bytes(const Move& move, int64_t offset_bytes, const std::array<int64_t, 3>& strides,
                  Dtype dtype, int64_t index) {
  int64_t last = 0;
  for (int dim = 0; dim < 3; ++dim) {
    int64_t reach;
    if (__builtin_mul_overflow(move.sizes[dim] - 1, strides[dim], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      throw PlanError("move " + std::to_string(index) + ": its extent overflows");
    }
  }
  int64_t end;
  if (__builtin_add_overflow(last, int64_t{1}, &end) ||
      __builtin_mul_overflow(end, item_size(dtype), &end) ||
      __builtin_add_overflow(end, offset_bytes, &end)) {
    throw PlanError("move " + std::to_string(index) + ": its extent overflows");
  }
  return end;
}

void check_side(const Move& move, int64_t file, int64_t offset_bytes,
                const std::array<int64_t, 3>& strides, Dtype dtype,
                const std::vector<int64_t>& file_sizes_bytes, const char* side, int64_t index) {
  const std::string name = "move " + std::to_string(index) + ": " + side;
  if (file < 0 || file >= static_cast<int64_t>(file_sizes_bytes.size())) {
    throw PlanError(name + " file " + std::to_string(file) + " is not one of " +
                    std::to_string(file_sizes_bytes.size()));
  }
  if (offset_bytes < 0) throw PlanError(name + " offset is negative");
  for (int dim = 0; dim < 3; ++dim) {
    if (strides[dim] < 0 || (strides[dim] == 0 && move.sizes[dim] > 1)) {
      throw PlanError(name + " stride " + std::to_string(strides[dim]) + " is not positive");
    }
  }
  const int64_t end = end_bytes(move, offset_bytes, strides, dtype, index);
  if (end > file_sizes_bytes[file]) {
    throw PlanError(name + " ends at byte " + std::to_string(end) + " of a file of " +
                    std::to_string(file_sizes_bytes[file]));
  }
}

Dtype parse_dtype(int64_t code, int64_t index) {
  if (code < 0 || code >= kNumDtypes) {
    throw PlanError("move " + std::to_string(index) + ": unknown dtype code " +
                    std::to_string(code));
  }
  return static_cast<Dtype>(code);
}

// Holds the dtypes of a move to each other, and a quantised source to its scales.
void check_dtypes(const Move& move, const std::vector<Scales>& scales,
                  const std::vector<int64_t>& source_sizes_bytes, int64_t index) {
  const std::string name = "move " + std::to_string(index);
  const bool is_code = is_quantised(move.source_dtype);
  if (is_quantised(move.destination_dtype) || (is_code && move.is_fill())) {
    throw PlanError(name + ": what is quantised is a source alone");
  }
  if (is_code != move.is_scaled()) {
    throw PlanError(name + (is_code ? ": its source is quantised and has no scales"
                                    : ": its source has scales and is not quantised"));
  }
  if (move.is_fill()) return;
  if (is_code ? !can_dequantise(move.source_dtype, move.destination_dtype)
              : !can_cast(move.source_dtype, move.destination_dtype)) {
    throw PlanError(name + ": no cast between its dtypes");
  }
  if (!is_code) return;
  if (move.scales < 0 || move.scales >= static_cast<int64_t>(scales.size())) {
    throw PlanError(name + ": scales " + std::to_string(move.scales) + " are not among " +
                    std::to_string(scales.size()));
  }
  const Scales& mine = scales[static_cast<size_t>(move.scales)];
  const int64_t first = first_position(move, mine);
  check_positions(mine, first, first + span_elements(move, move.source_strides, 0) - 1,
                  source_sizes_bytes[static_cast<size_t>(mine.source_file)], name);
}

}  // namespace

std::vector<Move> parse_moves(const int64_t* table, int64_t num_moves,
                              const std::vector<int64_t>& source_sizes_bytes,
                              const std::vector<int64_t>& destination_sizes_bytes,
                              const std::vector<Scales>& scales) {
  std::vector<Move> moves;
  moves.reserve(num_moves);
  for (int64_t index = 0; index < num_moves; ++index) {
    const int64_t* row = table + index * Move::kNumColumns;
    const auto three_from = [row](int column) {
      return std::array<int64_t, 3>{row[column], row[column + 1], row[column + 2]};
    };
    Move move{};
    move.source_file = row[Column::kSource];
    move.source_offset_bytes = row[Column::kSourceOffset];
    move.destination_file = row[Column::kDestination];
    move.destination_offset_bytes = row[Column::kDestinationOffset];
    move.sizes = three_from(Column::kSizes);
    move.source_strides = three_from(Column::kSourceStrides);
    move.destination_strides = three_from(Column::kDestinationStrides);
    move.source_dtype = parse_dtype(row[Column::kSourceDtype], index);
    move.destination_dtype = parse_dtype(row[Column::kDestinationDtype], index);
    move.scales = row[Column::kScales];
    int64_t elements = 1;
    for (const int64_t size : move.sizes) {
      if (size < 1 || __builtin_mul_overflow(elements, size, &elements)) {
        throw PlanError("move " + std::to_string(index) + ": size " + std::to_string(size));
      }
    }
    if (move.is_fill()) {
      // Whatever the table has there is of no source, and is not calculated with.
      move.source_offset_bytes = 0;
      move.source_strides = {};
    } else {
      check_side(move, move.source_file, move.source_offset_bytes, move.source_strides,
                 move.source_dtype, source_sizes_bytes, "source", index);
    }
    check_side(move, move.destination_file, move.destination_offset_bytes, move.destination_strides,
               move.destination_dtype, destination_sizes_bytes, "destination", index);
    check_dtypes(move, scales, source_sizes_bytes, index);
    moves.push_back(move);
  }
  return moves;
}

Move normalize(Move move) {
  struct Dimension {
    int64_t size, source, destination;
  };
  std::vector<Dimension> dimensions;
  for (int dim = 0; dim < 3; ++dim) {
    if (move.sizes[dim] > 1) {
      dimensions.push_back({move.sizes[dim], move.is_fill() ? 0 : move.source_strides[dim],
                            move.destination_strides[dim]});
    }
  }
  std::stable_sort(
      dimensions.begin(), dimensions.end(),
      [](const Dimension& a, const Dimension& b) { return a.destination > b.destination; });
  for (size_t i = dimensions.size(); i-- > 1;) {
    Dimension& outer = dimensions[i - 1];
    const Dimension& inner = dimensions[i];
    const bool source_fits = move.is_fill() || outer.source == inner.source * inner.size;
    if (source_fits && outer.destination == inner.destination * inner.size) {
      outer = {outer.size * inner.size, inner.source, inner.destination};
      dimensions.erase(dimensions.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }
  dimensions.resize(3, {1, 1, 1});
  for (int dim = 0; dim < 3; ++dim) {
    move.sizes[dim] = dimensions[dim].size;
    move.source_strides[dim] = dimensions[dim].source;
    move.destination_strides[dim] = dimensions[dim].destination;
  }
  return move;
}

int64_t span_elements(const Move& move, const std::array<int64_t, 3>& strides, int first_dim) {
  int64_t span = 1;
  for (int dim = first_dim; dim < 3; ++dim) span += (move.sizes[dim] - 1) * strides[dim];
  return span;
}

}  // namespace nanotron_fast
