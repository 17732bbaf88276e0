// What a test calls through ctypes to use a plugin the way TensorRT would, without a builder or a GPU. driver_v2.cpp goes
// through the registry of a real libnvinfer.so.8; driver_v3.cpp reads the library's list of creators itself.
#pragma once

#include <NvInferRuntime.h>

#include <cstring>
#include <deque>
#include <string>
#include <vector>

extern "C" {

struct DriverField {
    const char* name;
    const void* data;
    int32_t type;
    int32_t length;
};

struct DriverTensor {
    int32_t dtype;
    int32_t format;  // 0 is linear
    int32_t rank;
    int64_t dims[8];
    void* data;
};

// A line "name version namespace field:type:length ..." for each creator of the library; null where it does not load.
const char* driver_open(const char* library);
int driver_close();           // 1 when none of its creators can be found any more
const char* driver_log();     // what was logged since the last call
const char* driver_version();

void* driver_create(const char* op, const DriverField* fields, int32_t count);  // null where refused
void* driver_deserialize(const char* op, const void* data, size_t bytes);
void* driver_clone(void* plugin);
void driver_destroy(void* plugin);
size_t driver_serialize(void* plugin, void* data, size_t capacity);  // the bytes it takes
const char* driver_identity(void* plugin);                           // "name version namespace"

int32_t driver_num_outputs(void* plugin);
// The rank of an output, -1 where refused. The inputs' dimensions are expressions whose values are not known.
int32_t driver_output_dims(void* plugin, const DriverTensor* inputs, int32_t count, int32_t output, int64_t* dims);
int32_t driver_output_type(void* plugin, const int32_t* types, int32_t count, int32_t output);
int32_t driver_supports(void* plugin, int32_t position, const DriverTensor* tensors, int32_t inputs, int32_t outputs);
int32_t driver_configure(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs);
size_t driver_workspace(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs);
int32_t driver_enqueue(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs, void* workspace);

}

namespace driver {

using nvinfer1::PluginTensorDesc;

class Logger final : public nvinfer1::ILogger, public nvinfer1::ILoggerFinder {
public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) text_ += std::string(message) + "\n";
    }
    nvinfer1::ILogger* findLogger() override { return this; }
    const char* take() {
        taken_ = std::move(text_);
        text_.clear();
        return taken_.c_str();
    }

private:
    std::string text_, taken_;
};

class Expression final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
public:
    Expression(int64_t value, bool constant) : value_(value), constant_(constant) { mImpl = this; }
    int64_t value() const { return value_; }

private:
    bool isConstant() const override { return constant_; }
#if NV_TENSORRT_MAJOR >= 10
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }
#else
    int32_t getConstantValue() const override { return static_cast<int32_t>(value_); }
#endif

    int64_t value_;
    bool constant_;
};

class Builder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
public:
    Builder() { mImpl = this; }
    const nvinfer1::IDimensionExpr* dimension(int64_t value) { return made(value, false); }

private:
#if NV_TENSORRT_MAJOR >= 10
    using Value = int64_t;
    const nvinfer1::IDimensionExpr* declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr&,
                                                      const nvinfer1::IDimensionExpr&) override {
        return nullptr;
    }
#else
    using Value = int32_t;
#endif
    const nvinfer1::IDimensionExpr* constant(Value value) override { return made(value, true); }
    const nvinfer1::IDimensionExpr* operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr&,
                                              const nvinfer1::IDimensionExpr&) override {
        return nullptr;  // no rule of ours computes
    }
    const nvinfer1::IDimensionExpr* made(int64_t value, bool constant) {
        return &expressions_.emplace_back(value, constant);
    }

    std::deque<Expression> expressions_;
};

inline std::vector<nvinfer1::DimsExprs> expressions(const DriverTensor* tensors, int32_t count, Builder& builder) {
    std::vector<nvinfer1::DimsExprs> made(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) {
        made[i].nbDims = tensors[i].rank;
        for (int32_t axis = 0; axis < tensors[i].rank; ++axis) made[i].d[axis] = builder.dimension(tensors[i].dims[axis]);
    }
    return made;
}

inline int32_t values(const nvinfer1::DimsExprs& found, int64_t* dims) {
    for (int32_t axis = 0; axis < found.nbDims; ++axis) dims[axis] = static_cast<const Expression*>(found.d[axis])->value();
    return found.nbDims;
}

inline PluginTensorDesc description(const DriverTensor& tensor) {
    PluginTensorDesc made{};
    made.type = static_cast<nvinfer1::DataType>(tensor.dtype);
    made.format = static_cast<nvinfer1::TensorFormat>(tensor.format);
    made.dims.nbDims = tensor.rank;
    using Size = std::remove_reference_t<decltype(made.dims.d[0])>;
    for (int32_t axis = 0; axis < tensor.rank; ++axis) made.dims.d[axis] = static_cast<Size>(tensor.dims[axis]);
    return made;
}

inline std::vector<PluginTensorDesc> descriptions(const DriverTensor* tensors, int32_t count) {
    std::vector<PluginTensorDesc> made;
    for (int32_t i = 0; i < count; ++i) made.push_back(description(tensors[i]));
    return made;
}

// As a profile whose smallest and largest shapes are these.
inline std::vector<nvinfer1::DynamicPluginTensorDesc> profile(const DriverTensor* tensors, int32_t count) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> made(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i) {
        made[i].desc = description(tensors[i]);
        made[i].min = made[i].max = made[i].desc.dims;
#if NV_TENSORRT_MAJOR >= 10
        made[i].opt = made[i].max;
#endif
        for (int32_t axis = 0; axis < tensors[i].rank; ++axis) made[i].desc.dims.d[axis] = -1;
    }
    return made;
}

struct Pointers {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    Pointers(const DriverTensor* tensors, int32_t num_inputs, int32_t num_outputs) {
        for (int32_t i = 0; i < num_inputs; ++i) inputs.push_back(tensors[i].data);
        for (int32_t i = 0; i < num_outputs; ++i) outputs.push_back(tensors[num_inputs + i].data);
    }
};

inline std::vector<nvinfer1::PluginField> fields(const DriverField* given, int32_t count) {
    std::vector<nvinfer1::PluginField> made;
    for (int32_t i = 0; i < count; ++i) {
        made.emplace_back(given[i].name, given[i].data, static_cast<nvinfer1::PluginFieldType>(given[i].type),
                          given[i].length);
    }
    return made;
}

// One line of driver_open()
template <class Creator>
std::string line(Creator& creator) {
    std::string text = std::string(creator.getPluginName()) + " " + creator.getPluginVersion() + " " +
                       creator.getPluginNamespace();
    const nvinfer1::PluginFieldCollection* names = creator.getFieldNames();
    for (int32_t i = 0; i < names->nbFields; ++i) {
        const nvinfer1::PluginField& field = names->fields[i];
        text += std::string(" ") + field.name + ":" + std::to_string(static_cast<int32_t>(field.type)) + ":" +
                std::to_string(field.length);
    }
    return text + "\n";
}

inline const char* kept(std::string text) {
    static std::string last;
    last = std::move(text);
    return last.c_str();
}

}  // namespace driver
