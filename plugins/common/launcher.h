// How host code starts a kernel: on a GPU through the driver API, or on the CPU through the host shim.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace deepstitch {

// launch() neither allocates device memory nor waits for the device. It throws std::runtime_error.
class Launcher {
public:
    struct Dim3 {
        uint32_t x = 1, y = 1, z = 1;
    };
    virtual ~Launcher();
    // Copies params_bytes of params, the only argument of the kernel.
    virtual void launch(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, const void* params,
                        size_t params_bytes) = 0;
    virtual int multiprocessors() const = 0;
};

// One per enqueue. Driver: stream is a CUstream of the current context; the code is loaded at the first launch on
// a device. Host shim: stream is the seed of the order of blocks and threads as a number, null for the natural order.
std::unique_ptr<Launcher> make_launcher(void* stream);

struct LauncherInfo {
    std::string kind;                  // "host" or "driver"
    std::vector<std::string> targets;  // of the embedded code: "sm_61", "compute_61"; none for "host"
};
LauncherInfo launcher_info();

}  // namespace deepstitch
