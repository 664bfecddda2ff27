#pragma once

#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "core/pack.h"
#include "random_plan.h"

namespace nanotron_fast {

// Memory for a plan: random sources, destinations as the plan wants them, both behind `shift` bytes
// so that nothing need be aligned, and of exactly the planned sizes so that a sanitizer sees a byte
// beyond them.
class Regions {
 public:
  explicit Regions(Plan& plan, int64_t shift = 0) : shift_(shift) {
    for (int i = 0; i < kNumFiles; ++i) {
      std::string bytes(static_cast<size_t>(plan.source_sizes[i]), '\0');
      for (char& byte : bytes) byte = static_cast<char>(plan.random());
      contents_.push_back(bytes);
      sources_.push_back(allocate(bytes));
      sizes_.push_back(plan.destination_sizes[i]);
    }
    expected_ = execute_naively(plan, contents_);
    before_ = expected_;
    for (int i = 0; i < kNumFiles; ++i) {
      before_[i].assign(static_cast<size_t>(sizes_[i]), '?');
      before_[i].replace(0, plan.headers[i].size(), plan.headers[i]);
    }
    clear_destinations();
  }

  void clear_destinations() {
    destinations_.clear();
    for (const std::string& bytes : before_) destinations_.push_back(allocate(bytes));
  }

  std::vector<Memory> sources() const {
    std::vector<Memory> result;
    for (size_t i = 0; i < sources_.size(); ++i) {
      result.push_back({sources_[i].get() + shift_, static_cast<int64_t>(contents_[i].size())});
    }
    return result;
  }
  std::vector<Memory> destinations() const {
    std::vector<Memory> result;
    for (size_t i = 0; i < destinations_.size(); ++i) {
      result.push_back({destinations_[i].get() + shift_, sizes_[i]});
    }
    return result;
  }

  void check_destinations() const {
    for (size_t i = 0; i < destinations_.size(); ++i) {
      const std::string found(reinterpret_cast<const char*>(destinations_[i].get()) + shift_,
                              static_cast<size_t>(sizes_[i]));
      CHECK(found == expected_[i]);
    }
  }

 private:
  std::unique_ptr<std::byte[]> allocate(const std::string& bytes) const {
    std::unique_ptr<std::byte[]> memory(new std::byte[bytes.size() + static_cast<size_t>(shift_)]);
    if (!bytes.empty()) std::memcpy(memory.get() + shift_, bytes.data(), bytes.size());
    return memory;
  }

  int64_t shift_;
  std::vector<std::string> contents_, expected_, before_;
  std::vector<int64_t> sizes_;
  std::vector<std::unique_ptr<std::byte[]>> sources_, destinations_;
};

}  // namespace nanotron_fast
