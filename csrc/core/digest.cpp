#include "core/digest.h"

#include <algorithm>
#include <atomic>

#include "core/block.h"
#include "core/buffer.h"
#include "core/error.h"
#include "core/pool.h"

namespace nanotron_fast {

namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;

}  // namespace

std::vector<Sha256::Digest> digest(const std::vector<SourceFile>& files,
                                   const std::vector<FileRange>& ranges, int num_workers, IoMode io,
                                   Progress& progress) {
  for (const FileRange& each : ranges) {
    if (each.file < 0 || each.file >= static_cast<int64_t>(files.size()) ||
        each.range.offset_bytes < 0 || each.range.num_bytes < 0) {
      throw PlanError("a range of file " + std::to_string(each.file) + " of " +
                      std::to_string(files.size()) + " at byte " +
                      std::to_string(each.range.offset_bytes) + " with " +
                      std::to_string(each.range.num_bytes) + " bytes");
    }
  }
  std::vector<Sha256::Digest> digests(ranges.size());
  IoPolicy policy(io);
  std::atomic<size_t> next{0};
  run_workers(num_workers, [&](int, const std::atomic<bool>& should_stop) {
    SourceFiles open(files, policy);
    Buffer buffer(io);
    for (size_t i; !should_stop && (i = next.fetch_add(1)) < ranges.size();) {
      const File& file = open.get(ranges[i].file);
      const auto [offset, num_bytes] = ranges[i].range;
      Sha256 sha;
      for (int64_t done = 0; done < num_bytes;) {
        if (progress.is_cancelled) throw Cancelled();
        if (should_stop) return;
        const int64_t piece = std::min(kPieceBytes, num_bytes - done);
        std::byte* const memory = buffer.reserve(kPieceBytes, offset + done);
        file.pread_exact(memory, piece, offset + done);
        sha.update(memory, piece);
        done += piece;
        progress.bytes_done += piece;
      }
      digests[i] = sha.finish();
    }
  });
  return digests;
}

}  // namespace nanotron_fast
