// What the attention and selection kernels share: stored formats, the piece of work of a block, the keys it visits.
#pragma once

#include "../common/kernel.cuh"
#include "params.h"

namespace deepstitch {
namespace sparse_attention {

using P = SparseAttentionParams;

// Score of a key that is not visible, and the largest score of no keys: exp(kMasked - kMasked) is 1, never NaN.
constexpr float kMasked = -3.402823466e+38F;

// --- stored formats ---
//
// kLoad elements in 16 bytes, of which each kGroup lie in one row of keys for every head_dim. four(): 4 elements.
// unit(): the kUnit elements of one step of the decode kernels through a row of keys in shared memory.

struct Float32 {
    static constexpr int kBytes = 4, kLoad = 4, kGroup = 4, kUnit = 4;
    static constexpr bool kScaled = false;
    __device__ static __forceinline__ void unpack(const uint4& raw, float (&out)[kLoad]) {
        out[0] = __uint_as_float(raw.x);
        out[1] = __uint_as_float(raw.y);
        out[2] = __uint_as_float(raw.z);
        out[3] = __uint_as_float(raw.w);
    }
    __device__ static __forceinline__ float4 four(const void* at) { return *static_cast<const float4*>(at); }
    __device__ static __forceinline__ void unit(const uint8_t* at, float (&out)[kUnit]) {
        unpack(*reinterpret_cast<const uint4*>(at), out);
    }
};

struct Float16 {
    static constexpr int kBytes = 2, kLoad = 8, kGroup = 8, kUnit = 8;
    static constexpr bool kScaled = false;
    __device__ static __forceinline__ void unpack(const uint4& raw, float (&out)[kLoad]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = half2_to_float2(words[i]);
            out[2 * i] = pair.x;
            out[2 * i + 1] = pair.y;
        }
    }
    __device__ static __forceinline__ float4 four(const void* at) {
        const uint2 raw = *static_cast<const uint2*>(at);
        const float2 low = half2_to_float2(raw.x), high = half2_to_float2(raw.y);
        return make_float4(low.x, low.y, high.x, high.y);
    }
    __device__ static __forceinline__ void unit(const uint8_t* at, float (&out)[kUnit]) {
        unpack(*reinterpret_cast<const uint4*>(at), out);
    }
};

struct Int8 {
    static constexpr int kBytes = 1, kLoad = 16, kGroup = 8, kUnit = 8;  // a row of 72 begins in the middle of 16 bytes
    static constexpr bool kScaled = true;
    __device__ static __forceinline__ float byte(uint32_t word, int index) {
        return static_cast<float>(static_cast<int8_t>(word >> (8 * index)));
    }
    __device__ static __forceinline__ void unpack(const uint4& raw, float (&out)[kLoad]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < kLoad; ++i) out[i] = byte(words[i / 4], i % 4);
    }
    __device__ static __forceinline__ float4 four(const void* at) {
        const uint32_t word = *static_cast<const uint32_t*>(at);
        return make_float4(byte(word, 0), byte(word, 1), byte(word, 2), byte(word, 3));
    }
    __device__ static __forceinline__ void unit(const uint8_t* at, float (&out)[kUnit]) {
        const uint2 raw = *reinterpret_cast<const uint2*>(at);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) out[i] = byte(i < 4 ? raw.x : raw.y, i % 4);
    }
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int clamp(int value, int low, int high) { return max(low, min(value, high)); }

// --- the piece of work ---

// Consecutive tokens of one batch row or segment.
struct Piece {
    int row;         // batch row, or number of the segment; -1: tokens of no segment, whose output is zero
    int begin;       // of the row or segment in the packed tensors: token 0 of it
    int token;       // first token, counted in the row or segment
    int tokens;      // rows of the output that this piece writes
    int valid;       // the first so many of them are queries; the others get zeros
    int position;    // of the first token among the keys
    int keys;        // of the row or segment: key j exists for 0 <= j < keys
    int block;       // query block, counted in the row or segment
    int blocks_before;  // query blocks of earlier segments
};

