// Few tokens against a stored matrix, bound by the bandwidth of the weights: every weight is read once, for all tokens.
//
// Layout. A block of 256 threads is 32 TEAMS of 8 lanes; a team owns kRows rows of W. In one step its lanes take 8
// neighbouring 16-byte loads of a row, 128 bytes, and the four teams of a warp four such lines.
//
//     row n      |load 0|load 1| ... |load 7|load 8| ...         lane l of the team: loads l, l + 8, l + 16, ...
//
// In flight. A lane asks for kDepth loads of each of its rows at once, 32 or 64 bytes: with 512 to 1024 threads 24 to
// 64 KB a multiprocessor, several times what the latency of memory times its bandwidth comes to. The first loads are
// asked for before the activations are staged, so that staging hides behind them. Loads for two rounds at a time gain
// nothing: the compiler counts both with one of the six scoreboards, so the first would wait for the second as well.
//
// Shared memory holds the activations of all tokens as units [token][unit of the load][load] and LinearMeta
// [token][group]: neighbouring lanes read neighbouring 16 bytes (no bank conflicts), the four teams of a warp the same
// ones (broadcast). All extents are known to the compiler: addresses are constants. kGemvUnits units are a TILE: 2048
// int8 numbers for each of eight tokens, 16384 for one. Longer rows are staged tile by tile.
//
// Sums. Per load one integer dot product a token, times the two scales, added in fp32; the eight lanes of a team are
// then added by butterflies. The order never depends on the launch, so results are reproducible to the last bit.
#pragma once

#include "linear_quantize.cuh"

namespace deepstitch {

// Which rows of the activations a block works on: `count` from `first` on, of a list (divided by `divisor`) or of all.
struct TokenRows {
    const int32_t* list;  // null: row = first + token
    int32_t divisor;
    int32_t first;
    int32_t count;

    // Tokens past the last repeat it: nothing is read out of bounds, and their sums are not used.
    __device__ __forceinline__ int64_t row(int token) const {
        const int at = first + min(token, count - 1);
        return list == nullptr ? at : __ldg(list + at) / divisor;
    }
};

// Shared memory of a block: 20 KB for integer formats, 16 KB for floats, whatever the number of tokens.
template <LinearFormat format>
struct GemvShared {
    static constexpr int kGroups = Linear<format>::kInteger ? kGemvUnits * 16 / kLinearGroup : 1;
    uint4 units[kGemvUnits];
    LinearMeta meta[kGroups];
};

// The same, divided among tokens.
template <LinearFormat format, int kTokens>
struct GemvTile {
    static constexpr int kLoads = gemv_tile_loads(format, kTokens);  // of each token
    static constexpr int kUnits = kGemvUnits / kTokens;
    static constexpr int kGroups = GemvShared<format>::kGroups / kTokens;
    GemvShared<format>& shared;

    __device__ __forceinline__ uint4& unit(int token, int part, int load) const {
        return shared.units[token * kUnits + part * kLoads + load];
    }
    __device__ __forceinline__ LinearMeta& group(int token, int index) const {
        return shared.meta[token * kGroups + index];
    }
};

// Source of activations: units that are ready, [rows, units]: quantized ones with meta [rows, groups], or floats.
struct StageUnits {
    const void* units;
    const LinearMeta* meta;
    TokenRows tokens;
    int32_t columns;

