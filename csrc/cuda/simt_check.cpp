// Mode `check`: every access of a kernel, reported by the compiler (-fsanitize=thread), held against all others.
//
// A cell of two bytes remembers its last write and its reads since. Two accesses of one cell, one of them a write, race
// unless something orders them: the same thread, a __syncthreads between them, or within a warp a __syncwarp. A shuffle
// orders nothing. Between blocks only the end of a launch does. Atomics race with what is not atomic.
//
// An access must lie in a shared array of its block, on the thread's own stack, in the kernel's arguments or constants
// of the program (reading), or in what `watch` was told: the elements of tensors, exactly, by their strides; what
// several views cover is all theirs.

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

#include "simt_runtime.h"
#include "simt_watch.h"

namespace simt::host {
namespace {

constexpr size_t kCell = 2;
constexpr int kMany = -1, kManyInWarp = -2;  // -2 - warp

struct Access {
    uint32_t launch = 0, block = 0, epoch = 0, warp_epoch = 0;
    int32_t thread = 0;  // or several: kMany, or kManyInWarp - warp
    bool atomic = false, many_blocks = false;
};

enum : uint8_t { kReadable = 1, kWritable = 2, kInitialised = 4, kPending = 8 };

struct Cell {
    Access write, read;
    uint8_t state = 0;
};

struct Span {
    uintptr_t begin, end;
    std::string name;
    std::vector<Cell> cells;
};

std::vector<Span> spans;  // sorted, apart
std::vector<View> views;  // told, and not sorted in yet
std::vector<Cell> shared_cells(kArena / kCell);
bool sorted = true;

bool same_warp(int a, int b) { return a / kWarp == b / kWarp; }

// Whether an access is known to be over when `now` begins.
bool ordered(const Access& before, const Access& now) {
    if (before.launch != now.launch) return true;
    if (before.many_blocks || before.block != now.block) return false;
    if (before.epoch < now.epoch) return true;
    if (before.thread == kMany) return false;
    if (before.thread <= kManyInWarp)
        return kManyInWarp - before.thread == now.thread / kWarp && before.warp_epoch < now.warp_epoch;
    return before.thread == now.thread || (same_warp(before.thread, now.thread) && before.warp_epoch < now.warp_epoch);
}

Access merged(const Access& before, const Access& now) {
    if (before.launch != now.launch) return now;
    Access both = now;
    if (before.many_blocks || before.block != now.block) {
        both.many_blocks = true;
        both.thread = kMany;
    } else if (!ordered(before, now)) {
        const int warp = now.thread / kWarp;
        const bool here =
            before.thread == kManyInWarp - warp || (before.thread >= 0 && same_warp(before.thread, now.thread));
        both.thread = here ? kManyInWarp - warp : kMany;
        both.atomic = before.atomic && now.atomic;
    }
    return both;
}

std::string told(const Access& a) {
    std::string who = a.thread >= 0       ? "thread " + std::to_string(a.thread)
                      : a.thread == kMany ? "several threads"
                                          : "several threads of warp " + std::to_string(kManyInWarp - a.thread);
    if (a.many_blocks) return "several blocks";
    if (a.block != runtime.block_number) who += " of block " + std::to_string(a.block);
    return who;
}

// Every element of a view: calls `each` with its address.
template <class Each>
void for_elements(const View& v, Each each) {
    std::vector<int64_t> at(v.sizes.size(), 0);
    for (const int64_t size : v.sizes)
        if (size == 0) return;
    while (true) {
        uintptr_t p = v.address;
        for (size_t i = 0; i < at.size(); ++i) p += at[i] * v.strides[i] * v.itemsize;
        each(p);
        size_t i = at.size();
        while (i > 0 && ++at[i - 1] == v.sizes[i - 1]) at[--i] = 0;
        if (i == 0) return;
    }
}

void sort_in() {
    if (sorted) return;
    sorted = true;
    spans.clear();
    struct Range {
        uintptr_t begin, end;
    };
    std::vector<Range> ranges;
    for (const View& v : views) {
        uintptr_t low = ~uintptr_t{0}, high = 0;
        for_elements(v, [&](uintptr_t p) {
            low = std::min(low, p);
            high = std::max(high, p + v.itemsize);
        });
        if (low < high) ranges.push_back({low & ~(kCell - 1), high});
    }
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    for (const Range& r : ranges) {
        if (spans.empty() || spans.back().end < r.begin)
            spans.push_back({r.begin, r.end, "", {}});
        else
            spans.back().end = std::max(spans.back().end, r.end);
    }
    for (Span& s : spans) s.cells.assign((s.end - s.begin + kCell - 1) / kCell, Cell());
    for (const View& v : views)
        for_elements(v, [&](uintptr_t p) {
            for (Span& s : spans) {
                if (p < s.begin || p >= s.end) continue;
                if (s.name.find(v.name) == std::string::npos) s.name += (s.name.empty() ? "" : " or ") + v.name;
                for (size_t byte = 0; byte < v.itemsize; byte += kCell) {
                    Cell& cell = s.cells[(p + byte - s.begin) / kCell];
                    cell.state |= v.writable ? kReadable | kWritable : kReadable;
                    if (v.initialised) cell.state |= kInitialised;
                }
            }
        });
}

Span* last = nullptr;

Span* span_of(uintptr_t p) {
    if (last && p >= last->begin && p < last->end) return last;
    const auto after =
        std::upper_bound(spans.begin(), spans.end(), p, [](uintptr_t a, const Span& s) { return a < s.begin; });
    if (after == spans.begin() || p >= std::prev(after)->end) return nullptr;
    return last = &*std::prev(after);
}

}  // namespace

// The line of a kernel that an instruction comes from, as far as the tools at hand tell.
std::string line_of(const void* pc) {
    Dl_info info;
    if (pc == nullptr || !dladdr(pc, &info) || info.dli_fname == nullptr) return "";
    const auto offset = reinterpret_cast<uintptr_t>(pc) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    char command[1024], line[512] = "";
    std::snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                  static_cast<size_t>(offset));
    if (FILE* pipe = popen(command, "r")) {
        if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
        pclose(pipe);
    }
    std::string found(line);
    found = found.substr(found.find_last_of('/') + 1);
    found = found.substr(0, found.find_first_of(" \n"));
    return found.empty() || found[0] == '?' ? "" : found;
}

