// Many queries: a block holds 64 query rows and their running softmax, and walks over its keys 32 at a time.
//
// A query row is one token and one query head; the heads that share a kv head lie in the same tile, so that a key is
// fetched once for all of them. 128 threads are 16 x 8: thread (ty, tx) owns rows ty + 16 i, the scores of keys
// tx + 8 j and 1/8 of the output columns of these rows. The eight threads of a row are neighbours in a warp.
//
// Shared memory: queries (times scale) [64][head_dim + 4], weights [64][40], and one stage that holds first keys,
// then values. At head_dim 128 a stage is a quarter of the tile: 32 keys of 32 dims, then 8 values. The next stage is
// loaded into registers while this one is computed.
#pragma once

#include "tiles.cuh"

namespace deepstitch {
namespace sparse_attention {

template <class Kv, int D>
struct PrefillShape {
    static constexpr int kDepth = D == 128 ? 32 : D;  // dims of the keys in a stage
    static constexpr int kKeyStages = D / kDepth;
    static constexpr int kKeyStride = kDepth / 4 % 2 == 0 ? kDepth + 4 : kDepth;  // odd in units of 16 bytes
    static constexpr int kValueKeys = D == 128 ? 8 : kPrefillKeys;  // values in a stage
    static constexpr int kValueStages = kPrefillKeys / kValueKeys;
    static constexpr int kQueryStride = D + 4;
    static constexpr int kWeightStride = kPrefillKeys + 8;
    static constexpr int kStageFloats = kPrefillKeys * kKeyStride;
    static constexpr int kQueryFloats = kPrefillRows * kQueryStride;
    static constexpr int kWeightFloats = kPrefillRows * kWeightStride;
    static constexpr int kElements = kPrefillKeys * kDepth;  // of a stage, keys or values
    static constexpr int kPieces = kElements / Kv::kLoad;    // of 16 bytes
    static constexpr int kLoads = (kPieces + kAttentionThreads - 1) / kAttentionThreads;  // per thread
    static constexpr int kGroups = Kv::kLoad / Kv::kGroup;
    static constexpr int kColumns = D / 8;  // of the output, per thread
    static constexpr int kWide = kColumns % 4 == 0 ? 4 : kColumns % 2 == 0 ? 2 : 1;  // of them side by side
    static_assert(kValueKeys * D == kElements && kElements <= kStageFloats, "keys and values take the same stage");
    static_assert((kStageFloats + kQueryFloats + kWeightFloats) * 4 <= 48 * 1024, "more than 48 KB");
};

// The keys or values of one kv head of one row or segment.
struct Source {
    const uint8_t* data;
    const float* scales;
    int stride;  // elements from one key to the next
};

// A stage on its way from global to shared memory.
template <class Kv, int D>
struct Stage {
    using Shape = PrefillShape<Kv, D>;
    uint4 raw[Shape::kLoads];
    float scale[Kv::kScaled ? Shape::kLoads * Shape::kGroups : 1];

    // Element e of the stage is dim first_dim + e % Depth of key first_key + e / Depth. What no row of this block sees
    // is not read and counts as zero.
    template <int Depth>
    __device__ __forceinline__ void fetch(const Source& from, int first_key, int first_dim, const Visible& any) {
#pragma unroll
        for (int i = 0; i < Shape::kLoads; ++i) {
            const int piece = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
            const int element = piece * Kv::kLoad;
            bool wanted = false;
#pragma unroll
            for (int g = 0; g < Shape::kGroups; ++g) {
                const int key = first_key + (element + g * Kv::kGroup) / Depth;
                const bool seen = piece < Shape::kPieces && any(key);
                wanted = wanted || seen;
                if (Kv::kScaled) scale[i * Shape::kGroups + g] = seen ? from.scales[key] : 0.0F;
            }
            raw[i] = make_uint4(0, 0, 0, 0);
            if (wanted) {
                const int64_t key = first_key + element / Depth;
                raw[i] = load16(from.data + (key * from.stride + first_dim + element % Depth) * Kv::kBytes);
            }
        }
    }

