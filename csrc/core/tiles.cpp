#include "core/tiles.h"

#include <algorithm>
#include <array>
#include <string>

#include "core/error.h"

namespace nanotron_fast {

namespace {

// A tile moves this many bytes where there are enough of them to occupy a device.
constexpr int64_t kMaxTileBytes = int64_t{32} << 10;
constexpr int64_t kMinTileBytes = int64_t{4} << 10;
constexpr int64_t kTilesWanted = 1024;
// Narrower than this, a transposed tile is mostly empty.
constexpr int64_t kMinTransposed = 8;
constexpr int64_t kMaxTiles = INT32_MAX - 1;

struct Dimension {
  int64_t size, source, destination;  // strides in elements
};

// The largest power of two, up to 16, that divides every value.
int32_t common_alignment(std::initializer_list<int64_t> values) {
  int64_t bits = 16;
  for (const int64_t value : values) bits |= value;
  return static_cast<int32_t>(bits & -bits);
}

class ItemBuilder {
 public:
  ItemBuilder(const Move& move, int64_t source, int64_t destination, int64_t tile_bytes)
      : move_(move),
        source_item_(item_size(move.source_dtype)),
        destination_item_(item_size(move.destination_dtype)),
        tile_bytes_(tile_bytes) {
    item_.source = source;
    item_.destination = destination;
    item_.source_dtype = static_cast<int32_t>(move.source_dtype);
    item_.destination_dtype = static_cast<int32_t>(move.destination_dtype);
    for (int dim = 0; dim < 3; ++dim) {
      if (move.sizes[dim] == 1) continue;
      dimensions_.push_back(
          {move.sizes[dim], move.source_strides[dim], move.destination_strides[dim]});
    }
    // A normalised move ends with the dimension of the smallest destination stride.
    if (dimensions_.empty()) dimensions_.push_back({1, 1, 1});
  }

  TileItem build() {
    const Dimension inner = dimensions_.back();
    dimensions_.pop_back();
    const bool runs_on = inner.destination == 1 && (move_.is_fill() || inner.source == 1);
    if (runs_on && (move_.is_fill() || move_.source_dtype == move_.destination_dtype)) {
      build_bytes(inner);
    } else if (runs_on) {
      build_cast(inner);
    } else if (!build_transpose(inner)) {
      build_strided(inner);
    }
    return item_;
  }

 private:
  // Fills and copies: inner counts bytes.
  void build_bytes(const Dimension& inner) {
    set_kind(move_.is_fill() ? TileKind::kFill : TileKind::kCopy);
    place_rows(inner);
    item_.sizes[2] = inner.size * destination_item_;
    item_.source_strides[2] = item_.destination_strides[2] = 1;
    const int64_t distance = move_.is_fill() ? 0 : item_.source - item_.destination;
    if (is_single_row()) {
      item_.width = common_alignment({distance});
    } else {
      item_.width = common_alignment({distance, item_.destination, item_.sizes[2],
                                      source_row_strides(), destination_row_strides()});
    }
    set_row_tiles(tile_bytes_, 128);
  }

  void build_cast(const Dimension& inner) {
    set_kind(TileKind::kCast);
    place_rows(inner);
    item_.width = element_width();
    const bool is_whole = is_single_row() || inner.size % kCastVector == 0;
    if (is_whole && common_alignment({item_.source, item_.destination, source_row_strides(),
                                      destination_row_strides()}) == 16) {
      item_.width = kCastVector;
    }
    set_row_tiles(tile_bytes_ / std::max(source_item_, destination_item_), 64);
  }

  bool build_transpose(const Dimension& inner) {
    if (move_.is_fill() || inner.destination != 1 || inner.size < kMinTransposed) return false;
    if (element_width() == 0) return false;
    const auto middle =
        std::find_if(dimensions_.begin(), dimensions_.end(),
                     [](const Dimension& d) { return d.source == 1 && d.size >= kMinTransposed; });
    if (middle == dimensions_.end()) return false;
    set_kind(TileKind::kTranspose);
    set_dimension(1, *middle);
    dimensions_.erase(middle);
    set_dimension(0, dimensions_.empty() ? Dimension{1, 0, 0} : dimensions_.front());
    set_dimension(2, inner);
    item_.width = element_width();
    const bool has_pairs =
        source_item_ == 2 && destination_item_ == 2 && item_.sizes[1] % 2 == 0 &&
        item_.sizes[2] % 2 == 0 &&
        common_alignment({item_.source, item_.destination, item_.source_strides[0],
                          item_.source_strides[2], item_.destination_strides[0],
                          item_.destination_strides[1]}) >= 4;
    if (has_pairs) item_.width = 2;
    const bool is_wide = source_item_ == 8;
    set_tiles(has_pairs ? kTransposeMiddlePairs : kTransposeMiddle,
              is_wide ? kTransposeInnerWide : kTransposeInner);
    return true;
  }

