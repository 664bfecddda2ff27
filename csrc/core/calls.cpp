#include "core/calls.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "core/failure_point.h"

namespace nanotron_fast::calls {

namespace {

// Does a call, or what a failure point says. `carry(num_bytes)` is the call with that many bytes.
template <typename Carry>
int64_t attempt(Call call, const std::string& path, int64_t num_bytes, const Carry& carry) {
  for (;;) {
    const Failure failure = failure_of(call, path);
    int64_t wanted = num_bytes;
    if (failure.kind == Failure::Kind::kOneByte) wanted = std::min<int64_t>(num_bytes, 1);
    if (failure.kind == Failure::Kind::kHalf) wanted = (num_bytes + 1) / 2;
    const bool is_injected = failure.kind == Failure::Kind::kError;
    const int64_t result = is_injected ? -1 : carry(static_cast<size_t>(wanted));
    if (result >= 0) return result;
    const int error = is_injected ? failure.error_number : errno;
    if (error != EINTR) return -error;
  }
}

}  // namespace

int open_at(int folder, const std::string& name, int flags, const std::string& path) {
  return static_cast<int>(attempt(Call::kOpen, path, 0, [&](size_t) {
    return ::openat(folder, name.c_str(), flags | O_CLOEXEC, 0666);
  }));
}

int64_t read_at(int descriptor, const std::string& path, std::byte* destination, int64_t num_bytes,
                int64_t offset_bytes, int flags) {
  return attempt(Call::kRead, path, num_bytes, [&](size_t count) -> ssize_t {
    if (flags == 0) return ::pread(descriptor, destination, count, offset_bytes);
#ifdef __linux__
    const iovec part{destination, count};
    return ::preadv2(descriptor, &part, 1, offset_bytes, flags);
#else
    errno = EOPNOTSUPP;
    return -1;
#endif
  });
}

int64_t write_at(int descriptor, const std::string& path, const std::byte* source,
                 int64_t num_bytes, int64_t offset_bytes, int flags) {
  return attempt(Call::kWrite, path, num_bytes, [&](size_t count) -> ssize_t {
    if (flags == 0) return ::pwrite(descriptor, source, count, offset_bytes);
#ifdef __linux__
    const iovec part{const_cast<std::byte*>(source), count};
    return ::pwritev2(descriptor, &part, 1, offset_bytes, flags);
#else
    errno = EOPNOTSUPP;
    return -1;
#endif
  });
}

int write_back([[maybe_unused]] int descriptor, const std::string& path,
               [[maybe_unused]] int64_t offset_bytes, [[maybe_unused]] int64_t num_bytes,
               [[maybe_unused]] bool waits) {
  return static_cast<int>(attempt(Call::kWriteback, path, 0, [&](size_t) {
#ifdef __linux__
    constexpr unsigned kWaits = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WAIT_AFTER;
    return ::sync_file_range(descriptor, offset_bytes, num_bytes,
                             SYNC_FILE_RANGE_WRITE | (waits ? kWaits : 0));
#else
    errno = ENOSYS;
    return -1;
#endif
  }));
}

int sync(int descriptor, const std::string& path) {
  return static_cast<int>(
      attempt(Call::kSync, path, 0, [&](size_t) { return ::fsync(descriptor); }));
}

int close(int descriptor, const std::string& path) {
  const Failure failure = failure_of(Call::kClose, path);
  const int result = ::close(descriptor) == 0 ? 0 : -errno;
  if (failure.kind == Failure::Kind::kError) return -failure.error_number;
  return result;
}

void drop_cache([[maybe_unused]] int descriptor, [[maybe_unused]] int64_t offset_bytes,
                [[maybe_unused]] int64_t num_bytes) {
#ifdef POSIX_FADV_DONTNEED
  ::posix_fadvise(descriptor, offset_bytes, num_bytes, POSIX_FADV_DONTNEED);
#endif
}

}  // namespace nanotron_fast::calls
