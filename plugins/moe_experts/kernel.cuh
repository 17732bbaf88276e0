// y[t] = sum over the top_k experts e of token t of  w[t, e] * down_e( act_e( gate_up_e( x[t] ) ) )
//
//   plan / route, group, tiles   who works for whom: a table of tiles of slots of one expert             (route.cuh)
//   quantize                     x, and later the activated numbers, as int8           (common/linear_quantize.cuh)
//   gate_up                      both projections of a tile and the activation in one kernel; activated [slots, I]
//   down                         results [slots, H]
//   combine                      y, in the order of the ranks, so that it never depends on what ran first
//
// Decode: tiles of at most eight slots, weights read once a tile (common/linear_gemv.cuh). Prefill: tiles of 32 or 64
// slots (common/linear_gemm.cuh). The host cannot know how many tiles there are: it starts blocks for the worst case
// and those past tile_count return at once.
//
// Gate and up rows of the same number meet in one thread: a team of the matrix-vector kernel owns rows i and I + i, a
// thread of the tiled one columns i and 32 + i of a tile whose outputs are 32 gate rows and then their 32 up rows.
// Experts without a gate use the same places for twice as many numbers, and the blocks left over return.
//
// Memory. Nothing is sorted or copied: x stays where it is, and a tile reads the rows order[first ... first + count) /
// top_k of it. `activated` and `results` have one row a slot and are written once, by slot number, so that combine
// finds the ranks of a token next to each other. For S slots the traffic besides the weights is S I floats out and in
// (and a quarter of that as int8), S H floats out and in.
//
// Determinism. Every number is made by one thread or one team in an order fixed by its place; there are no atomics.
#pragma once

#include "../common/linear_gemm.cuh"
#include "../common/linear_gemv.cuh"
#include "route.cuh"

namespace deepstitch {

enum MoEActivation { kSwiGLU = 0, kGeGLU = 1, kReLU2 = 2, kSiLU = 3 };

__device__ __forceinline__ bool moe_gated(int activation) {
    return activation == kSwiGLU || activation == kGeGLU;
}

// SwiGLU g / (1 + exp(-g)) * u, GeGLU g / 2 * (1 + erf(g / sqrt 2)) * u, ReLU2 max(g, 0)^2, SiLU g / (1 + exp(-g)). A
// NaN stays one.
__device__ __forceinline__ float moe_activate(int activation, float gate, float up) {
    if (activation == kGeGLU) return 0.5F * gate * (1.0F + erff(gate * 0.70710678118654752F)) * up;
    if (activation == kReLU2) {
        const float positive = fmaxf(gate, 0.0F);
        return gate == gate ? positive * positive : gate;
    }
    const float silu = gate / (1.0F + expf(-gate));
    return activation == kSwiGLU ? silu * up : silu;
}

// Numbers of one expert that a block of gate_up makes: half of its rows are up rows if there are such.
template <int kBlockRows>
struct MoEUnits {
    static constexpr int kHalf = kBlockRows / 2;
    int first;  // number of the block's first unit
    int intermediate;
    bool gated;