  void build_strided(const Dimension& inner) {
    set_kind(TileKind::kStrided);
    place_rows(inner);
    item_.width = element_width();
    set_row_tiles(tile_bytes_ / std::max(source_item_, destination_item_), 64);
  }

  void set_kind(TileKind kind) { item_.kind = static_cast<int32_t>(kind); }

  void set_dimension(int at, const Dimension& dimension) {
    item_.sizes[at] = dimension.size;
    item_.source_strides[at] = move_.is_fill() ? 0 : dimension.source * source_item_;
    item_.destination_strides[at] = dimension.destination * destination_item_;
  }

  // The dimensions other than inner. A tile holds rows along the longer one.
  void place_rows(const Dimension& inner) {
    std::stable_sort(dimensions_.begin(), dimensions_.end(),
                     [](const Dimension& a, const Dimension& b) { return a.size < b.size; });
    while (dimensions_.size() < 2) dimensions_.insert(dimensions_.begin(), {1, 0, 0});
    set_dimension(0, dimensions_[0]);
    set_dimension(1, dimensions_[1]);
    set_dimension(2, inner);
  }

  bool is_single_row() const { return item_.sizes[0] == 1 && item_.sizes[1] == 1; }
  int64_t source_row_strides() const { return item_.source_strides[0] | item_.source_strides[1]; }
  int64_t destination_row_strides() const {
    return item_.destination_strides[0] | item_.destination_strides[1];
  }

  // 1 where single elements are aligned on both sides.
  int32_t element_width() const {
    return item_.source % source_item_ == 0 && item_.destination % destination_item_ == 0;
  }

  // Pieces of a row, or several rows.
  void set_row_tiles(int64_t units, int64_t granule) {
    const int64_t row = item_.sizes[2];
    if (row < units) return set_tiles(std::min(item_.sizes[1], units / row), row);
    const int64_t pieces = (row - 1) / units + 1;
    set_tiles(1, ((row - 1) / pieces / granule + 1) * granule);
  }

  void set_tiles(int64_t middle, int64_t inner) {
    item_.tile_middle = static_cast<int32_t>(middle);
    item_.tile_inner = static_cast<int32_t>(inner);
    item_.tiles_middle = narrow((item_.sizes[1] - 1) / middle + 1);
    item_.tiles_inner = narrow((item_.sizes[2] - 1) / inner + 1);
  }

  static int32_t narrow(int64_t tiles) {
    // More than kMaxTiles are refused below, however many more.
    return static_cast<int32_t>(std::min(tiles, kMaxTiles + 1));
  }

  const Move& move_;
  int64_t source_item_, destination_item_, tile_bytes_;
  TileItem item_{};
  std::vector<Dimension> dimensions_;
};

int64_t address(const std::vector<Memory>& memories, int64_t index, int64_t offset_bytes) {
  return static_cast<int64_t>(
             reinterpret_cast<uintptr_t>(memories[static_cast<size_t>(index)].data)) +
         offset_bytes;
}

}  // namespace

TileTable make_tiles(const int64_t* table, int64_t num_moves, const std::vector<Memory>& sources,
                     const std::vector<Memory>& destinations) {
  const std::vector<Move> moves =
      parse_moves(table, num_moves, sizes_of(sources), sizes_of(destinations));
  int64_t num_bytes = 0;
  for (const Move& move : moves) num_bytes += move.num_elements() * item_size(move.source_dtype);
  int64_t tile_bytes = kMaxTileBytes;
  while (tile_bytes > kMinTileBytes && num_bytes < tile_bytes * kTilesWanted) tile_bytes /= 2;

  TileTable result;
  result.items.reserve(moves.size());
  for (size_t index = 0; index < moves.size(); ++index) {
    const Move move = normalize(moves[index]);
    const int64_t source =
        move.is_fill() ? 0 : address(sources, move.source_file, move.source_offset_bytes);
    const int64_t destination =
        address(destinations, move.destination_file, move.destination_offset_bytes);
    TileItem item = ItemBuilder(move, source, destination, tile_bytes).build();
    item.first_tile = result.num_tiles;
    int64_t tiles;
    if (__builtin_mul_overflow(int64_t{item.tiles_middle} * item.tiles_inner, item.sizes[0],
                               &tiles) ||
        tiles > kMaxTiles - result.num_tiles) {
      throw PlanError("move " + std::to_string(index) + ": more than " + std::to_string(kMaxTiles) +
                      " tiles for one launch");
    }
    result.num_tiles += tiles;
    result.items.push_back(item);
  }
  return result;
}

}  // namespace nanotron_fast
