#include "core/transfer.h"

#include <stdexcept>
#include <system_error>

#include "core/calls.h"

namespace nanotron_fast {

IoMode parse_io_mode(const std::string& name) {
  if (name == "buffered") return IoMode::kBuffered;
  if (name == "direct") return IoMode::kDirect;
  if (name == "dontcache") return IoMode::kDontCache;
  throw std::invalid_argument("I/O mode '" + name + "': choose buffered, direct or dontcache");
}

void IoPolicy::add_refusal(const std::string& path, int error_number, const std::string& instead) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!refusal_.empty()) return;
  refusal_ = path + ": " + std::generic_category().message(error_number) + "; " + instead;
}

std::string IoPolicy::refusal() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return refusal_;
}

Outcome read_all(int descriptor, const std::string& path, std::byte* destination, int64_t num_bytes,
                 int64_t offset_bytes, int flags) {
  Outcome outcome;
  while (outcome.num_bytes < num_bytes) {
    const int64_t got =
        calls::read_at(descriptor, path, destination + outcome.num_bytes,
                       num_bytes - outcome.num_bytes, offset_bytes + outcome.num_bytes, flags);
    if (got < 0) outcome.error_number = static_cast<int>(-got);
    if (got <= 0) break;
    outcome.num_bytes += got;
  }
  return outcome;
}

Outcome write_all(int descriptor, const std::string& path, const std::byte* source,
                  int64_t num_bytes, int64_t offset_bytes, int flags) {
  Outcome outcome;
  while (outcome.num_bytes < num_bytes) {
    const int64_t put =
        calls::write_at(descriptor, path, source + outcome.num_bytes, num_bytes - outcome.num_bytes,
                        offset_bytes + outcome.num_bytes, flags);
    if (put < 0) {
      outcome.error_number = static_cast<int>(-put);
      break;
    }
    outcome.num_bytes += put;
  }
  return outcome;
}

std::unique_ptr<Transfer> make_transfer(int descriptor, const std::string& path, IoPolicy* policy) {
  const IoMode mode = policy == nullptr ? IoMode::kBuffered : policy->mode();
  if (mode == IoMode::kDirect) return make_direct(descriptor, path, *policy);
  if (mode == IoMode::kDontCache) return make_uncached(descriptor, path, *policy);
  return nullptr;
}

}  // namespace nanotron_fast
