// Runs kernels on the CPU: the scheduler behind host_shim.h. One launch at a time, on the calling thread.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "host_shim.h"
#include "launcher.h"
#include "tensor.h"

namespace deepstitch {
namespace shim {

uint3 thread_index;
uint3 block_index;
dim3 block_size;
dim3 grid_size;
unsigned lane;
unsigned lanes;
uint64_t block_number;

namespace {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kMaxShared = 48 << 10;
constexpr size_t kMaxParams = 4096;
constexpr uint32_t kMaxGridYZ = 65535;
constexpr uint32_t kMaxGridX = 0x7fffffff;
constexpr int kMultiprocessors = 30;  // those of a Tesla P40, so that host code splits work as it would there

struct Warp {
    Exchange exchange;
    Meeting meeting;
    unsigned arrived;     // lanes waiting at the warp operation
    unsigned at_barrier;  // lanes waiting at __syncthreads
    unsigned done;        // lanes that have returned
};

struct Fiber {
    Context context;
    uint3 index;
    unsigned lane;
    unsigned parity;  // which set of words its next warp operation uses
    Warp* warp;
    Fiber* next;  // of the warp, in the order of this block; the last points to the first
};

struct Scheduler {
    Context main;
    Fiber* current = nullptr;
    const Kernel* kernel = nullptr;
    const void* params = nullptr;
    unsigned threads = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Fiber*> first;  // of each warp, in the order of this block
    size_t position = 0;        // in first: the warp that runs
    void* dynamic = nullptr;
    size_t dynamic_bytes = 0;
    size_t static_bytes = 0;  // asked for by this block
    std::string failure;
    std::mutex mutex;
    Stacks stacks;
};

Scheduler s;

Kernel*& kernels() {
    static Kernel* head = nullptr;
    return head;
}

void activate(Fiber& fiber) {
    s.current = &fiber;
    thread_index = fiber.index;
    lane = fiber.lane;
    lanes = fiber.warp->exchange.lanes;
}

void resume(Fiber& from, Fiber& to) {
    activate(to);
    switch_context(from.context, to.context);
}

// The warp of `self` can go no further before the next warp has run.
void next_warp(Fiber& self) {
    if (++s.position < s.first.size()) {
        resume(self, *s.first[s.position]);
        return;
    }
    unsigned at_barrier = 0;
    for (const Warp& warp : s.warps) at_barrier += warp.at_barrier;
    if (at_barrier == 0) {
        switch_context(self.context, s.main);  // every thread has returned
        return;
    }
    if (at_barrier != s.threads) {
        fail(concat("__syncthreads is reached by ", at_barrier, " of ", s.threads, " threads").c_str());
    }
    for (Warp& warp : s.warps) warp.at_barrier = 0;
    s.position = 0;
    if (s.first[0] != &self) resume(self, *s.first[0]);
}

// `self` waits or has returned: on to a lane that has not arrived, or to the next warp.
void leave(Fiber& self) {
    Warp& warp = *self.warp;
    if (warp.at_barrier + warp.done == warp.exchange.lanes) {
        next_warp(self);
    } else {
        resume(self, *self.next);
    }
}

const char* name_of(Meeting meeting) {
    static const char* const names[] = {"__shfl_sync",      "__shfl_xor_sync", "__shfl_up_sync",
                                        "__shfl_down_sync", "__ballot_sync",   "__syncwarp"};
    return names[static_cast<int>(meeting)];
}

void check_no_lane_waits(const Warp& warp, const char* others) {
    if (warp.arrived == 0) return;
    fail(concat(name_of(warp.meeting), " is reached by ", warp.arrived, " of ", warp.exchange.lanes,
                " lanes of a warp; another lane ", others)
             .c_str());
}

#if defined(__SANITIZE_ADDRESS__)
__attribute__((no_sanitize("address")))
#endif
void fiber_main() {
    s.kernel->body(s.params);
    Fiber& self = *s.current;
    check_no_lane_waits(*self.warp, "has returned");
    ++self.warp->done;
    leave(self);
    abort();  // nobody resumes a fiber that has returned
}

void make_fibers(dim3 block) {
    s.threads = block.x * block.y * block.z;
    const unsigned warps = (s.threads + kWarpLanes - 1) / kWarpLanes;
    s.fibers.resize(s.threads);
    s.warps.resize(warps);
    s.first.resize(warps);
    for (unsigned thread = 0; thread < s.threads; ++thread) {
        Fiber& fiber = s.fibers[thread];
        fiber.index = {thread % block.x, thread / block.x % block.y, thread / block.x / block.y};
        fiber.lane = thread % kWarpLanes;
        fiber.warp = &s.warps[thread / kWarpLanes];
    }
}

unsigned lanes_of(size_t warp) {
    const unsigned left = s.threads - static_cast<unsigned>(warp) * kWarpLanes;
    return left < kWarpLanes ? left : kWarpLanes;
}

class Random {  // splitmix64
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t below(uint64_t limit) {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15U);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
        return (z ^ (z >> 31)) % limit;
    }
    template <class T>
    void shuffle(T* items, size_t count) {
        for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[below(i)]);
    }

private:
    uint64_t state_;
};

void order_threads(Random* random) {
    for (size_t warp = 0; warp < s.warps.size(); ++warp) {
        const unsigned count = lanes_of(warp);
        unsigned order[kWarpLanes];
        std::iota(order, order + count, 0U);
        if (random != nullptr) random->shuffle(order, count);
        Fiber* base = &s.fibers[warp * kWarpLanes];
        for (unsigned i = 0; i < count; ++i) base[order[i]].next = &base[order[(i + 1) % count]];
        s.first[warp] = &base[order[0]];
    }
    if (random != nullptr) random->shuffle(s.first.data(), s.first.size());
}

void run_block() {
    ++block_number;
    s.static_bytes = 0;
    memset(s.dynamic, 0xff, s.dynamic_bytes);
    for (size_t warp = 0; warp < s.warps.size(); ++warp) {
        s.warps[warp].exchange.lanes = lanes_of(warp);
        s.warps[warp].arrived = s.warps[warp].at_barrier = s.warps[warp].done = 0;
    }
    for (unsigned thread = 0; thread < s.threads; ++thread) {
        s.fibers[thread].parity = 0;
        s.stacks.rewind(s.fibers[thread].context, thread, fiber_main);
    }
    s.position = 0;
    activate(*s.first[0]);
    switch_context(s.main, s.first[0]->context);
    s.current = nullptr;
}

[[noreturn]] void throw_failure() {
    for (unsigned thread = 0; thread < s.threads; ++thread) s.stacks.forget_frames(thread, Stacks::kBytes / 2);
    const std::string message = std::move(s.failure);
    s.failure.clear();
    throw std::runtime_error(message);
}

const Kernel& find_kernel(const char* name) {
    for (const Kernel* each = kernels(); each != nullptr; each = each->next) {
        if (strcmp(each->name, name) == 0) return *each;
    }
    throw std::runtime_error(concat("host shim: there is no kernel ", name));
}

void check_launch(const Kernel& kernel, Launcher::Dim3 grid, Launcher::Dim3 block, size_t shared, size_t params) {
    const auto expect = [&](bool condition, const std::string& what) {
        if (!condition) throw std::runtime_error(concat("host shim: kernel ", kernel.name, ": ", what));
    };
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    expect(params == kernel.params_bytes, concat("got ", params, " bytes of parameters, not ", kernel.params_bytes));
    expect(params <= kMaxParams, concat(params, " bytes of parameters; at most ", kMaxParams));
    expect(threads > 0 && threads <= kernel.max_threads && threads <= Stacks::kCount,
           concat(threads, " threads in a block; it is compiled for at most ", kernel.max_threads));
    expect(grid.x > 0 && grid.y > 0 && grid.z > 0, "an empty grid");
    expect(grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ, "a grid over the limits of the device");
    expect(shared <= kMaxShared, concat(shared, " bytes of dynamic shared memory; at most ", kMaxShared));
}

struct Freed {
    void operator()(void* data) const { free(data); }
};
using Memory = std::unique_ptr<void, Freed>;

Memory allocate(size_t bytes) {
    void* data = nullptr;
    if (posix_memalign(&data, 128, bytes) != 0) throw std::bad_alloc();
    return Memory(data);
}

void run_blocks(Launcher::Dim3 grid, uint64_t seed) {
    grid_size = {grid.x, grid.y, grid.z};
    std::vector<uint64_t> order;
    Random random(seed);
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    if (seed != 0) {
        order.resize(blocks);
        std::iota(order.begin(), order.end(), uint64_t{0});
        random.shuffle(order.data(), order.size());
    }
    order_threads(nullptr);
    for (uint64_t i = 0; i < blocks; ++i) {
        const uint64_t block = seed != 0 ? order[i] : i;
        block_index = {static_cast<unsigned>(block % grid.x), static_cast<unsigned>(block / grid.x % grid.y),
                       static_cast<unsigned>(block / grid.x / grid.y)};
        if (seed != 0) order_threads(&random);
        run_block();
        if (!s.failure.empty()) throw_failure();
    }
}

class HostLauncher final : public Launcher {
public:
    explicit HostLauncher(uint64_t seed) : seed_(seed) {}

