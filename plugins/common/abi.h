/* The C interface of a library of ops: what Python uses. The same for the library that runs on the CPU through the host
 * shim and for the one that runs on a GPU; what differs is where pointers point to and what `stream` means.
 *
 * A function that returns int returns 0, or 1 with a message in `error`: text with a final zero, cut to `capacity`.
 * Nothing is thrown. Instances may be used from several threads. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define DEEPSTITCH_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define DEEPSTITCH_ABI_VERSION 1

enum { DEEPSTITCH_INT = 0, DEEPSTITCH_FLOAT = 1, DEEPSTITCH_STRING = 2, DEEPSTITCH_INTS = 3 };

typedef struct {
    const char* name;
    int32_t kind;             /* which of the following holds the value */
    int32_t count;            /* of integers */
    int64_t integer;
    double real;              /* held as float32 */
    const char* text;
    const int64_t* integers;
} DeepstitchAttribute;

typedef struct {
    int32_t dtype;            /* 0 float32, 1 float16, 2 int8, 3 int32 */
    int32_t rank;
    int64_t dims[8];
    void* data;               /* not looked at where only shapes are checked */
} DeepstitchTensor;

typedef struct DeepstitchInstance DeepstitchInstance;

DEEPSTITCH_API int32_t deepstitch_abi_version(void);

/* JSON: {"abi", "namespace", "launcher", "targets", "ops": [{"name", "version", "attributes": [{"name", "kind",
 * "required", "default"}]}]}. "default" is absent where required. */
DEEPSTITCH_API const char* deepstitch_describe(void);

DEEPSTITCH_API int deepstitch_create(const char* op, const DeepstitchAttribute* attributes, int32_t count,
                                     DeepstitchInstance** instance, char* error, size_t capacity);
DEEPSTITCH_API void deepstitch_destroy(DeepstitchInstance* instance);

/* `*bytes` is what the instance needs; written where that fits into `size`. */
DEEPSTITCH_API int deepstitch_serialize(const DeepstitchInstance* instance, void* data, size_t size, size_t* bytes,
                                        char* error, size_t capacity);
DEEPSTITCH_API int deepstitch_deserialize(const char* op, const void* data, size_t size, DeepstitchInstance** instance,
                                          char* error, size_t capacity);

/* JSON: {"inputs": [{"name", "dtypes"}], "outputs": [...]}, for the attributes of the instance. Freed with it. */
DEEPSTITCH_API const char* deepstitch_signature(const DeepstitchInstance* instance);

/* Checks the inputs, then fills in dtype and shape of every output, and the bytes of workspace. No pointer is read. */
DEEPSTITCH_API int deepstitch_prepare(const DeepstitchInstance* instance, const DeepstitchTensor* inputs,
                                      int32_t num_inputs, DeepstitchTensor* outputs, int32_t num_outputs,
                                      size_t* workspace, char* error, size_t capacity);

/* Checks everything again and launches. GPU: pointers of the current context, `stream` a CUstream; returns before the
 * kernels have run. Host shim: host pointers, `stream` the seed of the order of blocks and threads. */
DEEPSTITCH_API int deepstitch_enqueue(const DeepstitchInstance* instance, const DeepstitchTensor* inputs,
                                      int32_t num_inputs, const DeepstitchTensor* outputs, int32_t num_outputs,
                                      void* workspace, void* stream, char* error, size_t capacity);

/* Host memory aligned to 256 bytes, of exactly this size under an address sanitizer, filled with NaN bytes. */
DEEPSTITCH_API void* deepstitch_allocate(size_t bytes);
DEEPSTITCH_API void deepstitch_free(void* data);

#ifdef __cplusplus
}
#endif
