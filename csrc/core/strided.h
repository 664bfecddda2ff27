#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "cast/cast.h"

namespace nanotron_fast {

// A box of elements as both sides see it. Strides are in elements of the side's own dtype.
struct StridedCopy {
  std::array<int64_t, 3> sizes;
  std::array<int64_t, 3> source_strides;
  std::array<int64_t, 3> destination_strides;
  Dtype source_dtype;
  Dtype destination_dtype;
};

// Copies, casting where the dtypes differ. The two sides must not overlap.
void copy_strided(const StridedCopy& copy, const std::byte* source, std::byte* destination,
                  SimdLevel level);

}  // namespace nanotron_fast
