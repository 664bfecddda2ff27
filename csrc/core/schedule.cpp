#include "core/schedule.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "core/buffer.h"
#include "core/group.h"

namespace nanotron_fast {

namespace {

// The view that holds both of two views; none where their files or row strides differ.
bool merge_views(const View& a, const View& b, View& merged) {
  if (a.file != b.file || a.row_stride_bytes != b.row_stride_bytes) return false;
  merged = a;
  merged.offset_bytes = std::min(a.offset_bytes, b.offset_bytes);
  merged.row_span_bytes =
      std::max(a.offset_bytes + a.row_span_bytes, b.offset_bytes + b.row_span_bytes) -
      merged.offset_bytes;
  return true;
}

// Rows of both lie beside each other in one row of the matrix.
bool rows_interleave(const View& merged) {
  return merged.row_span_bytes <= merged.row_stride_bytes;
}

bool blocks_overlap(const View& a, const View& b, int64_t num_rows) {
  return a.offset_bytes < b.offset_bytes + b.block_bytes(num_rows) &&
         b.offset_bytes < a.offset_bytes + a.block_bytes(num_rows);
}

int add_source(std::vector<View>& views, const View& wanted, int64_t num_rows) {
  for (size_t i = 0; i < views.size(); ++i) {
    View merged;
    if (merge_views(views[i], wanted, merged) &&
        (rows_interleave(merged) || blocks_overlap(views[i], wanted, num_rows))) {
      views[i] = merged;
      return static_cast<int>(i);
    }
  }
  views.push_back(wanted);
  return static_cast<int>(views.size()) - 1;
}

// Adds a view, or widens one. It is stricter than for sources: a block of a destination must be
// dense.
int add_destination(std::vector<View>& views, const View& wanted) {
  for (size_t i = 0; i < views.size(); ++i) {
    View merged;
    if (merge_views(views[i], wanted, merged) && rows_interleave(merged)) {
      views[i] = merged;
      return static_cast<int>(i);
    }
  }
  views.push_back(wanted);
  return static_cast<int>(views.size()) - 1;
}

int64_t buffer_bytes(const std::vector<View>& views, int64_t num_rows) {
  int64_t total = 0;
  for (const View& view : views) total += view.block_bytes(num_rows);
  return total;
}

// Bytes of a block's elements alone, packed without gaps.
int64_t packed_source_bytes(const Job& job, int64_t num_rows) {
  int64_t total = 0;
  for (const PlacedMove& placed : job.moves) {
    if (placed.source_view < 0) continue;
    total += num_rows * placed.move.sizes[1] * placed.move.sizes[2] *
             item_size(placed.move.source_dtype);
  }
  return total;
}

// How many rows a block takes, and how it reads them.
void choose_blocks(Job& job, int64_t file_block_bytes) {
  int64_t row_bytes = 0;
  for (const View& view : job.destinations) row_bytes += view.row_stride_bytes;
  row_bytes = std::max(row_bytes, packed_source_bytes(job, 1));
  // A block that many files share still gives each of them a write of that size.
  const auto num_files =
      static_cast<int64_t>(std::max(job.sources.size(), job.destinations.size()));
  const int64_t block_bytes = num_files * file_block_bytes;
  int64_t rows = std::clamp<int64_t>(block_bytes / row_bytes, 1, job.num_rows);

  const bool is_transposed =
      std::any_of(job.sources.begin(), job.sources.end(),
                  [](const View& view) { return view.row_stride_bytes < view.row_span_bytes; });
  const int64_t whole_bytes = buffer_bytes(job.sources, job.num_rows);
  const bool is_dense = whole_bytes <= 2 * packed_source_bytes(job, job.num_rows);
  if (is_transposed && is_dense && whole_bytes <= kMaxTransposeBytes &&
      buffer_bytes(job.destinations, job.num_rows) <= kMaxTransposeBytes) {
    rows = job.num_rows;
  } else if (is_transposed) {
    // The rows of a strip are its runs in the source: long ones.
    job.reads_runs = true;
    rows = std::clamp<int64_t>(kMaxTransposeBytes / row_bytes, 1, job.num_rows);
  } else {
    // A few columns of a wide matrix: skip what lies between.
    job.reads_runs = buffer_bytes(job.sources, rows) > 2 * packed_source_bytes(job, rows);
  }
  if (rows < job.num_rows) {
    // Writes that begin inside a page make the page cache work twice on it.
    const int64_t stride = job.destinations.front().row_stride_bytes;
    const int64_t rows_of_whole_pages = kPageBytes / std::gcd(kPageBytes, stride);
    rows -= rows > rows_of_whole_pages ? rows % rows_of_whole_pages : 0;
  }
  job.rows_per_block = rows;
  job.first_block_rows = rows;
  const View& destination = job.destinations.front();
  const int64_t aligned_bytes = rows * destination.row_stride_bytes;
  const int64_t past_boundary = destination.offset_bytes % aligned_bytes;
  const bool can_align =
      std::all_of(job.destinations.begin(), job.destinations.end(), [&](const View& each) {
        return each.row_stride_bytes == destination.row_stride_bytes &&
               each.offset_bytes % aligned_bytes == past_boundary;
      });
  if (can_align && rows < job.num_rows) {
    job.first_block_rows =
        std::max<int64_t>(1, (aligned_bytes - past_boundary) / destination.row_stride_bytes);
  }
  job.num_blocks = 1 + (job.num_rows - job.first_block_rows + rows - 1) / rows;
  job.source_buffer_bytes =
      job.reads_runs ? packed_source_bytes(job, rows) : buffer_bytes(job.sources, rows);
  job.destination_buffer_bytes = buffer_bytes(job.destinations, rows);
}

Job make_job(const MoveGroup& group, int64_t block_bytes) {
  Job job{};
  job.num_rows = group.front().move.sizes[0];
  for (const Candidate& candidate : group) {
    const Move& move = candidate.move;
    PlacedMove placed{move, candidate.index, -1, 0, 0, 0};
    if (!move.is_fill()) {
      placed.source_view = add_source(job.sources,
                                      {move.source_file, move.source_offset_bytes,
                                       candidate.source_row_stride(), candidate.source_row_span()},
                                      job.num_rows);
    }
    placed.destination_view = add_destination(
        job.destinations, {move.destination_file, move.destination_offset_bytes,
                           candidate.destination_row_stride(), candidate.destination_row_span()});
    job.moves.push_back(placed);
  }
  for (PlacedMove& placed : job.moves) {
    if (placed.source_view >= 0) {
      placed.source_delta_bytes =
          placed.move.source_offset_bytes - job.sources[placed.source_view].offset_bytes;
    }
    placed.destination_delta_bytes = placed.move.destination_offset_bytes -
                                     job.destinations[placed.destination_view].offset_bytes;
  }
  choose_blocks(job, block_bytes);
  return job;
}

// Puts jobs that share a destination file beside each other, in the order of the first of them.
void group_into_units(Schedule& schedule) {
  const size_t num_jobs = schedule.jobs.size();
  // Every job points to an earlier one of its unit, or to itself.
  std::vector<size_t> leader(num_jobs);
  const auto find = [&](size_t job) {
    while (leader[job] != job) job = leader[job] = leader[leader[job]];
    return job;
  };
  std::unordered_map<int64_t, size_t> last_writer;
  for (size_t job = 0; job < num_jobs; ++job) {
    leader[job] = job;
    for (const View& view : schedule.jobs[job].destinations) {
      const auto [entry, is_new] = last_writer.try_emplace(view.file, job);
      const size_t a = find(entry->second), b = find(job);
      leader[std::max(a, b)] = std::min(a, b);
      entry->second = job;
    }
  }
  std::vector<std::pair<size_t, size_t>> order;
  for (size_t job = 0; job < num_jobs; ++job) order.emplace_back(find(job), job);
  std::sort(order.begin(), order.end());
  std::vector<Job> jobs;
  for (const auto& [unit, job] : order) {
    if (jobs.empty() || unit == job) schedule.units.push_back({jobs.size(), jobs.size()});
    jobs.push_back(std::move(schedule.jobs[job]));
    schedule.units.back().end_job = jobs.size();
  }
  schedule.jobs = std::move(jobs);
}

}  // namespace

int64_t Schedule::max_source_buffer_bytes() const {
  int64_t most = 0;
  for (const Job& job : jobs) most = std::max(most, job.source_buffer_bytes);
  return most;
}

int64_t Schedule::max_destination_buffer_bytes() const {
  int64_t most = 0;
  for (const Job& job : jobs) most = std::max(most, job.destination_buffer_bytes);
  return most;
}

int64_t Schedule::max_scales_bytes() const {
  int64_t most = 0;
  for (const Job& job : jobs) {
    for (const PlacedMove& placed : job.moves) {
      if (!placed.move.is_scaled()) continue;
      const Scales& mine = scales[static_cast<size_t>(placed.move.scales)];
      Move block = placed.move;
      block.sizes[0] = job.rows_per_block;
      const int64_t span = span_elements(block, block.source_strides, 0);
      // Wherever the block begins; it may begin and end within a row of blocks, and in each matrix
      // the last row of blocks may be a short one.
      const int64_t rows = (span - 1) / mine.columns + 2;
      const int64_t grid_rows = rows / mine.block_rows + 2 + rows / mine.rows;
      const int64_t count = grid_rows * mine.grid_columns;
      most = std::max(most, count * (mine.item() + static_cast<int64_t>(sizeof(float))));
    }
  }
  return most;
}

Schedule make_schedule(const std::vector<Move>& moves, int64_t block_bytes,
                       std::vector<Scales> scales) {
  Schedule schedule;
  schedule.scales = std::move(scales);
  schedule.block_bytes = block_bytes;
  for (const MoveGroup& group : group_moves(moves)) {
    schedule.jobs.push_back(make_job(group, block_bytes));
  }
  std::stable_sort(schedule.jobs.begin(), schedule.jobs.end(), [](const Job& a, const Job& b) {
    const Move& left = a.moves.front().move;
    const Move& right = b.moves.front().move;
    return std::tie(left.source_file, left.source_offset_bytes) <
           std::tie(right.source_file, right.source_offset_bytes);
  });
  group_into_units(schedule);
  return schedule;
}

}  // namespace nanotron_fast
