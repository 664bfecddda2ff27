#include "core/group.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace nanotron_fast {

namespace {

// Cuts a move along its outermost dimension into one move a row.
void split_rows(const Candidate& candidate, std::vector<Candidate>& out) {
  for (int64_t row = 0; row < candidate.move.sizes[0]; ++row) {
    Candidate piece = candidate;
    piece.move.sizes[0] = 1;
    piece.move.source_offset_bytes += row * candidate.source_row_stride();
    piece.move.destination_offset_bytes += row * candidate.destination_row_stride();
    piece.move = normalize(piece.move);
    out.push_back(piece);
  }
}

// Rows too large to hold become moves of their own: blocks are made of whole rows.
std::vector<Candidate> make_candidates(const std::vector<Move>& moves) {
  std::vector<Candidate> pending, done;
  for (size_t i = 0; i < moves.size(); ++i) {
    pending.push_back({normalize(moves[i]), static_cast<int64_t>(i)});
  }
  while (!pending.empty()) {
    const Candidate candidate = pending.back();
    pending.pop_back();
    const int64_t item = std::max(candidate.source_item(), candidate.destination_item());
    if (candidate.row_elements() * item > kMaxTransposeBytes) {
      split_rows(candidate, pending);
    } else {
      done.push_back(candidate);
    }
  }
  return done;
}

// Candidates of one destination file whose rows interleave, in order of offset, are a group when
// together they leave no gap. Rows too large to hold are cut first. Candidates that are in no group
// come back in `rest`.
std::vector<MoveGroup> gather_groups(std::vector<Candidate> candidates,
                                     std::vector<Candidate>& rest) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.move.destination_file, a.move.destination_offset_bytes) <
           std::tie(b.move.destination_file, b.move.destination_offset_bytes);
  });
  std::vector<MoveGroup> groups;
  std::vector<Candidate> rows_of_large;
  for (size_t i = 0; i < candidates.size();) {
    const Candidate& first = candidates[i];
    if (first.has_dense_destination()) {
      rest.push_back(candidates[i++]);
      continue;
    }
    const int64_t stride = first.destination_row_stride();
    const int64_t window_end = first.move.destination_offset_bytes + stride;
    int64_t row_bytes = 0;
    size_t j = i;
    for (; j < candidates.size(); ++j) {
      const Candidate& other = candidates[j];
      if (other.move.destination_file != first.move.destination_file ||
          other.move.sizes[0] != first.move.sizes[0] || other.destination_row_stride() != stride ||
          other.move.destination_offset_bytes + other.destination_row_span() > window_end) {
        break;
      }
      row_bytes += other.row_elements() * other.destination_item();
    }
    if (row_bytes == stride && stride > kMaxTransposeBytes) {
      for (; i < j; ++i) split_rows(candidates[i], rows_of_large);
    } else if (row_bytes == stride) {
      groups.emplace_back(candidates.begin() + static_cast<std::ptrdiff_t>(i),
                          candidates.begin() + static_cast<std::ptrdiff_t>(j));
      i = j;
    } else {
      rest.push_back(candidates[i++]);
    }
  }
  if (!rows_of_large.empty()) {
    for (MoveGroup& group : gather_groups(std::move(rows_of_large), rest)) {
      groups.push_back(std::move(group));
    }
  }
  return groups;
}

// The bytes that a block should hold of a candidate to read well: one row; but all of a transposed
// matrix, because the runs in the source are the shorter, the fewer rows a block holds.
int64_t held_bytes(const Candidate& candidate) {
  const bool is_transposed = candidate.source_row_stride() < candidate.source_row_span();
  const int64_t item = std::max(candidate.source_item(), candidate.destination_item());
  return item * (is_transposed ? candidate.move.num_elements() : candidate.row_elements());
}

// Candidates with dense destinations that read interleaved rows of one source region.
std::vector<MoveGroup> scatter_groups(std::vector<Candidate> candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.move.source_file, a.move.source_offset_bytes, a.index) <
           std::tie(b.move.source_file, b.move.source_offset_bytes, b.index);
  });
  std::vector<MoveGroup> groups;
  int64_t region_end = 0, group_bytes = 0;
  for (const Candidate& candidate : candidates) {
    const Move& move = candidate.move;
    bool joins = !groups.empty() && !move.is_fill();
    if (joins) {
      const Candidate& first = groups.back().front();
      joins = first.move.source_file == move.source_file && move.sizes[0] > 1 &&
              first.move.sizes[0] == move.sizes[0] &&
              first.source_row_stride() == candidate.source_row_stride() &&
              move.source_offset_bytes < region_end &&
              group_bytes + held_bytes(candidate) <= kMaxTransposeBytes;
    }
    if (!joins) {
      groups.emplace_back();
      group_bytes = 0;
      region_end = candidate.source_end();
    }
    group_bytes += held_bytes(candidate);
    groups.back().push_back(candidate);
  }
  return groups;
}

}  // namespace

std::vector<MoveGroup> group_moves(const std::vector<Move>& moves) {
  std::vector<Candidate> dense;
  std::vector<MoveGroup> groups = gather_groups(make_candidates(moves), dense);
  // What is neither dense nor part of a group is cut until every piece is dense.
  for (size_t i = 0; i < dense.size();) {
    if (dense[i].has_dense_destination()) {
      ++i;
      continue;
    }
    const Candidate candidate = dense[i];
    dense[i] = dense.back();
    dense.pop_back();
    split_rows(candidate, dense);
  }
  for (MoveGroup& group : scatter_groups(std::move(dense))) groups.push_back(std::move(group));
  return groups;
}

}  // namespace nanotron_fast