    __device__ __forceinline__ MoEUnits(const MoEExpertsParams& p, int activation) {
        gated = moe_gated(activation);
        intermediate = p.intermediate;
        first = static_cast<int>(blockIdx.x) * (gated ? kHalf : kBlockRows);
    }
    __device__ __forceinline__ bool empty() const { return first >= intermediate; }
    // Row of gate_up behind row `half * kHalf + i` of the block; past the end the last one again.
    __device__ __forceinline__ int row(int half, int i) const {
        if (gated) return min(first + i, intermediate - 1) + half * intermediate;
        return min(first + half * kHalf + i, intermediate - 1);
    }
    // Writes what follows from both halves of place i.
    __device__ __forceinline__ void write(float* activated, int activation, int i, float lower, float upper) const {
        if (first + i < intermediate) activated[first + i] = moe_activate(activation, lower, upper);
        if (!gated && first + kHalf + i < intermediate)
            activated[first + kHalf + i] = moe_activate(activation, upper, 0.0F);
    }
};

// Slot `i` of a tile; past the end the last one again.
__device__ __forceinline__ int moe_slot(const MoEExpertsParams& p, const MoETile& tile, int i) {
    return __ldg(p.order + tile.first + min(i, tile.count - 1));
}

// ---- Decode. Grid (units or outputs, tiles).

// Team t of block b: for a gated expert rows 32 b + t and I + 32 b + t, hence number 32 b + t; for one without a gate
// rows and numbers 64 b + t and 64 b + 32 + t.
template <LinearFormat format, int kTokens, bool kFused>
__device__ __forceinline__ void moe_gate_up_tile(const MoEExpertsParams& p, const MoETile& tile,
                                                 GemvShared<format>& shared) {
    const int activation = p.activations[tile.expert];
    const MoEUnits<kGemvTeams * 2> units(p, activation);
    if (units.empty()) return;
    const int team = static_cast<int>(threadIdx.x) / kGemvLanes;
    const int rows[2] = {units.row(0, team), units.row(1, team)};
    const LinearMatrix matrix = matrix_of_stack<format>(p.gate_up, tile.expert);
    const TokenRows tokens = {p.order, p.top_k, tile.first, tile.count};
    float sums[2][kTokens];
    if constexpr (kFused && Linear<format>::kInteger) {
        const StageFloats source = {p.x, tokens, matrix.inputs, matrix.block_size};
        linear_gemv<format, kTokens, 2>(matrix, rows, source, shared, sums);
    } else {
        const StageUnits source = {Linear<format>::kInteger ? p.x_units : p.x, p.x_meta, tokens, matrix.inputs};
        linear_gemv<format, kTokens, 2>(matrix, rows, source, shared, sums);
    }
    const int token = static_cast<int>(threadIdx.x) % kGemvLanes;
    if (token >= tile.count) return;
    float* activated = p.activated + static_cast<int64_t>(moe_slot(p, tile, token)) * p.intermediate;
    units.write(activated, activation, team, sum_of_lane<kTokens>(sums[0]), sum_of_lane<kTokens>(sums[1]));
}

// One row of down a team for one slot, two for more; the grid is made for one, blocks left over return.
template <LinearFormat format, int kTokens, bool kFused>
__device__ __forceinline__ void moe_down_tile(const MoEExpertsParams& p, const MoETile& tile,
                                              GemvShared<format>& shared) {
    constexpr int kRows = kTokens == 1 ? 1 : 2;
    const LinearMatrix matrix = matrix_of_stack<format>(p.down, tile.expert);
    const int team = static_cast<int>(threadIdx.x) / kGemvLanes;
    const int first = (static_cast<int>(blockIdx.x) * kGemvTeams + team) * kRows;
    if (static_cast<int>(blockIdx.x) * kGemvTeams * kRows >= matrix.outputs) return;
    int rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows[r] = min(first + r, matrix.outputs - 1);
    const TokenRows tokens = {p.order, 1, tile.first, tile.count};
    float sums[kRows][kTokens];
    if constexpr (kFused && Linear<format>::kInteger) {
        const StageFloats source = {p.activated, tokens, matrix.inputs, matrix.block_size};
        linear_gemv<format, kTokens, kRows>(matrix, rows, source, shared, sums);
    } else {
        const StageUnits source = {Linear<format>::kInteger ? p.activated_units : p.activated, p.activated_meta, tokens,
                                   matrix.inputs};
        linear_gemv<format, kTokens, kRows>(matrix, rows, source, shared, sums);
    }
    const int token = static_cast<int>(threadIdx.x) % kGemvLanes;
    if (token >= tile.count) return;
    float* result = p.results + static_cast<int64_t>(moe_slot(p, tile, token)) * matrix.outputs;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        if (first + r < matrix.outputs) result[first + r] = sum_of_lane<kTokens>(sums[r]);
}

// One token: every tile is one slot, and x and the activated numbers are quantized where they are needed.
template <LinearFormat format>
__device__ inline void moe_gate_up_single(const MoEExpertsParams& p) {
    STATIC_SHARED(GemvShared<format>, shared, 1);
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    moe_gate_up_tile<format, 1, true>(p, p.tiles[blockIdx.y], shared[0]);
}

template <LinearFormat format>
__device__ inline void moe_down_single(const MoEExpertsParams& p) {
    STATIC_SHARED(GemvShared<format>, shared, 1);
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    moe_down_tile<format, 1, true>(p, p.tiles[blockIdx.y], shared[0]);
}

// Several tokens: the arithmetic of a tile is that of the next power of two.
template <int kCount>
struct TokenCount {
    static constexpr int value = kCount;
};

template <class Body>
__device__ __forceinline__ void for_token_count(int count, const Body& body) {
    if (count == 1) {
        body(TokenCount<1>());
    } else if (count == 2) {
        body(TokenCount<2>());
    } else if (count <= 4) {
        body(TokenCount<4>());
    } else {
        body(TokenCount<8>());
    }
}

template <LinearFormat format>
__device__ inline void moe_gate_up_few(const MoEExpertsParams& p) {
    STATIC_SHARED(GemvShared<format>, shared, 1);
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    const MoETile tile = p.tiles[blockIdx.y];
    for_token_count(tile.count, [&](auto tokens) {
        moe_gate_up_tile<format, decltype(tokens)::value, false>(p, tile, shared[0]);
    });
}

template <LinearFormat format>
__device__ inline void moe_down_few(const MoEExpertsParams& p) {
    STATIC_SHARED(GemvShared<format>, shared, 1);
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    const MoETile tile = p.tiles[blockIdx.y];
    for_token_count(tile.count, [&](auto tokens) {
        moe_down_tile<format, decltype(tokens)::value, false>(p, tile, shared[0]);
    });
}

// ---- Prefill. Grid (units or outputs, tiles): the blocks of a tile of slots follow each other and share its x.

template <LinearFormat format, int kTokens>
__device__ inline void moe_gate_up_tiled(const MoEExpertsParams& p) {
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    const MoETile tile = p.tiles[blockIdx.y];
    const int activation = p.activations[tile.expert];
    const MoEUnits<kGemmOutputs> units(p, activation);
    if (units.empty()) return;
    constexpr int kHalf = kGemmOutputs / 2;
    const auto x_number = [&](int i) { return static_cast<int64_t>(moe_slot(p, tile, i) / p.top_k); };
    const auto w_number = [&](int n) { return static_cast<int64_t>(units.row(n / kHalf, n % kHalf)); };
    const GemmActivations activations = {Linear<format>::kInteger ? p.x_units : p.x, p.x_meta};
    float acc[kTokens][kGemmOutputsEach];
    linear_gemm<format, kTokens>(matrix_of_stack<format>(p.gate_up, tile.expert), activations, x_number, w_number, acc);
    const int tx = static_cast<int>(threadIdx.x) % kGemmColumns, ty = static_cast<int>(threadIdx.x) / kGemmColumns;
    int slots[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) slots[i] = moe_slot(p, tile, ty + kGemmRows * i);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (ty + kGemmRows * i >= tile.count) continue;
        float* activated = p.activated + static_cast<int64_t>(slots[i]) * p.intermediate;
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach / 2; ++j)
            units.write(activated, activation, tx + kGemmColumns * j, acc[i][j], acc[i][j + kGemmOutputsEach / 2]);
    }
}