    template <int Depth, int Stride>
    __device__ __forceinline__ void store(float* shared) const {
#pragma unroll
        for (int i = 0; i < Shape::kLoads; ++i) {
            const int piece = static_cast<int>(threadIdx.x) + i * kAttentionThreads;
            if (Shape::kPieces % kAttentionThreads != 0 && piece >= Shape::kPieces) break;
            float values[Kv::kLoad];
            Kv::unpack(raw[i], values);
#pragma unroll
            for (int v = 0; v < Kv::kLoad; v += 4) {
                const int element = piece * Kv::kLoad + v;
                const float by = Kv::kScaled ? scale[i * Shape::kGroups + v / Kv::kGroup] : 1.0F;
                *reinterpret_cast<float4*>(shared + element / Depth * Stride + element % Depth) =
                    make_float4(values[v] * by, values[v + 1] * by, values[v + 2] * by, values[v + 3] * by);
            }
        }
    }
};

// A thread's part of the 64 rows.
template <class Kv, int D>
struct Rows {
    using Shape = PrefillShape<Kv, D>;
    float output[4][Shape::kColumns];
    float score[4][4];
    float largest[4];
    float total[4];  // of the keys of this thread
    Visible seen[4];

    __device__ __forceinline__ void add_scores(const float* queries, const float* keys, int ty, int tx) {
#pragma unroll 2
        for (int d = 0; d < Shape::kDepth; d += 4) {
            float4 q[4], k[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                q[i] = *reinterpret_cast<const float4*>(queries + (ty + 16 * i) * Shape::kQueryStride + d);
                k[i] = *reinterpret_cast<const float4*>(keys + (tx + 8 * i) * Shape::kKeyStride + d);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    score[i][j] += q[i].x * k[j].x;
                    score[i][j] += q[i].y * k[j].y;
                    score[i][j] += q[i].z * k[j].z;
                    score[i][j] += q[i].w * k[j].w;
                }
            }
        }
    }

    // Scores to weights; what was summed before is brought to the new largest score.
    __device__ __forceinline__ void add_softmax(float* weights, int first_key, int ty, int tx) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float top = kMasked;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                score[i][j] = seen[i](first_key + tx + 8 * j) ? score[i][j] : kMasked;
                top = fmaxf(top, score[i][j]);
            }
#pragma unroll
            for (int apart = 4; apart > 0; apart /= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, apart));
            top = fmaxf(top, largest[i]);
            const float shrink = expf(largest[i] - top);
            largest[i] = top;
            total[i] *= shrink;
#pragma unroll
            for (int c = 0; c < Shape::kColumns; ++c) output[i][c] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float weight = score[i][j] > kMasked ? expf(score[i][j] - top) : 0.0F;
                total[i] += weight;
                weights[(ty + 16 * i) * Shape::kWeightStride + tx + 8 * j] = weight;
            }
        }
    }

    __device__ __forceinline__ void add_values(const float* weights, const float* values, int ty, int tx) {
#pragma unroll 1
        for (int key = 0; key < Shape::kValueKeys; key += 4) {
            float weight[4][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4 four =
                    *reinterpret_cast<const float4*>(weights + (ty + 16 * i) * Shape::kWeightStride + key);
                weight[i][0] = four.x;
                weight[i][1] = four.y;
                weight[i][2] = four.z;
                weight[i][3] = four.w;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float value[Shape::kColumns];
                load_columns(values + (key + k) * D, tx, value);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int c = 0; c < Shape::kColumns; ++c) output[i][c] += weight[i][k] * value[c];
                }
            }
        }
    }

    // Column c of a thread, as a column of the head.
    __device__ static __forceinline__ int column(int c, int tx) {
        return c / Shape::kWide * Shape::kWide * 8 + tx * Shape::kWide + c % Shape::kWide;
    }

    __device__ static __forceinline__ void load_columns(const float* row, int tx, float (&value)[Shape::kColumns]) {
#pragma unroll
        for (int c = 0; c < Shape::kColumns; c += Shape::kWide) {
            const float* at = row + column(c, tx);
            if (Shape::kWide == 4) {
                const float4 four = *reinterpret_cast<const float4*>(at);
                value[c] = four.x;
                value[c + (Shape::kWide > 1)] = four.y;
                value[c + (Shape::kWide > 2 ? 2 : 0)] = four.z;
                value[c + (Shape::kWide > 2 ? 3 : 0)] = four.w;
            } else if (Shape::kWide == 2) {
                const float2 two = *reinterpret_cast<const float2*>(at);
                value[c] = two.x;
                value[c + (Shape::kWide > 1)] = two.y;
            } else {
                value[c] = *at;
            }
        }
    }
};

