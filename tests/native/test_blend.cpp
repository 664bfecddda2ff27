// The order of a blend: by hand, and the same wherever one goes on from.

#include <cstdint>
#include <vector>

#include "check.h"
#include "core/blend.h"

using namespace nanotron_fast;

int main() {
  {
    // Sample 0 counts as sample 1, so the first source is ahead only then.
    const std::vector<double> weights = {0.5, 0.25, 0.25};
    std::vector<int64_t> taken(3), places(8);
    std::vector<uint16_t> choices(8);
    blend(weights.data(), 3, 0, 8, taken.data(), choices.data(), places.data());
    CHECK((choices == std::vector<uint16_t>{0, 1, 2, 0, 0, 1, 2, 0}));
    CHECK((places == std::vector<int64_t>{0, 0, 0, 1, 2, 1, 1, 3}));
    CHECK((taken == std::vector<int64_t>{4, 2, 2}));
  }
  const std::vector<double> weights = {0.1, 0.37, 0.53};
  std::vector<int64_t> whole(3), parts(3);
  std::vector<uint16_t> choices(1000), tail(300);
  blend(weights.data(), 3, 0, 1000, whole.data(), choices.data(), nullptr);
  blend(weights.data(), 3, 0, 700, parts.data(), nullptr, nullptr);
  blend(weights.data(), 3, 700, 300, parts.data(), tail.data(), nullptr);
  CHECK(whole == parts);
  CHECK(std::vector<uint16_t>(choices.begin() + 700, choices.end()) == tail);
  return 0;
}
