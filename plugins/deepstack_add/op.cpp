// DeepStackAdd on the host: shapes, checks, choice of kernel.
#include "../common/op.h"
#include "params.h"

namespace deepstitch {
namespace {

enum Input { kHidden, kEmbeds, kIndex };

class DeepStackAdd final : public Op {
public:
    explicit DeepStackAdd(const Attributes& attributes) : layer_(attributes.integer("layer")) {
        require(layer_ >= 0 && layer_ < 1024, "layer is ", layer_, "; it counts the taps of deepstack_embeds from 0");
    }

    std::vector<TensorSpec> inputs() const override {
        return {{"hidden_states", {DType::kFloat32, DType::kFloat16}},
                {"deepstack_embeds", {DType::kFloat32, DType::kFloat16}},
                {"deepstack_index", {DType::kInt32}}};
    }

    std::vector<TensorSpec> outputs() const override { return {{"output", {DType::kFloat32, DType::kFloat16}}}; }

    std::vector<DimRule> output_shape(int, const std::vector<int>& ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis < ranks[kHidden]; ++axis) rules.push_back({kHidden, axis, 0});
        return rules;
    }

    DType output_dtype(int, const std::vector<DType>& inputs) const override { return inputs[kHidden]; }

    void check(const std::vector<Tensor>& inputs) const override {
        const Shape& hidden = inputs[kHidden].shape;
        const Shape& embeds = inputs[kEmbeds].shape;
        const Shape& index = inputs[kIndex].shape;
        require(hidden.rank >= 1, "hidden_states is a scalar; it is [..., H]");
        const int64_t width = hidden.dims[hidden.rank - 1];
        require(width >= 1 && width <= 1 << 22, "hidden_states has shape ", hidden, "; its last axis H is 1 to 2^22");
        require(embeds.rank == 2, "deepstack_embeds has shape ", embeds, "; it is [rows, taps * H]");
        require(embeds.dims[0] >= 1, "deepstack_embeds has no row; row 0 is the row of zeros of text tokens");
        require(embeds.dims[1] % width == 0, "deepstack_embeds has ", embeds.dims[1],
                " columns, not a multiple of H = ", width);
        require(embeds.dims[1] / width > layer_, "layer is ", layer_, ", but deepstack_embeds has ",
                embeds.dims[1] / width, " taps of H = ", width);
        Shape leading = hidden;
        leading.dims[--leading.rank] = 0;
        require(index == leading, "deepstack_index has shape ", index, "; it is one index per token, ", leading);
        require(volume(leading) <= INT32_MAX, "hidden_states has ", volume(leading), " tokens; at most 2^31 - 1");
    }

    size_t workspace(const std::vector<Tensor>&) const override { return 0; }

    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void*,
                 Launcher& launcher) const override {
        const Shape& hidden = inputs[kHidden].shape;
        const int64_t width = hidden.dims[hidden.rank - 1];
        const int64_t tokens = volume(hidden) / width;
        if (tokens == 0) return;
        const bool half_hidden = inputs[kHidden].dtype == DType::kFloat16;
        const bool half_embeds = inputs[kEmbeds].dtype == DType::kFloat16;
        const int wide = half_hidden || half_embeds ? 8 : 4;  // elements per thread, as the kernels' last argument
        const int elements = width % wide == 0 ? wide : 1;
        const std::string kernel = concat("deepstack_add_f", half_hidden ? 16 : 32, "_f", half_embeds ? 16 : 32,
                                          elements == 1 ? "_scalar" : "");
        DeepStackAddParams p{};
        p.hidden = inputs[kHidden].data;
        p.embeds = inputs[kEmbeds].data;
        p.index = static_cast<const int32_t*>(inputs[kIndex].data);
        p.output = outputs[0].data;
        p.rows = inputs[kEmbeds].shape.dims[0];
        p.stride = inputs[kEmbeds].shape.dims[1];
        p.begin = layer_ * width;
        p.width = static_cast<int32_t>(width);
        const int64_t columns_per_block = int64_t{kDeepStackThreads} * elements;
        const Launcher::Dim3 grid{static_cast<uint32_t>(tokens),
                                  static_cast<uint32_t>((width + columns_per_block - 1) / columns_per_block), 1};
        launcher.launch(kernel.c_str(), grid, {kDeepStackThreads, 1, 1}, 0, &p, sizeof p);
    }

private:
    int64_t layer_;
};

}  // namespace

const OpInfo& deepstack_add() {
    static const OpInfo info{"DeepStackAdd",
                             "1",
                             {{"layer", Kind::kInt, true, ""}},
                             [](const Attributes& attributes) -> std::unique_ptr<Op> {
                                 return std::make_unique<DeepStackAdd>(attributes);
                             }};
    return info;
}

}  // namespace deepstitch
