// A stand-in for NVIDIA's driver: the functions of libcuda.so.1 that deepstitch uses. Kernels run through the host shim,
// which is linked into the same library, so that everything above the driver (choice of kernel, parameters, grids,
// the code that is embedded) is what runs on a GPU. Device memory can be touched by kernels and copies alone: host code
// that follows a device pointer dies.
//
// Work of a stream is put off until somebody waits for it, so that whoever reads too early, or changes a buffer that is
// still to be copied, gets wrong numbers. Work of the null stream is done at once, after that of all others. A stream
// that is captured keeps its work in a graph, to be done at every launch.
//
// Every call is a line in the file FAKE_CUDA_LOG names. FAKE_CUDA_FAIL="cuLaunchKernel=700" makes a function fail.
// FAKE_CUDA_MEMORY is what the card has, in bytes, FAKE_CUDA_SM its compute capability: 61 if not given.
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "launcher.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNoBinaryForGpu = 209, kInvalidImage = 200, kNotFound = 500;
constexpr int kCaptureUnsupported = 900, kCaptureInvalidated = 901, kCaptureUnmatched = 903;
constexpr unsigned kFatbinMagic = 0xBA55ED50;
constexpr size_t kArena = size_t{16} << 30, kPage = 4096;
constexpr size_t kGarbage = 64 << 20;  // what new memory is filled with, at most

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
    OnDevice() {
        if (depth++ == 0) protect(PROT_READ | PROT_WRITE);
    }
    ~OnDevice() {
        if (--depth == 0) protect(PROT_NONE);
    }
    static void protect(int how) {
        if (mprotect(arena().base, arena().used + kPage, how) != 0) abort();
    }
    static inline int depth = 0;
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

// Memory of the card in bytes, and what is taken of it.
size_t card_bytes() {
    const char* given = getenv("FAKE_CUDA_MEMORY");
    return given ? strtoull(given, nullptr, 10) : kArena;
}
size_t taken_bytes() {
    size_t sum = 0;
    for (const auto& [_, bytes] : arena().taken) sum += bytes - kPage;
    return sum;
}

struct Image {
    const char* data;
    size_t bytes;
};

using Work = std::function<int()>;

struct Graph {
    std::vector<Work> work;
};

struct Stream {
    std::vector<Work> pending;
    std::unique_ptr<Graph> capture;
    bool invalidated = false;
    int failed = 0;  // reported by the next call that waits, as on a GPU

    // In order; a work that itself waits for this stream finds nothing left.
    int drain() {
        while (!pending.empty()) {
            std::vector<Work> now;
            now.swap(pending);
            for (const Work& work : now) {
                if (const int code = work()) failed = failed ? failed : code;
            }
        }
        const int code = failed;
        failed = 0;
        return code;
    }
};

std::set<Stream*>& streams() {
    static std::set<Stream*> all;
    return all;
}
int drain_all() {
    int failed = 0;
    for (Stream* stream : std::set<Stream*>(streams())) {
        if (const int code = stream->drain()) failed = failed ? failed : code;
    }
    return failed;
}
// Calls a GPU refuses while anything is captured, because they wait or change memory.
bool capturing() {
    bool found = false;
    for (Stream* stream : streams()) {
        if (stream->capture) found = stream->invalidated = true;
    }
    return found;
}
int enqueue(void* where, Work work) {
    if (where == nullptr) {
        if (const int failed = drain_all()) return failed;
        return work();
    }
    Stream* const stream = static_cast<Stream*>(where);
    if (streams().count(stream) == 0) return 400;  // invalid handle
    (stream->capture ? stream->capture->work : stream->pending).push_back(std::move(work));
    return 0;
}

