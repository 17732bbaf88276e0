// Many tokens against a stored matrix: tiles through shared memory, bound by arithmetic.
//
// A block of 128 threads makes a tile of 8 * kTokens tokens by 64 outputs; a thread has kTokens x 4 of it:
//
//     tokens  ty + 8 i  (i < kTokens)     ty = thread / 16
//     outputs tx + 16 j (j < 4)           tx = thread % 16
//
// K goes by in STAGES of four units a row (64 int8 or 16 float numbers). Shared memory holds two stages, units as
// [unit][row]: the 16 threads of a row of the tile read neighbouring units (no bank conflicts), threads with the same
// ty the same one (broadcast). Planes are two units longer than the tile, so that storing meets different banks as
// well. While a stage is multiplied, the next is on its way from global memory into registers; one barrier a stage.
//
// Integer formats: sums of a block of weights are integers, started at kSumZero + offset of the token; then
// acc += sum * (w_scale * s). With blocks of 64 or 128 that happens once a stage, with blocks of 32 twice.
// int4 weights are widened to bytes once, when they are stored to shared memory.
#pragma once

#include "linear_format.cuh"

namespace deepstitch {

constexpr int kGemmColumns = 16;                        // threads along outputs
constexpr int kGemmRows = kGemmThreads / kGemmColumns;  // threads along tokens
constexpr int kGemmOutputsEach = kGemmOutputs / kGemmColumns;
constexpr int kGemmGroups = 2;  // of 32 in a stage of an integer format

template <int kTokens>
struct GemmTile {
    static constexpr int kRows = kTokens * kGemmRows;  // tokens
    static constexpr int kPad = 2;
    struct Stage {
        uint4 x[kGemmUnits][kRows + kPad];
        uint4 w[kGemmUnits][kGemmOutputs + kPad];
        LinearMeta meta[kGemmGroups][kRows];
        float scales[kGemmGroups][kGemmOutputs];
    };
};

// Activations [rows, units] with meta [rows, groups] for integer formats.
struct GemmActivations {
    const void* units;
    const LinearMeta* meta;
};

// What one thread carries from global to shared memory. The places never change, only the stage does.
template <LinearFormat format, int kTokens>
struct GemmCarrier {
    using Tile = GemmTile<kTokens>;
    static constexpr int kParts = Linear<format>::kLoadUnits;
    static constexpr int kStageLoads = kGemmUnits / kParts;  // of one row of W
    static constexpr int kXEach = Tile::kRows * kGemmUnits / kGemmThreads;
    static constexpr int kWEach = kGemmOutputs * kStageLoads / kGemmThreads;

    // Places in units of 16 bytes: 32 bits are enough for 64 GB (the host refuses more) and cost half the registers.
    const uint4* x_units;
    const uint4* w_loads;
    const LinearMeta* meta_row;
    const unsigned char* scale_row;
    uint32_t x_at[kXEach], w_at[kWEach];
    int units_left, loads_left, groups, shift;
    bool half_scales;
    uint4 x[kXEach], w[kWEach];
    LinearMeta meta;
    int second_offset;  // of the group after that, where both are summed as one
    uint32_t scale_bits;

    template <class XRow, class WRow>
    __device__ __forceinline__ GemmCarrier(const LinearMatrix& of, const GemmActivations& activations,
                                           const XRow& x_number, const WRow& w_number) {
        const int thread = static_cast<int>(threadIdx.x);
        const int row_units = of.inputs / Linear<format>::kUnitElements;
        const int row_loads = of.inputs / Linear<format>::kLoadElements;
        x_units = static_cast<const uint4*>(activations.units);
        w_loads = static_cast<const uint4*>(of.data);
        units_left = row_units - thread % kGemmUnits;
        loads_left = row_loads - thread % kStageLoads;
        groups = of.inputs / kLinearGroup;
        shift = block_shift(of.block_size);
        half_scales = of.half_scales != 0;
#pragma unroll
        for (int i = 0; i < kXEach; ++i)
            x_at[i] = static_cast<uint32_t>(x_number((thread + i * kGemmThreads) / kGemmUnits) * row_units +
                                            thread % kGemmUnits);
#pragma unroll
        for (int i = 0; i < kWEach; ++i)
            w_at[i] = static_cast<uint32_t>(w_number((thread + i * kGemmThreads) / kStageLoads) * row_loads +
                                            thread % kStageLoads);
        meta_row = activations.meta;
        scale_row = static_cast<const unsigned char*>(of.scales);
        if constexpr (Linear<format>::kInteger) {  // thread -> (row, group) of the stage
            meta_row += x_number(thread / kGemmGroups % Tile::kRows) * groups;
            scale_row += w_number(thread / kGemmGroups) * (groups >> shift) * (half_scales ? 2 : 4);
        }
    }

    __device__ __forceinline__ void fetch(int stage) {
        const bool x_exists = stage * kGemmUnits < units_left, w_exists = stage * kStageLoads < loads_left;
#pragma unroll
        for (int i = 0; i < kXEach; ++i) x[i] = x_exists ? load16(x_units + x_at[i] + stage * kGemmUnits) : zero_unit();
#pragma unroll
        for (int i = 0; i < kWEach; ++i)
            w[i] = w_exists ? load16(w_loads + w_at[i] + stage * kStageLoads) : zero_unit();
        if constexpr (Linear<format>::kInteger) {
            const int which = static_cast<int>(threadIdx.x) % kGemmGroups;
            fetch_scales(stage * kGemmGroups + which, which);
        }
    }