template <int D>
__device__ __forceinline__ void load_queries(const P& p, const Piece& piece, int kv_head, int group, float* queries) {
    const int rows = piece.valid * group;
    for (int at = static_cast<int>(threadIdx.x) * 4; at < kPrefillRows * D; at += kAttentionThreads * 4) {
        const int row = at / D, dim = at % D;
        float4 value = make_float4(0, 0, 0, 0);
        if (row < rows) {
            const int64_t token = piece.begin + piece.token + row / group;
            const int head = kv_head * group + row % group;
            value = *reinterpret_cast<const float4*>(p.query + (token * p.heads + head) * D + dim);
        }
        *reinterpret_cast<float4*>(queries + row * (D + 4) + dim) =
            make_float4(value.x * p.scale, value.y * p.scale, value.z * p.scale, value.w * p.scale);
    }
}

template <class Kv, int D>
__device__ __forceinline__ void store_output(const P& p, const Piece& piece, int kv_head, int group, int ty, int tx,
                                             Rows<Kv, D>& rows) {
    constexpr int kWide = PrefillShape<Kv, D>::kWide;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float total = rows.total[i];
#pragma unroll
        for (int apart = 4; apart > 0; apart /= 2) total += __shfl_xor_sync(kFullMask, total, apart);
        const float by = total > 0 ? 1.0F / total : 0.0F;
        const int row = ty + 16 * i;
        if (row >= piece.tokens * group) continue;
        const int64_t token = piece.begin + piece.token + row / group;
        float* out = p.output + (token * p.heads + kv_head * group + row % group) * D;
#pragma unroll
        for (int c = 0; c < PrefillShape<Kv, D>::kColumns; c += kWide) {
            float* at = out + Rows<Kv, D>::column(c, tx);
            if (kWide == 4) {
                *reinterpret_cast<float4*>(at) =
                    make_float4(rows.output[i][c] * by, rows.output[i][c + (kWide > 1)] * by,
                                rows.output[i][c + (kWide > 2 ? 2 : 0)] * by,
                                rows.output[i][c + (kWide > 2 ? 3 : 0)] * by);
            } else if (kWide == 2) {
                *reinterpret_cast<float2*>(at) =
                    make_float2(rows.output[i][c] * by, rows.output[i][c + (kWide > 1)] * by);
            } else {
                *at = rows.output[i][c] * by;
            }
        }
    }
}

template <class Kv>
__device__ __forceinline__ Source source_of(const P& p, const Piece& piece, int kv_head, const void* data,
                                            const float* scales, int head_dim) {
    Source source;
    const int64_t row = static_cast<int64_t>(piece.row) * p.kv_heads + kv_head;
    const int64_t first = p.mode == kCausal ? row * p.capacity * head_dim
                                            : (static_cast<int64_t>(piece.begin) * p.kv_heads + kv_head) * head_dim;
    source.data = static_cast<const uint8_t*>(data) + first * Kv::kBytes;
    source.scales = Kv::kScaled ? scales + row * p.capacity : nullptr;
    source.stride = p.mode == kCausal ? head_dim : p.kv_heads * head_dim;
    return source;
}

