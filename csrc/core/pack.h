#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/move.h"

namespace nanotron_fast {

// A tensor's memory, which the caller keeps alive.
struct Memory {
  std::byte* data;
  int64_t size_bytes;
};

// What parse_moves checks the moves against.
std::vector<int64_t> sizes_of(const std::vector<Memory>& memories);

// Carries out a table of moves between regions of memory, whose numbers stand where those of files
// do. Sources are only read. Throws PlanError before the first byte is moved. What moves write must
// not overlap, neither among themselves nor with what others read.
void pack(const int64_t* table, int64_t num_moves, const std::vector<Memory>& sources,
          const std::vector<Memory>& destinations, int num_workers, SimdLevel level);

}  // namespace nanotron_fast
