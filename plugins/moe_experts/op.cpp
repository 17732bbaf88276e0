// MoEExperts: what it takes, what it refuses, and which kernels it starts.
#include <algorithm>
#include <string>
#include <vector>

#include "../common/linear_host.h"
#include "../common/op.h"
#include "params.h"
#include "tuning.h"

namespace deepstitch {
namespace {

constexpr MoEExpertsTuning kTuning;
static_assert(MoEExpertsTuning().planned_tokens <= kMoEPlannedTokens, "the plan kernel has room for so many");

constexpr int64_t kThreads = 256;
constexpr int kActivations = 4;
constexpr bool is_gated(int64_t activation) {
    return activation <= 1;
}

class MoEExperts final : public Op {
public:
    explicit MoEExperts(const Attributes& attributes)
        : format_(parse_linear_format(attributes.text("weight_format"))),
          block_size_(check_block_size(format_, attributes.integer("block_size"))),
          experts_(check_extent("num_experts", attributes.integer("num_experts"), kMoEMaxExperts)),
          intermediate_(check_extent("intermediate_size", attributes.integer("intermediate_size"), 1 << 18)) {
        const int64_t top_k = attributes.integer("top_k");
        require(top_k <= experts_, "top_k is ", top_k, ", but num_experts is ", experts_,
                "; a token has at most that many");
        top_k_ = check_extent("top_k", top_k, kMoEMaxTopK);
        const int64_t normalize = attributes.integer("norm_topk_prob"), gated = attributes.integer("gated");
        require(normalize == 0 || normalize == 1, "norm_topk_prob is ", normalize, "; it must be 0 or 1");
        require(gated == 0 || gated == 1, "gated is ", gated, "; it must be 0 or 1");
        normalize_ = normalize == 1;
        gated_ = gated == 1;
        read_activations(attributes.integers("activations"));
        check_inner("intermediate_size (I)", intermediate_, format_, block_size_);
    }

    std::vector<TensorSpec> inputs() const override {
        std::vector<TensorSpec> specs = {{"x", {DType::kFloat32}}, {"router_logits", {DType::kFloat32}}};
        add_matrix_inputs(specs, format_, "gate_up", "gate_up_scales");
        add_matrix_inputs(specs, format_, "down", "down_scales");
        return specs;
    }

    std::vector<TensorSpec> outputs() const override { return {{"y", {DType::kFloat32}}}; }

    std::vector<DimRule> output_shape(int, const std::vector<int>& input_ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis < input_ranks[0]; ++axis) rules.push_back({0, axis, 0});
        return rules;
    }

    DType output_dtype(int, const std::vector<DType>&) const override { return DType::kFloat32; }

    void check(const std::vector<Tensor>& inputs) const override {
        const Shape& x = inputs[0].shape;
        require(x.rank >= 1, "x has rank 0; it must be [..., H]");
        const int64_t hidden = hidden_of(x);
        check_inner("the last axis of x (H)", hidden, format_, block_size_);
        require(tokens_of(x) <= (1 << 24), "x has ", tokens_of(x), " tokens; at most ", 1 << 24, " are allowed");
        Shape logits = x;
        logits.dims[x.rank - 1] = experts_;
        require(inputs[1].shape == logits, "router_logits has shape ", inputs[1].shape, "; it must be ", logits,
                ": one number for each token of x and expert");
        check_matrix(inputs, 2, "gate_up", "gate_up_scales", format_, block_size_, {experts_, gate_up_rows()}, hidden);
        check_matrix(inputs, down_index(), "down", "down_scales", format_, block_size_, {experts_, hidden},
                     intermediate_);
    }

