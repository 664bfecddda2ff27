// The bulk copy engine of sm_90: descriptors of tensors, copies of boxes, and what is waited for.

#include <cstring>
#include <string>
#include <utility>

#include "machine.h"
#include "memory.h"

namespace emulator {

namespace {

// A tensor of two dimensions in global memory, and the box of it that is copied at once. The
// hardware's own layout is not known; a program only writes it by `tensormap.replace`.
struct TensorMap {
  uint64_t address, stride_bytes;
  uint32_t sizes[2], box[2], steps[2];
  uint32_t rank, type, interleave, swizzle, fill;
};
constexpr uint32_t kMapBytes = 128;
constexpr uint32_t kHalf = 64;
static_assert(sizeof(TensorMap) <= kMapBytes);

uint32_t item_bytes(const Warp& warp, uint32_t type) {
  constexpr uint32_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 8, 2};  // u8, u16, u32, ..., bf16
  if (type >= std::size(bytes)) warp.fail("a descriptor's type is " + std::to_string(type));
  return bytes[type];
}

Barrier& barrier_at(Warp& warp, int lane, uint64_t address) {
  const auto found = warp.block->barriers.find(static_cast<uint32_t>(address));
  if (found == warp.block->barriers.end()) warp.fail("no mbarrier is there", lane);
  return found->second;
}

// What the hardware asks of a descriptor and a place to copy to.
void check(const Warp& warp, int lane, const TensorMap& map, uint32_t destination,
           uint32_t row_bytes) {
  const uint32_t most_bytes = map.swizzle ? 16u << (map.swizzle & 3) : 256 * 8;
  const bool has_boxes = map.box[0] && map.box[0] <= 256 && map.box[1] && map.box[1] <= 256;
  if (map.rank != 1 || map.swizzle > 3 || map.interleave || map.fill || map.steps[0] != 1 ||
      map.steps[1] != 1) {
    warp.fail("a descriptor of another kind than this knows", lane);
  }
  if (map.address % 16 || map.stride_bytes % 16) warp.fail("misaligned: a tensor", lane);
  if (destination % 128) warp.fail("misaligned: the destination of a bulk copy", lane);
  if (!has_boxes || row_bytes % 16 || row_bytes > most_bytes) {
    warp.fail("a box of " + std::to_string(map.box[0]) + " x " + std::to_string(map.box[1]) +
                  " with rows of " + std::to_string(row_bytes) + " bytes",
              lane);
  }
}

// cp.async.bulk.tensor.2d.shared::cta.global... [destination], [map, {x, y}], [barrier]
//
// Until it is waited for, nobody may touch what is copied to.
void begin_copy(Warp& warp, const Instruction& self, uint32_t lanes) {
  each_lane(lanes, [&](int lane) {
    const auto destination = static_cast<uint32_t>(warp.address(self.operands[0], lane));
    const Operand& source = self.operands[1];
    const auto x = static_cast<int32_t>(warp.value(source.elements.at(0), lane));
    const auto y = static_cast<int32_t>(warp.value(source.elements.at(1), lane));
    TensorMap map;
    const uint64_t place = warp.address(source, lane);
    std::memcpy(&map, global(warp, lane, place, kHalf, false), sizeof map);
    const uint32_t size = item_bytes(warp, map.type), row_bytes = map.box[0] * size;
    check(warp, lane, map, destination, row_bytes);
    const uint32_t swizzle_bytes = map.swizzle ? 16u << map.swizzle : 16;
    for (uint32_t at = 0; at < row_bytes * map.box[1]; at += 16) {
      shared(warp, lane, destination + at, 16, true);
      for (uint32_t i = 0; i < 16; ++i)
        warp.block->touched[destination + at + i].is_arriving = true;
    }
    Warp* const own = &warp;
    Barrier* const barrier = &barrier_at(warp, lane, warp.address(self.operands[2], lane));
    barrier->copies.push_back([=] {
      for (uint32_t row = 0; row < map.box[1]; ++row) {
        for (uint32_t column = 0; column < map.box[0]; ++column) {
          const int64_t from_x = int64_t{x} + column, from_y = int64_t{y} + row;
          const uint32_t at = destination + row * row_bytes + column * size;
          uint8_t* const to = own->block->shared.data() + swizzled(at, swizzle_bytes);
          const bool is_inside =
              from_x >= 0 && from_y >= 0 && from_x < map.sizes[0] && from_y < map.sizes[1];
          std::memset(to, 0, size);
          if (is_inside) {
            const uint64_t from = map.address + from_y * map.stride_bytes + from_x * size;
            std::memcpy(to, global(*own, lane, from, size, false), size);
          }
        }
      }
      // Whoever has waited may read it.
      for (uint32_t at = 0; at < row_bytes * map.box[1]; ++at) {
        own->block->touched[destination + at] = Touched();
      }
      barrier->pending_bytes -= row_bytes * map.box[1];
    });
  });
}

void settle(Barrier& barrier) {
  if (barrier.pending || barrier.pending_bytes) return;
  barrier.phase = !barrier.phase;
  barrier.pending = barrier.arrivals;
}

Action barrier_action(const Instruction& instruction) {
  const std::string& what = instruction.words[1];
  if (what == "init") {
    return [](Warp& warp, const Instruction& self, uint32_t lanes) {
      each_lane(lanes, [&](int lane) {
        const auto place = static_cast<uint32_t>(warp.address(self.operands[0], lane));
        shared(warp, lane, place, 8, true);
        Barrier barrier;
        barrier.arrivals = static_cast<uint32_t>(warp.value(self.operands[1], lane));
        if (!barrier.arrivals) warp.fail("an mbarrier that nobody arrives at", lane);
        barrier.pending = barrier.arrivals;
        if (warp.block->barriers.contains(place) && !warp.block->barriers[place].copies.empty()) {
          warp.fail("an mbarrier begins with copies under way", lane);
        }
        warp.block->barriers[place] = std::move(barrier);
      });
    };
  }
  if (what == "inval") {
    return [](Warp& warp, const Instruction& self, uint32_t lanes) {
      each_lane(lanes, [&](int lane) {
        const uint64_t place = warp.address(self.operands[0], lane);
        if (!barrier_at(warp, lane, place).copies.empty()) {
          warp.fail("an mbarrier ends with copies under way", lane);
        }
        warp.block->barriers.erase(static_cast<uint32_t>(place));
      });
    };
  }
  if (what == "arrive") {  // _, [barrier][, bytes]
    const bool announces = instruction.has("expect_tx");
    return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
      each_lane(lanes, [&](int lane) {
        Barrier& barrier = barrier_at(warp, lane, warp.address(self.operands[1], lane));
        if (announces) {
          barrier.pending_bytes += static_cast<uint32_t>(warp.value(self.operands[2], lane));
        }
        if (!barrier.pending--) warp.fail("an arrival too many at an mbarrier", lane);
        if (barrier.copies.empty()) settle(barrier);
      });
    };
  }
  if (what != "try_wait" && what != "test_wait") return nullptr;
  return [](Warp& warp, const Instruction& self, uint32_t lanes) {  // done, [barrier], parity
    each_lane(lanes, [&](int lane) {
      Barrier& barrier = barrier_at(warp, lane, warp.address(self.operands[1], lane));
      const bool parity = warp.value(self.operands[2], lane) & 1;
      // Who waits for a phase that is over has not waited for these.
      while (barrier.phase == parity && !barrier.copies.empty()) {
        const auto copy = std::move(barrier.copies.front());
        barrier.copies.erase(barrier.copies.begin());
        copy();
        settle(barrier);
      }
      const bool is_done = barrier.phase != parity;
      warp.set(self.operands[0], lane, is_done);
      warp.waits |= !is_done;
    });
  };
}

