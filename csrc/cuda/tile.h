#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "core/tiles.h"
#include "cuda/convert.h"

// What one thread of a block does for one tile; transpose.h has the rest of it. All of it compiles
// for the host too, where tests/native/test_tiles.cpp runs the threads one after another under the
// sanitizers.
namespace nanotron_fast::device {

constexpr uint32_t kThreads = 256;

struct alignas(8) Vector8 {
  uint32_t words[2];
};
struct alignas(16) Vector16 {
  uint32_t words[4];
};

// Accesses of the device's memory. On the host they check the alignment that a device would trap
// on.
template <typename T>
NANOTRON_FAST_DEVICE T load(const std::byte* address) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
  return *reinterpret_cast<const T*>(address);
#else
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) std::abort();
  T value;
  std::memcpy(&value, address, sizeof value);
  return value;
#endif
}

template <typename T>
NANOTRON_FAST_DEVICE void store(std::byte* address, const T& value) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(address));
  *reinterpret_cast<T*>(address) = value;
#else
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) std::abort();
  std::memcpy(address, &value, sizeof value);
#endif
}

template <typename T>
NANOTRON_FAST_DEVICE T load_element(const std::byte* address, bool is_aligned) {
  if (is_aligned) return load<T>(address);
  T value = 0;
  for (uint32_t i = 0; i < sizeof(T); ++i) {
    value = static_cast<T>(value | static_cast<T>(load<uint8_t>(address + i)) << 8 * i);
  }
  return value;
}

template <typename T>
NANOTRON_FAST_DEVICE void store_element(std::byte* address, T value, bool is_aligned) {
  if (is_aligned) return store<T>(address, value);
  for (uint32_t i = 0; i < sizeof(T); ++i) {
    store<uint8_t>(address + i, static_cast<uint8_t>(value >> 8 * i));
  }
}

// One tile of an item: a box of `rows` (along middle) and `columns` (along inner).
struct Tile {
  const std::byte* source;
  std::byte* destination;
  uint32_t rows;
  uint32_t columns;
};

