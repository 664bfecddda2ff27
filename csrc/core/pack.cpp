#include "core/pack.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "core/pool.h"
#include "core/strided.h"

namespace nanotron_fast {

namespace {

// Enough to make a task worth taking, few enough that two or three fit into a core's own cache.
constexpr int64_t kTileBytes = int64_t{256} << 10;
// Less than this for each worker is not worth starting a thread for.
constexpr int64_t kWorkerBytes = int64_t{1} << 20;
// A transposed tile is at least this wide along the source's rows: whole cache lines of them.
constexpr int64_t kTransposeWidth = 64;

// A normalised move, cut into tiles: boxes of up to `tile` elements.
struct Cut {
  Move move;
  std::array<int64_t, 3> tile;
  std::array<int64_t, 3> counts;
  int64_t first_tile;  // those of the moves before it
};

Cut cut(const Move& move, int64_t first_tile) {
  const int64_t item = std::max(item_size(move.source_dtype), item_size(move.destination_dtype));
  const int64_t elements = kTileBytes / item;
  const auto& sizes = move.sizes;
  std::array<int64_t, 3> tile{1, 1, 1};
  int inner = 2;
  while (inner > 0 && sizes[inner] == 1) --inner;
  int across = -1;  // the dimension along which the source runs on, where that is another one
  for (int dim = 0; dim < inner; ++dim) {
    if (!move.is_fill() && sizes[dim] > 1 && move.source_strides[dim] == 1) across = dim;
  }
  if (across >= 0 && move.source_strides[inner] != 1) {
    tile[inner] = std::min(sizes[inner], elements / kTransposeWidth);
    const int64_t width = elements / tile[inner] / kTransposeWidth * kTransposeWidth;
    tile[across] = std::min(sizes[across], std::max(kTransposeWidth, width));
  } else {
    // Whole rows of the destination, as many as fit.
    int64_t left = elements;
    for (int dim = inner; dim >= 0 && left > 0; --dim) {
      tile[dim] = std::min(sizes[dim], left);
      left = tile[dim] == sizes[dim] ? left / sizes[dim] : 0;
    }
  }
  Cut result{move, tile, {}, first_tile};
  for (int dim = 0; dim < 3; ++dim) result.counts[dim] = (sizes[dim] - 1) / tile[dim] + 1;
  return result;
}

void fill_zeros(const StridedCopy& box, std::byte* destination) {
  const int64_t item = item_size(box.destination_dtype);
  const auto& strides = box.destination_strides;
  for (int64_t i = 0; i < box.sizes[0]; ++i) {
    for (int64_t j = 0; j < box.sizes[1]; ++j) {
      std::byte* const row = destination + (i * strides[0] + j * strides[1]) * item;
      if (strides[2] == 1) {
        std::memset(row, 0, static_cast<size_t>(box.sizes[2] * item));
        continue;
      }
      for (int64_t k = 0; k < box.sizes[2]; ++k) {
        std::memset(row + k * strides[2] * item, 0, static_cast<size_t>(item));
      }
    }
  }
}

void run_tile(const Cut& cut, int64_t number, const std::vector<Memory>& sources,
              const std::vector<Memory>& destinations, SimdLevel level) {
  const Move& move = cut.move;
  StridedCopy box{
      {}, move.source_strides, move.destination_strides, move.source_dtype, move.destination_dtype};
  int64_t source_elements = 0, destination_elements = 0;
  for (int dim = 2; dim >= 0; --dim) {
    const int64_t first = number % cut.counts[dim] * cut.tile[dim];
    number /= cut.counts[dim];
    box.sizes[dim] = std::min(cut.tile[dim], move.sizes[dim] - first);
    source_elements += first * move.source_strides[dim];
    destination_elements += first * move.destination_strides[dim];
  }
  std::byte* const to = destinations[static_cast<size_t>(move.destination_file)].data +
                        move.destination_offset_bytes +
                        destination_elements * item_size(move.destination_dtype);
  if (move.is_fill()) {
    // Unit dimensions come last and have stride 1; the row that runs on comes last here.
    const int inner = box.sizes[2] > 1 ? 2 : box.sizes[1] > 1 ? 1 : 0;
    std::swap(box.sizes[inner], box.sizes[2]);
    std::swap(box.destination_strides[inner], box.destination_strides[2]);
    return fill_zeros(box, to);
  }
  const std::byte* const from = sources[static_cast<size_t>(move.source_file)].data +
                                move.source_offset_bytes +
                                source_elements * item_size(move.source_dtype);
  copy_strided(box, from, to, level);
}

}  // namespace

std::vector<int64_t> sizes_of(const std::vector<Memory>& memories) {
  std::vector<int64_t> sizes;
  for (const Memory& memory : memories) sizes.push_back(memory.size_bytes);
  return sizes;
}

void pack(const int64_t* table, int64_t num_moves, const std::vector<Memory>& sources,
          const std::vector<Memory>& destinations, int num_workers, SimdLevel level) {
  std::vector<Cut> cuts;
  int64_t num_tiles = 0, num_bytes = 0;
  for (const Move& move :
       parse_moves(table, num_moves, sizes_of(sources), sizes_of(destinations))) {
    num_bytes += move.num_elements() * item_size(move.destination_dtype);
    cuts.push_back(cut(normalize(move), num_tiles));
    num_tiles += cuts.back().counts[0] * cuts.back().counts[1] * cuts.back().counts[2];
  }
  std::atomic<int64_t> next{0};
  const auto workers =
      static_cast<int>(std::min({int64_t{num_workers}, num_tiles, num_bytes / kWorkerBytes + 1}));
  run_workers(workers, [&](int, const std::atomic<bool>& should_stop) {
    for (int64_t tile; !should_stop && (tile = next.fetch_add(1)) < num_tiles;) {
      const auto after = std::upper_bound(
          cuts.begin(), cuts.end(), tile,
          [](int64_t number, const Cut& other) { return number < other.first_tile; });
      const Cut& mine = *(after - 1);
      run_tile(mine, tile - mine.first_tile, sources, destinations, level);
    }
  });
}

}  // namespace nanotron_fast
