#include "core/blend.h"

#include <algorithm>
#include <vector>

namespace nanotron_fast {

void blend(const double* weights, int64_t num_sources, int64_t first, int64_t count, int64_t* taken,
           uint16_t* choices, int64_t* places) {
  // Exact below 2**53, and spares a conversion for every source of every sample.
  std::vector<double> drawn(taken, taken + num_sources);
  for (int64_t i = 0; i < count; ++i) {
    const double x = std::max(static_cast<double>(first + i), 1.0);
    int64_t chosen = 0;
    // Two roundings, never fused into one: the build says -ffp-contract=off.
    double behind = weights[0] * x - drawn[0];
    for (int64_t source = 1; source < num_sources; ++source) {
      const double other = weights[source] * x - drawn[source];
      // Without a branch: which source comes next is what no processor foretells.
      const bool is_further = other > behind;
      behind = is_further ? other : behind;
      chosen = is_further ? source : chosen;
    }
    if (choices != nullptr) choices[i] = static_cast<uint16_t>(chosen);
    if (places != nullptr) places[i] = static_cast<int64_t>(drawn[chosen]);
    drawn[chosen] += 1.0;
  }
  std::transform(drawn.begin(), drawn.end(), taken,
                 [](double each) { return static_cast<int64_t>(each); });
}

}  // namespace nanotron_fast
