// The simulation as a library of C functions, for `tinygpt ladder`, which loads it without a Python module.

#include "simt_runtime.h"
#include "simt_watch.h"

using namespace simt::host;

#define TINYGPT_C extern "C" __attribute__((visibility("default")))

TINYGPT_C void simt_mode(int mode, uint64_t seed) {  // as enum class Mode numbers them
    runtime.mode = static_cast<Mode>(mode);
    runtime.random.seed(seed);
}

TINYGPT_C void simt_watch(void* address, int64_t count, int64_t itemsize, int writable, int initialised,
                          const char* name) {
    watch({reinterpret_cast<uintptr_t>(address),
           {count},
           {1},
           static_cast<size_t>(itemsize),
           writable != 0,
           initialised != 0,
           name});
}
TINYGPT_C void simt_watch_nothing() { watch_nothing(); }

TINYGPT_C const char* simt_counts() {
    static std::string text;
    text = counts_json();
    return text.c_str();
}
TINYGPT_C void simt_forget_counts() { forget_counts(); }
