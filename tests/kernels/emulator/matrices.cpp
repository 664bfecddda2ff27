// Products of matrices, and their loads and stores: mma, wgmma, ldmatrix, stmatrix.
//
// Sums are in fp64 and rounded once: a tensor core's own order of them is not known.

#include <array>
#include <cstring>
#include <string>

#include "machine.h"
#include "memory.h"
#include "numbers.h"

namespace emulator {

namespace {

using Decode = float (*)(uint32_t bits);

Decode decoder(const std::string& type) {
  if (type == "bf16") return [](uint32_t bits) { return from_bf16(static_cast<uint16_t>(bits)); };
  if (type == "f16") return [](uint32_t bits) { return from_f16(static_cast<uint16_t>(bits)); };
  if (type == "tf32") return [](uint32_t bits) { return from_tf32(bits); };
  return nullptr;
}

// Where the elements of a lane's registers lie in tiles of 16 x 8 fp32, and of 16 x 32 bytes.
int row_of(int lane, int i) { return lane / 4 + (i >> 1 & 1) * 8; }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

struct Matrix {
  int columns;
  std::vector<float> values;

  Matrix(int rows, int columns) : columns(columns), values(size_t(rows) * columns) {}
  float& at(int row, int column) { return values[size_t(row) * columns + column]; }
};

// Adds a product to what a warp has of a matrix of 16 rows.
void accumulate(Matrix& sums, Matrix& a, Matrix& b, double factor) {
  std::vector<double> row_sums(sums.columns);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < sums.columns; ++column) row_sums[column] = sums.at(row, column);
    for (int k = 0; k < a.columns; ++k) {
      const double left = factor * a.at(row, k);
      const float* const right = &b.at(k, 0);
      for (int column = 0; column < sums.columns; ++column)
        row_sums[column] += left * right[column];
    }
    for (int column = 0; column < sums.columns; ++column) {
      sums.at(row, column) = static_cast<float>(row_sums[column]);
    }
  }
}

void read_sums(Warp& warp, const Operand& registers, Matrix& sums) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (size_t i = 0; i < registers.elements.size(); ++i) {
      sums.at(row_of(lane, i), column_of(lane, i)) =
          bits_as<float>(warp.value(registers.elements[i], lane));
    }
  }
}

void write_sums(Warp& warp, const Operand& registers, Matrix& sums) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (size_t i = 0; i < registers.elements.size(); ++i) {
      const float sum = sums.at(row_of(lane, i), column_of(lane, i));
      warp.set(registers.elements[i], lane, bits_as<uint64_t>(sum));
    }
  }
}

// Element `i` of `per_register` in a register.
float element(uint64_t bits, int i, int per_register, Decode decode) {
  return decode(static_cast<uint32_t>(bits >> (i * 32 / per_register)));
}

// A warp's 16 rows of the left matrix, of which a lane has four registers.
void read_left(Warp& warp, const Operand& registers, Matrix& a, int per_register, Decode decode) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const uint64_t bits = warp.value(registers.elements[i], lane);
      const int row = lane / 4 + (i & 1) * 8;
      const int column = (lane % 4 + (i >> 1) * 4) * per_register;
      for (int j = 0; j < per_register; ++j) {
        a.at(row, column + j) = element(bits, j, per_register, decode);
      }
    }
  }
}

void read_right(Warp& warp, const Operand& registers, Matrix& b, int per_register, Decode decode) {
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 2; ++i) {
      const uint64_t bits = warp.value(registers.elements[i], lane);
      for (int j = 0; j < per_register; ++j) {
        b.at((lane % 4 + i * 4) * per_register + j, lane / 4) =
            element(bits, j, per_register, decode);
      }
    }
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 d, a, b, c
Action warp_product(const Instruction& instruction) {
  const std::vector<std::string>& words = instruction.words;
  const Decode decode = decoder(words[7]);
  const int per_register = words[7] == "tf32" ? 1 : 2;
  for (int i = 0; i < 4; ++i) expect_vector(instruction.operands[i], i == 2 ? 2 : 4);
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    warp.check_whole(lanes);
    Matrix a(16, 8 * per_register), b(8 * per_register, 8), sums(16, 8);
    read_left(warp, self.operands[1], a, per_register, decode);
    read_right(warp, self.operands[2], b, per_register, decode);
    read_sums(warp, self.operands[3], sums);
    accumulate(sums, a, b, 1);
    write_sums(warp, self.operands[0], sums);
  };
}

// A matrix in shared memory as wgmma describes it: https://docs.nvidia.com/cuda/parallel-thread-
// execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout
struct Described {
  uint32_t start, leading, stride;  // bytes
  int swizzle;                      // 1, 2, 3: rows of 128, 64, 32 bytes; 0: of 16

  explicit Described(uint64_t bits)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        swizzle(bits >> 62) {}

  // The address of an element by its place along k and across it. The matrix is cut into cores of
  // eight rows; rows go along k, or across it where it is transposed.
  uint32_t address(int across, int k, bool is_transposed, int item_bytes) const {
    const uint32_t row_bytes = swizzle ? 256u >> swizzle : 16;
    const uint32_t along = (is_transposed ? across : k) * item_bytes;
    const uint32_t row = is_transposed ? k : across;
    // Without swizzling the two distances change places where rows go across k.
    const bool changes = is_transposed && !swizzle;
    const uint32_t at = start + along / row_bytes * (changes ? stride : leading) +
                        row / 8 * (changes ? leading : stride) + row % 8 * row_bytes +
                        along % row_bytes;
    return swizzled(at, row_bytes);
  }
};

