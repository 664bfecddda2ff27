#include "hash/sha256.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "hash/compress.h"

namespace nanotron_fast {

namespace {

// The first 32 bits of the fractional parts of the square roots of the first eight primes.
constexpr std::array<uint32_t, 8> kStart = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                            0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// Not by __builtin_cpu_supports: older compilers do not know this feature by name.
bool has_sha_ni() {
#if defined(__x86_64__)
  constexpr unsigned kShaBit = 1u << 29;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & kShaBit) != 0 &&
         __builtin_cpu_supports("sse4.1");
#else
  return false;
#endif
}

Sha256Compress compress_of([[maybe_unused]] Sha256Level level) {
#if defined(__x86_64__)
  if (level == Sha256Level::kShaNi) return compress_sha_ni;
#endif
  return compress_scalar;
}

}  // namespace

std::vector<Sha256Level> supported_sha256_levels() {
  std::vector<Sha256Level> levels{Sha256Level::kScalar};
  if (has_sha_ni()) levels.push_back(Sha256Level::kShaNi);
  return levels;
}

const char* name_of(Sha256Level level) {
  return level == Sha256Level::kShaNi ? "sha-ni" : "scalar";
}

Sha256Level parse_sha256_level(const std::string& name) {
  std::string supported;
  for (const Sha256Level level : supported_sha256_levels()) {
    if (name == name_of(level)) return level;
    supported += std::string(supported.empty() ? "" : ", ") + name_of(level);
  }
  throw std::invalid_argument("SHA-256 level '" + name + "': this processor has " + supported);
}

Sha256::Sha256() : Sha256(has_sha_ni() ? Sha256Level::kShaNi : Sha256Level::kScalar) {}

Sha256::Sha256(Sha256Level level) : compress_(compress_of(level)), state_(kStart) {}

void Sha256::update(const std::byte* data, int64_t num_bytes) {
  num_bytes_ += static_cast<uint64_t>(num_bytes);
  auto left = static_cast<size_t>(num_bytes);
  if (rest_bytes_ > 0) {
    const size_t taken = std::min(left, kBlockBytes - rest_bytes_);
    if (taken > 0) std::memcpy(rest_.data() + rest_bytes_, data, taken);
    rest_bytes_ += taken;
    data += taken;
    left -= taken;
    if (rest_bytes_ < kBlockBytes) return;
    compress_(state_.data(), rest_.data(), 1);
    rest_bytes_ = 0;
  }
  const size_t num_blocks = left / kBlockBytes;
  compress_(state_.data(), data, static_cast<int64_t>(num_blocks));
  rest_bytes_ = left % kBlockBytes;
  if (rest_bytes_ > 0) std::memcpy(rest_.data(), data + num_blocks * kBlockBytes, rest_bytes_);
}

Sha256::Digest Sha256::finish() {
  const uint64_t num_bits = num_bytes_ * 8;
  // One bit that is set, then zeros up to the length, which ends a block.
  std::array<std::byte, 2 * kBlockBytes> tail{};
  tail[0] = std::byte{0x80};
  const size_t zeros_from = rest_bytes_ + 1;
  const size_t padding =
      (zeros_from + 8 <= kBlockBytes ? kBlockBytes : 2 * kBlockBytes) - rest_bytes_ - 8;
  for (size_t i = 0; i < 8; ++i) {
    tail[padding + i] = static_cast<std::byte>(num_bits >> (56 - 8 * i) & 0xff);
  }
  update(tail.data(), static_cast<int64_t>(padding + 8));
  Digest digest;
  for (size_t i = 0; i < digest.size(); ++i) {
    digest[i] = static_cast<std::byte>(state_[i / 4] >> (24 - 8 * (i % 4)) & 0xff);
  }
  return digest;
}

std::string to_hex(const Sha256::Digest& digest) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const std::byte byte : digest) {
    text += kDigits[std::to_integer<int>(byte >> 4)];
    text += kDigits[std::to_integer<int>(byte & std::byte{0xf})];
  }
  return text;
}

}  // namespace nanotron_fast