    void launch(const char* kernel, Dim3 grid, Dim3 block, size_t dynamic_shared, const void* params,
                size_t params_bytes) override {
        const std::lock_guard<std::mutex> one_at_a_time(s.mutex);
        const Kernel& found = find_kernel(kernel);
        check_launch(found, grid, block, dynamic_shared, params_bytes);
        s.stacks.map();
        const Memory copy = allocate(params_bytes);
        memcpy(copy.get(), params, params_bytes);
        const Memory shared = allocate(dynamic_shared > 0 ? dynamic_shared : 1);  // a pointer even to nothing
        s.kernel = &found;
        s.params = copy.get();
        s.dynamic = shared.get();
        s.dynamic_bytes = dynamic_shared;
        block_size = {block.x, block.y, block.z};
        make_fibers(block_size);
        run_blocks(grid, seed_ == 0 ? 0 : seed_ + 0x10000 * ++launches_);
    }

    int multiprocessors() const override { return kMultiprocessors; }

private:
    uint64_t seed_;
    uint64_t launches_ = 0;
};

}  // namespace

Kernel::Kernel(const char* kernel, size_t bytes, unsigned threads, void (*function)(const void*))
    : name(kernel), params_bytes(bytes), max_threads(threads), body(function), next(kernels()) {
    kernels() = this;
}

