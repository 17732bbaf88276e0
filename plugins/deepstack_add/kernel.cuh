// deepstack_add: output[t] = hidden[t] + embeds[index[t], begin : begin + width], for tokens whose index is a row.
//
// Layout: blockIdx.x is the token, blockIdx.y a chunk of kDeepStackThreads * elements columns; one thread owns
// `elements` neighbouring columns and moves them with 16-byte loads and stores. The index is the same for a whole block,
// so the branch never diverges, and text tokens (index 0) touch hidden and output only.
#pragma once

#include "../common/kernel.cuh"
#include "../common/values.cuh"
#include "params.h"

namespace deepstitch {

template <class Hidden, class Embed, int elements>
__device__ __forceinline__ void deepstack_add(const DeepStackAddParams& p) {
    const int64_t token = blockIdx.x;
    const int column = static_cast<int>(blockIdx.y * kDeepStackThreads + threadIdx.x) * elements;
    if (column >= p.width) return;

    float values[elements];
    load_values(static_cast<const Hidden*>(p.hidden) + token * p.width + column, values);
    const int64_t row = p.index[token];
    if (row > 0 && row < p.rows) {  // row 0 is zero by contract; nothing outside the table is ever read
        float added[elements];
        load_values(static_cast<const Embed*>(p.embeds) + row * p.stride + p.begin + column, added);
#pragma unroll
        for (int i = 0; i < elements; ++i) values[i] += added[i];
    }
    store_values(static_cast<Hidden*>(p.output) + token * p.width + column, values);
}

}  // namespace deepstitch

// deepstack_add_<hidden>_<embeds>: 16 bytes per access; _scalar where a row is not a whole number of them.
#define DEEPSTACK_ADD_KERNEL(name, Hidden, Embed, elements)                                  \
    DEEPSTITCH_KERNEL(name, deepstitch::DeepStackAddParams, deepstitch::kDeepStackThreads, 16) { \
        deepstitch::deepstack_add<Hidden, Embed, elements>(p);                                \
    }

DEEPSTACK_ADD_KERNEL(deepstack_add_f32_f32, float, float, 4)
DEEPSTACK_ADD_KERNEL(deepstack_add_f32_f16, float, uint16_t, 8)
DEEPSTACK_ADD_KERNEL(deepstack_add_f16_f32, uint16_t, float, 8)
DEEPSTACK_ADD_KERNEL(deepstack_add_f16_f16, uint16_t, uint16_t, 8)
DEEPSTACK_ADD_KERNEL(deepstack_add_f32_f32_scalar, float, float, 1)
DEEPSTACK_ADD_KERNEL(deepstack_add_f32_f16_scalar, float, uint16_t, 1)
DEEPSTACK_ADD_KERNEL(deepstack_add_f16_f32_scalar, uint16_t, float, 1)
DEEPSTACK_ADD_KERNEL(deepstack_add_f16_f16_scalar, uint16_t, uint16_t, 1)

#undef DEEPSTACK_ADD_KERNEL