// Sum of the values of earlier threads. scratch: 4 integers.
__device__ __forceinline__ int exclusive_sum(int value, int* scratch) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    int sum = value;
#pragma unroll
    for (int apart = 1; apart < kWarp; apart *= 2) {
        const int other = __shfl_up_sync(kFullMask, sum, static_cast<unsigned>(apart));
        sum += lane >= apart ? other : 0;
    }
    __syncthreads();
    if (lane == kWarp - 1) scratch[warp] = sum;
    __syncthreads();
    for (int i = 0; i < warp; ++i) sum += scratch[i];
    return sum - value;
}

// Pieces of a row of `tokens`: a query block at a time, a block cut every `step` tokens.
__device__ __forceinline__ int pieces_of(int tokens, int block, int step) {
    return tokens / block * ceil_div(block, step) + ceil_div(tokens % block, step);
}

// Piece `index` of the causal batch row `row`.
__device__ __forceinline__ Piece causal_piece(const P& p, int row, int index, int block, int step) {
    const int past = clamp(p.past_lengths[row], 0, p.capacity);
    const int queries = clamp(p.query_lengths[row], 0, p.tokens);
    const int per_block = ceil_div(block, step);
    Piece piece;
    piece.row = row;
    piece.begin = row * p.tokens;
    piece.block = index / per_block;
    const int in_block = index % per_block * step;
    piece.token = piece.block * block + in_block;
    piece.tokens = max(0, min(min(step, block - in_block), p.tokens - piece.token));
    piece.valid = clamp(queries - piece.token, 0, piece.tokens);
    piece.position = past + piece.token;
    piece.keys = min(past + queries, p.capacity);
    piece.blocks_before = 0;
    return piece;
}

// Piece `index` of all segments. The tokens before the first segment and after the last count as segments without
// keys, so that their output is written. The whole block calls it; scratch: 16 integers.
__device__ __forceinline__ Piece segment_piece(const P& p, int index, int block, int step, int* scratch) {
    const int thread = static_cast<int>(threadIdx.x);
    const int ranges = p.segments + 2, each = ceil_div(ranges, kAttentionThreads);
    auto bound = [&](int i) {
        return i == 0 ? 0 : i > p.segments + 1 ? p.tokens : clamp(p.cu_seqlens[i - 1], 0, p.tokens);
    };
    int pieces = 0, blocks = 0;
    for (int i = thread * each; i < min(ranges, (thread + 1) * each); ++i) {
        const int tokens = max(0, bound(i + 1) - bound(i));
        pieces += pieces_of(tokens, block, step);
        blocks += ceil_div(tokens, block);
    }
    pieces = exclusive_sum(pieces, scratch);
    blocks = exclusive_sum(blocks, scratch + 4);
    if (thread == 0) scratch[8] = -1;
    __syncthreads();
    for (int i = thread * each; i < min(ranges, (thread + 1) * each); ++i) {
        const int begin = bound(i), tokens = max(0, bound(i + 1) - begin);
        const int count = pieces_of(tokens, block, step);
        if (index >= pieces && index < pieces + count) {
            scratch[8] = i;
            scratch[9] = begin;
            scratch[10] = tokens;
            scratch[11] = index - pieces;
            scratch[12] = blocks;
        }
        pieces += count;
        blocks += ceil_div(tokens, block);
    }
    __syncthreads();
    Piece piece{-1, 0, 0, 0, 0, 0, 0, 0, 0};
    if (scratch[8] < 0) return piece;  // beyond the last piece
    const int per_block = ceil_div(block, step), tokens = scratch[10];
    const bool real = scratch[8] >= 1 && scratch[8] <= p.segments;
    piece.row = real ? scratch[8] - 1 : -1;
    piece.begin = scratch[9];
    piece.block = scratch[11] / per_block;
    const int in_block = scratch[11] % per_block * step;
    piece.token = piece.block * block + in_block;
    piece.tokens = min(min(step, block - in_block), tokens - piece.token);
    piece.valid = real ? piece.tokens : 0;
    piece.position = piece.token;
    piece.keys = real ? tokens : 0;
    piece.blocks_before = scratch[12];
    return piece;
}

