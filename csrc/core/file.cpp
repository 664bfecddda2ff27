#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "core/calls.h"
#include "core/error.h"

namespace nanotron_fast {

namespace {

std::string name_of(const Folder& folder, const std::string& path) {
  return folder.path.empty() ? path : folder.path + "/" + path;
}

int open_or_throw(const Folder& folder, const std::string& path, int flags) {
  const std::string name = name_of(folder, path);
  const int descriptor = calls::open_at(folder.descriptor, path, flags, name);
  if (descriptor < 0) throw IoError(-descriptor, name);
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

File File::open_for_reading(const SourceFile& source, IoPolicy* policy) {
  File file(open_or_throw({AT_FDCWD, ""}, source.path, O_RDONLY), source.path);
  if (source.state) check_state(file.descriptor_, source);
  file.transfer_ = make_transfer(file.descriptor_, file.path_, policy);
  return file;
}

File File::open_for_reading(const Folder& folder, const std::string& path) {
  return File(open_or_throw(folder, path, O_RDONLY), name_of(folder, path));
}

File File::create(const Folder& folder, const std::string& path, IoPolicy* policy) {
  File file(open_or_throw(folder, path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW),
            name_of(folder, path));
  file.transfer_ = make_transfer(file.descriptor_, file.path_, policy);
  return file;
}

File File::open_for_writing(const Folder& folder, const std::string& path, IoPolicy* policy) {
  File file(open_or_throw(folder, path, O_RDWR | O_NOFOLLOW), name_of(folder, path));
  file.transfer_ = make_transfer(file.descriptor_, file.path_, policy);
  return file;
}

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)),
      path_(std::move(other.path_)),
      transfer_(std::move(other.transfer_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(path_, other.path_);
  std::swap(transfer_, other.transfer_);
  return *this;
}

File::~File() {
  transfer_.reset();
  if (descriptor_ >= 0) ::close(descriptor_);
}

int64_t File::size_bytes() const {
  struct stat status;
  if (::fstat(descriptor_, &status) != 0) throw IoError(errno, path_);
  return status.st_size;
}

void File::pread_exact(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) const {
  const Outcome outcome = transfer_ == nullptr
                              ? read_all(descriptor_, path_, destination, num_bytes, offset_bytes)
                              : transfer_->read(destination, num_bytes, offset_bytes);
  if (outcome.error_number != 0) throw IoError(outcome.error_number, path_);
  // The plan was made from this file's header: if bytes are missing now, it shrank since.
  if (outcome.num_bytes < num_bytes) {
    throw ChangedError(path_ + ": it ends at byte " +
                       std::to_string(offset_bytes + outcome.num_bytes) +
                       ", and was longer when the plan was made");
  }
}

void File::pwrite_exact(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) const {
  const Outcome outcome = transfer_ == nullptr
                              ? write_all(descriptor_, path_, source, num_bytes, offset_bytes)
                              : transfer_->write(source, num_bytes, offset_bytes);
  if (outcome.error_number != 0) throw IoError(outcome.error_number, path_);
}

void File::start_writeback() const {
  throw_unless_unknown(calls::write_back(descriptor_, path_, 0, 0, false));
}

void File::write_back(int64_t offset_bytes, int64_t num_bytes) const {
  throw_unless_unknown(calls::write_back(descriptor_, path_, offset_bytes, num_bytes, true));
}

// The system tells of a device's error once, so that sync() would not see it again. A system that
// does not know the call has told of nothing.
void File::throw_unless_unknown(int result) const {
  if (result == 0 || result == -ENOSYS || result == -EINVAL || result == -ESPIPE) return;
  throw IoError(-result, path_);
}

void File::sync() const {
  const int result = calls::sync(descriptor_, path_);
  if (result < 0) throw IoError(-result, path_);
}

void File::close() {
  if (!is_open()) return;
  const int unfinished = transfer_ == nullptr ? 0 : transfer_->finish();
  transfer_.reset();
  // One that a signal interrupted has closed all the same.
  const int result = calls::close(std::exchange(descriptor_, -1), path_);
  if (unfinished != 0) throw IoError(unfinished, path_);
  if (result < 0 && result != -EINTR) throw IoError(-result, path_);
}

}  // namespace nanotron_fast
