// kv_cache_append: present[b, h, past_lengths[b] + s] = key[b, s, h], for s < query_lengths[b]; keys and values alike.
//
// append: a warp takes one row, one head of one token, four numbers to a lane: 512 contiguous bytes read, and one
// contiguous row of the cache written. Lengths are the same for a warp, so no branch diverges. A row that does not lie
// in the cache is not written, whatever the lengths are.
// copy: what is not written in place starts as a copy of the old cache. It runs before append, in the same stream.
#pragma once

#include "../common/kernel.cuh"
#include "../common/linear_quantize.cuh"
#include "../common/values.cuh"
#include "params.h"

namespace deepstitch {
namespace kv_cache {

__device__ __forceinline__ void store(float* to, const float (&values)[4]) { store_values(to, values); }
__device__ __forceinline__ void store(float* to, const float (&values)[1]) { *to = values[0]; }
__device__ __forceinline__ void store(uint16_t* to, const float (&values)[1]) { *to = float_to_half(values[0]); }
__device__ __forceinline__ void store(uint16_t* to, const float (&values)[4]) {
    const auto half = [](float value) { return static_cast<uint32_t>(float_to_half(value)); };
    *reinterpret_cast<uint2*>(to) =
        make_uint2(half(values[0]) | half(values[1]) << 16, half(values[2]) | half(values[3]) << 16);
}
__device__ __forceinline__ void store(int8_t* to, const float (&values)[1], float scale) {
    *to = static_cast<int8_t>(quantize_one(values[0], scale));
}
__device__ __forceinline__ void store(int8_t* to, const float (&values)[4], float scale) {
    *reinterpret_cast<uint32_t*>(to) =
        pack_bytes(quantize_one(values[0], scale), quantize_one(values[1], scale), quantize_one(values[2], scale),
                   quantize_one(values[3], scale));
}

// Of a row of keys: s = max|x| / 127. Magnitudes compare like their bits, and so a NaN is the largest.
template <int width>
__device__ __forceinline__ float scale_of(const float* from, int lane, int head_dim) {
    int largest = 0;
#pragma unroll 1  // rows are rarely longer than one step of a warp
    for (int d = lane * width; d < head_dim; d += kWarp * width) {
        float values[width];
        load_values(from + d, values);
#pragma unroll
        for (int i = 0; i < width; ++i) largest = max(largest, __float_as_int(values[i]) & 0x7fffffff);
    }
    return __int_as_float(warp_max(largest)) / 127.0F;
}

template <class Stored, int width>
__device__ __forceinline__ void write_row(const float* from, Stored* to, int lane, int head_dim) {
#pragma unroll 1
    for (int d = lane * width; d < head_dim; d += kWarp * width) {
        float values[width];
        load_values(from + d, values);
        store(to + d, values);
    }
}

template <int width>
__device__ __forceinline__ void write_quantized(const float* from, int8_t* to, float* scale_to, int lane,
                                                int head_dim) {
    const float scale = scale_of<width>(from, lane, head_dim);
    if (lane == 0) *scale_to = scale;
#pragma unroll 1
    for (int d = lane * width; d < head_dim; d += kWarp * width) {
        float values[width];
        load_values(from + d, values);
        store(to + d, values, scale);
    }
}

template <class Stored, int width>
__device__ __forceinline__ void append(const KVCacheAppendParams& p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = static_cast<int>(blockIdx.x * (kAppendThreads / kWarp) + threadIdx.x / kWarp);
    if (row >= p.rows) return;
    const int head = row % p.kv_heads, token = row / p.kv_heads % p.tokens, batch = row / p.kv_heads / p.tokens;
    const int64_t slot = static_cast<int64_t>(p.past_lengths[batch]) + token;
    if (token >= p.query_lengths[batch] || slot < 0 || slot >= p.capacity) return;

    const bool keys = blockIdx.y == 0;
    const float* const from = (keys ? p.key : p.value) + static_cast<int64_t>(row) * p.head_dim;
    const int64_t place = (static_cast<int64_t>(batch) * p.kv_heads + head) * p.capacity + slot;
    Stored* const to = static_cast<Stored*>(keys ? p.present_key : p.present_value) + place * p.head_dim;
    if constexpr (sizeof(Stored) == 1) {
        write_quantized<width>(from, to, (keys ? p.key_scales : p.value_scales) + place, lane, p.head_dim);
    } else {
        write_row<Stored, width>(from, to, lane, p.head_dim);
    }
}

__device__ __forceinline__ void copy(const KVCacheCopyParams& p) {
    const bool keys = blockIdx.y == 0;
    const uint8_t* const from = static_cast<const uint8_t*>(keys ? p.past_key : p.past_value);
    uint8_t* const to = static_cast<uint8_t*>(keys ? p.present_key : p.present_value);
    if (from == to) return;
    const int64_t words = p.bytes / 16;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * (kCopyThreads * kCopyLoads) + threadIdx.x;
    uint4 loaded[kCopyLoads];
#pragma unroll
    for (int i = 0; i < kCopyLoads; ++i) {
        const int64_t word = first + i * kCopyThreads;
        if (word < words) loaded[i] = load16(from + 16 * word);
    }
#pragma unroll
    for (int i = 0; i < kCopyLoads; ++i) {
        const int64_t word = first + i * kCopyThreads;
        if (word < words) *reinterpret_cast<uint4*>(to + 16 * word) = loaded[i];
    }
    const int64_t rest = 16 * words + first;  // fewer than 16 bytes, by the first threads
    if (rest < p.bytes && first < 16) to[rest] = from[rest];
}

}  // namespace kv_cache
}  // namespace deepstitch

// kv_cache_append_<stored>: 16 bytes per load; _scalar where a row is not a whole number of them.
#define KV_CACHE_APPEND_KERNEL(name, Stored, width)                                          \
    DEEPSTITCH_KERNEL(name, deepstitch::KVCacheAppendParams, deepstitch::kAppendThreads, 16) { \
        deepstitch::kv_cache::append<Stored, width>(p);                                       \
    }

KV_CACHE_APPEND_KERNEL(kv_cache_append_float32, float, 4)
KV_CACHE_APPEND_KERNEL(kv_cache_append_float16, uint16_t, 4)
KV_CACHE_APPEND_KERNEL(kv_cache_append_int8, int8_t, 4)
KV_CACHE_APPEND_KERNEL(kv_cache_append_float32_scalar, float, 1)
KV_CACHE_APPEND_KERNEL(kv_cache_append_float16_scalar, uint16_t, 1)
KV_CACHE_APPEND_KERNEL(kv_cache_append_int8_scalar, int8_t, 1)

#undef KV_CACHE_APPEND_KERNEL

DEEPSTITCH_KERNEL(kv_cache_append_copy, deepstitch::KVCacheCopyParams, deepstitch::kCopyThreads, 8) {
    deepstitch::kv_cache::copy(p);
}
