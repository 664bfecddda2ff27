#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/transpose.h"

// What the kernels have in common. Each of them is a translation unit of its own, since the code
// for all kinds of tiles is in each and takes most of the time of a build.
namespace nanotron_fast::device {

// Four blocks on a multiprocessor keep more bytes in flight than its memory needs to be busy.
constexpr int kBlocksPerMultiprocessor = 4;

// Each block walks over the tiles of all items with a stride of all blocks.
__device__ __forceinline__ void run_tiles(const TileItem* items, int32_t num_items,
                                          uint32_t num_tiles) {
  __shared__ alignas(16) std::byte shared[kSharedBytes];
  for (uint32_t number = blockIdx.x; number < num_tiles; number += gridDim.x) {
    const TileItem& item = items[find_item(items, num_items, number)];
    const Tile tile = tile_of(item, static_cast<uint32_t>(number - item.first_tile));
    begin_tile(item, tile, threadIdx.x, shared);
    if (item.kind == static_cast<int32_t>(TileKind::kTranspose)) {
      __syncthreads();
      finish_tile(item, tile, threadIdx.x, shared);
      __syncthreads();
    }
  }
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Blocks of a launch: as many as the device holds at once, and no more than there are tiles. Makes
// `device` the current one.
inline unsigned num_blocks(const void* kernel, int64_t num_tiles, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  int multiprocessors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return static_cast<unsigned>(
      std::min<int64_t>(num_tiles, int64_t{multiprocessors} * std::max(resident, 1)));
}

}  // namespace nanotron_fast::device
