// rms_norm_rope: y = weight * x / sqrt(mean(x^2) + epsilon) over whole rows, after a residual sum if there is one; or
// over the heads of a row, followed by the rotation of interleaved mRoPE.
//
// rms_norm: one block per row. A thread reads `elements` neighbouring columns with one 16-byte load, then those
// kNormThreads * elements further on. What it has read it keeps in shared memory for the second pass, in places only
// it uses (hence no barrier, and neighbouring threads in neighbouring banks), if the row fits. Every element of x is
// then read from memory once and written once.
//
// rms_norm_rope: blockIdx.x is the token, blockIdx.y a group of heads. First the block computes cosine and sine of the
// token's angles, one thread per pair, into shared memory; then a group of 8 or 16 lanes holds one head in registers.
// Lane i has both halves of its pairs, so that the rotation needs no exchange.
#pragma once

#include "../common/kernel.cuh"
#include "../common/values.cuh"
#include "params.h"
#include "sincos.cuh"

namespace deepstitch {

// Columns [column, column + elements) of the row that is normed.
template <class Storage, int elements>
__device__ __forceinline__ void row_values(const Storage* x, const Storage* residual, int column,
                                           float (&values)[elements]) {
    load_values(x + column, values);
    if (residual == nullptr) return;
    float more[elements];
    load_values(residual + column, more);
#pragma unroll
    for (int i = 0; i < elements; ++i) values[i] = as_stored(values[i] + more[i], x);
}

template <class Storage, int elements>
__device__ __forceinline__ void rms_norm(const RmsNormParams& p) {
    DYNAMIC_SHARED(float, kept);  // [access][element][thread]
    STATIC_SHARED(float, scratch, kNormThreads / kWarp);
    const int64_t start = static_cast<int64_t>(blockIdx.x) * p.width;
    const Storage* x = static_cast<const Storage*>(p.x) + start;
    const Storage* residual = p.residual == nullptr ? nullptr : static_cast<const Storage*>(p.residual) + start;
    const int first = static_cast<int>(threadIdx.x) * elements;

    float squares = 0.0F;
    float* keep = kept + threadIdx.x;
    for (int column = first; column < p.width; column += kNormThreads * elements, keep += kNormThreads * elements) {
        float values[elements];
        row_values(x, residual, column, values);
        if (residual != nullptr) store_values(static_cast<Storage*>(p.sum) + start + column, values);
#pragma unroll
        for (int i = 0; i < elements; ++i) {
            squares = fmaf(values[i], values[i], squares);
            if (p.kept) keep[i * kNormThreads] = values[i];
        }
    }
    const float mean = block_sum<kNormThreads>(squares, scratch) / static_cast<float>(p.width);
    const float scale = 1.0F / sqrtf(mean + p.epsilon);

    keep = kept + threadIdx.x;
    for (int column = first; column < p.width; column += kNormThreads * elements, keep += kNormThreads * elements) {
        float values[elements];
        float weight[elements];
        if (p.kept) {
#pragma unroll
            for (int i = 0; i < elements; ++i) values[i] = keep[i * kNormThreads];
        } else {
            row_values(x, residual, column, values);
        }
        load_values(p.weight + column, weight);
#pragma unroll
        for (int i = 0; i < elements; ++i) values[i] = values[i] * scale * weight[i];
        store_values(static_cast<Storage*>(p.y) + start + column, values);
    }
}

// 0 time, 1 height, 2 width: which of a token's three positions turns this pair.
__device__ __forceinline__ int position_axis(int pair, int height_limit, int width_limit) {
    const int phase = pair % 3;
    if (phase == 1 && pair < height_limit) return 1;
    return phase == 2 && pair < width_limit ? 2 : 0;
}

template <class Storage, int elements>
__device__ __forceinline__ void rms_norm_rope(const RmsNormRopeParams& p) {
    constexpr int kLanes = rope_lanes(elements);
    constexpr int kAccesses = kMaxRopePairs / (kLanes * elements);
    STATIC_SHARED(float, cosine, kMaxRopePairs);
    STATIC_SHARED(float, sine, kMaxRopePairs);
    const int64_t token = blockIdx.x;
    for (int pair = static_cast<int>(threadIdx.x); pair < p.pairs; pair += kRopeThreads) {
        const int axis = position_axis(pair, p.height_limit, p.width_limit);
        const float position = static_cast<float>(p.position_ids[axis * p.tokens + token]);
        sin_cos(position * p.inv_freq[pair], sine[pair], cosine[pair]);
    }
    __syncthreads();

    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int head = static_cast<int>(blockIdx.y * (kRopeThreads / kLanes) + threadIdx.x / kLanes);
    const bool active = head < p.heads;  // the others take part in the shuffles of their warp
    const int64_t start = (token * p.heads + head) * 2 * p.pairs;
    const Storage* x = static_cast<const Storage*>(p.x) + start;
    float low[kAccesses][elements];
    float high[kAccesses][elements];
    float squares = 0.0F;
#pragma unroll
    for (int access = 0; access < kAccesses; ++access) {
        const int pair = (access * kLanes + lane) * elements;
        if (!active || pair >= p.pairs) continue;
        load_values(x + pair, low[access]);
        load_values(x + p.pairs + pair, high[access]);
#pragma unroll
        for (int i = 0; i < elements; ++i) {
            squares = fmaf(low[access][i], low[access][i], squares);
            squares = fmaf(high[access][i], high[access][i], squares);
        }
    }
#pragma unroll
    for (int apart = kLanes / 2; apart > 0; apart /= 2) squares += __shfl_xor_sync(kFullMask, squares, apart);
    if (!active) return;
    const float scale = 1.0F / sqrtf(squares / static_cast<float>(2 * p.pairs) + p.epsilon);

    Storage* y = static_cast<Storage*>(p.y) + start;
#pragma unroll
    for (int access = 0; access < kAccesses; ++access) {
        const int pair = (access * kLanes + lane) * elements;
        if (pair >= p.pairs) continue;
        float weight_low[elements];
        float weight_high[elements];
        load_values(p.weight + pair, weight_low);
        load_values(p.weight + p.pairs + pair, weight_high);
#pragma unroll
        for (int i = 0; i < elements; ++i) {
            const float a = low[access][i] * scale * weight_low[i];
            const float b = high[access][i] * scale * weight_high[i];
            low[access][i] = a * cosine[pair + i] - b * sine[pair + i];
            high[access][i] = b * cosine[pair + i] + a * sine[pair + i];
        }
        store_values(y + pair, low[access]);
        store_values(y + p.pairs + pair, high[access]);
    }
}

}  // namespace deepstitch

