// RMSNormRope on the host: shapes, checks, choice of kernel.
#include "../common/op.h"
#include "params.h"

namespace deepstitch {
namespace {

constexpr int64_t kMaxWidth = 1 << 24;

class RmsNormRope final : public Op {
public:
    explicit RmsNormRope(const Attributes& attributes)
        : rope_(attributes.text("mode") == "norm_rope"),
          residual_(attributes.integer("has_residual") != 0),
          heads_(attributes.integer("num_heads")),
          epsilon_(attributes.real("epsilon")),
          section_(attributes.integers("mrope_section")) {
        const std::string& mode = attributes.text("mode");
        require(rope_ || mode == "norm", "mode is \"", mode, "\"; it is \"norm\" or \"norm_rope\"");
        require(epsilon_ >= 0.0F, "epsilon is ", epsilon_, "; it must not be negative");
        const int64_t has_residual = attributes.integer("has_residual");
        require(has_residual == 0 || has_residual == 1, "has_residual is ", has_residual, "; it is 0 or 1");
        if (rope_) {
            require(!residual_, "has_residual is 1, but mode \"norm_rope\" has no residual");
            require(heads_ >= 1 && heads_ <= 65536, "num_heads is ", heads_, "; mode \"norm_rope\" needs 1 to 65536");
            require(section_.size() == 3, "mrope_section has ", section_.size(),
                    " entries; mode \"norm_rope\" needs three: pairs turned by time, height, width");
            for (const int64_t pairs : section_)
                require(pairs >= 0 && pairs <= kMaxRopePairs, "mrope_section has the entry ", pairs, "; 0 to ",
                        kMaxRopePairs, " are possible");
        } else {
            require(heads_ == 0, "num_heads is ", heads_, ", but mode \"norm\" norms whole rows; leave it out");
            require(section_.empty(), "mrope_section is given, but mode \"norm\" turns nothing; leave it out");
        }
    }

    std::vector<TensorSpec> inputs() const override {
        const std::vector<DType> storage{DType::kFloat32, DType::kFloat16};
        if (rope_) return {{"x", storage}, {"weight", {DType::kFloat32}}, {"position_ids", {DType::kInt32}},
                           {"inv_freq", {DType::kFloat32}}};
        if (residual_) return {{"x", storage}, {"residual", storage, 0}, {"weight", {DType::kFloat32}}};
        return {{"x", storage}, {"weight", {DType::kFloat32}}};
    }

    std::vector<TensorSpec> outputs() const override {
        const std::vector<DType> storage{DType::kFloat32, DType::kFloat16};
        if (residual_) return {{"y", storage}, {"sum", storage}};
        return {{"y", storage}};
    }

    std::vector<DimRule> output_shape(int, const std::vector<int>& ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis < ranks[0]; ++axis) rules.push_back({0, axis, 0});
        return rules;
    }

    DType output_dtype(int, const std::vector<DType>& inputs) const override { return inputs[0]; }

    void check(const std::vector<Tensor>& inputs) const override {
        const Shape& x = inputs[0].shape;
        require(x.rank >= 1, "x is a scalar; it is [..., H]");
        const int64_t width = x.dims[x.rank - 1];
        require(width >= 1 && width <= kMaxWidth, "x has shape ", x, "; its last axis is 1 to ", kMaxWidth);
        require(volume(x) / width <= INT32_MAX, "x has ", volume(x) / width, " rows; at most 2^31 - 1");
        rope_ ? check_rope(inputs, width) : check_norm(inputs, width);
    }

    size_t workspace(const std::vector<Tensor>&) const override { return 0; }

    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void*,
                 Launcher& launcher) const override {
        if (volume(inputs[0].shape) == 0) return;
        rope_ ? launch_rope(inputs, outputs, launcher) : launch_norm(inputs, outputs, launcher);
    }

private:
    void check_norm(const std::vector<Tensor>& inputs, int64_t width) const {
        const Tensor& weight = inputs[residual_ ? 2 : 1];
        require(weight.shape.rank == 1 && weight.shape.dims[0] == width, "weight has shape ", weight.shape,
                "; x has shape ", inputs[0].shape, ", so it is [", width, "]");
        if (!residual_) return;
        require(inputs[1].shape == inputs[0].shape, "residual has shape ", inputs[1].shape, ", x has ",
                inputs[0].shape, "; they must be the same");
        require(inputs[1].dtype == inputs[0].dtype, "residual is ", inputs[1].dtype, ", x is ", inputs[0].dtype,
                "; they must be the same");
    }

