#include "core/strided.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace nanotron_fast {

namespace {

// A transposed block is built in a tile that stays in the first-level cache, then cast from there.
constexpr int64_t kTile = 64;

// rows x columns elements from column-contiguous source to row-contiguous destination:
// destination[r * destination_stride + c] = source[c * source_stride + r].
template <typename T>
void transpose_plain(const T* source, int64_t source_stride, T* destination,
                     int64_t destination_stride, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(destination + r * destination_stride + c, source + c * source_stride + r,
                  sizeof(T));
    }
  }
}

#if defined(__SSE2__)
// The same for an 8 x 8 block of 16-bit elements.
inline void transpose_8x8(const uint16_t* source, int64_t source_stride, uint16_t* destination,
                          int64_t destination_stride) {
  __m128i row[8], step[8];
  for (int i = 0; i < 8; ++i) {
    row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * source_stride));
  }
  for (int i = 0; i < 4; ++i) {
    step[2 * i] = _mm_unpacklo_epi16(row[2 * i], row[2 * i + 1]);
    step[2 * i + 1] = _mm_unpackhi_epi16(row[2 * i], row[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i* pair = step + 4 * half;
    row[4 * half + 0] = _mm_unpacklo_epi32(pair[0], pair[2]);
    row[4 * half + 1] = _mm_unpackhi_epi32(pair[0], pair[2]);
    row[4 * half + 2] = _mm_unpacklo_epi32(pair[1], pair[3]);
    row[4 * half + 3] = _mm_unpackhi_epi32(pair[1], pair[3]);
  }
  for (int i = 0; i < 4; ++i) {
    auto* low = reinterpret_cast<__m128i*>(destination + (2 * i) * destination_stride);
    auto* high = reinterpret_cast<__m128i*>(destination + (2 * i + 1) * destination_stride);
    _mm_storeu_si128(low, _mm_unpacklo_epi64(row[i], row[4 + i]));
    _mm_storeu_si128(high, _mm_unpackhi_epi64(row[i], row[4 + i]));
  }
}
#endif

template <typename T>
void transpose(const T* source, int64_t source_stride, T* destination, int64_t destination_stride,
               int64_t rows, int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 2) {
    whole_rows = rows / 8 * 8;
    whole_columns = columns / 8 * 8;
    for (int64_t r = 0; r < whole_rows; r += 8) {
      for (int64_t c = 0; c < whole_columns; c += 8) {
        transpose_8x8(source + c * source_stride + r, source_stride,
                      destination + r * destination_stride + c, destination_stride);
      }
    }
  }
#endif
  transpose_plain(source + whole_columns * source_stride, source_stride,
                  destination + whole_columns, destination_stride, whole_rows,
                  columns - whole_columns);
  transpose_plain(source + whole_rows, source_stride, destination + whole_rows * destination_stride,
                  destination_stride, rows - whole_rows, columns);
}

// One 2-D plane whose rows are contiguous in the destination and columns in the source.
template <typename T>
void transpose_plane(const std::byte* source, int64_t source_stride, std::byte* destination,
                     int64_t destination_stride, int64_t rows, int64_t columns, CastFunction cast,
                     int64_t destination_item) {
  alignas(64) T tile[kTile * kTile];
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t tile_rows = std::min(kTile, rows - r);
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t tile_columns = std::min(kTile, columns - c);
      const T* from = reinterpret_cast<const T*>(source) + c * source_stride + r;
      std::byte* to = destination + (r * destination_stride + c) * destination_item;
      if (cast == nullptr) {
        transpose(from, source_stride, reinterpret_cast<T*>(to), destination_stride, tile_rows,
                  tile_columns);
        continue;
      }
      transpose(from, source_stride, tile, kTile, tile_rows, tile_columns);
      for (int64_t i = 0; i < tile_rows; ++i) {
        cast(reinterpret_cast<const std::byte*>(tile + i * kTile),
             to + i * destination_stride * destination_item, tile_columns);
      }
    }
  }
}

void copy_row(const std::byte* source, int64_t source_stride, std::byte* destination,
              int64_t destination_stride, int64_t size, int64_t source_item,
              int64_t destination_item, CastFunction cast) {
  if (source_stride == 1 && destination_stride == 1) {
    if (cast != nullptr) return cast(source, destination, size);
    std::memcpy(destination, source, static_cast<size_t>(size * source_item));
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    const std::byte* from = source + i * source_stride * source_item;
    std::byte* to = destination + i * destination_stride * destination_item;
    if (cast != nullptr) {
      cast(from, to, 1);
    } else {
      std::memcpy(to, from, static_cast<size_t>(source_item));
    }
  }
}

}  // namespace

void copy_strided(const StridedCopy& copy, const std::byte* source, std::byte* destination,
                  SimdLevel level) {
  const int64_t source_item = item_size(copy.source_dtype);
  const int64_t destination_item = item_size(copy.destination_dtype);
  const CastFunction cast = copy.source_dtype == copy.destination_dtype
                                ? nullptr
                                : find_cast(copy.source_dtype, copy.destination_dtype, level);
  // Innermost is where the destination runs on; if the source runs on along another dimension,
  // that one is next, and the two make a transposed plane.
  std::array<int, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if ((copy.sizes[a] == 1) != (copy.sizes[b] == 1)) return copy.sizes[a] == 1;
    return copy.destination_strides[a] > copy.destination_strides[b];
  });
  if (copy.sizes[order[0]] > 1 && copy.source_strides[order[0]] == 1) std::swap(order[0], order[1]);
  const auto [outer, middle, inner] = order;
  const bool is_transposed = copy.sizes[middle] > 1 && copy.source_strides[middle] == 1 &&
                             copy.destination_strides[inner] == 1 &&
                             copy.source_strides[inner] != 1;
  for (int64_t i = 0; i < copy.sizes[outer]; ++i) {
    const std::byte* from = source + i * copy.source_strides[outer] * source_item;
    std::byte* to = destination + i * copy.destination_strides[outer] * destination_item;
    if (is_transposed) {
      const auto plane = source_item == 2   ? transpose_plane<uint16_t>
                         : source_item == 4 ? transpose_plane<uint32_t>
                                            : transpose_plane<uint64_t>;
      plane(from, copy.source_strides[inner], to, copy.destination_strides[middle],
            copy.sizes[middle], copy.sizes[inner], cast, destination_item);
      continue;
    }
    for (int64_t j = 0; j < copy.sizes[middle]; ++j) {
      copy_row(from + j * copy.source_strides[middle] * source_item, copy.source_strides[inner],
               to + j * copy.destination_strides[middle] * destination_item,
               copy.destination_strides[inner], copy.sizes[inner], source_item, destination_item,
               cast);
    }
  }
}

}  // namespace nanotron_fast
