// What a table of moves may not hold, and the one form that equal moves take.

#include "check.h"
#include "core/error.h"
#include "core/group.h"
#include "core/move.h"

using namespace nanotron_fast;

namespace {

void test_rejects() {
  const int64_t row[] = {0, 0, 0, 0, 2, 2, 1, 2, 1, 1, 2, 1, 1, 0, 0, -1};
  const auto rejects = [&](size_t column, int64_t value, const std::string& message) {
    std::vector<int64_t> bad(row, row + Move::kNumColumns);
    bad[column] = value;
    const auto parse = [&] { parse_moves(bad.data(), 1, {8}, {8}); };
    CHECK(contains(message_of<PlanError>(parse), message));
  };
  CHECK(parse_moves(row, 1, {8}, {8}).size() == 1);
  rejects(Column::kSource, 1, "source file 1 is not one of 1");
  rejects(Column::kSource, -2, "source file -2");
  rejects(Column::kDestination, -1, "destination file -1");
  rejects(Column::kSourceOffset, -2, "source offset is negative");
  rejects(Column::kDestinationOffset, 2, "ends at byte 10 of a file of 8");
  rejects(Column::kSizes, 0, "size 0");
  rejects(Column::kSizes, INT64_MAX, "size");
  rejects(Column::kSourceStrides, 0, "stride 0");
  rejects(Column::kDestinationStrides, -1, "stride -1");
  rejects(Column::kSourceStrides, INT64_MAX, "overflows");
  rejects(Column::kSourceOffset, INT64_MAX, "overflows");
  rejects(Column::kSourceDtype, 7, "unknown dtype code 7");
  rejects(Column::kSourceDtype, 4, "its source is quantised and has no scales");
  rejects(Column::kScales, 0, "its source has scales and is not quantised");
  rejects(Column::kDestinationDtype, 4, "what is quantised is a source alone");
  rejects(Column::kDestinationDtype, -1, "unknown dtype code -1");
}

// The table's columns of a source mean nothing there.
void test_a_fill_has_no_source() {
  const int64_t big = INT64_MAX;
  const int64_t row[] = {-1, big, 0, 0, 3, 2, 1, big, big, big, 4, 1, 1, 0, 0, -1};
  const std::vector<MoveGroup> groups = group_moves(parse_moves(row, 1, {}, {24}));
  CHECK(groups.size() == 3);  // rows with a gap between them
  for (const MoveGroup& group : groups) CHECK(group[0].move.source_offset_bytes == 0);
}

void test_normalize() {
  using Three = std::array<int64_t, 3>;
  const auto bf16 = Dtype::kBFloat16;
  const Move whole = normalize({0, 0, 0, 0, {4, 1, 6}, {6, 99, 1}, {6, 99, 1}, bf16, bf16});
  CHECK(whole.sizes == (Three{24, 1, 1}) && whole.source_strides == (Three{1, 1, 1}));
  const Move permuted = normalize({0, 0, 0, 0, {2, 3, 5}, {1, 2, 6}, {1, 10, 2}, bf16, bf16});
  CHECK(permuted.sizes == (Three{3, 5, 2}));
  CHECK(permuted.source_strides == (Three{2, 6, 1}));
  CHECK(permuted.destination_strides == (Three{10, 2, 1}));
  const Move fill = normalize({-1, 0, 0, 0, {2, 3, 5}, {7, 7, 7}, {15, 5, 1}, bf16, bf16});
  CHECK(fill.is_fill() && fill.sizes == (Three{30, 1, 1}));
}

}  // namespace

int main() {
  test_rejects();
  test_a_fill_has_no_source();
  test_normalize();
}