    void check_rope(const std::vector<Tensor>& inputs, int64_t width) const {
        const Shape& x = inputs[0].shape;
        const Shape& weight = inputs[1].shape;
        const Shape& positions = inputs[2].shape;
        const Shape& inv_freq = inputs[3].shape;
        require(x.rank == 3, "x has shape ", x, "; with rope it is [B, S, num_heads * head_dim]");
        require(width % heads_ == 0, "x has ", width, " columns, not a multiple of num_heads = ", heads_);
        const int64_t head_dim = width / heads_;
        require(head_dim % 2 == 0 && head_dim <= 2 * kMaxRopePairs, "head_dim is ", head_dim,
                "; it is even and at most ", 2 * kMaxRopePairs);
        require(weight.rank == 1 && weight.dims[0] == head_dim, "weight has shape ", weight, "; it is [", head_dim,
                "], the head_dim of x");
        require(positions.rank == 3 && positions.dims[0] == 3 && positions.dims[1] == x.dims[0] &&
                    positions.dims[2] == x.dims[1],
                "position_ids has shape ", positions, "; x has shape ", x, ", so it is [3, ", x.dims[0], ", ",
                x.dims[1], "]");
        require(inv_freq.rank == 1 && inv_freq.dims[0] == head_dim / 2, "inv_freq has shape ", inv_freq, "; it is [",
                head_dim / 2, "], half the head_dim");
        const int64_t pairs = section_[0] + section_[1] + section_[2];
        require(pairs == head_dim / 2, "mrope_section sums to ", pairs, "; half the head_dim is ", head_dim / 2);
    }

    void launch_norm(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, Launcher& launcher) const {
        const Shape& x = inputs[0].shape;
        const int64_t width = x.dims[x.rank - 1];
        const bool half = inputs[0].dtype == DType::kFloat16;
        const int wide = half ? 8 : 4;  // elements per access, as the kernels' last argument
        const int elements = width % wide == 0 ? wide : 1;
        RmsNormParams p{};
        p.x = inputs[0].data;
        p.residual = residual_ ? inputs[1].data : nullptr;
        p.weight = static_cast<const float*>(inputs[residual_ ? 2 : 1].data);
        p.y = outputs[0].data;
        p.sum = residual_ ? outputs[1].data : nullptr;
        p.width = static_cast<int32_t>(width);
        p.epsilon = epsilon_;
        const int64_t step = int64_t{kNormThreads} * elements;
        const int64_t bytes = (width + step - 1) / step * step * 4;
        p.kept = bytes <= kMaxKeptBytes ? 1 : 0;
        const std::string kernel = concat("rms_norm_rope_norm_f", half ? 16 : 32, elements == 1 ? "_scalar" : "");
        const Launcher::Dim3 grid{static_cast<uint32_t>(volume(x) / width), 1, 1};
        launcher.launch(kernel.c_str(), grid, {kNormThreads, 1, 1}, p.kept != 0 ? static_cast<size_t>(bytes) : 0, &p,
                        sizeof p);
    }

    void launch_rope(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, Launcher& launcher) const {
        const Shape& x = inputs[0].shape;
        const bool half = inputs[0].dtype == DType::kFloat16;
        RmsNormRopeParams p{};
        p.x = inputs[0].data;
        p.weight = static_cast<const float*>(inputs[1].data);
        p.position_ids = static_cast<const int32_t*>(inputs[2].data);
        p.inv_freq = static_cast<const float*>(inputs[3].data);
        p.y = outputs[0].data;
        p.tokens = x.dims[0] * x.dims[1];
        p.heads = static_cast<int32_t>(heads_);
        p.pairs = static_cast<int32_t>(x.dims[2] / heads_ / 2);
        p.height_limit = static_cast<int32_t>(3 * section_[1]);
        p.width_limit = static_cast<int32_t>(3 * section_[2]);
        p.epsilon = epsilon_;
        const int wide = half ? 8 : 4;
        const int elements = p.pairs % wide == 0 ? wide : 1;
        const int heads_per_block = kRopeThreads / rope_lanes(elements);
        const std::string kernel = concat("rms_norm_rope_rope_f", half ? 16 : 32, elements == 1 ? "_scalar" : "");
        const Launcher::Dim3 grid{static_cast<uint32_t>(p.tokens),
                                  static_cast<uint32_t>((p.heads + heads_per_block - 1) / heads_per_block), 1};
        launcher.launch(kernel.c_str(), grid, {kRopeThreads, 1, 1}, 0, &p, sizeof p);
    }

    bool rope_;
    bool residual_;
    int64_t heads_;
    float epsilon_;
    std::vector<int64_t> section_;
};

}  // namespace

const OpInfo& rms_norm_rope() {
    static const OpInfo info{"RMSNormRope",
                             "1",
                             {{"mode", Kind::kString, true, ""},
                              {"epsilon", Kind::kFloat, false, "1e-6"},
                              {"num_heads", Kind::kInt, false, "0"},
                              {"mrope_section", Kind::kInts, false, ""},
                              {"has_residual", Kind::kInt, false, "0"}},
                             [](const Attributes& attributes) -> std::unique_ptr<Op> {
                                 return std::make_unique<RmsNormRope>(attributes);
                             }};
    return info;
}

}  // namespace deepstitch
