// Which key blocks a query block visits: a list per (row, kv head, query block), from a layout or by scores.
//
// dynamic: the mean key of every key block and the mean query of every query block (over its tokens and the query
// heads of the kv head), their dot product as score, and the top_n blocks of highest score. gate_scores replace the
// first two steps, and then no key is read here.
#pragma once

#include "tiles.cuh"

namespace deepstitch {
namespace sparse_attention {

// Adds the four columns that each thread summed over its slice of rows, and divides. sums: [128 / (D / 4)][D].
__device__ __forceinline__ void store_mean(float* sums, const float4& own, float* out, int head_dim, int count) {
    const int thread = static_cast<int>(threadIdx.x), lanes = head_dim / 4, slices = kAttentionThreads / lanes;
    if (thread < slices * lanes) *reinterpret_cast<float4*>(sums + thread * 4) = own;
    __syncthreads();
    for (int d = thread; d < head_dim; d += kAttentionThreads) {
        float sum = 0;
        for (int slice = 0; slice < slices; ++slice) sum += sums[slice * head_dim + d];
        out[d] = sum / static_cast<float>(count);
    }
}

__device__ __forceinline__ void add4(float4& sum, const float4& value, float by) {
    sum.x += value.x * by;
    sum.y += value.y * by;
    sum.z += value.z * by;
    sum.w += value.w * by;
}

// Grid: key blocks of a batch row (of all segments), kv_heads, batch.
template <class Kv>
__device__ __forceinline__ void pool_keys(const P& p) {
    STATIC_SHARED(float, sums, kAttentionThreads * 4);
    STATIC_SHARED(int, scratch, 16);
    const int thread = static_cast<int>(threadIdx.x), kv_head = static_cast<int>(blockIdx.y);
    int64_t row = 0, first = 0, stride = p.head_dim;
    int begin = static_cast<int>(blockIdx.x) * p.block_size, end = 0;
    if (p.mode == kCausal) {
        const Piece piece = causal_piece(p, static_cast<int>(blockIdx.z), 0, p.block_size, p.block_size);
        row = static_cast<int64_t>(piece.row) * p.kv_heads + kv_head;
        first = row * p.capacity * p.head_dim;
        end = min(begin + p.block_size, piece.keys);
    } else {
        const Piece piece = segment_piece(p, static_cast<int>(blockIdx.x), p.block_size, p.block_size, scratch);
        row = kv_head;
        stride = static_cast<int64_t>(p.kv_heads) * p.head_dim;
        first = piece.begin * stride + static_cast<int64_t>(kv_head) * p.head_dim;
        begin = piece.token;
        end = begin + piece.valid;
    }
    if (begin >= end) return;
    const int lanes = p.head_dim / 4, slices = kAttentionThreads / lanes, slice = thread / lanes;
    const int column = thread % lanes * 4;
    float4 sum = make_float4(0, 0, 0, 0);
    if (slice < slices) {
#pragma unroll 8
        for (int key = begin + slice; key < end; key += slices) {
            const float by = Kv::kScaled ? p.key_scales[row * p.capacity + key] : 1.0F;
            add4(sum, Kv::four(static_cast<const uint8_t*>(p.key) + (first + key * stride + column) * Kv::kBytes), by);
        }
    }
    const int64_t block = p.mode == kCausal ? row * p.key_blocks + blockIdx.x
                                            : static_cast<int64_t>(kv_head) * p.key_blocks + blockIdx.x;
    store_mean(sums, sum, const_cast<float*>(p.pooled_key) + block * p.head_dim, p.head_dim, end - begin);
}

// The whole query block `blockIdx.x` of a batch row, or of all segments.
__device__ __forceinline__ Piece query_block(const P& p, int* scratch) {
    const int index = static_cast<int>(blockIdx.x);
    return p.mode == kCausal ? causal_piece(p, static_cast<int>(blockIdx.z), index, p.block_size, p.block_size)
                             : segment_piece(p, index, p.block_size, p.block_size, scratch);
}

// Grid: query blocks of a batch row (of all segments), kv_heads, batch.
__device__ __forceinline__ void pool_queries(const P& p) {
    STATIC_SHARED(float, sums, kAttentionThreads * 4);
    STATIC_SHARED(int, scratch, 16);
    const Piece piece = query_block(p, scratch);
    if (piece.valid == 0) return;
    const int thread = static_cast<int>(threadIdx.x), kv_head = static_cast<int>(blockIdx.y);
    const int group = p.heads / p.kv_heads, rows = piece.valid * group;
    const int lanes = p.head_dim / 4, slices = kAttentionThreads / lanes, slice = thread / lanes;
    float4 sum = make_float4(0, 0, 0, 0);
    if (slice < slices) {
        for (int row = slice; row < rows; row += slices) {
            const int64_t token = piece.begin + piece.token + row / group;
            const int64_t at = (token * p.heads + kv_head * group + row % group) * p.head_dim + thread % lanes * 4;
            add4(sum, *reinterpret_cast<const float4*>(p.query + at), 1.0F);
        }
    }
    const int64_t block =
        (static_cast<int64_t>(blockIdx.z) * p.kv_heads + kv_head) * p.query_blocks + static_cast<int64_t>(blockIdx.x);
    store_mean(sums, sum, p.pooled_query + block * p.head_dim, p.head_dim, rows);
}

// Writes the indices whose flag is set, in rising order, and how many they are. scratch: 4 integers.
__device__ __forceinline__ void write_list(const uint8_t* flags, int blocks, int* list, int width, int* count,
                                           int* scratch) {
    const int thread = static_cast<int>(threadIdx.x), each = ceil_div(blocks, kAttentionThreads);
    const int begin = min(blocks, thread * each), end = min(blocks, begin + each);
    int kept = 0;
    for (int block = begin; block < end; ++block) kept += flags[block];
    int at = exclusive_sum(kept, scratch);
    for (int block = begin; block < end; ++block) {
        if (flags[block] == 0) continue;
        if (at < width) list[at] = block;
        ++at;
    }
    if (thread == kAttentionThreads - 1) *count = min(at, width);
}

// Grid: query blocks, heads and batch of the layout. Shared memory: a flag per key block.
__device__ __forceinline__ void list_layout(const P& p) {
    DYNAMIC_SHARED(uint8_t, flags);
    STATIC_SHARED(int, scratch, 16);
    const int64_t row =
        (static_cast<int64_t>(blockIdx.z) * p.given_heads + static_cast<int64_t>(blockIdx.y)) * p.given_query_blocks +
        static_cast<int64_t>(blockIdx.x);
    for (int block = static_cast<int>(threadIdx.x); block < p.given_key_blocks; block += kAttentionThreads) {
        flags[block] = p.layout[row * p.given_key_blocks + block] != 0 ? 1 : 0;
    }
    __syncthreads();
    write_list(flags, p.given_key_blocks, p.lists + row * p.list_width, p.list_width, p.counts + row, scratch);
}

__device__ __forceinline__ float pooled_score(const P& p, const float* query, const float* key) {
    float score = 0;
#pragma unroll 4
    for (int d = 0; d < p.head_dim; d += 4) {
        const float4 a = *reinterpret_cast<const float4*>(query + d), b = *reinterpret_cast<const float4*>(key + d);
        score += a.x * b.x;
        score += a.y * b.y;
        score += a.z * b.z;
        score += a.w * b.w;
    }
    return score;
}

// Order of scores as that of unsigned numbers. NaN is the lowest, and a score that is not finite the nearest that is.
__device__ __forceinline__ uint32_t rank_of(float score) {
    const float finite = score > kMasked ? fminf(score, -kMasked) + 0.0F : kMasked;  // + 0: there is one zero
    const uint32_t bits = __float_as_uint(finite);
    return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
constexpr uint32_t kAlways = 0xffffffffU;  // the rank of a block that is kept whatever the scores say

// Sets the flags of the `top_n` highest ranks, of equal ones the lower index first, and of every kAlways. The lowest
// rank that is kept is found bit by bit. scratch: 4 integers.
__device__ __forceinline__ void flag_highest(const uint32_t* ranks, uint8_t* flags, int blocks, int top_n,
                                             int* scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    uint32_t lowest = 0;
    int above = 0;  // blocks of a higher rank than the lowest
    if (blocks > top_n) {
#pragma unroll 1
        for (int bit = 31; bit >= 0; --bit) {
            const uint32_t least = lowest | (1U << bit);
            int count = 0;
            for (int block = thread; block < blocks; block += kAttentionThreads) count += ranks[block] >= least ? 1 : 0;
            if (block_sum<kAttentionThreads>(count, scratch) >= top_n) lowest = least;
        }
        for (int block = thread; block < blocks; block += kAttentionThreads) above += ranks[block] > lowest ? 1 : 0;
        above = block_sum<kAttentionThreads>(above, scratch);
    }
    const int each = ceil_div(blocks, kAttentionThreads);
    const int begin = min(blocks, thread * each), end = min(blocks, begin + each);
    int equal = 0;
    for (int block = begin; block < end; ++block) equal += ranks[block] == lowest ? 1 : 0;
    int before = exclusive_sum(equal, scratch);
    for (int block = begin; block < end; ++block) {
        const bool tied = ranks[block] == lowest;
        const bool kept = ranks[block] > lowest || (tied && before < top_n - above) || ranks[block] == kAlways;
        flags[block] = kept ? 1 : 0;
        before += tied ? 1 : 0;
    }
}

// Grid: query blocks of a batch row (of all segments), kv_heads, batch. Shared memory: a rank and a flag per key block.
__device__ __forceinline__ void select(const P& p) {
    DYNAMIC_SHARED(uint32_t, ranks);
    STATIC_SHARED(int, scratch, 16);
    STATIC_SHARED(float, query, kAttentionMaxHeadDim);
    const int thread = static_cast<int>(threadIdx.x), kv_head = static_cast<int>(blockIdx.y);
    const Piece piece = query_block(p, scratch);
    const int64_t head_row = static_cast<int64_t>(blockIdx.z) * p.kv_heads + kv_head;
    const int64_t row = head_row * p.query_blocks + static_cast<int64_t>(blockIdx.x);
    if (piece.valid == 0) {
        if (thread == 0) p.counts[row] = 0;
        return;
    }
    // The diagonal: the key blocks of the query block's own tokens. In causal mode those after it are no candidates.
    const int last_position = p.mode == kCausal ? min(piece.position + piece.valid, piece.keys) - 1 : piece.keys - 1;
    const int candidates = last_position / p.block_size + 1;
    const int diagonal_begin = piece.position / p.block_size;
    const int diagonal_end = p.mode == kCausal ? candidates : diagonal_begin + 1;
    uint8_t* const flags = reinterpret_cast<uint8_t*>(ranks + candidates);

    if (p.gate_scores == nullptr) {
        for (int d = thread; d < p.head_dim; d += kAttentionThreads) query[d] = p.pooled_query[row * p.head_dim + d];
        __syncthreads();
    }
    const int64_t given_head = (p.given_batch > 1 ? static_cast<int64_t>(piece.row) : 0) * p.given_heads +
                               (p.given_heads > 1 ? kv_head : 0);
    const int64_t given_row = (given_head * p.given_query_blocks + piece.block) * p.given_key_blocks;
    for (int block = thread; block < candidates; block += kAttentionThreads) {
        float score = kMasked;
        if (p.gate_scores == nullptr) {
            const int64_t key = head_row * p.key_blocks + min(piece.blocks_before + block, p.key_blocks - 1);
            score = pooled_score(p, query, p.pooled_key + key * p.head_dim);
        } else if (piece.block < p.given_query_blocks && block < p.given_key_blocks) {
            score = p.gate_scores[given_row + block];
        }
        const bool always = block == 0 || (block >= diagonal_begin && block < diagonal_end);
        ranks[block] = always ? kAlways : rank_of(score);
    }
    __syncthreads();
    flag_highest(ranks, flags, candidates, p.top_n, scratch);
    __syncthreads();
    write_list(flags, candidates, p.lists + row * p.list_width, p.list_width, p.counts + row, scratch);
}

}  // namespace sparse_attention
}  // namespace deepstitch
