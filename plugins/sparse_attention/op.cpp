// SparseAttention on the host: attributes, shapes, workspace, which kernels run.
#include <algorithm>

#include "config.h"

namespace deepstitch {
namespace {

constexpr int64_t kMostGrid = 65535;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int32_t small(int64_t value) { return static_cast<int32_t>(value); }

// Into how many parts (1 to `most`) to cut the keys where `blocks` blocks are there without a cut and `places` run at
// once: the first count whose last wave of blocks leaves few places empty, else the best.
int64_t splits_of(int64_t blocks, int64_t places, int64_t most) {
    int64_t best = 1;
    double best_use = 0;
    for (int64_t splits = 1; splits <= most && best_use < 0.95; ++splits) {
        const int64_t waves = ceil_div(blocks * splits, places);
        const double use = static_cast<double>(blocks * splits) / static_cast<double>(waves * places);
        if (use > best_use) {
            best = splits;
            best_use = use;
        }
    }
    return best;
}

// Parts of the workspace, one after the other, each aligned to 256 bytes.
class Carver {
public:
    explicit Carver(void* base) : base_(static_cast<uint8_t*>(base)) {}
    template <class T>
    void take(T*& pointer, int64_t elements) {
        pointer = base_ == nullptr || elements == 0 ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
        bytes_ += (static_cast<size_t>(elements) * sizeof(T) + 255) / 256 * 256;
    }
    size_t bytes() const { return bytes_; }

private:
    uint8_t* base_;
    size_t bytes_ = 0;
};

class SparseAttention final : public Op {
public:
    explicit SparseAttention(const Attributes& attributes) : c_(attributes) {}
    std::vector<TensorSpec> inputs() const override { return c_.inputs(); }
    std::vector<TensorSpec> outputs() const override { return {{"output", {DType::kFloat32}}}; }
    std::vector<DimRule> output_shape(int, const std::vector<int>& ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis < ranks[0]; ++axis) rules.push_back({0, axis, 0});
        return rules;
    }
    DType output_dtype(int, const std::vector<DType>&) const override { return DType::kFloat32; }
    void check(const std::vector<Tensor>& inputs) const override;
    size_t workspace(const std::vector<Tensor>& inputs) const override {
        SparseAttentionParams p = params(inputs);
        return carve(p, nullptr);
    }
    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
                 Launcher& launcher) const override;

private:
    size_t given_index() const { return inputs().size() - 1; }  // of layout or gate_scores
    void check_causal(const std::vector<Tensor>& inputs) const;
    void check_segment(const std::vector<Tensor>& inputs) const;
    void check_given(const std::vector<Tensor>& inputs, int64_t rows, int64_t query_blocks, int64_t key_blocks) const;
    SparseAttentionParams params(const std::vector<Tensor>& inputs) const;
    bool decodes(const SparseAttentionParams& p) const {
        return c_.mode == kCausal && p.tokens * c_.group() <= kDecodeRows;
    }
    int64_t key_tiles(const SparseAttentionParams& p) const {
        return ceil_div(p.capacity, decode_keys(static_cast<int>(dtype_bytes(c_.format))));
    }
    size_t carve(SparseAttentionParams& p, void* base) const;
    void select(const SparseAttentionParams& p, Launcher& launcher) const;
    void decode(SparseAttentionParams p, Launcher& launcher) const;
    void prefill(const SparseAttentionParams& p, Launcher& launcher) const;

    const SparseAttentionConfig c_;
};

void SparseAttention::check(const std::vector<Tensor>& inputs) const {
    if (c_.mode == kCausal) {
        check_causal(inputs);
    } else {
        check_segment(inputs);
    }
}

