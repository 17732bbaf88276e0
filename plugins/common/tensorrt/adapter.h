// What both generations of TensorRT plugins share: between TensorRT's types and those of op.h.
//
// TensorRT must never see an exception: everything that can throw runs inside guarded(), which reports it to TensorRT's
// logger. Nothing here touches CUDA before enqueue.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "../op.h"

namespace deepstitch {
namespace tensorrt {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

// library.cpp: to the logger that TensorRT lent, else to stderr.
void report_error(const char* op, const char* where, const char* message) noexcept;

template <class Result, class Body>
Result guarded(const OpInfo& info, const char* where, Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        report_error(info.name, where, error.what());
    } catch (...) {
        report_error(info.name, where, "unknown exception");
    }
    return failed;
}

inline DType to_dtype(nvinfer1::DataType type) {
    const auto number = static_cast<int32_t>(type);
    require(number >= 0 && number <= static_cast<int32_t>(DType::kInt32), "a tensor is of TensorRT's data type number ",
            number, "; 0 (float32) to 3 (int32) are supported");
    return static_cast<DType>(number);
}

inline Shape to_shape(const nvinfer1::Dims& dims) {
    require(dims.nbDims >= 0 && dims.nbDims <= kMaxRank, "a tensor has rank ", dims.nbDims);
    Shape shape;
    shape.rank = dims.nbDims;
    for (int32_t axis = 0; axis < dims.nbDims; ++axis) shape.dims[axis] = dims.d[axis];
    return shape;
}

inline std::vector<Tensor> to_tensors(const PluginTensorDesc* descriptions, size_t count,
                                      const void* const* data = nullptr) {
    std::vector<Tensor> tensors(count);
    for (size_t i = 0; i < count; ++i) {
        tensors[i].dtype = to_dtype(descriptions[i].type);
        tensors[i].shape = to_shape(descriptions[i].dims);
        tensors[i].data = data == nullptr ? nullptr : const_cast<void*>(data[i]);
    }
    return tensors;
}

// At the largest shapes of the profile.
inline std::vector<Tensor> largest(const nvinfer1::DynamicPluginTensorDesc* descriptions, size_t count) {
    std::vector<Tensor> tensors(count);
    for (size_t i = 0; i < count; ++i) {
        tensors[i].dtype = to_dtype(descriptions[i].desc.type);
        tensors[i].shape = to_shape(descriptions[i].max);
    }
    return tensors;
}

inline void require_counts(const Op& op, int32_t inputs, int32_t outputs) {
    const size_t expected_inputs = op.inputs().size();
    const size_t expected_outputs = op.outputs().size();
    require(inputs == static_cast<int32_t>(expected_inputs) && outputs == static_cast<int32_t>(expected_outputs),
            "the node has ", inputs, " inputs and ", outputs, " outputs; its attributes ask for ", expected_inputs,
            " and ", expected_outputs);
}

inline nvinfer1::DimsExprs output_dimensions(const Op& op, int32_t output, const nvinfer1::DimsExprs* inputs,
                                             int32_t count, nvinfer1::IExprBuilder& builder) {
    require_counts(op, count, static_cast<int32_t>(op.outputs().size()));
    std::vector<int> ranks;
    for (int32_t i = 0; i < count; ++i) ranks.push_back(inputs[i].nbDims);
    nvinfer1::DimsExprs dims{};
    for (const DimRule& rule : op.output_shape(output, ranks)) {
        require(dims.nbDims < kMaxRank, "output ", output, " has a rank over ", kMaxRank);
        if (rule.input >= 0) {
            require(rule.axis < inputs[rule.input].nbDims, "input ", rule.input, " has rank ",
                    inputs[rule.input].nbDims, ", which is too low");
        }
        dims.d[dims.nbDims++] = rule.input < 0 ? builder.constant(static_cast<int32_t>(rule.constant))
                                               : inputs[rule.input].d[rule.axis];
    }
    return dims;
}

// Whether tensor `position` (inputs, then outputs) can be what it is, given those before it.
inline bool supports_format(const Op& op, int32_t position, const std::vector<PluginTensorDesc>& tensors,
                            int32_t inputs, int32_t outputs) {
    require_counts(op, inputs, outputs);
    const PluginTensorDesc& asked = tensors[static_cast<size_t>(position)];
    if (asked.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position >= inputs) {
        std::vector<DType> dtypes;
        for (int32_t i = 0; i < inputs; ++i) dtypes.push_back(to_dtype(tensors[static_cast<size_t>(i)].type));
        return static_cast<int32_t>(asked.type) == static_cast<int32_t>(op.output_dtype(position - inputs, dtypes));
    }
    const std::vector<TensorSpec> specs = op.inputs();
    const TensorSpec& spec = specs[static_cast<size_t>(position)];
    if (spec.same_dtype_as >= 0) return asked.type == tensors[static_cast<size_t>(spec.same_dtype_as)].type;
    for (const DType each : spec.dtypes) {
        if (static_cast<int32_t>(each) == static_cast<int32_t>(asked.type)) return true;
    }
    return false;
}

constexpr auto kInt64Field = static_cast<PluginFieldType>(10);  // has a name from TensorRT 10 on

template <class Value>
std::vector<int64_t> integers_of(const PluginField& field) {
    std::vector<Value> values(static_cast<size_t>(field.length));
    if (!values.empty()) std::memcpy(values.data(), field.data, values.size() * sizeof(Value));
    return {values.begin(), values.end()};
}

template <class Value>
float real_of(const PluginField& field) {
    Value value;
    std::memcpy(&value, field.data, sizeof value);
    return static_cast<float>(value);
}

// In the kind of the field; the op refuses what it declares as another.
inline AttributeValue value_of(const PluginField& field, Kind declared) {
    require(field.length >= 0 && (field.length == 0 || field.data != nullptr), "attribute ", field.name,
            " has no data");
    if (field.type == PluginFieldType::kCHAR) {
        const std::string text(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
        return AttributeValue::of(text.substr(0, text.find('\0')));
    }
    if (field.type == PluginFieldType::kINT32 || field.type == kInt64Field) {
        std::vector<int64_t> numbers =
            field.type == kInt64Field ? integers_of<int64_t>(field) : integers_of<int32_t>(field);
        const bool one = declared != Kind::kInts && numbers.size() == 1;
        return one ? AttributeValue::of(numbers[0]) : AttributeValue::of(std::move(numbers));
    }
    const bool wide = field.type == PluginFieldType::kFLOAT64;
    require((wide || field.type == PluginFieldType::kFLOAT32) && field.length == 1, "attribute ", field.name,
            " comes as ", field.length, " values of TensorRT's field type number ", static_cast<int32_t>(field.type),
            "; one float, integers or a text are possible");
    return AttributeValue::of(wide ? real_of<double>(field) : real_of<float>(field));
}

inline std::shared_ptr<const Instance> instance_from(const OpInfo& info, const PluginFieldCollection* fields) {
    std::map<std::string, AttributeValue> values;
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
        const PluginField& field = fields->fields[i];
        require(field.name != nullptr, "an attribute has no name");
        const AttributeSpec* known = nullptr;
        for (const AttributeSpec& spec : info.attributes) known = spec.name == std::string(field.name) ? &spec : known;
        require(known != nullptr, info.name, " has no attribute ", field.name);
        values[field.name] = value_of(field, known->kind);
    }
    return std::make_shared<const Instance>(info, values);
}

// The attributes by name and type, which is what TensorRT's parser passes on.
inline std::vector<PluginField> field_names(const OpInfo& info) {
    constexpr PluginFieldType kTypes[] = {PluginFieldType::kINT32, PluginFieldType::kFLOAT32, PluginFieldType::kCHAR,
                                          PluginFieldType::kINT32};  // by Kind
    std::vector<PluginField> fields;
    for (const AttributeSpec& spec : info.attributes) {
        fields.emplace_back(spec.name, nullptr, kTypes[static_cast<int32_t>(spec.kind)], spec.kind == Kind::kInts ? 0 : 1);
    }
    return fields;
}

inline int32_t launch(const Instance& instance, const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc,
                      const void* const* inputs, void* const* outputs, void* workspace, void* stream) {
    const std::vector<Tensor> in = to_tensors(input_desc, instance.op->inputs().size(), inputs);
    const std::vector<Tensor> out = to_tensors(output_desc, instance.op->outputs().size(), outputs);
    run(*instance.op, in, out, workspace, *make_launcher(stream));
    return 0;
}

}  // namespace tensorrt
}  // namespace deepstitch
