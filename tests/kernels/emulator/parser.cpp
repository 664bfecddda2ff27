// Reads PTX as LLVM and Triton write it: one kernel, without functions that it calls.

#include <algorithm>
#include <cctype>
#include <map>
#include <string>
#include <utility>

#include "machine.h"
#include "numbers.h"

namespace emulator {

namespace {

// The shared memory of a launch, which begins at address 0.
constexpr const char* kSharedMemory = "global_smem";
constexpr int kMostRegisters = 1 << 20;
// What special registers are called.
const std::map<std::string, Special> kSpecials = {
    {"%tid", Special::kThread},    {"%ctaid", Special::kBlock}, {"%ntid", Special::kThreads},
    {"%nctaid", Special::kBlocks}, {"%laneid", Special::kLane}, {"%warpid", Special::kWarp}};

std::string trimmed(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \t\n");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\n") + 1 - begin);
}

// Parts at commas that no bracket encloses.
std::vector<std::string> parts_of(const std::string& text) {
  std::vector<std::string> parts;
  int depth = 0;
  std::string part;
  for (const char letter : text) {
    depth += (letter == '{' || letter == '[') - (letter == '}' || letter == ']');
    if (letter == ',' && !depth) {
      parts.push_back(trimmed(part));
      part.clear();
    } else {
      part += letter;
    }
  }
  if (!trimmed(part).empty()) parts.push_back(trimmed(part));
  return parts;
}

std::string inside(const std::string& text) { return trimmed(text.substr(1, text.size() - 2)); }

bool is_of_name(char letter) {
  return std::isalnum(static_cast<unsigned char>(letter)) || letter == '_' || letter == '$';
}