void SparseAttention::check_causal(const std::vector<Tensor>& inputs) const {
    const Shape& query = inputs[0].shape;
    const Shape& cache = inputs[1].shape;
    require(query.rank == 3, "query has shape ", query, "; it is [batch, tokens, num_heads * head_dim]");
    require(query.dims[2] == c_.heads * c_.head_dim, "query has ", query.dims[2], " columns; num_heads * head_dim = ",
            c_.heads * c_.head_dim);
    require(cache.rank == 4 && cache.dims[0] == query.dims[0] && cache.dims[1] == c_.kv_heads &&
                cache.dims[3] == c_.head_dim,
            "key_cache has shape ", cache, "; it is [batch, kv_num_heads, capacity, head_dim] = [", query.dims[0], ", ",
            c_.kv_heads, ", capacity, ", c_.head_dim, "]");
    require(inputs[2].shape == cache, "value_cache has shape ", inputs[2].shape, ", key_cache ", cache,
            "; they must be the same");
    const int64_t batch = query.dims[0], tokens = query.dims[1], capacity = cache.dims[2];
    require(capacity >= tokens, "the capacity of the cache is ", capacity, ", but there are ", tokens,
            " new tokens, which lie in it already");
    require(capacity >= 1 && capacity <= kMostTokens && batch <= kMostGrid && batch * c_.kv_heads <= kMostGrid &&
                batch * tokens <= kMostTokens,
            "query ", query, " and key_cache ", cache, " are too large: batch * kv_num_heads may be ", kMostGrid,
            ", batch * tokens and capacity ", kMostTokens);
    size_t next = 3;
    if (c_.format == DType::kInt8) {
        // Rows of 72 bytes: an even number of them is a whole number of 16 bytes.
        require(c_.head_dim != 72 || capacity % 2 == 0, "the capacity of the cache is ", capacity,
                "; with int8 and head_dim 72 it must be even");
        for (const char* name : {"key_scales", "value_scales"}) {
            const Shape& scales = inputs[next++].shape;
            Shape expected = cache;
            expected.rank = 3;
            expected.dims[3] = 0;
            require(scales == expected, name, " has shape ", scales, "; it is one scale per token of the cache, ",
                    expected);
        }
    }
    for (const char* name : {"past_lengths", "query_lengths"}) {
        const Shape& lengths = inputs[next++].shape;
        require(lengths.rank == 1 && lengths.dims[0] == batch, name, " has shape ", lengths, "; it is [batch] = [",
                batch, "]");
    }
    if (!c_.listed()) return;
    const int64_t key_blocks = ceil_div(capacity, c_.block_size);
    if (c_.given()) check_given(inputs, batch, ceil_div(tokens, c_.block_size), key_blocks);
    if (c_.has_pooled_keys) {
        const Shape& pooled = inputs.back().shape;
        Shape expected = cache;
        expected.dims[2] = key_blocks;
        require(pooled == expected, "pooled_keys has shape ", pooled, "; it is one row per block of ", c_.block_size,
                " keys, ", expected);
    }
    require(key_blocks <= kMaxKeyBlocks, "the cache has ", key_blocks, " blocks of ", c_.block_size, "; at most ",
            kMaxKeyBlocks);
}

void SparseAttention::check_segment(const std::vector<Tensor>& inputs) const {
    const Shape& query = inputs[0].shape;
    const Shape& key = inputs[1].shape;
    const Shape& bounds = inputs[3].shape;
    require(query.rank == 2 && query.dims[1] == c_.heads * c_.head_dim, "query has shape ", query,
            "; it is [tokens, num_heads * head_dim] with ", c_.heads * c_.head_dim, " columns");
    require(key.rank == 2 && key.dims[0] == query.dims[0] && key.dims[1] == c_.kv_heads * c_.head_dim,
            "key has shape ", key, "; it is [tokens, kv_num_heads * head_dim] = [", query.dims[0], ", ",
            c_.kv_heads * c_.head_dim, "]");
    require(inputs[2].shape == key, "value has shape ", inputs[2].shape, ", key ", key, "; they must be the same");
    require(bounds.rank == 1 && bounds.dims[0] >= 1, "cu_seqlens has shape ", bounds,
            "; it is [segments + 1], the beginnings of the segments and the end of the last");
    require(query.dims[0] <= kMostTokens && bounds.dims[0] <= 1 << 24 && c_.kv_heads <= kMostGrid, "query ", query,
            " and cu_seqlens ", bounds, " are too large");
    if (!c_.listed()) return;
    const int64_t key_blocks = ceil_div(query.dims[0], c_.block_size);
    require(key_blocks <= kMaxKeyBlocks, "there are ", key_blocks, " blocks of ", c_.block_size, "; at most ",
            kMaxKeyBlocks);
    if (c_.given()) check_given(inputs, bounds.dims[0] - 1, -1, -1);
}