bool is_constant(uintptr_t p) {
    for (const Argument* a = runtime.body.arguments; a->data != nullptr; ++a) {
        const auto begin = reinterpret_cast<uintptr_t>(a->data);
        if (p >= begin && p < begin + a->bytes) return true;
    }
    struct Query {
        uintptr_t p;
        bool found;
    } query{p, false};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto* q = static_cast<Query*>(data);
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& h = info->dlpi_phdr[i];
                const uintptr_t begin = info->dlpi_addr + h.p_vaddr;
                if (h.p_type == PT_LOAD && !(h.p_flags & PF_W) && q->p >= begin && q->p < begin + h.p_memsz)
                    q->found = true;
            }
            return 0;
        },
        &query);
    return query.found;
}

unsigned char* shared_arena() {
    static auto* arena = static_cast<unsigned char*>(std::aligned_alloc(1024, kArena));
    return arena;
}

void watch(const View& view) {
    views.push_back(view);
    sorted = false;
}

void watch_nothing() {
    views.clear();
    spans.clear();
    last = nullptr;
    sorted = true;
}

void check_begin_launch() {
    if (runtime.mode != Mode::check) return;
    last = nullptr;
    sort_in();
}

void check_array(const Array& array) {
    if (runtime.mode != Mode::check) return;
    const size_t begin = (array.begin - shared_arena()) / kCell;
    for (size_t i = 0; i < (array.bytes + kCell - 1) / kCell; ++i) {
        shared_cells[begin + i] = Cell();
        shared_cells[begin + i].state = kReadable | kWritable;
    }
    for (size_t i = (array.bytes + kCell - 1) / kCell; i < (array.bytes + 15) / 16 * 8 + 32; ++i)
        shared_cells[begin + i] = Cell();
}

