// Launches any kernel of shim_kernels.cuh from Python.
#include <cstring>
#include <exception>

#include "abi.h"
#include "launcher.h"

extern "C" DEEPSTITCH_API int shim_launch(const char* kernel, const uint32_t* grid, const uint32_t* block,
                                          size_t dynamic_shared, const void* params, size_t bytes, uint64_t seed,
                                          char* error, size_t capacity) {
    try {
        deepstitch::make_launcher(reinterpret_cast<void*>(seed))
            ->launch(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared, params, bytes);
        return 0;
    } catch (const std::exception& caught) {
        std::strncpy(error, caught.what(), capacity - 1);
        return 1;
    }
}
