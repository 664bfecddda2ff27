#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace nanotron_fast {

// Shared between a running engine and whoever watches it.
class Progress {
 public:
  std::atomic<int64_t> bytes_done{0};
  std::atomic<bool> is_cancelled{false};

  // An output file is whole and closed.
  void add_finished(int64_t output) {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_.push_back(output);
  }
  // Those that were added since the last call.
  std::vector<int64_t> take_finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(finished_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<int64_t> finished_;
};

}  // namespace nanotron_fast
