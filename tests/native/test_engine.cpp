// Random plans, executed by several workers, against a loop over the elements; and what goes wrong.

#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <random>

#include "check.h"
#include "core/engine.h"
#include "core/error.h"
#include "random_plan.h"

using namespace nanotron_fast;
namespace fs = std::filesystem;

namespace {

struct TemporaryFolder {
  fs::path path =
      fs::temp_directory_path() / ("nanotron_fast_test_" + std::to_string(std::random_device{}()));
  TemporaryFolder() { fs::create_directory(path); }
  ~TemporaryFolder() { fs::remove_all(path); }
};

void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// Paths are from here, or absolute.
const Folder kHere{AT_FDCWD, ""};

// A plan with its files in a folder.
struct Fixture {
  explicit Fixture(unsigned seed, const std::string& folder)
      : plan(seed, seed % 25 == 9 ? 9000 : 90) {
    for (int64_t i = plan.pick(1, 12); i > 0; --i) {
      const int64_t kind = plan.pick(0, 2);
      kind == 0 ? plan.add_permuted() : plan.add_columns(kind == 1);
    }
    for (int i = 0; i < kNumFiles; ++i) {
      const std::string number = std::to_string(i);
      std::string bytes(static_cast<size_t>(plan.source_sizes[i]), '\0');
      for (char& byte : bytes) byte = static_cast<char>(plan.random());
      sources.push_back(folder + "/source_" + number);
      write_file(sources.back(), bytes);
      contents.push_back(bytes);
      destinations.push_back(folder + "/destination_" + number);
      outputs.push_back({destinations.back(), {{0, plan.headers[i]}}, plan.destination_sizes[i]});
    }
  }
  int64_t num_moves() const { return static_cast<int64_t>(plan.moves.size()); }
  std::vector<SourceFile> source_files() const { return {sources.begin(), sources.end()}; }
  // Into files that are not there.
  void run(Progress& progress, int workers = 3) const {
    for (const std::string& path : destinations) fs::remove(path);
    run_over(progress, workers);
  }
  void run_over(Progress& progress, int workers) const {
    const EngineOptions options{workers, workers == 1, supported_simd_levels().back(), io};
    execute(source_files(), kHere, outputs, {plan.table.data(), num_moves()}, options, progress);
  }
  std::vector<Difference> differences(Progress& progress) const {
    const EngineOptions options{3, false, default_simd_level()};
    return compare(source_files(), {destinations.begin(), destinations.end()},
                   {plan.table.data(), num_moves()}, options, progress);
  }
  Plan plan;
  std::vector<std::string> sources, destinations, contents;
  std::vector<OutputFile> outputs;
  IoMode io = IoMode::kBuffered;
};

void check_digests(const Fixture& fixture, const Finished& finished,
                   const std::vector<std::string>& wanted) {
  const auto i = static_cast<size_t>(finished.output);
  const std::vector<Range>& ranges = fixture.outputs[i].hashed;
  CHECK(finished.digests.size() == ranges.size());
  for (size_t j = 0; j < ranges.size(); ++j) {
    Sha256 sha;
    sha.update(reinterpret_cast<const std::byte*>(wanted[i].data()) + ranges[j].offset_bytes,
               ranges[j].num_bytes);
    CHECK(finished.digests[j] == sha.finish());
  }
}

void test_random_plans(const std::string& folder) {
  for (unsigned seed = 0; seed < 150; ++seed) {
    Fixture fixture(seed, folder);
    const std::vector<std::string> wanted = execute_naively(fixture.plan, fixture.contents);
    fixture.io = static_cast<IoMode>(seed % 3);
    for (OutputFile& output : fixture.outputs) {
      // All of it, a part, and what ends it.
      const int64_t size = output.size_bytes, middle = size / 3;
      output.hashed = seed % 2 == 0 ? std::vector<Range>{{0, size}}
                                    : std::vector<Range>{{middle, middle}, {2 * middle, 0}};
    }
    Progress progress;
    fixture.run(progress, 1 + static_cast<int>(seed % 5));
    const std::vector<Finished> finished = progress.take_finished();
    CHECK(finished.size() == kNumFiles);
    for (const Finished& each : finished) check_digests(fixture, each, wanted);
    int64_t num_bytes = 0;
    for (int i = 0; i < kNumFiles; ++i) {
      CHECK(read_file(fixture.destinations[i]) == wanted[i]);
      num_bytes +=
          fixture.plan.destination_sizes[i] - static_cast<int64_t>(fixture.plan.headers[i].size());
    }
    CHECK(progress.bytes_done == num_bytes);
    CHECK(fixture.differences(progress).empty());

    const int64_t index = fixture.plan.pick(0, fixture.num_moves() - 1);
    const Move& move = fixture.plan.moves[static_cast<size_t>(index)];
    const auto file = static_cast<size_t>(move.destination_file);
    std::string flipped = wanted[file];
    flipped[static_cast<size_t>(move.destination_offset_bytes) + 1] ^= 4;
    write_file(fixture.destinations[file], flipped);
    const std::vector<Difference> found = fixture.differences(progress);
    CHECK(found.size() == 1 && found[0].move == index && found[0].num_elements == 1);
    CHECK(found[0].first_offset_bytes == move.destination_offset_bytes);
  }
}

void test_cancellation(const std::string& folder) {
  Progress progress;
  progress.is_cancelled = true;
  const Fixture fixture(1, folder);
  message_of<Cancelled>([&] { fixture.run(progress); });
  CHECK(progress.bytes_done == 0);
  fs::remove(fixture.destinations[0]);
  message_of<IoError>([&] { fixture.differences(progress); });
}

void test_io_errors(const std::string& folder) {
  Progress progress;
  Fixture missing(2, folder);
  fs::remove(missing.sources[3]);
  CHECK(contains(message_of<IoError>([&] { missing.run(progress); }), "source_3"));
  Fixture nowhere(2, folder);
  nowhere.outputs[2].path = folder + "/nowhere/out";
  CHECK(contains(message_of<IoError>([&] { nowhere.run(progress); }), "nowhere/out: No such"));
  nowhere.outputs[2].path = folder;
  CHECK(contains(message_of<IoError>([&] { nowhere.run(progress); }), "File exists"));
}

// What was there already is not written to, and a link is not followed.
void test_files_that_are_there(const std::string& folder) {
  Progress progress;
  const Fixture fixture(4, folder);
  fixture.run(progress, 1);
  CHECK(progress.take_finished().size() == kNumFiles);
  CHECK(progress.take_finished().empty());
  const std::string before = read_file(fixture.destinations[1]);
  CHECK(contains(message_of<IoError>([&] { fixture.run_over(progress, 1); }), "File exists"));
  CHECK(read_file(fixture.destinations[1]) == before);
  for (const std::string& path : fixture.destinations) fs::remove(path);
  fs::create_symlink(folder + "/elsewhere", fixture.destinations[1]);
  CHECK(contains(message_of<IoError>([&] { fixture.run_over(progress, 1); }), "File exists"));
  CHECK(!fs::exists(folder + "/elsewhere"));
  fs::remove(fixture.destinations[1]);
}

// Sources that are no longer what the plan was made with.
void test_changed_sources(const std::string& folder) {
  const std::string path = folder + "/watched";
  write_file(path, "0123456789");
  struct stat status;
  CHECK(::stat(path.c_str(), &status) == 0);
  const FileState state{static_cast<int64_t>(status.st_dev), static_cast<int64_t>(status.st_ino),
                        status.st_size,
                        status.st_mtim.tv_sec * int64_t{1000000000} + status.st_mtim.tv_nsec};
  const auto message = [&](const FileState& wanted) {
    return message_of<ChangedError>([&] { File::open_for_reading(SourceFile(path, wanted)); });
  };
  CHECK(File::open_for_reading(SourceFile(path, state)).size_bytes() == 10);
  FileState other = state;
  other.inode += 1;
  CHECK(contains(message(other), "watched: another file has taken its place"));
  other = state;
  other.size_bytes = 12;
  CHECK(contains(message(other), "watched: it had 12 bytes when the plan was made, and has 10"));
  other = state;
  other.mtime_ns -= 1;
  CHECK(contains(message(other), "watched: it was written to"));
  const File file = File::open_for_reading(SourceFile(path));
  std::byte buffer[4];
  CHECK(contains(message_of<ChangedError>([&] { file.pread_exact(buffer, 4, 8); }),
                 "watched: it ends at byte 10"));
}

// Bytes that no move writes, anywhere in a file.
void test_literals(const std::string& folder) {
  Progress progress;
  const EngineOptions options{2, true, default_simd_level()};
  const std::vector<OutputFile> outputs{
      {folder + "/literals", {{0, "head"}, {4, "tail"}}, 8, {{0, 7}, {8, 0}}}};
  execute({}, kHere, outputs, {nullptr, 0}, options, progress);
  CHECK(read_file(folder + "/literals") == "headtail");
  const std::vector<Finished> finished = progress.take_finished();
  CHECK(finished.size() == 1 && finished[0].output == 0 && finished[0].digests.size() == 2);
  CHECK(to_hex(finished[0].digests[0]) ==  // of headtai
        "2069980b7157977e56cec0d9ddfe7b8341b8cd9dcc83175e4e8d155bcc7edf87");
}

// Bytes of a file that is there already: the others stay, and it is neither made nor cut short.
void test_parts_of_files(const std::string& folder) {
  const std::string path = folder + "/there";
  const EngineOptions options{2, true, default_simd_level()};
  const std::vector<OutputFile> outputs{{path, {{4, "tail"}}, 12, {}, true}};
  const auto write = [&] {
    Progress progress;
    execute({}, kHere, outputs, {nullptr, 0}, options, progress);
    return progress.take_finished().size();
  };
  CHECK(contains(message_of<IoError>(write), "there"));
  CHECK(!fs::exists(path));
  write_file(path, "............");
  CHECK(write() == 1 && read_file(path) == "....tail....");
  CHECK(write() == 1 && read_file(path) == "....tail....");
  fs::create_symlink(path, folder + "/link");
  std::vector<OutputFile> linked = outputs;
  linked[0].path = folder + "/link";
  Progress progress;
  CHECK(contains(
      message_of<IoError>([&] { execute({}, kHere, linked, {nullptr, 0}, options, progress); }),
      "link"));
  write_file(path, "..............");
  CHECK(contains(message_of<PlanError>(write), "there: the plan left 14 of 12 bytes"));
}

void test_plan_errors(const std::string& folder) {
  Progress progress;
  Fixture fixture(3, folder);
  const auto file = static_cast<size_t>(fixture.plan.moves.back().source_file);
  write_file(fixture.sources[file], fixture.contents[file].substr(0, 10));
  CHECK(contains(message_of<PlanError>([&] { fixture.run(progress); }), "of a file of 10"));

  Fixture longer(3, folder);
  longer.outputs[1].size_bytes += 4;
  CHECK(contains(message_of<PlanError>([&] { longer.run(progress); }), "destination_1: the plan"));
}

}  // namespace

int main() {
  const TemporaryFolder folder;
  test_random_plans(folder.path);
  test_cancellation(folder.path);
  test_io_errors(folder.path);
  test_files_that_are_there(folder.path);
  test_changed_sources(folder.path);
  test_literals(folder.path);
  test_parts_of_files(folder.path);
  test_plan_errors(folder.path);
}
