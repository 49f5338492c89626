// Python checks every call and names what is wrong for people; here only what would otherwise write out of bounds.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tinygpt {

inline void require(bool condition, const char* what) {
    if (!condition) throw std::invalid_argument(std::string("tinygpt_kernels._C: ") + what);
}

inline void require_matrix(uintptr_t pointer, int64_t rows, int64_t cols, int64_t stride, const char* name) {
    require(rows >= 0 && cols >= 1, "rows must be at least 0 and cols at least 1");
    require(rows == 0 || pointer != 0, (std::string(name) + " is null").c_str());
    require(rows <= 1 || stride >= 0, (std::string(name) + ": rows may not run backwards").c_str());
}

}  // namespace tinygpt
