// What every kernel takes. Pointers are raw, strides count elements, statistics are float.
#pragma once

#include <cstdint>

namespace tinygpt {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

struct LayerNormFwd {
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    DType dtype;         // of x and y
    const void* weight;  // [cols]
    DType weight_dtype;
    const void* bias;  // [cols] or null
    DType bias_dtype;
    void* y;      // [rows, cols], contiguous
    float* mean;  // [rows]
    float* rstd;  // [rows]
    int64_t rows, cols;
    float eps;
};

struct LayerNormBwd {
    const void* dy;  // [rows, cols], rows dy_stride apart
    int64_t dy_stride;
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    DType dtype;         // of dy, x and dx
    const void* weight;  // [cols]
    DType weight_dtype;
    const float* mean;  // [rows]
    const float* rstd;  // [rows]
    void* dx;           // [rows, cols], contiguous, or null
    void* dweight;      // [cols] in weight_dtype, or null
    void* dbias;        // [cols] in bias_dtype, or null
    DType bias_dtype;
    int64_t rows, cols;
};

// One instruction set's kernels. False: no memory for the workspace.
struct CpuKernels {
    bool (*layer_norm_fwd)(const LayerNormFwd&);
    bool (*layer_norm_bwd)(const LayerNormBwd&);
};

}  // namespace tinygpt
