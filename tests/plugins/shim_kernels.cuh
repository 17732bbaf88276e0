// Kernels that show what the host shim does, and kernels with a mistake that it has to find.
#pragma once

#include "kernel.cuh"

struct ShimParams {
    const float* x;
    const int32_t* i;
    float* y;
    int32_t* o;
    int32_t n;
};

__device__ inline int flat_thread() {
    return static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
}

__device__ inline int flat_block() {
    return static_cast<int>(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
}

// o[block][thread]: the place in the grid, as one number
DEEPSTITCH_KERNEL(shim_indices, ShimParams, 1024, 1) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    p.o[flat_block() * threads + flat_thread()] = flat_block() * 10000 + flat_thread();
}

// o[operation][thread], with p.n the argument of the shuffle
DEEPSTITCH_KERNEL(shim_warp, ShimParams, 1024, 1) {
    const int t = flat_thread(), threads = static_cast<int>(blockDim.x);
    const int value = p.i[t];
    int* o = p.o + t;
    o[0 * threads] = __shfl_xor_sync(0xffffffffU, value, p.n);
    o[1 * threads] = __shfl_sync(0xffffffffU, value, p.n);
    o[2 * threads] = __shfl_up_sync(0xffffffffU, value, static_cast<unsigned>(p.n));
    o[3 * threads] = __shfl_down_sync(0xffffffffU, value, static_cast<unsigned>(p.n));
    o[4 * threads] = static_cast<int>(__ballot_sync(0xffffffffU, value & 1));
    o[5 * threads] = __any_sync(0xffffffffU, value > 100);
    o[6 * threads] = __all_sync(0xffffffffU, value > 100);
    o[7 * threads] = deepstitch::warp_sum(value);
    o[8 * threads] = deepstitch::warp_max(value);
    p.y[t] = deepstitch::warp_sum(p.x[t]);
}

// A partial last warp may vote, and shuffle among the lanes it has.
DEEPSTITCH_KERNEL(shim_partial_warp, ShimParams, 1024, 1) {
    const int t = flat_thread();
    p.o[t] = static_cast<int>(__ballot_sync(0xffffffffU, 1));
    p.y[t] = __shfl_sync(0xffffffffU, p.x[t], 3);
}

DEEPSTITCH_KERNEL(shim_missing_lane, ShimParams, 1024, 1) {
    p.y[flat_thread()] = __shfl_xor_sync(0xffffffffU, p.x[flat_thread()], 31);
}

DEEPSTITCH_KERNEL(shim_block, ShimParams, 256, 1) {
    STATIC_SHARED(float, scratch, 8);
    const int t = flat_thread();
    p.y[t] = deepstitch::block_sum<256>(p.x[t], scratch);
    p.y[256 + t] = deepstitch::block_max<256>(p.x[t], scratch);
}

