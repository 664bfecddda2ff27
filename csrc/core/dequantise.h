#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "core/file.h"
#include "core/scales.h"
#include "core/strided.h"

namespace nanotron_fast {

// The scales of some codes of a tensor, widened.
class LoadedScales {
 public:
  // Reads those of the codes from position first to last. Throws IoError.
  void load(const Scales& scales, const File& file, int64_t first, int64_t last);

  // Writes the values of codes that lie beside each other, from position on.
  void dequantise(const std::byte* codes, int64_t position, int64_t num_elements,
                  std::byte* destination, int64_t destination_item,
                  DequantiseFunction function) const;

 private:
  const Scales* scales_ = nullptr;
  int64_t first_row_ = 0;
  std::vector<float> widened_;
  std::vector<std::byte> stored_;
};

// Where the elements of a box are in their tensor.
struct Positions {
  int64_t first;
  std::array<int64_t, 3> strides;
};

// Lays the values of a box of codes out as copy_strided does. The codes lie in memory as the copy
// says, in their tensor as the positions say; where one of these runs on, so does the other.
void dequantise_strided(const StridedCopy& copy, const Positions& positions,
                        const LoadedScales& scales, const std::byte* source, std::byte* destination,
                        SimdLevel level);

}  // namespace nanotron_fast
