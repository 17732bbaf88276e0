// The argument of every kernel of sparse_attention, and the sizes that kernels and host agree on.
#pragma once

#include "../common/types.h"

namespace deepstitch {

enum SparseAttentionMode : int32_t { kCausal = 0, kSegment = 1 };
enum SparseAttentionPattern : int32_t { kDense = 0, kWindow = 1, kLayout = 2, kDynamic = 3 };

constexpr int kAttentionThreads = 128;
// Prefill: a tile is 64 query rows (tokens times the query heads of one kv head) against 32 keys at a time.
constexpr int kPrefillRows = 64;
constexpr int kPrefillKeys = 32;
// Decode: up to this many query rows in all, at most 16 in a block, each block a part of the keys.
constexpr int kDecodeRows = 64;
constexpr int kDecodeRowsPerBlock = 16;
constexpr int kAttentionMaxHeadDim = 128;
// The selection keeps one score and one flag per key block in shared memory.
constexpr int kMaxKeyBlocks = 8192;

// The keys are split so that there are at most this many blocks, if that many are not there without a split.
constexpr int kMostDecodeBlocks = 1024;

// Keys in a tile of the decode kernels, by bytes of an element.
constexpr int decode_keys(int bytes) { return bytes == 4 ? 32 : 64; }
// A row of keys in shared memory, in units of 16 bytes (int8: 8). Odd, so that neighbouring keys lie in other banks.
constexpr int decode_unit(int bytes) { return bytes == 1 ? 8 : 16; }
constexpr int decode_stride(int head_dim, int bytes) { return (head_dim * bytes / decode_unit(bytes)) | 1; }

// Blocks of a decode kernel that a multiprocessor holds: what __launch_bounds__ in kernel.cuh asks for.
constexpr int decode_blocks_per_multiprocessor(int rows) { return rows == 4 ? 4 : rows == 8 ? 3 : 2; }

// Dynamic shared memory of a decode kernel: the tile (at the end the sums of all slices), queries, weights, scales.
constexpr int decode_tile_bytes(int head_dim, int bytes, int rows) {
    const int tile = decode_keys(bytes) * decode_stride(head_dim, bytes) * decode_unit(bytes);
    const int sums = rows * head_dim * 4;
    return ((tile > sums ? tile : sums) + 15) / 16 * 16;
}
constexpr int decode_shared_bytes(int head_dim, int bytes, int rows) {
    return decode_tile_bytes(head_dim, bytes, rows) + rows * head_dim * 4 + decode_keys(bytes) * rows * 4 + rows * 4;
}

struct SparseAttentionParams {
    const float* query;          // causal [batch, tokens, heads * head_dim]; segment [tokens, heads * head_dim]
    const void* key;             // causal [batch, kv_heads, capacity, head_dim]; segment [tokens, kv_heads * head_dim]
    const void* value;           // likewise
    const float* key_scales;     // [batch, kv_heads, capacity], int8 only
    const float* value_scales;   // likewise
    const int32_t* past_lengths;   // [batch], causal
    const int32_t* query_lengths;  // [batch], causal
    const int32_t* cu_seqlens;     // [segments + 1], segment
    const int32_t* layout;         // [given_batch, given_heads, given_query_blocks, given_key_blocks]
    const float* gate_scores;      // likewise
    float* output;                 // as query

    int32_t* counts;      // [rows of lists] key blocks kept
    int32_t* lists;       // [rows of lists, list_width] which, in rising order
    float* pooled_query;  // [batch, kv_heads, query_blocks, head_dim]
    const float* pooled_key;  // [batch, kv_heads, key_blocks, head_dim], an input or made from the keys
    float* partial;       // [batch * kv_heads, splits, rows, head_dim] sums of one part of the keys
    float* partial_stats;  // [batch * kv_heads, splits, rows, 2] its largest score and its sum of weights

    int32_t mode;
    int32_t pattern;
    int32_t batch;     // 1 for segments
    int32_t tokens;    // of a batch row; of all segments
    int32_t segments;
    int32_t heads;
    int32_t kv_heads;
    int32_t head_dim;
    int32_t capacity;  // keys of a batch row; tokens for segments
    int32_t window;
    int32_t sink;
    int32_t block_size;   // layout and dynamic
    int32_t top_n;
    int32_t list_width;
    int32_t query_blocks;  // of a batch row; of all segments (at most)
    int32_t key_blocks;    // likewise
    int32_t given_batch;   // of layout or gate_scores; 1: the same for all
    int32_t given_heads;
    int32_t given_query_blocks;
    int32_t given_key_blocks;
    int32_t splits;  // parts of the keys, decode
    float scale;
};

}  // namespace deepstitch