    // Thread t takes units t, t + 256, ... of the tile, so that all threads work and all loads are under way together.
    template <LinearFormat format, int kTokens>
    __device__ __forceinline__ void stage(const GemvTile<format, kTokens>& tile, int first, int count) const {
        using Tile = GemvTile<format, kTokens>;
        constexpr int parts = Linear<format>::kLoadUnits;
        const int row_units = columns / Linear<format>::kUnitElements;
#pragma unroll 2
        for (int start = 0; start < kGemvUnits; start += kGemvThreads) {
            const int at = start + static_cast<int>(threadIdx.x), token = at / Tile::kUnits, i = at % Tile::kUnits;
            if (i >= count * parts) continue;
            const uint4* row = static_cast<const uint4*>(units) + tokens.row(token) * row_units;
            tile.unit(token, i % parts, i / parts) = load16(row + first * parts + i);
        }
        if constexpr (Linear<format>::kInteger) {
            const int first_group = first * Linear<format>::kLoadElements / kLinearGroup;
            const int groups = count * Linear<format>::kLoadElements / kLinearGroup;
#pragma unroll 1
            for (int start = 0; start < GemvShared<format>::kGroups; start += kGemvThreads) {
                const int at = start + static_cast<int>(threadIdx.x), token = at / Tile::kGroups,
                          i = at % Tile::kGroups;
                if (i >= groups) continue;
                tile.group(token, i) = meta[tokens.row(token) * (columns / kLinearGroup) + first_group + i];
            }
        }
    }
};

// Source of activations: floats that every block quantizes for itself. One launch less, worth it for one or two tokens.
struct StageFloats {
    const float* x;
    TokenRows tokens;
    int32_t columns;
    int32_t block_size;

    template <LinearFormat format, int kTokens>
    __device__ __forceinline__ void stage(const GemvTile<format, kTokens>& tile, int first, int count) const {
        const int begin = first * Linear<format>::kLoadElements;
        const int length = count * Linear<format>::kLoadElements;
        const int spans = (length + kSpan - 1) / kSpan;
        for (int token = 0; token < kTokens; ++token) {
            const float* row = x + tokens.row(token) * columns + begin;
            for (int span = static_cast<int>(threadIdx.x) / kWarp; span < spans; span += kGemvThreads / kWarp) {
                const QuantizedWord q = quantize_span<format>(load_span(row, span, length), block_size);
                const int group = span * (kSpan / kLinearGroup) + static_cast<int>(threadIdx.x) % kWarp / 8;
                if (group * kLinearGroup >= length) continue;
                // int4: a load is a group, its units the evens and the odds; int8: a load is a unit, a group two of
                // them
                uint4& unit = format == LinearFormat::kInt4 ? tile.unit(token, q.unit, group)
                                                            : tile.unit(token, 0, group * 2 + q.unit);
                reinterpret_cast<uint32_t*>(&unit)[q.place] = q.word;
                if (threadIdx.x % 8 == 0) tile.group(token, group) = q.meta;
            }
        }
    }
};

// The rows of W of one team.
template <LinearFormat format, int kRows>
struct GemvRows {
    const uint4* data[kRows];
    const unsigned char* scales[kRows];  // of the row
    int loads;                           // of a row
    int shift;                           // 32 << shift weights share a scale
    bool half_scales;

    __device__ __forceinline__ GemvRows(const LinearMatrix& of, const int (&rows)[kRows]) {
        loads = of.inputs / Linear<format>::kLoadElements;
        shift = block_shift(of.block_size);
        half_scales = of.half_scales != 0;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t first_scale = static_cast<int64_t>(rows[r]) * (of.inputs / kLinearGroup >> shift);
            data[r] = static_cast<const uint4*>(of.data) + static_cast<int64_t>(rows[r]) * loads;
            scales[r] = static_cast<const unsigned char*>(of.scales) + first_scale * (half_scales ? 2 : 4);
        }
    }
};

// One load of each row against the same place of every token.
template <LinearFormat format, int kTokens, int kRows>
__device__ __forceinline__ void gemv_step(const uint4 (&weights)[kRows], const uint32_t (&scale_bits)[kRows],
                                          bool half_scales, const GemvTile<format, kTokens>& tile, int load,
                                          float (&sums)[kRows][kTokens]) {
    constexpr int parts = Linear<format>::kLoadUnits;
    uint4 units[kRows][parts];
    float scales[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        expand_load<format>(weights[r], units[r]);
        scales[r] = Linear<format>::kInteger ? scale_value(scale_bits[r], half_scales) : 1.0F;
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
        uint4 x[parts];
#pragma unroll
        for (int part = 0; part < parts; ++part) x[part] = tile.unit(token, part, load);
        if constexpr (Linear<format>::kInteger) {
            const LinearMeta meta = tile.group(token, load * Linear<format>::kLoadElements / kLinearGroup);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                int sum = format == LinearFormat::kInt4 ? kSumZero + meta.offset : kSumZero;
#pragma unroll
                for (int part = 0; part < parts; ++part) sum = dot_unit(units[r][part], x[part], sum);
                sums[r][token] += sum_to_float(sum) * (scales[r] * meta.scale);
            }
        } else {
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int part = 0; part < parts; ++part)
                    sums[r][token] = dot_unit(units[r][part], x[part], sums[r][token]);
        }
    }
}