std::map<char*, size_t>& pinned() {
    static std::map<char*, size_t> all;
    return all;
}
bool is_pinned(const void* at, size_t bytes) {
    const char* begin = static_cast<const char*>(at);
    for (const auto& [base, size] : pinned()) {
        if (begin >= base && begin + bytes <= base + size) return true;
    }
    return false;
}
bool is_device(const void* at, size_t bytes) {
    const char* begin = static_cast<const char*>(at);
    for (const auto& [base, size] : arena().taken) {
        if (begin >= base && begin + bytes <= static_cast<char*>(base) + size - kPage) return true;
    }
    return false;
}
int copy_now(void* to, const void* from, size_t bytes) {
    const OnDevice here;
    memmove(to, from, bytes);
    return 0;
}
std::string sizes(const void* to, const void* from, size_t bytes) {
    char text[96];
    snprintf(text, sizeof text, "%zu %p %p", bytes, to, from);
    return text;
}

double now_ms() {
    timespec at{};
    clock_gettime(CLOCK_MONOTONIC, &at);
    return static_cast<double>(at.tv_sec) * 1e3 + static_cast<double>(at.tv_nsec) / 1e6;
}

}  // namespace

#define ENTER(...)                                          \
    if (const int failed = entered(__func__ __VA_OPT__(, ) __VA_ARGS__)) return failed

