// A stand-in for NVIDIA's driver: the functions of libcuda.so.1 that deepstitch uses. Kernels run through the host shim,
// which is linked into the same library, so that everything above the driver (choice of kernel, parameters, grids,
// the code that is embedded) is what runs on a GPU. Device memory can be touched by kernels and copies alone: host code
// that follows a device pointer dies.
//
// Every call is a line in the file FAKE_CUDA_LOG names. FAKE_CUDA_FAIL="cuLaunchKernel=700" makes a function fail.
#include <sys/mman.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "launcher.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kInvalidValue = 1, kNoBinaryForGpu = 209, kInvalidImage = 200, kNotFound = 500;
constexpr unsigned kFatbinMagic = 0xBA55ED50;
constexpr size_t kArena = size_t{16} << 30, kPage = 4096;

struct Arena {
    char* base = nullptr;
    size_t used = 0;
    std::map<void*, size_t> taken;
};

Arena& arena() {
    static Arena it = [] {
        Arena made;
        void* base = mmap(nullptr, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) abort();
        made.base = static_cast<char*>(base);
        return made;
    }();
    return it;
}

// Device memory is readable and writable as long as one of these lives.
struct OnDevice {
    OnDevice() { protect(PROT_READ | PROT_WRITE); }
    ~OnDevice() { protect(PROT_NONE); }
    static void protect(int how) {
        if (mprotect(arena().base, arena().used + kPage, how) != 0) abort();
    }
};

int entered(const char* function, const std::string& rest = "") {
    if (const char* path = getenv("FAKE_CUDA_LOG")) {
        if (FILE* log = fopen(path, "a")) {
            fprintf(log, "%s%s%s\n", function, rest.empty() ? "" : " ", rest.c_str());
            fclose(log);
        }
    }
    const char* fail = getenv("FAKE_CUDA_FAIL");
    const size_t length = strlen(function);
    return fail && strncmp(fail, function, length) == 0 && fail[length] == '=' ? atoi(fail + length + 1) : 0;
}

struct Image {
    const char* data;
    size_t bytes;
};

double now_ms() {
    timespec at{};
    clock_gettime(CLOCK_MONOTONIC, &at);
    return static_cast<double>(at.tv_sec) * 1e3 + static_cast<double>(at.tv_nsec) / 1e6;
}

}  // namespace

#define ENTER(...)                                          \
    if (const int failed = entered(__func__ __VA_OPT__(, ) __VA_ARGS__)) return failed

EXPORT int cuGetErrorName(int code, const char** text) {
    *text = code == kNotFound ? "CUDA_ERROR_NOT_FOUND" : code == kNoBinaryForGpu ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_FAKE";
    return 0;
}
EXPORT int cuGetErrorString(int, const char** text) {
    *text = "an error of the stand-in";
    return 0;
}
EXPORT int cuInit(unsigned) {
    ENTER();
    return 0;
}
EXPORT int cuDriverGetVersion(int* version) {
    *version = 12090;
    return 0;
}
EXPORT int cuDeviceGet(int* device, int number) {
    ENTER();
    *device = number;
    return number == 0 ? 0 : 101;
}
EXPORT int cuDeviceGetName(char* name, int length, int) {
    snprintf(name, static_cast<size_t>(length), "No GPU (host shim)");
    return 0;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER();
    *value = attribute == 75 ? 6 : attribute == 76 ? 1 : attribute == 16 ? 4 : attribute == 38 ? 1 << 20 : 1000;
    return 0;
}
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = kArena;
    return 0;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    ENTER();
    *context = &arena();
    return 0;
}
EXPORT int cuCtxSetCurrent(void*) {
    ENTER();
    return 0;
}
EXPORT int cuCtxGetCurrent(void** context) {
    ENTER();
    *context = getenv("FAKE_CUDA_NO_CONTEXT") ? nullptr : &arena();
    return 0;
}
EXPORT int cuCtxGetId(void*, unsigned long long* id) {
    ENTER();
    *id = 7;
    return 0;
}
EXPORT int cuCtxGetDevice(int* device) {
    ENTER();
    *device = 0;
    return 0;
}
EXPORT int cuCtxSynchronize() {
    ENTER();
    return 0;
}

