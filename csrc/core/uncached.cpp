// Through the page cache without staying there: by a flag of the kernel's (Linux 6.14), and where
// the file system does not know it by asking, after each stretch, to forget what was carried.

#include <atomic>
#include <cerrno>

#include "core/buffer.h"
#include "core/calls.h"
#include "core/transfer.h"

namespace nanotron_fast {

namespace {

// Dirty bytes that one file may have before they are waited for.
constexpr int64_t kStretchBytes = int64_t{32} << 20;

class Uncached : public Transfer {
 public:
  Uncached(int descriptor, std::string path, IoPolicy& policy)
      : descriptor_(descriptor), path_(std::move(path)), policy_(policy) {}

  ~Uncached() override {
    if (!knows_flag_) calls::drop_cache(descriptor_, 0, 0);
  }

  Outcome read(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) override {
    if (knows_flag_) {
      const Outcome outcome =
          read_all(descriptor_, path_, destination, num_bytes, offset_bytes, calls::kDontCache);
      if (!is_refused(outcome)) return outcome;
    }
    const Outcome outcome = read_all(descriptor_, path_, destination, num_bytes, offset_bytes);
    // With the page of which the read before took the first part.
    const int64_t begin = offset_bytes - offset_bytes % kPageBytes;
    calls::drop_cache(descriptor_, begin, offset_bytes + num_bytes - begin);
    return outcome;
  }

  Outcome write(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) override {
    if (knows_flag_) {
      const Outcome outcome =
          write_all(descriptor_, path_, source, num_bytes, offset_bytes, calls::kDontCache);
      if (!is_refused(outcome)) return outcome;
    }
    Outcome outcome = write_all(descriptor_, path_, source, num_bytes, offset_bytes);
    const int64_t before = num_written_.fetch_add(num_bytes);
    if (outcome.error_number == 0 &&
        before / kStretchBytes != (before + num_bytes) / kStretchBytes) {
      outcome.error_number = forget();
    }
    return outcome;
  }

  int finish() override { return knows_flag_ || num_written_ == 0 ? 0 : forget(); }

 private:
  // Whether the flag is what was wrong; nothing was carried then.
  bool is_refused(const Outcome& outcome) {
    const int error = outcome.error_number;
    if (outcome.num_bytes > 0 || (error != EOPNOTSUPP && error != EINVAL && error != ENOSYS)) {
      return false;
    }
    knows_flag_ = false;
    policy_.add_refusal(path_, error, "what is carried is dropped from the page cache afterwards");
    return true;
  }

  // An errno of the device's, or 0.
  int forget() const {
    const int result = calls::write_back(descriptor_, path_, 0, 0, true);
    calls::drop_cache(descriptor_, 0, 0);
    const bool is_unknown = result == -ENOSYS || result == -EINVAL || result == -ESPIPE;
    return is_unknown ? 0 : -result;
  }

  const int descriptor_;
  const std::string path_;
  IoPolicy& policy_;
  std::atomic<bool> knows_flag_{true};
  std::atomic<int64_t> num_written_{0};
};

}  // namespace

std::unique_ptr<Transfer> make_uncached(int descriptor, const std::string& path, IoPolicy& policy) {
  return std::make_unique<Uncached>(descriptor, path, policy);
}

}  // namespace nanotron_fast