const uint32_t* meet(Meeting meeting, unsigned mask, uint32_t word) {
    Fiber& self = *s.current;
    Warp& warp = *self.warp;
    if (mask != 0xffffffffU) fail(concat(name_of(meeting), " with a partial mask").c_str());
    if (warp.at_barrier + warp.done > 0) {
        fail(concat(name_of(meeting), " is not reached by ", warp.at_barrier + warp.done, " of ", warp.exchange.lanes,
                    " lanes of a warp")
                 .c_str());
    }
    if (warp.arrived > 0 && warp.meeting != meeting) check_no_lane_waits(warp, "is at another operation");
    warp.meeting = meeting;
    uint32_t* words = warp.exchange.words[self.parity];
    self.parity ^= 1U;
    words[self.lane] = word;
    if (++warp.arrived == warp.exchange.lanes) {
        warp.arrived = 0;
    } else {
        resume(self, *self.next);
    }
    return words;
}

void block_barrier() {
    Fiber& self = *s.current;
    check_no_lane_waits(*self.warp, "is at __syncthreads");
    ++self.warp->at_barrier;
    leave(self);
}

void* dynamic_shared() { return s.dynamic; }

void enter(Site& site, size_t bytes) {
    if (site.data == nullptr) site.data = allocate(bytes).release();  // reused by every launch from now on
    memset(site.data, 0xff, bytes);
    site.block = block_number;
    s.static_bytes += bytes;
    if (s.static_bytes + s.dynamic_bytes > kMaxShared) {
        fail(concat(s.static_bytes, " + ", s.dynamic_bytes, " bytes of shared memory; at most ", kMaxShared).c_str());
    }
}

uint32_t source_missing() { fail("a shuffle reads from a lane that does not exist"); }

void fail(const char* what) {
    const auto place = [](uint3 at) { return concat("(", at.x, ", ", at.y, ", ", at.z, ")"); };
    s.failure = concat("kernel ", s.kernel->name, ", block ", place(block_index), ", thread ", place(thread_index), ": ",
                       what);
    switch_context(s.current->context, s.main);
    abort();  // nobody resumes a fiber after a failure
}

}  // namespace shim

Launcher::~Launcher() = default;

std::unique_ptr<Launcher> make_launcher(void* stream) {
    return std::make_unique<shim::HostLauncher>(reinterpret_cast<uintptr_t>(stream));
}

LauncherInfo launcher_info() { return {"host", {}}; }

}  // namespace deepstitch
