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
  // By what the codes stand for, from kE4M3 on, and by the destination.
  DequantiseFunction dequantise[3][3];
};

// The functions of a template `dequantise`, as a CastTable holds them.
#define NANOTRON_FAST_DEQUANTISE_ROW(CODE)                                \
  {dequantise<CODE, Dtype::kBFloat16>, dequantise<CODE, Dtype::kFloat16>, \
   dequantise<CODE, Dtype::kFloat32>}
#define NANOTRON_FAST_DEQUANTISE_TABLE                                                        \
  {NANOTRON_FAST_DEQUANTISE_ROW(Dtype::kE4M3), NANOTRON_FAST_DEQUANTISE_ROW(Dtype::kE2M1Low), \
   NANOTRON_FAST_DEQUANTISE_ROW(Dtype::kE2M1High)}

extern const CastTable kScalarCasts;
#if defined(__x86_64__)
extern const CastTable kAvx2Casts;
extern const CastTable kAvx512Casts;
#endif

}  // namespace nanotron_fast
