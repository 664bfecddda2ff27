#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/file.h"
#include "hash/sha256.h"

namespace nanotron_fast {

// Consecutive bytes of a file: of a tensor, say.
struct Range {
  int64_t offset_bytes;
  int64_t num_bytes;
};

// Hashes ranges of a file while it is being written, by many threads and in any order.
//
// A range is hashed from its beginning on. Who writes the next bytes of it hashes them where they
// are, still in the core's own cache. Bytes that were written ahead are read again by whoever
// closes the gap before them, at once; meanwhile the others write on.
class HashedRanges {
 public:
  // Ascending and apart from each other, or PlanError.
  explicit HashedRanges(const std::vector<Range>& ranges);

  // How many ranges have bytes still to come.
  int64_t num_open() const { return num_open_; }

  // These bytes have been written to the file, and are at data. Returns how many ranges this call
  // has ended; one that another thread is at work on is ended by that.
  int64_t add(const File& file, const std::byte* data, int64_t num_bytes, int64_t offset_bytes,
              const std::atomic<bool>& is_cancelled);

  // In the order of the ranges, once none is open.
  std::vector<Sha256::Digest> digests() const;

 private:
  struct State {
    Range range;
    std::mutex mutex;
    Sha256 sha;
    int64_t next = 0;                    // from the range's beginning on, what sha has not had
    std::map<int64_t, int64_t> written;  // begin -> end of what lies behind it
    bool is_at_work = false;
    Sha256::Digest digest{};
  };

  bool add_to(State& state, const File& file, const std::byte* data, int64_t begin, int64_t end,
              const std::atomic<bool>& is_cancelled);

  std::unique_ptr<State[]> states_;
  size_t num_states_;
  std::atomic<int64_t> num_open_{0};
};

}  // namespace nanotron_fast
