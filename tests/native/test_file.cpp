// Files by every way of carrying bytes: odd places and sizes, many threads, and calls that fail.

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>

#include "check.h"
#include "core/digest.h"
#include "core/error.h"
#include "core/failure_point.h"
#include "core/file.h"
#include "core/pool.h"

using namespace nanotron_fast;
namespace fs = std::filesystem;

namespace {

constexpr IoMode kModes[] = {IoMode::kBuffered, IoMode::kDirect, IoMode::kDontCache};

struct Place {
  fs::path path =
      fs::temp_directory_path() / ("nanotron_fast_file_" + std::to_string(std::random_device{}()));
  Folder folder{AT_FDCWD, ""};
  Place() { fs::create_directory(path); }
  ~Place() { fs::remove_all(path); }
  std::string file(const std::string& name) const { return (path / name).string(); }
};

std::string random_bytes(size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random());
  return bytes;
}

const std::byte* data_of(const std::string& bytes) {
  return reinterpret_cast<const std::byte*>(bytes.data());
}

// Pieces of a file, neither their sizes nor their places multiples of anything.
std::vector<Range> pieces_of(int64_t size, unsigned seed, int64_t largest) {
  std::mt19937 random(seed);
  std::vector<Range> pieces;
  for (int64_t at = 0; at < size;) {
    const int64_t wanted = 1 + static_cast<int64_t>(random() % static_cast<unsigned>(largest));
    pieces.push_back({at, std::min(wanted, size - at)});
    at += pieces.back().num_bytes;
  }
  std::shuffle(pieces.begin(), pieces.end(), random);
  return pieces;
}

// Writes pieces from four threads, then reads others from four.
void check_round_trip(const Place& place, IoMode mode, const std::string& wanted, int64_t largest) {
  IoPolicy policy(mode);
  const std::string path = place.file("round_trip");
  fs::remove(path);
  const auto size = static_cast<int64_t>(wanted.size());
  const auto share = [](const std::vector<Range>& pieces, const auto& work) {
    std::atomic<size_t> next{0};
    run_workers(4, [&](int, const std::atomic<bool>&) {
      for (size_t i; (i = next++) < pieces.size();) work(pieces[i]);
    });
  };
  File file = File::create(place.folder, path, &policy);
  share(pieces_of(size, 1, largest), [&](const Range& piece) {
    file.pwrite_exact(data_of(wanted) + piece.offset_bytes, piece.num_bytes, piece.offset_bytes);
  });
  CHECK(file.size_bytes() == size);
  file.close();
  std::string found(wanted.size(), '\0');
  const File again = File::open_for_reading(SourceFile(path), &policy);
  share(pieces_of(size, 2, largest), [&](const Range& piece) {
    again.pread_exact(reinterpret_cast<std::byte*>(found.data()) + piece.offset_bytes,
                      piece.num_bytes, piece.offset_bytes);
  });
  CHECK(found == wanted);
  std::byte more[2];
  CHECK(contains(message_of<ChangedError>([&] { again.pread_exact(more, 2, size - 1); }),
                 "ends at byte " + std::to_string(size)));
}

