#include "core/buffer.h"

#include <new>

namespace nanotron_fast {

namespace {

constexpr int64_t kAlignmentBytes = 64;

// Within a page, halfway from where bytes are read to where they are written: 65 to 2239 bytes
// behind the first, and likewise before the second.
int64_t halfway(int64_t read_offset, int64_t write_offset) {
  const int64_t between = (write_offset - read_offset) & (kPageBytes - 1);
  int64_t step = between / 2;
  if (step < 2 * kAlignmentBytes) step += kPageBytes / 2;
  const int64_t place = (read_offset + step) & (kPageBytes - 1);
  return place - place % kAlignmentBytes;
}

}  // namespace

AlignedMemory aligned_memory(int64_t num_bytes) {
  void* pointer = nullptr;
  if (::posix_memalign(&pointer, kPageBytes, static_cast<size_t>(num_bytes)) != 0) {
    throw std::bad_alloc();
  }
  return AlignedMemory(static_cast<std::byte*>(pointer));
}

std::byte* Buffer::reserve(int64_t num_bytes, int64_t read_offset, int64_t write_offset) {
  if (num_bytes > capacity_bytes_) {
    data_.reset();  // first, so that the two are never held at once
    capacity_bytes_ = 0;
    data_ = aligned_memory(num_bytes + kSlackBytes);
    capacity_bytes_ = num_bytes;
  }
  // As in the file that is written: what is read may begin anywhere in its page.
  const int64_t place =
      io_ == IoMode::kDirect ? write_offset & (kPageBytes - 1) : halfway(read_offset, write_offset);
  return data_.get() + place;
}

}  // namespace nanotron_fast