// The tensor [rows or 1, kv_num_heads or 1, query blocks, key blocks]; -1: any number of blocks.
void SparseAttention::check_given(const std::vector<Tensor>& inputs, int64_t rows, int64_t query_blocks,
                                  int64_t key_blocks) const {
    const char* name = c_.gate ? "gate_scores" : "layout";
    const Shape& given = inputs[given_index()].shape;
    require(given.rank == 4, name, " has shape ", given, "; it is [", c_.mode == kCausal ? "batch" : "segments",
            " or 1, kv_num_heads or 1, query blocks, key blocks]");
    require(given.dims[0] == rows || given.dims[0] == 1, name, " has shape ", given, "; its first axis is ", rows,
            " or 1");
    require(given.dims[1] == c_.kv_heads || given.dims[1] == 1, name, " has shape ", given,
            "; its second axis is kv_num_heads = ", c_.kv_heads, " or 1: the query heads of a kv head share it");
    if (query_blocks >= 0) {
        require(given.dims[2] == query_blocks && given.dims[3] == key_blocks, name, " has shape ", given,
                "; there are ", query_blocks, " query blocks and ", key_blocks, " key blocks of ", c_.block_size);
    }
    require(given.dims[2] >= 0 && given.dims[2] <= 1 << 20 && given.dims[3] >= (query_blocks >= 0 ? 0 : 1) &&
                given.dims[3] <= kMaxKeyBlocks && given.dims[0] <= kMostGrid,
            name, " has shape ", given, "; at most ", kMaxKeyBlocks, " key blocks");
}

SparseAttentionParams SparseAttention::params(const std::vector<Tensor>& inputs) const {
    SparseAttentionParams p{};
    auto ints = [&](size_t i) { return static_cast<const int32_t*>(inputs[i].data); };
    auto floats = [&](size_t i) { return static_cast<const float*>(inputs[i].data); };
    p.query = floats(0);
    p.key = inputs[1].data;
    p.value = inputs[2].data;
    const Shape& query = inputs[0].shape;
    if (c_.mode == kCausal) {
        size_t next = 3;
        if (c_.format == DType::kInt8) {
            p.key_scales = floats(next++);
            p.value_scales = floats(next++);
        }
        p.past_lengths = ints(next++);
        p.query_lengths = ints(next++);
        p.batch = small(query.dims[0]);
        p.tokens = small(query.dims[1]);
        p.capacity = small(inputs[1].shape.dims[2]);
    } else {
        p.cu_seqlens = ints(3);
        p.batch = 1;
        p.tokens = p.capacity = small(query.dims[0]);
        p.segments = small(inputs[3].shape.dims[0] - 1);
    }
    if (c_.listed()) {
        // Of all segments: each begins a block, and so do the tokens before the first and after the last.
        const int64_t more = c_.mode == kCausal ? 0 : int64_t{p.segments} + 2;
        p.query_blocks = small(ceil_div(p.tokens, c_.block_size) + more);
        p.key_blocks = small(ceil_div(p.capacity, c_.block_size) + more);
    }
    if (c_.given()) {
        const Shape& given = inputs[given_index()].shape;
        if (c_.gate) p.gate_scores = floats(given_index());
        if (!c_.gate) p.layout = ints(given_index());
        p.given_batch = small(given.dims[0]);
        p.given_heads = small(given.dims[1]);
        p.given_query_blocks = small(given.dims[2]);
        p.given_key_blocks = small(given.dims[3]);
    }
    if (c_.has_pooled_keys) p.pooled_key = floats(inputs.size() - 1);
    p.mode = c_.mode;
    p.pattern = c_.pattern;
    p.heads = small(c_.heads);
    p.kv_heads = small(c_.kv_heads);
    p.head_dim = small(c_.head_dim);
    p.window = small(c_.window);
    p.sink = small(c_.sink);
    p.block_size = small(c_.block_size);
    p.top_n = small(c_.top_n);
    p.scale = c_.scale;
    // First block and diagonal (two blocks where the past ends within one) are kept whatever top_n says.
    const int64_t blocks = c_.block_size == 0 ? 0 : ceil_div(p.capacity, c_.block_size);
    p.list_width = c_.pattern == kLayout ? p.given_key_blocks : small(std::min(blocks, std::max<int64_t>(c_.top_n, 4)));
    return p;
}

