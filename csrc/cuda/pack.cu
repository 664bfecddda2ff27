#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/pack.h"
#include "cuda/transpose.h"

namespace nanotron_fast {

namespace {

using device::kThreads;

// Four blocks on a multiprocessor keep more bytes in flight than its memory needs to be busy.
constexpr int kBlocksPerMultiprocessor = 4;

struct InlineItems {
  TileItem items[kMaxInlineItems];
};
static_assert(sizeof(InlineItems) + 64 <= 4096, "every driver takes 4 KiB of arguments");

// Each block walks over the tiles of all items with a stride of all blocks.
__device__ __forceinline__ void run_tiles(const TileItem* items, int32_t num_items,
                                          uint32_t num_tiles) {
  __shared__ alignas(16) std::byte shared[device::kSharedBytes];
  for (uint32_t number = blockIdx.x; number < num_tiles; number += gridDim.x) {
    const TileItem& item = items[device::find_item(items, num_items, number)];
    const device::Tile tile = device::locate(item, static_cast<uint32_t>(number - item.first_tile));
    device::begin_tile(item, tile, threadIdx.x, shared);
    if (item.kind == static_cast<int32_t>(TileKind::kTranspose)) {
      __syncthreads();
      device::finish_tile(item, tile, threadIdx.x, shared);
      __syncthreads();
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    pack_kernel(const TileItem* items, int32_t num_items, uint32_t num_tiles) {
  run_tiles(items, num_items, num_tiles);
}

__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    pack_inline_kernel(const __grid_constant__ InlineItems items, int32_t num_items,
                       uint32_t num_tiles) {
  run_tiles(items.items, num_items, num_tiles);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

unsigned num_blocks(const void* kernel, int64_t num_tiles, int device) {
  check(cudaSetDevice(device), "cudaSetDevice");
  int multiprocessors = 0, resident = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return static_cast<unsigned>(
      std::min<int64_t>(num_tiles, int64_t{multiprocessors} * std::max(resident, 1)));
}

}  // namespace

void launch_inline(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
                   uintptr_t stream) {
  if (num_tiles == 0) return;
  InlineItems arguments{};
  std::copy(items, items + num_items, arguments.items);
  const unsigned blocks =
      num_blocks(reinterpret_cast<const void*>(pack_inline_kernel), num_tiles, device);
  pack_inline_kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      arguments, num_items, static_cast<uint32_t>(num_tiles));
  check(cudaGetLastError(), "pack_inline_kernel");
}

void launch(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
            uintptr_t stream) {
  if (num_tiles == 0) return;
  const unsigned blocks = num_blocks(reinterpret_cast<const void*>(pack_kernel), num_tiles, device);
  pack_kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      items, num_items, static_cast<uint32_t>(num_tiles));
  check(cudaGetLastError(), "pack_kernel");
}

std::string problem_of(int device) {
  cudaError_t error = cudaSetDevice(device);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(pack_kernel));
  }
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // forget it: nothing is wrong with the device
  return cudaGetErrorString(error);
}

std::vector<int> architectures() {
  std::vector<int> result{__CUDA_ARCH_LIST__};
  for (int& architecture : result) architecture /= 10;
  return result;
}

}  // namespace nanotron_fast
