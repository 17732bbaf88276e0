// Activations to int8, per row and block: s = max|x| / 127, q = rint(x / s), in IEEE arithmetic, equal to the last bit
// on every machine. A warp takes a SPAN of 128 numbers, four to a lane: 512 contiguous bytes, one load a lane. The
// largest magnitude is found by butterflies over the 8, 16 or 32 lanes of a block.
//
// A block that holds a NaN or an infinity gets a scale that is not finite, so that the products are not either.
#pragma once

#include "linear_format.cuh"

namespace deepstitch {

constexpr int kSpan = 128;

// What a lane holds of its group of 32 (8 lanes): one word of four numbers and where it belongs. Meta is that of the
// group, the same in all 8 lanes.
struct QuantizedWord {
    uint32_t word;
    int unit;   // of the group: 0 or 1
    int place;  // of the word in the unit: 0 ... 3
    LinearMeta meta;
};

__device__ __forceinline__ int quantize_one(float x, float scale) {
    return scale == 0.0F ? 0 : round_even(fminf(fmaxf(x / scale, -127.0F), 127.0F));
}

__device__ __forceinline__ uint32_t pack_bytes(int a, int b, int c, int d) {
    return static_cast<uint32_t>(a & 255) | static_cast<uint32_t>(b & 255) << 8 | static_cast<uint32_t>(c & 255) << 16 |
           static_cast<uint32_t>(d & 255) << 24;
}

// All lanes of the warp call it; x are numbers 4 * lane ... 4 * lane + 3 of the span, zero past the end of the row.
template <LinearFormat format>
__device__ __forceinline__ QuantizedWord quantize_span(float4 x, int block_size) {
    // magnitudes compare like their bits, and so a NaN is the largest
    int largest = max(max(__float_as_int(x.x) & 0x7fffffff, __float_as_int(x.y) & 0x7fffffff),
                      max(__float_as_int(x.z) & 0x7fffffff, __float_as_int(x.w) & 0x7fffffff));
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) largest = max(largest, __shfl_xor_sync(kFullMask, largest, apart));
    if (block_size >= 64) largest = max(largest, __shfl_xor_sync(kFullMask, largest, 8));
    if (block_size >= 128) largest = max(largest, __shfl_xor_sync(kFullMask, largest, 16));

    QuantizedWord result;
    const float scale = __int_as_float(largest) / 127.0F;
    const int a = quantize_one(x.x, scale), b = quantize_one(x.y, scale);
    const int c = quantize_one(x.z, scale), d = quantize_one(x.w, scale);
    const int place = static_cast<int>(threadIdx.x) % 8;
    result.meta.scale = scale;
    result.meta.offset = 0;
    if constexpr (format == LinearFormat::kInt4) {
        // a lane has two even numbers (a, c) and two odd ones (b, d): neighbours swap, so that the lane at an even
        // place has four even ones and its neighbour four odd ones
        const uint32_t even = pack_bytes(a, c, 0, 0), odd = pack_bytes(b, d, 0, 0);
        const uint32_t other = __shfl_xor_sync(kFullMask, place % 2 == 0 ? odd : even, 1);
        result.word = place % 2 == 0 ? even | other << 16 : other | odd << 16;
        result.unit = place % 2;
        result.place = place / 2;
        int sum = a + b + c + d;
#pragma unroll
        for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(kFullMask, sum, apart);
        result.meta.offset = -8 * sum;
    } else {
        result.word = pack_bytes(a, b, c, d);
        result.unit = place / 4;
        result.place = place % 4;
    }
    return result;
}

// Four numbers of a row of x for this lane, zeros past its end.
__device__ __forceinline__ float4 load_span(const float* row, int span, int columns) {
    const int column = span * kSpan + static_cast<int>(threadIdx.x) % kWarp * 4;
    return column < columns ? as_floats(load16(row + column)) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
}

// The kernel of its own: a warp per span of [rows, columns].
template <LinearFormat format>
__device__ inline void linear_quantize(const LinearQuantizeParams& p) {
    const int spans = (p.columns + kSpan - 1) / kSpan;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (index >= p.rows * spans) return;  // whole warps
    const int64_t row = index / spans;
    const int span = static_cast<int>(index % spans);
    const QuantizedWord q = quantize_span<format>(load_span(p.x + row * p.columns, span, p.columns), p.block_size);
    const int group = span * (kSpan / kLinearGroup) + static_cast<int>(threadIdx.x) % kWarp / 8;
    if (group * kLinearGroup >= p.columns) return;
    const int64_t at = row * (p.columns / kLinearGroup) + group;
    static_cast<uint32_t*>(p.units)[at * 8 + q.unit * 4 + q.place] = q.word;
    if (threadIdx.x % 8 == 0) p.meta[at] = q.meta;
}

}  // namespace deepstitch
