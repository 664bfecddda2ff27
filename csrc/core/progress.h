#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "hash/sha256.h"

namespace nanotron_fast {

// An output file that is whole and closed, and the digests of its ranges.
struct Finished {
  int64_t output;
  std::vector<Sha256::Digest> digests;
};

// Shared between a running engine and whoever watches it.
class Progress {
 public:
  std::atomic<int64_t> bytes_done{0};
  std::atomic<bool> is_cancelled{false};

  void add_finished(Finished finished) {
    const std::lock_guard<std::mutex> lock(mutex_);
    finished_.push_back(std::move(finished));
  }
  // Those that were added since the last call.
  std::vector<Finished> take_finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(finished_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<Finished> finished_;
};

}  // namespace nanotron_fast