// The item that a tile belongs to.
NANOTRON_FAST_DEVICE int32_t find_item(const TileItem* items, int32_t num_items, uint32_t tile) {
  int32_t low = 0, high = num_items - 1;
  while (low < high) {
    const int32_t middle = low + (high - low + 1) / 2;
    if (items[middle].first_tile <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

NANOTRON_FAST_DEVICE Tile tile_of(const TileItem& item, uint32_t number) {
  const auto tiles_inner = static_cast<uint32_t>(item.tiles_inner);
  const auto tiles_middle = static_cast<uint32_t>(item.tiles_middle);
  const uint32_t line = number / tiles_inner;
  const int64_t outer = line / tiles_middle;
  const int64_t row = int64_t{line % tiles_middle} * item.tile_middle;
  const int64_t column = int64_t{number % tiles_inner} * item.tile_inner;
  const int64_t rows_left = item.sizes[1] - row, columns_left = item.sizes[2] - column;
  const int64_t from = item.source + outer * item.source_strides[0] + row * item.source_strides[1] +
                       column * item.source_strides[2];
  const int64_t to = item.destination + outer * item.destination_strides[0] +
                     row * item.destination_strides[1] + column * item.destination_strides[2];
  return {reinterpret_cast<const std::byte*>(from), reinterpret_cast<std::byte*>(to),
          static_cast<uint32_t>(rows_left < item.tile_middle ? rows_left : item.tile_middle),
          static_cast<uint32_t>(columns_left < item.tile_inner ? columns_left : item.tile_inner)};
}

// Fills and copies, in accesses of T. Several rows are aligned and made of whole Ts; a single one
// has single bytes before its first T and behind its last.
template <typename T>
NANOTRON_FAST_DEVICE void copy_rows(const TileItem& item, const Tile& tile, uint32_t thread) {
  constexpr uint32_t kUnroll = 4;
  const bool is_fill = item.kind == static_cast<int32_t>(TileKind::kFill);
  const bool is_single = tile.rows == 1;
  uint32_t head = static_cast<uint32_t>(0 - reinterpret_cast<uintptr_t>(tile.destination)) %
                  static_cast<uint32_t>(sizeof(T));
  if (head > tile.columns) head = tile.columns;
  const uint32_t per_row = (tile.columns - head) / static_cast<uint32_t>(sizeof(T));
  const uint32_t tail = head + per_row * static_cast<uint32_t>(sizeof(T));
  const uint32_t rest = thread < head ? thread : tail + (thread - head);
  if (is_single && rest < tile.columns) {
    store<uint8_t>(tile.destination + rest,
                   is_fill ? uint8_t{0} : load<uint8_t>(tile.source + rest));
  }
  const uint32_t total = per_row * tile.rows;
  NANOTRON_FAST_UNROLL("unroll 1")
  for (uint32_t first = thread; first < total; first += kThreads * kUnroll) {
    T values[kUnroll];
    NANOTRON_FAST_UNROLL("unroll")
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const uint32_t at = first + i * kThreads;
      const uint32_t row = is_single ? 0 : at / per_row;
      const uint32_t column = head + (at - row * per_row) * static_cast<uint32_t>(sizeof(T));
      values[i] = T{};
      if (at < total && !is_fill) {
        values[i] = load<T>(tile.source + row * item.source_strides[1] + column);
      }
    }
    NANOTRON_FAST_UNROLL("unroll")
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const uint32_t at = first + i * kThreads;
      const uint32_t row = is_single ? 0 : at / per_row;
      const uint32_t column = head + (at - row * per_row) * static_cast<uint32_t>(sizeof(T));
      if (at < total) {
        store<T>(tile.destination + row * item.destination_strides[1] + column, values[i]);
      }
    }
  }
}

NANOTRON_FAST_DEVICE void copy_rows_by_width(const TileItem& item, const Tile& tile,
                                             uint32_t thread) {
  switch (item.width) {
    case 16:
      return copy_rows<Vector16>(item, tile, thread);
    case 8:
      return copy_rows<Vector8>(item, tile, thread);
    case 4:
      return copy_rows<uint32_t>(item, tile, thread);
    case 2:
      return copy_rows<uint16_t>(item, tile, thread);
    default:
      return copy_rows<uint8_t>(item, tile, thread);
  }
}

// Element by element, with any strides; neighbouring threads take neighbours along inner.
template <typename Op>
struct Elements {
  static NANOTRON_FAST_DEVICE void run(const TileItem& item, const Tile& tile, uint32_t thread,
                                       std::byte*) {
    using Source = typename Op::Source;
    using Destination = typename Op::Destination;
    const bool is_aligned = item.width != 0;
    const uint32_t total = tile.rows * tile.columns;
    NANOTRON_FAST_UNROLL("unroll 1")
    for (uint32_t at = thread; at < total; at += kThreads) {
      const uint32_t row = at / tile.columns, column = at - row * tile.columns;
      Destination value = 0;
      if (item.source != 0) {
        value = Op::convert(load_element<Source>(
            tile.source + row * item.source_strides[1] + column * item.source_strides[2],
            is_aligned));
      }
      store_element<Destination>(tile.destination + row * item.destination_strides[1] +
                                     column * item.destination_strides[2],
                                 value, is_aligned);
    }
  }
};

// kCastVector elements as they lie in memory.
template <typename Bits>
struct Pack {
  static constexpr int kVectors = kCastVector * static_cast<int>(sizeof(Bits)) / 16;
  Vector16 vectors[kVectors];

  NANOTRON_FAST_DEVICE void load_from(const std::byte* address) {
    NANOTRON_FAST_UNROLL("unroll")
    for (int i = 0; i < kVectors; ++i) vectors[i] = load<Vector16>(address + 16 * i);
  }
  NANOTRON_FAST_DEVICE void store_to(std::byte* address) const {
    NANOTRON_FAST_UNROLL("unroll")
    for (int i = 0; i < kVectors; ++i) store<Vector16>(address + 16 * i, vectors[i]);
  }
  NANOTRON_FAST_DEVICE Bits get(int i) const {
    if constexpr (sizeof(Bits) == 4) return vectors[i / 4].words[i % 4];
    return static_cast<Bits>(vectors[i / 8].words[i / 2 % 4] >> 16 * (i % 2));
  }
  NANOTRON_FAST_DEVICE void set_pair(int i, Bits first, Bits second) {
    if constexpr (sizeof(Bits) == 4) {
      vectors[i / 4].words[i % 4] = first;
      vectors[i / 4].words[i % 4 + 1] = second;
    } else {
      vectors[i / 8].words[i / 2 % 4] = uint32_t{first} | uint32_t{second} << 16;
    }
  }
};

// Rows that are contiguous on both sides, aligned for kCastVector elements, and cast.
template <typename Op>
struct CastRows {
  static NANOTRON_FAST_DEVICE void run(const TileItem& item, const Tile& tile, uint32_t thread,
                                       std::byte*) {
    using Source = typename Op::Source;
    using Destination = typename Op::Destination;
    constexpr uint32_t kVector = kCastVector;
    const uint32_t per_row = tile.columns / kVector, total = per_row * tile.rows;
    NANOTRON_FAST_UNROLL("unroll 1")
    for (uint32_t at = thread; at < total; at += kThreads) {
      const uint32_t row = at / per_row, column = (at - row * per_row) * kVector;
      Pack<Source> values;
      values.load_from(tile.source + row * item.source_strides[1] + column * sizeof(Source));
      Pack<Destination> results;
      NANOTRON_FAST_UNROLL("unroll")
      for (int i = 0; i < kCastVector; i += 2) {
        results.set_pair(i, Op::convert(values.get(i)), Op::convert(values.get(i + 1)));
      }
      results.store_to(tile.destination + row * item.destination_strides[1] +
                       column * sizeof(Destination));
    }
    // A single row may end with fewer; several never do.
    if (tile.rows != 1) return;
    const uint32_t at = per_row * kVector + thread;
    if (at < tile.columns) {
      store<Destination>(tile.destination + at * sizeof(Destination),
                         Op::convert(load<Source>(tile.source + at * sizeof(Source))));
    }
  }
};

template <template <typename> class Work>
NANOTRON_FAST_DEVICE void cast_with(const TileItem& item, const Tile& tile, uint32_t thread,
                                    std::byte* shared) {
  switch (static_cast<Dtype>(item.source_dtype)) {
    case Dtype::kBFloat16:
      if (item.destination_dtype == static_cast<int32_t>(Dtype::kFloat16)) {
        return Work<BFloat16ToFloat16>::run(item, tile, thread, shared);
      }
      return Work<BFloat16ToFloat32>::run(item, tile, thread, shared);
    case Dtype::kFloat16:
      if (item.destination_dtype == static_cast<int32_t>(Dtype::kBFloat16)) {
        return Work<Float16ToBFloat16>::run(item, tile, thread, shared);
      }
      return Work<Float16ToFloat32>::run(item, tile, thread, shared);
    default:
      if (item.destination_dtype == static_cast<int32_t>(Dtype::kBFloat16)) {
        return Work<Float32ToBFloat16>::run(item, tile, thread, shared);
      }
      return Work<Float32ToFloat16>::run(item, tile, thread, shared);
  }
}

template <template <typename> class Work>
NANOTRON_FAST_DEVICE void work_with(const TileItem& item, const Tile& tile, uint32_t thread,
                                    std::byte* shared) {
  // A fill has no source: what the table says of its dtype means nothing.
  if (item.source != 0 && item.source_dtype != item.destination_dtype) {
    return cast_with<Work>(item, tile, thread, shared);
  }
  switch (static_cast<Dtype>(item.destination_dtype)) {
    case Dtype::kFloat64:
      return Work<Same<uint64_t>>::run(item, tile, thread, shared);
    case Dtype::kFloat32:
      return Work<Same<uint32_t>>::run(item, tile, thread, shared);
    default:
      return Work<Same<uint16_t>>::run(item, tile, thread, shared);
  }
}

}  // namespace nanotron_fast::device
