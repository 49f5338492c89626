// Python checks every call and names what is wrong for people; here only what would otherwise write out of bounds.
#pragma once

#include <cstdint>
#include <initializer_list>
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

// A matrix of floats as a product reads or writes it; strides count elements, both at least 0.
struct Extent {
    uintptr_t pointer;
    int64_t rows, cols, row_stride, col_stride;

    uintptr_t end() const {
        return rows && cols ? pointer + 4 * ((rows - 1) * row_stride + (cols - 1) * col_stride + 1) : pointer;
    }
};

// Whether two matrices share an element; columns of one buffer side by side do not. May say yes of exotic strides that
// share none.
inline bool overlap(Extent a, Extent b) {
    if (a.pointer == 0 || b.pointer == 0 || a.pointer >= b.end() || b.pointer >= a.end()) return false;
    for (Extent* e : {&a, &b})
        if (e->col_stride != 1 && e->row_stride == 1) *e = {e->pointer, e->cols, e->rows, e->col_stride, 1};
    const int64_t stride = a.row_stride;
    if (a.col_stride != 1 || b.col_stride != 1 || stride != b.row_stride || stride < a.cols || stride < b.cols)
        return true;
    const int64_t bytes = static_cast<int64_t>(b.pointer) - static_cast<int64_t>(a.pointer);
    const int64_t offset = ((bytes / 4) % stride + stride) % stride;  // of b's first column behind a's, in a's rows
    return bytes % 4 != 0 || offset < a.cols || offset + b.cols > stride;
}

}  // namespace tinygpt