EXPORT int cuMemAlloc_v2(void** pointer, size_t bytes) {
    ENTER(std::to_string(bytes));
    const size_t taken = (bytes + kPage - 1) / kPage * kPage + kPage;
    if (bytes == 0) return kInvalidValue;
    if (arena().used + taken + kPage > kArena) return 2;
    *pointer = arena().base + arena().used;
    arena().taken[*pointer] = taken;
    arena().used += taken;
    return 0;
}
EXPORT int cuMemFree_v2(void* pointer) {
    ENTER();
    const auto found = arena().taken.find(pointer);
    if (found == arena().taken.end()) return kInvalidValue;
    madvise(pointer, found->second, MADV_DONTNEED);
    arena().taken.erase(found);
    if (arena().taken.empty()) arena().used = 0;
    return 0;
}
EXPORT int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    const OnDevice here;
    memcpy(to, from, bytes);
    return 0;
}
EXPORT int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    const OnDevice here;
    memcpy(to, from, bytes);
    return 0;
}
EXPORT int cuMemcpyDtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    const OnDevice here;
    memcpy(to, from, bytes);
    return 0;
}
EXPORT int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, void*) {
    ENTER(std::to_string(bytes));
    const OnDevice here;
    memcpy(to, from, bytes);
    return 0;
}
EXPORT int cuMemsetD8_v2(void* to, unsigned char value, size_t bytes) {
    ENTER(std::to_string(bytes));
    const OnDevice here;
    memset(to, value, bytes);
    return 0;
}
EXPORT int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, void*) {
    return cuMemsetD8_v2(to, value, bytes);
}

EXPORT int cuEventCreate(double** event, unsigned) {
    *event = new double(0);
    return 0;
}
EXPORT int cuEventDestroy_v2(double* event) {
    delete event;
    return 0;
}
EXPORT int cuEventRecord(double* event, void*) {
    *event = now_ms();
    return 0;
}
EXPORT int cuEventSynchronize(double*) { return 0; }
EXPORT int cuEventElapsedTime(float* milliseconds, const double* begin, const double* end) {
    *milliseconds = static_cast<float>(*end - *begin);
    return 0;
}

EXPORT int cuModuleLoadData(Image** module, const void* data) {
    ENTER();
    unsigned magic = 0;
    unsigned long long payload = 0;
    memcpy(&magic, data, sizeof magic);
    if (magic != kFatbinMagic) return kInvalidImage;
    memcpy(&payload, static_cast<const char*>(data) + 8, sizeof payload);
    *module = new Image{static_cast<const char*>(data), static_cast<size_t>(payload) + 16};
    return 0;
}
// The kernel must be in the embedded code by its whole name, as a section of a cubin has it.
EXPORT int cuModuleGetFunction(char** function, const Image* module, const char* name) {
    ENTER(name);
    const std::string section = std::string(".text.") + name;
    if (memmem(module->data, module->bytes, section.c_str(), section.size() + 1) == nullptr) return kNotFound;
    *function = strdup(name);
    return 0;
}
EXPORT int cuLaunchKernel(const char* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, void* stream, void** params, void** extra) {
    char text[256];
    if (extra == nullptr || params != nullptr) return kInvalidValue;
    const void* data = extra[1];
    const size_t bytes = *static_cast<const size_t*>(extra[3]);
    snprintf(text, sizeof text, "%s %u %u %u  %u %u %u  %u %zu", function, gx, gy, gz, bx, by, bz, shared, bytes);
    ENTER(text);
    if (extra[0] != reinterpret_cast<void*>(1) || extra[2] != reinterpret_cast<void*>(2) || extra[4] != nullptr)
        return kInvalidValue;
    const bool fits = gx >= 1 && gy >= 1 && gz >= 1 && gx <= 0x7fffffffU && gy <= 65535 && gz <= 65535;
    if (!fits || bx * by * bz == 0 || bx * by * bz > 1024 || bz > 64 || shared > 49152) return kInvalidValue;
    const OnDevice here;
    try {
        deepstitch::make_launcher(stream)->launch(function, {gx, gy, gz}, {bx, by, bz}, shared, data, bytes);
    } catch (const std::exception& error) {
        fprintf(stderr, "%s: %s\n", function, error.what());
        return 719;
    }
    return 0;
}
