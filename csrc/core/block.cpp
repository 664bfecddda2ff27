#include "core/block.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "core/strided.h"

namespace nanotron_fast {

const File& SourceFiles::get(int64_t index) {
  const auto found = open_.find(index);
  if (found != open_.end()) return found->second;
  if (open_.size() >= kMaxOpen) open_.clear();
  return open_.emplace(index, File::open_for_reading(files_[static_cast<size_t>(index)], policy_))
      .first->second;
}

namespace {

void fill_zeros(const Move& move, int64_t num_rows, std::byte* destination) {
  const auto item = static_cast<size_t>(item_size(move.destination_dtype));
  const auto row_elements = static_cast<size_t>(move.sizes[1] * move.sizes[2]);
  if (move.destination_strides[0] == static_cast<int64_t>(row_elements)) {
    std::memset(destination, 0, static_cast<size_t>(num_rows) * row_elements * item);
    return;
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < move.sizes[1]; ++j) {
      for (int64_t k = 0; k < move.sizes[2]; ++k) {
        const int64_t at = i * move.destination_strides[0] + j * move.destination_strides[1] +
                           k * move.destination_strides[2];
        std::memset(destination + at * static_cast<int64_t>(item), 0, item);
      }
    }
  }
}

}  // namespace

const std::byte* BlockBuilder::build(const Job& job, int64_t first_row, int64_t num_rows) {
  const int64_t write_offset = job.destinations.front().offset_of(first_row);
  const PlacedMove& only = job.moves.front();
  const bool is_plain_copy = job.moves.size() == 1 && only.source_view == 0 &&
                             only.move.source_dtype == only.move.destination_dtype &&
                             only.move.source_strides == only.move.destination_strides;
  if (is_plain_copy) {
    const View& view = job.sources.front();
    const int64_t read_offset = view.offset_of(first_row);
    std::byte* const both =
        destination_buffer_.reserve(job.destination_buffer_bytes, read_offset, write_offset);
    sources_.get(view.file).pread_exact(both, view.block_bytes(num_rows), read_offset);
    return both;
  }
  std::byte* const out = destination_buffer_.reserve(job.destination_buffer_bytes, write_offset);
  std::vector<std::byte*> destinations;
  std::byte* next = out;
  for (const View& view : job.destinations) {
    destinations.push_back(next);
    next += view.block_bytes(num_rows);
  }
  if (job.reads_runs) {
    for (const PlacedMove& placed : job.moves) {
      std::byte* to = destinations[static_cast<size_t>(placed.destination_view)] +
                      placed.destination_delta_bytes;
      build_from_runs(job, placed, first_row, num_rows, to);
    }
    return out;
  }
  std::vector<const std::byte*> loaded;
  std::byte* in = job.sources.empty()
                      ? nullptr
                      : source_buffer_.reserve(job.source_buffer_bytes,
                                               job.sources.front().offset_of(first_row));
  for (const View& view : job.sources) {
    const int64_t num_bytes = view.block_bytes(num_rows);
    sources_.get(view.file).pread_exact(in, num_bytes, view.offset_of(first_row));
    loaded.push_back(in);
    in += num_bytes;
  }
  for (const PlacedMove& placed : job.moves) {
    const std::byte* from =
        placed.source_view < 0
            ? nullptr
            : loaded[static_cast<size_t>(placed.source_view)] + placed.source_delta_bytes;
    std::byte* to =
        destinations[static_cast<size_t>(placed.destination_view)] + placed.destination_delta_bytes;
    build_move(placed, first_row, num_rows, from, to);
  }
  return out;
}

void BlockBuilder::build_move(const PlacedMove& placed, int64_t first_row, int64_t num_rows,
                              const std::byte* view_data, std::byte* destination) {
  const Move& move = placed.move;
  if (move.is_fill()) {
    fill_zeros(move, num_rows, destination);
    return;
  }
  const StridedCopy copy{{num_rows, move.sizes[1], move.sizes[2]},
                         move.source_strides,
                         move.destination_strides,
                         move.source_dtype,
                         move.destination_dtype};
  lay_out(move, copy, first_row, view_data, destination);
}

void BlockBuilder::lay_out(const Move& move, const StridedCopy& copy, int64_t first_row,
                           const std::byte* source, std::byte* destination) {
  if (!move.is_scaled()) {
    copy_strided(copy, source, destination, level_);
    return;
  }
  const Scales& scales = scales_[static_cast<size_t>(move.scales)];
  const Positions positions{first_position(move, scales) + first_row * move.source_strides[0],
                            move.source_strides};
  int64_t last = positions.first;
  for (int dim = 0; dim < 3; ++dim) last += (copy.sizes[dim] - 1) * positions.strides[dim];
  loaded_.load(scales, sources_.get(scales.source_file), positions.first, last);
  dequantise_strided(copy, positions, loaded_, source, destination, level_);
}

void BlockBuilder::build_from_runs(const Job& job, const PlacedMove& placed, int64_t first_row,
                                   int64_t num_rows, std::byte* destination) {
  const Move& move = placed.move;
  if (move.is_fill()) {
    build_move(placed, first_row, num_rows, nullptr, destination);
    return;
  }
  const int64_t item = item_size(move.source_dtype);
  const std::array<int64_t, 3> sizes{num_rows, move.sizes[1], move.sizes[2]};
  // The dimensions by their source strides, smallest first. Packed strides grow in this order.
  std::array<int, 3> order{0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if ((sizes[a] == 1) != (sizes[b] == 1)) return sizes[b] == 1;
    return move.source_strides[a] < move.source_strides[b];
  });
  std::array<int64_t, 3> packed{};
  int64_t stride = 1;
  for (const int dim : order) {
    packed[dim] = stride;
    stride *= sizes[dim];
  }
  const File& file = sources_.get(move.source_file);
  const auto [inner, middle, outer] = order;
  const int64_t run_elements = move.source_strides[inner] == 1 ? sizes[inner] : 1;
  const int64_t base = move.source_offset_bytes + first_row * move.source_strides[0] * item;
  std::byte* const in = source_buffer_.reserve(job.source_buffer_bytes, base);
  for (int64_t i = 0; i < sizes[outer]; ++i) {
    for (int64_t j = 0; j < sizes[middle]; ++j) {
      for (int64_t k = 0; k < sizes[inner]; k += run_elements) {
        const int64_t from = i * move.source_strides[outer] + j * move.source_strides[middle] +
                             k * move.source_strides[inner];
        const int64_t to = i * packed[outer] + j * packed[middle] + k;
        file.pread_exact(in + to * item, run_elements * item, base + from * item);
      }
    }
  }
  const StridedCopy copy{sizes, packed, move.destination_strides, move.source_dtype,
                         move.destination_dtype};
  lay_out(move, copy, first_row, in, destination);
}

}  // namespace nanotron_fast
