// Any op of op.h as an IPluginV2DynamicExt: TensorRT 8.6.
#pragma once

#include "adapter.h"

namespace deepstitch {
namespace tensorrt {

class PluginV2 final : public nvinfer1::IPluginV2DynamicExt {
public:
    explicit PluginV2(std::shared_ptr<const Instance> instance) : instance_(std::move(instance)) {}

    // What it is
    const char* getPluginType() const noexcept override { return info().name; }
    const char* getPluginVersion() const noexcept override { return info().version; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(const char* name) noexcept override {
        guarded(info(), "setPluginNamespace", 0, [&] { return namespace_ = name == nullptr ? "" : name, 0; });
    }
    int32_t getNbOutputs() const noexcept override {
        return guarded(info(), "getNbOutputs", 0, [&] { return static_cast<int32_t>(op().outputs().size()); });
    }

    // Shapes and formats
    nvinfer1::DimsExprs getOutputDimensions(int32_t output, const nvinfer1::DimsExprs* inputs, int32_t count,
                                            nvinfer1::IExprBuilder& builder) noexcept override {
        nvinfer1::DimsExprs failed{};
        failed.nbDims = -1;
        return guarded(info(), "getOutputDimensions", failed,
                       [&] { return output_dimensions(op(), output, inputs, count, builder); });
    }
    nvinfer1::DataType getOutputDataType(int32_t output, const nvinfer1::DataType* inputs,
                                         int32_t count) const noexcept override {
        return guarded(info(), "getOutputDataType", nvinfer1::DataType::kFLOAT, [&] {
            require_counts(op(), count, getNbOutputs());
            std::vector<DType> dtypes;
            for (int32_t i = 0; i < count; ++i) dtypes.push_back(to_dtype(inputs[i]));
            return static_cast<nvinfer1::DataType>(op().output_dtype(output, dtypes));
        });
    }
    bool supportsFormatCombination(int32_t position, const PluginTensorDesc* tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        return guarded(info(), "supportsFormatCombination", false, [&] {
            return supports_format(op(), position, {tensors, tensors + position + 1}, inputs, outputs);
        });
    }
    // It cannot refuse here: what is wrong is said now, and enqueue refuses.
    void configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                         const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept override {
        guarded(info(), "configurePlugin", 0, [&] {
            require_counts(op(), num_inputs, num_outputs);
            validate(op(), largest(inputs, static_cast<size_t>(num_inputs)));
            return 0;
        });
    }
    size_t getWorkspaceSize(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                            int32_t num_outputs) const noexcept override {
        return guarded(info(), "getWorkspaceSize", size_t{0}, [&] {
            require_counts(op(), num_inputs, num_outputs);
            const std::vector<Tensor> tensors = to_tensors(inputs, static_cast<size_t>(num_inputs));
            validate(op(), tensors);
            return op().workspace(tensors);
        });
    }

    // Life
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
        return guarded(info(), "clone", static_cast<PluginV2*>(nullptr), [&] {
            auto copy = std::make_unique<PluginV2>(instance_);
            copy->namespace_ = namespace_;
            return copy.release();
        });
    }
    size_t getSerializationSize() const noexcept override {
        return guarded(info(), "getSerializationSize", size_t{0}, [&] { return instance_->serialize().size(); });
    }
    void serialize(void* buffer) const noexcept override {
        guarded(info(), "serialize", 0, [&] {
            const std::vector<uint8_t> bytes = instance_->serialize();
            std::memcpy(buffer, bytes.data(), bytes.size());
            return 0;
        });
    }

    int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded(info(), "enqueue", -1, [&] {
            return launch(*instance_, input_desc, output_desc, inputs, outputs, workspace, stream);
        });
    }

private:
    const OpInfo& info() const { return *instance_->info; }
    const Op& op() const { return *instance_->op; }

    std::shared_ptr<const Instance> instance_;  // shared by clones; never changed
    std::string namespace_ = kNamespace;
};

class CreatorV2 final : public nvinfer1::IPluginCreator {
public:
    explicit CreatorV2(const OpInfo& info)
        : info_(info), fields_(field_names(info)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

    const char* getPluginName() const noexcept override { return info_.name; }
    const char* getPluginVersion() const noexcept override { return info_.version; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
    const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }
    void setPluginNamespace(const char* name) noexcept override {
        guarded(info_, "setPluginNamespace", 0, [&] { return namespace_ = name == nullptr ? "" : name, 0; });
    }

    nvinfer1::IPluginV2* createPlugin(const char*, const PluginFieldCollection* fields) noexcept override {
        return guarded(info_, "createPlugin", static_cast<PluginV2*>(nullptr),
                       [&] { return made(instance_from(info_, fields)); });
    }
    nvinfer1::IPluginV2* deserializePlugin(const char*, const void* data, size_t bytes) noexcept override {
        return guarded(info_, "deserializePlugin", static_cast<PluginV2*>(nullptr),
                       [&] { return made(std::make_shared<const Instance>(info_, data, bytes)); });
    }

private:
    PluginV2* made(std::shared_ptr<const Instance> instance) const {
        auto plugin = std::make_unique<PluginV2>(std::move(instance));
        plugin->setPluginNamespace(namespace_.c_str());
        return plugin.release();
    }

    const OpInfo& info_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
    std::string namespace_ = kNamespace;
};

}  // namespace tensorrt
}  // namespace deepstitch

// In <op>/tensorrt/v2.cpp: the creator that library.cpp lists. `op` is the function of op.cpp that describes the op.
#define DEEPSTITCH_TENSORRT_CREATOR(op)                                          \
    namespace deepstitch {                                                       \
    const OpInfo& op();                                                          \
    namespace tensorrt {                                                         \
    nvinfer1::IPluginCreator* op##_creator() {                                   \
        static CreatorV2 creator(op());                                          \
        return &creator;                                                         \
    }                                                                            \
    }                                                                            \
    }
