#pragma once

#include <cstdint>

namespace nanotron_fast {

// How sources of samples are blended by weight: sample i is drawn from the source that is furthest
// behind, the first with the largest weights[s] * max(i, 1) - taken[s], and taken[s] grows by one.
// Nothing but doing it says where a source stands after many samples, since the products are
// rounded; so this goes on from any known state.
//
// weights: one for each source, together 1.
// taken: how many of the first `first` samples came from each source; updated.
// choices, places: of each of the `count` samples from `first` on its source, and how many of that
//   source came before it. Either may be null.
void blend(const double* weights, int64_t num_sources, int64_t first, int64_t count, int64_t* taken,
           uint16_t* choices, int64_t* places);

}  // namespace nanotron_fast
