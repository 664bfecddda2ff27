#include "core/read.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "core/block.h"
#include "core/error.h"
#include "core/pool.h"
#include "core/schedule.h"

namespace nanotron_fast {

namespace {

// The bytes that a worker takes at a time: of one run a piece, or as many short runs.
constexpr int64_t kTaskBytes = int64_t{1} << 20;

// Runs of a move: outer x middle of them, each run_bytes long.
struct Runs {
  int64_t file;
  int64_t offset_bytes;
  std::byte* destination;
  int64_t outer, middle;
  int64_t source_strides[2], destination_strides[2];  // bytes
  int64_t run_bytes;

  int64_t num_bytes() const { return outer * middle * run_bytes; }
};

// Consecutive runs of one move, or a piece of one run.
struct Task {
  size_t runs;
  int64_t first_run, end_run;
  int64_t begin_bytes, end_bytes;  // of each run
};

Runs runs_of(const Move& unordered, size_t index, const std::vector<Memory>& destinations) {
  const Move move = normalize(unordered);
  int inner = 2;
  while (inner > 0 && move.sizes[inner] == 1) --inner;
  const bool is_single = move.num_elements() == 1;
  const bool runs_on = move.source_strides[inner] == 1 && move.destination_strides[inner] == 1;
  if (move.is_fill() || move.source_dtype != move.destination_dtype || !(runs_on || is_single)) {
    throw PlanError("move " + std::to_string(index) + ": it is more than a copy of ranges");
  }
  const int64_t item = item_size(move.source_dtype);
  Runs runs{
      move.source_file,
      move.source_offset_bytes,
      destinations[static_cast<size_t>(move.destination_file)].data + move.destination_offset_bytes,
      1,
      1,
      {0, 0},
      {0, 0},
      move.sizes[inner] * item};
  if (inner >= 1) {
    runs.middle = move.sizes[inner - 1];
    runs.source_strides[1] = move.source_strides[inner - 1] * item;
    runs.destination_strides[1] = move.destination_strides[inner - 1] * item;
  }
  if (inner == 2) {
    runs.outer = move.sizes[0];
    runs.source_strides[0] = move.source_strides[0] * item;
    runs.destination_strides[0] = move.destination_strides[0] * item;
  }
  return runs;
}

void add_tasks(const Runs& runs, size_t index, std::vector<Task>& tasks) {
  const int64_t num_runs = runs.outer * runs.middle;
  const int64_t runs_per_task = std::max<int64_t>(1, kTaskBytes / runs.run_bytes);
  for (int64_t run = 0; run < num_runs; run += runs_per_task) {
    const int64_t end = std::min(num_runs, run + runs_per_task);
    for (int64_t begin = 0; begin < runs.run_bytes; begin += kTaskBytes) {
      tasks.push_back({index, run, end, begin, std::min(runs.run_bytes, begin + kTaskBytes)});
    }
  }
}

void read_task(const Task& task, const Runs& runs, SourceFiles& files) {
  const File& file = files.get(runs.file);
  for (int64_t run = task.first_run; run < task.end_run; ++run) {
    const int64_t outer = run / runs.middle, middle = run % runs.middle;
    file.pread_exact(runs.destination + outer * runs.destination_strides[0] +
                         middle * runs.destination_strides[1] + task.begin_bytes,
                     task.end_bytes - task.begin_bytes,
                     runs.offset_bytes + outer * runs.source_strides[0] +
                         middle * runs.source_strides[1] + task.begin_bytes);
  }
}

// A block of a job whose sources are quantised.
struct BlockOf {
  size_t job;
  int64_t number;
};

std::vector<BlockOf> blocks_of(const Schedule& schedule) {
  std::vector<BlockOf> blocks;
  for (size_t job = 0; job < schedule.jobs.size(); ++job) {
    for (int64_t number = 0; number < schedule.jobs[job].num_blocks; ++number) {
      blocks.push_back({job, number});
    }
  }
  return blocks;
}

void read_block(const Job& job, int64_t number, BlockBuilder& builder,
                const std::vector<Memory>& destinations) {
  const int64_t first_row = job.first_row(number);
  const int64_t num_rows = std::min(job.first_row(number + 1), job.num_rows) - first_row;
  const std::byte* values = builder.build(job, first_row, num_rows);
  for (const View& view : job.destinations) {
    const int64_t num_bytes = view.block_bytes(num_rows);
    std::memcpy(destinations[static_cast<size_t>(view.file)].data + view.offset_of(first_row),
                values, static_cast<size_t>(num_bytes));
    values += num_bytes;
  }
}

}  // namespace

int64_t read_ranges(const std::vector<std::string>& paths, const MoveTable& table,
                    const std::vector<Memory>& destinations, int num_workers, SimdLevel level) {
  const std::vector<SourceFile> sources(paths.begin(), paths.end());
  std::vector<int64_t> file_sizes;
  for (const SourceFile& source : sources) {
    file_sizes.push_back(File::open_for_reading(source).size_bytes());
  }
  std::vector<Scales> scales = parse_scales(table.scales, table.num_scales, file_sizes);
  const std::vector<Move> moves =
      parse_moves(table.moves, table.num_moves, file_sizes, sizes_of(destinations), scales);
  std::vector<Runs> runs;
  std::vector<Task> tasks;
  std::vector<Move> quantised;
  int64_t num_bytes = 0, num_halves = 0;
  for (size_t index = 0; index < moves.size(); ++index) {
    if (moves[index].is_scaled()) {
      quantised.push_back(moves[index]);
      num_halves +=
          moves[index].num_elements() * (moves[index].source_dtype == Dtype::kE4M3 ? 2 : 1);
      continue;
    }
    runs.push_back(runs_of(moves[index], index, destinations));
    add_tasks(runs.back(), runs.size() - 1, tasks);
    num_bytes += runs.back().num_bytes();
  }
  const Schedule schedule = make_schedule(quantised, kBlockBytes, std::move(scales));
  const std::vector<BlockOf> blocks = blocks_of(schedule);
  // Work is taken in the order of the files, so that a disk reads ahead.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    const Runs &left = runs[a.runs], &right = runs[b.runs];
    return left.file != right.file ? left.file < right.file
                                   : left.offset_bytes < right.offset_bytes;
  });
  const size_t num_pieces = tasks.size() + blocks.size();
  std::atomic<size_t> next{0};
  const auto workers =
      static_cast<int>(std::min<int64_t>(num_workers, static_cast<int64_t>(num_pieces)));
  IoPolicy policy(IoMode::kBuffered);
  run_workers(workers, [&](int, const std::atomic<bool>& should_stop) {
    SourceFiles files(sources);
    BlockBuilder builder(sources, schedule.scales, level, policy);
    for (size_t i; !should_stop && (i = next.fetch_add(1)) < num_pieces;) {
      if (i < tasks.size()) {
        read_task(tasks[i], runs[tasks[i].runs], files);
        continue;
      }
      const BlockOf& block = blocks[i - tasks.size()];
      read_block(schedule.jobs[block.job], block.number, builder, destinations);
    }
  });
  return num_bytes + (num_halves + 1) / 2;
}

}  // namespace nanotron_fast