EXPORT int cuGetErrorName(int code, const char** text) {
    static const std::map<int, const char*> names = {
        {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
        {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
        {100, "CUDA_ERROR_NO_DEVICE"},
        {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
        {kNotFound, "CUDA_ERROR_NOT_FOUND"},
        {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    };
    const auto found = names.find(code);
    *text = found == names.end() ? "CUDA_ERROR_FAKE" : found->second;
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
    const char* given = getenv("FAKE_CUDA_SM");
    const int sm = given ? atoi(given) : 61;
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : attribute == 16 ? 4 : attribute == 38 ? 1 << 20 : 1000;
    return 0;
}
EXPORT int cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = card_bytes();
    return 0;
}
EXPORT int cuMemGetInfo_v2(size_t* available, size_t* total) {
    ENTER();
    *total = card_bytes();
    *available = *total - taken_bytes();
    return 0;
}
EXPORT int cuDeviceGetCount(int* count) {
    ENTER();
    *count = 1;
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
    if (capturing()) return kCaptureUnsupported;
    return drain_all();
}

EXPORT int cuMemAlloc_v2(void** pointer, size_t bytes) {
    ENTER(std::to_string(bytes));
    if (capturing()) return kCaptureUnsupported;
    const size_t taken = (bytes + kPage - 1) / kPage * kPage + kPage;
    if (bytes == 0) return kInvalidValue;
    if (taken_bytes() + bytes > card_bytes() || arena().used + taken + kPage > kArena) return kOutOfMemory;
    *pointer = arena().base + arena().used;
    arena().taken[*pointer] = taken;
    arena().used += taken;
    const OnDevice here;
    memset(*pointer, 0xFF, bytes < kGarbage ? bytes : kGarbage);  // NaN, whatever is read as a float
    return 0;
}
EXPORT int cuMemFree_v2(void* pointer) {
    ENTER();
    if (capturing()) return kCaptureUnsupported;
    if (const int failed = drain_all()) return failed;
    const auto found = arena().taken.find(pointer);
    if (found == arena().taken.end()) return kInvalidValue;
    madvise(pointer, found->second, MADV_DONTNEED);
    arena().taken.erase(found);
    if (arena().taken.empty()) arena().used = 0;
    return 0;
}
EXPORT int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    ENTER(std::to_string(bytes));
    if (bytes == 0) return kInvalidValue;
    *pointer = aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
    memset(*pointer, 0xAB, bytes);
    pinned()[static_cast<char*>(*pointer)] = bytes;
    return 0;
}
EXPORT int cuMemFreeHost(void* pointer) {
    ENTER();
    if (const int failed = drain_all()) return failed;
    if (pinned().erase(static_cast<char*>(pointer)) == 0) return kInvalidValue;
    free(pointer);
    return 0;
}

EXPORT int cuMemcpyHtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    return enqueue(nullptr, [=] { return copy_now(to, from, bytes); });
}
EXPORT int cuMemcpyDtoH_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    return enqueue(nullptr, [=] { return copy_now(to, from, bytes); });
}
EXPORT int cuMemcpyDtoD_v2(void* to, const void* from, size_t bytes) {
    ENTER(std::to_string(bytes));
    return enqueue(nullptr, [=] { return copy_now(to, from, bytes); });
}
// Pageable memory is read before the call returns, page-locked memory when the stream gets there.
EXPORT int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) {
    ENTER(sizes(to, from, bytes));
    if (!is_device(to, bytes)) return kInvalidValue;
    if (is_pinned(from, bytes)) return enqueue(stream, [=] { return copy_now(to, from, bytes); });
    const std::string copy(static_cast<const char*>(from), bytes);
    return enqueue(stream, [=] { return copy_now(to, copy.data(), bytes); });
}
EXPORT int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) {
    ENTER(sizes(to, from, bytes));
    if (!is_device(from, bytes)) return kInvalidValue;
    if (const int failed = enqueue(stream, [=] { return copy_now(to, from, bytes); })) return failed;
    return stream == nullptr || stream->capture || is_pinned(to, bytes) ? 0 : stream->drain();
}
EXPORT int cuMemcpyDtoDAsync_v2(void* to, const void* from, size_t bytes, Stream* stream) {
    ENTER(sizes(to, from, bytes));
    if (!is_device(to, bytes) || !is_device(from, bytes)) return kInvalidValue;
    return enqueue(stream, [=] { return copy_now(to, from, bytes); });
}
// CUDA_MEMCPY2D of cuda.h; here for device memory on both sides.
struct Copy2D {
    size_t from_x, from_y;
    int from_kind;
    const void* from_host;
    const char* from;
    void* from_array;
    size_t from_pitch, to_x, to_y;
    int to_kind;
    void* to_host;
    char* to;
    void* to_array;
    size_t to_pitch, width, height;
};
EXPORT int cuMemcpy2DAsync_v2(const Copy2D* given, Stream* stream) {
    const Copy2D copy = *given;
    ENTER(sizes(copy.to, copy.from, copy.width * copy.height));
    const bool whole = copy.from_x == 0 && copy.from_y == 0 && copy.to_x == 0 && copy.to_y == 0;
    const bool pitches = copy.from_pitch >= copy.width && copy.to_pitch >= copy.width;
    if (!whole || !pitches || copy.from_kind != 2 || copy.to_kind != 2 || copy.height == 0) return kInvalidValue;
    const size_t last = copy.height - 1;
    if (!is_device(copy.from, last * copy.from_pitch + copy.width)) return kInvalidValue;
    if (!is_device(copy.to, last * copy.to_pitch + copy.width)) return kInvalidValue;
    return enqueue(stream, [=] {
        const OnDevice here;
        for (size_t row = 0; row < copy.height; ++row) {
            memmove(copy.to + row * copy.to_pitch, copy.from + row * copy.from_pitch, copy.width);
        }
        return 0;
    });
}
EXPORT int cuMemsetD8_v2(void* to, unsigned char value, size_t bytes) {
    ENTER(std::to_string(bytes));
    return enqueue(nullptr, [=] {
        const OnDevice here;
        memset(to, value, bytes);
        return 0;
    });
}
EXPORT int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, Stream* stream) {
    ENTER(std::to_string(bytes));
    if (!is_device(to, bytes)) return kInvalidValue;
    return enqueue(stream, [=] {
        const OnDevice here;
        memset(to, value, bytes);
        return 0;
    });
}

