#pragma once

#include <cstdint>
#include <vector>

#include "core/pack.h"

namespace nanotron_fast {

// How a device carries a move out. In all but the last the destination runs on along `inner`.
enum class TileKind : int32_t {
  kFill,       // zeros; inner counts bytes
  kCopy,       // the source runs on along inner as well; inner counts bytes
  kCast,       // likewise, and the dtypes differ
  kTranspose,  // the source runs on along `middle`; elements are aligned
  kStrided,    // element by element, whatever the strides; zeros where source is 0
};

// One move as a device takes it: addresses, a box (outer, middle, inner), and its tiles, which are
// numbered through all items with inner tiles first. csrc/cuda reads it, and
// kernels/pack/kernels.py by the columns that kernels/pack/item.py names.
struct alignas(16) TileItem {
  int64_t source;  // an address; 0 for a fill
  int64_t destination;
  int64_t sizes[3];
  int64_t source_strides[3];       // bytes
  int64_t destination_strides[3];  // bytes
  int64_t first_tile;              // tiles of the items before this one
  int32_t kind;
  int32_t source_dtype;
  int32_t destination_dtype;
  // How wide an access both sides are aligned for. Of a fill or a copy it is in bytes, from 16 down
  // to 1; a single row may start anywhere, if both sides start equally far behind a multiple of it.
  // Of the other kinds it is in elements, and 0 where not even single elements are aligned.
  int32_t width;
  int32_t tile_middle;
  int32_t tile_inner;
  int32_t tiles_middle;
  int32_t tiles_inner;
};
static_assert(sizeof(TileItem) == 128, "kernels/pack/item.py says so too");

struct TileTable {
  std::vector<TileItem> items;
  int64_t num_tiles = 0;
};

// The extents of a transposed tile along inner and middle, by the size of the wider element.
constexpr int32_t kTransposeInner = 64;
constexpr int32_t kTransposeInnerWide = 32;  // of 8 bytes
constexpr int32_t kTransposeMiddle = 64;
constexpr int32_t kTransposeMiddlePairs = 128;  // where width is 2
constexpr int32_t kCastVector = 8;              // elements of the widest access of a cast

// Checks a table of moves and prepares it for a device. The addresses in `sources` and
// `destinations` are the device's, and are not followed. Throws PlanError.
TileTable make_tiles(const int64_t* table, int64_t num_moves, const std::vector<Memory>& sources,
                     const std::vector<Memory>& destinations);

}  // namespace nanotron_fast
