#include "core/engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>

#include "core/block.h"
#include "core/error.h"
#include "core/file.h"
#include "core/pool.h"
#include "core/schedule.h"

namespace nanotron_fast {

namespace {

// What happens to a block once it is built: (job, first row, number of rows, the built bytes).
using Sink = std::function<void(const Job&, int64_t, int64_t, const std::byte*)>;

// Each worker takes the next unit and works through its blocks; once none is left to take, it helps
// with blocks that others have not come to. So files are written by one thread each while there are
// enough of them, and the last large tensor still uses every core. Helpers begin at places of their
// own: two threads whose writes alternate in one file's range wait for each other more often than
// two that each write a long run of it.
void run_schedule(const Schedule& schedule, const std::vector<SourceFile>& sources,
                  const EngineOptions& options, IoPolicy& policy, Progress& progress,
                  const std::function<Sink()>& make_sink) {
  std::atomic<size_t> next_unit{0};
  const std::unique_ptr<std::atomic<int64_t>[]> next_block(
      new std::atomic<int64_t>[schedule.jobs.size()]());

  run_workers(options.num_workers, [&](int worker, const std::atomic<bool>& should_stop) {
    BlockBuilder builder(sources, schedule.scales, options.simd_level, policy);
    const Sink sink = make_sink();
    const auto work_on = [&](size_t index) {
      const Job& job = schedule.jobs[index];
      while (!should_stop) {
        const int64_t block = next_block[index].fetch_add(1);
        if (block >= job.num_blocks) return;
        if (progress.is_cancelled) throw Cancelled();
        const int64_t first_row = job.first_row(block);
        const int64_t num_rows = job.first_row(block + 1) < job.num_rows
                                     ? job.first_row(block + 1) - first_row
                                     : job.num_rows - first_row;
        sink(job, first_row, num_rows, builder.build(job, first_row, num_rows));
        int64_t num_bytes = 0;
        for (const View& view : job.destinations) num_bytes += view.block_bytes(num_rows);
        progress.bytes_done += num_bytes;
      }
    };
    for (size_t i; (i = next_unit.fetch_add(1)) < schedule.units.size();) {
      const Unit& unit = schedule.units[i];
      for (size_t job = unit.first_job; job < unit.end_job; ++job) work_on(job);
    }
    const size_t num_jobs = schedule.jobs.size();
    const auto num_workers = static_cast<size_t>(options.num_workers);
    const size_t first = num_jobs * static_cast<size_t>(worker) / num_workers;
    for (size_t i = 0; i < num_jobs; ++i) work_on((first + i) % num_jobs);
  });
}

std::vector<int64_t> sizes_of(const std::vector<SourceFile>& files) {
  std::vector<int64_t> sizes;
  for (const SourceFile& file : files) {
    sizes.push_back(File::open_for_reading(file).size_bytes());
  }
  return sizes;
}

// Counts the elements of each move that differ between two images of the same block.
class DifferenceCounter {
 public:
  explicit DifferenceCounter(size_t num_moves) : by_move_(num_moves) {}

  void count(const Job& job, int view_index, int64_t first_row, int64_t num_rows,
             const std::byte* wanted, const std::byte* found) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const PlacedMove& placed : job.moves) {
      if (placed.destination_view != view_index) continue;
      const Move& move = placed.move;
      const int64_t item = item_size(move.destination_dtype);
      for (int64_t i = 0; i < num_rows; ++i) {
        for (int64_t j = 0; j < move.sizes[1]; ++j) {
          for (int64_t k = 0; k < move.sizes[2]; ++k) {
            const int64_t at =
                placed.destination_delta_bytes +
                item * (i * move.destination_strides[0] + j * move.destination_strides[1] +
                        k * move.destination_strides[2]);
            if (std::memcmp(wanted + at, found + at, static_cast<size_t>(item)) == 0) continue;
            const View& view = job.destinations[static_cast<size_t>(view_index)];
            add(placed.index, view.offset_of(first_row) + at);
          }
        }
      }
    }
  }

  // first_offset_bytes of a move is in its destination file.
  struct Count {
    int64_t num_elements = 0;
    int64_t first_offset_bytes = 0;
  };
  const std::vector<Count>& by_move() const { return by_move_; }

 private:
  void add(int64_t move, int64_t offset_bytes) {
    Count& count = by_move_[static_cast<size_t>(move)];
    if (count.num_elements == 0 || offset_bytes < count.first_offset_bytes) {
      count.first_offset_bytes = offset_bytes;
    }
    ++count.num_elements;
  }

  std::mutex mutex_;
  std::vector<Count> by_move_;
};