// --- what is visible ---

// Keys of one query row: j is visible iff begin <= j < end or j < sink.
struct Visible {
    int begin, end, sink;
    __device__ __forceinline__ bool operator()(int key) const { return (key >= begin && key < end) || key < sink; }
};

__device__ __forceinline__ Visible visible_to(const P& p, const Piece& piece, int token) {
    Visible seen{0, 0, 0};
    if (token >= piece.valid) return seen;
    const int position = piece.position + token;
    seen.end = p.mode == kCausal ? min(position + 1, piece.keys) : piece.keys;
    if (p.pattern == kWindow) {
        seen.sink = min(p.sink, seen.end);
        seen.begin = max(0, position - (p.window - 1));
        if (p.mode == kSegment && p.window < seen.end - position) seen.end = position + p.window;
    }
    return seen;
}

// Keys that any row of the piece sees.
__device__ __forceinline__ Visible visible_to_any(const P& p, const Piece& piece) {
    if (piece.valid == 0) return Visible{0, 0, 0};
    Visible seen = visible_to(p, piece, piece.valid - 1);
    seen.begin = visible_to(p, piece, 0).begin;
    return seen;
}

// --- the tiles of keys that a block visits, in rising order ---

struct KeyTiles {
    int count;
    int head;   // tiles 0 … head - 1 hold the sink; then comes tile `body`
    int body;
    int per_block;      // tiles in a key block of the list
    const int32_t* list;  // null: no blocks

    __device__ __forceinline__ int tile(int index) const {
        if (list != nullptr) return list[index / per_block] * per_block + index % per_block;
        return index < head ? index : index - head + body;
    }
};

// Which row of the lists of kept blocks belongs to a piece; -1: none, nothing is kept.
__device__ __forceinline__ int list_row(const P& p, const Piece& piece, int kv_head) {
    if (p.pattern == kDynamic) {
        const int row = p.mode == kCausal ? piece.row : 0, block = piece.blocks_before + piece.block;
        if (block >= p.query_blocks) return -1;  // only if cu_seqlens falls
        return (row * p.kv_heads + kv_head) * p.query_blocks + block;
    }
    if (piece.block >= p.given_query_blocks) return -1;
    const int row = p.given_batch > 1 ? piece.row : 0, head = p.given_heads > 1 ? kv_head : 0;
    return (row * p.given_heads + head) * p.given_query_blocks + piece.block;
}

__device__ __forceinline__ KeyTiles key_tiles(const P& p, const Piece& piece, const Visible& any, int kv_head,
                                              int keys) {
    KeyTiles tiles{0, 0, 0, 1, nullptr};
    if (any.end == 0) return tiles;
    const int last = ceil_div(any.end, keys);
    if (p.pattern == kDense || p.pattern == kWindow) {
        tiles.head = ceil_div(any.sink, keys);
        tiles.body = max(tiles.head, any.begin / keys);
        tiles.count = tiles.head + max(0, last - tiles.body);
        return tiles;
    }
    const int row = list_row(p, piece, kv_head);
    if (row < 0) return tiles;
    tiles.list = p.lists + static_cast<int64_t>(row) * p.list_width;
    tiles.per_block = p.block_size / keys;
    int low = 0, high = p.counts[row];  // the blocks that begin before any.end
    while (low < high) {
        const int middle = (low + high) / 2;
        if (tiles.list[middle] < ceil_div(any.end, p.block_size)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low > 0) {
        const int in_last = last - tiles.list[low - 1] * tiles.per_block;
        tiles.count = (low - 1) * tiles.per_block + min(tiles.per_block, in_last);
    }
    return tiles;
}

}  // namespace sparse_attention
}  // namespace deepstitch
