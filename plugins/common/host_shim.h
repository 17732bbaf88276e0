// The device side on a CPU: every CUDA thread of a block is a fiber, one block runs at a time.
//
// A warp runs until all its lanes stand at __syncthreads or have returned; then the next warp runs. At a warp operation
// (shuffle, ballot, __syncwarp) all lanes meet. Anything that would hang or be undefined on a GPU ends the launch with
// an error that names the kernel, the block and the threads: a barrier or warp operation that part of the threads do
// not reach, a partial mask, shared memory over 48 KB, a misaligned load16. Shared memory holds NaN bytes when a block
// starts. Not seen: data races inside the order that was run, the memory model, anything about time.
//
// The scheduler is in launcher_host.cpp. Compile with -fno-strict-aliasing -ffp-contract=off.
#pragma once

#include <math.h>
#include <string.h>

// DEEPSTITCH_SHIM_PORTABLE: what runs on CPUs other than x86-64, for tests of it on this one.
#if defined(__SSE4_1__) && !defined(DEEPSTITCH_SHIM_PORTABLE)
#define DEEPSTITCH_SHIM_SSE
#endif
#if defined(__F16C__) && !defined(DEEPSTITCH_SHIM_PORTABLE)
#define DEEPSTITCH_SHIM_F16C
#endif
#if defined(DEEPSTITCH_SHIM_SSE) || defined(DEEPSTITCH_SHIM_F16C)
#include <immintrin.h>
#endif

#include "types.h"

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace deepstitch {
namespace shim {

enum class Meeting : int { kShuffle = 0, kShuffleXor, kShuffleUp, kShuffleDown, kBallot, kWarpBarrier };

// 32-bit words that the lanes of a warp show to each other. Two sets: a lane can be one operation ahead.
struct Exchange {
    uint32_t words[2][32];
    unsigned lanes;  // that exist: less than 32 in a partial last warp
};

struct Site {  // one STATIC_SHARED of one kernel
    void* data = nullptr;
    uint64_t block = 0;  // the block that last asked for it
    size_t bytes = 0;
    Site* next = nullptr;
};

// Shows `word` to the warp and returns the set of words that all lanes have shown when all have arrived.
const uint32_t* meet(Meeting meeting, unsigned mask, uint32_t word);
void block_barrier();
void* dynamic_shared();
void enter(Site& site, size_t bytes);  // first use of a site in a block
[[noreturn]] void fail(const char* what);

// Of the running fiber and block.
extern uint3 thread_index;
extern uint3 block_index;
extern dim3 block_size;
extern dim3 grid_size;
extern unsigned lane;
extern unsigned lanes;  // of this warp
extern uint64_t block_number;

inline void* static_shared(Site& site, size_t bytes) {
    if (site.block != block_number) enter(site, bytes);
    return site.data;
}

struct Kernel {
    Kernel(const char* kernel, size_t bytes, unsigned threads, void (*function)(const void*));
    const char* name;
    size_t params_bytes;
    unsigned max_threads;
    void (*body)(const void*);
    Kernel* next;
};

template <class T>
inline uint32_t to_word(T value) {
    static_assert(sizeof(T) == 4, "warp operations exchange 32 bits");
    uint32_t word;
    memcpy(&word, &value, 4);
    return word;
}

template <class T>
inline T from_word(uint32_t word) {
    T value;
    memcpy(&value, &word, 4);
    return value;
}

uint32_t source_missing();  // fails: a lane of a partial warp read from one that does not exist

}  // namespace shim
}  // namespace deepstitch

#define threadIdx (::deepstitch::shim::thread_index)
#define blockIdx (::deepstitch::shim::block_index)
#define blockDim (::deepstitch::shim::block_size)
#define gridDim (::deepstitch::shim::grid_size)

#define __device__
#define __host__
#define __forceinline__ inline  // not by force: a third of the time to compile
#define __align__(bytes) alignas(bytes)

#define DEEPSTITCH_KERNEL(name, Params, max_threads, min_blocks)                                           \
    static void name##_body(const Params& p);                                                              \
    static const ::deepstitch::shim::Kernel name##_kernel(                                                 \
        #name, sizeof(Params), max_threads, [](const void* p) { name##_body(*static_cast<const Params*>(p)); }); \
    static void name##_body([[maybe_unused]] const Params& p)

#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::deepstitch::shim::dynamic_shared())

