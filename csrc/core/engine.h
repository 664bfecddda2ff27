#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/move.h"
#include "core/outputs.h"
#include "core/progress.h"

namespace nanotron_fast {

struct EngineOptions {
  int num_workers;
  // Data and metadata of every file are on the device when execute returns.
  bool sync;
  SimdLevel simd_level;
  IoMode io = IoMode::kBuffered;
};

// Creates every output under root (its directory must exist, and the file must not), or opens one
// that is there, writes its literals, and carries out the moves. Progress learns of each output
// that is whole. Returns what a file system refused of options.io, and what was done instead; empty
// where nothing was. Throws IoError, ChangedError, PlanError or Cancelled; files may then be
// incomplete.
std::string execute(const std::vector<SourceFile>& sources, const Folder& root,
                    const std::vector<OutputFile>& outputs, const MoveTable& table,
                    const EngineOptions& options, Progress& progress);

// What a move would write differs from what is there.
struct Difference {
  int64_t move;
  int64_t num_elements;
  int64_t first_offset_bytes;  // of the first of them, in the destination file
};

// Carries out the moves in memory and compares with the bytes that the destinations hold.
std::vector<Difference> compare(const std::vector<SourceFile>& sources,
                                const std::vector<SourceFile>& destinations, const MoveTable& table,
                                const EngineOptions& options, Progress& progress);

// The memory one worker takes for buffers while it executes these moves, or compares them.
int64_t worker_buffer_bytes(const MoveTable& table, IoMode io, bool compares);

}  // namespace nanotron_fast
