#include "core/hashed_ranges.h"

#include <algorithm>
#include <string>

#include "core/buffer.h"
#include "core/error.h"

namespace nanotron_fast {

namespace {

// What is read again at a time.
constexpr int64_t kPieceBytes = int64_t{256} << 10;

}  // namespace

HashedRanges::HashedRanges(const std::vector<Range>& ranges)
    : states_(ranges.empty() ? nullptr : new State[ranges.size()]), num_states_(ranges.size()) {
  int64_t position = 0;
  for (size_t i = 0; i < num_states_; ++i) {
    const Range& range = ranges[i];
    if (range.offset_bytes < position || range.num_bytes < 0) {
      throw PlanError("a range to hash starts at byte " + std::to_string(range.offset_bytes) +
                      ", and the one before it ends at " + std::to_string(position));
    }
    position = range.offset_bytes + range.num_bytes;
    states_[i].range = range;
    if (range.num_bytes == 0) {
      states_[i].digest = states_[i].sha.finish();
    } else {
      ++num_open_;
    }
  }
}

int64_t HashedRanges::add(const File& file, const std::byte* data, int64_t num_bytes,
                          int64_t offset_bytes, const std::atomic<bool>& is_cancelled) {
  State* const last = states_.get() + num_states_;
  State* state = std::partition_point(states_.get(), last, [&](const State& each) {
    return each.range.offset_bytes + each.range.num_bytes <= offset_bytes;
  });
  int64_t num_ended = 0;
  for (; state != last && state->range.offset_bytes < offset_bytes + num_bytes; ++state) {
    const Range& range = state->range;
    if (range.num_bytes == 0) continue;
    const int64_t begin = std::max(offset_bytes, range.offset_bytes);
    const int64_t end = std::min(offset_bytes + num_bytes, range.offset_bytes + range.num_bytes);
    num_ended += add_to(*state, file, data + (begin - offset_bytes), begin - range.offset_bytes,
                        end - range.offset_bytes, is_cancelled);
  }
  num_open_ -= num_ended;
  return num_ended;
}

bool HashedRanges::add_to(State& state, const File& file, const std::byte* data, int64_t begin,
                          int64_t end, const std::atomic<bool>& is_cancelled) {
  std::unique_lock<std::mutex> lock(state.mutex);
  if (state.is_at_work || begin != state.next) {
    state.written.emplace(begin, end);
    // Who is at work looks here before going; and before a gap there is nothing to do.
    return false;
  }
  state.is_at_work = true;
  lock.unlock();
  // Nobody else touches sha and next while is_at_work.
  state.sha.update(data, end - begin);
  Buffer buffer;
  for (;;) {
    lock.lock();
    state.next = end;
    const auto following = state.written.begin();
    if (following == state.written.end() || following->first != end) break;
    begin = end;
    end = following->second;
    state.written.erase(following);
    lock.unlock();
    while (begin < end) {
      if (is_cancelled) throw Cancelled();
      const int64_t piece = std::min(kPieceBytes, end - begin);
      const int64_t offset = state.range.offset_bytes + begin;
      std::byte* const memory = buffer.reserve(kPieceBytes, offset);
      file.pread_exact(memory, piece, offset);
      state.sha.update(memory, piece);
      begin += piece;
    }
  }
  state.is_at_work = false;
  const bool is_whole = state.next == state.range.num_bytes;
  if (is_whole) state.digest = state.sha.finish();
  return is_whole;
}

std::vector<Sha256::Digest> HashedRanges::digests() const {
  std::vector<Sha256::Digest> digests;
  for (size_t i = 0; i < num_states_; ++i) digests.push_back(states_[i].digest);
  return digests;
}

}  // namespace nanotron_fast
