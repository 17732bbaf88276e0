// IPluginV2DynamicExt through the registry of libnvinfer.so.8.
#include <dlfcn.h>

#include <set>

#include "driver.h"

using namespace nvinfer1;

namespace {

driver::Logger logger;
void* handle = nullptr;
constexpr const char* kNamespace = "deepstitch.plugins";

// The registry of 8.6.0 has its functions in another order than 8.6.1 and its headers, after the first three.
class EarlyRegistry {
public:
    virtual bool registerCreator(IPluginCreator&, const char*) noexcept = 0;
    virtual IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept = 0;
    virtual IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept = 0;
    virtual bool isParentSearchEnabled() const = 0;
    virtual void setParentSearchEnabled(bool) = 0;
    virtual void* loadLibrary(const char*) noexcept = 0;
    virtual void deregisterLibrary(void*) noexcept = 0;
};

bool is_early() { return getInferLibVersion() == 8600; }
EarlyRegistry* early() { return reinterpret_cast<EarlyRegistry*>(getPluginRegistry()); }

IPluginCreator* creator(const char* op) { return getPluginRegistry()->getPluginCreator(op, "1", kNamespace); }
IPluginV2DynamicExt* plugin_of(void* plugin) { return static_cast<IPluginV2DynamicExt*>(plugin); }

void* checked(IPluginV2* plugin) { return static_cast<IPluginV2DynamicExt*>(plugin); }

int32_t ours() {
    int32_t count = 0, found = 0;
    IPluginCreator* const* all = getPluginRegistry()->getPluginCreatorList(&count);
    for (int32_t i = 0; i < count; ++i) found += std::strcmp(all[i]->getPluginNamespace(), kNamespace) == 0;
    return found;
}

}  // namespace

extern "C" {

const char* driver_open(const char* library) {
    IPluginRegistry* registry = getPluginRegistry();
    int32_t before = 0, after = 0;
    IPluginCreator* const* all = registry->getPluginCreatorList(&before);
    const std::set<IPluginCreator*> known(all, all + before);
    handle = is_early() ? early()->loadLibrary(library) : registry->loadLibrary(library);
    if (handle == nullptr) return nullptr;
    // TensorRT has lent its own finder by now. A refusal goes through it; then ours lets a test read what is logged.
    const PluginFieldCollection nothing{0, nullptr};
    IPluginCreator* first = registry->getPluginCreator("RMSNormRope", "1", kNamespace);
    if (first == nullptr || first->createPlugin("a layer", &nothing) != nullptr) return nullptr;
    void* opened = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(opened, "setLoggerFinder"))(&logger);
    dlclose(opened);
    all = registry->getPluginCreatorList(&after);
    std::string text;
    for (int32_t i = 0; i < after; ++i) {
        if (known.count(all[i]) == 0) text += driver::line(*all[i]);
    }
    return driver::kept(text);
}

int driver_close() {
    is_early() ? early()->deregisterLibrary(handle) : getPluginRegistry()->deregisterLibrary(handle);
    return ours() == 0 ? 1 : 0;
}

const char* driver_log() { return logger.take(); }
const char* driver_version() { return driver::kept(std::to_string(getInferLibVersion())); }

void* driver_create(const char* op, const DriverField* given, int32_t count) {
    const std::vector<PluginField> fields = driver::fields(given, count);
    const PluginFieldCollection collection{count, fields.data()};
    return checked(creator(op)->createPlugin("a layer", &collection));
}

void* driver_deserialize(const char* op, const void* data, size_t bytes) {
    return checked(creator(op)->deserializePlugin("a layer", data, bytes));
}

void* driver_clone(void* plugin) { return plugin_of(plugin)->clone(); }
void driver_destroy(void* plugin) {
    plugin_of(plugin)->terminate();
    plugin_of(plugin)->destroy();
}

size_t driver_serialize(void* plugin, void* data, size_t capacity) {
    const size_t bytes = plugin_of(plugin)->getSerializationSize();
    if (bytes <= capacity) plugin_of(plugin)->serialize(data);
    return bytes;
}

const char* driver_identity(void* plugin) {
    const IPluginV2DynamicExt& it = *plugin_of(plugin);
    return driver::kept(std::string(it.getPluginType()) + " " + it.getPluginVersion() + " " + it.getPluginNamespace());
}

int32_t driver_num_outputs(void* plugin) { return plugin_of(plugin)->getNbOutputs(); }

int32_t driver_output_dims(void* plugin, const DriverTensor* inputs, int32_t count, int32_t output, int64_t* dims) {
    driver::Builder builder;
    const std::vector<DimsExprs> given = driver::expressions(inputs, count, builder);
    return driver::values(plugin_of(plugin)->getOutputDimensions(output, given.data(), count, builder), dims);
}

int32_t driver_output_type(void* plugin, const int32_t* types, int32_t count, int32_t output) {
    const auto* given = reinterpret_cast<const DataType*>(types);
    return static_cast<int32_t>(plugin_of(plugin)->getOutputDataType(output, given, count));
}

int32_t driver_supports(void* plugin, int32_t position, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::descriptions(tensors, inputs + outputs);
    return plugin_of(plugin)->supportsFormatCombination(position, all.data(), inputs, outputs) ? 1 : 0;
}

int32_t driver_configure(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::profile(tensors, inputs + outputs);
    plugin_of(plugin)->configurePlugin(all.data(), inputs, all.data() + inputs, outputs);
    return plugin_of(plugin)->initialize();
}

size_t driver_workspace(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = driver::descriptions(tensors, inputs + outputs);
    return plugin_of(plugin)->getWorkspaceSize(all.data(), inputs, all.data() + inputs, outputs);
}

int32_t driver_enqueue(void* plugin, const DriverTensor* tensors, int32_t inputs, int32_t outputs, void* workspace) {
    const auto all = driver::descriptions(tensors, inputs + outputs);
    const driver::Pointers data(tensors, inputs, outputs);
    return plugin_of(plugin)->enqueue(all.data(), all.data() + inputs, data.inputs.data(), data.outputs.data(),
                                      workspace, nullptr);
}

}