EXPORT int cuStreamCreate(Stream** stream, unsigned) {
    ENTER();
    *stream = new Stream;
    streams().insert(*stream);
    return 0;
}
EXPORT int cuStreamDestroy_v2(Stream* stream) {
    ENTER();
    const int failed = stream->drain();
    streams().erase(stream);
    delete stream;
    return failed;
}
EXPORT int cuStreamSynchronize(Stream* stream) {
    ENTER();
    if (stream == nullptr) return drain_all();
    if (stream->capture) {
        stream->invalidated = true;
        return kCaptureUnsupported;
    }
    return stream->drain();
}
EXPORT int cuStreamBeginCapture_v2(Stream* stream, int) {
    ENTER();
    if (stream == nullptr || stream->capture) return kCaptureUnsupported;
    stream->capture = std::make_unique<Graph>();
    stream->invalidated = false;
    return 0;
}
EXPORT int cuStreamEndCapture(Stream* stream, Graph** graph) {
    ENTER();
    *graph = nullptr;
    if (!stream->capture) return kCaptureUnmatched;
    const std::unique_ptr<Graph> made = std::move(stream->capture);
    if (stream->invalidated) return kCaptureInvalidated;
    *graph = new Graph(*made);
    return 0;
}
EXPORT int cuStreamIsCapturing(Stream* stream, int* status) {
    *status = stream == nullptr || !stream->capture ? 0 : stream->invalidated ? 2 : 1;
    return 0;
}
EXPORT int cuGraphInstantiateWithFlags(Graph** ready, const Graph* graph, unsigned long long) {
    ENTER();
    *ready = new Graph(*graph);
    return 0;
}
EXPORT int cuGraphLaunch(const Graph* ready, Stream* stream) {
    ENTER();
    for (const Work& work : ready->work) {
        if (const int failed = enqueue(stream, work)) return failed;
    }
    return 0;
}
EXPORT int cuGraphExecDestroy(Graph* ready) {
    ENTER();
    delete ready;
    return 0;
}
EXPORT int cuGraphDestroy(Graph* graph) {
    ENTER();
    delete graph;
    return 0;
}
// For stand-ins of libraries above the driver: their work takes its turn in a stream, and may touch device memory.
EXPORT int fake_cuda_enqueue(Stream* stream, void (*callback)(void*), void* data) {
    ENTER();
    return enqueue(stream, [=] {
        const OnDevice here;
        callback(data);
        return 0;
    });
}

struct Event {
    double at = 0;
    Stream* stream = nullptr;
};
EXPORT int cuEventCreate(Event** event, unsigned) {
    *event = new Event;
    return 0;
}
EXPORT int cuEventDestroy_v2(Event* event) {
    delete event;
    return 0;
}
EXPORT int cuEventRecord(Event* event, Stream* stream) {
    event->stream = stream;
    return enqueue(stream, [=] {
        event->at = now_ms();
        return 0;
    });
}
EXPORT int cuEventSynchronize(Event* event) { return event->stream == nullptr ? 0 : event->stream->drain(); }
EXPORT int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    return enqueue(stream, [=] { return event->stream == nullptr ? 0 : event->stream->drain(); });
}
EXPORT int cuEventElapsedTime(float* milliseconds, const Event* begin, const Event* end) {
    *milliseconds = static_cast<float>(end->at - begin->at);
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
                          unsigned bz, unsigned shared, Stream* stream, void** params, void** extra) {
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
    const std::string packed(static_cast<const char*>(data), bytes);
    const std::string name = function;
    return enqueue(stream, [=] {
        const OnDevice here;
        try {
            // where a GPU would have a stream, the host shim has an order of blocks: the natural one
            deepstitch::make_launcher(nullptr)->launch(name.c_str(), {gx, gy, gz}, {bx, by, bz}, shared, packed.data(),
                                                       bytes);
        } catch (const std::exception& error) {
            fprintf(stderr, "%s: %s\n", name.c_str(), error.what());
            return 719;
        }
        return 0;
    });
}

// Bindings look every function up here, by its name without a suffix for the version.
EXPORT int cuGetProcAddress_v2(const char* symbol, void** function, int, unsigned long long, int* status) {
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&drain_all), &self);
    static void* const library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    const std::string name = symbol;
    for (const std::string& each : {name + "_v2", name}) {
        *function = dlsym(library, each.c_str());
        if (*function != nullptr) break;
    }
    if (status != nullptr) *status = *function == nullptr ? 1 : 0;
    return *function == nullptr ? kNotFound : 0;
}
