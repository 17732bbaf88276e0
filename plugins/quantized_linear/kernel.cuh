// y = x W^T (+ bias) (+ residual) with W in blocks of int4 or int8 numbers, or in float16 or float32.
//
//   quantize  int8 numbers of x, their scales and sums: a warp for 128 numbers of a row (common/linear_quantize.cuh)
//   decode    1, 2, 4 or 8 tokens: weights are read once, bound by bandwidth                (common/linear_gemv.cuh)
//   prefill   tiles of 32 or 64 tokens by 64 outputs, bound by arithmetic                   (common/linear_gemm.cuh)
//
// All write y once, with bias and residual added in fp32 on the way out. Traffic of decode: the weights and their
// scales once for up to eight tokens, x once a block (from L2), y once. Of a tile: (tokens + 64) * K weights and
// numbers for tokens * 64 * K products.
#pragma once

#include "../common/linear_gemm.cuh"
#include "../common/linear_gemv.cuh"
#include "params.h"

namespace deepstitch {

__device__ __forceinline__ void quantized_linear_write(const QuantizedLinearParams& p, int row, int output, float sum) {
    const int64_t at = static_cast<int64_t>(row) * p.matrix.outputs + output;
    if (p.bias != nullptr) sum += __ldg(p.bias + output);
    if (p.residual != nullptr) sum += __ldg(p.residual + at);
    p.y[at] = sum;
}

// Grid: blockIdx.x = tile of outputs * token groups + token group. A team of eight lanes makes one output for one
// token, two outputs for more: then the activations it reads from shared memory serve twice.
template <LinearFormat format, int kTokens, bool kFused>
__device__ inline void quantized_linear_decode(const QuantizedLinearParams& p) {
    constexpr int kRows = kTokens == 1 ? 1 : 2;
    STATIC_SHARED(GemvShared<format>, shared, 1);
    const int token_groups = (p.rows + kTokens - 1) / kTokens;
    const int first_row = static_cast<int>(blockIdx.x) % token_groups * kTokens;
    const int team = static_cast<int>(threadIdx.x) / kGemvLanes;
    const int first_output = (static_cast<int>(blockIdx.x) / token_groups * kGemvTeams + team) * kRows;
    int outputs[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) outputs[r] = min(first_output + r, p.matrix.outputs - 1);

    const TokenRows tokens = {nullptr, 1, first_row, min(kTokens, p.rows - first_row)};
    float sums[kRows][kTokens];
    if constexpr (kFused && Linear<format>::kInteger) {
        const StageFloats source = {p.x, tokens, p.matrix.inputs, p.matrix.block_size};
        linear_gemv<format, kTokens, kRows>(p.matrix, outputs, source, shared[0], sums);
    } else {
        const StageUnits source = {Linear<format>::kInteger ? p.units : p.x, p.meta, tokens, p.matrix.inputs};
        linear_gemv<format, kTokens, kRows>(p.matrix, outputs, source, shared[0], sums);
    }
    const int token = static_cast<int>(threadIdx.x) % kGemvLanes;
    if (token >= tokens.count) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
        if (first_output + r < p.matrix.outputs)
            quantized_linear_write(p, first_row + token, first_output + r, sum_of_lane<kTokens>(sums[r]));
}

// What is added to a row is asked for before any of it is used: the waits of 4 * kTokens numbers one after the other
// would cost as much as the product.
template <int kTokens>
__device__ __forceinline__ void quantized_linear_write_tile(const QuantizedLinearParams& p, int first_row,
                                                            int first_output,
                                                            const float (&acc)[kTokens][kGemmOutputsEach]) {
    const int first_column = first_output + static_cast<int>(threadIdx.x) % kGemmColumns;
    const int last = p.matrix.outputs - 1;
    float bias[kGemmOutputsEach] = {};
    if (p.bias != nullptr) {
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j) bias[j] = __ldg(p.bias + min(first_column + kGemmColumns * j, last));
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        const int row = first_row + static_cast<int>(threadIdx.x) / kGemmColumns + kGemmRows * i;
        if (row >= p.rows) continue;
        const int64_t start = static_cast<int64_t>(row) * p.matrix.outputs;
        float residual[kGemmOutputsEach] = {};
        if (p.residual != nullptr) {
#pragma unroll
            for (int j = 0; j < kGemmOutputsEach; ++j)
                residual[j] = __ldg(p.residual + start + min(first_column + kGemmColumns * j, last));
        }
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j) {
            const int column = first_column + kGemmColumns * j;
            if (column <= last) p.y[start + column] = acc[i][j] + bias[j] + residual[j];
        }
    }
}