void test_round_trips(const Place& place) {
  for (const IoMode mode : kModes) {
    check_round_trip(place, mode, random_bytes(5'000'003, 1), 400'000);
    check_round_trip(place, mode, random_bytes(3'000'001, 2), 2'500'000);
    check_round_trip(place, mode, random_bytes(20'000, 3), 3000);
    check_round_trip(place, mode, random_bytes(1, 4), 1);
  }
}

void test_round_trips_in_short_calls(const Place& place) {
  for (const char* failure : {"read:odd:EINTR", "write:odd:EINTR", "read:1+:half", "write:1+:half",
                              "write:odd:short", "read:odd:short", "write:1+:EOPNOTSUPP"}) {
    for (const IoMode mode : kModes) {
      set_failure_point(failure);
      const auto run = [&] { check_round_trip(place, mode, random_bytes(400'001, 5), 200'000); };
      if (contains(failure, "EOPNOTSUPP")) {
        CHECK(contains(message_of<IoError>(run), "round_trip: "));
      } else {
        run();
      }
      CHECK(failure_point_calls() > 0);
      set_failure_point("");
    }
  }
  // One byte at a time.
  set_failure_point("write:1+:short:round_trip");
  check_round_trip(place, IoMode::kBuffered, random_bytes(5000, 6), 700);
  CHECK(failure_point_calls() == 5000);
  set_failure_point("");
}

void test_failures_name_the_file(const Place& place) {
  const std::string bytes = random_bytes(300'000, 7);
  for (const IoMode mode : kModes) {
    for (const char* failure :
         {"open:1:EIO", "write:1:EIO", "close:1:EIO", "fsync:1:EIO", "writeback:1:EIO"}) {
      IoPolicy policy(mode);
      fs::remove(place.file("failing"));
      set_failure_point(std::string(failure) + ":failing");
      CHECK(contains(message_of<IoError>([&] {
                       File file = File::create(place.folder, place.file("failing"), &policy);
                       file.pwrite_exact(data_of(bytes), 300'000, 0);
                       file.write_back(0, 300'000);
                       file.sync();
                       file.close();
                     }),
                     "failing: Input/output error"));
      set_failure_point("");
    }
  }
}

void test_refusals_are_told_once(const Place& place) {
  std::ofstream(place.file("refusing")) << random_bytes(300'000, 8);
  for (const auto& [mode, failure] :
       {std::pair{IoMode::kDirect, "read:1:EINVAL"}, {IoMode::kDontCache, "read:1:EOPNOTSUPP"}}) {
    IoPolicy policy(mode);
    set_failure_point(failure);
    const File file = File::open_for_reading(SourceFile(place.file("refusing")), &policy);
    std::vector<std::byte> found(300'000);
    for (int i = 0; i < 3; ++i) file.pread_exact(found.data(), 300'000, 0);
    set_failure_point("");
    CHECK(std::string(reinterpret_cast<const char*>(found.data()), 300'000) ==
          random_bytes(300'000, 8));
    CHECK(contains(policy.refusal(), "refusing: "));
  }
  CHECK(IoPolicy(IoMode::kBuffered).refusal().empty());
  CHECK(contains(message_of<std::invalid_argument>([] { parse_io_mode("fast"); }), "'fast'"));
}

void test_digests(const Place& place) {
  const std::string bytes = random_bytes(2'500'000, 9);
  std::ofstream(place.file("hashed"), std::ios::binary) << bytes;
  const std::vector<SourceFile> files{SourceFile(place.file("hashed"))};
  const std::vector<FileRange> ranges{{0, {0, 2'500'000}}, {0, {3, 1'200'001}}, {0, {7, 0}}};
  for (const IoMode mode : kModes) {
    Progress progress;
    const auto digests = digest(files, ranges, 3, mode, progress);
    for (size_t i = 0; i < ranges.size(); ++i) {
      Sha256 sha;
      sha.update(data_of(bytes) + ranges[i].range.offset_bytes, ranges[i].range.num_bytes);
      CHECK(digests[i] == sha.finish());
    }
    CHECK(progress.bytes_done == 3'700'001);
    progress.is_cancelled = true;
    message_of<Cancelled>([&] { digest(files, ranges, 3, mode, progress); });
  }
}

void test_failure_points_are_read_strictly() {
  for (const char* text : {"write", "write:1", "write:0:EIO", "write:2x:EIO", "seek:1:EIO",
                           "write:1:EWHAT", "read:1+:EINTR"}) {
    CHECK(contains(message_of<std::invalid_argument>([&] { set_failure_point(text); }), text));
  }
}

}  // namespace

int main() {
  const Place place;
  test_round_trips(place);
  test_round_trips_in_short_calls(place);
  test_failures_name_the_file(place);
  test_refusals_are_told_once(place);
  test_digests(place);
  test_failure_points_are_read_strictly();
}
