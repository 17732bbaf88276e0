#include "abi.h"

#include <cstdlib>
#include <cstring>
#include <exception>

#include "op.h"

using namespace deepstitch;

struct DeepstitchInstance {
    Instance instance;
    std::string signature;
};

namespace {

template <class Function>
int guarded(char* error, size_t capacity, Function&& function) {
    std::string message;
    try {
        function();
        return 0;
    } catch (const std::exception& caught) {
        message = caught.what();
    } catch (...) {
        message = "an unknown exception";
    }
    if (error != nullptr && capacity > 0) {
        const size_t length = message.size() < capacity - 1 ? message.size() : capacity - 1;
        std::memcpy(error, message.data(), length);
        error[length] = 0;
    }
    return 1;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char each : text) {
        if (each == '"' || each == '\\') out += '\\';
        out += each;
    }
    return out + "\"";
}

// A JSON list of the texts make(item) returns.
template <class Items, class Make>
std::string list(const Items& items, Make&& make) {
    std::string out;
    for (const auto& each : items) out += (out.empty() ? "" : ", ") + make(each);
    return "[" + out + "]";
}

std::string attribute_json(const AttributeSpec& spec) {
    static const char* const kinds[] = {"int", "float", "string", "ints"};
    std::string out = concat("{\"name\": ", quoted(spec.name), ", \"kind\": \"", kinds[static_cast<int>(spec.kind)],
                             "\", \"required\": ", spec.required ? "true" : "false");
    if (spec.required) return out + "}";
    const std::string text = spec.default_text == nullptr ? "" : spec.default_text;
    const std::string value = spec.kind == Kind::kString ? quoted(text) : spec.kind == Kind::kInts ? "[" + text + "]" : text;
    return out + ", \"default\": " + value + "}";
}

std::string op_json(const OpInfo* info) {
    return concat("{\"name\": ", quoted(info->name), ", \"version\": ", quoted(info->version),
                  ", \"attributes\": ", list(info->attributes, attribute_json), "}");
}

std::string library_json() {
    const LauncherInfo launcher = launcher_info();
    return concat("{\"abi\": ", DEEPSTITCH_ABI_VERSION, ", \"namespace\": ", quoted(kNamespace),
                  ", \"launcher\": ", quoted(launcher.kind), ", \"targets\": ", list(launcher.targets, quoted),
                  ", \"ops\": ", list(ops(), op_json), "}");
}

std::string tensor_json(const TensorSpec& spec) {
    const auto name = [](DType dtype) { return quoted(dtype_name(dtype)); };
    return concat("{\"name\": ", quoted(spec.name), ", \"dtypes\": ", list(spec.dtypes, name), "}");
}

DeepstitchInstance* wrap(Instance&& instance) {
    std::string signature = concat("{\"inputs\": ", list(instance.op->inputs(), tensor_json),
                                   ", \"outputs\": ", list(instance.op->outputs(), tensor_json), "}");
    return new DeepstitchInstance{std::move(instance), std::move(signature)};
}

AttributeValue value_of(const DeepstitchAttribute& given) {
    switch (given.kind) {
        case DEEPSTITCH_INT: return AttributeValue::of(given.integer);
        case DEEPSTITCH_FLOAT: return AttributeValue::of(static_cast<float>(given.real));
        case DEEPSTITCH_STRING: return AttributeValue::of(std::string(given.text == nullptr ? "" : given.text));
        case DEEPSTITCH_INTS: break;
        default: refuse("attribute ", given.name, " has the unknown kind ", given.kind);
    }
    require(given.count >= 0 && (given.count == 0 || given.integers != nullptr), "attribute ", given.name,
            " has no integers");
    std::vector<int64_t> numbers;
    for (int32_t i = 0; i < given.count; ++i) numbers.push_back(given.integers[i]);
    return AttributeValue::of(std::move(numbers));
}

