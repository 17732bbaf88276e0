// What a kernel may use, under NVRTC, nvcc and (through host_shim.h) g++. No other header is included by kernels.
//
// A kernel takes one argument, a struct by value, called p:
//
//     DEEPSTITCH_KERNEL(scale_rows, ScaleRowsParams, 256, 2) { scale<4>(p); }
//
// fp16 is storage only: raw bits in uint16_t. Compile without fast-math: division and square root are IEEE.
#pragma once

#include "types.h"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

#define DEEPSTITCH_KERNEL(name, Params, max_threads, min_blocks) \
    extern "C" __global__ void __launch_bounds__(max_threads, min_blocks) name(const Params p)

// `name` is a `type*` to the dynamic shared memory of the launch, aligned to 16 bytes.
#define DYNAMIC_SHARED(type, name)                                        \
    extern __shared__ __align__(16) unsigned char deepstitch_shared_bytes[]; \
    type* const name = reinterpret_cast<type*>(deepstitch_shared_bytes)

// `name` is a `type[count]` aligned to 16 bytes.
#define STATIC_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace deepstitch {

// 16 bytes of global memory that no thread of this kernel writes. 128-bit load through the read-only cache.
__device__ __forceinline__ uint4 load16(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

__device__ __forceinline__ float half_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Nearest integer, half to even.
__device__ __forceinline__ int round_even(float value) { return __float2int_rn(value); }

}  // namespace deepstitch

#else
#include "host_shim.h"
#endif

namespace deepstitch {

constexpr unsigned kFullMask = 0xffffffffU;
constexpr int kWarp = 32;

// The lower half first.
__device__ __forceinline__ float2 half2_to_float2(uint32_t bits) {
    return make_float2(half_to_float(static_cast<uint16_t>(bits & 0xffffU)),
                       half_to_float(static_cast<uint16_t>(bits >> 16)));
}

// Butterflies: every lane gets the same bits.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const T other = __shfl_xor_sync(kFullMask, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

// Over the `threads` threads of a one-dimensional block; all of them call it and get the same bits. `scratch` is
// shared memory for threads / 32 values and is free again when the function returns.
template <int threads, class T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
    static_assert(threads % kWarp == 0, "whole warps");
    value = warp_sum(value);
    if (threads == kWarp) return value;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    T total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < threads / kWarp; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

template <int threads, class T>
__device__ __forceinline__ T block_max(T value, T* scratch) {
    static_assert(threads % kWarp == 0, "whole warps");
    value = warp_max(value);
    if (threads == kWarp) return value;
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    T largest = scratch[0];
#pragma unroll
    for (int warp = 1; warp < threads / kWarp; ++warp) largest = scratch[warp] > largest ? scratch[warp] : largest;
    __syncthreads();
    return largest;
}

}  // namespace deepstitch
