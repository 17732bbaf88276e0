// IPluginV3 without TensorRT's libraries: what its registry does with a plugin library is done here.
#include <dlfcn.h>

#include "driver.h"

using namespace nvinfer1;

namespace {

driver::Logger logger;
void* opened = nullptr;
IPluginCreatorInterface* const* creators = nullptr;
int32_t num_creators = 0;

IPluginCreatorV3One* creator(const char* op) {
    for (int32_t i = 0; i < num_creators; ++i) {
        auto* each = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(each->getPluginName(), op) == 0) return each;
    }
    return nullptr;
}

IPluginV3* plugin_of(void* plugin) { return static_cast<IPluginV3*>(plugin); }

template <class Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin_of(plugin)->getCapabilityInterface(type));
}
IPluginV3OneCore* core(void* plugin) { return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE); }
IPluginV3OneBuild* build(void* plugin) { return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(void* plugin) {
    return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

bool is(const InterfaceInfo& info, const char* kind) { return std::strcmp(info.kind, kind) == 0; }

}  // namespace

extern "C" {

const char* driver_open(const char* library) {
    opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) return nullptr;
    auto* lend = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(opened, "setLoggerFinder"));
    auto* list = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(opened, "getCreators"));
    if (lend == nullptr || list == nullptr) return nullptr;
    lend(&logger);
    creators = list(num_creators);
    std::string text;
    for (int32_t i = 0; i < num_creators; ++i) {
        if (!is(creators[i]->getInterfaceInfo(), "PLUGIN CREATOR_V3ONE")) return nullptr;
        text += driver::line(*static_cast<IPluginCreatorV3One*>(creators[i]));
    }
    return driver::kept(text);
}

int driver_close() {
    num_creators = 0;
    return dlclose(opened) == 0 ? 1 : 0;
}

const char* driver_log() { return logger.take(); }
const char* driver_version() { return driver::kept(std::to_string(NV_TENSORRT_VERSION)); }

void* driver_create(const char* op, const DriverField* given, int32_t count) {
    const std::vector<PluginField> fields = driver::fields(given, count);
    const PluginFieldCollection collection{count, fields.data()};
    return creator(op)->createPlugin("a layer", &collection, TensorRTPhase::kBUILD);
}

// The engine keeps what getFieldsToSerialize() names, and hands it back.
void* driver_deserialize(const char* op, const void* data, size_t bytes) {
    const PluginField state("deepstitch_state", data, PluginFieldType::kUNKNOWN, static_cast<int32_t>(bytes));
    const PluginFieldCollection collection{1, &state};
    return creator(op)->createPlugin("a layer", &collection, TensorRTPhase::kRUNTIME);
}

void* driver_clone(void* plugin) {
    IPluginV3* direct = plugin_of(plugin)->clone();
    IPluginV3* attached = runtime(direct)->attachToContext(nullptr);
    delete direct;
    return attached;
}
void driver_destroy(void* plugin) { delete plugin_of(plugin); }

size_t driver_serialize(void* plugin, void* data, size_t capacity) {
    const PluginFieldCollection* found = runtime(plugin)->getFieldsToSerialize();
    if (found == nullptr || found->nbFields != 1) return 0;
    const PluginField& state = found->fields[0];
    if (std::strcmp(state.name, "deepstitch_state") != 0 || state.type != PluginFieldType::kUNKNOWN) return 0;
    const auto bytes = static_cast<size_t>(state.length);
    if (bytes <= capacity) std::memcpy(data, state.data, bytes);
    return bytes;
}

const char* driver_identity(void* plugin) {
    if (!is(plugin_of(plugin)->getInterfaceInfo(), "PLUGIN")) return "";
    if (!is(core(plugin)->getInterfaceInfo(), "PLUGIN_V3ONE_CORE")) return "";
    if (!is(build(plugin)->getInterfaceInfo(), "PLUGIN_V3ONE_BUILD")) return "";
    if (!is(runtime(plugin)->getInterfaceInfo(), "PLUGIN_V3ONE_RUNTIME")) return "";
    const IPluginV3OneCore& it = *core(plugin);
    return driver::kept(std::string(it.getPluginName()) + " " + it.getPluginVersion() + " " + it.getPluginNamespace());
}

int32_t driver_num_outputs(void* plugin) { return build(plugin)->getNbOutputs(); }

int32_t driver_output_dims(void* plugin, const DriverTensor* inputs, int32_t count, int32_t output, int64_t* dims) {
    driver::Builder builder;
    const std::vector<DimsExprs> given = driver::expressions(inputs, count, builder);
    std::vector<DimsExprs> found(static_cast<size_t>(driver_num_outputs(plugin)));
    const auto outputs = static_cast<int32_t>(found.size());
    const int32_t failed = build(plugin)->getOutputShapes(given.data(), count, nullptr, 0, found.data(), outputs, builder);
    return failed != 0 ? -1 : driver::values(found[static_cast<size_t>(output)], dims);
}

int32_t driver_output_type(void* plugin, const int32_t* types, int32_t count, int32_t output) {
    std::vector<DataType> found(static_cast<size_t>(driver_num_outputs(plugin)));
    const auto* given = reinterpret_cast<const DataType*>(types);
    const auto outputs = static_cast<int32_t>(found.size());
    if (build(plugin)->getOutputDataTypes(found.data(), outputs, given, count) != 0) return -1;
    return static_cast<int32_t>(found[static_cast<size_t>(output)]);
}

int32_t driver_supports(void* plugin, int32_t position, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::profile(tensors, inputs + outputs);
    return build(plugin)->supportsFormatCombination(position, all.data(), inputs, outputs) ? 1 : 0;
}

int32_t driver_configure(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::profile(tensors, inputs + outputs);
    return build(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
}

size_t driver_workspace(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::profile(tensors, inputs + outputs);
    return build(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
}

int32_t driver_enqueue(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs, void* workspace) {
    const auto all = driver::descriptions(tensors, inputs + outputs);
    const driver::Pointers data(tensors, inputs, outputs);
    if (runtime(plugin)->onShapeChange(all.data(), inputs, all.data() + inputs, outputs) != 0) return -2;
    return runtime(plugin)->enqueue(all.data(), all.data() + inputs, data.inputs.data(), data.outputs.data(), workspace,
                                    nullptr);
}

}
