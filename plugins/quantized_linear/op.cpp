// QuantizedLinear: what it takes, what it refuses, and which kernel it starts.
#include <string>
#include <vector>

#include "../common/linear_host.h"
#include "../common/op.h"
#include "params.h"
#include "tuning.h"

namespace deepstitch {
namespace {

constexpr QuantizedLinearTuning kTuning;
static_assert(QuantizedLinearTuning().fused_rows == 2, "the decode kernels for one and two tokens quantize x");

class QuantizedLinear final : public Op {
public:
    explicit QuantizedLinear(const Attributes& attributes)
        : format_(parse_linear_format(attributes.text("weight_format"))),
          block_size_(check_block_size(format_, attributes.integer("block_size"))),
          has_bias_(flag(attributes, "has_bias")),
          has_residual_(flag(attributes, "has_residual")),
          outputs_(check_extent("out_features", attributes.integer("out_features"), 1 << 24)) {}

    std::vector<TensorSpec> inputs() const override {
        std::vector<TensorSpec> specs = {{"x", {DType::kFloat32}}};
        add_matrix_inputs(specs, format_, "weight", "scales");
        if (has_bias_) specs.push_back({"bias", {DType::kFloat32}});
        if (has_residual_) specs.push_back({"residual", {DType::kFloat32}});
        return specs;
    }

    std::vector<TensorSpec> outputs() const override { return {{"y", {DType::kFloat32}}}; }

    std::vector<DimRule> output_shape(int, const std::vector<int>& input_ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis + 1 < input_ranks[0]; ++axis) rules.push_back({0, axis, 0});
        rules.push_back({-1, 0, outputs_});
        return rules;
    }

    DType output_dtype(int, const std::vector<DType>&) const override { return DType::kFloat32; }

    void check(const std::vector<Tensor>& inputs) const override {
        const Shape& x = inputs[0].shape;
        require(x.rank >= 1, "x has rank 0; it must be [..., K]");
        const int64_t inner = x.dims[x.rank - 1];
        check_inner("the last axis of x (K)", inner, format_, block_size_);
        require(rows_of(x) <= (1 << 24), "x has ", rows_of(x), " rows; at most ", 1 << 24, " are allowed");
        check_size("x", rows_of(x), inner, 32);
        check_matrix(inputs, 1, "weight", "scales", format_, block_size_, {outputs_}, inner);
        if (has_bias_) {
            const Shape& bias = inputs[bias_index()].shape;
            require(bias.rank == 1 && bias.dims[0] == outputs_, "bias has shape ", bias, "; it must be [", outputs_,
                    "]");
        }
        if (has_residual_) {
            Shape expected = x;
            expected.dims[x.rank - 1] = outputs_;
            const Shape& residual = inputs[residual_index()].shape;
            require(residual == expected, "residual has shape ", residual, "; it must be that of y, ", expected);
        }
    }

    size_t workspace(const std::vector<Tensor>& inputs) const override {
        Pieces pieces(nullptr);
        QuantizedLinearParams params = {};
        quantized_pieces(pieces, inputs[0].shape, params);
        return pieces.bytes();
    }

    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
                 Launcher& launcher) const override {
        const Shape& x = inputs[0].shape;
        const int64_t rows = rows_of(x), inner = x.dims[x.rank - 1];
        if (rows == 0) return;
        QuantizedLinearParams params = {};
        params.x = static_cast<const float*>(inputs[0].data);
        params.matrix = linear_matrix(inputs, 1, format_, outputs_, inner, block_size_);
        params.bias = has_bias_ ? static_cast<const float*>(inputs[bias_index()].data) : nullptr;
        params.residual = has_residual_ ? static_cast<const float*>(inputs[residual_index()].data) : nullptr;
        params.y = static_cast<float*>(outputs[0].data);
        params.rows = static_cast<int32_t>(rows);
        if (linear_is_integer(format_) && rows > kTuning.fused_rows) {
            Pieces pieces(workspace);
            quantize(quantized_pieces(pieces, x, params), rows, params, launcher);
        }
        if (rows <= kTuning.decode_rows) {
            decode(params, launcher);
        } else {
            prefill(params, launcher);
        }
    }

private:
    static bool flag(const Attributes& attributes, const char* name) {
        const int64_t value = attributes.integer(name);
        require(value == 0 || value == 1, name, " is ", value, "; it must be 0 or 1");
        return value == 1;
    }

    static int64_t rows_of(const Shape& x) {
        int64_t rows = 1;
        for (int axis = 0; axis + 1 < x.rank; ++axis) rows *= x.dims[axis];
        return rows;
    }

    int bias_index() const { return linear_is_integer(format_) ? 3 : 2; }
    int residual_index() const { return bias_index() + (has_bias_ ? 1 : 0); }

    struct Quantized {
        unsigned char* units;
        LinearMeta* meta;
    };

    // x as int8, where a kernel reads it so: larger than one or two rows.
    Quantized quantized_pieces(Pieces& pieces, const Shape& x, QuantizedLinearParams& params) const {
        const int64_t rows = rows_of(x), inner = x.dims[x.rank - 1];
        if (!linear_is_integer(format_) || rows <= kTuning.fused_rows) return {nullptr, nullptr};
        const Quantized quantized = {pieces.take<unsigned char>(rows * inner),
                                     pieces.take<LinearMeta>(rows * (inner / kLinearGroup))};
        params.units = quantized.units;
        params.meta = quantized.meta;
        return quantized;
    }

    std::string kernel(const char* regime, int tokens) const {
        return concat("quantized_linear_", regime, "_", linear_format_name(format_), "_", tokens);
    }

    void quantize(const Quantized& to, int64_t rows, const QuantizedLinearParams& params, Launcher& launcher) const {
        const LinearQuantizeParams quantize = {params.x, to.units, to.meta, rows, params.matrix.inputs, block_size_};
        launch_quantize(launcher, concat("quantized_linear_quantize_", linear_format_name(format_)), quantize);
    }

    void decode(const QuantizedLinearParams& params, Launcher& launcher) const {
        const int tokens = params.rows == 1 ? 1 : params.rows == 2 ? 2 : params.rows <= 4 ? 4 : 8;
        const int outputs_of_block = kGemvTeams * (tokens == 1 ? 1 : 2);
        Launcher::Dim3 grid;
        grid.x = blocks_for(outputs_, outputs_of_block) * blocks_for(params.rows, tokens);
        launch(launcher, kernel("decode", tokens), grid, kGemvThreads, params);
    }

    void prefill(const QuantizedLinearParams& params, Launcher& launcher) const {
        const int tokens = params.rows <= kTuning.flat_rows ? 32 : 64;
        Launcher::Dim3 grid;
        grid.x = blocks_for(outputs_, kGemmOutputs) * blocks_for(params.rows, tokens);
        launch(launcher, kernel("prefill", tokens), grid, kGemmThreads, params);
    }

    LinearFormat format_;
    int32_t block_size_;
    bool has_bias_;
    bool has_residual_;
    int32_t outputs_;
};

}  // namespace

const OpInfo& quantized_linear() {
    static const OpInfo info = {"QuantizedLinear",
                                "1",
                                {{"weight_format", Kind::kString, true, ""},
                                 {"block_size", Kind::kInt, false, "0"},
                                 {"has_bias", Kind::kInt, false, "0"},
                                 {"has_residual", Kind::kInt, false, "0"},
                                 {"out_features", Kind::kInt, true, ""}},
                                [](const Attributes& attributes) -> std::unique_ptr<Op> {
                                    return std::make_unique<QuantizedLinear>(attributes);
                                }};
    return info;
}

}  // namespace deepstitch
