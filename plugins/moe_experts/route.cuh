// From router logits to a table of tiles, on the device: softmax, top-k, sorting slots by expert.
//
// Nothing here depends on the order in which blocks or threads run: places come from counting, not from atomics.
//
//     chosen, weights [tokens, top_k]  ->  order: slots sorted by expert, stable  ->  tiles: (expert, first, count)
//
// A warp holds the up to 256 logits of a token in registers, eight a lane: expert e in lane e % 32, place e / 32.
#pragma once

#include "../common/kernel.cuh"
#include "params.h"

namespace deepstitch {

constexpr int kMoEThreads = 256;
constexpr int kMoEWarps = kMoEThreads / kWarp;
constexpr int kMoELogitsEach = kMoEMaxExperts / kWarp;  // of a lane: experts lane, lane + 32, ...

__device__ __forceinline__ float minus_infinity() {
    return __uint_as_float(0xff800000U);
}

struct MoECandidate {
    float logit;
    int expert;  // -1: none
};

// Larger logit first, then the lower number. A NaN was made -inf before.
__device__ __forceinline__ bool moe_before(const MoECandidate& a, const MoECandidate& b) {
    if (a.expert < 0 || b.expert < 0) return b.expert < 0 && a.expert >= 0;
    return a.logit > b.logit || (a.logit == b.logit && a.expert < b.expert);
}

// The best of the experts that are not taken; the same in all lanes.
__device__ __forceinline__ MoECandidate moe_best(const float (&logits)[kMoELogitsEach], unsigned taken, int experts) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    MoECandidate best = {0.0F, -1};
#pragma unroll
    for (int i = 0; i < kMoELogitsEach; ++i) {
        const bool free = lane + i * kWarp < experts && (taken >> i & 1U) == 0;
        const float logit = logits[i] == logits[i] ? logits[i] : minus_infinity();
        const MoECandidate candidate = {logit, free ? lane + i * kWarp : -1};
        if (moe_before(candidate, best)) best = candidate;
    }
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) {
        const MoECandidate other = {__shfl_xor_sync(kFullMask, best.logit, apart),
                                    __shfl_xor_sync(kFullMask, best.expert, apart)};
        if (moe_before(other, best)) best = other;
    }
    return best;
}

// One warp routes one token: p_e = exp(l_e - max) / sum, the top_k largest logits, weights p (divided by their sum).
// A NaN among the logits makes all weights of the token NaN; the experts are still valid numbers.
__device__ inline void moe_route_token(const MoEExpertsParams& p, int token) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float* row = p.logits + static_cast<int64_t>(token) * p.experts;
    float logits[kMoELogitsEach];
    float largest = minus_infinity();
#pragma unroll
    for (int i = 0; i < kMoELogitsEach; ++i) {
        logits[i] = lane + i * kWarp < p.experts ? __ldg(row + lane + i * kWarp) : minus_infinity();
        largest = fmaxf(largest, logits[i]);
    }
    largest = warp_max(largest);
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kMoELogitsEach; ++i)
        if (lane + i * kWarp < p.experts) sum += expf(logits[i] - largest);
    sum = warp_sum(sum);

    unsigned taken = 0;
    float mine = 0.0F, total = 0.0F;  // lane r keeps what belongs to rank r
    int chosen = 0;
    // once a rank: the best that is left, found by all lanes together, is taken off by the lane that holds it
    for (int rank = 0; rank < p.top_k; ++rank) {
        const MoECandidate best = moe_best(logits, taken, p.experts);
        if (best.expert % kWarp == lane) taken |= 1U << best.expert / kWarp;
        const float probability = expf(best.logit - largest) / sum;
        total += probability;
        if (lane == rank) {
            mine = probability;
            chosen = best.expert;
        }
    }
    if (lane < p.top_k) {
        const int64_t slot = static_cast<int64_t>(token) * p.top_k + lane;
        p.chosen[slot] = chosen;
        p.weights[slot] = p.normalize != 0 ? mine / total : mine;
    }
}

// A warp per token.
__device__ inline void moe_route(const MoEExpertsParams& p) {
    const int token = static_cast<int>(blockIdx.x) * kMoEWarps + static_cast<int>(threadIdx.x) / kWarp;
    if (token < p.tokens) moe_route_token(p, token);
}

// Sum of the values of all threads before this one; `total` is that of all. scratch holds kMoEWarps integers.
__device__ inline int moe_scan(int value, int* scratch, int& total) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    int inclusive = value;
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
        const int other = __shfl_sync(kFullMask, inclusive, max(lane - apart, 0));
        if (lane >= apart) inclusive += other;
    }
    if (lane == kWarp - 1) scratch[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int i = 0; i < kMoEWarps; ++i) {
        if (i < warp) before += scratch[i];
        total += scratch[i];
    }
    __syncthreads();  // scratch is free again
    return before + inclusive - value;
}

