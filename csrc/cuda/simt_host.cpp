// Fibers, barriers, meetings of a warp, shared memory and asynchronous copies of one block after the other.
//
// A block's threads take turns on one stack each. In mode `fast` in the order of their numbers, in `seeded` and `check`
// with a seed in a random one, blocks too. A fault leaves the fibers where they are: the launch is over.

#include <sys/mman.h>

#if defined(__x86_64__) && !defined(SIMT_PORTABLE)
#define SIMT_OWN_SWITCH 1
#else
#define SIMT_OWN_SWITCH 0
#include <ucontext.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "simt_runtime.h"

namespace simt::host {

Runtime runtime;

namespace {

// ------------------------------------------------------------------------------------------------------ switching
// stacks

void* scheduler_stack_pointer = nullptr;

void run_thread();

#if SIMT_OWN_SWITCH

extern "C" void simt_switch(void** save, void* load);
// What a call preserves goes onto the old stack, and comes from the new one.
__asm__(
    ".text\n.globl simt_switch\n.type simt_switch, @function\nsimt_switch:\n"
    "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
    "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n"
    ".size simt_switch, .-simt_switch\n");

void prepare(Thread& thread) {
    auto** top = reinterpret_cast<void**>(thread.stack + kStack - 64);
    *--top = nullptr;  // run_thread never returns; the stack is aligned as after a call
    *--top = reinterpret_cast<void*>(&run_thread);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    thread.stack_pointer = top;
}

#else

std::map<void*, ucontext_t> contexts;  // by the address that stands for a stack pointer

void simt_switch(void** save, void* load) {
    ucontext_t& from = contexts[save];
    *save = save;
    swapcontext(&from, &contexts[load]);
}

void prepare(Thread& thread) {
    thread.stack_pointer = &thread.stack_pointer;
    ucontext_t& context = contexts[&thread.stack_pointer];
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
}

#endif

void leave() { simt_switch(&runtime.threads[runtime.running].stack_pointer, scheduler_stack_pointer); }

void enter(int thread) {
    runtime.running = thread;
    simt_switch(&scheduler_stack_pointer, runtime.threads[thread].stack_pointer);
    runtime.running = -1;
}

unsigned char* stack_of(int thread) {
    static unsigned char* stacks = nullptr;
    constexpr size_t most = 1024;
    if (stacks == nullptr) {
        void* all =
            mmap(nullptr, most * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (all == MAP_FAILED) throw std::bad_alloc();
        stacks = static_cast<unsigned char*>(all);
    }
    return stacks + thread * kStack;
}

// ---------------------------------------------------------------------------------------------------------------
// threads

Thread& current() { return runtime.threads[runtime.running]; }
int warp_of(int thread) { return thread / kWarp; }

unsigned warp_members(int warp) {
    const int rest = static_cast<int>(runtime.threads.size()) - warp * kWarp;
    return rest >= kWarp ? ~0u : (1u << rest) - 1;
}

std::string coordinates(dim3 at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

}  // namespace

void fail(int thread, const std::string& where, const std::string& what) {
    if (!runtime.failure.empty()) return;
    runtime.failure = std::string(runtime.kernel) + ": block " + coordinates(runtime.block_at) +
                      (thread < 0 ? "" : ", thread " + std::to_string(thread)) + (where.empty() ? "" : ", " + where) +
                      ": " + what;
}

void leave_if_failed() {
    if (!runtime.failure.empty()) leave();
}

namespace {

void run_thread() {
    runtime.body.run(runtime.body.closure);
    const int self = runtime.running, lane = self % kWarp;
    if (runtime.mode == Mode::check && !(current().open.empty() && current().groups.empty()))
        fail(self, "", "ends with a cp.async that it never waited for");
    for (const Meeting& meeting : runtime.meetings[warp_of(self)])
        if (meeting.mask >> lane & 1)
            fail(self, name_of(meeting.place),
                 std::string("has exited, while its warp waits for it in this ") + meeting.what);
    current().wait = Wait::done;
    leave();
}

// Lets a barrier of the block go, if it is complete; says what is wrong when it cannot become so.
bool release_barrier() {
    int first = -1;
    for (int i = 0; i < static_cast<int>(runtime.threads.size()); ++i)
        if (runtime.threads[i].wait == Wait::barrier && first < 0) first = i;
    if (first < 0) return false;
    const Place place = runtime.threads[first].place;
    for (int i = 0; i < static_cast<int>(runtime.threads.size()); ++i)
        if (runtime.threads[i].wait == Wait::meeting) {
            fail(i, name_of(runtime.threads[i].place),
                 "waits for its warp, while thread " + std::to_string(first) + " waits at the __syncthreads of " +
                     name_of(place));
            return false;
        }
    for (int i = 0; i < static_cast<int>(runtime.threads.size()); ++i) {
        const Thread& t = runtime.threads[i];
        if (t.wait == Wait::done) {
            fail(i, name_of(place),
                 "has exited, while thread " + std::to_string(first) + " waits at this __syncthreads");
            return false;
        }
        if (t.wait == Wait::barrier && (t.place.line != place.line || name_of(t.place) != name_of(place))) {
            fail(i, name_of(t.place),
                 "waits at this __syncthreads, while thread " + std::to_string(first) + " waits at that of " +
                     name_of(place));
            return false;
        }
    }
    for (Thread& t : runtime.threads) {
        t.wait = Wait::ready;
        ++t.epoch;
    }
    count_event(Event::barrier);
    return true;
}

bool shuffled() { return runtime.mode == Mode::seeded || runtime.mode == Mode::check; }

void run_block() {
    const int count = static_cast<int>(runtime.threads.size());
    std::vector<int> order(count);
    std::iota(order.begin(), order.end(), 0);
    while (runtime.failure.empty()) {
        if (shuffled()) std::shuffle(order.begin(), order.end(), runtime.random);
        bool ran = false, live = false;
        for (const int i : order) {
            if (runtime.threads[i].wait == Wait::ready) {
                enter(i);
                ran = true;
                if (!runtime.failure.empty()) return;
            }
            live = live || runtime.threads[i].wait != Wait::done;
        }
        if (!live) return;
        if (ran || release_barrier()) continue;
        if (runtime.failure.empty())
            for (int i = 0; i < count; ++i)
                if (runtime.threads[i].wait == Wait::meeting)
                    return fail(i, name_of(runtime.threads[i].place), "waits for lanes of its warp that never come");
    }
}

}  // namespace

// -----------------------------------------------------------------------------------------------------------------
// places

std::string name_of(Place place) {
    const std::string file(place.file);
    return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(place.line);
}

bool is_off(Place place) { return !runtime.off.empty() && runtime.off.count(name_of(place)); }

void fault(Place place, const char* format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fail(runtime.running, name_of(place), text);
    leave();
    std::abort();
}

// ------------------------------------------------------------------------------------------------------ what a thread
// asks

dim3 thread_index() {
    const unsigned i = static_cast<unsigned>(runtime.running), x = runtime.block.x, y = runtime.block.y;
    return {i % x, i / x % y, i / (x * y)};
}
dim3 block_index() { return runtime.block_at; }
dim3 block_size() { return runtime.block; }
dim3 grid_size() { return runtime.grid; }
int lane() { return runtime.running % kWarp; }

void barrier(Place place) {
    if (is_off(place)) return;
    current().wait = Wait::barrier;
    current().place = place;
    leave();
}

void collective(const char* what, unsigned mask, void* mine, Meet meet, Place place) {
    const int warp = warp_of(runtime.running), own = lane();
    mask &= warp_members(warp);
    if (!(mask >> own & 1)) fault(place, "calls %s with mask %08x, in which it is not", what, mask);
    auto& open = runtime.meetings[warp];
    Meeting* found = nullptr;
    for (Meeting& meeting : open) {
        if (!(meeting.mask & mask)) continue;
        if (meeting.mask != mask || meeting.place.line != place.line || std::string(meeting.place.file) != place.file ||
            (meeting.arrived >> own & 1))
            fault(place, "calls %s with mask %08x, while others of its warp are in %s with mask %08x at %s", what, mask,
                  meeting.what, meeting.mask, name_of(meeting.place).c_str());
        found = &meeting;
    }
    for (int i = 0; i < kWarp; ++i)
        if ((mask >> i & 1) && runtime.threads[warp * kWarp + i].wait == Wait::done)
            fault(place, "waits in %s for lane %d, which has exited", what, i);
    if (found == nullptr) {
        open.push_back({what, mask, 0, {}, meet, place});
        found = &open.back();
    }
    found->arrived |= 1u << own;
    found->lanes[own] = mine;
    if (found->arrived != mask) {
        current().wait = Wait::meeting;
        current().place = place;
        leave();
        return;
    }
    const Meeting complete = *found;
    open.erase(open.begin() + (found - open.data()));
    complete.meet(complete.lanes, mask, place);
    for (int i = 0; i < kWarp; ++i)
        if (mask >> i & 1) runtime.threads[warp * kWarp + i].wait = Wait::ready;
}

void warp_barrier(unsigned mask, Place place) {
    if (is_off(place)) return;
    collective(
        "__syncwarp", mask, nullptr,
        [](void* const*, unsigned lanes, Place here) {
            const int first = warp_of(runtime.running) * kWarp;
            uint32_t most = 0;
            if (lanes != warp_members(warp_of(runtime.running)))
                fault(here, "__syncwarp of a part of the warp (mask %08x) is not simulated", lanes);
            count_event(Event::warp_barrier);
            for (int i = 0; i < kWarp; ++i)
                if (lanes >> i & 1) most = std::max(most, runtime.threads[first + i].warp_epoch);
            for (int i = 0; i < kWarp; ++i)
                if (lanes >> i & 1) runtime.threads[first + i].warp_epoch = most + 1;
        },
        place);
}

void meet_shuffle(void* const* lanes, unsigned mask, Place place) {
    count_event(Event::shuffle);
    for (int i = 0; i < kWarp; ++i) {
        if (!(mask >> i & 1)) continue;
        auto* mine = static_cast<Shuffle*>(lanes[i]);
        if (mine->from < 0 || mine->from >= kWarp || !(mask >> mine->from & 1))
            fault(place, "lane %d shuffles from lane %d, which is not in mask %08x", i, mine->from, mask);
        mine->result = static_cast<const Shuffle*>(lanes[mine->from])->value;
    }
}

void meet_ldmatrix(void* const* lanes, unsigned mask, Place place) {
    if (mask != ~0u) fault(place, "ldmatrix takes all 32 lanes of a warp, not %08x", mask);
    const auto* first = static_cast<const Matrices*>(lanes[0]);
    for (int m = 0; m < first->count; ++m) {
        uint16_t matrix[8][8];
        const void* rows[8];
        for (int row = 0; row < 8; ++row) {
            const void* p = rows[row] = static_cast<const Matrices*>(lanes[8 * m + row])->row;
            const int self = runtime.running;
            runtime.running = self / kWarp * kWarp + 8 * m + row;  // who gave the address reads there
            if (reinterpret_cast<uintptr_t>(p) % 16)
                fail(runtime.running, name_of(place), "ldmatrix needs addresses that are multiples of 16");
            check_access(p, 16, false, false, nullptr, place);
            runtime.running = self;
            leave_if_failed();
            std::memcpy(matrix[row], p, 16);
        }
        if (runtime.mode == Mode::count) count_matrix(rows, place);
        for (int i = 0; i < kWarp; ++i) {
            auto* mine = static_cast<Matrices*>(lanes[i]);
            const int row = i / 4, column = i % 4 * 2;
            const uint32_t low = mine->transposed ? matrix[column][row] : matrix[row][column];
            const uint32_t high = mine->transposed ? matrix[column + 1][row] : matrix[row][column + 1];
            mine->result[m] = low | high << 16;
        }
    }
}

// Fragments as the PTX manual draws them for m16n8k16: with g = lane / 4 and c = lane % 4, a's registers hold rows g, g
// + 8, g, g + 8 and columns 2c, 2c, 2c + 8, 2c + 8; b's rows 2c, 2c + 8 of column g; d's rows g, g, g + 8, g + 8 and
// columns 2c, 2c + 1, 2c, 2c + 1.
void meet_mma(void* const* lanes, unsigned mask, Place place) {
    if (mask != ~0u) fault(place, "mma takes all 32 lanes of a warp, not %08x", mask);
    ++runtime.products[warp_of(runtime.running)];
    count_event(Event::product);
    float a[16][16], b[16][8];
    const bool is_bfloat = static_cast<const Product*>(lanes[0])->is_bfloat;
    const auto number = [&](uint32_t bits) {
        return is_bfloat ? bfloat_to_float(static_cast<uint16_t>(bits)) : half_to_float(static_cast<uint16_t>(bits));
    };
    for (int i = 0; i < kWarp; ++i) {
        const auto* p = static_cast<const Product*>(lanes[i]);
        const int g = i / 4, c = 2 * (i % 4);
        for (int r = 0; r < 4; ++r)
            for (int half = 0; half < 2; ++half)
                a[g + r % 2 * 8][c + r / 2 * 8 + half] = number(p->a[r] >> 16 * half & 0xffff);
        for (int r = 0; r < 2; ++r)
            for (int half = 0; half < 2; ++half) b[c + r * 8 + half][g] = number(p->b[r] >> 16 * half & 0xffff);
    }
    for (int i = 0; i < kWarp; ++i) {
        auto* p = static_cast<Product*>(lanes[i]);
        for (int r = 0; r < 4; ++r) {
            const int row = i / 4 + r / 2 * 8, column = i % 4 * 2 + r % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            p->d[r] += sum;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- shared
// memory

namespace {

void* new_array(size_t bytes, Place place) {
    unsigned char* begin = shared_arena() + runtime.shared_used;
    const size_t room = (bytes + 15) / 16 * 16 + 64;  // a gap after each: one past the end is nobody's
    if (runtime.shared_used + room > kArena) fault(place, "more than %zu bytes of shared memory", kArena);
    runtime.shared_used += room;
    std::memset(begin, 0xff, bytes);  // NaN in every type
    runtime.arrays.push_back({begin, bytes, place});
    check_array(runtime.arrays.back());
    return begin;
}

}  // namespace

void* shared_array(size_t bytes, Place place) {
    for (const Array& array : runtime.arrays)
        if (array.place.line == place.line && array.place.file == place.file) return array.begin;
    return new_array(bytes, place);
}

void* dynamic_array(int ordinal, size_t bytes, Place place) {
    static const char* const marks[] = {"dynamic 0", "dynamic 1", "dynamic 2", "dynamic 3", "dynamic 4",  "dynamic 5",
                                        "dynamic 6", "dynamic 7", "dynamic 8", "dynamic 9", "dynamic 10", "dynamic 11"};
    if (ordinal >= 12) fault(place, "more than 12 arrays of dynamic shared memory");
    for (const Array& array : runtime.arrays)
        if (array.place.file == marks[ordinal]) {
            if (array.bytes != bytes) fault(place, "takes %zu bytes where others took %zu", bytes, array.bytes);
            return array.begin;
        }
    const size_t end = runtime.dynamic_used + bytes;
    if (end > runtime.shared_bytes)
        fault(place, "needs %zu bytes of dynamic shared memory, but the launch gave %zu", end, runtime.shared_bytes);
    runtime.dynamic_used = (end + 15) / 16 * 16;
    return new_array(bytes, {marks[ordinal], place.line});
}

void touch(const void* p, size_t bytes, bool write, Place place) {
    if (reinterpret_cast<uintptr_t>(p) % bytes)
        fault(place, "%s %zu bytes at an address that is no multiple of %zu", write ? "writes" : "reads", bytes, bytes);
    access(p, bytes, write, false, __builtin_return_address(0), place);
    current().told = p;
    leave_if_failed();
}

// ------------------------------------------------------------------------------------------------------------ cp.async
// Adversarial: the target is NaN from the issue to the wait, and only then what the source held at the issue.

void cp_async(void* to, const void* from, bool valid, Place place) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        fault(place, "cp.async needs addresses that are multiples of 16");
    auto* target = static_cast<unsigned char*>(to);
    const unsigned char* arena = shared_arena();
    if (target < arena || target >= arena + kArena) fault(place, "cp.async writes to what is no shared memory");
    if (valid) check_access(from, 16, false, false, nullptr, place);
    check_access(to, 16, true, false, nullptr, place);
    leave_if_failed();
    if (runtime.mode == Mode::count) {
        if (valid) count_access(from, 16, false, __builtin_return_address(0), place, false);
        count_access(to, 16, true, __builtin_return_address(0), place);
    }
    Copy copy{target, valid, runtime.products[warp_of(runtime.running)], {}};
    if (valid) std::memcpy(copy.data, from, 16);
    std::memset(to, 0xff, 16);
    check_pending(to, 16, place);
    current().open.push_back(copy);
}

void cp_async_commit() {
    current().groups.push_back(std::move(current().open));
    current().open.clear();
}

void cp_async_wait(int pending, Place place) {
    if (is_off(place)) return;
    auto& groups = current().groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) {
            std::memcpy(copy.to, copy.data, 16);
            if (copy.valid && copy.products == runtime.products[warp_of(runtime.running)])
                count_event(Event::waited, 16);
            check_arrived(copy.to, 16, place);
        }
        groups.erase(groups.begin());
    }
}

float atomic_add(float* to, float value, Place place) {
    const bool broken = is_off(place);
    check_access(to, 4, false, !broken, nullptr, place);
    check_access(to, 4, true, !broken, nullptr, place);
    leave_if_failed();
    count_event(Event::atomic);
    const float before = *to;
    *to = before + value;
    return before;
}

// ----------------------------------------------------------------------------------------------------------------
// launch

void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Body body) {
    const unsigned threads = block.x * block.y * block.z;
    if (threads == 0 || threads > 1024)
        throw std::runtime_error(std::string(name) + ": a block of " + std::to_string(threads) + " threads; 1 to 1024");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error(std::string(name) + ": a grid of " + coordinates(grid) + " blocks is none");
    runtime.kernel = name;
    runtime.grid = grid;
    runtime.block = block;
    runtime.body = body;
    runtime.shared_bytes = shared_bytes;
    ++runtime.launch;
    runtime.failure.clear();
    if (runtime.elsewhere) return runtime.elsewhere();
    check_begin_launch();
    count_begin_launch();
    std::vector<uint32_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (shuffled()) std::shuffle(blocks.begin(), blocks.end(), runtime.random);
    for (const uint32_t number : blocks) {
        runtime.block_number = number;
        runtime.block_at = {number % grid.x, number / grid.x % grid.y, number / (grid.x * grid.y)};
        runtime.shared_used = runtime.dynamic_used = 0;
        runtime.arrays.clear();
        runtime.threads.assign(threads, Thread());
        runtime.meetings.assign((threads + kWarp - 1) / kWarp, {});
        runtime.products.assign((threads + kWarp - 1) / kWarp, 0);
        for (unsigned i = 0; i < threads; ++i) {
            runtime.threads[i].stack = stack_of(static_cast<int>(i));
            prepare(runtime.threads[i]);
        }
        run_block();
        if (!runtime.failure.empty()) throw std::runtime_error(runtime.failure);
        count_block();
    }
}

// -----------------------------------------------------------------------------------------------------------------
// float16

float half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31,
                   fraction = bits & 0x3ff;
    if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | fraction << 13);
    const float magnitude = exponent ? std::ldexp(static_cast<float>(fraction | 0x400), static_cast<int>(exponent) - 25)
                                     : std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
}

uint16_t float_to_half(float x) {
    const uint16_t sign = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, x) >> 16 & 0x8000);
    const float size = std::fabs(x);
    if (x != x) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);
    // The distance between neighbours here; nearbyint rounds to even.
    const int unit = std::max(exponent - 11, -24);
    const float steps = std::nearbyint(std::ldexp(size, -unit));
    const float rounded = std::ldexp(steps, unit);
    if (rounded == 0.0f) return sign;
    std::frexp(rounded, &exponent);
    if (exponent < -13) return sign | static_cast<uint16_t>(std::ldexp(rounded, 24));
    return sign | static_cast<uint16_t>((exponent + 14) << 10) |
           (static_cast<uint16_t>(std::ldexp(rounded, 11 - exponent)) & 0x3ff);
}

}  // namespace simt::host
