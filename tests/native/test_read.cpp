// Reading ranges of files into memory: what lands where, and what is refused.

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.h"
#include "core/error.h"
#include "core/read.h"

using namespace nanotron_fast;
namespace fs = std::filesystem;

namespace {

struct Files {
  fs::path folder =
      fs::temp_directory_path() / ("nanotron_fast_read_" + std::to_string(std::random_device{}()));
  std::vector<std::string> paths, contents;

  explicit Files(const std::vector<size_t>& sizes) {
    fs::create_directory(folder);
    std::mt19937 random(7);
    for (const size_t size : sizes) {
      std::string bytes(size, '\0');
      for (char& byte : bytes) byte = static_cast<char>(random());
      paths.push_back((folder / std::to_string(paths.size())).string());
      std::ofstream(paths.back(), std::ios::binary) << bytes;
      contents.push_back(bytes);
    }
  }
  ~Files() { fs::remove_all(folder); }
};

using Row = std::vector<int64_t>;

int64_t read(const Files& files, const std::vector<Row>& rows, std::string& memory,
             int num_workers = 3) {
  Row table;
  for (const Row& row : rows) table.insert(table.end(), row.begin(), row.end());
  return read_ranges(
      files.paths, {table.data(), static_cast<int64_t>(rows.size())},
      {{reinterpret_cast<std::byte*>(memory.data()), static_cast<int64_t>(memory.size())}},
      num_workers, default_simd_level());
}

void test_ranges_land_where_they_should() {
  const Files files({5'000'003, 700, 9000});
  std::string memory(6'000'000, '?'), expected = memory;
  const std::vector<Row> rows{
      // A long run at odd offsets; rows of 6 bytes out of 20, packed; boxes that stay apart.
      {0, 3, 0, 1, 2'500'000, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1},
      {1, 5, 0, 5'000'100, 30, 3, 1, 10, 1, 1, 3, 1, 1, 1, 1, -1},
      {2, 1, 0, 5'100'000, 4, 5, 7, 100, 20, 1, 90, 10, 1, 2, 2, -1},
      {2, 0, 0, 5'200'001, 1, 1, 1, 5, 5, 5, 9, 9, 9, 0, 0, -1}};
  expected.replace(1, 5'000'000, files.contents[0], 3, 5'000'000);
  for (size_t i = 0; i < 30; ++i) {
    expected.replace(5'000'100 + 6 * i, 6, files.contents[1], 5 + 20 * i, 6);
  }
  for (size_t i = 0; i < 20; ++i) {
    const size_t to = 5'100'000 + 360 * (i / 5) + 40 * (i % 5);
    expected.replace(to, 28, files.contents[2], 1 + 400 * (i / 5) + 80 * (i % 5), 28);
  }
  expected.replace(5'200'001, 2, files.contents[2], 0, 2);
  for (const int workers : {1, 4}) {
    memory.assign(memory.size(), '?');
    CHECK(read(files, rows, memory, workers) == 5'000'000 + 180 + 560 + 2);
    CHECK(memory == expected);
  }
  CHECK(read(files, {}, memory) == 0);
}

void test_more_than_a_copy_is_refused() {
  const Files files({100});
  std::string memory(100, '?');
  const auto message = [&](const Row& row) {
    return message_of<PlanError>([&] { read(files, {row}, memory); });
  };
  const std::string more = "move 0: it is more than a copy of ranges";
  CHECK(message({0, 0, 0, 0, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2, -1}) == more);   // a cast
  CHECK(message({-1, 0, 0, 0, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1}) == more);  // zeros
  CHECK(message({0, 0, 0, 0, 4, 5, 1, 5, 1, 1, 1, 4, 1, 0, 0, -1}) == more);   // transposed
  CHECK(message({0, 0, 0, 0, 4, 1, 1, 2, 1, 1, 1, 1, 1, 0, 0, -1}) == more);   // every other one
  CHECK(
      contains(message({0, 90, 0, 0, 6, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1}), "byte 102 of a file"));
  CHECK(
      contains(message({0, 0, 0, 90, 6, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1}), "destination ends at"));
  CHECK(memory == std::string(100, '?'));
  Files missing({100});
  fs::remove(missing.paths[0]);
  try {
    read(missing, {{0, 0, 0, 0, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1}}, memory);
    CHECK(false);
  } catch (const IoError& error) {
    CHECK(error.error_number() == ENOENT && error.path() == missing.paths[0]);
  }
}

}  // namespace

int main() {
  test_ranges_land_where_they_should();
  test_more_than_a_copy_is_refused();
}