uint64_t number(const std::string& text) {
  const char prefix = text.size() > 1 && text[0] == '0' ? std::tolower(text[1]) : ' ';
  const bool has_bits = prefix == 'f' || prefix == 'd';
  const std::string digits = has_bits ? text.substr(2) : text;
  size_t end = 0;
  const uint64_t result =
      digits[0] == '-' ? std::stoll(digits, &end, 0) : std::stoull(digits, &end, has_bits ? 16 : 0);
  end += end < digits.size() && digits[end] == 'U';
  if (end < digits.size()) throw Fault("unknown number " + text);
  return result;
}

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Program parse() {
    read_head();
    open_scope();
    try {
      while (!scopes_.empty()) read_next();
    } catch (const std::logic_error&) {  // of a string or a number
      fail(at_ < text_.size() ? "a number is none" : "the text ends too early");
    }
    for (const auto& [index, name, scopes] : branches_) {
      program_.instructions[index].target = found(labels_, name, scopes);
    }
    return std::move(program_);
  }

 private:
  using Names = std::map<std::pair<int, std::string>, size_t>;
  struct Branch {
    size_t index;
    std::string label;
    std::vector<int> scopes;
  };

  [[noreturn]] void fail(const std::string& what) const {
    throw Fault("line " + std::to_string(line_) + " of the PTX: " + what);
  }

  // What a name means in the innermost scope that has it.
  size_t found(const Names& names, const std::string& name, const std::vector<int>& scopes) const {
    for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope) {
      const auto entry = names.find({*scope, name});
      if (entry != names.end()) return entry->second;
    }
    fail("unknown name " + name);
  }

  void open_scope() {
    scopes_.push_back(num_scopes_++);
    ++at_;
  }

  // The name of the kernel, its parameters, the threads of a block.
  void read_head() {
    const size_t entry = text_.find(".entry");
    if (entry == std::string::npos) fail("there is no kernel");
    if (text_.find(".entry", entry + 1) != std::string::npos) fail("there are several kernels");
    const size_t opening = text_.find('(', entry), closing = text_.find(')', opening);
    at_ = text_.find('{', closing);
    if (closing == std::string::npos || at_ == std::string::npos) fail("the kernel has no body");
    program_.name = trimmed(text_.substr(entry + 6, opening - entry - 6));
    for (const std::string& each : parts_of(text_.substr(opening + 1, closing - opening - 1))) {
      const std::string name = each.substr(each.find_last_of(" \t") + 1);
      const size_t bracket = name.find('['), type = each.find_first_of("bsuf", each.find('.', 1));
      const int count = bracket < name.size() ? std::stoi(name.substr(bracket + 1)) : 1;
      parameters_.emplace(name.substr(0, bracket), parameters_.size());
      program_.parameter_bytes.push_back(count * std::stoi(each.substr(type + 1)) / 8);
    }
    const size_t threads = text_.find(".reqntid", closing);
    if (threads < at_) program_.num_threads = std::stoi(text_.substr(threads + 8));
    line_ += std::count(text_.begin(), text_.begin() + at_, '\n');
  }

  void skip_line() {
    while (text_.at(at_) != '\n') ++at_;
  }

  void skip_space() {
    while (true) {
      if (text_.compare(at_, 2, "//") == 0) skip_line();
      if (!std::isspace(static_cast<unsigned char>(text_.at(at_))) && text_[at_] != ';') return;
      line_ += text_[at_++] == '\n';
    }
  }

  void read_next() {
    skip_space();
    if (text_[at_] == '{') return open_scope();
    if (text_[at_] == '}') {
      scopes_.pop_back();
      ++at_;
      return;
    }
    if (text_.compare(at_, 4, ".loc") == 0 || text_.compare(at_, 7, ".pragma") == 0) {
      return skip_line();
    }
    size_t end = at_;
    while (is_of_name(text_.at(end))) ++end;
    if (end > at_ && text_[end] == ':' && text_[end + 1] != ':') {
      labels_[{scopes_.back(), text_.substr(at_, end - at_)}] = program_.instructions.size();
      at_ = end + 1;
      return;
    }
    std::string statement;
    const int line = line_;
    while (text_.at(at_) != ';') {
      if (text_.compare(at_, 2, "//") == 0) skip_line();
      line_ += text_[at_] == '\n';
      statement += text_[at_++];
    }
    statement = trimmed(statement);
    if (statement.starts_with(".reg")) {
      declare(statement);
    } else {
      read_instruction(statement, line);
    }
  }

  // `.reg .b32 tmp` is one register, `.reg .b32 %r<99>` are 99, from %r0 on.
  void declare(const std::string& statement) {
    for (const std::string& each : parts_of(statement)) {
      const std::string name = each.substr(each.find_last_of(" \t") + 1);
      const size_t bracket = name.find('<');
      registers_[{scopes_.back(), name.substr(0, bracket)}] = program_.num_slots;
      const int count = bracket < name.size() ? std::stoi(name.substr(bracket + 1)) : 1;
      if (count < 1 || count > kMostRegisters) fail("too many registers");
      counts_.resize(program_.num_slots + count, 0);
      if (bracket < name.size()) counts_[program_.num_slots] = count;
      program_.num_slots += count;
    }
  }

  // What is not declared is no register: special ones that are not known are among it.
  int slot(const std::string& name) {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    if (name[0] != '%' || digits == name.size()) return found(registers_, name, scopes_);
    const size_t first = found(registers_, name.substr(0, digits), scopes_);
    const int index = std::stoi(name.substr(digits));
    if (index >= counts_[first]) fail("unknown name " + name);
    return static_cast<int>(first) + index;
  }

  Operand address(const std::string& text) {
    Operand operand;
    operand.kind = Operand::Kind::kAddress;
    const std::vector<std::string> parts = parts_of(inside(text));
    std::string base = parts.at(0), offset;
    const size_t sign = base.find_first_of("+-", 1);
    if (sign != std::string::npos) {
      offset = base.substr(sign);
      std::erase_if(offset, [](char letter) { return letter == ' ' || letter == '+'; });
      base = trimmed(base.substr(0, sign));
      operand.offset_bytes = std::stoll(offset, nullptr, 0);
    }
    const auto parameter = parameters_.find(base);
    if (parameter != parameters_.end()) {
      operand.kind = Operand::Kind::kParameter;
      operand.slot = static_cast<int>(parameter->second);
    } else if (std::isdigit(static_cast<unsigned char>(base[0]))) {
      operand.number = number(base);
    } else if (base != kSharedMemory) {
      operand.slot = slot(base);
    }
    if (parts.size() > 1) operand.elements = this->operand(parts[1]).elements;
    return operand;
  }

  Operand operand(const std::string& text) {
    Operand result;
    const size_t bar = text.find('|'), dot = text.find('.');
    if (text == "_") return result;
    if (text[0] == '[') return address(text);
    if (text[0] == '!') {
      result.kind = Operand::Kind::kRegister;
      result.slot = slot(text.substr(1));
      result.is_negated = true;
    } else if (text[0] == '{') {
      result.kind = Operand::Kind::kVector;
      for (const std::string& each : parts_of(inside(text))) {
        if (each[0] == '{') fail("a vector of vectors");
        result.elements.push_back(operand(each));
      }
    } else if (bar != std::string::npos) {
      const std::string first = trimmed(text.substr(0, bar));
      if (first != "_") {
        result.kind = Operand::Kind::kRegister;
        result.slot = slot(first);
      }
      result.predicate = slot(trimmed(text.substr(bar + 1)));
    } else if (kSpecials.contains(text.substr(0, dot))) {
      result.kind = Operand::Kind::kSpecial;
      result.special = kSpecials.at(text.substr(0, dot));
      result.axis = dot == std::string::npos ? 0 : text[dot + 1] - 'x';
      if (result.axis < 0 || result.axis > 2) fail("unknown name " + text);
    } else if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      result.kind = Operand::Kind::kNumber;
      result.number = number(text);
    } else if (text == kSharedMemory) {
      result.kind = Operand::Kind::kNumber;
    } else {
      result.kind = Operand::Kind::kRegister;
      result.slot = slot(text);
    }
    return result;
  }

  void read_guard(std::string& statement, Instruction& instruction) {
    if (statement[0] != '@') return;
    const size_t end = statement.find_first_of(" \t");
    instruction.is_guard_negated = statement[1] == '!';
    const size_t begin = instruction.is_guard_negated ? 2 : 1;
    instruction.guard = slot(statement.substr(begin, end - begin));
    statement = trimmed(statement.substr(end));
  }

  void read_instruction(std::string statement, int line) {
    Instruction instruction;
    instruction.text = statement;
    instruction.line = line;
    read_guard(statement, instruction);
    const size_t end = std::min(statement.find_first_of(" \t"), statement.size());
    const std::string rest = trimmed(statement.substr(end));
    std::string word;
    for (const char letter : statement.substr(0, end) + ".") {
      if (letter != '.') {
        word += letter;
      } else {
        instruction.words.push_back(std::exchange(word, ""));
      }
    }
    const std::string& name = instruction.words[0];
    const std::vector<std::string> operands = parts_of(rest);
    if (!is_known(instruction.words, operands.size())) {
      fail("unknown instruction " + instruction.text);
    }
    if (name == "bra") {
      instruction.kind = Instruction::Kind::kBranch;
      branches_.push_back({program_.instructions.size(), rest, scopes_});
    } else if (name == "ret" || name == "exit") {
      instruction.kind = Instruction::Kind::kReturn;
    } else {
      for (const std::string& each : operands) {
        const bool is_fraction = name == "createpolicy" && each == operands.back();
        if (!is_fraction) instruction.operands.push_back(operand(each));
      }
      finish(instruction);
    }
    program_.instructions.push_back(std::move(instruction));
  }

  void finish(Instruction& instruction) {
    const std::string& name = instruction.words[0];
    if (name == "bar" && instruction.words[1] == "sync") {
      instruction.kind = Instruction::Kind::kBarrier;
      return;
    }
    for (Operand& each : instruction.operands) {
      if (name == "mov" && each.kind == Operand::Kind::kVector) {
        if (each.elements.size() != 2 && each.elements.size() != 4) fail("an odd vector");
        each.bits = bits_of(instruction.words.back()) / static_cast<int>(each.elements.size());
        if (each.bits < 8) fail("an odd vector");
      }
    }
    for (const auto make : {arithmetic, conversion, transfer, bulk_transfer, matrix_product}) {
      try {
        instruction.action = make(instruction);
      } catch (const Fault& fault) {
        fail(fault.what() + (": " + instruction.text));
      }
      if (instruction.action) return;
    }
    fail("unknown instruction " + instruction.text);
  }

  const std::string& text_;
  size_t at_ = 0;
  int line_ = 1;
  Program program_;
  std::map<std::string, size_t> parameters_;
  Names registers_, labels_;
  std::vector<int> counts_;  // of the registers that are declared together, by the first one's slot
  std::vector<int> scopes_;
  int num_scopes_ = 0;
  std::vector<Branch> branches_;
};

}  // namespace

int bits_of(const std::string& type) {
  if (type == "pred") return 1;
  if (type.ends_with("x2")) return 32;
  const size_t digits = type.find_last_not_of("0123456789") + 1;
  return digits < type.size() ? std::stoi(type.substr(digits)) : 0;
}

void expect_vector(const Operand& operand, size_t count) {
  if (operand.kind != Operand::Kind::kVector || operand.elements.size() != count) {
    throw Fault("this needs a vector of " + std::to_string(count));
  }
}

bool Instruction::has(const std::string& word) const {
  return std::find(words.begin(), words.end(), word) != words.end();
}

Program parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace emulator