void check_access(const void* address, size_t bytes, bool write, bool atomic, const void* pc, Place place) {
    if (runtime.mode != Mode::check || runtime.running < 0 || !runtime.failure.empty()) return;
    const auto p = reinterpret_cast<uintptr_t>(address);
    const Thread& thread = runtime.threads[runtime.running];
    const auto stack = reinterpret_cast<uintptr_t>(thread.stack);
    if (p >= stack && p < stack + kStack) return;
    const auto complain = [&](const std::string& what) {
        fail(runtime.running, place.file ? name_of(place) : line_of(pc), what);
    };
    const std::string verb = atomic ? "updates" : write ? "writes" : "reads";
    const auto arena = reinterpret_cast<uintptr_t>(shared_arena());
    Cell* cells;
    uintptr_t begin;
    std::string where;
    if (p >= arena && p < arena + kArena) {
        cells = shared_cells.data();
        begin = arena;
        if (p + bytes > arena + runtime.shared_used)
            return complain(verb + " shared memory that no array of the block has");
        where = "shared memory";
    } else {
        Span* span = span_of(p);
        if (span == nullptr) {
            if (!write && is_constant(p)) return;
            return complain(verb + " " + std::to_string(bytes) + " bytes where no tensor of the call lies");
        }
        if (p + bytes > span->end) return complain(verb + " past the end of " + span->name);
        cells = span->cells.data();
        begin = span->begin;
        where = span->name;
    }
    const Access now{runtime.launch, runtime.block_number, thread.epoch, thread.warp_epoch, runtime.running, atomic,
                     false};
    for (uintptr_t at = p & ~(kCell - 1); at < p + bytes; at += kCell) {
        Cell& cell = cells[(at - begin) / kCell];
        if (!(cell.state & kReadable)) return complain(verb + " outside of every array and view, beside " + where);
        if (write && !(cell.state & kWritable)) return complain("writes to " + where + ", which is only read");
        if (cell.state & kPending) return complain(verb + " what a cp.async is still to bring, in " + where);
        if (!write && !(cell.state & kInitialised)) return complain("reads what nobody has written, in " + where);
        if (!ordered(cell.write, now) && !(atomic && cell.write.atomic))
            return complain("race: " + verb + " what " + told(cell.write) + " wrote, with nothing between, in " +
                            where);
        if (write) {
            if (!ordered(cell.read, now) && !(atomic && cell.read.atomic))
                return complain("race: " + verb + " what " + told(cell.read) + " read, with nothing between, in " +
                                where);
            cell.write = now;
            cell.read = Access();
            cell.state |= kInitialised;
        } else {
            cell.read = merged(cell.read, now);
        }
    }
}

void check_pending(const void* p, size_t bytes, Place) {
    if (runtime.mode != Mode::check) return;
    const size_t begin = (static_cast<const unsigned char*>(p) - shared_arena()) / kCell;
    for (size_t i = 0; i < bytes / kCell; ++i) shared_cells[begin + i].state |= kPending;
}

void check_arrived(const void* p, size_t bytes, Place place) {
    if (runtime.mode != Mode::check) return;
    const size_t begin = (static_cast<const unsigned char*>(p) - shared_arena()) / kCell;
    for (size_t i = 0; i < bytes / kCell; ++i) shared_cells[begin + i].state &= ~kPending;
    check_access(p, bytes, true, false, nullptr, place);
    leave_if_failed();
}

}  // namespace simt::host

// ------------------------------------------------------------------------------------------------ what the compiler
// calls

using namespace simt::host;

static void reported(const void* p, size_t bytes, bool write, const void* pc) {
    if (runtime.running < 0) return;
    const void*& told = runtime.threads[runtime.running].told;
    if (std::exchange(told, nullptr) == p) return;
    access(p, bytes, write, false, pc, {});
    leave_if_failed();
}

#define TINYGPT_REPORT(bytes)                                                                                         \
    extern "C" void __tsan_read##bytes(void* p) { reported(p, bytes, false, __builtin_return_address(0)); }           \
    extern "C" void __tsan_write##bytes(void* p) { reported(p, bytes, true, __builtin_return_address(0)); }           \
    extern "C" void __tsan_unaligned_read##bytes(void* p) { reported(p, bytes, false, __builtin_return_address(0)); } \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { reported(p, bytes, true, __builtin_return_address(0)); }
TINYGPT_REPORT(1)
TINYGPT_REPORT(2)
TINYGPT_REPORT(4)
TINYGPT_REPORT(8)
TINYGPT_REPORT(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { reported(p, bytes, false, __builtin_return_address(0)); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { reported(p, bytes, true, __builtin_return_address(0)); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
