// The module tinygpt_kernels._C: raw pointers and sizes in, nothing of torch anywhere.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>

#include "checks.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace tinygpt {
namespace {

DType dtype_of(int code) {
    require(code >= 0 && code <= 2, "a dtype code is 0 (float32), 1 (float16) or 2 (bfloat16)");
    return static_cast<DType>(code);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void layer_norm_fwd(uintptr_t x, int64_t x_stride, int dtype, uintptr_t weight, int weight_dtype, uintptr_t bias,
                    int bias_dtype, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols,
                    float eps) {
    require_matrix(x, rows, cols, x_stride, "x");
    require_matrix(y, rows, cols, cols, "y");
    require(weight != 0, "weight is null");
    require(rows == 0 || (mean != 0 && rstd != 0), "mean or rstd is null");
    const LayerNormFwd arguments{pointer<void>(x),
                                 x_stride,
                                 dtype_of(dtype),
                                 pointer<void>(weight),
                                 dtype_of(weight_dtype),
                                 pointer<void>(bias),
                                 dtype_of(bias_dtype),
                                 pointer<void>(y),
                                 pointer<float>(mean),
                                 pointer<float>(rstd),
                                 rows,
                                 cols,
                                 eps};
    py::gil_scoped_release released;
    if (!cpu::kernels().layer_norm_fwd(arguments)) throw std::bad_alloc();
}

void layer_norm_bwd(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int dtype, uintptr_t weight,
                    int weight_dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                    int bias_dtype, int64_t rows, int64_t cols) {
    require_matrix(dy, rows, cols, dy_stride, "dy");
    require_matrix(x, rows, cols, x_stride, "x");
    require(weight != 0, "weight is null");
    require(rows == 0 || (mean != 0 && rstd != 0), "mean or rstd is null");
    const LayerNormBwd arguments{pointer<void>(dy),
                                 dy_stride,
                                 pointer<void>(x),
                                 x_stride,
                                 dtype_of(dtype),
                                 pointer<void>(weight),
                                 dtype_of(weight_dtype),
                                 pointer<float>(mean),
                                 pointer<float>(rstd),
                                 pointer<void>(dx),
                                 pointer<void>(dweight),
                                 pointer<void>(dbias),
                                 dtype_of(bias_dtype),
                                 rows,
                                 cols};
    py::gil_scoped_release released;
    if (!cpu::kernels().layer_norm_bwd(arguments)) throw std::bad_alloc();
}

}  // namespace
}  // namespace tinygpt

PYBIND11_MODULE(_C, m) {
    using namespace tinygpt;
    m.doc() =
        "tinygpt's compiled kernels. Pointers are integers, strides count elements, 0 stands for an absent tensor.";
    m.def("layer_norm_fwd", &layer_norm_fwd, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("weight"),
          py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"), py::arg("mean"),
          py::arg("rstd"), py::arg("rows"), py::arg("cols"), py::arg("eps"));
    m.def("layer_norm_bwd", &layer_norm_bwd, py::arg("dy"), py::arg("dy_stride"), py::arg("x"), py::arg("x_stride"),
          py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("dx"),
          py::arg("dweight"), py::arg("dbias"), py::arg("bias_dtype"), py::arg("rows"), py::arg("cols"));
    m.def("isa", &cpu::isa, "The instruction set whose kernels serve.");
    m.def("supported_isas", &cpu::supported_isas, "Instruction sets this build and this CPU both have, best last.");
    m.def(
        "set_isa",
        [](const std::string& name) {
            require(cpu::set_isa(name), ("instruction set '" + name + "' is not supported here").c_str());
        },
        py::arg("name"), "Serve from another instruction set's kernels; for tests and measurements.");
}
