#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace nanotron_fast {

// An open file descriptor that closes itself. Reads and writes are positioned, so one File may be
// used from many threads.
class File {
 public:
  static File open_for_reading(const std::string& path);
  // Creates the file, or empties the one that is there.
  static File create(const std::string& path);

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
  void start_writeback() const noexcept;
  // Returns once these bytes have been written out, as far as the system can say so.
  void write_back(int64_t offset_bytes, int64_t num_bytes) const;
  // Returns once data and metadata are on the device.
  void sync() const;
  // Closes and reports what close() reports (some file systems tell of a full disk only here).
  void close();

 private:
  File(int descriptor, std::string path) : descriptor_(descriptor), path_(std::move(path)) {}

  int descriptor_ = -1;
  std::string path_;
};

}  // namespace nanotron_fast