// _scalar: rows (halves of a head) that are not a whole number of 16-byte accesses.
#define RMS_NORM_KERNEL(name, Storage, elements)                                    \
    DEEPSTITCH_KERNEL(name, deepstitch::RmsNormParams, deepstitch::kNormThreads, 4) { \
        deepstitch::rms_norm<Storage, elements>(p);                                 \
    }
#define RMS_NORM_ROPE_KERNEL(name, Storage, elements)                                   \
    DEEPSTITCH_KERNEL(name, deepstitch::RmsNormRopeParams, deepstitch::kRopeThreads, 8) { \
        deepstitch::rms_norm_rope<Storage, elements>(p);                                \
    }

RMS_NORM_KERNEL(rms_norm_rope_norm_f32, float, 4)
RMS_NORM_KERNEL(rms_norm_rope_norm_f16, uint16_t, 8)
RMS_NORM_KERNEL(rms_norm_rope_norm_f32_scalar, float, 1)
RMS_NORM_KERNEL(rms_norm_rope_norm_f16_scalar, uint16_t, 1)
RMS_NORM_ROPE_KERNEL(rms_norm_rope_rope_f32, float, 4)
RMS_NORM_ROPE_KERNEL(rms_norm_rope_rope_f16, uint16_t, 8)
RMS_NORM_ROPE_KERNEL(rms_norm_rope_rope_f32_scalar, float, 1)
RMS_NORM_ROPE_KERNEL(rms_norm_rope_rope_f16_scalar, uint16_t, 1)

#undef RMS_NORM_KERNEL
#undef RMS_NORM_ROPE_KERNEL
