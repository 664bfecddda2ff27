#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tiles.h"

namespace nanotron_fast {

// Up to so many items are arguments of the kernel itself, and nothing is copied before it runs.
constexpr int32_t kMaxInlineItems = 31;

// Carries out the tiles of `items`, which are in the host's memory and kMaxInlineItems at most, in
// one kernel on a stream of a device (a cudaStream_t; 0 is the default one), and does not wait for
// it. Throws std::runtime_error with the CUDA error.
void launch_inline(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
                   uintptr_t stream);

// The same for any number of items that are in the device's memory already.
void launch(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
            uintptr_t stream);

// Why the kernels cannot run on a device, because the driver or the device is too old, say. Empty
// where they can.
std::string problem_of(int device);

// The architectures that the kernels were compiled for, as numbers: 90 is sm_90.
std::vector<int> architectures();

}  // namespace nanotron_fast
