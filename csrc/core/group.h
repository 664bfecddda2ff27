#pragma once

#include <cstdint>
#include <vector>

#include "core/move.h"

namespace nanotron_fast {

// A move on its way into a job, and the quantities that grouping asks for again and again.
struct Candidate {
  Move move;
  int64_t index;

  int64_t source_item() const { return item_size(move.source_dtype); }
  int64_t destination_item() const { return item_size(move.destination_dtype); }
  int64_t source_row_stride() const { return move.source_strides[0] * source_item(); }
  int64_t destination_row_stride() const {
    return move.destination_strides[0] * destination_item();
  }
  int64_t source_row_span() const {
    return span_elements(move, move.source_strides, 1) * source_item();
  }
  int64_t destination_row_span() const {
    return span_elements(move, move.destination_strides, 1) * destination_item();
  }
  int64_t row_elements() const { return move.sizes[1] * move.sizes[2]; }
  int64_t source_end() const {
    return move.source_offset_bytes + span_elements(move, move.source_strides, 0) * source_item();
  }
  bool has_dense_destination() const {
    return span_elements(move, move.destination_strides, 0) == move.num_elements();
  }
};

// Moves with the same number of rows that one job executes together.
using MoveGroup = std::vector<Candidate>;

// A transposed matrix is taken whole up to this size, and in strips beyond.
constexpr int64_t kMaxTransposeBytes = int64_t{24} << 20;

// Groups moves: the columns of one source matrix that go to many files, or those of many files that
// make up one destination matrix. What a group writes has no gaps. Moves are cut where their rows
// are too large to hold.
std::vector<MoveGroup> group_moves(const std::vector<Move>& moves);

}  // namespace nanotron_fast