// Thread e cuts the slots [first, first + count) of expert e into tiles of tile_slots.
__device__ inline void moe_write_tiles(const MoEExpertsParams& p, int first, int count, int* scratch) {
    int total = 0;
    const int place = moe_scan((count + p.tile_slots - 1) / p.tile_slots, scratch, total);
    for (int i = 0; i * p.tile_slots < count; ++i)
        p.tiles[place + i] = {static_cast<int>(threadIdx.x), first + i * p.tile_slots,
                              min(p.tile_slots, count - i * p.tile_slots), 0};
    if (threadIdx.x == 0) *p.tile_count = total;
}

// Few tokens: one block routes, sorts and writes the tiles. Thread e looks at all slots for those of expert e.
__device__ inline void moe_plan(const MoEExpertsParams& p) {
    STATIC_SHARED(int, scratch, kMoEWarps);
    STATIC_SHARED(int, chosen, kMoEPlannedTokens* kMoEMaxTopK);
    for (int token = static_cast<int>(threadIdx.x) / kWarp; token < p.tokens; token += kMoEWarps)
        moe_route_token(p, token);
    __syncthreads();  // what the block wrote to global memory is visible to the block
    const int slots = p.tokens * p.top_k, expert = static_cast<int>(threadIdx.x);
    for (int slot = expert; slot < slots; slot += kMoEThreads) chosen[slot] = p.chosen[slot];
    __syncthreads();
    int count = 0, total = 0;
    for (int slot = 0; slot < slots; ++slot) count += chosen[slot] == expert ? 1 : 0;
    const int first = moe_scan(count, scratch, total);
    int place = first;
    for (int slot = 0; slot < slots; ++slot)
        if (chosen[slot] == expert) p.order[place++] = slot;
    moe_write_tiles(p, first, count, scratch);
}

// Many tokens: block e finds the slots of expert e. It counts those of lower experts (its first place) and its own,
// then goes over all slots again, 256 at a time, and places its own in ascending order.
__device__ inline void moe_group(const MoEExpertsParams& p) {
    STATIC_SHARED(int, scratch, kMoEWarps);
    const int slots = p.tokens * p.top_k, expert = static_cast<int>(blockIdx.x);
    int lower = 0, own = 0;
    for (int slot = static_cast<int>(threadIdx.x); slot < slots; slot += kMoEThreads) {
        const int chosen = __ldg(p.chosen + slot);
        lower += chosen < expert ? 1 : 0;
        own += chosen == expert ? 1 : 0;
    }
    int place = block_sum<kMoEThreads>(lower, scratch);
    own = block_sum<kMoEThreads>(own, scratch);
    if (threadIdx.x == 0) {
        p.firsts[expert] = place;
        p.counts[expert] = own;
    }
    if (own == 0) return;  // the whole block
    for (int start = 0; start < slots; start += kMoEThreads) {
        const int slot = start + static_cast<int>(threadIdx.x);
        const int match = slot < slots && __ldg(p.chosen + slot) == expert ? 1 : 0;
        int found = 0;
        const int before = moe_scan(match, scratch, found);
        if (match != 0) p.order[place + before] = slot;
        place += found;
    }
}

// After moe_group: one block, thread e for expert e.
__device__ inline void moe_tiles(const MoEExpertsParams& p) {
    STATIC_SHARED(int, scratch, kMoEWarps);
    const int expert = static_cast<int>(threadIdx.x);
    const bool exists = expert < p.experts;
    moe_write_tiles(p, exists ? p.firsts[expert] : 0, exists ? p.counts[expert] : 0, scratch);
}

// y = sum of the results of a token's experts, in the order of their rank: that, not the order of experts or tiles, is
// what fixes the rounding. A thread makes four numbers of a row; neighbours read neighbouring 16 bytes of each rank.
__device__ inline void moe_combine(const MoEExpertsParams& p) {
    const int columns = p.down.outputs / 4;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= static_cast<int64_t>(p.tokens) * columns) return;
    const int64_t token = index / columns, column = index % columns;
    float4 sum = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    for (int rank = 0; rank < p.top_k; ++rank) {
        const int64_t slot = token * p.top_k + rank;
        const float weight = __ldg(p.weights + slot);
        const uint4 bits = load16(p.results + (slot * columns + column) * 4);
        sum.x += weight * __uint_as_float(bits.x);
        sum.y += weight * __uint_as_float(bits.y);
        sum.z += weight * __uint_as_float(bits.z);
        sum.w += weight * __uint_as_float(bits.w);
    }
    reinterpret_cast<float4*>(p.y)[index] = sum;
}

}  // namespace deepstitch
