// SparseAttention: every kernel by name. The mathematics is in README.md, the device code in the files included here.
#pragma once

#include "decode.cuh"
#include "params.h"
#include "prefill.cuh"
#include "select.cuh"

#define DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, D)                                                \
    DEEPSTITCH_KERNEL(sparse_attention_prefill_##suffix##_d##D, deepstitch::SparseAttentionParams, 128, 2) { \
        deepstitch::sparse_attention::prefill<deepstitch::sparse_attention::Kv, D>(p);             \
    }

#define DEEPSTITCH_ATTENTION_DECODE(suffix, Kv, rows)                                                  \
    DEEPSTITCH_KERNEL(sparse_attention_decode_##suffix##_r##rows, deepstitch::SparseAttentionParams, 128, \
                      deepstitch::decode_blocks_per_multiprocessor(rows)) {                            \
        deepstitch::sparse_attention::decode<deepstitch::sparse_attention::Kv, rows>(p);               \
    }

#define DEEPSTITCH_ATTENTION_FORMAT(suffix, Kv)                                                        \
    DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, 64)                                                       \
    DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, 72)                                                       \
    DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, 80)                                                       \
    DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, 96)                                                       \
    DEEPSTITCH_ATTENTION_PREFILL(suffix, Kv, 128)                                                      \
    DEEPSTITCH_ATTENTION_DECODE(suffix, Kv, 4)                                                         \
    DEEPSTITCH_ATTENTION_DECODE(suffix, Kv, 8)                                                         \
    DEEPSTITCH_ATTENTION_DECODE(suffix, Kv, 16)                                                        \
    DEEPSTITCH_KERNEL(sparse_attention_pool_keys_##suffix, deepstitch::SparseAttentionParams, 128, 8) { \
        deepstitch::sparse_attention::pool_keys<deepstitch::sparse_attention::Kv>(p);                  \
    }

DEEPSTITCH_ATTENTION_FORMAT(float32, Float32)
DEEPSTITCH_ATTENTION_FORMAT(float16, Float16)
DEEPSTITCH_ATTENTION_FORMAT(int8, Int8)

DEEPSTITCH_KERNEL(sparse_attention_merge, deepstitch::SparseAttentionParams, 128, 8) {
    deepstitch::sparse_attention::merge(p);
}

DEEPSTITCH_KERNEL(sparse_attention_pool_queries, deepstitch::SparseAttentionParams, 128, 8) {
    deepstitch::sparse_attention::pool_queries(p);
}

DEEPSTITCH_KERNEL(sparse_attention_layout, deepstitch::SparseAttentionParams, 128, 8) {
    deepstitch::sparse_attention::list_layout(p);
}

DEEPSTITCH_KERNEL(sparse_attention_select, deepstitch::SparseAttentionParams, 128, 8) {
    deepstitch::sparse_attention::select(p);
}
