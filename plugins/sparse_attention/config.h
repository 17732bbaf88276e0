// The attributes of SparseAttention, checked.
#pragma once

#include <string>
#include <vector>

#include "../common/op.h"
#include "params.h"

namespace deepstitch {

constexpr int64_t kMostTokens = INT32_MAX / 2;

// One of a list of names, as the number of its place.
inline int32_t choice(const Attributes& attributes, const char* name, std::vector<std::string> allowed) {
    const std::string& text = attributes.text(name);
    std::string all;
    for (size_t i = 0; i < allowed.size(); ++i) {
        if (allowed[i] == text) return static_cast<int32_t>(i);
        all += concat(i == 0 ? "" : ", ", allowed[i]);
    }
    refuse(name, " is '", text, "'; it must be one of ", all);
}

struct SparseAttentionConfig {
    int64_t heads, kv_heads, head_dim, window, sink, block_size, top_n;
    bool gate, has_pooled_keys;
    int32_t mode, pattern;  // SparseAttentionMode, SparseAttentionPattern
    DType format;           // of the cache
    float scale;

    explicit SparseAttentionConfig(const Attributes& attributes);  // throws Refusal
    std::vector<TensorSpec> inputs() const;
    bool listed() const { return pattern == kLayout || pattern == kDynamic; }
    bool given() const { return pattern == kLayout || gate; }  // the last input is layout or gate_scores
    int64_t group() const { return heads / kv_heads; }
};

inline SparseAttentionConfig::SparseAttentionConfig(const Attributes& attributes)
    : heads(attributes.integer("num_heads")),
      kv_heads(attributes.integer("kv_num_heads")),
      head_dim(attributes.integer("head_dim")),
      window(attributes.integer("window")),
      sink(attributes.integer("sink")),
      block_size(attributes.integer("block_size")),
      top_n(attributes.integer("top_n")),
      gate(attributes.integer("gate") == 1),
      has_pooled_keys(attributes.integer("has_pooled_keys") == 1),
      mode(choice(attributes, "mode", {"causal", "segment"})),
      pattern(choice(attributes, "pattern", {"dense", "window", "layout", "dynamic"})),
      format(static_cast<DType>(choice(attributes, "kv_format", {"float32", "float16", "int8"}))),
      scale(attributes.real("scale")) {
    require(heads >= 1 && heads <= 4096, "num_heads is ", heads, "; it must be 1 to 4096");
    require(kv_heads >= 1 && heads % kv_heads == 0, "kv_num_heads is ", kv_heads, "; it must divide num_heads = ",
            heads);
    require(group() <= kPrefillRows, "num_heads / kv_num_heads is ", group(), "; at most ", kPrefillRows,
            " query heads can share a kv head");
    require(head_dim == 64 || head_dim == 72 || head_dim == 80 || head_dim == 96 || head_dim == 128, "head_dim is ",
            head_dim, "; it must be 64, 72, 80, 96 or 128");
    require(scale > 0 && scale < 1e30F, "scale is ", scale, "; it must be positive, usually 1 / sqrt(head_dim)");
    require(mode == kCausal || format == DType::kFloat32, "kv_format is ", format,
            "; segment mode has no cache, its keys and values are float32");
    if (pattern == kWindow) {
        require(window >= 1 && window <= kMostTokens, "window is ", window,
                "; pattern window needs 1 or more, counting the query's own position");
        require(sink >= 0 && sink <= kMostTokens, "sink is ", sink, "; it must be 0 or more");
    } else {
        require(window == 0 && sink == 0, "window is ", window, " and sink is ", sink,
                "; they belong to pattern window and must be 0 otherwise");
    }
    if (listed()) {
        require(block_size == 64 || block_size == 128, "block_size is ", block_size, "; it must be 64 or 128");
    } else {
        require(block_size == 0, "block_size is ", block_size,
                "; it belongs to the patterns layout and dynamic and must be 0 otherwise");
    }
    if (pattern == kDynamic) {
        require(top_n >= 1 && top_n <= kMostTokens, "top_n is ", top_n, "; pattern dynamic needs 1 or more key blocks");
    } else {
        require(top_n == 0, "top_n is ", top_n, "; it belongs to pattern dynamic and must be 0 otherwise");
    }
    const int64_t given = attributes.integer("gate");
    require(given == 0 || (given == 1 && pattern == kDynamic), "gate is ", given,
            "; it must be 0, or 1 with pattern dynamic");
    const int64_t pooled = attributes.integer("has_pooled_keys");
    require(pooled == 0 || (pooled == 1 && pattern == kDynamic && mode == kCausal && !gate), "has_pooled_keys is ",
            pooled, "; it must be 0, or 1 with pattern dynamic of mode causal and gate 0");
}

inline std::vector<TensorSpec> SparseAttentionConfig::inputs() const {
    std::vector<TensorSpec> specs{{"query", {DType::kFloat32}}};
    if (mode == kCausal) {
        specs.push_back({"key_cache", {format}});
        specs.push_back({"value_cache", {format}});
        if (format == DType::kInt8) {
            specs.push_back({"key_scales", {DType::kFloat32}});
            specs.push_back({"value_scales", {DType::kFloat32}});
        }
        specs.push_back({"past_lengths", {DType::kInt32}});
        specs.push_back({"query_lengths", {DType::kInt32}});
    } else {
        specs.push_back({"key", {DType::kFloat32}});
        specs.push_back({"value", {DType::kFloat32}});
        specs.push_back({"cu_seqlens", {DType::kInt32}});
    }
    if (pattern == kLayout) specs.push_back({"layout", {DType::kInt32}});
    if (gate) specs.push_back({"gate_scores", {DType::kFloat32}});
    if (has_pooled_keys) specs.push_back({"pooled_keys", {DType::kFloat32}});
    return specs;
}

}  // namespace deepstitch