// What a lane has in flight: kDepth loads of each of its rows, and their scales. Past the end of a row it keeps what it
// had, and gemv_step is not called.
template <LinearFormat format, int kRows, int kDepth>
struct GemvRound {
    uint4 weights[kDepth][kRows];
    uint32_t scales[kDepth][kRows];  // bits

    __device__ __forceinline__ void fetch(const GemvRows<format, kRows>& rows, int first) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int load = first + d * kGemvLanes;
            if (load >= rows.loads) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) weights[d][r] = load16(rows.data[r] + load);
            if constexpr (Linear<format>::kInteger) {
                const int block = load * Linear<format>::kLoadElements / kLinearGroup >> rows.shift;
#pragma unroll
                for (int r = 0; r < kRows; ++r) scales[d][r] = load_scale_bits(rows.scales[r], rows.half_scales, block);
            }
        }
    }

    // Adds the products of this round to `sums`; `place` is that of `first` in the tile.
    template <int kTokens>
    __device__ __forceinline__ void meet(const GemvRows<format, kRows>& rows, int first,
                                         const GemvTile<format, kTokens>& tile, int place,
                                         float (&sums)[kRows][kTokens]) const {
#pragma unroll
        for (int d = 0; d < kDepth; ++d)
            if (first + d * kGemvLanes < rows.loads)
                gemv_step<format, kTokens, kRows>(weights[d], scales[d], rows.half_scales, tile, place + d * kGemvLanes,
                                                  sums);
    }
};

// sums[r][token] = dot(row r of this team, token): complete in all eight lanes. All threads of the block call it.
template <LinearFormat format, int kTokens, int kRows, class Source>
__device__ __forceinline__ void linear_gemv(const LinearMatrix& matrix, const int (&row_numbers)[kRows],
                                            const Source& source, GemvShared<format>& shared,
                                            float (&sums)[kRows][kTokens]) {
    constexpr int kDepth = kTokens == 4 ? 1 : 4 / kRows;  // with more, four tokens would not fit in 80 registers
    constexpr int kRound = kDepth * kGemvLanes;
    using Tile = GemvTile<format, kTokens>;
    static_assert(Tile::kLoads % kRound == 0, "a round lies in one tile");
    const int lane = static_cast<int>(threadIdx.x) % kGemvLanes;
    const GemvRows<format, kRows> rows(matrix, row_numbers);
    const Tile tile = {shared};
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int token = 0; token < kTokens; ++token) sums[r][token] = 0.0F;

    GemvRound<format, kRows, kDepth> round = {};
    round.fetch(rows, lane);
    for (int first = 0, place = 0; first < rows.loads; first += kRound, place = (place + kRound) % Tile::kLoads) {
        if (place == 0) {
            __syncthreads();  // the tile before this one has been read
            source.stage(tile, first, min(Tile::kLoads, rows.loads - first));
            __syncthreads();
        }
        round.meet(rows, first + lane, tile, place + lane, sums);
        round.fetch(rows, first + kRound + lane);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int token = 0; token < kTokens; ++token)
#pragma unroll
            for (int apart = 1; apart < kGemvLanes; apart *= 2)
                sums[r][token] += __shfl_xor_sync(kFullMask, sums[r][token], apart);
}

// The sum of token `lane of the team`, so that eight tokens are written by eight lanes. Registers have no address:
// hence the comparison with every place.
template <int kTokens>
__device__ __forceinline__ float sum_of_lane(const float (&sums)[kTokens]) {
    float value = sums[0];
#pragma unroll
    for (int token = 1; token < kTokens; ++token)
        if (static_cast<int>(threadIdx.x) % kGemvLanes == token) value = sums[token];
    return value;
}

}  // namespace deepstitch
