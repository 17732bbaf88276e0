// Neighbouring elements of a row as floats, whatever they are stored as: float, or uint16_t for fp16.
//
// `width` is 1, or a multiple of 4 (float) or 8 (fp16) at an address that is a multiple of 16 bytes. Wide loads go
// through the read-only cache: what is loaded must not be written by the same kernel.
#pragma once

#include "kernel.cuh"

namespace deepstitch {

template <int width>
__device__ __forceinline__ void load_values(const float* from, float (&values)[width]) {
    if constexpr (width == 1) {
        values[0] = from[0];
    } else {
#pragma unroll
        for (int i = 0; i < width; i += 4) {
            const uint4 bits = load16(from + i);
            values[i] = __uint_as_float(bits.x);
            values[i + 1] = __uint_as_float(bits.y);
            values[i + 2] = __uint_as_float(bits.z);
            values[i + 3] = __uint_as_float(bits.w);
        }
    }
}

template <int width>
__device__ __forceinline__ void load_values(const uint16_t* from, float (&values)[width]) {
    if constexpr (width == 1) {
        values[0] = half_to_float(from[0]);
    } else {
#pragma unroll
        for (int i = 0; i < width; i += 8) {
            const uint4 bits = load16(from + i);
            const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const float2 both = half2_to_float2(pairs[pair]);
                values[i + 2 * pair] = both.x;
                values[i + 2 * pair + 1] = both.y;
            }
        }
    }
}

template <int width>
__device__ __forceinline__ void store_values(float* to, const float (&values)[width]) {
    if constexpr (width == 1) {
        to[0] = values[0];
    } else {
#pragma unroll
        for (int i = 0; i < width; i += 4) {
            *reinterpret_cast<float4*>(to + i) =
                make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
        }
    }
}

template <int width>
__device__ __forceinline__ void store_values(uint16_t* to, const float (&values)[width]) {
    if constexpr (width == 1) {
        to[0] = float_to_half(values[0]);
    } else {
#pragma unroll
        for (int i = 0; i < width; i += 8) {
            uint32_t pairs[4];
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                pairs[pair] = static_cast<uint32_t>(float_to_half(values[i + 2 * pair])) |
                              static_cast<uint32_t>(float_to_half(values[i + 2 * pair + 1])) << 16;
            }
            *reinterpret_cast<uint4*>(to + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

// What is left of a value after it was stored.
__device__ __forceinline__ float as_stored(float value, const float*) { return value; }
__device__ __forceinline__ float as_stored(float value, const uint16_t*) {
    return half_to_float(float_to_half(value));
}

}  // namespace deepstitch
