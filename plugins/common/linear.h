// Products with a stored matrix: what host code and kernels must agree on. Plain C++, no CUDA.
//
//     y[m, n] = sum_k x[m, k] * W[n, k]        W is row-major [N, K]; K is a multiple of 32 and of the block size
//
// Integer formats hold W in blocks along K with one scale each, and x is quantized on the way, per row and block:
//
//     s = max|x| / 127    q = rint(x / s)    y = sum over blocks of (sum_k q * w) * (w_scale * s)
//
// Everything is moved in UNITS of 16 bytes. A unit of activations is 16 int8 numbers or 4 floats. One 16-byte LOAD of
// weights meets `units` of them: an int4 load is 32 weights and meets two, a float16 load is 8 weights and meets two.
//
// A GROUP is 32 activations, the smallest block. An int4 word carries 8 weights; w & 0x0f0f0f0f are those at even
// places, (w >> 4) & 0x0f0f0f0f those at odd ones. So for int4 a group is stored as its 16 even numbers and then its
// 16 odd ones, and a load of weights meets its two units without a shuffle of bytes.
#pragma once

#include "types.h"

namespace deepstitch {

enum class LinearFormat : int32_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int kLinearGroup = 32;

// Of 32 quantized activations. Nibbles are stored as w + 8: dot(q, w) = dot(q, nibble) + offset.
struct alignas(8) LinearMeta {
    float scale;
    int32_t offset;  // -8 * their sum for int4, else 0
};

struct LinearMatrix {
    const void* data;    // [outputs, inputs] in the format
    const void* scales;  // [outputs, inputs / block_size], null for float formats
    int32_t outputs;
    int32_t inputs;
    int32_t block_size;   // 32, 64 or 128; 0 for float formats
    int32_t half_scales;  // scales are float16, else float32
};

// x [rows, columns] -> units [rows, columns / 16] and meta [rows, columns / 32]
struct LinearQuantizeParams {
    const float* x;
    void* units;
    LinearMeta* meta;
    int64_t rows;
    int32_t columns;
    int32_t block_size;
};

constexpr bool linear_is_integer(LinearFormat format) {
    return format == LinearFormat::kInt8 || format == LinearFormat::kInt4;
}

// Bytes of `count` weights.
constexpr int64_t linear_bytes(LinearFormat format, int64_t count) {
    return format == LinearFormat::kInt4   ? count / 2
           : format == LinearFormat::kInt8 ? count
                                           : count * (format == LinearFormat::kFloat16 ? 2 : 4);
}

// Weights in a 16-byte load.
constexpr int linear_load_elements(LinearFormat format) {
    return format == LinearFormat::kInt4      ? 32
           : format == LinearFormat::kInt8    ? 16
           : format == LinearFormat::kFloat16 ? 8
                                              : 4;
}

constexpr int linear_unit_elements(LinearFormat format) {
    return linear_is_integer(format) ? 16 : 4;
}

constexpr int linear_load_units(LinearFormat format) {
    return linear_load_elements(format) / linear_unit_elements(format);
}

// ---- The matrix-vector product (linear_gemv.cuh): few tokens, weights read once.

constexpr int kGemvThreads = 256;
constexpr int kGemvLanes = 8;                          // that share one row: 128 contiguous bytes
constexpr int kGemvTeams = kGemvThreads / kGemvLanes;  // of kGemvLanes lanes in a block
constexpr int kGemvUnits = 1024;                       // of activations in shared memory at a time: 16 KB

// Loads of one row between two barriers. The activations of all tokens for them fill kGemvUnits.
constexpr int gemv_tile_loads(LinearFormat format, int tokens) {
    return kGemvUnits / (tokens * linear_load_units(format));
}

// ---- The tiled product (linear_gemm.cuh): many tokens.

constexpr int kGemmThreads = 128;
constexpr int kGemmOutputs = 64;  // rows of W of a tile
constexpr int kGemmUnits = 4;     // of each row between two barriers: 64 bytes

}  // namespace deepstitch
