#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

namespace nanotron_fast {

// How the bytes of files pass between them and memory: through the page cache; past it; or through
// it without staying there.
enum class IoMode { kBuffered, kDirect, kDontCache };

// Throws std::invalid_argument on a name other than buffered, direct and dontcache.
IoMode parse_io_mode(const std::string& name);

// The mode of a run, and where a file system refused it. Used from many threads.
class IoPolicy {
 public:
  explicit IoPolicy(IoMode mode) : mode_(mode) {}
  IoMode mode() const { return mode_; }
  // A file takes the next best way instead, because the system gave this errno.
  void add_refusal(const std::string& path, int error_number, const std::string& instead);
  // The first refusal in words; empty where there was none.
  std::string refusal() const;

 private:
  const IoMode mode_;
  mutable std::mutex mutex_;
  std::string refusal_;
};

// How far a transfer came: all bytes, or up to an errno, or (where that is 0) up to the file's end.
struct Outcome {
  int64_t num_bytes = 0;
  int error_number = 0;
};

// Through the page cache; `flags` are the kernel's for each call.
Outcome read_all(int descriptor, const std::string& path, std::byte* destination, int64_t num_bytes,
                 int64_t offset_bytes, int flags = 0);
Outcome write_all(int descriptor, const std::string& path, const std::byte* source,
                  int64_t num_bytes, int64_t offset_bytes, int flags = 0);

// Carries bytes of one open file in some other way. May be used from many threads.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual Outcome read(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) = 0;
  virtual Outcome write(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) = 0;
  // After the last write. Returns an errno, or 0.
  virtual int finish() { return 0; }
};

// The memory that one direct transfer may take besides, for what is not aligned.
constexpr int64_t kBounceBytes = int64_t{1} << 20;

// For an open file. nullptr stands for through the page cache. The policy, which may be nullptr,
// outlives the file.
std::unique_ptr<Transfer> make_transfer(int descriptor, const std::string& path, IoPolicy* policy);

// One each, called by make_transfer. nullptr where the file cannot be opened so.
std::unique_ptr<Transfer> make_direct(int descriptor, const std::string& path, IoPolicy& policy);
std::unique_ptr<Transfer> make_uncached(int descriptor, const std::string& path, IoPolicy& policy);

}  // namespace nanotron_fast
