// Instructions that compute with what lies in registers. Approximations are as exact as libm's.

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "machine.h"
#include "numbers.h"

namespace emulator {

namespace {

// Calls `make` with the Number of a type: b32 counts as u32.
template <class Make>
Action with_type(const std::string& type, Make make) {
  if (type == "s8") return make(Number<int8_t>());
  if (type == "u8") return make(Number<uint8_t>());
  if (type == "s16") return make(Number<int16_t>());
  if (type == "u16" || type == "b16") return make(Number<uint16_t>());
  if (type == "s32") return make(Number<int32_t>());
  if (type == "u32" || type == "b32") return make(Number<uint32_t>());
  if (type == "s64") return make(Number<int64_t>());
  if (type == "u64" || type == "b64") return make(Number<uint64_t>());
  if (type == "pred") return make(Number<Predicate>());
  if (type == "f32") return make(Number<float>());
  if (type == "f64") return make(Number<double>());
  if (type == "bf16") return make(Number<Bf16>());
  if (type == "f16") return make(Number<F16>());
  throw Fault("unknown type " + type);
}

// `compute` of up to three operands. A type like f16x2 is two numbers in one register.
template <class Compute>
Action elementwise(const Instruction& instruction, int num_operands, Compute compute) {
  std::string type = instruction.words.back();
  const bool is_pair = type.ends_with("x2");
  if (is_pair) type.resize(type.size() - 2);
  const bool drops_subnormals = instruction.has("ftz");
  return with_type(type, [=](auto number) -> Action {
    using N = decltype(number);
    using Value = typename N::Value;
    const auto one = [=](const std::array<uint64_t, 3>& given, int shift) {
      const auto flushed = [&](Value value) {
        if constexpr (std::is_floating_point_v<Value>) {
          if (drops_subnormals) return without_subnormals(value);
        }
        return value;
      };
      const auto part = [&](int i) { return flushed(N::get(given[i] >> shift)); };
      return N::put(flushed(static_cast<Value>(compute(part(0), part(1), part(2)))));
    };
    return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
      each_lane(lanes, [&](int lane) {
        std::array<uint64_t, 3> given{};
        for (int i = 0; i < num_operands; ++i) given[i] = warp.value(self.operands[i + 1], lane);
        uint64_t result = one(given, 0);
        if (is_pair) result |= one(given, 16) << 16;
        warp.set(self.operands[0], lane, result);
      });
    };
  });
}

// Functions of one to three numbers, for every type alike.
template <class Compute>
Action unary(const Instruction& instruction, Compute compute) {
  return elementwise(instruction, 1, [=](auto a, auto, auto) { return compute(a); });
}

template <class Compute>
Action binary(const Instruction& instruction, Compute compute) {
  return elementwise(instruction, 2, [=](auto a, auto b, auto) { return compute(a, b); });
}

// The same for whole numbers alone.
template <class Compute>
Action bitwise(const Instruction& instruction, Compute compute) {
  return binary(instruction, [=](auto a, auto b) {
    if constexpr (std::is_integral_v<decltype(a)>) {
      return compute(a, b);
    } else {
      return a;
    }
  });
}

// Any computation of the bits of up to four operands.
template <class Compute>
Action of_bits(Compute compute) {
  return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
    each_lane(lanes, [&](int lane) {
      std::array<uint64_t, 4> given{};
      const size_t count = std::min<size_t>(4, self.operands.size() - 1);
      for (size_t i = 0; i < count; ++i) given[i] = warp.value(self.operands[i + 1], lane);
      warp.set(self.operands[0], lane, compute(given));
    });
  };
}

Action wide_product(const Instruction& instruction) {
  return with_type(instruction.words.back(), [](auto number) {
    using N = decltype(number);
    return of_bits([](const auto& given) {
      const auto factor = [&](int i) { return static_cast<uint64_t>(N::get(given[i])); };
      return factor(0) * factor(1) + given[2];
    });
  });
}

Action high_product(const Instruction& instruction) {
  return bitwise(instruction, [](auto a, auto b) {
    using Value = decltype(a);
    using Wide = std::conditional_t<std::is_signed_v<Value>, __int128, unsigned __int128>;
    return static_cast<Value>((Wide{a} * Wide{b}) >> (8 * sizeof(Value)));
  });
}

