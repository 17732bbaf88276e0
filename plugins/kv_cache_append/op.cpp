// KVCacheAppend on the host: shapes, checks, what has to be copied, choice of kernel.
#include <string>

#include "../common/op.h"
#include "params.h"

namespace deepstitch {
namespace {

// Places of the tensors. The old cache comes first, tensor by tensor as the new one.
struct Places {
    explicit Places(bool scaled) : caches(scaled ? 4 : 2) {}
    int caches;  // inputs 0 ... caches - 1, and all outputs
    int key() const { return caches; }
    int value() const { return caches + 1; }
    int past_lengths() const { return caches + 2; }
    int query_lengths() const { return caches + 3; }
};

enum Cache { kKey, kValue, kKeyScales, kValueScales };

DType stored_as(const std::string& format) {
    if (format == "float32") return DType::kFloat32;
    if (format == "float16") return DType::kFloat16;
    require(format == "int8", "kv_format is ", format, "; it is float32, float16 or int8");
    return DType::kInt8;
}

size_t bytes_of(const Tensor& tensor) { return static_cast<size_t>(volume(tensor.shape)) * dtype_bytes(tensor.dtype); }

bool overlap(const Tensor& left, const Tensor& right) {
    const auto *a = static_cast<const char*>(left.data), *b = static_cast<const char*>(right.data);
    return a < b + bytes_of(right) && b < a + bytes_of(left);
}

// A new tensor of the cache is the memory of its old one, or memory that nothing else uses.
void check_memory(const std::vector<TensorSpec>& in_specs, const std::vector<TensorSpec>& out_specs,
                  const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    for (size_t i = 0; i < outputs.size(); ++i) {
        for (size_t j = 0; j < inputs.size(); ++j) {
            const bool in_place = i == j && outputs[i].data == inputs[j].data;
            require(in_place || !overlap(outputs[i], inputs[j]), out_specs[i].name, " overlaps ", in_specs[j].name,
                    " in memory; only the same address for ", out_specs[i].name, " and ", in_specs[i].name,
                    " is possible");
        }
        for (size_t j = 0; j < i; ++j) {
            require(!overlap(outputs[i], outputs[j]), out_specs[i].name, " overlaps ", out_specs[j].name,
                    " in memory");
        }
    }
}

class KVCacheAppend final : public Op {
public:
    explicit KVCacheAppend(const Attributes& attributes)
        : format_(attributes.text("kv_format")), stored_(stored_as(format_)), at_(stored_ == DType::kInt8) {}

    std::vector<TensorSpec> inputs() const override {
        std::vector<TensorSpec> specs{{"past_key", {stored_}}, {"past_value", {stored_}}};
        if (scaled()) {
            specs.push_back({"past_key_scales", {DType::kFloat32}});
            specs.push_back({"past_value_scales", {DType::kFloat32}});
        }
        specs.push_back({"key", {DType::kFloat32}});
        specs.push_back({"value", {DType::kFloat32}});
        specs.push_back({"past_lengths", {DType::kInt32}});
        specs.push_back({"query_lengths", {DType::kInt32}});
        return specs;
    }

    std::vector<TensorSpec> outputs() const override {
        std::vector<TensorSpec> specs{{"present_key", {stored_}}, {"present_value", {stored_}}};
        if (scaled()) {
            specs.push_back({"present_key_scales", {DType::kFloat32}});
            specs.push_back({"present_value_scales", {DType::kFloat32}});
        }
        return specs;
    }

    std::vector<DimRule> output_shape(int output, const std::vector<int>& ranks) const override {
        std::vector<DimRule> rules;
        for (int axis = 0; axis < ranks[static_cast<size_t>(output)]; ++axis) rules.push_back({output, axis, 0});
        return rules;
    }

    DType output_dtype(int output, const std::vector<DType>&) const override {
        return output <= kValue ? stored_ : DType::kFloat32;
    }

