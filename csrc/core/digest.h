#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/hashed_ranges.h"
#include "core/progress.h"

namespace nanotron_fast {

// A range of one of several files.
struct FileRange {
  int64_t file;
  Range range;
};

// The SHA-256 of each range, in their order. Ranges are shared among the workers; progress counts
// their bytes. Throws IoError, ChangedError where a file ends early, PlanError, Cancelled.
std::vector<Sha256::Digest> digest(const std::vector<SourceFile>& files,
                                   const std::vector<FileRange>& ranges, int num_workers, IoMode io,
                                   Progress& progress);

}  // namespace nanotron_fast