Action product(const Instruction& instruction) {
  const std::string& name = instruction.words[0];
  const bool adds = name == "mad";
  if (instruction.has("wide")) return wide_product(instruction);
  if (instruction.has("hi") && !adds) return high_product(instruction);
  if (!adds && !instruction.has("lo")) {
    return binary(instruction, [](auto a, auto b) { return a * b; });
  }
  if (!instruction.has("lo")) return nullptr;
  return of_bits([](const auto& given) { return given[0] * given[1] + given[2]; });
}

Action quotient(const Instruction& instruction) {
  const bool is_remainder = instruction.words[0] == "rem";
  return binary(instruction, [=](auto a, auto b) {
    using Value = decltype(a);
    if constexpr (std::is_integral_v<Value>) {
      if (b == 0) return static_cast<Value>(-1);
      if (b == static_cast<Value>(-1) && std::is_signed_v<Value>) {
        return static_cast<Value>(is_remainder ? 0 : -a);  // the least number has no quotient
      }
      return static_cast<Value>(is_remainder ? a % b : a / b);
    } else {
      return a / b;
    }
  });
}

Action shift(const Instruction& instruction) {
  const bool is_left = instruction.words[0] == "shl";
  return with_type(instruction.words.back(), [=](auto number) -> Action {
    using N = decltype(number);
    using Value = typename N::Value;
    return of_bits([=](const auto& given) -> uint64_t {
      if constexpr (std::is_integral_v<Value>) {
        const Value value = N::get(given[0]);
        const uint32_t most = 8 * sizeof(Value) - 1, by = static_cast<uint32_t>(given[1]);
        if (!is_left) {
          const bool has_sign = std::is_signed_v<Value> && value < 0;
          return N::put(by > most ? static_cast<Value>(has_sign ? -1 : 0)
                                  : static_cast<Value>(value >> by));
        }
        return by > most ? 0 : N::put(static_cast<Value>(given[0] << by));
      } else {
        throw Fault("a shift of a fraction");
      }
    });
  });
}

Action smaller_or_larger(const Instruction& instruction) {
  const bool is_smaller = instruction.words[0] == "min";
  const bool spreads_nan = instruction.has("NaN"), is_relu = instruction.has("relu");
  return binary(instruction, [=](auto a, auto b) {
    using Value = decltype(a);
    if (a != a || b != b) return spreads_nan == (a != a) ? a : b;
    if constexpr (std::is_floating_point_v<Value>) {
      if (a == b) return std::signbit(a) == is_smaller ? a : b;  // -0 is less than 0
    }
    const Value result = is_smaller ? std::min(a, b) : std::max(a, b);
    return is_relu ? std::max(result, Value{0}) : result;
  });
}

// `length` bits from `first` on, the last one repeated where the type has a sign.
Action extracted_bits(const Instruction& instruction) {
  const std::string& type = instruction.words.back();
  const bool is_signed = type[0] == 's';
  const int width = bits_of(type);
  return of_bits([=](const auto& given) {
    const int first = given[1] & 0xff, length = given[2] & 0xff;
    const auto bit = [&](int at) { return at < width ? given[0] >> at & 1 : uint64_t{0}; };
    const int last = std::min(first + length, width) - 1;
    const uint64_t rest = is_signed && length > 0 ? given[0] >> last & 1 : 0;
    uint64_t result = 0;
    for (int i = 0; i < width; ++i) {
      const bool is_inside = i < length && first + i < width;
      result |= (is_inside ? bit(first + i) : rest) << i;
    }
    return result;
  });
}

Action permuted_bytes() {
  return of_bits([](const auto& given) {
    const uint64_t bytes = (given[0] & 0xffffffff) | given[1] << 32;
    uint64_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint64_t selector = given[2] >> (4 * i) & 15;
      uint64_t byte = bytes >> (8 * (selector & 7)) & 0xff;
      if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << (8 * i);
    }
    return result;
  });
}