    size_t workspace(const std::vector<Tensor>& inputs) const override {
        const Shape& x = inputs[0].shape;
        return lay_out(nullptr, std::min(tokens_of(x), kTuning.chunk_tokens), hidden_of(x)).bytes;
    }

    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
                 Launcher& launcher) const override {
        const Shape& x = inputs[0].shape;
        const int64_t tokens = tokens_of(x), hidden = hidden_of(x);
        for (int64_t start = 0; start < tokens; start += kTuning.chunk_tokens) {
            const int64_t count = std::min(tokens - start, kTuning.chunk_tokens);
            Work work = lay_out(workspace, count, hidden);
            MoEExpertsParams& params = work.params;
            params.x = static_cast<const float*>(inputs[0].data) + start * hidden;
            params.logits = static_cast<const float*>(inputs[1].data) + start * experts_;
            params.gate_up = linear_matrix(inputs, 2, format_, gate_up_rows(), hidden, block_size_);
            params.down = linear_matrix(inputs, down_index(), format_, hidden, intermediate_, block_size_);
            params.y = static_cast<float*>(outputs[0].data) + start * hidden;
            run_chunk(work, launcher);
        }
    }

private:
    // The workspace as the kernels see it.
    struct Work {
        MoEExpertsParams params = {};
        unsigned char* x_units = nullptr;
        LinearMeta* x_meta = nullptr;
        unsigned char* activated_units = nullptr;
        LinearMeta* activated_meta = nullptr;
        size_t bytes = 0;
    };

    void read_activations(const std::vector<int64_t>& listed) {
        require(listed.size() == 1 || listed.size() == static_cast<size_t>(experts_), "activations has ", listed.size(),
                " values; it must have one for all experts or one for each of ", experts_);
        for (int expert = 0; expert < experts_; ++expert) {
            const int64_t activation = listed[listed.size() == 1 ? 0 : static_cast<size_t>(expert)];
            require(activation >= 0 && activation < kActivations, "activations has the value ", activation,
                    "; it must be 0 (SwiGLU), 1 (GeGLU), 2 (ReLU2) or 3 (SiLU)");
            require(gated_ || !is_gated(activation), "gated is 0, but expert ", expert, " has activation ", activation,
                    ", which multiplies with an up projection; set gated to 1 and give gate_up both halves");
            any_gated_ = any_gated_ || is_gated(activation);
            activations_[expert] = static_cast<uint8_t>(activation);
        }
    }

    static int64_t hidden_of(const Shape& x) { return x.dims[x.rank - 1]; }

    static int64_t tokens_of(const Shape& x) {
        int64_t tokens = 1;
        for (int axis = 0; axis + 1 < x.rank; ++axis) tokens *= x.dims[axis];
        return tokens;
    }

    int64_t gate_up_rows() const { return static_cast<int64_t>(intermediate_) * (gated_ ? 2 : 1); }
    int down_index() const { return linear_is_integer(format_) ? 4 : 3; }

    Work lay_out(void* base, int64_t tokens, int64_t hidden) const {
        const int64_t slots = tokens * top_k_;
        Pieces pieces(base);
        Work work;
        MoEExpertsParams& params = work.params;
        params.chosen = pieces.take<int32_t>(slots);
        params.weights = pieces.take<float>(slots);
        params.order = pieces.take<int32_t>(slots);
        params.firsts = pieces.take<int32_t>(experts_);
        params.counts = pieces.take<int32_t>(experts_);
        params.tiles = pieces.take<MoETile>(slots);
        params.tile_count = pieces.take<int32_t>(1);
        params.activated = pieces.take<float>(slots * intermediate_);
        params.results = pieces.take<float>(slots * hidden);
        if (linear_is_integer(format_)) {
            work.x_units = pieces.take<unsigned char>(tokens * hidden);
            work.x_meta = pieces.take<LinearMeta>(tokens * (hidden / kLinearGroup));
            work.activated_units = pieces.take<unsigned char>(slots * intermediate_);
            work.activated_meta = pieces.take<LinearMeta>(slots * (intermediate_ / kLinearGroup));
            params.x_units = work.x_units;
            params.x_meta = work.x_meta;
            params.activated_units = work.activated_units;
            params.activated_meta = work.activated_meta;
        }
        params.tokens = static_cast<int32_t>(tokens);
        params.experts = experts_;
        params.top_k = top_k_;
        params.normalize = normalize_ ? 1 : 0;
        params.intermediate = intermediate_;
        std::copy(activations_, activations_ + kMoEMaxExperts, params.activations);
        work.bytes = pieces.bytes();
        return work;
    }

