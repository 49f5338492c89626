// What the parts of the simulation know of each other: the launch at hand, its block, its threads.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "simt_host.h"

namespace simt::host {

constexpr int kWarp = 32;

enum class Mode { fast, seeded, check };

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
    unsigned char data[16];
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

unsigned char* shared_arena();
constexpr size_t kArena = 512 * 1024;
constexpr size_t kStack = 64 * 1024;

}  // namespace simt::host
