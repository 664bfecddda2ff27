// Quantised sources through the whole engine, against one element at a time.

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

#include "check.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/read.h"

using namespace nanotron_fast;
namespace fs = std::filesystem;

namespace {

std::mt19937 generator(11);

int64_t pick(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(generator() % static_cast<uint64_t>(high - low + 1));
}

std::string random_bytes(int64_t count) {
  std::string bytes(static_cast<size_t>(count), '\0');
  for (char& byte : bytes) byte = static_cast<char>(generator());
  return bytes;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A stack of matrices whose every element goes to one output, its dimensions in any order.
struct Case {
  std::array<int64_t, 3> shape;
  std::array<int64_t, 8> scales;
  std::vector<int64_t> row;
  std::string codes, factors, expected;

  Case() {
    shape = {pick(1, 3), pick(1, 150), pick(1, 150)};
    const auto [matrices, rows, columns] = shape;
    const int64_t block_rows = pick(1, 40), block_columns = pick(1, 40);
    const int64_t grid_rows = (rows - 1) / block_rows + 1;
    const int64_t grid_columns = (columns - 1) / block_columns + 1;
    const auto dtype = static_cast<ScaleDtype>(pick(0, 1) == 0 ? 0 : pick(3, 5));
    const int64_t codes_offset = pick(0, 3), offset = pick(0, 3);
    scales = {1,          offset,       static_cast<int64_t>(dtype), codes_offset, rows, columns,
              block_rows, block_columns};
    const int64_t num_scales = matrices * grid_rows * grid_columns;
    const bool is_wide = dtype == ScaleDtype::kFloat32;
    codes = random_bytes(codes_offset + matrices * rows * columns);
    factors = random_bytes(offset + num_scales * (is_wide ? 4 : 1));
    if (is_wide) {
      for (int64_t i = 0; i < num_scales; ++i) {
        const float factor =
            std::ldexp(static_cast<float>(pick(1, 999)), static_cast<int>(pick(-20, 9)));
        std::memcpy(factors.data() + offset + 4 * i, &factor, 4);
      }
    }
    const auto from = static_cast<Dtype>(pick(4, 6));
    const auto to = static_cast<Dtype>(pick(0, 2));
    const std::array<int64_t, 3> orders[] = {
        {rows * columns, columns, 1}, {1, matrices * columns, matrices}, {columns * rows, 1, rows}};
    const auto strides = orders[pick(0, 2)];
    row = {0, codes_offset, 0, 0};
    row.insert(row.end(), shape.begin(), shape.end());
    row.insert(row.end(), {rows * columns, columns, 1});
    row.insert(row.end(), strides.begin(), strides.end());
    row.insert(row.end(), {static_cast<int64_t>(from), static_cast<int64_t>(to), 0});

    const std::vector<Scales> parsed =
        parse_scales(scales.data(), 1, {int64_t(codes.size()), int64_t(factors.size())});
    std::vector<float> widened(static_cast<size_t>(num_scales));
    widen_scales(parsed[0], reinterpret_cast<const std::byte*>(factors.data()) + offset, num_scales,
                 widened.data());
    expected.resize(static_cast<size_t>(matrices * rows * columns * item_size(to)));
    for (int64_t i = 0; i < matrices; ++i) {
      for (int64_t j = 0; j < rows; ++j) {
        for (int64_t k = 0; k < columns; ++k) {
          const int64_t scale = (i * grid_rows + j / block_rows) * grid_columns + k / block_columns;
          const int64_t at = i * strides[0] + j * strides[1] + k * strides[2];
          find_dequantise(from, to, SimdLevel::kScalar)(
              reinterpret_cast<const std::byte*>(codes.data()) + codes_offset +
                  (i * rows + j) * columns + k,
              reinterpret_cast<std::byte*>(expected.data()) + at * item_size(to), 1,
              widened[static_cast<size_t>(scale)]);
        }
      }
    }
  }

  MoveTable table() const { return {row.data(), 1, scales.data(), 1}; }
};

void test_engine_and_reader(const std::string& folder) {
  const std::string output = folder + "/output";
  const std::vector<std::string> paths{folder + "/codes", folder + "/factors"};
  for (int round = 0; round < 60; ++round) {
    const Case one;
    std::ofstream(paths[0], std::ios::binary) << one.codes;
    std::ofstream(paths[1], std::ios::binary) << one.factors;
    fs::remove(output);
    for (const SimdLevel level : supported_simd_levels()) {
      Progress progress;
      const EngineOptions options{2, false, level,
                                  round % 2 == 0 ? IoMode::kBuffered : IoMode::kDirect};
      fs::remove(output);
      execute({paths.begin(), paths.end()}, {AT_FDCWD, ""},
              {{output, {}, static_cast<int64_t>(one.expected.size())}}, one.table(), options,
              progress);
      CHECK(read_file(output) == one.expected);
      CHECK(
          compare({paths.begin(), paths.end()}, {output}, one.table(), options, progress).empty());
      std::string memory(one.expected.size(), '?');
      read_ranges(
          paths, one.table(),
          {{reinterpret_cast<std::byte*>(memory.data()), static_cast<int64_t>(memory.size())}}, 2,
          level);
      CHECK(memory == one.expected);
    }
  }
}

void test_rejects() {
  const std::array<int64_t, 8> good{0, 0, 0, 0, 2, 2, 1, 1};
  const auto rejects = [&](size_t column, int64_t value, const std::string& message) {
    auto bad = good;
    bad[column] = value;
    CHECK(contains(message_of<PlanError>([&] { parse_scales(bad.data(), 1, {16}); }), message));
  };
  CHECK(parse_scales(good.data(), 1, {16}).size() == 1);
  rejects(0, 1, "source file 1 is not one of 1");
  rejects(1, -1, "offset is negative");
  rejects(2, 6, "unknown dtype code 6");
  rejects(3, -1, "offset is negative");
  rejects(4, 0, "matrices of 0 x 2");
  rejects(5, INT64_MAX, "blocks of 1 x 1");
  rejects(7, 0, "blocks of 1 x 0");
}

}  // namespace

int main() {
  const std::string folder = "build/dequantise-" + std::to_string(getpid());
  fs::create_directories(folder);
  test_engine_and_reader(folder);
  test_rejects();
  fs::remove_all(folder);
}
