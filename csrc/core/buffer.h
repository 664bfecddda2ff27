#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "core/transfer.h"

namespace nanotron_fast {

constexpr int64_t kPageBytes = 4096;

struct Free {
  void operator()(std::byte* pointer) const { std::free(pointer); }
};

using AlignedMemory = std::unique_ptr<std::byte, Free>;

// Uninitialised memory that begins with a page. Throws std::bad_alloc.
AlignedMemory aligned_memory(int64_t num_bytes);

// Memory that grows, is not initialised, and lies where the kernel copies to and from files fast.
//
// The kernel copies with `rep movsb`. On AMD's Zen 3 and 4 that takes up to five times as long
// where target and source begin nearly alike in their pages: 1 to 31 bytes behind on one processor,
// 0 to 15 on another. The page cache keeps a byte at its offset in the file, and data mostly begin
// with a page; what malloc gives for a large piece lies 16 bytes behind a page's beginning.
//
// Past the page cache the kernel copies nothing where pages of the file lie on pages of memory.
class Buffer {
 public:
  // For files whose bytes pass so.
  explicit Buffer(IoMode io = IoMode::kBuffered) : io_(io) {}

  // The most that a place lies behind the memory's beginning.
  static constexpr int64_t kSlackBytes = kPageBytes;

  // For bytes read from a file's offset on and written to another's; valid until the next call.
  // Aligned to 64 bytes, but for files past the page cache.
  std::byte* reserve(int64_t num_bytes, int64_t read_offset, int64_t write_offset);
  // For bytes that are read or written, and not both.
  std::byte* reserve(int64_t num_bytes, int64_t offset) {
    return reserve(num_bytes, offset, offset);
  }

 private:
  IoMode io_;
  AlignedMemory data_;
  int64_t capacity_bytes_ = 0;
};

}  // namespace nanotron_fast