Matrix read_described(Warp& warp, uint64_t bits, int first, int count, int depth,
                      bool is_transposed, int item_bytes, Decode decode) {
  if (bits >> 49 & 7) warp.fail("a matrix with a base offset");
  const Described described(bits);
  Matrix result(count, depth);
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < depth; ++k) {
      const uint32_t at = described.address(first + i, k, is_transposed, item_bytes);
      uint32_t item = 0;
      std::memcpy(&item, shared(warp, 0, at, item_bytes, false), item_bytes);
      result.at(i, k) = decode(item);
    }
  }
  return result;
}

// wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 d, a, b, keeps, sign, sign[, turns][,
// turns]
//
// Each of four warps has 16 rows of 64. It is done at once: what is read too early shows in the
// copies that it is read from.
Action group_product(const Instruction& instruction) {
  const std::vector<std::string>& words = instruction.words;
  if (words[1] != "mma_async") return [](Warp&, const Instruction&, uint32_t) {};
  const Decode decode = decoder(words[6]);
  int num_columns = 0, depth = 0;
  std::sscanf(words[4].c_str(), "m64n%dk%d", &num_columns, &depth);
  if (num_columns < 8 || num_columns > 256 || num_columns % 8) throw Fault("no such matrix");
  const std::vector<Operand>& given = instruction.operands;
  const bool is_in_registers = given[1].kind == Operand::Kind::kVector;
  const size_t num_turned = words[6] == "tf32" ? 0 : is_in_registers ? 1 : 2;
  if (given.size() != 6 + num_turned) throw Fault("other operands than are known");
  expect_vector(given[0], num_columns / 2);
  if (is_in_registers) expect_vector(given[1], 4);
  const int item_bytes = words[6] == "tf32" ? 4 : 2;
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    warp.check_whole(lanes);
    const std::vector<Operand>& given = self.operands;
    const auto number = [&](size_t i) {
      return i < given.size() ? static_cast<int64_t>(warp.value(given[i], 0)) : 0;
    };
    Matrix a(16, depth), b(depth, num_columns), sums(16, num_columns);
    if (is_in_registers) {
      read_left(warp, given[1], a, 4 / item_bytes, decode);
    } else {
      a = read_described(warp, number(1), warp.index % 4 * 16, 16, depth, number(6), item_bytes,
                         decode);
    }
    Matrix columns = read_described(warp, number(2), 0, num_columns, depth,
                                    number(is_in_registers ? 6 : 7), item_bytes, decode);
    for (int k = 0; k < depth; ++k) {
      for (int j = 0; j < num_columns; ++j) b.at(k, j) = columns.at(j, k);
    }
    if (number(3)) read_sums(warp, given[0], sums);
    accumulate(sums, a, b, static_cast<double>(number(4) * number(5)));
    write_sums(warp, given[0], sums);
  };
}

// Up to four matrices of 8 x 8 x 16 bits; eight lanes have the addresses of the rows of each.
Action move_matrices(const Instruction& instruction) {
  const bool loads = instruction.words[0] == "ldmatrix", is_transposed = instruction.has("trans");
  const int count = instruction.has("x4") ? 4 : instruction.has("x2") ? 2 : 1;
  expect_vector(instruction.operands[loads ? 0 : 1], count);
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    warp.check_whole(lanes);
    const Operand& address = self.operands[loads ? 1 : 0];
    const Operand& registers = self.operands[loads ? 0 : 1];
    for (int i = 0; i < count; ++i) {
      std::array<uint8_t*, 8> rows;
      for (int row = 0; row < 8; ++row) {
        const int lane = i * 8 + row;
        const auto at = static_cast<uint32_t>(warp.address(address, lane));
        rows[row] = shared(warp, lane, at, 16, !loads);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        std::array<uint16_t, 2> pair{};
        std::array<uint8_t*, 2> places;
        for (int j = 0; j < 2; ++j) {
          const int row = lane / 4, column = lane % 4 * 2 + j;
          places[j] = is_transposed ? rows[column] + 2 * row : rows[row] + 2 * column;
        }
        if (loads) {
          for (int j = 0; j < 2; ++j) std::memcpy(&pair[j], places[j], 2);
          warp.set(registers.elements[i], lane, uint32_t{pair[1]} << 16 | pair[0]);
        } else {
          const uint64_t bits = warp.value(registers.elements[i], lane);
          pair = {static_cast<uint16_t>(bits), static_cast<uint16_t>(bits >> 16)};
          for (int j = 0; j < 2; ++j) store(places[j], &pair[j], 2, warp, lane);
        }
      }
    }
  };
}

}  // namespace

Action matrix_product(const Instruction& instruction) {
  const std::string& name = instruction.words[0];
  if (name == "mma") return warp_product(instruction);
  if (name == "wgmma") return group_product(instruction);
  if (name == "ldmatrix" || name == "stmatrix") return move_matrices(instruction);
  return nullptr;
}

}  // namespace emulator
