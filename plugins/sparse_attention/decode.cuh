// Few queries: the keys are split over blocks, and the rows of all query heads of a kv head share a block, so that a
// key is fetched once. A second kernel adds the parts, in order: the result does not depend on which block is first.
//
// A tile (32 keys in float32, else 64) lies in shared memory as it is stored; keys and values take the same place one
// after the other, each loaded into registers while the other is computed. For the scores a thread takes one key and
// some of the rows; for the output it takes 4 columns of all rows and every `slices`-th key of the tile.
#pragma once

#include "tiles.cuh"

namespace deepstitch {
namespace sparse_attention {

// A tile of keys or values on its way from global to shared memory.
template <class Kv>
struct Tile {
    static constexpr int kKeys = decode_keys(Kv::kBytes);
    static constexpr int kUnit = decode_unit(Kv::kBytes);
    static constexpr int kUnitsPerLoad = 16 / kUnit;
    static constexpr int kLoads = kKeys * kAttentionMaxHeadDim * Kv::kBytes / 16 / kAttentionThreads;
    uint4 raw[kLoads];

    // `bytes` of keys from `from` on, at most a tile of them. The rows lie one after the other.
    __device__ __forceinline__ void fetch(const uint8_t* from, int bytes) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int at = (static_cast<int>(threadIdx.x) + i * kAttentionThreads) * 16;
            if (at < bytes) raw[i] = load16(from + at);
        }
    }

    // Units of a row lie side by side, and a row takes `stride` units. magic: 2^16 / units, rounded up, which divides
    // every number of a unit exactly.
    __device__ __forceinline__ void store(uint8_t* shared, int units, int stride, int magic, int bytes) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int load = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
            if (load * 16 >= bytes) break;
            if (kUnitsPerLoad == 1) {
                *reinterpret_cast<uint4*>(shared + place(load, units, stride, magic)) = raw[i];
            } else {
                *reinterpret_cast<uint2*>(shared + place(2 * load, units, stride, magic)) =
                    make_uint2(raw[i].x, raw[i].y);
                *reinterpret_cast<uint2*>(shared + place(2 * load + 1, units, stride, magic)) =
                    make_uint2(raw[i].z, raw[i].w);
            }
        }
    }

    __device__ static __forceinline__ int place(int unit, int units, int stride, int magic) {
        return (unit + (unit * magic >> 16) * (stride - units)) * kUnit;
    }
};

// scores[r] = query row first_row + r . key `at`; kRows rows of a thread
template <class Kv, int kRows>
__device__ __forceinline__ void dot_rows(const float* queries, int head_dim, const uint8_t* at,
                                         float (&scores)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) scores[r] = 0;
#pragma unroll(8 / Kv::kUnit)
    for (int d = 0; d < head_dim; d += Kv::kUnit) {
        float key[Kv::kUnit];
        Kv::unit(at + d * Kv::kBytes, key);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int i = 0; i < Kv::kUnit; i += 4) {
                const float4 query = *reinterpret_cast<const float4*>(queries + r * head_dim + d + i);
                scores[r] += query.x * key[i];
                scores[r] += query.y * key[i + 1];
                scores[r] += query.z * key[i + 2];
                scores[r] += query.w * key[i + 3];
            }
        }
    }
}

// Where the sums of this block's query row `row` go.
__device__ __forceinline__ int64_t part_of(const P& p, int row) {
    const int64_t part = static_cast<int64_t>(blockIdx.z) * p.splits + static_cast<int64_t>(blockIdx.y);
    return part * p.tokens * (p.heads / p.kv_heads) + row;
}

__device__ __forceinline__ void store_stats(const P& p, int row, float largest, float total) {
    float* const at = p.partial_stats + part_of(p, row) * 2;
    at[0] = largest;
    at[1] = total;
}