// Grid: blockIdx.x = tile of outputs * token tiles + token tile, so that neighbours share the weights.
template <LinearFormat format, int kTokens>
__device__ inline void quantized_linear_prefill(const QuantizedLinearParams& p) {
    constexpr int kTile = GemmTile<kTokens>::kRows;
    const int token_tiles = (p.rows + kTile - 1) / kTile;
    const int first_row = static_cast<int>(blockIdx.x) % token_tiles * kTile;
    const int first_output = static_cast<int>(blockIdx.x) / token_tiles * kGemmOutputs;
    const auto x_number = [&](int i) { return static_cast<int64_t>(min(first_row + i, p.rows - 1)); };
    const auto w_number = [&](int n) { return static_cast<int64_t>(min(first_output + n, p.matrix.outputs - 1)); };

    const GemmActivations activations = {Linear<format>::kInteger ? p.units : p.x, p.meta};
    float acc[kTokens][kGemmOutputsEach];
    linear_gemm<format, kTokens>(p.matrix, activations, x_number, w_number, acc);
    quantized_linear_write_tile<kTokens>(p, first_row, first_output, acc);
}

}  // namespace deepstitch

// The kernels by name: <regime>_<format>_<tokens>. One and two tokens of integer formats are quantized by the kernel.
// The last number of a kernel is the blocks that a multiprocessor must hold; it bounds the registers.
#define QUANTIZED_LINEAR_KERNELS(name, format)                                                           \
    DEEPSTITCH_KERNEL(quantized_linear_decode_##name##_1, deepstitch::QuantizedLinearParams, 256, 3) {   \
        deepstitch::quantized_linear_decode<deepstitch::LinearFormat::format, 1, true>(p);               \
    }                                                                                                    \
    DEEPSTITCH_KERNEL(quantized_linear_decode_##name##_2, deepstitch::QuantizedLinearParams, 256, 3) {   \
        deepstitch::quantized_linear_decode<deepstitch::LinearFormat::format, 2, true>(p);               \
    }                                                                                                    \
    DEEPSTITCH_KERNEL(quantized_linear_decode_##name##_4, deepstitch::QuantizedLinearParams, 256, 3) {   \
        deepstitch::quantized_linear_decode<deepstitch::LinearFormat::format, 4, false>(p);              \
    }                                                                                                    \
    DEEPSTITCH_KERNEL(quantized_linear_decode_##name##_8, deepstitch::QuantizedLinearParams, 256, 2) {   \
        deepstitch::quantized_linear_decode<deepstitch::LinearFormat::format, 8, false>(p);              \
    }                                                                                                    \
    DEEPSTITCH_KERNEL(quantized_linear_prefill_##name##_32, deepstitch::QuantizedLinearParams, 128, 4) { \
        deepstitch::quantized_linear_prefill<deepstitch::LinearFormat::format, 4>(p);                    \
    }                                                                                                    \
    DEEPSTITCH_KERNEL(quantized_linear_prefill_##name##_64, deepstitch::QuantizedLinearParams, 128, 3) { \
        deepstitch::quantized_linear_prefill<deepstitch::LinearFormat::format, 8>(p);                    \
    }

QUANTIZED_LINEAR_KERNELS(float32, kFloat32)
QUANTIZED_LINEAR_KERNELS(float16, kFloat16)
QUANTIZED_LINEAR_KERNELS(int8, kInt8)
QUANTIZED_LINEAR_KERNELS(int4, kInt4)

#undef QUANTIZED_LINEAR_KERNELS

DEEPSTITCH_KERNEL(quantized_linear_quantize_int8, deepstitch::LinearQuantizeParams, 256, 4) {
    deepstitch::linear_quantize<deepstitch::LinearFormat::kInt8>(p);
}
DEEPSTITCH_KERNEL(quantized_linear_quantize_int4, deepstitch::LinearQuantizeParams, 256, 4) {
    deepstitch::linear_quantize<deepstitch::LinearFormat::kInt4>(p);
}
