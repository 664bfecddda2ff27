#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "core/error.h"

namespace nanotron_fast {

namespace {

std::string name_of(const Folder& folder, const std::string& path) {
  return folder.path.empty() ? path : folder.path + "/" + path;
}

int open_or_throw(const Folder& folder, const std::string& path, int flags) {
  int descriptor;
  do {
    descriptor = ::openat(folder.descriptor, path.c_str(), flags | O_CLOEXEC, 0666);
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) throw IoError(errno, name_of(folder, path));
  return descriptor;
}

#ifdef __APPLE__
int64_t mtime_ns(const struct stat& status) {
  return status.st_mtimespec.tv_sec * int64_t{1000000000} + status.st_mtimespec.tv_nsec;
}
#else
int64_t mtime_ns(const struct stat& status) {
  return status.st_mtim.tv_sec * int64_t{1000000000} + status.st_mtim.tv_nsec;
}
#endif

// Throws ChangedError unless it is the file that was planned with.
void check_state(int descriptor, const SourceFile& source) {
  struct stat status;
  if (::fstat(descriptor, &status) != 0) throw IoError(errno, source.path);
  const FileState& then = *source.state;
  if (static_cast<int64_t>(status.st_dev) != then.device ||
      static_cast<int64_t>(status.st_ino) != then.inode) {
    throw ChangedError(source.path + ": another file has taken its place since the plan was made");
  }
  if (status.st_size != then.size_bytes) {
    throw ChangedError(source.path + ": it had " + std::to_string(then.size_bytes) +
                       " bytes when the plan was made, and has " + std::to_string(status.st_size));
  }
  if (mtime_ns(status) != then.mtime_ns) {
    throw ChangedError(source.path + ": it was written to since the plan was made");
  }
}

}  // namespace

File File::open_for_reading(const SourceFile& source) {
  File file(open_or_throw({AT_FDCWD, ""}, source.path, O_RDONLY), source.path);
  if (source.state) check_state(file.descriptor_, source);
  return file;
}

File File::open_for_reading(const Folder& folder, const std::string& path) {
  return File(open_or_throw(folder, path, O_RDONLY), name_of(folder, path));
}

File File::create(const Folder& folder, const std::string& path) {
  return File(open_or_throw(folder, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW),
              name_of(folder, path));
}

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(path_, other.path_);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

int64_t File::size_bytes() const {
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) throw IoError(errno, path_);
  return status.st_size;
}

void File::pread_exact(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) const {
  while (num_bytes > 0) {
    const ssize_t got =
        ::pread(descriptor_, destination, static_cast<size_t>(num_bytes), offset_bytes);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw IoError(errno, path_);
    // The plan was made from this file's header: if bytes are missing now, it shrank since.
    if (got == 0) {
      throw ChangedError(path_ + ": it ends at byte " + std::to_string(offset_bytes) +
                         ", and was longer when the plan was made");
    }
    destination += got;
    num_bytes -= got;
    offset_bytes += got;
  }
}

void File::pwrite_exact(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) const {
  while (num_bytes > 0) {
    const ssize_t put = ::pwrite(descriptor_, source, static_cast<size_t>(num_bytes), offset_bytes);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw IoError(errno, path_);
    source += put;
    num_bytes -= put;
    offset_bytes += put;
  }
}

void File::start_writeback() const noexcept {
#ifdef __linux__
  ::sync_file_range(descriptor_, 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
}

void File::write_back(int64_t offset_bytes, int64_t num_bytes) const {
#ifdef __linux__
  constexpr unsigned kAll =
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (::sync_file_range(descriptor_, offset_bytes, num_bytes, kAll) == 0) return;
  // The system tells of a device's error once, so that sync() would not see it again. A system that
  // does not know this call has told of nothing.
  if (errno != ENOSYS && errno != EINVAL && errno != ESPIPE) throw IoError(errno, path_);
#else
  (void)offset_bytes;
  (void)num_bytes;
#endif
}

void File::sync() const {
  if (::fsync(descriptor_) != 0) throw IoError(errno, path_);
}

void File::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (descriptor >= 0 && ::close(descriptor) != 0 && errno != EINTR) throw IoError(errno, path_);
}

}  // namespace nanotron_fast
