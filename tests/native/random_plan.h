#pragma once

#include <array>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/move.h"

namespace nanotron_fast {

constexpr int kNumFiles = 4;  // on either side

// Builds plans tensor by tensor. Destinations are tiled exactly; sources have odd gaps.
struct Plan {
  Plan(unsigned seed, int64_t max_rows) : random(seed), max_rows(max_rows) {
    for (std::string& header : headers) header = std::string(static_cast<size_t>(pick(0, 9)), 'h');
    for (int i = 0; i < kNumFiles; ++i) {
      destination_sizes[i] = static_cast<int64_t>(headers[i].size());
    }
  }

  int64_t pick(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
  }
  int64_t take_source(int64_t file, int64_t num_bytes) {
    const int64_t offset = source_sizes[file] + pick(0, 3);
    source_sizes[file] = offset + num_bytes;
    return offset;
  }
  int64_t take_destination(int64_t file, int64_t num_bytes) {
    return std::exchange(destination_sizes[file], destination_sizes[file] + num_bytes);
  }
  void add(const Move& move) {
    table.insert(table.end(), {move.source_file, move.source_offset_bytes, move.destination_file,
                               move.destination_offset_bytes});
    table.insert(table.end(), move.sizes.begin(), move.sizes.end());
    table.insert(table.end(), move.source_strides.begin(), move.source_strides.end());
    table.insert(table.end(), move.destination_strides.begin(), move.destination_strides.end());
    table.insert(table.end(), {static_cast<int64_t>(move.source_dtype),
                               static_cast<int64_t>(move.destination_dtype), move.scales});
    moves.push_back(move);
  }

  // A whole tensor, its dimensions in any order in the source.
  void add_permuted() {
    const auto [from, to] = pick_dtypes();
    const int64_t a = pick(1, max_rows), b = pick(1, 90), c = pick(1, 9), count = a * b * c;
    const std::array<int64_t, 3> orders[] = {{b * c, c, 1}, {1, a * c, a}, {b, 1, a * b}};
    const int64_t source = pick(-1, kNumFiles - 1), destination = pick(0, kNumFiles - 1);
    const bool is_fill = source < 0;
    add({source,
         is_fill ? 0 : take_source(source, count * item_size(from)),
         destination,
         take_destination(destination, count * item_size(to)),
         {a, b, c},
         orders[pick(0, 2)],
         {b * c, c, 1},
         from,
         to});
  }
  // The columns of a matrix for (or from) every file; or every n-th of them, so that they
  // interleave.
  void add_columns(bool joins) {
    const auto [from, to] = pick_dtypes();
    const int64_t rows = pick(1, max_rows), columns = pick(1, 40), wide = kNumFiles * columns;
    const int64_t whole_item = item_size(joins ? to : from);
    const bool interleaves = pick(0, 1) == 1;
    const int64_t file = pick(0, kNumFiles - 1), num_bytes = rows * wide * whole_item;
    const int64_t whole = joins ? take_destination(file, num_bytes) : take_source(file, num_bytes);
    const std::array<int64_t, 3> narrow{columns, 1, 1};
    const std::array<int64_t, 3> inside{wide, interleaves ? kNumFiles : 1, 1};
    for (int64_t rank = 0; rank < kNumFiles; ++rank) {
      const int64_t at = whole + rank * (interleaves ? 1 : columns) * whole_item;
      if (joins) {
        const int64_t shard = take_source(rank, rows * columns * item_size(from));
        add({rank, shard, file, at, {rows, columns, 1}, narrow, inside, from, to});
      } else {
        const int64_t shard = take_destination(rank, rows * columns * item_size(to));
        add({file, at, rank, shard, {rows, columns, 1}, inside, narrow, from, to});
      }
    }
  }
  std::pair<Dtype, Dtype> pick_dtypes() {
    const auto from = static_cast<Dtype>(pick(0, 3));
    return {from, from == Dtype::kFloat64 ? from : static_cast<Dtype>(pick(0, 2))};
  }

  std::mt19937 random;
  int64_t max_rows;
  std::vector<Move> moves;
  std::vector<int64_t> table;
  std::array<int64_t, kNumFiles> source_sizes{}, destination_sizes{};
  std::array<std::string, kNumFiles> headers;
};

inline std::vector<std::string> execute_naively(const Plan& plan,
                                                const std::vector<std::string>& sources) {
  std::vector<std::string> results;
  for (int i = 0; i < kNumFiles; ++i) {
    results.push_back(plan.headers[i]);
    results.back().resize(static_cast<size_t>(plan.destination_sizes[i]), '?');
  }
  for (const Move& move : plan.moves) {
    const int64_t from_item = item_size(move.source_dtype),
                  item = item_size(move.destination_dtype);
    for (int64_t n = 0; n < move.num_elements(); ++n) {
      const std::array<int64_t, 3> at{n / move.sizes[2] / move.sizes[1],
                                      n / move.sizes[2] % move.sizes[1], n % move.sizes[2]};
      int64_t from = move.source_offset_bytes, to = move.destination_offset_bytes;
      for (int dim = 0; dim < 3; ++dim) {
        from += at[dim] * move.source_strides[dim] * from_item;
        to += at[dim] * move.destination_strides[dim] * item;
      }
      char* out = results[static_cast<size_t>(move.destination_file)].data() + to;
      std::memset(out, 0, static_cast<size_t>(item));
      if (move.is_fill()) continue;
      const char* in = sources[static_cast<size_t>(move.source_file)].data() + from;
      if (move.source_dtype == move.destination_dtype) {
        std::memcpy(out, in, static_cast<size_t>(item));
      } else {
        find_cast(move.source_dtype, move.destination_dtype, SimdLevel::kScalar)(
            reinterpret_cast<const std::byte*>(in), reinterpret_cast<std::byte*>(out), 1);
      }
    }
  }
  return results;
}

}  // namespace nanotron_fast