#define STATIC_SHARED(type, name, count)                 \
    static ::deepstitch::shim::Site name##_site;         \
    type(&name)[count] = *static_cast<type(*)[count]>(   \
        ::deepstitch::shim::static_shared(name##_site, sizeof(type) * (count)))

inline void __syncthreads() { ::deepstitch::shim::block_barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffffU) {
    ::deepstitch::shim::meet(::deepstitch::shim::Meeting::kWarpBarrier, mask, 0);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source) {
    using namespace deepstitch::shim;
    const uint32_t* words = meet(Meeting::kShuffle, mask, to_word(value));
    const unsigned from = static_cast<unsigned>(source) & 31U;
    return from_word<T>(from < lanes ? words[from] : source_missing());
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes_apart) {
    using namespace deepstitch::shim;
    const uint32_t* words = meet(Meeting::kShuffleXor, mask, to_word(value));
    const unsigned from = (lane ^ static_cast<unsigned>(lanes_apart)) & 31U;
    return from_word<T>(from < lanes ? words[from] : source_missing());
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes_apart) {
    using namespace deepstitch::shim;
    const uint32_t* words = meet(Meeting::kShuffleDown, mask, to_word(value));
    const unsigned from = lane + lanes_apart;
    if (from > 31U) return value;
    return from_word<T>(from < lanes ? words[from] : source_missing());
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes_apart) {
    using namespace deepstitch::shim;
    const uint32_t* words = meet(Meeting::kShuffleUp, mask, to_word(value));
    return lane < lanes_apart ? value : from_word<T>(words[lane - lanes_apart]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    using namespace deepstitch::shim;
    const uint32_t* words = meet(Meeting::kBallot, mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned i = 0; i < lanes; ++i) votes |= words[i] << i;
    return votes;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

// Four products of signed bytes, added to c.
inline int __dp4a(int a, int b, int c) {
#if defined(DEEPSTITCH_SHIM_SSE)
    const __m128i products = _mm_madd_epi16(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(a)),
                                            _mm_cvtepi8_epi16(_mm_cvtsi32_si128(b)));
    return c + _mm_cvtsi128_si32(products) + _mm_extract_epi32(products, 1);
#else
    for (int i = 0; i < 32; i += 8) c += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return c;
#endif
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = (static_cast<uint64_t>(high) << 32) | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned byte = static_cast<unsigned>(bytes >> (8 * ((selector >> (4 * i)) & 7U))) & 255U;
        const bool sign = ((selector >> (4 * i)) & 8U) != 0;
        result |= (sign ? ((byte & 128U) != 0 ? 255U : 0U) : byte) << (8 * i);
    }
    return result;
}

template <class T>
inline T __ldg(const T* address) {
    return *address;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __float_as_int(float value) { return ::deepstitch::shim::from_word<int>(::deepstitch::shim::to_word(value)); }
inline unsigned __float_as_uint(float value) { return ::deepstitch::shim::to_word(value); }
inline float __int_as_float(int value) { return ::deepstitch::shim::from_word<float>(static_cast<uint32_t>(value)); }
inline float __uint_as_float(unsigned value) { return ::deepstitch::shim::from_word<float>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
// Saturates, and gives 0 for NaN, as the instruction does.
inline int __float2int_rn(float value) {
    const float whole = rintf(value);
    if (!(whole >= -0x1p31F)) return whole < 0 ? -0x7fffffff - 1 : 0;
    return whole < 0x1p31F ? static_cast<int>(whole) : 0x7fffffff;
}

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}

// On integers only: sums of floats would depend on the order.
inline int atomicAdd(int* address, int value) {
    const int before = *address;
    *address = before + value;
    return before;
}
inline int atomicMax(int* address, int value) {
    const int before = *address;
    if (value > before) *address = value;
    return before;
}

namespace deepstitch {

inline uint4 load16(const void* address) {
    if ((reinterpret_cast<uintptr_t>(address) & 15U) != 0) shim::fail("load16 from an address that is no multiple of 16");
    return *static_cast<const uint4*>(address);
}

inline float half_to_float(uint16_t bits) {
#if defined(DEEPSTITCH_SHIM_F16C)
    return _cvtsh_ss(bits);
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
    const uint32_t exponent = (bits >> 10) & 31U;
    const uint32_t mantissa = bits & 1023U;
    if (exponent == 31) return shim::from_word<float>(sign | 0x7f800000U | (mantissa << 13));
    if (exponent == 0) return shim::from_word<float>(sign | shim::to_word(static_cast<float>(mantissa) * 0x1p-24F));
    return shim::from_word<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
#endif
}

inline uint16_t float_to_half(float value) {
#if defined(DEEPSTITCH_SHIM_F16C)
    return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
    const uint32_t word = shim::to_word(value);
    const uint16_t sign = static_cast<uint16_t>((word >> 16) & 0x8000U);
    const uint32_t magnitude = word & 0x7fffffffU;
    if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U);
    if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to 65536 or more
    if (magnitude < 0x38800000U) {  // subnormal: the unit is 2^-24
        const float units = shim::from_word<float>(magnitude) * 0x1p24F;
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(units)));
    }
    const uint32_t rounded = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000U) >> 13));
#endif
}

inline int round_even(float value) { return __float2int_rn(value); }

}  // namespace deepstitch
