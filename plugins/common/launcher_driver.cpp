// Kernels on a GPU through the driver API. libcuda.so.1 is opened at the first launch and not before: a library
// that is only loaded, listed or asked for shapes needs no driver.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <utility>

#include "embedded.h"
#include "launcher.h"
#include "tensor.h"

namespace deepstitch {

Launcher::~Launcher() = default;

namespace {

// The few names of the driver's interface that are used, as cuda.h has them; stable since CUDA 4.
using Result = int;
using Context = void*;
using Device = int;
using Module = void*;
using Function = void*;
using Stream = void*;
constexpr Result kInvalidPtx = 218, kNoBinaryForGpu = 209, kUnsupportedPtxVersion = 222;
constexpr int kMultiprocessorCount = 16, kCapabilityMajor = 75, kCapabilityMinor = 76;
void* const kEnd = nullptr;
void* const kParamBufferPointer = reinterpret_cast<void*>(1);
void* const kParamBufferSize = reinterpret_cast<void*>(2);

struct Driver {
    Result (*get_error_name)(Result, const char**);
    Result (*get_error_string)(Result, const char**);
    Result (*ctx_get_current)(Context*);
    Result (*ctx_get_device)(Device*);
    Result (*ctx_get_id)(Context, unsigned long long*);  // from CUDA 12 on; null before
    Result (*device_get_attribute)(int*, int, Device);
    Result (*module_load_data)(Module*, const void*);
    Result (*module_get_function)(Function*, Module, const char*);
    Result (*launch_kernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream,
                            void**, void**);
};

template <class Pointer>
void bind(void* library, const char* name, Pointer* function, bool required = true) {
    *function = reinterpret_cast<Pointer>(dlsym(library, name));
    require(*function != nullptr || !required, "libcuda.so.1 has no ", name, ": the NVIDIA driver is too old");
}

Driver open_driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* why = dlerror();
        refuse("this kernel runs on an NVIDIA GPU, but the driver's libcuda.so.1 cannot be opened: ", why ? why : "?");
    }
    Driver driver{};
    bind(library, "cuGetErrorName", &driver.get_error_name);
    bind(library, "cuGetErrorString", &driver.get_error_string);
    bind(library, "cuCtxGetCurrent", &driver.ctx_get_current);
    bind(library, "cuCtxGetDevice", &driver.ctx_get_device);
    bind(library, "cuCtxGetId", &driver.ctx_get_id, false);
    bind(library, "cuDeviceGetAttribute", &driver.device_get_attribute);
    bind(library, "cuModuleLoadData", &driver.module_load_data);
    bind(library, "cuModuleGetFunction", &driver.module_get_function);
    bind(library, "cuLaunchKernel", &driver.launch_kernel);
    return driver;
}

const Driver& driver() {
    static const Driver opened = open_driver();  // tried again next time if it throws
    return opened;
}

std::string error_text(Result code) {
    const char* name = nullptr;
    const char* words = nullptr;
    driver().get_error_name(code, &name);
    driver().get_error_string(code, &words);
    return concat(name ? name : "unknown CUDA error", " (", code, words ? ": " : "", words ? words : "", ")");
}

template <class... Parts>
void check(Result code, const Parts&... doing) {
    if (code != 0) refuse(doing..., ": ", error_text(code));
}

int attribute(int which) {
    Device device = 0;
    int value = 0;
    check(driver().ctx_get_device(&device), "asking for the device of the current context");
    check(driver().device_get_attribute(&value, which, device), "asking device ", device, " for attribute ", which);
    return value;
}

// A destroyed context's address may be given to a new one, so its id, where the driver has one, is part of the key.
using ContextKey = std::pair<Context, unsigned long long>;

ContextKey current_context() {
    ContextKey key{nullptr, 0};
    check(driver().ctx_get_current(&key.first), "asking for the current CUDA context");
    require(key.first != nullptr, "no CUDA context is current on this thread; make one (cudaSetDevice, cuCtxSetCurrent) "
            "before enqueue");
    if (driver().ctx_get_id != nullptr) check(driver().ctx_get_id(key.first, &key.second), "asking for a context's id");
    return key;
}

const EmbeddedCode& code_of(const char* kernel) {
    for (const EmbeddedCode& code : embedded_code()) {
        const size_t length = std::strlen(code.op);
        if (std::strncmp(kernel, code.op, length) == 0 && kernel[length] == '_') return code;
    }
    refuse("this library holds no code for the kernel ", kernel);
}

std::string targets_text() {
    std::string text;
    for (const std::string& target : embedded_targets()) text += (text.empty() ? "" : ", ") + target;
    return text;
}

Module load_module(const EmbeddedCode& code) {
    Module loaded = nullptr;
    const Result result = driver().module_load_data(&loaded, code.data);
    if (result == kNoBinaryForGpu || result == kInvalidPtx || result == kUnsupportedPtxVersion) {
        const int sm = attribute(kCapabilityMajor) * 10 + attribute(kCapabilityMinor);
        refuse("the code of ", code.op, " is for ", targets_text(), "; this device is sm_", sm, " and its driver takes "
               "none of them (", error_text(result), "): build with deepstitch plugins build --sm ", sm,
               result == kUnsupportedPtxVersion ? ", or install a driver for CUDA 12.9" : "");
    }
    check(result, "loading the code of ", code.op);
    return loaded;
}

// Per context: the modules and functions found so far. Never unloaded: a context that goes takes its modules along.
class Loaded {
public:
    Function function(const char* kernel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        Code& code = contexts_[current_context()];
        const auto known = code.functions.find(kernel);
        if (known != code.functions.end()) return known->second;
        const EmbeddedCode& source = code_of(kernel);
        Module& module = code.modules[source.op];
        if (module == nullptr) module = load_module(source);
        Function found = nullptr;
        check(driver().module_get_function(&found, module, kernel), "finding the kernel ", kernel);
        return code.functions.emplace(kernel, found).first->second;
    }

private:
    struct Code {
        std::map<std::string, Module> modules;  // by op
        std::map<std::string, Function> functions;
    };
    std::mutex mutex_;
    std::map<ContextKey, Code> contexts_;
};

Loaded& loaded() {
    static Loaded& instance = *new Loaded;  // not destroyed: other threads may still launch while the process exits
    return instance;
}

class DriverLauncher final : public Launcher {
public:
    explicit DriverLauncher(Stream stream) : stream_(stream) {}

    void launch(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, const void* params,
                size_t params_bytes) override {
        void* extra[] = {kParamBufferPointer, const_cast<void*>(params), kParamBufferSize, &params_bytes, kEnd};
        const Function function = loaded().function(kernel);
        const Result result =
            driver().launch_kernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                   static_cast<unsigned>(dynamic_shared), stream_, nullptr, extra);
        check(result, "launching ", kernel, " with grid ", grid.x, "x", grid.y, "x", grid.z, ", block ", block.x, "x",
              block.y, "x", block.z, " and ", dynamic_shared, " bytes of shared memory");
    }

    int multiprocessors() const override {
        current_context();
        return attribute(kMultiprocessorCount);
    }

private:
    Stream stream_;
};

}  // namespace

std::unique_ptr<Launcher> make_launcher(void* stream) { return std::make_unique<DriverLauncher>(stream); }

LauncherInfo launcher_info() { return {"driver", embedded_targets()}; }

}  // namespace deepstitch