std::vector<Tensor> tensors(const DeepstitchTensor* given, int32_t count) {
    require(count >= 0 && (count == 0 || given != nullptr), "the list of tensors is a null pointer");
    std::vector<Tensor> made(static_cast<size_t>(count));
    for (size_t i = 0; i < made.size(); ++i) {
        require(given[i].dtype >= 0 && given[i].dtype <= 3, "tensor ", i, " has the unknown dtype ", given[i].dtype);
        require(given[i].rank >= 0 && given[i].rank <= kMaxRank, "tensor ", i, " has rank ", given[i].rank,
                "; at most ", kMaxRank, " is supported");
        made[i].dtype = static_cast<DType>(given[i].dtype);
        made[i].shape.rank = given[i].rank;
        std::memcpy(made[i].shape.dims, given[i].dims, sizeof(made[i].shape.dims));
        made[i].data = given[i].data;
    }
    return made;
}

}  // namespace

int32_t deepstitch_abi_version(void) { return DEEPSTITCH_ABI_VERSION; }

const char* deepstitch_describe(void) {
    static const std::string text = library_json();
    return text.c_str();
}

int deepstitch_create(const char* op, const DeepstitchAttribute* attributes, int32_t count,
                      DeepstitchInstance** instance, char* error, size_t capacity) {
    return guarded(error, capacity, [&] {
        require(op != nullptr && instance != nullptr, "a null pointer");
        require(count >= 0 && (count == 0 || attributes != nullptr), "the list of attributes is a null pointer");
        std::map<std::string, AttributeValue> values;
        for (int32_t i = 0; i < count; ++i) {
            require(attributes[i].name != nullptr, "attribute ", i, " has no name");
            values[attributes[i].name] = value_of(attributes[i]);
        }
        *instance = wrap(Instance(find_op(op), values));
    });
}

void deepstitch_destroy(DeepstitchInstance* instance) { delete instance; }

int deepstitch_serialize(const DeepstitchInstance* instance, void* data, size_t size, size_t* bytes, char* error,
                         size_t capacity) {
    return guarded(error, capacity, [&] {
        require(instance != nullptr && bytes != nullptr, "a null pointer");
        const std::vector<uint8_t> serialized = instance->instance.serialize();
        *bytes = serialized.size();
        if (data != nullptr && serialized.size() <= size) std::memcpy(data, serialized.data(), serialized.size());
    });
}

int deepstitch_deserialize(const char* op, const void* data, size_t size, DeepstitchInstance** instance, char* error,
                           size_t capacity) {
    return guarded(error, capacity, [&] {
        require(op != nullptr && instance != nullptr, "a null pointer");
        *instance = wrap(Instance(find_op(op), data, size));
    });
}

const char* deepstitch_signature(const DeepstitchInstance* instance) {
    return instance == nullptr ? nullptr : instance->signature.c_str();
}

int deepstitch_prepare(const DeepstitchInstance* instance, const DeepstitchTensor* inputs, int32_t num_inputs,
                       DeepstitchTensor* outputs, int32_t num_outputs, size_t* workspace, char* error,
                       size_t capacity) {
    return guarded(error, capacity, [&] {
        require(instance != nullptr && workspace != nullptr, "a null pointer");
        const Op& op = *instance->instance.op;
        const std::vector<Tensor> in = tensors(inputs, num_inputs);
        validate(op, in);
        const size_t expected = op.outputs().size();
        require(num_outputs >= 0 && static_cast<size_t>(num_outputs) == expected && outputs != nullptr, "got ",
                num_outputs, " outputs; these attributes give ", expected);
        for (int i = 0; i < num_outputs; ++i) {
            const Tensor described = describe_output(op, i, in);
            outputs[i].dtype = static_cast<int32_t>(described.dtype);
            outputs[i].rank = described.shape.rank;
            std::memcpy(outputs[i].dims, described.shape.dims, sizeof(outputs[i].dims));
        }
        *workspace = op.workspace(in);
    });
}

int deepstitch_enqueue(const DeepstitchInstance* instance, const DeepstitchTensor* inputs, int32_t num_inputs,
                       const DeepstitchTensor* outputs, int32_t num_outputs, void* workspace, void* stream,
                       char* error, size_t capacity) {
    return guarded(error, capacity, [&] {
        require(instance != nullptr, "a null pointer");
        const std::unique_ptr<Launcher> launcher = make_launcher(stream);
        run(*instance->instance.op, tensors(inputs, num_inputs), tensors(outputs, num_outputs), workspace, *launcher);
    });
}

void* deepstitch_allocate(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 256, bytes == 0 ? 1 : bytes) != 0) return nullptr;
    std::memset(data, 0xff, bytes);
    return data;
}

void deepstitch_free(void* data) { std::free(data); }
