// Instructions that move bits: between registers, lanes and memory.

#include <algorithm>
#include <cstring>
#include <string>

#include "machine.h"
#include "memory.h"

namespace emulator {

namespace {

// A part of a name without what is behind `::`, as in `shared::cta`.
std::string plain(const std::string& word) { return word.substr(0, word.find("::")); }

bool is_in(const Instruction& instruction, const char* space) {
  const std::vector<std::string>& words = instruction.words;
  return std::any_of(words.begin(), words.end(), [&](auto& each) { return plain(each) == space; });
}

uint64_t sign_extended(uint64_t bits, int num_bytes) {
  const int unused = 64 - 8 * num_bytes;
  return static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused);
}

Action move(const Instruction& instruction) {
  const bool is_predicate = instruction.words.back() == "pred";
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const uint64_t value = warp.value(self.operands[1], lane);
      warp.set(self.operands[0], lane, is_predicate ? value != 0 : value);
    });
  };
}

Action load_parameter(uint32_t num_bytes, bool is_signed) {
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    const Operand& given = self.operands[1];
    const Launch& launch = *warp.block->launch;
    if (given.kind != Operand::Kind::kParameter || given.offset_bytes < 0 ||
        given.offset_bytes + num_bytes > launch.program->parameter_bytes[given.slot]) {
      warp.fail("out of bounds: of a parameter");
    }
    const char* const parameter = static_cast<const char*>(launch.parameters[given.slot]);
    uint64_t bits = 0;
    std::memcpy(&bits, parameter + given.offset_bytes, num_bytes);
    if (is_signed) bits = sign_extended(bits, num_bytes);
    each_lane(lanes, [&](int lane) { warp.set(self.operands[0], lane, bits); });
  };
}

// Lanes of a warp that write to global memory at once: which of them is last is not known. In
// shared memory Triton has them write one sum, whose last bits may differ between lanes.
void check_stored(const Warp& warp, const Instruction& self, uint32_t lanes, int num_bytes) {
  const Operand& registers = self.operands[1];
  const bool is_vector = registers.kind == Operand::Kind::kVector;
  each_lane(lanes, [&](int lane) {
    auto* place = reinterpret_cast<const uint8_t*>(warp.address(self.operands[0], lane));
    for (size_t i = 0; i < (is_vector ? registers.elements.size() : 1); ++i, place += num_bytes) {
      const uint64_t bits = warp.value(is_vector ? registers.elements[i] : registers, lane);
      if (std::memcmp(place, &bits, num_bytes)) {
        warp.fail("race: another lane writes other bytes to one place", lane);
      }
    }
  });
}

Action load_or_store(const Instruction& instruction) {
  const bool loads = instruction.words[0] == "ld";
  const std::string& type = instruction.words.back();
  const int num_bytes = bits_of(type) / 8;
  const bool is_signed = type[0] == 's';
  if (is_in(instruction, "param")) return load_parameter(num_bytes, is_signed);
  const bool is_global = is_in(instruction, "global");
  if (!is_global && !is_in(instruction, "shared")) return nullptr;
  const int count = instruction.has("v4") ? 4 : instruction.has("v2") ? 2 : 1;
  const Operand& moved = instruction.operands[loads ? 0 : 1];
  if (count * num_bytes > 16) throw Fault("more than 16 bytes at once");
  if (count > 1 || moved.kind == Operand::Kind::kVector) expect_vector(moved, count);
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    const Operand& registers = self.operands[loads ? 0 : 1];
    each_lane(lanes, [&](int lane) {
      const uint64_t address = warp.address(self.operands[loads ? 1 : 0], lane);
      uint8_t* place =
          is_global ? global(warp, lane, address, count * num_bytes, !loads)
                    : shared(warp, lane, static_cast<uint32_t>(address), count * num_bytes, !loads);
      for (int i = 0; i < count; ++i, place += num_bytes) {
        const bool is_vector = registers.kind == Operand::Kind::kVector;
        const Operand& each = is_vector ? registers.elements[i] : registers;
        uint64_t bits = 0;
        if (loads) {
          std::memcpy(&bits, place, num_bytes);
          warp.set(each, lane, is_signed ? sign_extended(bits, num_bytes) : bits);
        } else {
          bits = warp.value(each, lane);
          store(place, &bits, num_bytes, warp, lane);
        }
      }
    });
    if (!loads && is_global) check_stored(warp, self, lanes, num_bytes);
  };
}

