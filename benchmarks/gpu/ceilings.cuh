// What a card can do at most, measured with kernels that do one thing each.
#pragma once

#include "../../plugins/common/kernel.cuh"

struct CeilingParams {
    const uint4* from;
    uint4* to;        // copy: as many vectors as `from`; others: one word per thread
    int64_t vectors;  // of 16 bytes
    int32_t rounds;   // arithmetic: of 64 instructions in each of 8 chains
    int32_t seed;     // unknown to the compiler
};

constexpr int kCeilingThreads = 256;
constexpr int kChains = 8, kUnrolled = 64;

// Four vectors per thread and turn, so that enough loads are in flight.
template <class Each>
__device__ __forceinline__ void for_each_vector(const CeilingParams& p, Each each) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * kCeilingThreads;
    int64_t at = static_cast<int64_t>(blockIdx.x) * kCeilingThreads + threadIdx.x;
    for (; at + 3 * step < p.vectors; at += 4 * step) {
        uint4 values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = deepstitch::load16(p.from + at + i * step);
#pragma unroll
        for (int i = 0; i < 4; ++i) each(at + i * step, values[i]);
    }
    for (; at < p.vectors; at += step) each(at, deepstitch::load16(p.from + at));
}

DEEPSTITCH_KERNEL(ceilings_copy, CeilingParams, kCeilingThreads, 4) {
    for_each_vector(p, [&p](int64_t at, const uint4& value) { p.to[at] = value; });
}

DEEPSTITCH_KERNEL(ceilings_read, CeilingParams, kCeilingThreads, 4) {
    unsigned mixed = 0;
    for_each_vector(p, [&mixed](int64_t, const uint4& value) { mixed ^= value.x ^ value.y ^ value.z ^ value.w; });
    // Written always: what is not used is not read.
    reinterpret_cast<unsigned*>(p.to)[blockIdx.x * kCeilingThreads + threadIdx.x] = mixed;
}

DEEPSTITCH_KERNEL(ceilings_float, CeilingParams, kCeilingThreads, 4) {
    const float factor = 1.0f + 1e-7f * static_cast<float>(p.seed);
    float chains[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) chains[c] = static_cast<float>(threadIdx.x + c);
    for (int round = 0; round < p.rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
#pragma unroll
            for (int c = 0; c < kChains; ++c) chains[c] = fmaf(chains[c], factor, 0.5f);
        }
    }
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChains; ++c) sum += chains[c];
    reinterpret_cast<float*>(p.to)[blockIdx.x * kCeilingThreads + threadIdx.x] = sum;
}

DEEPSTITCH_KERNEL(ceilings_dp4a, CeilingParams, kCeilingThreads, 4) {
    int chains[kChains];
#pragma unroll
    for (int c = 0; c < kChains; ++c) chains[c] = static_cast<int>(threadIdx.x) + c;
    for (int round = 0; round < p.rounds; ++round) {
#pragma unroll
        for (int i = 0; i < kUnrolled; ++i) {
#pragma unroll
            for (int c = 0; c < kChains; ++c) chains[c] = __dp4a(chains[c], p.seed, chains[c]);
        }
    }
    int sum = 0;
#pragma unroll
    for (int c = 0; c < kChains; ++c) sum += chains[c];
    reinterpret_cast<int*>(p.to)[blockIdx.x * kCeilingThreads + threadIdx.x] = sum;
}