template <LinearFormat format, int kTokens>
__device__ inline void moe_down_tiled(const MoEExpertsParams& p) {
    if (static_cast<int>(blockIdx.y) >= __ldg(p.tile_count)) return;
    const MoETile tile = p.tiles[blockIdx.y];
    const LinearMatrix matrix = matrix_of_stack<format>(p.down, tile.expert);
    const int first = static_cast<int>(blockIdx.x) * kGemmOutputs;
    const auto x_number = [&](int i) { return static_cast<int64_t>(moe_slot(p, tile, i)); };
    const auto w_number = [&](int n) { return static_cast<int64_t>(min(first + n, matrix.outputs - 1)); };
    const GemmActivations activations = {Linear<format>::kInteger ? p.activated_units : p.activated, p.activated_meta};
    float acc[kTokens][kGemmOutputsEach];
    linear_gemm<format, kTokens>(matrix, activations, x_number, w_number, acc);
    const int tx = static_cast<int>(threadIdx.x) % kGemmColumns, ty = static_cast<int>(threadIdx.x) / kGemmColumns;
    int slots[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) slots[i] = moe_slot(p, tile, ty + kGemmRows * i);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        if (ty + kGemmRows * i >= tile.count) continue;
        float* result = p.results + static_cast<int64_t>(slots[i]) * matrix.outputs;
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j)
            if (first + tx + kGemmColumns * j < matrix.outputs) result[first + tx + kGemmColumns * j] = acc[i][j];
    }
}

}  // namespace deepstitch