// Grid: groups of kRows query rows, splits, batch * kv_heads.
template <class Kv, int kRows>
__device__ __forceinline__ void decode(const P& p) {
    using T = Tile<Kv>;
    constexpr int kSlices = kAttentionThreads / T::kKeys;                       // threads that share a key
    constexpr int kOwnRows = kRows > kSlices ? kRows / kSlices : 1;             // rows of such a thread
    constexpr int kWarps = kAttentionThreads / kWarp;
    constexpr int kWarpRows = kRows / kWarps;                                   // rows whose softmax a warp does
    static_assert(kRows % kWarps == 0 && kRows % 4 == 0, "rows are spread evenly over warps, and read four at a time");
    DYNAMIC_SHARED(uint8_t, shared);
    float* const queries = reinterpret_cast<float*>(shared + decode_tile_bytes(p.head_dim, Kv::kBytes, kRows));
    float* const weights = queries + kRows * p.head_dim;  // [key][row]
    float* const shrinks = weights + T::kKeys * kRows;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
    const int D = p.head_dim, group = p.heads / p.kv_heads, first_row = static_cast<int>(blockIdx.x) * kRows;
    const int batch = static_cast<int>(blockIdx.z) / p.kv_heads, kv_head = static_cast<int>(blockIdx.z) % p.kv_heads;
    const int64_t head_row = blockIdx.z;

    // All tokens are one piece: they lie in query block 0.
    const Piece piece = causal_piece(p, batch, 0, p.tokens, p.tokens);
    const Visible any = visible_to_any(p, piece);
    const KeyTiles tiles = key_tiles(p, piece, any, kv_head, T::kKeys);
    const int each = ceil_div(tiles.count, p.splits);
    const int begin = min(tiles.count, static_cast<int>(blockIdx.y) * each), end = min(tiles.count, begin + each);

    if (begin == end) {  // no keys: the sums are not read
        if (thread < kRows && first_row + thread < p.tokens * group) {
            store_stats(p, first_row + thread, kMasked, 0);
        }
        return;
    }

    for (int at = thread * 4; at < kRows * D; at += kAttentionThreads * 4) {
        const int row = first_row + at / D, dim = at % D;
        float4 value = make_float4(0, 0, 0, 0);
        if (row < piece.valid * group) {
            const int64_t token = piece.begin + row / group;
            value = *reinterpret_cast<const float4*>(
                p.query + (token * p.heads + kv_head * group + row % group) * D + dim);
        }
        *reinterpret_cast<float4*>(queries + at) =
            make_float4(value.x * p.scale, value.y * p.scale, value.z * p.scale, value.w * p.scale);
    }

    const uint8_t* const keys = static_cast<const uint8_t*>(p.key) + head_row * p.capacity * D * Kv::kBytes;
    const uint8_t* const values = static_cast<const uint8_t*>(p.value) + head_row * p.capacity * D * Kv::kBytes;
    const float* const key_scales = Kv::kScaled ? p.key_scales + head_row * p.capacity : nullptr;
    const float* const value_scales = Kv::kScaled ? p.value_scales + head_row * p.capacity : nullptr;
    const int row_bytes = D * Kv::kBytes, units = row_bytes / T::kUnit, magic = (65535 + units) / units;
    const int stride = decode_stride(D, Kv::kBytes);
    // Softmax: the rows of this thread's warp. Output: 4 columns of every row, keys slice, slice + slices, ...
    float largest[kWarpRows], total[kWarpRows], output[kRows][4];
    Visible seen[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        largest[r] = kMasked;
        total[r] = 0;
        seen[r] = visible_to(p, piece, (first_row + warp * kWarpRows + r) / group);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) output[r][0] = output[r][1] = output[r][2] = output[r][3] = 0;
    const int slices = kAttentionThreads / (D / 4), slice = thread / (D / 4), column = thread % (D / 4) * 4;
    const int my_key = thread % T::kKeys, my_row = thread / T::kKeys * kOwnRows;

    T next{};
    int first_key = tiles.tile(begin) * T::kKeys, bytes = min(T::kKeys, any.end - first_key) * row_bytes;
    next.fetch(keys + static_cast<int64_t>(first_key) * row_bytes, bytes);
#pragma unroll 1
    for (int t = begin; t < end; ++t) {
        __syncthreads();  // the values before are used up; at first, the queries are there
        next.store(shared, units, stride, magic, bytes);
        __syncthreads();
        next.fetch(values + static_cast<int64_t>(first_key) * row_bytes, bytes);

        const int key = first_key + my_key;
        if (my_row < kRows) {
            float scores[kOwnRows];
            dot_rows<Kv, kOwnRows>(queries + my_row * D, D, shared + my_key * stride * T::kUnit, scores);
            const float by = Kv::kScaled && any(key) ? key_scales[key] : 1.0F;
#pragma unroll
            for (int r = 0; r < kOwnRows; ++r) weights[my_key * kRows + my_row + r] = scores[r] * by;
        }
        __syncthreads();  // the scores are there, and the keys are used up
        next.store(shared, units, stride, magic, bytes);

#pragma unroll
        for (int r = 0; r < kWarpRows; ++r) {
            const int row = warp * kWarpRows + r;
            float score[T::kKeys / kWarp], top = largest[r];
#pragma unroll
            for (int i = 0; i < T::kKeys / kWarp; ++i) {
                const float found = weights[(i * kWarp + lane) * kRows + row];
                score[i] = seen[r](first_key + i * kWarp + lane) ? found : kMasked;
                top = fmaxf(top, score[i]);
            }
            top = warp_max(top);
            const float shrink = expf(largest[r] - top);
            largest[r] = top;
            total[r] *= shrink;
#pragma unroll
            for (int i = 0; i < T::kKeys / kWarp; ++i) {
                const float weight = score[i] > kMasked ? expf(score[i] - top) : 0.0F;
                total[r] += weight;
                float by = 1.0F;
                if (Kv::kScaled && weight > 0) by = value_scales[first_key + i * kWarp + lane];
                weights[(i * kWarp + lane) * kRows + row] = weight * by;
            }
            if (lane == 0) shrinks[row] = shrink;
        }
        __syncthreads();  // weights and values are there

        const int now = first_key, loaded = bytes;
        if (t + 1 < end) {
            first_key = tiles.tile(t + 1) * T::kKeys;
            bytes = min(T::kKeys, any.end - first_key) * row_bytes;
            next.fetch(keys + static_cast<int64_t>(first_key) * row_bytes, bytes);
        }
        if (slice < slices) {
#pragma unroll
            for (int r = 0; r < kRows; r += 4) {
                const float4 by = *reinterpret_cast<const float4*>(shrinks + r);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    output[r][c] *= by.x;
                    output[r + 1][c] *= by.y;
                    output[r + 2][c] *= by.z;
                    output[r + 3][c] *= by.w;
                }
            }
            const int count = loaded / row_bytes;
#pragma unroll 2
            for (int k = slice; k < count; k += slices) {
                if (!any(now + k)) continue;  // what nobody sees may hold anything
                const float4 value = Kv::four(shared + k * stride * T::kUnit + column * Kv::kBytes);
#pragma unroll
                for (int r = 0; r < kRows; r += 4) {
                    const float4 weight = *reinterpret_cast<const float4*>(weights + k * kRows + r);
                    const float by[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        output[r + i][0] += by[i] * value.x;
                        output[r + i][1] += by[i] * value.y;
                        output[r + i][2] += by[i] * value.z;
                        output[r + i][3] += by[i] * value.w;
                    }
                }
            }
        }
    }

    // Sum over the slices, one after the other, in the place of the tile.
    float* const sums = reinterpret_cast<float*>(shared);
    for (int s = 0; s < slices; ++s) {
        __syncthreads();
        if (slice == s) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float4* const at = reinterpret_cast<float4*>(sums + r * D + column);
                float4 sum = s == 0 ? make_float4(0, 0, 0, 0) : *at;
                sum.x += output[r][0];
                sum.y += output[r][1];
                sum.z += output[r][2];
                sum.w += output[r][3];
                *at = sum;
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        const int local = warp * kWarpRows + r, row = first_row + local;
        const float sum = warp_sum(total[r]);
        if (row >= p.tokens * group) continue;
        if (lane == 0) store_stats(p, row, largest[r], sum);
        for (int d = lane; d < D; d += kWarp) p.partial[part_of(p, row) * D + d] = sums[local * D + d];
    }
}

