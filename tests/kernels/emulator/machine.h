// What a program in PTX is made of, and the machine that runs it: a warp of 32 lanes at a time.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = ~0u;

// What a GPU would have stopped at, or would have computed something else by.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Special { kThread, kBlock, kThreads, kBlocks, kLane, kWarp };

struct Operand {
  enum class Kind { kRegister, kNumber, kVector, kAddress, kParameter, kSpecial, kNowhere };
  Kind kind = Kind::kNowhere;
  int slot = -1;  // of the register, of an address's base, of a kernel's parameter
  uint64_t number = 0;
  int64_t offset_bytes = 0;  // of an address
  int predicate = -1;        // the slot behind `|`
  bool is_negated = false;   // a predicate behind `!`
  Special special = Special::kThread;
  int axis = 0;                   // of a special register
  int bits = 32;                  // of each element of a vector
  std::vector<Operand> elements;  // of a vector; an address's coordinates
};

struct Warp;
struct Instruction;
// Runs an instruction for the lanes of a mask.
using Action = std::function<void(Warp&, const Instruction&, uint32_t lanes)>;

struct Instruction {
  enum class Kind { kPlain, kBranch, kReturn, kBarrier };
  Kind kind = Kind::kPlain;
  std::string text;
  int line = 0;    // in the file
  int guard = -1;  // the slot of its predicate
  bool is_guard_negated = false;
  std::vector<std::string> words;  // of its name, which dots part
  std::vector<Operand> operands;
  size_t target = 0;  // of a branch
  Action action;

  bool has(const std::string& word) const;
};

struct Program {
  std::string name;
  int num_threads = 0;  // of a block, where it says so
  int num_slots = 0;
  std::vector<uint32_t> parameter_bytes;
  std::vector<Instruction> instructions;
};

struct Block;

// A copy to shared memory that is under way.
struct Copy {
  uint32_t destination;
  uint64_t source;
  uint32_t size_bytes;
  uint32_t given_bytes;  // the rest becomes zeros
};

struct Warp {
  Block* block = nullptr;
  int index = 0;
  std::vector<uint64_t> registers;  // slot by slot, lane by lane
  uint32_t alive = kAllLanes;
  bool is_together = true;
  uint32_t at = 0;                      // the next instruction, while all lanes are together
  std::array<uint32_t, kLanes> next{};  // that of each lane, where they have parted
  bool is_at_barrier = false;
  uint64_t barrier = 0;
  bool waits = false;  // for another warp: it is not its turn any more
  const Instruction* current = nullptr;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> copies;  // committed groups

  uint64_t& lane_of(int slot, int lane) { return registers[size_t(slot) * kLanes + lane]; }
  uint64_t value(const Operand& operand, int lane) const;
  void set(const Operand& operand, int lane, uint64_t value);
  uint64_t address(const Operand& operand, int lane) const;
  [[noreturn]] void fail(const std::string& what, int lane = 0) const;
  // For instructions that all lanes take part in.
  void check_whole(uint32_t lanes) const;
};

// Where bulk copies end: a phase does when all have arrived, and all bytes that were announced.
struct Barrier {
  uint64_t arrivals = 0, pending = 0;
  int64_t pending_bytes = 0;
  bool phase = false;
  std::vector<std::function<void()>> copies;
};

// Who has touched a byte of shared memory since the barrier before.
struct Touched {
  int writer = -1;
  uint32_t written = 0, read = 0;  // in which epoch
  uint32_t readers = 0;            // a bit for each warp
  bool is_arriving = false;        // a copy to it is not waited for yet
};

struct Launch {
  const Program* program;
  std::array<uint32_t, 3> grid, threads;
  size_t shared_bytes;
  void** parameters;
};

struct Block {
  const Launch* launch;
  std::array<uint32_t, 3> place;
  uint32_t index;
  std::vector<uint8_t> shared;
  std::vector<Touched> touched;
  uint32_t epoch = 1;  // barriers passed
  std::map<uint32_t, Barrier> barriers;
  std::vector<Warp> warps;
};

// Whether an instruction of these words means what the actions below do.
bool is_known(const std::vector<std::string>& words, size_t num_operands);

// Throws Fault where an operand is no vector of so many registers.
void expect_vector(const Operand& operand, size_t count);

// Each gives the action of an instruction, or none where it is not of that kind.
Action arithmetic(const Instruction& instruction);
Action conversion(const Instruction& instruction);
Action transfer(const Instruction& instruction);
Action bulk_transfer(const Instruction& instruction);
Action matrix_product(const Instruction& instruction);

// The first kernel of a file in PTX. Throws Fault.
Program parse(const std::string& text);

// Runs all blocks, in an order of its own for each seed but 0. Throws Fault.
void run(const Launch& launch, uint32_t seed);

// Bits of a type: 32 of f32.
int bits_of(const std::string& type);

// Where a byte of shared memory lies whose rows are swizzled in pieces of 16 bytes.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes) {
  return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4);
}

// Calls `body` for the lanes of a mask.
template <class Body>
void each_lane(uint32_t lanes, Body body) {
  for (; lanes; lanes &= lanes - 1) body(__builtin_ctz(lanes));
}

}  // namespace emulator