Action looked_up_bits() {
  return of_bits([](const auto& given) {
    uint64_t result = 0;
    for (int i = 0; i < 32; ++i) {
      const auto bit = [&](int k) { return given[k] >> i & 1; };
      result |= (given[3] >> (bit(0) << 2 | bit(1) << 1 | bit(2)) & 1) << i;
    }
    return result;
  });
}

Action funnel_shift(const Instruction& instruction) {
  const bool is_left = instruction.words[1] == "l", wraps = instruction.has("wrap");
  return of_bits([=](const auto& given) -> uint64_t {
    const uint64_t both = (given[0] & 0xffffffff) | given[1] << 32;
    const uint32_t given_by = static_cast<uint32_t>(given[2]);
    const uint32_t by = wraps ? given_by & 31 : std::min(given_by, 32u);
    return static_cast<uint32_t>(is_left ? both << by >> 32 : both >> by);
  });
}

bool compares(const std::string& name, bool is_less, bool is_equal, bool is_unordered) {
  static const std::map<std::string, int> bits = {
      // Less, equal, greater, unordered.
      {"eq", 0b0100},  {"ne", 0b1010},  {"lt", 0b1000},  {"le", 0b1100},  {"gt", 0b0010},
      {"ge", 0b0110},  {"lo", 0b1000},  {"ls", 0b1100},  {"hi", 0b0010},  {"hs", 0b0110},
      {"equ", 0b0101}, {"neu", 0b1011}, {"ltu", 0b1001}, {"leu", 0b1101}, {"gtu", 0b0011},
      {"geu", 0b0111}, {"num", 0b1110}, {"nan", 0b0001}};
  const auto found = bits.find(name);
  if (found == bits.end()) throw Fault("unknown comparison " + name);
  return found->second >> (is_unordered ? 0 : is_less ? 3 : is_equal ? 2 : 1) & 1;
}

Action comparison(const Instruction& instruction) {
  const std::string name = instruction.words[1];
  const std::string joined = instruction.operands.size() > 3 ? instruction.words[2] : "";
  const bool drops_subnormals = instruction.has("ftz");
  compares(name, false, false, false);  // unknown ones are told at once
  std::array<bool, 4> table;            // less, equal, greater, unordered
  for (int i = 0; i < 4; ++i) table[i] = compares(name, i == 0, i == 1, i == 3);
  return with_type(instruction.words.back(), [=](auto number) -> Action {
    using N = decltype(number);
    return [=](Warp& warp, const Instruction& self, uint32_t lanes) {
      each_lane(lanes, [&](int lane) {
        auto a = N::get(warp.value(self.operands[1], lane));
        auto b = N::get(warp.value(self.operands[2], lane));
        if constexpr (std::is_floating_point_v<decltype(a)>) {
          if (drops_subnormals) a = without_subnormals(a), b = without_subnormals(b);
        }
        bool result = table[a < b ? 0 : a == b ? 1 : a > b ? 2 : 3], opposite = !result;
        if (!joined.empty()) {
          const bool other = warp.value(self.operands[3], lane);
          const auto join = [&](bool one) {
            return joined == "and" ? one && other : joined == "or" ? one || other : one != other;
          };
          result = join(result);
          opposite = join(opposite);
        }
        warp.set(self.operands[0], lane, result);
        if (self.operands[0].predicate >= 0) {
          warp.lane_of(self.operands[0].predicate, lane) = opposite;
        }
      });
    };
  });
}

// A number within a type's range, NaN as 0.
template <class Value>
Value saturated(double number) {
  constexpr Value least = std::numeric_limits<Value>::min();
  constexpr Value most = std::numeric_limits<Value>::max();
  if (std::isnan(number)) return 0;
  if (number <= static_cast<double>(least)) return least;
  return number >= static_cast<double>(most) ? most : static_cast<Value>(number);
}

Action two_halves(bool is_bf16, bool is_relu) {
  return of_bits([=](const auto& given) -> uint64_t {
    const auto half = [&](uint64_t bits) -> uint64_t {
      const float number = bits_as<float>(bits);
      const float kept = is_relu && number < 0 ? 0 : number;
      return is_bf16 ? to_bf16(kept) : to_f16(kept);
    };
    return half(given[0]) << 16 | half(given[1]);
  });
}

}  // namespace

