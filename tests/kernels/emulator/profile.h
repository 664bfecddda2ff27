// What accesses to memory cost, where EMULATOR_PROFILE names a file to tell it.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

bool is_profiling();

// A lane's access, by the instruction that its warp is at.
void note_access(uint64_t address, uint32_t num_bytes, int lane, bool is_shared);

// The instruction is done: what its lanes have touched is counted.
void end_instruction(const Instruction& instruction);

// Adds a line in JSON for a launch.
void end_launch(const Program& program);

}  // namespace emulator
