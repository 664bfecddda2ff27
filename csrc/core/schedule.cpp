#include "core/schedule.h"

#include <algorithm>
#include <tuple>
#include <unordered_map>
#include <utility>

namespace nanotron_fast {

namespace {

// A move on its way into a job, with what grouping asks for again and again.
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
  int64_t destination_end() const {
    return move.destination_offset_bytes +
           span_elements(move, move.destination_strides, 0) * destination_item();
  }
  int64_t source_end() const {
    return move.source_offset_bytes + span_elements(move, move.source_strides, 0) * source_item();
  }
  bool has_dense_destination() const {
    return span_elements(move, move.destination_strides, 0) == move.num_elements();
  }
};

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

using Group = std::vector<Candidate>;

// Candidates of one destination file whose rows interleave, in order of offset, are a group when
// together they leave no gap. Rows too large to hold are cut first. Those left over come back in
// rest.
std::vector<Group> gather_groups(std::vector<Candidate> candidates, std::vector<Candidate>& rest) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.move.destination_file, a.move.destination_offset_bytes) <
           std::tie(b.move.destination_file, b.move.destination_offset_bytes);
  });
  std::vector<Group> groups;
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
    for (Group& group : gather_groups(std::move(rows_of_large), rest)) {
      groups.push_back(std::move(group));
    }
  }
  return groups;
}

// What one block holds of a candidate if it is to read well: a row, but all of a transposed matrix,
// since the fewer of its rows, the shorter the runs in the source.
int64_t held_bytes(const Candidate& candidate) {
  const bool is_transposed = candidate.source_row_stride() < candidate.source_row_span();
  const int64_t item = std::max(candidate.source_item(), candidate.destination_item());
  return item * (is_transposed ? candidate.move.num_elements() : candidate.row_elements());
}

// Candidates with dense destinations that read interleaved rows of one source region.
std::vector<Group> scatter_groups(std::vector<Candidate> candidates) {
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return std::tie(a.move.source_file, a.move.source_offset_bytes, a.index) <
           std::tie(b.move.source_file, b.move.source_offset_bytes, b.index);
  });
  std::vector<Group> groups;
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

// The view that holds both, or none where they have different files or row strides.
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

// Stricter than for sources: a block of a destination view must be dense.
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
  for (const Part& part : job.parts) {
    if (part.source_view < 0) continue;
    total += num_rows * part.move.sizes[1] * part.move.sizes[2] * item_size(part.move.source_dtype);
  }
  return total;
}

// How many rows a block takes, and how it reads them.
void choose_blocks(Job& job) {
  int64_t row_bytes = 0;
  for (const View& view : job.destinations) row_bytes += view.row_stride_bytes;
  row_bytes = std::max(row_bytes, packed_source_bytes(job, 1));
  int64_t rows = std::clamp<int64_t>(kBlockBytes / row_bytes, 1, job.num_rows);

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
  job.rows_per_block = rows;
  job.first_block_rows = rows;
  const View& destination = job.destinations.front();
  if (job.parts.size() == 1 && rows < job.num_rows) {
    const int64_t block_bytes = rows * destination.row_stride_bytes;
    const int64_t past_boundary = destination.offset_bytes % block_bytes;
    job.first_block_rows =
        std::max<int64_t>(1, (block_bytes - past_boundary) / destination.row_stride_bytes);
  }
  job.num_blocks = 1 + (job.num_rows - job.first_block_rows + rows - 1) / rows;
  job.source_buffer_bytes =
      job.reads_runs ? packed_source_bytes(job, rows) : buffer_bytes(job.sources, rows);
  job.destination_buffer_bytes = buffer_bytes(job.destinations, rows);
}

Job make_job(const Group& group) {
  Job job{};
  job.num_rows = group.front().move.sizes[0];
  for (const Candidate& candidate : group) {
    const Move& move = candidate.move;
    Part part{move, candidate.index, -1, 0, 0, 0};
    if (!move.is_fill()) {
      part.source_view = add_source(job.sources,
                                    {move.source_file, move.source_offset_bytes,
                                     candidate.source_row_stride(), candidate.source_row_span()},
                                    job.num_rows);
    }
    part.destination_view = add_destination(
        job.destinations, {move.destination_file, move.destination_offset_bytes,
                           candidate.destination_row_stride(), candidate.destination_row_span()});
    job.parts.push_back(part);
  }
  for (Part& part : job.parts) {
    if (part.source_view >= 0) {
      part.source_delta_bytes =
          part.move.source_offset_bytes - job.sources[part.source_view].offset_bytes;
    }
    part.destination_delta_bytes =
        part.move.destination_offset_bytes - job.destinations[part.destination_view].offset_bytes;
  }
  choose_blocks(job);
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

Schedule make_schedule(const std::vector<Move>& moves) {
  std::vector<Candidate> dense;
  std::vector<Group> groups = gather_groups(make_candidates(moves), dense);
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
  for (Group& group : scatter_groups(std::move(dense))) groups.push_back(std::move(group));

  Schedule schedule;
  for (const Group& group : groups) schedule.jobs.push_back(make_job(group));
  std::stable_sort(schedule.jobs.begin(), schedule.jobs.end(), [](const Job& a, const Job& b) {
    const Move& left = a.parts.front().move;
    const Move& right = b.parts.front().move;
    return std::tie(left.source_file, left.source_offset_bytes) <
           std::tie(right.source_file, right.source_offset_bytes);
  });
  group_into_units(schedule);
  return schedule;
}

}  // namespace nanotron_fast
