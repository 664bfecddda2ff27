// Blocks one after the other; in a block, each warp until it ends or waits for others.

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <utility>

#include "machine.h"
#include "memory.h"
#include "profile.h"

namespace emulator {

uint64_t Warp::value(const Operand& operand, int lane) const {
  switch (operand.kind) {
    case Operand::Kind::kRegister: {
      const uint64_t bits = registers[size_t(operand.slot) * kLanes + lane];
      return operand.is_negated ? !bits : bits;
    }
    case Operand::Kind::kNumber:
      return operand.number;
    case Operand::Kind::kVector: {
      uint64_t bits = 0;
      for (size_t i = operand.elements.size(); i--;) {
        const uint64_t mask = ~uint64_t{0} >> (64 - operand.bits);
        bits = bits << operand.bits | (value(operand.elements[i], lane) & mask);
      }
      return bits;
    }
    case Operand::Kind::kSpecial: {
      const Launch& launch = *block->launch;
      const uint32_t thread = index * kLanes + lane;
      const auto& threads = launch.threads;
      const std::array<uint32_t, 3> place = {thread % threads[0], thread / threads[0] % threads[1],
                                             thread / threads[0] / threads[1]};
      switch (operand.special) {
        case Special::kThread:
          return place[operand.axis];
        case Special::kBlock:
          return block->place[operand.axis];
        case Special::kThreads:
          return threads[operand.axis];
        case Special::kBlocks:
          return launch.grid[operand.axis];
        case Special::kLane:
          return lane;
        case Special::kWarp:
          return index;
      }
      [[fallthrough]];
    }
    default:
      fail("an operand has no value", lane);
  }
}

void Warp::set(const Operand& operand, int lane, uint64_t value) {
  if (operand.kind == Operand::Kind::kRegister) {
    lane_of(operand.slot, lane) = value;
  } else if (operand.kind == Operand::Kind::kVector) {
    for (const Operand& each : operand.elements) {
      const uint64_t mask = ~uint64_t{0} >> (64 - operand.bits);
      set(each, lane, value & mask);
      if (operand.bits < 64) value >>= operand.bits;
    }
  } else if (operand.kind != Operand::Kind::kNowhere) {
    fail("a result goes to what is no register", lane);
  }
}

uint64_t Warp::address(const Operand& operand, int lane) const {
  if (operand.kind != Operand::Kind::kAddress) fail("an operand is no address", lane);
  const bool has_base = operand.slot >= 0;
  const uint64_t base = has_base ? registers[size_t(operand.slot) * kLanes + lane] : operand.number;
  return base + operand.offset_bytes;
}

void Warp::fail(const std::string& what, int lane) const {
  std::string place;
  for (const uint32_t each : block->place)
    place += (place.empty() ? "" : ",") + std::to_string(each);
  std::string instruction = current->text.substr(0, 200);
  std::replace(instruction.begin(), instruction.end(), '\n', ' ');
  throw Fault(what + "; in " + block->launch->program->name + ", block " + place + ", thread " +
              std::to_string(index * kLanes + lane) + ", line " + std::to_string(current->line) +
              " of its PTX: " + instruction);
}

void Warp::check_whole(uint32_t lanes) const {
  if (lanes != kAllLanes) fail("only some lanes of a warp are here");
}

namespace {

// Lanes that go on next: those furthest behind, so that parted ways meet again.
uint32_t furthest_behind(const Warp& warp, uint32_t& at) {
  at = warp.at;
  if (warp.is_together) return warp.alive;
  at = ~0u;
  each_lane(warp.alive, [&](int lane) { at = std::min(at, warp.next[lane]); });
  uint32_t lanes = 0;
  each_lane(warp.alive, [&](int lane) { lanes |= uint32_t{warp.next[lane] == at} << lane; });
  return lanes;
}

void go_on(Warp& warp, uint32_t lanes, uint32_t at) {
  if (lanes == warp.alive) {
    warp.at = at;
    warp.is_together = true;
  } else if (lanes) {
    if (warp.is_together) warp.next.fill(warp.at);
    warp.is_together = false;
    each_lane(lanes, [&](int lane) { warp.next[lane] = at; });
  }
}

// Instructions that a warp runs at once, between two barriers.
constexpr uint64_t kMostSteps = 50'000'000;

// Until the warp ends, comes to a barrier, or waits for another one.
void run_on(Warp& warp) {
  const std::vector<Instruction>& instructions = warp.block->launch->program->instructions;
  warp.waits = false;
  for (uint64_t steps = 0; warp.alive; ++steps) {
    if (steps == kMostSteps) warp.fail("a loop without an end");
    uint32_t at;
    const uint32_t here = furthest_behind(warp, at);
    if (at >= instructions.size()) warp.fail("it runs past its end");
    const Instruction& instruction = instructions[at];
    warp.current = &instruction;
    uint32_t lanes = here;
    if (instruction.guard >= 0) {
      each_lane(here, [&](int lane) {
        const bool is_set = warp.lane_of(instruction.guard, lane);
        if (is_set == instruction.is_guard_negated) lanes &= ~(1u << lane);
      });
    }
    go_on(warp, here, at + 1);
    switch (instruction.kind) {
      case Instruction::Kind::kPlain:
        if (lanes) instruction.action(warp, instruction, lanes);
        if (is_profiling()) end_instruction(instruction);
        break;
      case Instruction::Kind::kBranch:
        go_on(warp, lanes, static_cast<uint32_t>(instruction.target));
        if (warp.waits) return;
        break;
      case Instruction::Kind::kReturn:
        warp.alive &= ~lanes;
        break;
      case Instruction::Kind::kBarrier:
        if (!lanes) break;
        if (lanes != warp.alive) warp.fail("only some lanes of a warp come to a barrier");
        warp.is_at_barrier = true;
        warp.barrier = static_cast<uint32_t>(warp.value(instruction.operands[0], 0));
        return;
    }
  }
}

// Whether all warps stood at one barrier, and go on then.
bool opens_barrier(Block& block) {
  const Warp* first = nullptr;
  for (const Warp& each : block.warps) {
    if (!each.alive) continue;
    if (!each.is_at_barrier || (first && each.barrier != first->barrier)) return false;
    first = &each;
  }
  if (!first) return false;
  for (Warp& each : block.warps) each.is_at_barrier = false;
  ++block.epoch;
  return true;
}

// Turns of all warps in which none comes further than to wait.
constexpr int kMostTurns = 100000;

void run_block(const Launch& launch, uint32_t index, std::mt19937* random) {
  Block block{&launch, {}, index, {}, {}, 1, {}, {}};
  const auto& grid = launch.grid;
  block.place = {index % grid[0], index / grid[0] % grid[1], index / grid[0] / grid[1]};
  // Memory that nobody has written holds NaN.
  block.shared.assign(launch.shared_bytes, 0xff);
  block.touched.resize(launch.shared_bytes);
  const uint32_t threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
  block.warps.resize(threads / kLanes);
  std::vector<Warp*> turns;
  for (Warp& each : block.warps) {
    each.block = &block;
    each.index = static_cast<int>(turns.size());
    each.registers.assign(size_t(launch.program->num_slots) * kLanes, ~uint64_t{0});
    turns.push_back(&each);
  }
  for (int idle = 0;; ++idle) {
    if (random) std::shuffle(turns.begin(), turns.end(), *random);
    bool is_over = true, all_wait = true;
    for (Warp* each : turns) {
      if (!each->alive) continue;
      is_over = false;
      if (each->is_at_barrier) continue;
      run_on(*each);
      all_wait &= each->waits;
    }
    if (is_over) break;
    if (opens_barrier(block) || !all_wait) idle = 0;
    if (idle > kMostTurns)
      throw Fault("deadlock: all wait for each other; in " + launch.program->name);
  }
  for (const auto& [_, barrier] : block.barriers) {
    if (!barrier.copies.empty()) {
      throw Fault("a bulk copy is never waited for; in " + launch.program->name);
    }
  }
}

}  // namespace

void run(const Launch& launch, uint32_t seed) {
  const Program& program = *launch.program;
  const uint32_t threads = launch.threads[0] * launch.threads[1] * launch.threads[2];
  if (threads % kLanes || threads > 1024 ||
      (program.num_threads && uint32_t(program.num_threads) != threads)) {
    throw Fault(program.name + " is launched with " + std::to_string(threads) + " threads");
  }
  begin_launch();
  std::vector<uint32_t> order(size_t(launch.grid[0]) * launch.grid[1] * launch.grid[2]);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(seed);
  if (seed) std::shuffle(order.begin(), order.end(), random);
  for (const uint32_t index : order) run_block(launch, index, seed ? &random : nullptr);
  if (is_profiling()) end_launch(program);
}

}  // namespace emulator
