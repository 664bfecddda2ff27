// The forms of instructions that are known: each modifier, and how many operands there are. What is
// not listed here is refused, so that nothing is computed otherwise than it says.

#include <algorithm>
#include <map>
#include <regex>
#include <string>

#include "machine.h"

namespace emulator {

namespace {

struct Form {
  const char* name;
  size_t fewest, most;    // operands
  const char* modifiers;  // an expression for the words behind the name
};

constexpr Form kForms[] = {
    {"abs", 2, 2, "(ftz )?f32|f64|s(16|32|64)|b?f16(x2)?"},
    {"neg", 2, 2, "(ftz )?f32|f64|s(16|32|64)|b?f16(x2)?"},
    {"add", 3, 3, "(rn )?((ftz )?f32|f64|b?f16(x2)?)|[su](16|32|64)"},
    {"sub", 3, 3, "(rn )?((ftz )?f32|f64|b?f16(x2)?)|[su](16|32|64)"},
    {"mul", 3, 3, "(rn )?((ftz )?f32|f64|b?f16(x2)?)|(lo|hi) [su](16|32|64)|wide [su](16|32)"},
    {"mad", 4, 4, "lo [su](16|32|64)|wide [su](16|32)"},
    {"fma", 4, 4, "rn ((ftz )?f32|f64|b?f16(x2)?)"},
    {"div", 3, 3, "[su](16|32|64)|(approx|full|rn) (ftz )?f32|rn f64"},
    {"rem", 3, 3, "[su](16|32|64)"},
    {"min", 3, 3, "(ftz )?(NaN )?f32|f64|(NaN )?b?f16(x2)?|[su](16|32|64)|relu s32"},
    {"max", 3, 3, "(ftz )?(NaN )?f32|f64|(NaN )?b?f16(x2)?|[su](16|32|64)|relu s32"},
    {"ex2", 2, 2, "approx (ftz )?f32"},
    {"lg2", 2, 2, "approx (ftz )?f32"},
    {"rcp", 2, 2, "(approx|rn) (ftz )?f32|rn f64"},
    {"sqrt", 2, 2, "(approx|rn) (ftz )?f32|rn f64"},
    {"rsqrt", 2, 2, "approx (ftz )?f32"},
    {"sin", 2, 2, "approx (ftz )?f32"},
    {"cos", 2, 2, "approx (ftz )?f32"},
    {"tanh", 2, 2, "approx f32"},
    {"not", 2, 2, "pred|b(16|32|64)"},
    {"and", 3, 3, "pred|b(16|32|64)"},
    {"or", 3, 3, "pred|b(16|32|64)"},
    {"xor", 3, 3, "pred|b(16|32|64)"},
    {"shl", 3, 3, "b(16|32|64)"},
    {"shr", 3, 3, "[bsu](16|32|64)"},
    {"shf", 4, 4, "[lr] (wrap|clamp) b32"},
    {"bfe", 4, 4, "[su](32|64)"},
    {"prmt", 4, 4, "b32"},
    {"lop3", 5, 5, "b32"},
    {"setp", 3, 3, "(eq|ne) b(16|32|64)|(eq|ne|lt|le|gt|ge|lo|ls|hi|hs) [su](16|32|64)"},
    {"setp", 3, 3, "((eq|ne|lt|le|gt|ge)u?|num|nan) ((ftz )?f32|f64|b?f16)"},
    {"setp", 4, 4, "(eq|ne) (and|or|xor) b(16|32|64)"},
    {"setp", 4, 4, "(eq|ne|lt|le|gt|ge|lo|ls|hi|hs) (and|or|xor) [su](16|32|64)"},
    {"setp", 4, 4, "((eq|ne|lt|le|gt|ge)u?|num|nan) (and|or|xor) ((ftz )?f32|f64|b?f16)"},
    {"selp", 4, 4, "[bsu](16|32|64)|f(32|64)"},
    {"cvt", 2, 2, "[su](8|16|32|64) [su](8|16|32|64)|rn (f32|f64|b?f16) [su](8|16|32|64)"},
    {"cvt", 2, 2, "r[nzmp]i ([su](8|16|32|64) (f32|f64|b?f16)|f32 f32|f64 f64)"},
    {"cvt", 2, 2, "f64 (f32|b?f16)|f32 b?f16|rn (f32 f64|b?f16 f32|b?f16 f64)|rna tf32 f32"},
    {"cvt", 3, 3, "rn (relu )?b?f16x2 f32"},
    {"cvta", 2, 2, "(to )?global u64"},
    {"mov", 2, 2, "pred|[bsu](16|32|64)|f(32|64)"},
    {"ld", 2, 2, "param ([bsu](8|16|32|64)|f(32|64))"},
    {"ld", 2, 2, "(global( nc)?|shared(::cta)?)( L1::\\w+)?( v[24])? ([bsu](8|16|32|64)|f(32|64))"},
    {"ld", 3, 3, "global( L1::\\w+)? L2::cache_hint( v[24])? ([bsu](8|16|32|64)|f(32|64))"},
    {"st", 2, 2, "(global|shared(::cta)?)( L1::\\w+)?( v[24])? ([bsu](8|16|32|64)|f(32|64))"},
    {"st", 3, 3, "global( L1::\\w+)? L2::cache_hint( v[24])? ([bsu](8|16|32|64)|f(32|64))"},
    {"shfl", 5, 5, "sync (up|down|bfly|idx) b32"},
    {"redux", 3, 3, "sync ((add|min|max) [su]32|(and|or|xor) b32)"},
    {"vote", 3, 3, "sync (ballot b32|(any|all) pred)"},
    {"elect", 2, 2, "sync"},
    {"bar", 1, 1, "sync|warp sync"},
    {"bra", 1, 1, "|uni"},
    {"ret", 0, 0, "|uni"},
    {"exit", 0, 0, ""},
    {"cp", 0, 0, "async (bulk )?commit_group"},
    {"cp", 1, 1, "async wait_group|async bulk wait_group( read)?"},
    {"cp", 3, 4, "async (ca|cg) shared(::cta)? global( L2::(64|128|256)B)?"},
    {"cp", 3, 3, "async bulk tensor 2d shared::(cta|cluster) global mbarrier::complete_tx::bytes"},
    {"mbarrier", 1, 1, "inval shared(::cta)? b64"},
    {"mbarrier", 2, 2, "(init|arrive) shared(::cta)? b64"},
    {"mbarrier", 3, 3, "(arrive expect_tx|(try|test)_wait parity) shared(::cta)? b64"},
    {"tensormap", 2, 2,
     "replace tile (rank|elemtype|interleave_layout|swizzle_mode|fill_mode) shared::cta b1024 b32"},
    {"tensormap", 2, 2, "replace tile global_address shared::cta b1024 b64"},
    {"tensormap", 3, 3, "replace tile (box_dim|global_dim|element_stride) shared::cta b1024 b32"},
    {"tensormap", 3, 3, "replace tile global_stride shared::cta b1024 b64"},
    {"tensormap", 3, 3,
     "cp_fenceproxy global shared::cta tensormap::generic release gpu sync aligned"},
    {"ldmatrix", 2, 2, "sync aligned m8n8 x[124]( trans)? shared(::cta)? b16"},
    {"stmatrix", 2, 2, "sync aligned m8n8 x[124]( trans)? shared(::cta)? b16"},
    {"mma", 4, 4, "sync aligned m16n8k16 row col f32 (bf16 bf16|f16 f16) f32"},
    {"mma", 4, 4, "sync aligned m16n8k8 row col f32 tf32 tf32 f32"},
    {"wgmma", 0, 0, "(fence|commit_group) sync aligned"},
    {"wgmma", 1, 1, "wait_group sync aligned"},
    {"wgmma", 7, 8, "mma_async sync aligned m64n\\d{1,3}k16 f32 (bf16 bf16|f16 f16)"},
    {"wgmma", 6, 6, "mma_async sync aligned m64n\\d{1,3}k8 f32 tf32 tf32"},
    // They order what runs in order here, or are hints.
    {"fence", 0, 2, ".+"},
    {"membar", 0, 0, ".+"},
    {"createpolicy", 2, 2, "fractional .+"},
    {"prefetch", 1, 1, ".+"},
    {"nanosleep", 1, 1, "u32"},
    {"griddepcontrol", 0, 0, "wait|launch_dependents"},
};

}  // namespace

bool is_known(const std::vector<std::string>& words, size_t num_operands) {
  static const auto* const forms = [] {
    auto* const made = new std::multimap<std::string, std::pair<Form, std::regex>>;
    for (const Form& each : kForms) made->insert({each.name, {each, std::regex(each.modifiers)}});
    return made;
  }();
  std::string modifiers;
  for (size_t i = 1; i < words.size(); ++i) modifiers += (i > 1 ? " " : "") + words[i];
  const auto [begin, end] = forms->equal_range(words[0]);
  return std::any_of(begin, end, [&](const auto& entry) {
    const auto& [form, expression] = entry.second;
    return form.fewest <= num_operands && num_operands <= form.most &&
           std::regex_match(modifiers, expression);
  });
}

}  // namespace emulator
