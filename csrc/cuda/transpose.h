#pragma once

#include "cuda/tile.h"

// Transposed tiles: they pass through shared memory, so that both sides are read and written along
// the dimension in which they run on.
namespace nanotron_fast::device {

// The source's rows are the rows of shared memory, an odd number of elements apart, so that a
// column of them is in different banks.
constexpr uint32_t kPitch = kTransposeMiddle + 1;
constexpr uint32_t kSharedBytes = (kTransposeInner * kPitch + 1) * 4 + 12;
static_assert(kTransposeMiddlePairs == 2 * kTransposeMiddle, "a pair of them is one word");
static_assert(kTransposeInnerWide * 2 == kTransposeInner, "twice the bytes, half the columns");

// Where a word of two 16-bit elements lies. The second half of the rows is shifted by a bank, so
// that a warp which reads every other row meets each bank once.
NANOTRON_FAST_DEVICE uint32_t pair_at(uint32_t inner, uint32_t pair) {
  return inner * kPitch + inner / 32 + pair;
}

template <typename T>
NANOTRON_FAST_DEVICE T get_shared(const std::byte* shared, uint32_t place) {
#if defined(__CUDA_ARCH__)
  return reinterpret_cast<const T*>(shared)[place];
#else
  return load<T>(shared + place * sizeof(T));
#endif
}

template <typename T>
NANOTRON_FAST_DEVICE void set_shared(std::byte* shared, uint32_t place, T value) {
#if defined(__CUDA_ARCH__)
  reinterpret_cast<T*>(shared)[place] = value;
#else
  store<T>(shared + place * sizeof(T), value);
#endif
}

// A thread keeps its place along middle, and steps over inner.
template <typename T, bool kIsPair>
NANOTRON_FAST_DEVICE void load_transposed(const TileItem& item, const Tile& tile, uint32_t thread,
                                          std::byte* shared) {
  constexpr uint32_t kStep = kThreads / kTransposeMiddle, kUnroll = 4;
  const uint32_t middle = thread % kTransposeMiddle;
  if (middle >= (kIsPair ? tile.rows / 2 : tile.rows)) return;
  const int64_t step = kStep * item.source_strides[2];
  uint32_t inner = thread / kTransposeMiddle;
  const std::byte* from = tile.source + inner * item.source_strides[2] + middle * sizeof(T);
  NANOTRON_FAST_UNROLL("unroll 1")
  for (; inner < tile.columns; inner += kStep * kUnroll) {
    T values[kUnroll];
    NANOTRON_FAST_UNROLL("unroll")
    for (uint32_t i = 0; i < kUnroll; ++i) {
      if (inner + i * kStep < tile.columns) values[i] = load<T>(from);
      from += step;
    }
    NANOTRON_FAST_UNROLL("unroll")
    for (uint32_t i = 0; i < kUnroll; ++i) {
      const uint32_t row = inner + i * kStep;
      const uint32_t place = kIsPair ? pair_at(row, middle) : row * kPitch + middle;
      if (row < tile.columns) set_shared(shared, place, values[i]);
    }
  }
}

template <typename Op>
struct StoreTransposed {
  using Source = typename Op::Source;
  using Destination = typename Op::Destination;

  static NANOTRON_FAST_DEVICE void run(const TileItem& item, const Tile& tile, uint32_t thread,
                                       std::byte* shared) {
    if constexpr (sizeof(Source) == 2 && sizeof(Destination) == 2) {
      if (item.width == 2) return store_pairs(item, tile, thread, shared);
    }
    constexpr uint32_t kColumns = sizeof(Source) == 8 ? kTransposeInnerWide : kTransposeInner;
    constexpr uint32_t kStep = kThreads / kColumns;
    const uint32_t inner = thread % kColumns;
    if (inner >= tile.columns) return;
    const int64_t step = kStep * item.destination_strides[1];
    uint32_t middle = thread / kColumns;
    std::byte* to =
        tile.destination + middle * item.destination_strides[1] + inner * sizeof(Destination);
    NANOTRON_FAST_UNROLL("unroll 4")
    for (; middle < tile.rows; middle += kStep) {
      const auto value = get_shared<Source>(shared, inner * kPitch + middle);
      store<Destination>(to, Op::convert(value));
      to += step;
    }
  }

  // Two by two elements at a time.
  static NANOTRON_FAST_DEVICE void store_pairs(const TileItem& item, const Tile& tile,
                                               uint32_t thread, const std::byte* shared) {
    constexpr uint32_t kPairs = kTransposeInner / 2, kStep = kThreads / kPairs;
    const uint32_t inner = thread % kPairs * 2;
    if (inner >= tile.columns) return;
    const int64_t row_stride = item.destination_strides[1];
    uint32_t pair = thread / kPairs;
    std::byte* to = tile.destination + pair * 2 * row_stride + inner * 2;
    NANOTRON_FAST_UNROLL("unroll 4")
    for (; pair * 2 < tile.rows; pair += kStep) {
      const auto a = get_shared<uint32_t>(shared, pair_at(inner, pair));
      const auto b = get_shared<uint32_t>(shared, pair_at(inner + 1, pair));
      store<uint32_t>(to, join(static_cast<Source>(a), static_cast<Source>(b)));
      store<uint32_t>(to + row_stride,
                      join(static_cast<Source>(a >> 16), static_cast<Source>(b >> 16)));
      to += kStep * 2 * row_stride;
    }
  }

  static NANOTRON_FAST_DEVICE uint32_t join(Source first, Source second) {
    return uint32_t{Op::convert(first)} | uint32_t{Op::convert(second)} << 16;
  }
};

// A thread's work on a tile, or the first half of it where the tile is transposed. `shared` has
// kSharedBytes, aligned to 16, and is used by transposed tiles alone.
NANOTRON_FAST_DEVICE void begin_tile(const TileItem& item, const Tile& tile, uint32_t thread,
                                     std::byte* shared) {
  switch (static_cast<TileKind>(item.kind)) {
    case TileKind::kFill:
    case TileKind::kCopy:
      return copy_rows_by_width(item, tile, thread);
    case TileKind::kCast:
      if (item.width == kCastVector) return cast_with<CastRows>(item, tile, thread, shared);
      [[fallthrough]];  // narrower ones are no faster than elements, and need no code of their own
    case TileKind::kStrided:
      return work_with<Elements>(item, tile, thread, shared);
    case TileKind::kTranspose:
      if (item.width == 2) return load_transposed<uint32_t, true>(item, tile, thread, shared);
      switch (static_cast<Dtype>(item.source_dtype)) {
        case Dtype::kFloat64:
          return load_transposed<uint64_t, false>(item, tile, thread, shared);
        case Dtype::kFloat32:
          return load_transposed<uint32_t, false>(item, tile, thread, shared);
        default:
          return load_transposed<uint16_t, false>(item, tile, thread, shared);
      }
  }
}

// The second half of a transposed tile, after every thread has done the first.
NANOTRON_FAST_DEVICE void finish_tile(const TileItem& item, const Tile& tile, uint32_t thread,
                                      std::byte* shared) {
  work_with<StoreTransposed>(item, tile, thread, shared);
}

}  // namespace nanotron_fast::device
