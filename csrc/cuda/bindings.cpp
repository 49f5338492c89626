// The CUDA ops as functions of a Python module: of the one that is shipped, and of the one that simulates.

#include "bindings.h"

#include "../checks.h"
#include "kernels.h"

namespace py = pybind11;

namespace tinygpt::cuda {
namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) {
    require(code >= 0 && code <= 2, "a dtype code is 0 (float32), 1 (float16) or 2 (bfloat16)");
    return static_cast<DType>(code);
}

}  // namespace

void add_ops(py::module_& m) {
    m.def("cuda_probe", &probe, "Why kernels of this build cannot run on the current GPU; empty when they can.");
    m.def(
        "cuda_layer_norm_fwd",
        [](uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, int dtype, uintptr_t weight,
           int weight_dtype, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t h, uintptr_t mean, uintptr_t rstd,
           int64_t rows, int64_t cols, float eps, uintptr_t stream) {
            require_matrix(x, rows, cols, x_stride, "x");
            require_matrix(y, rows, cols, cols, "y");
            require((residual != 0) == (h != 0), "residual and h come together");
            const LayerNormFwd a{pointer<void>(x),
                                 x_stride,
                                 pointer<void>(residual),
                                 residual_stride,
                                 dtype_of(dtype),
                                 pointer<void>(weight),
                                 dtype_of(weight_dtype),
                                 pointer<void>(bias),
                                 dtype_of(bias_dtype),
                                 pointer<void>(y),
                                 pointer<void>(h),
                                 pointer<float>(mean),
                                 pointer<float>(rstd),
                                 rows,
                                 cols,
                                 eps};
            layer_norm_fwd(a, pointer<void>(stream));
        },
        py::arg("x"), py::arg("x_stride"), py::arg("residual"), py::arg("residual_stride"), py::arg("dtype"),
        py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"), py::arg("h"),
        py::arg("mean"), py::arg("rstd"), py::arg("rows"), py::arg("cols"), py::arg("eps"), py::arg("stream"));
    m.def("cuda_layer_norm_bwd_blocks", &layer_norm_bwd_blocks, py::arg("rows"));
    m.def(
        "cuda_layer_norm_bwd",
        [](uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride, uintptr_t x, int64_t x_stride, int dtype,
           uintptr_t weight, int weight_dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight,
           uintptr_t dbias, int bias_dtype, int64_t rows, int64_t cols, uintptr_t partial, uintptr_t stream) {
            require_matrix(dy, rows, cols, dy_stride, "dy");
            require_matrix(x, rows, cols, x_stride, "x");
            require(partial != 0, "partial is null");
            const LayerNormBwd a{pointer<void>(dy),
                                 dy_stride,
                                 pointer<void>(dh),
                                 dh_stride,
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
            layer_norm_bwd(a, pointer<float>(partial), pointer<void>(stream));
        },
        py::arg("dy"), py::arg("dy_stride"), py::arg("dh"), py::arg("dh_stride"), py::arg("x"), py::arg("x_stride"),
        py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::arg("bias_dtype"), py::arg("rows"), py::arg("cols"),
        py::arg("partial"), py::arg("stream"));
}

}  // namespace tinygpt::cuda
