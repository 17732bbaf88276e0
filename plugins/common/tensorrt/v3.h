// Any op of op.h as an IPluginV3: TensorRT 10 and 11.
#pragma once

#include "adapter.h"

namespace deepstitch {
namespace tensorrt {

constexpr const char* kStateField = "deepstitch_state";  // all that a serialized engine keeps of a plugin

class PluginV3 final : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
public:
    explicit PluginV3(std::shared_ptr<const Instance> instance) : instance_(std::move(instance)) {}

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded(info(), "clone", static_cast<PluginV3*>(nullptr), [&] { return new PluginV3(instance_); });
    }

    // Core
    const char* getPluginName() const noexcept override { return info().name; }
    const char* getPluginVersion() const noexcept override { return info().version; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }

    // Build
    int32_t getNbOutputs() const noexcept override {
        return guarded(info(), "getNbOutputs", 0, [&] { return static_cast<int32_t>(op().outputs().size()); });
    }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept override {
        return guarded(info(), "configurePlugin", -1, [&] {
            require_counts(op(), num_inputs, num_outputs);
            validate(op(), largest(inputs, static_cast<size_t>(num_inputs)));
            return 0;
        });
    }
    int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t num_outputs, const nvinfer1::DataType* inputs,
                               int32_t num_inputs) const noexcept override {
        return guarded(info(), "getOutputDataTypes", -1, [&] {
            require_counts(op(), num_inputs, num_outputs);
            std::vector<DType> dtypes;
            for (int32_t i = 0; i < num_inputs; ++i) dtypes.push_back(to_dtype(inputs[i]));
            for (int32_t i = 0; i < num_outputs; ++i) {
                outputs[i] = static_cast<nvinfer1::DataType>(op().output_dtype(i, dtypes));
            }
            return 0;
        });
    }
    int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override {
        return guarded(info(), "getOutputShapes", -1, [&] {
            for (int32_t i = 0; i < num_outputs; ++i) {
                outputs[i] = output_dimensions(op(), i, inputs, num_inputs, builder);
            }
            return 0;
        });
    }
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        return guarded(info(), "supportsFormatCombination", false, [&] {
            std::vector<PluginTensorDesc> until_here;
            for (int32_t i = 0; i <= position; ++i) until_here.push_back(tensors[i].desc);
            return supports_format(op(), position, until_here, inputs, outputs);
        });
    }
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                            const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) const noexcept override {
        return guarded(info(), "getWorkspaceSize", size_t{0}, [&] {
            require_counts(op(), num_inputs, num_outputs);
            const std::vector<Tensor> tensors = largest(inputs, static_cast<size_t>(num_inputs));
            validate(op(), tensors);
            return op().workspace(tensors);
        });
    }

    // Runtime
    int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                          int32_t num_outputs) noexcept override {
        return guarded(info(), "onShapeChange", -1, [&] {
            require_counts(op(), num_inputs, num_outputs);
            validate(op(), to_tensors(inputs, static_cast<size_t>(num_inputs)));
            return 0;
        });
    }
    int32_t enqueue(const PluginTensorDesc* input_desc, const PluginTensorDesc* output_desc, const void* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return guarded(info(), "enqueue", -1, [&] {
            return launch(*instance_, input_desc, output_desc, inputs, outputs, workspace, stream);
        });
    }
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
    // Valid until the next call or the end of the plugin.
    const PluginFieldCollection* getFieldsToSerialize() noexcept override {
        return guarded(info(), "getFieldsToSerialize", static_cast<const PluginFieldCollection*>(nullptr), [&] {
            state_ = instance_->serialize();
            field_ = PluginField(kStateField, state_.data(), PluginFieldType::kUNKNOWN,
                                 static_cast<int32_t>(state_.size()));
            collection_ = {1, &field_};
            return static_cast<const PluginFieldCollection*>(&collection_);
        });
    }

private:
    const OpInfo& info() const { return *instance_->info; }
    const Op& op() const { return *instance_->op; }

    std::shared_ptr<const Instance> instance_;  // shared by clones; never changed
    std::vector<uint8_t> state_;
    PluginField field_;
    PluginFieldCollection collection_{};
};

class CreatorV3 final : public nvinfer1::IPluginCreatorV3One {
public:
    explicit CreatorV3(const OpInfo& info)
        : info_(info), fields_(field_names(info)), collection_{static_cast<int32_t>(fields_.size()), fields_.data()} {}

    const char* getPluginName() const noexcept override { return info_.name; }
    const char* getPluginVersion() const noexcept override { return info_.version; }
    const char* getPluginNamespace() const noexcept override { return kNamespace; }
    const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

    nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override {
        return guarded(info_, "createPlugin", static_cast<PluginV3*>(nullptr), [&] {
            const bool built = phase == nvinfer1::TensorRTPhase::kRUNTIME;
            return new PluginV3(built ? restored(fields) : instance_from(info_, fields));
        });
    }

private:
    std::shared_ptr<const Instance> restored(const PluginFieldCollection* fields) const {
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            const PluginField& field = fields->fields[i];
            if (field.name == nullptr || std::strcmp(field.name, kStateField) != 0) continue;
            require(field.length >= 0, "the field ", kStateField, " has a negative length");
            return std::make_shared<const Instance>(info_, field.data, static_cast<size_t>(field.length));
        }
        refuse("the engine holds no field ", kStateField, " for this plugin; it was built with another library");
    }

    const OpInfo& info_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_;
};

}  // namespace tensorrt
}  // namespace deepstitch

// In <op>/tensorrt/v3.cpp: the creator that library.cpp lists. `op` is the function of op.cpp that describes the op.
#define DEEPSTITCH_TENSORRT_CREATOR(op)                                          \
    namespace deepstitch {                                                       \
    const OpInfo& op();                                                          \
    namespace tensorrt {                                                         \
    nvinfer1::IPluginCreatorInterface* op##_creator() {                          \
        static CreatorV3 creator(op());                                          \
        return &creator;                                                         \
    }                                                                            \
    }                                                                            \
    }
