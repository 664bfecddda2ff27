#include "core/outputs.h"

#include <algorithm>

#include "core/error.h"
#include "core/pool.h"

namespace nanotron_fast {

namespace {

// Bytes that a device should take in well under a second.
constexpr int64_t kSyncBytes = int64_t{64} << 20;

}  // namespace

Outputs::Outputs(const Folder& root, const std::vector<OutputFile>& files, const Schedule& schedule,
                 bool sync, IoPolicy& policy, Progress& progress)
    : root_(root),
      files_(files),
      states_(files.size()),
      block_bytes_(schedule.block_bytes),
      sync_(sync),
      policy_(policy),
      progress_(progress) {
  for (const Job& job : schedule.jobs) {
    for (const View& view : job.destinations) {
      states_[static_cast<size_t>(view.file)].parts_left += job.num_blocks;
    }
  }
  for (size_t i = 0; i < files_.size(); ++i) {
    if (files_[i].hashed.empty()) continue;
    states_[i].hashed = std::make_unique<HashedRanges>(files_[i].hashed);
    states_[i].parts_left += states_[i].hashed->num_open();
  }
}

void Outputs::create_empty() {
  std::vector<char> has_blocks(files_.size());
  for (size_t i = 0; i < files_.size(); ++i) {
    const auto& hashed = states_[i].hashed;
    has_blocks[i] = states_[i].parts_left > (hashed == nullptr ? 0 : hashed->num_open());
  }
  for (size_t i = 0; i < files_.size(); ++i) {
    if (has_blocks[i]) continue;
    open(i);
    if (states_[i].parts_left == 0) finish(i);
  }
}

void Outputs::write(int64_t index, const std::byte* data, int64_t num_bytes, int64_t offset_bytes) {
  const auto i = static_cast<size_t>(index);
  State& state = states_[i];
  const File& file = open(i);
  int64_t num_done = 1;
  while (num_bytes > 0) {
    const int64_t piece = std::min(num_bytes, block_bytes_ - offset_bytes % block_bytes_);
    file.pwrite_exact(data, piece, offset_bytes);
    if (state.hashed != nullptr) {
      num_done += state.hashed->add(file, data, piece, offset_bytes, progress_.is_cancelled);
    }
    data += piece;
    offset_bytes += piece;
    num_bytes -= piece;
  }
  if (state.parts_left.fetch_sub(num_done) == num_done) finish(i);
}

void Outputs::sync_all(int num_workers) {
  std::atomic<size_t> next{0};
  run_workers(num_workers, [&](int, const std::atomic<bool>& should_stop) {
    const auto check = [&] {
      if (progress_.is_cancelled) throw Cancelled();
    };
    for (size_t i; !should_stop && (i = next.fetch_add(1)) < files_.size();) {
      const File file = File::open_for_reading(root_, files_[i].path);
      for (int64_t offset = 0; offset < files_[i].size_bytes; offset += kSyncBytes) {
        check();
        file.write_back(offset, kSyncBytes);
      }
      check();
      file.sync();
    }
  });
}

const File& Outputs::open(size_t i) {
  State& state = states_[i];
  const std::lock_guard<std::mutex> lock(state.mutex);
  if (!state.file.is_open()) {
    state.file = files_[i].is_there ? File::open_for_writing(root_, files_[i].path, &policy_)
                                    : File::create(root_, files_[i].path, &policy_);
    for (const Literal& literal : files_[i].literals) {
      const auto* const data = reinterpret_cast<const std::byte*>(literal.bytes.data());
      const auto num_bytes = static_cast<int64_t>(literal.bytes.size());
      state.file.pwrite_exact(data, num_bytes, literal.offset_bytes);
      if (state.hashed != nullptr) {
        state.parts_left -= state.hashed->add(state.file, data, num_bytes, literal.offset_bytes,
                                              progress_.is_cancelled);
      }
    }
  }
  return state.file;
}

void Outputs::finish(size_t i) {
  State& state = states_[i];
  if (state.file.size_bytes() != files_[i].size_bytes) {
    throw PlanError(files_[i].path + ": the plan left " + std::to_string(state.file.size_bytes()) +
                    " of " + std::to_string(files_[i].size_bytes) + " bytes");
  }
  if (sync_) state.file.start_writeback();
  state.file.close();
  progress_.add_finished({static_cast<int64_t>(i), state.hashed == nullptr
                                                       ? std::vector<Sha256::Digest>()
                                                       : state.hashed->digests()});
}

}  // namespace nanotron_fast