// Rotates the block's row n times through shared memory, a barrier before and behind each.
DEEPSTITCH_KERNEL(shim_rotate, ShimParams, 256, 1) {
    DYNAMIC_SHARED(float, row);
    const int t = flat_thread(), threads = static_cast<int>(blockDim.x);
    float value = p.x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int turn = 0; turn < p.n; ++turn) {
        row[t] = value;
        __syncthreads();
        value = row[(t + 1) % threads];
        __syncthreads();
    }
    p.y[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

// y[block]: what lay in shared memory when the block started; then it writes there
DEEPSTITCH_KERNEL(shim_uninitialised, ShimParams, 32, 1) {
    STATIC_SHARED(float, fixed, 32);
    DYNAMIC_SHARED(float, dynamic);
    p.y[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
    p.y[blockIdx.x * 64 + 32 + threadIdx.x] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = 1.0F;
    dynamic[threadIdx.x] = 1.0F;
}

DEEPSTITCH_KERNEL(shim_divergent_barrier, ShimParams, 1024, 1) {
    if (flat_thread() < p.n) __syncthreads();
}

DEEPSTITCH_KERNEL(shim_early_return, ShimParams, 1024, 1) {
    if (flat_thread() >= p.n) return;
    __syncthreads();
}

DEEPSTITCH_KERNEL(shim_divergent_shuffle, ShimParams, 1024, 1) {
    if (flat_thread() < p.n) p.y[flat_thread()] = deepstitch::warp_sum(p.x[flat_thread()]);
}

DEEPSTITCH_KERNEL(shim_shuffle_and_barrier, ShimParams, 1024, 1) {
    if (flat_thread() % 2 == p.n) {
        __syncthreads();
    } else {
        __syncwarp();
    }
}

DEEPSTITCH_KERNEL(shim_two_operations, ShimParams, 1024, 1) {
    if (flat_thread() % 2 == 0) {
        __syncwarp();
    } else {
        (void)__ballot_sync(0xffffffffU, 1);
    }
}

DEEPSTITCH_KERNEL(shim_partial_mask, ShimParams, 1024, 1) { __syncwarp(0xffffU); }

// The block that comes last wins.
DEEPSTITCH_KERNEL(shim_race_between_blocks, ShimParams, 32, 1) {
    if (threadIdx.x == 0) p.o[0] = p.o[0] * 3 + static_cast<int>(blockIdx.x);
}

// No barrier between writing and reading.
DEEPSTITCH_KERNEL(shim_race_in_a_block, ShimParams, 256, 1) {
    STATIC_SHARED(float, row, 256);
    row[threadIdx.x] = p.x[threadIdx.x];
    p.y[threadIdx.x] = row[(threadIdx.x + 64) % 256];
}

DEEPSTITCH_KERNEL(shim_static_overflow, ShimParams, 32, 1) {
    STATIC_SHARED(float, row, 32);
    row[static_cast<int>(threadIdx.x) + p.n] = 1.0F;
    __syncthreads();
    p.y[threadIdx.x] = row[threadIdx.x];
}

DEEPSTITCH_KERNEL(shim_dynamic_overflow, ShimParams, 32, 1) {
    DYNAMIC_SHARED(float, row);
    row[static_cast<int>(threadIdx.x) + p.n] = 1.0F;
    __syncthreads();
    p.y[threadIdx.x] = row[threadIdx.x];
}

DEEPSTITCH_KERNEL(shim_global_overflow, ShimParams, 32, 1) { p.y[static_cast<int>(threadIdx.x) + p.n] = 1.0F; }

DEEPSTITCH_KERNEL(shim_integer_overflow, ShimParams, 32, 1) { p.o[0] = p.i[0] + p.n; }

DEEPSTITCH_KERNEL(shim_much_shared, ShimParams, 32, 1) {
    STATIC_SHARED(float, row, 8192);
    DYNAMIC_SHARED(float, more);
    row[threadIdx.x] = more[0] = 0.0F;
}

DEEPSTITCH_KERNEL(shim_misaligned, ShimParams, 32, 1) {
    p.o[threadIdx.x] = static_cast<int>(deepstitch::load16(p.i + p.n).x);
}

// o[0 .. n): dp4a of pairs; o[n .. 2n): byte_perm; o[2n .. 3n): round_even of x
DEEPSTITCH_KERNEL(shim_integers, ShimParams, 256, 1) {
    for (int k = flat_thread(); k < p.n; k += 256) {
        const int a = p.i[2 * k], b = p.i[2 * k + 1];
        p.o[k] = __dp4a(a, b, 7);
        p.o[p.n + k] = static_cast<int>(__byte_perm(static_cast<unsigned>(a), static_cast<unsigned>(b), 0x7263U));
        p.o[2 * p.n + k] = deepstitch::round_even(p.x[k]);
    }
}

// y[k]: the half with bits k; o[k]: bits of the half nearest to x[k]
DEEPSTITCH_KERNEL(shim_halves, ShimParams, 256, 1) {
    for (int k = flat_thread(); k < p.n; k += 256) {
        p.y[k] = deepstitch::half_to_float(static_cast<uint16_t>(k));
        p.o[k] = deepstitch::float_to_half(p.x[k]);
    }
}
