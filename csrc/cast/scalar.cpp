#include "cast/scalar.h"

#include "cast/table.h"

namespace nanotron_fast {

namespace {

NANOTRON_FAST_CAST_LOOP(bfloat16_to_float32, uint16_t, uint32_t, )
NANOTRON_FAST_CAST_LOOP(bfloat16_to_float16, uint16_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float16_to_float32, uint16_t, uint32_t, )
NANOTRON_FAST_CAST_LOOP(float16_to_bfloat16, uint16_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float32_to_bfloat16, uint32_t, uint16_t, )
NANOTRON_FAST_CAST_LOOP(float32_to_float16, uint32_t, uint16_t, )

}  // namespace

const CastTable kScalarCasts{bfloat16_to_float32, bfloat16_to_float16, float16_to_float32,
                             float16_to_bfloat16, float32_to_bfloat16, float32_to_float16};

}  // namespace nanotron_fast