    void check(const std::vector<Tensor>& inputs) const override {
        const auto shape = [&](int place) -> const Shape& { return inputs[static_cast<size_t>(place)].shape; };
        const Shape& cache = shape(kKey);
        require(cache.rank == 4, "past_key has shape ", cache, "; it is [B, kv heads, C, D]");
        const int64_t batch = cache.dims[0], heads = cache.dims[1], capacity = cache.dims[2], width = cache.dims[3];
        require(heads >= 1 && width >= 1, "past_key has shape ", cache, "; there is at least one kv head, of width 1");
        require(width <= 1 << 16 && heads <= 1 << 16 && capacity <= INT32_MAX, "past_key has shape ", cache,
                "; kv heads and D are at most 2^16, C is at most 2^31 - 1");
        const auto same = [&](int place, const char* name, const Shape& wanted) {
            require(shape(place) == wanted, name, " has shape ", shape(place), "; it is ", wanted,
                    " by the shape of past_key");
        };
        same(kValue, "past_value", cache);
        if (scaled()) {
            const Shape tokens{3, {batch, heads, capacity}};
            same(kKeyScales, "past_key_scales", tokens);
            same(kValueScales, "past_value_scales", tokens);
        }
        const Shape& key = shape(at_.key());
        require(key.rank == 3 && key.dims[0] == batch && key.dims[2] == heads * width, "key has shape ", key,
                "; it is [", batch, ", S, ", heads * width, "] by the shape of past_key");
        require(shape(at_.value()) == key, "value has shape ", shape(at_.value()), "; it is ", key, " as key is");
        same(at_.past_lengths(), "past_lengths", {1, {batch}});
        same(at_.query_lengths(), "query_lengths", {1, {batch}});
        require(volume(key) / width <= 1 << 30, "key has ", volume(key) / width,
                " rows of tokens and heads; at most 2^30");
    }

    size_t workspace(const std::vector<Tensor>&) const override { return 0; }

    void enqueue(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, void*,
                 Launcher& launcher) const override {
        check_memory(this->inputs(), this->outputs(), inputs, outputs);
        copy(inputs, outputs, kKey, launcher);
        if (scaled()) copy(inputs, outputs, kKeyScales, launcher);
        append(inputs, outputs, launcher);
    }

private:
    bool scaled() const { return stored_ == DType::kInt8; }

    // Tensor `first` and the one after it: keys and values, or their scales.
    static void copy(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, size_t first,
                     Launcher& launcher) {
        KVCacheCopyParams p{};
        p.past_key = inputs[first].data;
        p.past_value = inputs[first + 1].data;
        p.present_key = outputs[first].data;
        p.present_value = outputs[first + 1].data;
        p.bytes = static_cast<int64_t>(bytes_of(outputs[first]));
        if (p.bytes == 0 || (p.past_key == p.present_key && p.past_value == p.present_value)) return;
        constexpr int64_t kBlockBytes = int64_t{16} * kCopyThreads * kCopyLoads;
        const Launcher::Dim3 grid{static_cast<uint32_t>((p.bytes + kBlockBytes - 1) / kBlockBytes), 2, 1};
        launcher.launch("kv_cache_append_copy", grid, {kCopyThreads, 1, 1}, 0, &p, sizeof p);
    }

    void append(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, Launcher& launcher) const {
        const auto given = [&](int place) -> const Tensor& { return inputs[static_cast<size_t>(place)]; };
        const Shape& cache = given(kKey).shape;
        const Shape& key = given(at_.key()).shape;
        KVCacheAppendParams p{};
        p.rows = static_cast<int32_t>(volume(key) / cache.dims[3]);
        if (p.rows == 0 || cache.dims[2] == 0) return;
        p.key = static_cast<const float*>(given(at_.key()).data);
        p.value = static_cast<const float*>(given(at_.value()).data);
        p.present_key = outputs[kKey].data;
        p.present_value = outputs[kValue].data;
        p.key_scales = scaled() ? static_cast<float*>(outputs[kKeyScales].data) : nullptr;
        p.value_scales = scaled() ? static_cast<float*>(outputs[kValueScales].data) : nullptr;
        p.past_lengths = static_cast<const int32_t*>(given(at_.past_lengths()).data);
        p.query_lengths = static_cast<const int32_t*>(given(at_.query_lengths()).data);
        p.tokens = static_cast<int32_t>(key.dims[1]);
        p.kv_heads = static_cast<int32_t>(cache.dims[1]);
        p.capacity = static_cast<int32_t>(cache.dims[2]);
        p.head_dim = static_cast<int32_t>(cache.dims[3]);
        const std::string kernel = concat("kv_cache_append_", format_, p.head_dim % 4 == 0 ? "" : "_scalar");
        constexpr int kRows = kAppendThreads / 32;
        const Launcher::Dim3 grid{static_cast<uint32_t>((p.rows + kRows - 1) / kRows), 2, 1};
        launcher.launch(kernel.c_str(), grid, {kAppendThreads, 1, 1}, 0, &p, sizeof p);
    }

    std::string format_;
    DType stored_;
    Places at_;
};

}  // namespace

const OpInfo& kv_cache_append() {
    static const OpInfo info{"KVCacheAppend",
                             "1",
                             {{"kv_format", Kind::kString, false, "float32"}},
                             [](const Attributes& attributes) -> std::unique_ptr<Op> {
                                 return std::make_unique<KVCacheAppend>(attributes);
                             }};
    return info;
}

}  // namespace deepstitch
