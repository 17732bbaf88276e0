// The interface of every op on the host. Knows neither CUDA nor TensorRT; the adapters and the C interface use it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "launcher.h"
#include "tensor.h"

namespace deepstitch {

enum class Kind : int32_t { kInt = 0, kFloat = 1, kString = 2, kInts = 3 };

// default_text: "0", "1e-6", "dense", "" (ints: "0,1,2"). Not read where required.
struct AttributeSpec {
    const char* name;
    Kind kind;
    bool required;
    const char* default_text;
};

struct AttributeValue {
    Kind kind = Kind::kInt;
    int64_t integer = 0;
    float real = 0.0F;
    std::string text;
    std::vector<int64_t> integers;

    static AttributeValue of(int64_t value);
    static AttributeValue of(float value);
    static AttributeValue of(std::string value);
    static AttributeValue of(std::vector<int64_t> value);
};

struct OpInfo;

// Every attribute of an op, defaults filled in. Asking for a name or kind the op did not declare is a logic_error.
class Attributes {
public:
    // Refuses unknown names, wrong kinds and missing required attributes.
    Attributes(const OpInfo& info, const std::map<std::string, AttributeValue>& given);

    int64_t integer(const char* name) const;
    float real(const char* name) const;
    const std::string& text(const char* name) const;
    const std::vector<int64_t>& integers(const char* name) const;
    const std::map<std::string, AttributeValue>& values() const { return values_; }

private:
    const AttributeValue& get(const char* name, Kind kind) const;
    std::map<std::string, AttributeValue> values_;
};

struct TensorSpec {
    const char* name;
    std::vector<DType> dtypes;  // allowed, in order of preference
    int same_dtype_as = -1;     // an input before this one, whose dtype this one must have
};

// An output dimension: dimension `axis` of input `input`, or `constant` where input < 0.
struct DimRule {
    int input;
    int axis;
    int64_t constant;
};

// Constructed from Attributes; the constructor throws Refusal and touches no CUDA.
class Op {
public:
    virtual ~Op();
    virtual std::vector<TensorSpec> inputs() const = 0;
    virtual std::vector<TensorSpec> outputs() const = 0;
    virtual std::vector<DimRule> output_shape(int output, const std::vector<int>& input_ranks) const = 0;
    virtual DType output_dtype(int output, const std::vector<DType>& inputs) const = 0;
    // Ranks and dimensions agree; throws Refusal. The number of inputs and their dtypes were checked: see validate().
    virtual void check(const std::vector<Tensor>& inputs) const = 0;
    virtual size_t workspace(const std::vector<Tensor>& inputs) const = 0;
    // Reached through run() only, so that check() has passed. Zero tokens: returns without a launch.
    virtual void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
                         Launcher& launcher) const = 0;
};

struct OpInfo {
    const char* name;     // the ONNX op type and TensorRT plugin name
    const char* version;  // of the TensorRT plugin
    std::vector<AttributeSpec> attributes;
    std::unique_ptr<Op> (*create)(const Attributes&);  // copies what it needs
};

constexpr const char* kNamespace = "deepstitch.plugins";

// registry.cpp
const std::vector<const OpInfo*>& ops();
const OpInfo& find_op(const std::string& name);  // throws Refusal

// An op with what it was made from. Const functions may be called from several threads.
struct Instance {
    const OpInfo* info;
    Attributes attributes;
    std::unique_ptr<Op> op;

    Instance(const OpInfo& from, Attributes resolved);
    Instance(const OpInfo& from, const std::map<std::string, AttributeValue>& given);
    Instance(const OpInfo& from, const void* serialized, size_t bytes);
    std::vector<uint8_t> serialize() const;
};

// op.cpp: what surrounds an op's own functions. validate() checks number, dtypes and sizes of the inputs, then calls
// op.check(). run() validates, checks outputs and pointers (not null where not empty, aligned to 16 bytes), enqueues.
void validate(const Op& op, const std::vector<Tensor>& inputs);
Tensor describe_output(const Op& op, int output, const std::vector<Tensor>& inputs);  // dtype and shape
void run(const Op& op, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void* workspace,
         Launcher& launcher);

// serialization.cpp: versioned and checksummed. deserialize throws Refusal for anything serialize did not write.
std::vector<uint8_t> serialize(const OpInfo& info, const Attributes& attributes);
Attributes deserialize(const OpInfo& info, const void* data, size_t bytes);

}  // namespace deepstitch
