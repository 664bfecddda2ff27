// How moves are grouped into jobs, and how jobs are cut into blocks.

#include <algorithm>

#include "check.h"
#include "core/group.h"
#include "core/schedule.h"

using namespace nanotron_fast;

namespace {

using Three = std::array<int64_t, 3>;

Move make_move(int64_t source, int64_t source_element, Three source_strides, int64_t destination,
               int64_t destination_element, Three destination_strides, Three sizes) {
  return {source,         2 * source_element,  destination,      2 * destination_element, sizes,
          source_strides, destination_strides, Dtype::kBFloat16, Dtype::kBFloat16};
}

Move make_fill(int64_t destination, int64_t destination_element, Three sizes, Three strides) {
  return make_move(Move::kFill, 0, {0, 0, 0}, destination, destination_element, strides, sizes);
}

// Blocks follow one another without gap, and buffers hold the largest.
void check_blocks(const Schedule& schedule) {
  for (const Job& job : schedule.jobs) {
    CHECK(job.first_row(0) == 0);
    CHECK(job.num_blocks >= 1);
    CHECK(job.first_row(job.num_blocks - 1) < job.num_rows);
    CHECK(job.first_row(job.num_blocks) >= job.num_rows);
    int64_t destination_bytes = 0, source_bytes = 0;
    for (const View& view : job.destinations) {
      CHECK(view.row_span_bytes == view.row_stride_bytes || job.num_rows == 1);
      destination_bytes += view.block_bytes(job.rows_per_block);
    }
    for (const View& view : job.sources) source_bytes += view.block_bytes(job.rows_per_block);
    CHECK(job.destination_buffer_bytes == destination_bytes);
    CHECK(job.reads_runs || job.source_buffer_bytes == source_bytes);
    CHECK(job.first_block_rows <= job.rows_per_block);
    for (const PlacedMove& placed : job.moves)
      CHECK(placed.move.is_fill() == (placed.source_view < 0));
  }
  CHECK(schedule.max_destination_buffer_bytes() <= 2 * kMaxTransposeBytes);
  CHECK(schedule.max_source_buffer_bytes() <= 2 * kMaxTransposeBytes);
}

Schedule schedule_of(const std::vector<Move>& moves) {
  Schedule schedule = make_schedule(moves);
  check_blocks(schedule);
  return schedule;
}

void test_contiguous() {
  const Schedule schedule =
      schedule_of({make_move(0, 8, {100, 10, 1}, 0, 4, {100, 10, 1}, {7, 10, 10})});
  CHECK(schedule.jobs.size() == 1);
  const Job& job = schedule.jobs[0];
  CHECK(job.moves[0].move.sizes == (Three{700, 1, 1}));
  CHECK(job.num_blocks == 1 && job.destination_buffer_bytes == 1400);
}

void test_large_contiguous_is_cut_at_aligned_offsets() {
  const int64_t elements = 5 * kBlockBytes / 2;
  const Job job =
      schedule_of({make_move(0, 0, {1, 1, 1}, 0, 52, {1, 1, 1}, {elements, 1, 1})}).jobs[0];
  CHECK(job.num_blocks == 6);
  for (int64_t block = 1; block < job.num_blocks; ++block) {
    CHECK((104 + 2 * job.first_row(block)) % kBlockBytes == 0);
  }
}

// The columns of one matrix for three ranks: read once.
void test_column_split_is_one_scatter() {
  std::vector<Move> moves;
  for (int64_t rank = 0; rank < 3; ++rank) {
    moves.push_back(make_move(0, 16 + 5 * rank, {15, 1, 1}, rank, 8, {5, 1, 1}, {40, 5, 1}));
  }
  const Schedule schedule = schedule_of(moves);
  CHECK(schedule.jobs.size() == 1);
  const Job& job = schedule.jobs[0];
  CHECK(job.sources.size() == 1 && job.destinations.size() == 3 && job.moves.size() == 3);
  CHECK(job.sources[0].block_bytes(job.num_rows) == 40 * 15 * 2);
  CHECK(!job.reads_runs);
}

// The same, behind headers of a page: but for the first, each rank's writes begin where those of
// whole files do.
void test_column_split_is_cut_at_aligned_offsets() {
  std::vector<Move> moves;
  for (int64_t rank = 0; rank < 8; ++rank) {
    moves.push_back(
        make_move(0, 2048 + 256 * rank, {2048, 1, 1}, rank, 2048, {256, 1, 1}, {2048, 256, 1}));
  }
  const Job job = schedule_of(moves).jobs[0];
  CHECK(job.num_blocks == 9);
  for (int64_t block = 1; block < job.num_blocks; ++block) {
    for (const View& view : job.destinations) {
      CHECK(view.offset_of(job.first_row(block)) % kBlockBytes == 0);
    }
  }
}

// One rank's narrow share of a wide matrix: what lies between is not read.
void test_lonely_column_reads_runs() {
  const Job job = schedule_of({make_move(0, 0, {64, 1, 1}, 0, 0, {4, 1, 1}, {40, 4, 1})}).jobs[0];
  CHECK(job.reads_runs && job.source_buffer_bytes == 40 * 4 * 2);
}

// The columns of three ranks and a fill make up one matrix: written once.
void test_column_join_is_one_gather() {
  std::vector<Move> moves{make_fill(0, 8 + 15, {40, 2, 1}, {17, 1, 1})};
  for (int64_t rank = 0; rank < 3; ++rank) {
    moves.push_back(make_move(rank, 3, {5, 1, 1}, 0, 8 + 5 * rank, {17, 1, 1}, {40, 5, 1}));
  }
  const Schedule schedule = schedule_of(moves);
  CHECK(schedule.jobs.size() == 1);
  const Job& job = schedule.jobs[0];
  CHECK(job.sources.size() == 3 && job.destinations.size() == 1 && job.moves.size() == 4);
  CHECK(job.destinations[0].offset_bytes == 16 && job.destinations[0].row_stride_bytes == 34);
}

void test_columns_with_a_gap_are_written_row_by_row() {
  const Schedule schedule = schedule_of({make_move(0, 0, {5, 1, 1}, 0, 0, {7, 1, 1}, {40, 5, 1})});
  CHECK(schedule.jobs.size() == 40);
  for (const Job& job : schedule.jobs) CHECK(job.destination_buffer_bytes == 10);
}

// Rotary halves that interleave: two moves of one source region into the same rows.
void test_interleaved_rows_are_one_gather() {
  const Schedule schedule = schedule_of({
      make_move(0, 0, {8, 1, 1}, 0, 0, {16, 2, 1}, {6, 8, 1}),
      make_move(0, 48, {8, 1, 1}, 0, 1, {16, 2, 1}, {6, 8, 1}),
  });
  CHECK(schedule.jobs.size() == 1);
  CHECK(schedule.jobs[0].moves.size() == 2 && schedule.jobs[0].destinations.size() == 1);
}

void test_transposes() {
  const auto transpose = [](int64_t rows, int64_t columns) {
    return make_move(0, 0, {1, rows, 1}, 0, 0, {columns, 1, 1}, {rows, columns, 1});
  };
  const Job small = schedule_of({transpose(300, 200)}).jobs[0];
  CHECK(small.num_blocks == 1 && !small.reads_runs);
  const Job large = schedule_of({transpose(5000, 4000)}).jobs[0];
  CHECK(large.reads_runs && large.num_blocks == 2);
  CHECK(large.source_buffer_bytes <= kMaxTransposeBytes);
}

// Gate and up of one expert, transposed side by side.
void test_transposed_pair_is_one_gather() {
  const Schedule schedule = schedule_of({
      make_move(0, 0, {1, 30, 1}, 0, 0, {40, 1, 1}, {30, 20, 1}),
      make_move(1, 0, {1, 30, 1}, 0, 20, {40, 1, 1}, {30, 20, 1}),
  });
  CHECK(schedule.jobs.size() == 1 && schedule.jobs[0].sources.size() == 2);
}

void test_fills() {
  const Schedule schedule = schedule_of({make_fill(0, 0, {30, 10, 1}, {10, 1, 1}),
                                         make_move(0, 0, {1, 1, 1}, 0, 300, {1, 1, 1}, {9, 1, 1})});
  CHECK(schedule.jobs.size() == 2);
  CHECK(schedule.jobs[0].sources.empty() && schedule.jobs[0].source_buffer_bytes == 0);
  const int64_t large = 3 * kBlockBytes / 2;
  CHECK(schedule_of({make_fill(0, 0, {large, 1, 1}, {1, 1, 1})}).jobs[0].num_blocks == 3);
}

// Rows beyond what a buffer may hold are cut, at any depth, and still cover everything.
void test_giant_rows() {
  const int64_t columns = kMaxTransposeBytes;  // elements, so twice the limit in bytes
  const Schedule schedule = schedule_of({
      make_move(0, 0, {columns, 1, 1}, 0, 0, {2 * columns, 1, 1}, {3, columns, 1}),
      make_move(1, 0, {columns, 1, 1}, 0, columns, {2 * columns, 1, 1}, {3, columns, 1}),
  });
  CHECK(schedule.jobs.size() == 6);
  for (const Job& job : schedule.jobs) {
    CHECK(job.num_rows == columns && job.destination_buffer_bytes <= kBlockBytes);
  }
}

// Transposed experts split over ranks, there and back: a row is an expert, and the ranks' shares of
// it add up to more than a buffer may hold.
void test_many_shares_of_large_rows_stay_bounded() {
  const int64_t ranks = 16, rows = 2048, columns = 2048, wide = ranks * columns;
  std::vector<Move> split, join;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    split.push_back(make_move(0, rank * columns, {rows * wide, 1, wide}, rank, 0,
                              {rows * columns, rows, 1}, {8, columns, rows}));
    join.push_back(make_move(rank, 0, {rows * columns, 1, rows}, 0, rank * columns,
                             {rows * wide, wide, 1}, {8, rows, columns}));
  }
  schedule_of(split);
  for (const Job& job : schedule_of(join).jobs) CHECK(job.moves.size() == 16);
}

}  // namespace

int main() {
  test_contiguous();
  test_large_contiguous_is_cut_at_aligned_offsets();
  test_column_split_is_one_scatter();
  test_column_split_is_cut_at_aligned_offsets();
  test_lonely_column_reads_runs();
  test_column_join_is_one_gather();
  test_columns_with_a_gap_are_written_row_by_row();
  test_interleaved_rows_are_one_gather();
  test_transposes();
  test_transposed_pair_is_one_gather();
  test_fills();
  test_giant_rows();
  test_many_shares_of_large_rows_stay_bounded();
}
