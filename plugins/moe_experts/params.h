// What the kernels of moe_experts are launched with: one struct for all of them.
//
// A SLOT is one expert of one token: slot = token * top_k + rank. A TILE is a few slots of one expert that are worked
// on together, so that its weights are read once for them.
#pragma once

#include "../common/linear.h"

namespace deepstitch {

constexpr int kMoEMaxExperts = 256;
constexpr int kMoEMaxTopK = 16;
constexpr int kMoEPlannedTokens = 32;  // that one block can route and sort

struct alignas(16) MoETile {
    int32_t expert;
    int32_t first;  // place in `order`
    int32_t count;  // of slots
    int32_t unused;
};

struct MoEExpertsParams {
    const float* x;        // [tokens, hidden]
    const float* logits;   // [tokens, experts]
    LinearMatrix gate_up;  // of one expert: [intermediate or twice that, hidden]; data and scales of expert 0
    LinearMatrix down;     // of one expert: [hidden, intermediate]
    float* y;              // [tokens, hidden]

    int32_t* chosen;      // [slots] expert of each slot
    float* weights;       // [slots] of the router
    int32_t* order;       // [slots] slots sorted by expert; those of one expert ascending
    int32_t* firsts;      // [experts] place in order of an expert's first slot
    int32_t* counts;      // [experts] of slots
    MoETile* tiles;       // [at most max_tiles]
    int32_t* tile_count;  // [1]

    const void* x_units;  // x as int8; see linear.h
    const LinearMeta* x_meta;
    float* activated;             // [slots, intermediate]
    const void* activated_units;  // the same as int8
    const LinearMeta* activated_meta;
    float* results;  // [slots, hidden] of the down projection

    int32_t tokens;
    int32_t experts;
    int32_t top_k;
    int32_t normalize;  // weights of a token sum to one
    int32_t intermediate;
    int32_t tile_slots;                   // at most in a tile
    uint8_t activations[kMoEMaxExperts];  // 0 SwiGLU, 1 GeGLU, 2 ReLU2, 3 SiLU
};

}  // namespace deepstitch
