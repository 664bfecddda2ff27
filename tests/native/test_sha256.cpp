// SHA-256 on every path: published digests, every length around a block, and any way to cut.

#include <random>
#include <stdexcept>

#include "check.h"
#include "hash/sha256.h"

using namespace nanotron_fast;

namespace {

std::string hash(const std::string& text, Sha256Level level, size_t piece_bytes = SIZE_MAX) {
  Sha256 sha(level);
  for (size_t at = 0; at < text.size(); at += std::min(piece_bytes, text.size() - at)) {
    const size_t num_bytes = std::min(piece_bytes, text.size() - at);
    sha.update(reinterpret_cast<const std::byte*>(text.data()) + at,
               static_cast<int64_t>(num_bytes));
  }
  return to_hex(sha.finish());
}

// The examples that NIST publishes with FIPS 180-4, and the empty message.
void test_known_digests(Sha256Level level) {
  CHECK(hash("", level) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(hash("abc", level) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", level) ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(hash(std::string(1'000'000, 'a'), level) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

void test_paths_agree_at_every_cut() {
  std::mt19937 random(5);
  for (size_t num_bytes = 0; num_bytes < 300; ++num_bytes) {
    std::string text(num_bytes, '\0');
    for (char& each : text) each = static_cast<char>(random());
    const std::string wanted = hash(text, Sha256Level::kScalar);
    for (const Sha256Level level : supported_sha256_levels()) {
      for (const size_t piece : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, num_bytes + 1}) {
        CHECK(hash(text, level, piece) == wanted);
      }
    }
  }
}

void test_names() {
  for (const Sha256Level level : supported_sha256_levels()) {
    CHECK(parse_sha256_level(name_of(level)) == level);
  }
  CHECK(contains(message_of<std::invalid_argument>([] { parse_sha256_level("md5"); }), "'md5'"));
}

}  // namespace

int main() {
  for (const Sha256Level level : supported_sha256_levels()) test_known_digests(level);
  test_paths_agree_at_every_cut();
  test_names();
}
