#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/pack.h"

namespace nanotron_fast {

// Reads byte ranges of files into memory. The sources of the moves are the files, and their
// destinations are the memories. A move only copies: both of its sides run on along the same
// dimension and have the same dtype; but what is quantised becomes values, wherever it lies.
// Nothing is read but what the moves name. Returns the bytes read, without scales; throws PlanError
// or IoError.
int64_t read_ranges(const std::vector<std::string>& paths, const MoveTable& table,
                    const std::vector<Memory>& destinations, int num_workers, SimdLevel level);

}  // namespace nanotron_fast