size_t SparseAttention::carve(SparseAttentionParams& p, void* base) const {
    Carver workspace(base);
    if (c_.listed()) {
        const int64_t heads = int64_t{p.batch} * c_.kv_heads;
        const int64_t rows = c_.pattern == kLayout ? int64_t{p.given_batch} * p.given_heads * p.given_query_blocks
                                                 : heads * p.query_blocks;
        workspace.take(p.counts, rows);
        workspace.take(p.lists, rows * p.list_width);
        if (c_.pattern == kDynamic && !c_.gate) {
            workspace.take(p.pooled_query, heads * p.query_blocks * c_.head_dim);
            if (!c_.has_pooled_keys) workspace.take(p.pooled_key, heads * p.key_blocks * c_.head_dim);
        }
    }
    if (c_.mode == kCausal) {
        // Whoever asks with the largest shapes decodes with smaller ones: each bound here grows with every shape.
        const int64_t rows = std::min<int64_t>(p.tokens, kDecodeRows / c_.group()) * c_.group();
        const int64_t heads = int64_t{p.batch} * c_.kv_heads;
        const int64_t blocks = std::max<int64_t>(kMostDecodeBlocks, heads * ceil_div(rows, kDecodeRowsPerBlock));
        const int64_t parts = std::min(blocks * kDecodeRowsPerBlock, heads * rows * key_tiles(p));
        workspace.take(p.partial, parts * c_.head_dim);
        workspace.take(p.partial_stats, parts * 2);
    }
    return workspace.bytes();
}

void SparseAttention::select(const SparseAttentionParams& p, Launcher& launcher) const {
    const auto batch = static_cast<uint32_t>(p.batch), heads = static_cast<uint32_t>(c_.kv_heads);
    const Launcher::Dim3 block{kAttentionThreads, 1, 1};
    if (c_.pattern == kLayout) {
        const Launcher::Dim3 grid{static_cast<uint32_t>(p.given_query_blocks), static_cast<uint32_t>(p.given_heads),
                                  static_cast<uint32_t>(p.given_batch)};
        if (grid.x == 0 || grid.z == 0) return;
        launcher.launch("sparse_attention_layout", grid, block, static_cast<size_t>(p.given_key_blocks), &p, sizeof p);
        return;
    }
    const Launcher::Dim3 queries{static_cast<uint32_t>(p.query_blocks), heads, batch};
    if (!c_.gate && !c_.has_pooled_keys) {
        const std::string pool = concat("sparse_attention_pool_keys_", c_.format);
        launcher.launch(pool.c_str(), {static_cast<uint32_t>(p.key_blocks), heads, batch}, block, 0, &p, sizeof p);
    }
    if (!c_.gate) {
        launcher.launch("sparse_attention_pool_queries", queries, block, 0, &p, sizeof p);
    }
    const int64_t candidates = ceil_div(p.capacity, c_.block_size);
    launcher.launch("sparse_attention_select", queries, block, static_cast<size_t>(candidates) * 5, &p, sizeof p);
}

