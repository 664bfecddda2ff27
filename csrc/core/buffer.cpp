#include "core/buffer.h"

#include <new>

namespace nanotron_fast {

namespace {

// A cache line: it leads out of the slow places with room to spare.
constexpr int64_t kStepBytes = 64;

// Whether a copy is slow, by what is left of two addresses within their pages.
bool is_slow(int64_t to, int64_t from) {
  const int64_t behind = ((to - from) % kPageBytes + kPageBytes) % kPageBytes;
  return behind > 0 && behind < kStepBytes;
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
  // A step out of the one's way may lead into the other's, and a second one out of both.
  int64_t place = 0;
  while (is_slow(place, read_offset) || is_slow(write_offset, place)) place += kStepBytes;
  return data_.get() + place;
}

}  // namespace nanotron_fast