// Grid: query rows, batch * kv_heads. A block adds the parts of one row: weights first, a thread for each part; then
// 4 columns and every `slices`-th part per thread, then the slices in their order.
__device__ __forceinline__ void merge(const P& p) {
    STATIC_SHARED(float, weights, kMostDecodeBlocks);
    STATIC_SHARED(float, sums, kAttentionThreads * 4);
    STATIC_SHARED(float, scratch, kAttentionThreads / kWarp);
    const int rows = static_cast<int>(gridDim.x), row = static_cast<int>(blockIdx.x), group = p.heads / p.kv_heads;
    const int head_row = static_cast<int>(blockIdx.y), kv_head = head_row % p.kv_heads;
    const int64_t first = static_cast<int64_t>(head_row) * p.splits * rows + row;
    const int thread = static_cast<int>(threadIdx.x), D = p.head_dim;

    float top = kMasked, total = 0;
    for (int s = thread; s < p.splits; s += kAttentionThreads) {
        top = fmaxf(top, p.partial_stats[(first + static_cast<int64_t>(s) * rows) * 2]);
    }
    top = block_max<kAttentionThreads>(top, scratch);
    for (int s = thread; s < p.splits; s += kAttentionThreads) {
        const float* const stats = p.partial_stats + (first + static_cast<int64_t>(s) * rows) * 2;
        const float by = stats[1] > 0 ? expf(stats[0] - top) : 0.0F;
        weights[s] = by;
        total += by * stats[1];
    }
    total = block_sum<kAttentionThreads>(total, scratch);  // and the weights are there

    const int lanes = D / 4, slices = kAttentionThreads / lanes, slice = thread / lanes;
    float4 sum = make_float4(0, 0, 0, 0);
    if (slice < slices) {
#pragma unroll 8
        for (int s = slice; s < p.splits; s += slices) {
            const float by = weights[s];
            if (by == 0) continue;  // a part of no keys: nothing was written
            const int64_t part = first + static_cast<int64_t>(s) * rows;
            const float4 value = *reinterpret_cast<const float4*>(p.partial + part * D + thread % lanes * 4);
            sum.x += by * value.x;
            sum.y += by * value.y;
            sum.z += by * value.z;
            sum.w += by * value.w;
        }
        *reinterpret_cast<float4*>(sums + thread * 4) = sum;
    }
    __syncthreads();
    const int64_t token = static_cast<int64_t>(head_row / p.kv_heads) * p.tokens + row / group;
    float* const out = p.output + (token * p.heads + kv_head * group + row % group) * D;
    for (int d = thread; d < D; d += kAttentionThreads) {
        float value = 0;
        for (int i = 0; i < slices; ++i) value += sums[i * D + d];
        out[d] = total > 0 ? value / total : 0.0F;
    }
}

}  // namespace sparse_attention
}  // namespace deepstitch
