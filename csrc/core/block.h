#pragma once

#include <cstddef>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/buffer.h"
#include "core/dequantise.h"
#include "core/file.h"
#include "core/schedule.h"

namespace nanotron_fast {

// Open source files of one worker: the last few it used.
class SourceFiles {
 public:
  explicit SourceFiles(const std::vector<SourceFile>& files) : files_(files) {}
  SourceFiles(const std::vector<SourceFile>& files, IoPolicy& policy)
      : files_(files), policy_(&policy) {}
  const File& get(int64_t index);

 private:
  static constexpr size_t kMaxOpen = 32;
  const std::vector<SourceFile>& files_;
  IoPolicy* policy_ = nullptr;
  std::unordered_map<int64_t, File> open_;
};

// What one worker needs to build blocks: buffers and files.
class BlockBuilder {
 public:
  // The scales are those of the table that the jobs are made from, and outlive this.
  BlockBuilder(const std::vector<SourceFile>& sources, const std::vector<Scales>& scales,
               SimdLevel level, IoPolicy& policy)
      : sources_(sources, policy),
        scales_(scales),
        level_(level),
        source_buffer_(policy.mode()),
        destination_buffer_(policy.mode()) {}

  // Reads what a block needs and lays it out as its destination views want it. The result holds
  // the views of job.destinations one after another, and stays valid until the next call.
  const std::byte* build(const Job& job, int64_t first_row, int64_t num_rows);

 private:
  void build_move(const PlacedMove& placed, int64_t first_row, int64_t num_rows,
                  const std::byte* view_data, std::byte* destination);
  void lay_out(const Move& move, const StridedCopy& copy, int64_t first_row,
               const std::byte* source, std::byte* destination);
  void build_from_runs(const Job& job, const PlacedMove& placed, int64_t first_row,
                       int64_t num_rows, std::byte* destination);

  SourceFiles sources_;
  const std::vector<Scales>& scales_;
  SimdLevel level_;
  LoadedScales loaded_;
  Buffer source_buffer_;
  Buffer destination_buffer_;
};

}  // namespace nanotron_fast
