#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tiles.h"

namespace nanotron_fast {

// So few items travel as arguments of the kernel: nothing is copied to the device before it.
constexpr int32_t kMaxInlineItems = 31;

// Carries out the tiles of `items`, which are in the host's memory, in one kernel on a stream of a
// device (a cudaStream_t; 0 is the default one), and does not wait for it. At most kMaxInlineItems.
// Throws std::runtime_error with the CUDA error.
void launch_inline(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
                   uintptr_t stream);

// The same for any number of items that are in the device's memory already.
void launch(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
            uintptr_t stream);

// Why the kernels cannot run on a device: its driver is too old, or it is. Empty where they can.
std::string problem_of(int device);

// What the kernels were compiled for: 90 for sm_90.
std::vector<int> architectures();

}  // namespace nanotron_fast
