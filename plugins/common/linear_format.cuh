// The four weight formats on the device: how 16 bytes of weights become units, and how a unit meets activations.
#pragma once

#include "kernel.cuh"
#include "linear.h"

namespace deepstitch {

template <LinearFormat format>
struct Linear {
    static constexpr bool kInteger = linear_is_integer(format);
    static constexpr int kLoadElements = linear_load_elements(format);
    static constexpr int kLoadUnits = linear_load_units(format);
    static constexpr int kUnitElements = linear_unit_elements(format);
};

__device__ __forceinline__ uint4 zero_unit() {
    return make_uint4(0U, 0U, 0U, 0U);
}

__device__ __forceinline__ float4 as_floats(uint4 unit) {
    return make_float4(__uint_as_float(unit.x), __uint_as_float(unit.y), __uint_as_float(unit.z),
                       __uint_as_float(unit.w));
}

// One load of weights as units of what the arithmetic takes. int4: bytes 0 ... 15, evens then odds; the 8 that is too
// much in each is in LinearMeta::offset. float16: floats.
template <LinearFormat format>
__device__ __forceinline__ void expand_load(uint4 load, uint4 (&units)[Linear<format>::kLoadUnits]) {
    if constexpr (format == LinearFormat::kInt4) {
        constexpr unsigned low = 0x0f0f0f0fU;
        units[0] = make_uint4(load.x & low, load.y & low, load.z & low, load.w & low);
        units[1] = make_uint4((load.x >> 4) & low, (load.y >> 4) & low, (load.z >> 4) & low, (load.w >> 4) & low);
    } else if constexpr (format == LinearFormat::kFloat16) {
        const float2 a = half2_to_float2(load.x), b = half2_to_float2(load.y);
        const float2 c = half2_to_float2(load.z), d = half2_to_float2(load.w);
        units[0] = make_uint4(__float_as_uint(a.x), __float_as_uint(a.y), __float_as_uint(b.x), __float_as_uint(b.y));
        units[1] = make_uint4(__float_as_uint(c.x), __float_as_uint(c.y), __float_as_uint(d.x), __float_as_uint(d.y));
    } else {
        units[0] = load;
    }
}

// 16 products of bytes: four dp4a.
__device__ __forceinline__ int dot_unit(uint4 weights, uint4 activations, int sum) {
    sum = __dp4a(static_cast<int>(weights.x), static_cast<int>(activations.x), sum);
    sum = __dp4a(static_cast<int>(weights.y), static_cast<int>(activations.y), sum);
    sum = __dp4a(static_cast<int>(weights.z), static_cast<int>(activations.z), sum);
    return __dp4a(static_cast<int>(weights.w), static_cast<int>(activations.w), sum);
}

// 4 products of floats.
__device__ __forceinline__ float dot_unit(uint4 weights, uint4 activations, float sum) {
    const float4 w = as_floats(weights), a = as_floats(activations);
    sum += w.x * a.x;
    sum += w.y * a.y;
    sum += w.z * a.z;
    return sum + w.w * a.w;
}

// Integer sums are converted by addition: the conversion instruction runs at a quarter of the rate on sm_61. The bits
// of 1.5 * 2^23 + n are those of 1.5 * 2^23 plus n, for |n| < 2^22; a block gives at most 128 * 128 * 127 < 2^21. So
// sums start at kSumZero, and sum_to_float takes it off again, exactly.
constexpr int kSumZero = 0x4b400000;

__device__ __forceinline__ float sum_to_float(int sum) {
    return __int_as_float(sum) - 12582912.0F;
}

// Scales are one a block along a row; the block is 32 << shift.
__device__ __forceinline__ int block_shift(int block_size) {
    return block_size == 128 ? 2 : block_size == 64 ? 1 : 0;
}

// A scale in two steps, because the second waits for memory: the bits when the weights are asked for, the value when
// they are used.
__device__ __forceinline__ uint32_t load_scale_bits(const void* scales, bool half_scales, int index) {
    return half_scales ? static_cast<uint32_t>(__ldg(static_cast<const uint16_t*>(scales) + index))
                       : __ldg(static_cast<const uint32_t*>(scales) + index);
}

__device__ __forceinline__ float scale_value(uint32_t bits, bool half_scales) {
    return half_scales ? half_to_float(static_cast<uint16_t>(bits)) : __uint_as_float(bits);
}

// Expert `index` of a stack of matrices.
template <LinearFormat format>
__device__ __forceinline__ LinearMatrix matrix_of_stack(LinearMatrix stack, int index) {
    constexpr int64_t group_bytes = linear_bytes(format, kLinearGroup);
    const int64_t elements = static_cast<int64_t>(stack.outputs) * stack.inputs * index;
    stack.data = static_cast<const unsigned char*>(stack.data) + elements / kLinearGroup * group_bytes;
    if constexpr (Linear<format>::kInteger) {
        const int64_t bytes = elements / stack.block_size * (stack.half_scales != 0 ? 2 : 4);
        stack.scales = static_cast<const unsigned char*>(stack.scales) + bytes;
    }
    return stack;
}

}  // namespace deepstitch
