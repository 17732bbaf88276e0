// The arguments of the kernels of rms_norm_rope, and the shapes both sides agree on.
#pragma once

#include "../common/types.h"

namespace deepstitch {

constexpr int kNormThreads = 256;
constexpr int kRopeThreads = 128;
constexpr int kMaxRopePairs = 128;            // head_dim up to 256
constexpr int kMaxKeptBytes = 40 * 1024;      // of one row as floats in shared memory

// Lanes that share a head, by elements per access: 8 lanes of 8 fp16 or 16 lanes of 4 floats are the 64 pairs of a
// head of 128.
constexpr int rope_lanes(int elements) { return elements == 8 ? 8 : 16; }

struct RmsNormParams {
    const void* x;         // [rows, width]
    const void* residual;  // [rows, width] or null
    const float* weight;   // [width]
    void* y;               // [rows, width]
    void* sum;             // [rows, width]: x + residual; null where residual is
    int32_t width;
    float epsilon;
    int32_t kept;  // 1: the row fits in shared memory; 0: it is read twice
};

struct RmsNormRopeParams {
    const void* x;                // [tokens, heads, 2 * pairs]
    const float* weight;          // [2 * pairs]
    const int32_t* position_ids;  // [3, tokens]: time, height, width
    const float* inv_freq;        // [pairs]
    void* y;                      // like x
    int64_t tokens;
    int32_t heads;
    int32_t pairs;
    int32_t height_limit;  // 3 * mrope_section[1]
    int32_t width_limit;   // 3 * mrope_section[2]
    float epsilon;
};

}  // namespace deepstitch
