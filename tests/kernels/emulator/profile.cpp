#include "profile.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>

namespace emulator {

namespace {

constexpr uint64_t kSectorBytes = 32, kWordBytes = 4, kBanks = 32, kPhaseBytes = 128;

struct Access {
  uint64_t address;
  uint32_t num_bytes;
  int lane;
  bool is_shared;
};

// `taken` beside the least that the bytes could do with.
struct Cost {
  uint64_t taken = 0, least = 0;
  uint64_t excess() const { return taken - least; }
  void operator+=(const Cost& other) {
    taken += other.taken;
    least += other.least;
  }
};

struct Costs {
  Cost sectors;      // of global memory
  Cost bank_cycles;  // of shared memory
};

std::vector<Access> accesses;
std::map<const Instruction*, Costs> costs;
uint64_t num_instructions = 0;

using Numbers = std::vector<uint64_t>;

void sort_out(Numbers& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

uint64_t parts(uint64_t number, uint64_t size) { return (number + size - 1) / size; }

// The sectors that a warp asks for at once.
Cost of_global() {
  Numbers bytes, sectors;
  for (const Access& each : accesses) {
    if (each.is_shared) continue;
    for (uint32_t i = 0; i < each.num_bytes; ++i) {
      bytes.push_back(each.address + i);
      sectors.push_back((each.address + i) / kSectorBytes);
    }
  }
  sort_out(bytes);
  sort_out(sectors);
  return {sectors.size(), parts(bytes.size(), kSectorBytes)};
}

// Shared memory serves 128 bytes at a time: all lanes, or a half or a quarter of a warp where each
// takes more. Other words of one bank wait for each other.
Cost of_shared() {
  uint64_t widest = kWordBytes;
  for (const Access& each : accesses) {
    if (each.is_shared) widest = std::max<uint64_t>(widest, each.num_bytes);
  }
  const int lanes = static_cast<int>(kPhaseBytes / widest);
  Cost cost;
  for (int first = 0; first < kLanes; first += lanes) {
    Numbers words;
    for (const Access& each : accesses) {
      if (!each.is_shared || each.lane < first || each.lane >= first + lanes) continue;
      for (uint32_t i = 0; i < each.num_bytes; ++i) {
        words.push_back((each.address + i) / kWordBytes);
      }
    }
    sort_out(words);
    std::array<uint64_t, kBanks> banks{};
    for (const uint64_t word : words) ++banks[word % kBanks];
    cost += {*std::max_element(banks.begin(), banks.end()), parts(words.size(), kBanks)};
  }
  return cost;
}

std::string quoted(const std::string& text) {
  std::string result;
  for (const char letter : text) {
    result += letter == '"' || letter == '\\' || letter < ' ' ? ' ' : letter;
  }
  return '"' + result + '"';
}

std::string in_json(const char* name, const Cost& cost) {
  return std::string(", \"") + name + "\": [" + std::to_string(cost.taken) + ", " +
         std::to_string(cost.least) + "]";
}

const char* file() {
  static const char* const name = std::getenv("EMULATOR_PROFILE");
  return name;
}

}  // namespace

bool is_profiling() { return file() != nullptr; }

void note_access(uint64_t address, uint32_t num_bytes, int lane, bool is_shared) {
  accesses.push_back({address, num_bytes, lane, is_shared});
}

void end_instruction(const Instruction& instruction) {
  ++num_instructions;
  const std::string& name = instruction.words[0];
  const bool counts = name == "ld" || name == "st" || name.ends_with("matrix") ||
                      (name == "cp" && instruction.words[2] != "bulk");
  if (counts && !accesses.empty()) {
    Costs& sum = costs[&instruction];
    sum.sectors += of_global();
    sum.bank_cycles += of_shared();
  }
  accesses.clear();
}

void end_launch(const Program& program) {
  Costs all;
  std::string worst;
  uint64_t most = 0;
  for (const auto& [instruction, each] : costs) {
    all.sectors += each.sectors;
    all.bank_cycles += each.bank_cycles;
    const uint64_t excess = each.sectors.excess() + each.bank_cycles.excess();
    if (excess <= most) continue;
    most = excess;
    worst = "line " + std::to_string(instruction->line) + ": " + instruction->text.substr(0, 80);
  }
  std::ofstream(file(), std::ios::app)
      << "{\"kernel\": " << quoted(program.name) << ", \"instructions\": " << num_instructions
      << in_json("sectors", all.sectors) << in_json("bank_cycles", all.bank_cycles)
      << ", \"worst\": " << quoted(worst) << "}\n";
  costs.clear();
  num_instructions = 0;
}

}  // namespace emulator
