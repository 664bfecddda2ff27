#pragma once

#include "cast/cast.h"

namespace nanotron_fast {

// One implementation of every cast; each instruction set has its own table of the same functions.
struct CastTable {
  CastFunction bfloat16_to_float32;
  CastFunction bfloat16_to_float16;
  CastFunction float16_to_float32;
  CastFunction float16_to_bfloat16;
  CastFunction float32_to_bfloat16;
  CastFunction float32_to_float16;
};

extern const CastTable kScalarCasts;
#if defined(__x86_64__)
extern const CastTable kAvx2Casts;
extern const CastTable kAvx512Casts;
#endif

}  // namespace nanotron_fast
