// Past the page cache. The device takes whole pages at places that are multiples of a page, from
// memory that is aligned likewise; what a transfer has besides at its two ends goes through the
// page cache, which the kernel keeps in step with the pages beside it.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "core/buffer.h"
#include "core/calls.h"
#include "core/error.h"
#include "core/transfer.h"

namespace nanotron_fast {

namespace {

int64_t page_down(int64_t offset) { return offset - offset % kPageBytes; }
int64_t page_up(int64_t offset) { return page_down(offset + kPageBytes - 1); }

bool is_aligned(const std::byte* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % kPageBytes == 0;
}

class Direct : public Transfer {
 public:
  Direct(int descriptor, int direct, std::string path, IoPolicy& policy)
      : descriptor_(descriptor), direct_(direct), path_(std::move(path)), policy_(policy) {}
  ~Direct() override { ::close(direct_); }

  Outcome read(std::byte* destination, int64_t num_bytes, int64_t offset_bytes) override {
    // The pages around a short read are what the next ones want: they may come from the cache.
    if (num_bytes < kShortBytes) {
      return read_all(descriptor_, path_, destination, num_bytes, offset_bytes);
    }
    Outcome total;
    AlignedMemory bounce;
    while (total.num_bytes < num_bytes) {
      const int64_t at = offset_bytes + total.num_bytes, left = num_bytes - total.num_bytes;
      std::byte* const to = destination + total.num_bytes;
      const int64_t begin = page_down(at);
      const int64_t end = std::min(page_up(at + left), begin + kBounceBytes);
      const int64_t wanted = std::min(end - at, left);
      const bool fits = is_aligned(to) && begin == at && end <= at + left;
      if (!fits && bounce == nullptr) bounce = aligned_memory(kBounceBytes);
      std::byte* const memory = fits ? to : bounce.get();
      const int64_t got =
          is_refused_ ? 0 : calls::read_at(direct_, path_, memory, end - begin, begin);
      if (got < 0 && !is_refusal(static_cast<int>(-got))) {
        total.error_number = static_cast<int>(-got);
        break;
      }
      const int64_t useful = std::clamp<int64_t>(got - (at - begin), 0, wanted);
      if (!fits && useful > 0) {
        std::memcpy(to, memory + (at - begin), static_cast<size_t>(useful));
      }
      total.num_bytes += useful;
      if (useful == wanted) continue;
      // A file that does not end with a page, or a read that came short.
      const Outcome rest = read_all(descriptor_, path_, to + useful, wanted - useful, at + useful);
      total.num_bytes += rest.num_bytes;
      if (rest.num_bytes < wanted - useful) {
        total.error_number = rest.error_number;
        break;
      }
    }
    return total;
  }

  Outcome write(const std::byte* source, int64_t num_bytes, int64_t offset_bytes) override {
    // A header, a norm's weights: the device would be waited for each time.
    if (num_bytes < kShortBytes) {
      return write_all(descriptor_, path_, source, num_bytes, offset_bytes);
    }
    const int64_t end = offset_bytes + num_bytes;
    const int64_t first_page = std::min(page_up(offset_bytes), end);
    const int64_t last_page = std::max(page_down(end), first_page);
    Outcome total;
    const auto cached_until = [&](int64_t until) {
      const int64_t at = offset_bytes + total.num_bytes;
      const Outcome part = write_all(descriptor_, path_, source + total.num_bytes, until - at, at);
      total.num_bytes += part.num_bytes;
      total.error_number = part.error_number;
      return part.error_number == 0;
    };
    if (!cached_until(first_page)) return total;
    AlignedMemory bounce;
    while (!is_refused_ && offset_bytes + total.num_bytes < last_page) {
      const int64_t at = offset_bytes + total.num_bytes;
      const std::byte* from = source + total.num_bytes;
      const int64_t wanted = std::min(last_page - at, kBounceBytes);
      if (!is_aligned(from)) {
        if (bounce == nullptr) bounce = aligned_memory(kBounceBytes);
        std::memcpy(bounce.get(), from, static_cast<size_t>(wanted));
        from = bounce.get();
      }
      const int64_t put = calls::write_at(direct_, path_, from, wanted, at);
      if (put < 0 && !is_refusal(static_cast<int>(-put))) {
        total.error_number = static_cast<int>(-put);
        return total;
      }
      total.num_bytes += std::max<int64_t>(put, 0);
      // A write that came short within a page: the rest of the page, and on from there.
      const int64_t reached = offset_bytes + total.num_bytes;
      if (reached % kPageBytes != 0 && !cached_until(page_up(reached))) return total;
    }
    cached_until(end);
    return total;
  }

 private:
  static constexpr int64_t kShortBytes = int64_t{64} << 10;

  // Whether the file system does not do this at all; the page cache is taken from then on.
  bool is_refusal(int error) {
    if (error != EINVAL && error != EOPNOTSUPP) return false;
    is_refused_ = true;
    policy_.add_refusal(path_, error, "it goes through the page cache");
    return true;
  }

  const int descriptor_;  // through the page cache
  const int direct_;
  const std::string path_;
  IoPolicy& policy_;
  std::atomic<bool> is_refused_{false};
};

}  // namespace

std::unique_ptr<Transfer> make_direct([[maybe_unused]] int descriptor, const std::string& path,
                                      IoPolicy& policy) {
#ifdef O_DIRECT
  // The same file again, whatever its name stands for by now.
  const int access = ::fcntl(descriptor, F_GETFL) & O_ACCMODE;
  const std::string name = "/proc/self/fd/" + std::to_string(descriptor);
  const int direct = calls::open_at(AT_FDCWD, name, access | O_DIRECT, path);
  if (direct >= 0) return std::make_unique<Direct>(descriptor, direct, path, policy);
  // That it cannot be opened so; or, with no /proc, not in this way. Else a failure like any other.
  constexpr int kRefusals[] = {EINVAL, EOPNOTSUPP, ENOENT, EACCES, EPERM};
  if (std::find(std::begin(kRefusals), std::end(kRefusals), -direct) == std::end(kRefusals)) {
    throw IoError(-direct, path);
  }
  policy.add_refusal(path, -direct, "it goes through the page cache");
#else
  policy.add_refusal(path, EOPNOTSUPP, "it goes through the page cache");
#endif
  return nullptr;
}

}  // namespace nanotron_fast
