// Stacks and the switch between them, for the host shim. Included by launcher_host.cpp alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <stdexcept>

#if !defined(__x86_64__) && !defined(DEEPSTITCH_SHIM_PORTABLE)
#define DEEPSTITCH_SHIM_PORTABLE
#endif
#if defined(DEEPSTITCH_SHIM_PORTABLE)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace deepstitch {
namespace shim {

#if defined(DEEPSTITCH_SHIM_PORTABLE)

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#else

using Context = void*;  // the stack pointer; registers lie on the stack

extern "C" void deepstitch_shim_switch(void** from, void* to);
// Saves what the calling convention asks to keep, changes stacks, restores, returns there.
asm(R"(
    .text
    .p2align 4
    .globl deepstitch_shim_switch
    .hidden deepstitch_shim_switch
    .type deepstitch_shim_switch, @function
deepstitch_shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size deepstitch_shim_switch, .-deepstitch_shim_switch
)");

inline void switch_context(Context& from, Context& to) { deepstitch_shim_switch(&from, to); }

#endif

// One stack per thread of a block, each with a page below it that faults.
class Stacks {
public:
    static constexpr unsigned kCount = 1024;
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kBytes = 256 << 10;
#else
    static constexpr size_t kBytes = 64 << 10;
#endif

    // Once; kept for the life of the process.
    void map() {
        if (memory_ != nullptr) return;
        const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        void* mapped = mmap(nullptr, kBytes * kCount, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (mapped == MAP_FAILED) throw std::runtime_error("host shim: no memory for the stacks of the fibers");
        memory_ = static_cast<char*>(mapped);
        for (unsigned i = 0; i < kCount; ++i) mprotect(memory_ + i * kBytes, page, PROT_NONE);
    }

    // Frames that were left for good, by a switch at the end of a fiber or at a failure, are still marked in the
    // shadow of the address sanitizer.
    void forget_frames([[maybe_unused]] unsigned thread, [[maybe_unused]] size_t bytes) const {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(top(thread) - bytes, bytes);
#endif
    }

    // A switch to `context` calls `entry`, which must not return.
    void rewind(Context& context, unsigned thread, void (*entry)()) const {
        forget_frames(thread, 4 << 10);
#if defined(DEEPSTITCH_SHIM_PORTABLE)
        getcontext(&context);
        char* bottom = memory_ + thread * kBytes;
        context.uc_stack.ss_sp = bottom;
        context.uc_stack.ss_size = static_cast<size_t>(top(thread) - bottom);
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
#else
        void** slots = reinterpret_cast<void**>(top(thread));
        slots[-1] = nullptr;  // where entry would return to
        slots[-2] = reinterpret_cast<void*>(entry);
        for (int i = 3; i <= 8; ++i) slots[-i] = nullptr;  // six registers
        context = slots - 8;
#endif
    }

private:
    // At different offsets, or the same variable of all threads would share one set of the cache.
    char* top(unsigned thread) const { return memory_ + (thread + 1) * kBytes - (thread % 28) * 576; }

    char* memory_ = nullptr;
};

}  // namespace shim
}  // namespace deepstitch
