#pragma once

#include <atomic>
#include <cstdint>

namespace nanotron_fast {

// Shared between a running engine and whoever watches it.
struct Progress {
  std::atomic<int64_t> bytes_done{0};
  std::atomic<bool> is_cancelled{false};
};

}  // namespace nanotron_fast
