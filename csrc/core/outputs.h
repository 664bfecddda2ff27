#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/hashed_ranges.h"
#include "core/progress.h"
#include "core/schedule.h"

namespace nanotron_fast {

// Bytes of a file that no move writes, such as a header.
struct Literal {
  int64_t offset_bytes;
  std::string bytes;
};

// A file to be written: its path from the folder, what no move writes, its whole size, and ranges
// of it whose digests are wanted, ascending. One that is there has that size already, and others
// write what is written to it besides.
struct OutputFile {
  std::string path;
  std::vector<Literal> literals;
  int64_t size_bytes;
  std::vector<Range> hashed = {};
  bool is_there = false;
};

// Output files, each created (or opened, where it is there) by whoever writes to it first and
// closed by whoever writes last.
class Outputs {
 public:
  // All arguments outlive it. Bytes pass as the policy says, in writes of at most block_bytes.
  Outputs(const Folder& root, const std::vector<OutputFile>& files, const Schedule& schedule,
          bool sync, IoPolicy& policy, Progress& progress);

  // Files that hold literals alone have no move, and are created here.
  void create_empty();

  // Writes bytes of a block.
  void write(int64_t index, const std::byte* data, int64_t num_bytes, int64_t offset_bytes);

  // Waits until all of it is on the device, in pieces, so that a run can be cancelled while a
  // device is slow.
  void sync_all(int num_workers);

 private:
  struct State {
    std::mutex mutex;
    File file;
    // Blocks to be written and ranges to be hashed.
    std::atomic<int64_t> parts_left{0};
    std::unique_ptr<HashedRanges> hashed;
  };

  const File& open(size_t i);
  void finish(size_t i);

  const Folder& root_;
  const std::vector<OutputFile>& files_;
  std::vector<State> states_;
  const int64_t block_bytes_;
  const bool sync_;
  IoPolicy& policy_;
  Progress& progress_;
};

}  // namespace nanotron_fast