#define MOE_EXPERTS_KERNEL(name, threads, blocks, body)                                    \
    DEEPSTITCH_KERNEL(moe_experts_##name, deepstitch::MoEExpertsParams, threads, blocks) { \
        deepstitch::body(p);                                                               \
    }

// <projection>_<regime>_<format>_<slots of a tile>. Second number: blocks a multiprocessor must hold, which bounds the
// registers: 80 for one token, 128 for several and for the flat tile, 168 for the square one.
#define MOE_EXPERTS_KERNELS(name, format)                                                                       \
    MOE_EXPERTS_KERNEL(gate_up_decode_##name##_1, 256, 3, moe_gate_up_single<deepstitch::LinearFormat::format>) \
    MOE_EXPERTS_KERNEL(gate_up_decode_##name##_8, 256, 2, moe_gate_up_few<deepstitch::LinearFormat::format>)    \
    MOE_EXPERTS_KERNEL(down_decode_##name##_1, 256, 3, moe_down_single<deepstitch::LinearFormat::format>)       \
    MOE_EXPERTS_KERNEL(down_decode_##name##_8, 256, 2, moe_down_few<deepstitch::LinearFormat::format>)          \
    DEEPSTITCH_KERNEL(moe_experts_gate_up_prefill_##name##_32, deepstitch::MoEExpertsParams, 128, 4) {          \
        deepstitch::moe_gate_up_tiled<deepstitch::LinearFormat::format, 4>(p);                                  \
    }                                                                                                           \
    DEEPSTITCH_KERNEL(moe_experts_gate_up_prefill_##name##_64, deepstitch::MoEExpertsParams, 128, 3) {          \
        deepstitch::moe_gate_up_tiled<deepstitch::LinearFormat::format, 8>(p);                                  \
    }                                                                                                           \
    DEEPSTITCH_KERNEL(moe_experts_down_prefill_##name##_32, deepstitch::MoEExpertsParams, 128, 4) {             \
        deepstitch::moe_down_tiled<deepstitch::LinearFormat::format, 4>(p);                                     \
    }                                                                                                           \
    DEEPSTITCH_KERNEL(moe_experts_down_prefill_##name##_64, deepstitch::MoEExpertsParams, 128, 3) {             \
        deepstitch::moe_down_tiled<deepstitch::LinearFormat::format, 8>(p);                                     \
    }

MOE_EXPERTS_KERNELS(float32, kFloat32)
MOE_EXPERTS_KERNELS(float16, kFloat16)
MOE_EXPERTS_KERNELS(int8, kInt8)
MOE_EXPERTS_KERNELS(int4, kInt4)

MOE_EXPERTS_KERNEL(plan, 256, 1, moe_plan)
MOE_EXPERTS_KERNEL(route, 256, 4, moe_route)
MOE_EXPERTS_KERNEL(group, 256, 4, moe_group)
MOE_EXPERTS_KERNEL(tiles, 256, 1, moe_tiles)
MOE_EXPERTS_KERNEL(combine, 256, 4, moe_combine)

#undef MOE_EXPERTS_KERNELS
#undef MOE_EXPERTS_KERNEL

DEEPSTITCH_KERNEL(moe_experts_quantize_int8, deepstitch::LinearQuantizeParams, 256, 4) {
    deepstitch::linear_quantize<deepstitch::LinearFormat::kInt8>(p);
}
DEEPSTITCH_KERNEL(moe_experts_quantize_int4, deepstitch::LinearQuantizeParams, 256, 4) {
    deepstitch::linear_quantize<deepstitch::LinearFormat::kInt4>(p);
}
