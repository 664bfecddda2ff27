// The packer in memory against a naive execution of the same moves.

#include "check.h"
#include "core/error.h"
#include "core/pack.h"
#include "random_plan.h"
#include "random_regions.h"

using namespace nanotron_fast;

namespace {

void test_matches_naive_execution(unsigned seed, int64_t max_rows, int num_workers) {
  Plan plan(seed, max_rows);
  for (int tensor = 0; tensor < 8; ++tensor) {
    plan.pick(0, 1) == 0 ? plan.add_permuted() : plan.add_columns(plan.pick(0, 1) == 1);
  }
  Regions regions(plan);
  for (const SimdLevel level : supported_simd_levels()) {
    regions.clear_destinations();
    pack(plan.table.data(), static_cast<int64_t>(plan.moves.size()), regions.sources(),
         regions.destinations(), num_workers, level);
    regions.check_destinations();
  }
}

// Matrices that are cut into many tiles: contiguous, transposed, a few columns of wide rows, zeros.
void test_large_moves() {
  constexpr int64_t kRows = 517, kColumns = 1033, kElements = kRows * kColumns;
  const auto bf16 = Dtype::kBFloat16, fp32 = Dtype::kFloat32;
  for (const Dtype to : {bf16, fp32}) {
    Plan plan(1, 1);
    const int64_t item = item_size(to);
    const auto take_source = [&] { return plan.take_source(0, kElements * 2); };
    const auto take = [&](int64_t elements) { return plan.take_destination(1, elements * item); };
    plan.add(
        {0, take_source(), 1, take(kElements), {kElements, 1, 1}, {1, 1, 1}, {1, 1, 1}, bf16, to});
    plan.add({0,
              take_source(),
              1,
              take(kElements),
              {kRows, kColumns, 1},
              {1, kRows, 1},
              {kColumns, 1, 1},
              bf16,
              to});
    plan.add({0,
              take_source(),
              1,
              take(kElements),
              {kColumns, 3, kRows},
              {3 * kRows, kRows, 1},
              {1, kColumns * kRows, kColumns},
              bf16,
              to});
    plan.take_source(0, kElements * 4);
    plan.take_destination(1, 2 * kElements * item);
    plan.add({0,
              take_source(),
              1,
              take(kRows * 5),
              {kRows, 5, 1},
              {kColumns, 1, 1},
              {5, 1, 1},
              bf16,
              to});
    const int64_t at = take(2 * kElements);
    plan.add({-1, 0, 1, at, {kElements, 1, 1}, {0, 0, 0}, {2, 1, 1}, to, to});
    plan.add({0, take_source(), 1, at + item, {kElements, 1, 1}, {1, 1, 1}, {2, 1, 1}, bf16, to});
    Regions regions(plan);
    regions.clear_destinations();
    pack(plan.table.data(), static_cast<int64_t>(plan.moves.size()), regions.sources(),
         regions.destinations(), 3, default_simd_level());
    regions.check_destinations();
  }
}

void test_rejects_before_it_writes() {
  std::vector<std::byte> source(8), destination(8, std::byte{7});
  const std::vector<int64_t> table{0, 0, 0, 0, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1,
                                   0, 0, 0, 2, 4, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, -1};
  const auto run = [&] {
    pack(table.data(), 2, {{source.data(), 8}}, {{destination.data(), 8}}, 1, default_simd_level());
  };
  CHECK(contains(message_of<PlanError>(run), "move 1: destination ends at byte 10 of a file of 8"));
  CHECK(destination == std::vector<std::byte>(8, std::byte{7}));
  pack(nullptr, 0, {}, {}, 4, default_simd_level());
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 30; ++seed) {
    test_matches_naive_execution(seed, seed % 3 == 0 ? 300 : 7, 1 + static_cast<int>(seed % 4));
  }
  test_large_moves();
  test_rejects_before_it_writes();
}
