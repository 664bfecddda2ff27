// What may be touched of memory, and who has touched it.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

// Forgets who has touched global memory: a launch begins.
void begin_launch();

// Bytes of global or shared memory that a lane may read or write. They lie within one allocation,
// at a multiple of their number. Throws Fault, for races as well: between blocks, or between warps
// that no barrier parts.
uint8_t* global(const Warp& warp, int lane, uint64_t address, uint32_t num_bytes, bool writes);
uint8_t* shared(const Warp& warp, int lane, uint32_t address, uint32_t num_bytes, bool writes);

// Stores bytes where one of these was asked for last. Others may store the same there, but nothing
// else.
void store(uint8_t* destination, const void* bytes, uint32_t num_bytes, const Warp& warp, int lane);

}  // namespace emulator