// All lanes that it names, and no others, must come to an instruction.
void check_members(const Warp& warp, const Operand& members, uint32_t lanes) {
  const int lane = __builtin_ctz(lanes);
  if (lanes != static_cast<uint32_t>(warp.value(members, lane))) {
    warp.fail("other lanes are here than it names", lane);
  }
}

Action shuffle(const Instruction& instruction) {
  const std::string& mode = instruction.words[2];
  const bool is_across = mode == "bfly", is_by_index = mode == "idx", is_up = mode == "up";
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    check_members(warp, self.operands[4], lanes);
    std::array<uint64_t, kLanes> given;
    for (int lane = 0; lane < kLanes; ++lane) given[lane] = warp.value(self.operands[1], lane);
    each_lane(lanes, [&](int lane) {
      const int by = warp.value(self.operands[2], lane) & 31;
      const auto bounds = static_cast<uint32_t>(warp.value(self.operands[3], lane));
      const int segment = bounds >> 8 & 31, clamp = bounds & 31;
      const int first = lane & segment, last = first | (clamp & ~segment);
      const int source = is_across     ? lane ^ by
                         : is_by_index ? first | (by & ~segment & 31)
                         : is_up       ? lane - by
                                       : lane + by;
      const bool is_inside = is_up ? source >= last : source <= last;
      if (is_inside && !(lanes >> source & 1)) warp.fail("a shuffle from a lane outside", lane);
      warp.set(self.operands[0], lane, given[is_inside ? source : lane]);
      if (self.operands[0].predicate >= 0) {
        warp.lane_of(self.operands[0].predicate, lane) = is_inside;
      }
    });
  };
}

Action reduction(const Instruction& instruction) {
  const std::string& how = instruction.words[2];
  const bool is_signed = instruction.words.back()[0] == 's';
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    check_members(warp, self.operands[2], lanes);
    const auto given = [&](int lane) {
      const auto bits = static_cast<uint32_t>(warp.value(self.operands[1], lane));
      return is_signed ? int64_t{static_cast<int32_t>(bits)} : int64_t{bits};
    };
    int64_t result = given(__builtin_ctz(lanes));
    each_lane(lanes & (lanes - 1), [&](int lane) {
      const int64_t each = given(lane);
      result = how == "max"   ? std::max(result, each)
               : how == "min" ? std::min(result, each)
               : how == "add" ? result + each
               : how == "and" ? result & each
               : how == "or"  ? result | each
                              : result ^ each;
    });
    each_lane(lanes,
              [&](int lane) { warp.set(self.operands[0], lane, static_cast<uint32_t>(result)); });
  };
}

Action vote(const Instruction& instruction) {
  const std::string& how = instruction.words[2];
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    check_members(warp, self.operands[2], lanes);
    uint32_t votes = 0;
    each_lane(lanes, [&](int lane) {
      votes |= uint32_t{warp.value(self.operands[1], lane) != 0} << lane;
    });
    const uint32_t result = how == "ballot" ? votes : how == "any" ? votes != 0 : votes == lanes;
    each_lane(lanes, [&](int lane) { warp.set(self.operands[0], lane, result); });
  };
}

void elect(Warp& warp, const Instruction& self, uint32_t lanes) {
  check_members(warp, self.operands[1], lanes);
  const int first = __builtin_ctz(lanes), predicate = self.operands[0].predicate;
  each_lane(lanes, [&](int lane) {
    warp.set(self.operands[0], lane, first);
    if (predicate >= 0) warp.lane_of(predicate, lane) = lane == first;
  });
}

