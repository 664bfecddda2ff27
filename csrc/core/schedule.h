#pragma once

#include <cstdint>
#include <vector>

#include "core/move.h"

namespace nanotron_fast {

// A region of one file, row by row, that a block of a job reads or writes in one go.
struct View {
  int64_t file;
  int64_t offset_bytes;      // of row 0
  int64_t row_stride_bytes;  // from a row to the next
  int64_t row_span_bytes;    // of one row, gaps included

  int64_t offset_of(int64_t row) const { return offset_bytes + row * row_stride_bytes; }
  int64_t block_bytes(int64_t num_rows) const {
    return (num_rows - 1) * row_stride_bytes + row_span_bytes;
  }
};

// A move in a job, and where its row 0 lies inside the views that it reads and writes.
struct PlacedMove {
  Move move;        // normalised
  int64_t index;    // in the caller's table, or of the move it was cut from
  int source_view;  // -1 for a fill
  int64_t source_delta_bytes;
  int destination_view;
  int64_t destination_delta_bytes;
};

// Moves with the same number of rows that are worth executing together: the columns of one source
// matrix that go to many files (read once), or those of many files that make up one destination
// matrix (written once). Most jobs hold a single contiguous move.
//
// The destination view of a block is dense: every byte of it is written by the job.
struct Job {
  int64_t num_rows;
  int64_t rows_per_block;
  int64_t first_block_rows;  // shorter where that aligns the later ones in the file
  int64_t num_blocks;
  // Read only the elements that are needed, run by run, instead of a view's whole span.
  bool reads_runs;
  int64_t source_buffer_bytes;       // of the largest block
  int64_t destination_buffer_bytes;  // likewise
  std::vector<View> sources;
  std::vector<View> destinations;
  std::vector<PlacedMove> moves;

  int64_t first_row(int64_t block) const {
    return block == 0 ? 0 : first_block_rows + (block - 1) * rows_per_block;
  }
};

// Jobs that write to the same files. One worker takes them all as long as there are units enough,
// because writes to one file wait for each other in the kernel.
struct Unit {
  size_t first_job;
  size_t end_job;
};

struct Schedule {
  std::vector<Job> jobs;       // unit by unit; in a unit, in order of source file and offset
  std::vector<Unit> units;     // in order of their first job's source
  std::vector<Scales> scales;  // those that moves refer to
  int64_t block_bytes;         // that one write of a file carries, at most

  int64_t max_source_buffer_bytes() const;
  int64_t max_destination_buffer_bytes() const;
  // Of the scales of one move in a block, stored and widened.
  int64_t max_scales_bytes() const;
};

// The bytes that one read or write carries where the move allows: enough to make a system call
// cheap, few enough to stay in a core's own cache between the read and the write. A write also
// makes the page cache allocate memory in pieces of up to its own size. Larger pieces copy a little
// faster where they are at hand, and several times slower where the kernel must compact memory or,
// in a virtual machine, get it back from the host.
constexpr int64_t kBlockBytes = int64_t{128} << 10;

// Where the page cache is passed by, or not kept, each call waits for the device, or starts it.
constexpr int64_t kUncachedBlockBytes = int64_t{1} << 20;

// Moves must not overlap in their destinations (the planner proves that).
Schedule make_schedule(const std::vector<Move>& moves, int64_t block_bytes = kBlockBytes,
                       std::vector<Scales> scales = {});

}  // namespace nanotron_fast
