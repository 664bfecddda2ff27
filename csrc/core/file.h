#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "core/transfer.h"

namespace nanotron_fast {

// What tells a file from another one under its name, and from itself before it was written to.
struct FileState {
  int64_t device, inode, size_bytes, mtime_ns;
};

// A file to be read, and what it must still be whenever it is opened.
struct SourceFile {
  SourceFile(std::string where) : path(std::move(where)) {}
  SourceFile(std::string where, const FileState& then) : path(std::move(where)), state(then) {}
  std::string path;
  std::optional<FileState> state;
};

// A folder that is held open, so that no other takes its place. Its path is for messages.
struct Folder {
  int descriptor;
  std::string path;
};

// An open file descriptor that closes itself. Reads and writes are positioned, so one File may be
// used from many threads.
class File {
 public:
  // A policy says how bytes pass, by default through the page cache, and outlives the file.
  // Throws IoError, and ChangedError where it is no longer the file that it should be.
  static File open_for_reading(const SourceFile& source, IoPolicy* policy = nullptr);
  // By a path from the folder.
  static File open_for_reading(const Folder& folder, const std::string& path);
  // Creates the file; one that is there already is an error.
  static File create(const Folder& folder, const std::string& path, IoPolicy* policy = nullptr);
  // A file that is there, to write to some of its bytes; the others stay as they are.
  static File open_for_writing(const Folder& folder, const std::string& path,
                               IoPolicy* policy = nullptr);

  File() = default;
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  bool is_open() const { return descriptor_ >= 0; }
  int64_t size_bytes() const;

  // Fills destination or throws IoError; a file that ends early is an error.
  void pread_exact(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) const;
  // Writes all of source or throws IoError.
  void pwrite_exact(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) const;

  // Asks the kernel to start writing dirty pages out, and does not wait.
  void start_writeback() const;
  // Returns once these bytes have been written out, as far as the system can say so.
  void write_back(int64_t offset_bytes, int64_t num_bytes) const;
  // Returns once data and metadata are on the device.
  void sync() const;
  // Closes and reports what close() reports (some file systems tell of a full disk only here).
  void close();

 private:
  File(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}
  void throw_unless_unknown(int result) const;

  int descriptor_ = -1;
  std::string path_;
  std::unique_ptr<Transfer> transfer_;  // nullptr: through the page cache
};

}  // namespace nanotron_fast