// Until they are waited for, nobody may touch what is copied to.
void begin_copies(Warp& warp, const Instruction& self, uint32_t lanes) {
  const auto number = [&](size_t i, int lane) {
    return static_cast<uint32_t>(warp.value(self.operands[i], lane));
  };
  each_lane(lanes, [&](int lane) {
    Copy copy{};
    copy.destination = static_cast<uint32_t>(warp.address(self.operands[0], lane));
    copy.source = warp.address(self.operands[1], lane);
    copy.size_bytes = number(2, lane);
    copy.given_bytes = self.operands.size() > 3 ? number(3, lane) : copy.size_bytes;
    if (copy.size_bytes != 4 && copy.size_bytes != 8 && copy.size_bytes != 16) {
      warp.fail("a copy of " + std::to_string(copy.size_bytes) + " bytes", lane);
    }
    if (copy.given_bytes > copy.size_bytes) warp.fail("a copy takes more than it gives", lane);
    std::memset(shared(warp, lane, copy.destination, copy.size_bytes, true), 0xff, copy.size_bytes);
    if (copy.given_bytes) {
      if (copy.source % copy.size_bytes) warp.fail("misaligned: the source of a copy", lane);
      for (uint32_t i = 0; i < copy.given_bytes; ++i) {
        global(warp, lane, copy.source + i, 1, false);
      }
    }
    for (uint32_t i = 0; i < copy.size_bytes; ++i) {
      warp.block->touched[copy.destination + i].is_arriving = true;
    }
    warp.open_copies.push_back(copy);
  });
}

// It is written when it is waited for: others may read it behind a barrier after that.
void end_copies(Warp& warp, const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    for (uint32_t i = 0; i < copy.size_bytes; ++i) {
      warp.block->touched[copy.destination + i] = {warp.index, warp.block->epoch, 0, 0, false};
    }
    uint8_t* const destination = warp.block->shared.data() + copy.destination;
    std::memset(destination, 0, copy.size_bytes);
    std::memcpy(destination, reinterpret_cast<const void*>(copy.source), copy.given_bytes);
  }
}

Action asynchronous_copy(const Instruction& instruction) {
  const std::string& what = instruction.words[2];
  if (what == "ca" || what == "cg") return begin_copies;
  if (what == "commit_group") {
    return [](Warp& warp, const Instruction&, uint32_t) {
      warp.copies.push_back(std::move(warp.open_copies));
      warp.open_copies.clear();
    };
  }
  if (what == "wait_group") {
    return [](Warp& warp, const Instruction& self, uint32_t) {
      while (warp.copies.size() > warp.value(self.operands[0], 0)) {
        end_copies(warp, warp.copies.front());
        warp.copies.pop_front();
      }
    };
  }
  return nullptr;
}

}  // namespace

Action transfer(const Instruction& instruction) {
  const std::vector<std::string>& words = instruction.words;
  const std::string& name = words[0];
  if (name == "mov" || name == "cvta") return move(instruction);
  if (name == "ld" || name == "st") return load_or_store(instruction);
  if (name == "shfl") return shuffle(instruction);
  if (name == "redux") return reduction(instruction);
  if (name == "vote") return vote(instruction);
  if (name == "elect") return elect;
  if (name == "cp" && words[1] == "async" && words[2] != "bulk") {
    return asynchronous_copy(instruction);
  }
  const bool is_hint = name == "createpolicy" || name == "prefetch" || name == "nanosleep" ||
                       name == "griddepcontrol";
  // Warps run one at a time: what one has written the next one sees.
  if (is_hint || name == "fence" || name == "membar" || (name == "bar" && words[1] == "warp")) {
    return [](Warp&, const Instruction&, uint32_t) {};
  }
  return nullptr;
}

}  // namespace emulator