// tensormap.replace.tile.FIELD... [map in shared memory], [index,] value
Action replace_field(const Instruction& instruction) {
  const std::string& field = instruction.words[3];
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      const auto place = static_cast<uint32_t>(warp.address(self.operands[0], lane));
      auto& map = *reinterpret_cast<TensorMap*>(shared(warp, lane, place, kHalf, true));
      const uint64_t first = warp.value(self.operands[1], lane);
      if (field == "global_address") {
        map.address = first;
      } else if (field == "rank") {
        map.rank = first;
      } else if (field == "elemtype") {
        map.type = first;
      } else if (field == "interleave_layout") {
        map.interleave = first;
      } else if (field == "swizzle_mode") {
        map.swizzle = first;
      } else if (field == "fill_mode") {
        map.fill = first;
      } else {
        const uint64_t value = warp.value(self.operands[2], lane);
        if (first > (field == "global_stride" ? 0 : 1))
          warp.fail("a descriptor of three dimensions", lane);
        if (field == "global_stride") {
          map.stride_bytes = value;
        } else {
          auto* const sizes = field == "global_dim"       ? map.sizes
                              : field == "box_dim"        ? map.box
                              : field == "element_stride" ? map.steps
                                                          : nullptr;
          if (!sizes) warp.fail("an unknown field of a descriptor: " + field, lane);
          sizes[first] = value;
        }
      }
    });
  };
}

void publish_map(Warp& warp, const Instruction& self, uint32_t lanes) {
  const int lane = __builtin_ctz(lanes);
  const uint64_t to = warp.address(self.operands[0], lane);
  const auto from = static_cast<uint32_t>(warp.address(self.operands[1], lane));
  for (uint32_t at = 0; at < kMapBytes; at += kHalf) {
    std::memcpy(global(warp, lane, to + at, kHalf, true),
                shared(warp, lane, from + at, kHalf, false), kHalf);
  }
}

}  // namespace

Action bulk_transfer(const Instruction& instruction) {
  const std::vector<std::string>& words = instruction.words;
  if (words[0] == "mbarrier") return barrier_action(instruction);
  if (words[0] == "tensormap") {
    return words[1] == "replace" ? replace_field(instruction) : Action(publish_map);
  }
  if (words[0] != "cp" || words[2] != "bulk") return nullptr;
  if (words[3] == "tensor" && words[4] == "2d" && words[5].starts_with("shared")) return begin_copy;
  // What is stored in bulk is done at once; no kernel does.
  if (words[3] == "commit_group" || words[3] == "wait_group") {
    return [](Warp&, const Instruction&, uint32_t) {};
  }
  return nullptr;
}

}  // namespace emulator
