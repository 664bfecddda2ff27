#include "cast/scalar.h"

#include <array>

#include "cast/table.h"

namespace nanotron_fast {

namespace {

NANOTRON_FAST_CAST_LOOP(bfloat16_to_float32, uint16_t, uint32_t, )
NANOTRON_FAST_CAST_LOOP(bfloat16_to_float16, uint16_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float16_to_float32, uint16_t, uint32_t, )
NANOTRON_FAST_CAST_LOOP(float16_to_bfloat16, uint16_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float32_to_bfloat16, uint32_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float32_to_float16, uint32_t, uint16_t, )

template <Dtype kCode>
std::array<float, 256> table_of_values() {
  std::array<float, 256> values{};
  for (size_t byte = 0; byte < values.size(); ++byte) {
    values[byte] = scalar::value_of<kCode>(static_cast<uint8_t>(byte));
  }
  return values;
}

template <Dtype kCode, Dtype kDestination>
void dequantise(const std::byte* codes, std::byte* destination, int64_t num_elements, float scale) {
  static const std::array<float, 256> values = table_of_values<kCode>();
  for (int64_t i = 0; i < num_elements; ++i) {
    const auto to = scalar::narrow<kDestination>(values[static_cast<uint8_t>(codes[i])] * scale);
    std::memcpy(destination + i * static_cast<int64_t>(sizeof(to)), &to, sizeof(to));
  }
}

}  // namespace

const CastTable kScalarCasts{bfloat16_to_float32,           bfloat16_to_float16, float16_to_float32,
                             float16_to_bfloat16,           float32_to_bfloat16, float32_to_float16,
                             NANOTRON_FAST_DEQUANTISE_TABLE};

}  // namespace nanotron_fast
