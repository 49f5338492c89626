// What the parts of the simulation know of each other: the launch at hand, its block, its threads.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "simt_host.h"

namespace simt::host {

constexpr int kWarp = 32;

enum class Mode { fast, seeded, check, count };

enum class Wait { ready, barrier, meeting, done };

struct Meeting {
    const char* what;
    unsigned mask, arrived;
    void* lanes[kWarp];
    Meet meet;
    Place place;
};

struct Copy {  // one cp.async under way
    unsigned char* to;
    bool valid;
    uint64_t products;  // that its warp had done when it began
    unsigned char data[16];
};

// An instruction that asks for memory, and all that one thread asked by it.
struct Instruction {
    const void* pc;
    int line;
    bool write;
    auto key() const { return std::tie(pc, line, write); }
    bool operator<(const Instruction& b) const { return key() < b.key(); }
    bool operator==(const Instruction& b) const { return key() == b.key(); }
};
struct Asked {
    Instruction by;
    Place place;
    size_t bytes;
    bool global, constant;  // constants of the program are not counted
    std::vector<uintptr_t> addresses;
};

struct Thread {
    void* stack_pointer = nullptr;
    unsigned char* stack = nullptr;
    Wait wait = Wait::ready;
    Place place{};            // of the barrier or meeting it waits at
    uint32_t epoch = 0;       // barriers of the block it has passed
    uint32_t warp_epoch = 0;  // barriers of its warp it has passed
    std::vector<Copy> open;   // copies not committed yet
    std::vector<std::vector<Copy>> groups;
    std::vector<Asked> asked;
    size_t asked_last = 0;       // where the last one was found: in a loop the next one follows
    const void* told = nullptr;  // what `touch` has reported, and the compiler will report again
};

struct Array {
    unsigned char* begin;
    size_t bytes;
    Place place;
};

struct Runtime {
    Mode mode = Mode::fast;
    std::mt19937_64 random;
    std::map<std::string, bool> off;  // places that are switched off, "file.cu:12"

    const char* kernel = "";
    dim3 grid, block, block_at;
    uint32_t launch = 0, block_number = 0;
    size_t shared_bytes = 0, shared_used = 0, dynamic_used = 0;
    std::vector<Array> arrays;
    std::vector<Thread> threads;
    std::vector<std::vector<Meeting>> meetings;  // by warp
    std::vector<uint64_t> products;              // by warp
    int running = -1;                            // thread; -1 outside of kernels
    Body body{};
    std::string failure;
    // Where there is one, it runs the launches: for grid, block and bytes of shared memory look above.
    std::function<void()> elsewhere;
};

extern Runtime runtime;

void fail(int thread, const std::string& where,
          const std::string& what);  // the launch is over as soon as the thread leaves
void leave_if_failed();
bool is_off(Place place);
std::string name_of(Place place);

// ---- simt_check.cpp: what a thread reads and writes, held against what the others did. In other modes than `check`,
// nothing.
void check_begin_launch();
void check_array(const Array& array);  // of shared memory, new and not initialised
void check_access(const void* p, size_t bytes, bool write, bool atomic, const void* pc, Place place);
void check_pending(const void* p, size_t bytes, Place place);  // a copy was issued towards it
void check_arrived(const void* p, size_t bytes, Place place);  // and has come

std::string line_of(const void* pc);  // the line of a kernel that an instruction comes from; empty where no tool tells
bool is_constant(uintptr_t p);        // an argument of the kernel, or what the program holds and cannot write

// ---- simt_count.cpp: what a warp asks of the memory, as the hardware would serve it. In other modes than `count`,
// nothing.
enum class Event { barrier, warp_barrier, shuffle, product, atomic, waited };
void count_begin_launch();
// `waits`: whether the thread can do nothing before what it reads is there.
void count_access(const void* p, size_t bytes, bool write, const void* pc, Place place, bool waits = true);
void count_matrix(const void* const* rows, Place place);  // one of those of an ldmatrix
void count_event(Event event, uint64_t amount = 1);
void count_block();
void forget_counts();
std::string counts_json();

// Held against the others, or counted, as the mode says.
inline void access(const void* p, size_t bytes, bool write, bool atomic, const void* pc, Place place) {
    if (runtime.mode == Mode::check) check_access(p, bytes, write, atomic, pc, place);
    if (runtime.mode == Mode::count) count_access(p, bytes, write, pc, place);
}

unsigned char* shared_arena();
constexpr size_t kArena = 512 * 1024;
constexpr size_t kStack = 64 * 1024;

}  // namespace simt::host