    void run_chunk(Work& work, Launcher& launcher) const {
        MoEExpertsParams& params = work.params;
        const int64_t slots = static_cast<int64_t>(params.tokens) * top_k_;
        const bool decode =
            params.tokens <= kTuning.decode_tokens || slots <= kTuning.decode_slots_of_expert * experts_;
        const bool single = params.tokens == 1;
        params.tile_slots = decode ? kGemvLanes : slots < kTuning.square_slots_of_expert * experts_ ? 32 : 64;
        route(params, launcher);
        const int64_t hidden = params.down.outputs;
        if (!single) quantize(params.x, work.x_units, work.x_meta, params.tokens, hidden, launcher);
        launch_projection(params, "gate_up", decode, launcher);
        if (!single)
            quantize(params.activated, work.activated_units, work.activated_meta, slots, intermediate_, launcher);
        launch_projection(params, "down", decode, launcher);
        launch(launcher, "moe_experts_combine", blocks(params.tokens * (hidden / 4), kThreads), kThreads, params);
    }

    static Launcher::Dim3 blocks(int64_t count, int64_t each) {
        Launcher::Dim3 grid;
        grid.x = blocks_for(count, each);
        return grid;
    }

    void route(const MoEExpertsParams& params, Launcher& launcher) const {
        if (params.tokens <= kTuning.planned_tokens) {
            launch(launcher, "moe_experts_plan", blocks(1, 1), kThreads, params);
            return;
        }
        launch(launcher, "moe_experts_route", blocks(params.tokens, kThreads / 32), kThreads, params);
        launch(launcher, "moe_experts_group", blocks(experts_, 1), kThreads, params);
        launch(launcher, "moe_experts_tiles", blocks(1, 1), kThreads, params);
    }

    void quantize(const float* from, unsigned char* units, LinearMeta* meta, int64_t rows, int64_t columns,
                  Launcher& launcher) const {
        if (!linear_is_integer(format_)) return;
        const LinearQuantizeParams params = {from, units, meta, rows, static_cast<int32_t>(columns), block_size_};
        launch_quantize(launcher, concat("moe_experts_quantize_", linear_format_name(format_)), params);
    }

    // Slots of A experts in tiles of t make at most (slots + A (t - 1)) / t tiles.
    int64_t most_tiles(const MoEExpertsParams& params) const {
        const int64_t slots = static_cast<int64_t>(params.tokens) * top_k_;
        const int64_t active = std::min<int64_t>(experts_, slots);
        return std::min(slots, (slots + active * (params.tile_slots - 1)) / params.tile_slots);
    }

    void launch_projection(const MoEExpertsParams& params, const std::string& projection, bool decode,
                           Launcher& launcher) const {
        const bool single = params.tokens == 1, up = projection == "gate_up";
        // decode: a team of lanes has two rows of gate_up, one or two of down; prefill: a tile has 64 rows of either
        const int rows = decode ? kGemvTeams * (up ? 2 : 1) : kGemmOutputs;
        Launcher::Dim3 grid =
            up ? blocks(intermediate_, any_gated_ ? rows / 2 : rows) : blocks(params.down.outputs, rows);
        grid.y = static_cast<uint32_t>(most_tiles(params));
        const std::string regime = decode ? concat("_decode_", linear_format_name(format_), single ? "_1" : "_8")
                                          : concat("_prefill_", linear_format_name(format_), "_", params.tile_slots);
        launch(launcher, concat("moe_experts_", projection, regime), grid, decode ? kGemvThreads : kGemmThreads,
               params);
    }

    LinearFormat format_;
    int32_t block_size_;
    int32_t experts_;
    int32_t intermediate_;
    int32_t top_k_ = 0;
    bool normalize_ = false;
    bool gated_ = false;
    bool any_gated_ = false;
    uint8_t activations_[kMoEMaxExperts] = {};
};

}  // namespace

const OpInfo& moe_experts() {
    static const OpInfo info = {
        "MoEExperts",
        "1",
        {{"top_k", Kind::kInt, true, ""},
         {"norm_topk_prob", Kind::kInt, true, ""},
         {"weight_format", Kind::kString, true, ""},
         {"block_size", Kind::kInt, false, "0"},
         {"num_experts", Kind::kInt, true, ""},
         {"intermediate_size", Kind::kInt, true, ""},
         {"activations", Kind::kInts, false, "0"},
         {"gated", Kind::kInt, false, "1"}},
        [](const Attributes& attributes) -> std::unique_ptr<Op> { return std::make_unique<MoEExperts>(attributes); }};
    return info;
}

}  // namespace deepstitch