// Tokens of a piece, and of the query block that it must not leave.
__device__ __forceinline__ int piece_step(const P& p) { return kPrefillRows / (p.heads / p.kv_heads); }
__device__ __forceinline__ int piece_block(const P& p) {
    return p.pattern == kLayout || p.pattern == kDynamic ? p.block_size : piece_step(p);
}

// Grid: pieces of a batch row (or of all segments), kv_heads, batch.
template <class Kv, int D>
__device__ __forceinline__ void prefill(const P& p) {
    using Shape = PrefillShape<Kv, D>;
    STATIC_SHARED(float, queries, Shape::kQueryFloats);
    STATIC_SHARED(float, weights, Shape::kWeightFloats);
    STATIC_SHARED(float, stage, Shape::kStageFloats);
    const int thread = static_cast<int>(threadIdx.x), tx = thread % 8, ty = thread / 8;
    const int kv_head = static_cast<int>(blockIdx.y), group = p.heads / p.kv_heads;
    // The last tokens see the most keys: they begin first.
    const int index = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    const Piece piece =
        p.mode == kCausal
            ? causal_piece(p, static_cast<int>(blockIdx.z), index, piece_block(p), piece_step(p))
            : segment_piece(p, index, piece_block(p), piece_step(p), reinterpret_cast<int*>(stage));
    if (piece.tokens == 0) return;
    const Visible any = visible_to_any(p, piece);
    const KeyTiles tiles = key_tiles(p, piece, any, kv_head, kPrefillKeys);

    Rows<Kv, D> rows;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        rows.seen[i] = visible_to(p, piece, (ty + 16 * i) / group);
        rows.largest[i] = kMasked;
        rows.total[i] = 0;
#pragma unroll
        for (int c = 0; c < Shape::kColumns; ++c) rows.output[i][c] = 0;
    }
    if (tiles.count > 0) {
        load_queries<D>(p, piece, kv_head, group, queries);
        const Source keys = source_of<Kv>(p, piece, kv_head, p.key, p.key_scales, D);
        const Source values = source_of<Kv>(p, piece, kv_head, p.value, p.value_scales, D);
        Stage<Kv, D> next{};
        int first_key = tiles.tile(0) * kPrefillKeys;
        next.template fetch<Shape::kDepth>(keys, first_key, 0, any);
#pragma unroll 1
        for (int t = 0; t < tiles.count; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) rows.score[i][j] = 0;
            }
#pragma unroll 1
            for (int s = 0; s < Shape::kKeyStages; ++s) {
                __syncthreads();  // the stage before is used up; at first, the queries are there
                next.template store<Shape::kDepth, Shape::kKeyStride>(stage);
                __syncthreads();
                if (s + 1 < Shape::kKeyStages) {
                    next.template fetch<Shape::kDepth>(keys, first_key, (s + 1) * Shape::kDepth, any);
                } else {
                    next.template fetch<D>(values, first_key, 0, any);
                }
                rows.add_scores(queries + s * Shape::kDepth, stage, ty, tx);
            }
            rows.add_softmax(weights, first_key, ty, tx);
            const int after = t + 1 < tiles.count ? tiles.tile(t + 1) * kPrefillKeys : 0;
#pragma unroll 1
            for (int s = 0; s < Shape::kValueStages; ++s) {
                __syncthreads();  // the weights are there, and the stage before is used up
                next.template store<D, D>(stage);
                __syncthreads();
                if (s + 1 < Shape::kValueStages) {
                    next.template fetch<D>(values, first_key + (s + 1) * Shape::kValueKeys, 0, any);
                } else if (t + 1 < tiles.count) {
                    next.template fetch<Shape::kDepth>(keys, after, 0, any);
                }
                rows.add_values(weights + s * Shape::kValueKeys, stage, ty, tx);
            }
            first_key = after;
        }
    }
    store_output<Kv, D>(p, piece, kv_head, group, ty, tx, rows);
}

}  // namespace sparse_attention
}  // namespace deepstitch
