#include "op.h"

#include <algorithm>

namespace deepstitch {
namespace {

std::string names(const std::vector<DType>& dtypes) {
    std::string text;
    for (const DType each : dtypes) text += concat(text.empty() ? "" : " or ", each);
    return text;
}

void check_sizes(const char* name, const Tensor& tensor) {
    require(tensor.shape.rank >= 0 && tensor.shape.rank <= kMaxRank, name, " has rank ", tensor.shape.rank,
            "; at most ", kMaxRank, " is supported");
    int64_t elements = 1;
    for (int axis = 0; axis < tensor.shape.rank; ++axis) {
        const int64_t size = tensor.shape.dims[axis];
        require(size >= 0, name, " has a negative dimension: ", tensor.shape);
        require(size == 0 || elements <= (int64_t{1} << 46) / size, name, " is too large: ", tensor.shape);
        elements *= size == 0 ? 1 : size;
    }
}

void check_pointer(const char* name, const Tensor& tensor) {
    if (volume(tensor.shape) == 0) return;
    require(tensor.data != nullptr, name, " is a null pointer, but its shape is ", tensor.shape);
    require(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0, name, " is not aligned to 16 bytes");
}

void check_dtype(const std::vector<TensorSpec>& specs, size_t i, const std::vector<Tensor>& inputs) {
    const TensorSpec& spec = specs[i];
    const DType dtype = inputs[i].dtype;
    require(std::find(spec.dtypes.begin(), spec.dtypes.end(), dtype) != spec.dtypes.end(), spec.name, " is ", dtype,
            "; it must be ", names(spec.dtypes));
    if (spec.same_dtype_as < 0) return;
    const auto other = static_cast<size_t>(spec.same_dtype_as);
    require(dtype == inputs[other].dtype, spec.name, " is ", dtype, ", but ", specs[other].name, " is ",
            inputs[other].dtype, "; they must be the same");
}

}  // namespace

Op::~Op() = default;

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return "float32";
        case DType::kFloat16: return "float16";
        case DType::kInt8: return "int8";
        case DType::kInt32: return "int32";
    }
    return "unknown";
}

size_t dtype_bytes(DType dtype) {
    switch (dtype) {
        case DType::kFloat32: return 4;
        case DType::kFloat16: return 2;
        case DType::kInt8: return 1;
        case DType::kInt32: return 4;
    }
    return 0;
}

int64_t volume(const Shape& shape) {
    int64_t elements = 1;
    for (int axis = 0; axis < shape.rank; ++axis) elements *= shape.dims[axis];
    return elements;
}

std::string to_text(const Shape& shape) {
    std::string text = "[";
    for (int axis = 0; axis < shape.rank && axis < kMaxRank; ++axis) {
        text += concat(axis == 0 ? "" : ", ", shape.dims[axis]);
    }
    return text + "]";
}

bool operator==(const Shape& left, const Shape& right) {
    if (left.rank != right.rank) return false;
    for (int axis = 0; axis < left.rank; ++axis) {
        if (left.dims[axis] != right.dims[axis]) return false;
    }
    return true;
}

bool operator!=(const Shape& left, const Shape& right) { return !(left == right); }

void validate(const Op& op, const std::vector<Tensor>& inputs) {
    const std::vector<TensorSpec> specs = op.inputs();
    require(inputs.size() == specs.size(), "got ", inputs.size(), " inputs; these attributes need ", specs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
        check_sizes(specs[i].name, inputs[i]);
        check_dtype(specs, i, inputs);
    }
    op.check(inputs);
}

Tensor describe_output(const Op& op, int output, const std::vector<Tensor>& inputs) {
    std::vector<int> ranks;
    std::vector<DType> dtypes;
    for (const Tensor& each : inputs) {
        ranks.push_back(each.shape.rank);
        dtypes.push_back(each.dtype);
    }
    const std::vector<DimRule> rules = op.output_shape(output, ranks);
    Tensor described;
    described.dtype = op.output_dtype(output, dtypes);
    described.shape.rank = static_cast<int32_t>(rules.size());
    for (size_t axis = 0; axis < rules.size(); ++axis) {
        const DimRule& rule = rules[axis];
        described.shape.dims[axis] =
            rule.input < 0 ? rule.constant : inputs[static_cast<size_t>(rule.input)].shape.dims[rule.axis];
    }
    return described;
}

void run(const Op& op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
         Launcher& launcher) {
    validate(op, inputs);
    const std::vector<TensorSpec> in = op.inputs();
    const std::vector<TensorSpec> out = op.outputs();
    require(outputs.size() == out.size(), "got ", outputs.size(), " outputs; these attributes give ", out.size());
    for (size_t i = 0; i < inputs.size(); ++i) check_pointer(in[i].name, inputs[i]);
    for (size_t i = 0; i < outputs.size(); ++i) {
        const Tensor expected = describe_output(op, static_cast<int>(i), inputs);
        require(outputs[i].dtype == expected.dtype && outputs[i].shape == expected.shape, out[i].name, " is ",
                outputs[i].dtype, " ", outputs[i].shape, "; it must be ", expected.dtype, " ", expected.shape);
        check_pointer(out[i].name, outputs[i]);
    }
    const size_t bytes = op.workspace(inputs);
    require(bytes == 0 || workspace != nullptr, "the workspace is a null pointer, but ", bytes, " bytes are needed");
    op.enqueue(inputs, outputs, workspace, launcher);
}

}  // namespace deepstitch
