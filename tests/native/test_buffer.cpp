// Memory for what files hold: where it lies, beside the bytes' places in the files.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.h"
#include "core/block.h"
#include "core/buffer.h"
#include "core/schedule.h"

using namespace nanotron_fast;
namespace fs = std::filesystem;

namespace {

int64_t place_of(const std::byte* memory) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory) % kPageBytes);
}

// Whether the kernel's copy may be one of those that take five times as long.
bool is_slow(int64_t to, int64_t from) {
  const int64_t behind = (to - from) & (kPageBytes - 1);
  return behind <= 31 || behind > 0x990;
}

void test_no_pair_of_places_is_slow() {
  Buffer buffer;
  for (int64_t read = 0; read < kPageBytes; read += 3) {
    for (int64_t write = 0; write < kPageBytes; write += 5) {
      const int64_t place = place_of(buffer.reserve(1000, read + 3 * kPageBytes, write));
      CHECK(!is_slow(place, read));
      CHECK(!is_slow(write, place));
      CHECK(place % 64 == 0 && place < Buffer::kSlackBytes);
    }
  }
}

// Past the page cache pages of a file are carried to and from pages of memory, without a copy.
void test_pages_lie_on_pages_past_the_page_cache() {
  Buffer buffer(IoMode::kDirect);
  for (const int64_t write : {0, 1, 40, 4032, 4095, 5 * 4096 + 64}) {
    for (const int64_t read : {0, 8, 4095}) {
      CHECK(place_of(buffer.reserve(1000, read, write)) == write % kPageBytes);
    }
    CHECK(place_of(buffer.reserve(1000, write)) == write % kPageBytes);
  }
}

void test_all_of_it_is_there(IoMode io) {
  Buffer buffer(io);
  for (const int64_t num_bytes : {1, 100, 5000, 4999, 1 << 20}) {
    for (const int64_t offset : {0, 40, 4040, 4080, 4095}) {
      // A sanitizer would tell of a byte too few.
      std::memset(buffer.reserve(num_bytes, offset, 100), 1, static_cast<size_t>(num_bytes));
    }
  }
}

// A file of 3000 rows of 512 bytes behind so many others.
fs::path make_file(int64_t header_bytes) {
  const fs::path path = fs::temp_directory_path() /
                        ("nanotron_fast_buffer_" + std::to_string(std::random_device{}()));
  std::ofstream(path, std::ios::binary)
      << std::string(static_cast<size_t>(header_bytes) + 3000 * 512, '\7');
  return path;
}

// Every block of a copy of them to one file, or of their halves to two.
void test_blocks_lie_where_they_are_written_from_fast(IoMode io) {
  for (const int64_t header : {0, 8, 64, 4040, 4080, 4088}) {
    const fs::path path = make_file(header);
    const std::vector<SourceFile> sources{path.string()};
    for (const int64_t num_files : {1, 2}) {
      const int64_t columns = 256 / num_files;
      std::vector<Move> moves;
      for (int64_t file = 0; file < num_files; ++file) {
        moves.push_back({0,
                         header + file * columns * 2,
                         file,
                         4096,
                         {3000, columns, 1},
                         {256, 1, 1},
                         {columns, 1, 1},
                         Dtype::kBFloat16,
                         Dtype::kBFloat16});
      }
      const Schedule schedule = make_schedule(moves);
      IoPolicy policy(io);
      BlockBuilder builder(sources, schedule.scales, SimdLevel::kScalar, policy);
      for (const Job& job : schedule.jobs) {
        for (int64_t block = 0; block < job.num_blocks; ++block) {
          const int64_t row = job.first_row(block);
          const int64_t end = std::min(job.first_row(block + 1), job.num_rows);
          const std::byte* const built = builder.build(job, row, end - row);
          const int64_t place = place_of(built);
          const int64_t written = job.destinations.front().offset_of(row);
          if (io == IoMode::kDirect) {
            CHECK(place == written % kPageBytes);
          } else {
            CHECK(!is_slow(written, place));
            CHECK(num_files > 1 || !is_slow(place, job.sources.front().offset_of(row)));
          }
          CHECK(built[0] == std::byte{7});
        }
      }
    }
    fs::remove(path);
  }
}

}  // namespace

int main() {
  test_no_pair_of_places_is_slow();
  test_pages_lie_on_pages_past_the_page_cache();
  for (const IoMode io : {IoMode::kBuffered, IoMode::kDirect, IoMode::kDontCache}) {
    test_all_of_it_is_there(io);
    test_blocks_lie_where_they_are_written_from_fast(io);
  }
}