void SparseAttention::decode(SparseAttentionParams p, Launcher& launcher) const {
    const int64_t rows = p.tokens * c_.group(), heads = int64_t{p.batch} * c_.kv_heads;
    const int bytes = static_cast<int>(dtype_bytes(c_.format)), per_block = rows <= 4 ? 4 : rows <= 8 ? 8 : 16;
    const int64_t groups = ceil_div(rows, per_block);
    p.splits = small(splits_of(heads * groups, launcher.multiprocessors() * decode_blocks_per_multiprocessor(per_block),
                               std::min(key_tiles(p), kMostDecodeBlocks / (heads * groups))));
    const Launcher::Dim3 block{kAttentionThreads, 1, 1};
    const Launcher::Dim3 grid{static_cast<uint32_t>(groups), static_cast<uint32_t>(p.splits),
                              static_cast<uint32_t>(heads)};
    const std::string kernel = concat("sparse_attention_decode_", c_.format, "_r", per_block);
    const auto shared = static_cast<size_t>(decode_shared_bytes(static_cast<int>(c_.head_dim), bytes, per_block));
    launcher.launch(kernel.c_str(), grid, block, shared, &p, sizeof p);
    launcher.launch("sparse_attention_merge", {static_cast<uint32_t>(rows), grid.z, 1}, block, 0, &p, sizeof p);
}

void SparseAttention::prefill(const SparseAttentionParams& p, Launcher& launcher) const {
    // pieces_of() in tiles.cuh: the query blocks of the patterns with lists are cut into pieces of their own.
    const int64_t step = kPrefillRows / c_.group(), query_block = c_.listed() ? c_.block_size : step;
    const int64_t per_block = ceil_div(query_block, step);
    const int64_t pieces = c_.mode == kCausal
                               ? p.tokens / query_block * per_block + ceil_div(p.tokens % query_block, step)
                               : ceil_div(int64_t{p.tokens} * per_block, query_block) + p.segments + 2;
    const Launcher::Dim3 grid{static_cast<uint32_t>(pieces), static_cast<uint32_t>(c_.kv_heads),
                              static_cast<uint32_t>(p.batch)};
    const std::string kernel = concat("sparse_attention_prefill_", c_.format, "_d", c_.head_dim);
    launcher.launch(kernel.c_str(), grid, {kAttentionThreads, 1, 1}, 0, &p, sizeof p);
}

void SparseAttention::enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
                              Launcher& launcher) const {
    SparseAttentionParams p = params(inputs);
    if (p.batch == 0 || p.tokens == 0) return;
    p.output = static_cast<float*>(outputs[0].data);
    carve(p, workspace);
    if (c_.listed()) select(p, launcher);
    if (decodes(p)) {
        decode(p, launcher);
    } else {
        prefill(p, launcher);
    }
}

}  // namespace

const OpInfo& sparse_attention() {
    static const OpInfo info{"SparseAttention",
                             "1",
                             {{"num_heads", Kind::kInt, true, ""},
                              {"kv_num_heads", Kind::kInt, true, ""},
                              {"head_dim", Kind::kInt, true, ""},
                              {"scale", Kind::kFloat, true, ""},
                              {"mode", Kind::kString, false, "causal"},
                              {"kv_format", Kind::kString, false, "float32"},
                              {"pattern", Kind::kString, false, "dense"},
                              {"window", Kind::kInt, false, "0"},
                              {"sink", Kind::kInt, false, "0"},
                              {"block_size", Kind::kInt, false, "0"},
                              {"top_n", Kind::kInt, false, "0"},
                              {"gate", Kind::kInt, false, "0"},
                              {"has_pooled_keys", Kind::kInt, false, "0"}},
                             [](const Attributes& attributes) -> std::unique_ptr<Op> {
                                 return std::make_unique<SparseAttention>(attributes);
                             }};
    return info;
}

}  // namespace deepstitch
