#include "cuda/launch.h"
#include "cuda/pack.h"

namespace nanotron_fast {

namespace {

using device::kThreads;

__global__ void __launch_bounds__(kThreads, device::kBlocksPerMultiprocessor)
    pack_kernel(const TileItem* items, int32_t num_items, uint32_t num_tiles) {
  device::run_tiles(items, num_items, num_tiles);
}

}  // namespace

void launch(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
            uintptr_t stream) {
  if (num_tiles == 0) return;
  const void* kernel = reinterpret_cast<const void*>(pack_kernel);
  const unsigned blocks = device::num_blocks(kernel, num_tiles, device);
  pack_kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      items, num_items, static_cast<uint32_t>(num_tiles));
  device::check(cudaGetLastError(), "pack_kernel");
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