Action conversion(const Instruction& instruction) {
  const std::vector<std::string>& words = instruction.words;
  if (words[0] != "cvt") return nullptr;
  const std::string to = words[words.size() - 2];
  if (to == "bf16x2" || to == "f16x2") return two_halves(to == "bf16x2", instruction.has("relu"));
  if (to == "tf32") {
    return of_bits([](const auto& given) -> uint64_t {
      const bool is_nan = std::isnan(bits_as<float>(given[0]));
      return is_nan ? 0x7fffffff : (given[0] + 0x1000) & 0xffffe000u;
    });
  }
  double (*round)(double) = nullptr;
  if (instruction.has("rni")) round = std::nearbyint;
  if (instruction.has("rzi")) round = std::trunc;
  if (instruction.has("rmi")) round = std::floor;
  if (instruction.has("rpi")) round = std::ceil;
  return with_type(words.back(), [&](auto from) {
    return with_type(to, [&](auto target) -> Action {
      using From = decltype(from);
      using To = decltype(target);
      using Value = typename To::Value;
      return of_bits([=](const auto& given) {
        const auto number = From::get(given[0]);
        if constexpr (std::is_integral_v<decltype(From::get(0))>) {
          return To::put(static_cast<Value>(number));
        } else {
          const double rounded = round ? round(number) : number;
          if constexpr (std::is_integral_v<Value>) {
            return To::put(saturated<Value>(rounded));
          } else {
            return To::put(static_cast<Value>(rounded));
          }
        }
      });
    });
  });
}

Action arithmetic(const Instruction& instruction) {
  const std::string& name = instruction.words[0];
  const std::string& type = instruction.words.back();
  if (name == "add") return binary(instruction, [](auto a, auto b) { return a + b; });
  if (name == "sub") return binary(instruction, [](auto a, auto b) { return a - b; });
  if (name == "mul" || name == "mad") return product(instruction);
  if (name == "div" || name == "rem") return quotient(instruction);
  if (name == "fma") {
    return elementwise(instruction, 3, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  }
  if (name == "neg") return unary(instruction, [](auto a) { return -a; });
  if (name == "abs")
    return unary(instruction, [](auto a) {
      if constexpr (std::is_integral_v<decltype(a)>) {
        return a < 0 ? -a : a;
      } else {
        return std::fabs(a);
      }
    });
  if (name == "not") {
    const bool is_predicate = type == "pred";
    return of_bits([=](const auto& given) { return is_predicate ? !given[0] : ~given[0]; });
  }
  if (name == "and") return bitwise(instruction, [](auto a, auto b) { return a & b; });
  if (name == "or") return bitwise(instruction, [](auto a, auto b) { return a | b; });
  if (name == "xor") return bitwise(instruction, [](auto a, auto b) { return a ^ b; });
  if (name == "shl" || name == "shr") return shift(instruction);
  if (name == "shf") return funnel_shift(instruction);
  if (name == "min" || name == "max") return smaller_or_larger(instruction);
  if (name == "bfe") return extracted_bits(instruction);
  if (name == "prmt") return permuted_bytes();
  if (name == "lop3") return looked_up_bits();
  if (name == "setp") return comparison(instruction);
  if (name == "selp") {
    return of_bits([](const auto& given) { return given[2] ? given[0] : given[1]; });
  }
  if (name == "ex2") return unary(instruction, [](auto a) { return std::exp2(a); });
  if (name == "lg2") return unary(instruction, [](auto a) { return std::log2(a); });
  if (name == "rcp") return unary(instruction, [](auto a) { return 1 / a; });
  if (name == "sqrt") return unary(instruction, [](auto a) { return std::sqrt(a); });
  if (name == "rsqrt") return unary(instruction, [](auto a) { return 1 / std::sqrt(a); });
  if (name == "sin") return unary(instruction, [](auto a) { return std::sin(a); });
  if (name == "cos") return unary(instruction, [](auto a) { return std::cos(a); });
  if (name == "tanh") return unary(instruction, [](auto a) { return std::tanh(a); });
  return nullptr;
}

}  // namespace emulator