    // With larger blocks the stage is summed as one, by the first scale and the offsets of both groups. Nothing is done
    // with what is fetched before store(): that would wait for it.
    __device__ __forceinline__ void fetch_scales(int group, int which) {
        meta.scale = 0.0F;
        meta.offset = 0;
        second_offset = 0;
        scale_bits = 0;
        if (group >= groups) return;
        meta = meta_row[group];
        if (shift > 0 && which == 0) second_offset = meta_row[group + 1].offset;  // whole blocks: the group exists
        scale_bits = load_scale_bits(scale_row, half_scales, group >> shift);
    }

    __device__ __forceinline__ void store(typename Tile::Stage& stage) const {
        const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
        for (int i = 0; i < kXEach; ++i) stage.x[thread % kGemmUnits][(thread + i * kGemmThreads) / kGemmUnits] = x[i];
#pragma unroll
        for (int i = 0; i < kWEach; ++i) {
            uint4 units[kParts];
            expand_load<format>(w[i], units);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
                stage.w[thread % kStageLoads * kParts + part][(thread + i * kGemmThreads) / kStageLoads] = units[part];
        }
        if constexpr (Linear<format>::kInteger) {
            const int which = thread % kGemmGroups, row = thread / kGemmGroups;
            if (row < Tile::kRows) stage.meta[which][row] = {meta.scale, meta.offset + second_offset};
            stage.scales[which][row] = scale_value(scale_bits, half_scales);
        }
    }
};

// parts += units [first, first + count) of the stage
template <int kTokens, class Stage, class Sum>
__device__ __forceinline__ void gemm_units(const Stage& stage, int first, int count,
                                           Sum (&parts)[kTokens][kGemmOutputsEach]) {
    const int tx = static_cast<int>(threadIdx.x) % kGemmColumns, ty = static_cast<int>(threadIdx.x) / kGemmColumns;
#pragma unroll
    for (int unit = first; unit < first + count; ++unit) {
        uint4 w[kGemmOutputsEach];
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j) w[j] = stage.w[unit][tx + kGemmColumns * j];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
            const uint4 x = stage.x[unit][ty + kGemmRows * i];
#pragma unroll
            for (int j = 0; j < kGemmOutputsEach; ++j) parts[i][j] = dot_unit(w[j], x, parts[i][j]);
        }
    }
}

// One block of scales: units [first, first + count), scales of place `group` of the stage.
template <int kTokens, class Stage>
__device__ __forceinline__ void gemm_block(const Stage& stage, int first, int count, int group,
                                           float (&acc)[kTokens][kGemmOutputsEach]) {
    const int tx = static_cast<int>(threadIdx.x) % kGemmColumns, ty = static_cast<int>(threadIdx.x) / kGemmColumns;
    int parts[kTokens][kGemmOutputsEach];
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j)
            parts[i][j] = kSumZero + stage.meta[group][ty + kGemmRows * i].offset;
    gemm_units<kTokens>(stage, first, count, parts);
    float scales[kGemmOutputsEach];
#pragma unroll
    for (int j = 0; j < kGemmOutputsEach; ++j) scales[j] = stage.scales[group][tx + kGemmColumns * j];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
        const float step = stage.meta[group][ty + kGemmRows * i].scale;
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j) acc[i][j] += sum_to_float(parts[i][j]) * (scales[j] * step);
    }
}

// acc = the thread's part of the tile. x_number(i) and w_number(n) give, as int64_t, the row of the activations of
// token i and the row of W of output n of the tile; rows past the end must repeat a row that exists.
template <LinearFormat format, int kTokens, class XRow, class WRow>
__device__ __forceinline__ void linear_gemm(const LinearMatrix& matrix, const GemmActivations& activations,
                                            const XRow& x_number, const WRow& w_number,
                                            float (&acc)[kTokens][kGemmOutputsEach]) {
    using Stage = typename GemmTile<kTokens>::Stage;
    STATIC_SHARED(Stage, stages, 2);
    GemmCarrier<format, kTokens> carrier(matrix, activations, x_number, w_number);
    const int count =
        (matrix.inputs + kGemmUnits * Linear<format>::kUnitElements - 1) / (kGemmUnits * Linear<format>::kUnitElements);
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int j = 0; j < kGemmOutputsEach; ++j) acc[i][j] = 0.0F;

    carrier.fetch(0);
    carrier.store(stages[0]);
    __syncthreads();
    for (int index = 0; index < count; ++index) {
        const Stage& stage = stages[index % 2];
        if (index + 1 < count) carrier.fetch(index + 1);
        if constexpr (!Linear<format>::kInteger) {
            gemm_units<kTokens>(stage, 0, kGemmUnits, acc);
        } else if (carrier.shift > 0) {
            gemm_block<kTokens>(stage, 0, kGemmUnits, 0, acc);
        } else {
            gemm_block<kTokens>(stage, 0, kGemmUnits / 2, 0, acc);
            gemm_block<kTokens>(stage, kGemmUnits / 2, kGemmUnits / 2, 1, acc);
        }
        // the other stage was last read before the barrier of the turn before this one
        if (index + 1 < count) carrier.store(stages[(index + 1) % 2]);
        __syncthreads();
    }
}

}  // namespace deepstitch
