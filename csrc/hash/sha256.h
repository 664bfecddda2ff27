#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nanotron_fast {

// Takes whole blocks of 64 bytes into a state of eight words (FIPS 180-4, section 6.2.2).
using Sha256Compress = void (*)(uint32_t state[8], const std::byte* blocks, int64_t num_blocks);

enum class Sha256Level { kScalar, kShaNi };

// Those that this processor can run, slowest first.
std::vector<Sha256Level> supported_sha256_levels();
const char* name_of(Sha256Level level);
// Throws std::invalid_argument on an unknown name or one that this processor cannot run.
Sha256Level parse_sha256_level(const std::string& name);

// The SHA-256 of bytes that come piece by piece.
class Sha256 {
 public:
  static constexpr size_t kBlockBytes = 64;
  using Digest = std::array<std::byte, 32>;

  // By default with the fastest that this processor can run.
  Sha256();
  explicit Sha256(Sha256Level level);

  void update(const std::byte* data, int64_t num_bytes);
  // Of everything so far; nothing may follow.
  Digest finish();

 private:
  Sha256Compress compress_;
  std::array<uint32_t, 8> state_;
  std::array<std::byte, kBlockBytes> rest_;  // the first bytes of a block that is not whole yet
  size_t rest_bytes_ = 0;
  uint64_t num_bytes_ = 0;
};

std::string to_hex(const Sha256::Digest& digest);

}  // namespace nanotron_fast