Schedule schedule_of(const MoveTable& table, const std::vector<int64_t>& source_sizes,
                     const std::vector<int64_t>& destination_sizes, int64_t block_bytes) {
  std::vector<Scales> scales = parse_scales(table.scales, table.num_scales, source_sizes);
  const std::vector<Move> moves =
      parse_moves(table.moves, table.num_moves, source_sizes, destination_sizes, scales);
  return make_schedule(moves, block_bytes, std::move(scales));
}

// A device is asked for more at a time than the page cache.
int64_t block_bytes_of(IoMode io) {
  return io == IoMode::kBuffered ? kBlockBytes : kUncachedBlockBytes;
}

}  // namespace

std::string execute(const std::vector<SourceFile>& sources, const Folder& root,
                    const std::vector<OutputFile>& outputs, const MoveTable& table,
                    const EngineOptions& options, Progress& progress) {
  std::vector<int64_t> output_sizes;
  for (const OutputFile& output : outputs) output_sizes.push_back(output.size_bytes);
  const Schedule schedule =
      schedule_of(table, sizes_of(sources), output_sizes, block_bytes_of(options.io));
  IoPolicy policy(options.io);
  Outputs files(root, outputs, schedule, options.sync, policy, progress);
  files.create_empty();
  run_schedule(schedule, sources, options, policy, progress, [&]() -> Sink {
    return [&](const Job& job, int64_t first_row, int64_t num_rows, const std::byte* data) {
      for (const View& view : job.destinations) {
        const int64_t num_bytes = view.block_bytes(num_rows);
        files.write(view.file, data, num_bytes, view.offset_of(first_row));
        data += num_bytes;
      }
    };
  });
  if (options.sync) files.sync_all(options.num_workers);
  return policy.refusal();
}

std::vector<Difference> compare(const std::vector<SourceFile>& sources,
                                const std::vector<SourceFile>& destinations, const MoveTable& table,
                                const EngineOptions& options, Progress& progress) {
  const Schedule schedule =
      schedule_of(table, sizes_of(sources), sizes_of(destinations), block_bytes_of(options.io));
  IoPolicy policy(options.io);
  DifferenceCounter counter(static_cast<size_t>(table.num_moves));
  run_schedule(schedule, sources, options, policy, progress, [&]() -> Sink {
    const auto files = std::make_shared<SourceFiles>(destinations, policy);
    const auto buffer = std::make_shared<Buffer>(options.io);
    return [&, files, buffer](const Job& job, int64_t first_row, int64_t num_rows,
                              const std::byte* wanted) {
      for (size_t i = 0; i < job.destinations.size(); ++i) {
        const View& view = job.destinations[i];
        const int64_t num_bytes = view.block_bytes(num_rows);
        const int64_t offset = view.offset_of(first_row);
        std::byte* const found = buffer->reserve(num_bytes, offset);
        files->get(view.file).pread_exact(found, num_bytes, offset);
        if (std::memcmp(wanted, found, static_cast<size_t>(num_bytes)) != 0) {
          counter.count(job, static_cast<int>(i), first_row, num_rows, wanted, found);
        }
        wanted += num_bytes;
      }
    };
  });
  std::vector<Difference> differences;
  for (size_t move = 0; move < counter.by_move().size(); ++move) {
    const auto& count = counter.by_move()[move];
    if (count.num_elements > 0) {
      differences.push_back(
          {static_cast<int64_t>(move), count.num_elements, count.first_offset_bytes});
    }
  }
  return differences;
}

int64_t worker_buffer_bytes(const MoveTable& table, IoMode io, bool compares) {
  const int64_t no_limit = INT64_MAX;
  int64_t num_sources = 0, num_destinations = 0;
  for (int64_t i = 0; i < table.num_moves; ++i) {
    const int64_t* row = table.moves + i * Move::kNumColumns;
    num_sources = std::max(num_sources, row[Column::kSource] + 1);
    num_destinations = std::max(num_destinations, row[Column::kDestination] + 1);
  }
  for (int64_t i = 0; i < table.num_scales; ++i) {
    num_sources = std::max(num_sources, table.scales[i * Scales::kNumColumns] + 1);
  }
  const Schedule schedule = schedule_of(
      table, std::vector<int64_t>(static_cast<size_t>(num_sources), no_limit),
      std::vector<int64_t>(static_cast<size_t>(num_destinations), no_limit), block_bytes_of(io));
  const int64_t destination = schedule.max_destination_buffer_bytes() + Buffer::kSlackBytes;
  return schedule.max_source_buffer_bytes() + Buffer::kSlackBytes + schedule.max_scales_bytes() +
         destination * (compares ? 2 : 1) + (io == IoMode::kDirect ? kBounceBytes : 0);
}

}  // namespace nanotron_fast
