#include "cuda/launch.h"
#include "cuda/pack.h"

namespace nanotron_fast {

namespace {

using device::kThreads;

struct InlineItems {
  TileItem items[kMaxInlineItems];
};
static_assert(sizeof(InlineItems) + 64 <= 4096, "every driver takes 4 KiB of arguments");

__global__ void __launch_bounds__(kThreads, device::kBlocksPerMultiprocessor)
    pack_inline_kernel(const __grid_constant__ InlineItems items, int32_t num_items,
                       uint32_t num_tiles) {
  device::run_tiles(items.items, num_items, num_tiles);
}

}  // namespace

void launch_inline(const TileItem* items, int32_t num_items, int64_t num_tiles, int device,
                   uintptr_t stream) {
  if (num_tiles == 0) return;
  InlineItems arguments{};
  std::copy(items, items + num_items, arguments.items);
  const void* kernel = reinterpret_cast<const void*>(pack_inline_kernel);
  const unsigned blocks = device::num_blocks(kernel, num_tiles, device);
  pack_inline_kernel<<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(
      arguments, num_items, static_cast<uint32_t>(num_tiles));
  device::check(cudaGetLastError(), "pack_inline_kernel");
}

}  // namespace nanotron_fast
