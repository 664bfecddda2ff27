#include "memory.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>

#include "profile.h"

namespace emulator {

namespace {

constexpr uint32_t kSeveral = ~0u;

struct Allocation {
  uint64_t size_bytes;
  // Of each byte the block that wrote it in this launch, and the one that read it; plus one.
  std::vector<uint32_t> writers, readers;
};

// Never destroyed: torch frees its memory after this library's statics would be gone.
std::map<uint64_t, Allocation>& allocations() {
  static auto* const all = new std::map<uint64_t, Allocation>;
  return *all;
}

// Freeing what a lookup has made comes back here.
std::recursive_mutex& lock() {
  static auto* const mutex = new std::recursive_mutex;
  return *mutex;
}

std::vector<Allocation*> touched;
// Whether the bytes that were given last for writing are being written by others too.
bool is_contested = false;

std::string in_hexadecimal(uint64_t number) {
  char text[20];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(number));
  return text;
}

void check_aligned(const Warp& warp, int lane, uint64_t address, uint32_t num_bytes) {
  if (address % num_bytes) {
    warp.fail("misaligned: " + std::to_string(num_bytes) + " bytes at " + in_hexadecimal(address),
              lane);
  }
}

// Notes who touches a byte, and gives the other block that must not, plus one.
uint32_t rival(Allocation& allocation, uint64_t at, uint32_t me, bool writes) {
  uint32_t& writer = allocation.writers[at];
  uint32_t& reader = allocation.readers[at];
  if (writes) {
    if (reader && reader != me) return reader;
    is_contested |= writer && writer != me;
    writer = me;
  } else {
    if (writer && writer != me) return writer;
    reader = reader && reader != me ? kSeveral : me;
  }
  return 0;
}

}  // namespace

void begin_launch() {
  const std::lock_guard guard(lock());
  for (Allocation* each : touched) {
    std::fill(each->writers.begin(), each->writers.end(), 0);
    std::fill(each->readers.begin(), each->readers.end(), 0);
  }
}

uint8_t* global(const Warp& warp, int lane, uint64_t address, uint32_t num_bytes, bool writes) {
  check_aligned(warp, lane, address, num_bytes);
  const std::lock_guard guard(lock());
  auto found = allocations().upper_bound(address);
  if (found == allocations().begin()) warp.fail("out of bounds: in no allocation", lane);
  --found;
  const uint64_t at = address - found->first;
  Allocation& allocation = found->second;
  if (at + num_bytes > allocation.size_bytes) {
    warp.fail("out of bounds: bytes " + std::to_string(at) + " to " +
                  std::to_string(at + num_bytes) + " of an allocation of " +
                  std::to_string(allocation.size_bytes),
              lane);
  }
  if (allocation.writers.empty()) {
    allocation.writers.resize(allocation.size_bytes);
    allocation.readers.resize(allocation.size_bytes);
    touched.push_back(&allocation);
  }
  is_contested = false;
  for (uint64_t each = at; each < at + num_bytes; ++each) {
    const uint32_t other = rival(allocation, each, warp.block->index + 1, writes);
    if (other) {
      const std::string who = other == kSeveral ? "others" : "block " + std::to_string(other - 1);
      warp.fail("race: byte " + std::to_string(each) + " of an allocation of " +
                    std::to_string(allocation.size_bytes) + ", with " + who,
                lane);
    }
  }
  if (is_profiling()) note_access(address, num_bytes, lane, false);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* shared(const Warp& warp, int lane, uint32_t address, uint32_t num_bytes, bool writes) {
  check_aligned(warp, lane, address, num_bytes);
  Block& block = *warp.block;
  if (uint64_t{address} + num_bytes > block.shared.size()) {
    warp.fail("out of bounds: byte " + std::to_string(address) + " of " +
                  std::to_string(block.shared.size()) + " of shared memory",
              lane);
  }
  is_contested = false;
  for (uint32_t at = address; at < address + num_bytes; ++at) {
    Touched& byte = block.touched[at];
    if (byte.is_arriving) {
      warp.fail("race: byte " + std::to_string(at) + " of shared memory is still copied to", lane);
    }
    const bool was_written = byte.written == block.epoch && byte.writer != warp.index;
    const bool was_read = byte.read == block.epoch && (byte.readers & ~(1u << warp.index));
    if (writes ? was_read : was_written) {
      warp.fail("race: byte " + std::to_string(at) + " of shared memory, with " +
                    (writes ? "a read" : "a write of warp " + std::to_string(byte.writer)),
                lane);
    }
    if (writes) {
      is_contested |= was_written;
      byte.writer = warp.index;
      byte.written = block.epoch;
    } else {
      if (byte.read != block.epoch) byte.readers = 0;
      byte.read = block.epoch;
      byte.readers |= 1u << warp.index;
    }
  }
  if (is_profiling()) note_access(address, num_bytes, lane, true);
  return block.shared.data() + address;
}

void store(uint8_t* destination, const void* bytes, uint32_t num_bytes, const Warp& warp,
           int lane) {
  if (is_contested && std::memcmp(destination, bytes, num_bytes)) {
    warp.fail("race: others write other bytes to one place", lane);
  }
  std::memcpy(destination, bytes, num_bytes);
}

}  // namespace emulator

// torch's allocator on a CPU calls these two, and so tells of every tensor.

extern "C" int posix_memalign(void** pointer, size_t alignment, size_t num_bytes) {
  static const auto theirs =
      reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  const int error = theirs(pointer, alignment, num_bytes);
  if (!error) {
    const std::lock_guard guard(emulator::lock());
    emulator::allocations()[reinterpret_cast<uint64_t>(*pointer)] = {num_bytes, {}, {}};
  }
  return error;
}

extern "C" void free(void* pointer) {
  static const auto theirs = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "free"));
  static thread_local bool is_inside = false;
  if (reinterpret_cast<uint64_t>(pointer) % 64 == 0 && pointer && !is_inside) {
    is_inside = true;  // the tables are freed by it, too
    {
      const std::lock_guard guard(emulator::lock());
      const auto found = emulator::allocations().find(reinterpret_cast<uint64_t>(pointer));
      if (found != emulator::allocations().end()) {
        std::erase(emulator::touched, &found->second);
        emulator::allocations().erase(found);
      }
    }
    is_inside = false;
  }
  theirs(pointer);
}
