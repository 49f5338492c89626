// What mode `check` is told of the tensors of a call.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace simt::host {

struct View {
    uintptr_t address;
    std::vector<int64_t> sizes, strides;  // strides count elements
    size_t itemsize;
    bool writable, initialised;
    std::string name;
};

void watch(const View& view);
void watch_nothing();

}  // namespace simt::host
