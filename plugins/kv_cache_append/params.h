// The arguments of the kernels of kv_cache_append.
#pragma once

#include "../common/types.h"

namespace deepstitch {

constexpr int kAppendThreads = 128;  // a warp for a row of one head: 4 rows to a block
constexpr int kCopyThreads = 256;
constexpr int kCopyLoads = 4;  // of 16 bytes, on their way in one thread

// Of the keys, and of the values: blockIdx.y says which.
struct KVCacheAppendParams {
    const float* key;  // [batch, tokens, kv_heads * head_dim]
    const float* value;
    void* present_key;  // [batch, kv_heads, capacity, head_dim]
    void* present_value;
    float* key_scales;  // [batch, kv_heads, capacity], int8 only
    float* value_scales;
    const int32_t* past_lengths;   // [batch]
    const int32_t* query_lengths;  // [batch]
    int32_t rows;                  // batch * tokens * kv_heads
    int32_t tokens;
    int32_t kv_heads;
    int32_t capacity;
    int32_t head_dim;
};

// Of the keys, and of the values, or of the scales of both.
struct KVCacheCopyParams {
    const void* past_key;
    const void* past_value;
    void* present_key;
    void* present_value;
    int64_t bytes;  // of one of them
};

}  // namespace deepstitch
