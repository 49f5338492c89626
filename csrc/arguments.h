// Python's integers as what ops.h has, for the modules of the CPU and of CUDA.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "checks.h"
#include "ops.h"

namespace tinygpt {

namespace py = pybind11;

inline DType dtype_of(int code) {
    require(code >= 0 && code <= 2, "a dtype code is 0 (float32), 1 (float16) or 2 (bfloat16)");
    return static_cast<DType>(code);
}

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using Strides = py::tuple;  // of [B, tokens, heads, D]; the last is not looked at

// The first N integers of a tuple; pybind11's own conversion to std::array costs some 0.4 µs a tuple more.
template <int N>
std::array<int64_t, N> integers(const py::tuple& tuple) {
    require(PyTuple_GET_SIZE(tuple.ptr()) >= N, "attention: a tuple is too short");
    std::array<int64_t, N> found;
    for (int i = 0; i < N; ++i) found[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (PyErr_Occurred()) throw py::error_already_set();
    return found;
}

template <class Part>
Part heads_of(uintptr_t address, const Strides& strides, int64_t elements, const char* name) {
    require(elements == 0 || address != 0, name);
    const auto [batch, token, head] = integers<3>(strides);
    require(batch >= 0 && token >= 0 && head >= 0, "attention: strides may not be negative");
    return {pointer<void>(address), batch, token, head};
}

inline Attention attention_of(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
                              const Strides& v_strides, int dtype, uintptr_t kv_lengths, uintptr_t seed, bool causal,
                              float scale, double dropout_p, const py::tuple& sizes) {
    const auto [B, T, S, H, K, D] = integers<6>(sizes);
    require(B >= 0 && T >= 0 && S >= 0 && H >= 0 && K >= 1 && H % K == 0, "attention: K must divide H");
    require(D >= 1 && D <= 256, "attention: D must be 1 to 256");
    require(dropout_p >= 0 && dropout_p < 1 && (seed != 0 || dropout_p == 0),
            "attention: dropout needs 0 <= p < 1 and a seed");
    const double below = std::nearbyint(dropout_p * 0x1p32);
    return {heads_of<Heads>(q, q_strides, B * T * H, "q is null"),
            heads_of<Heads>(k, k_strides, B * S * K, "k is null"),
            heads_of<Heads>(v, v_strides, B * S * K, "v is null"),
            B,
            T,
            S,
            H,
            K,
            D,
            dtype_of(dtype),
            causal,
            scale,
            pointer<int64_t>(kv_lengths),
            dropout_p > 0 ? pointer<int64_t>(seed) : nullptr,
            static_cast<uint32_t>(std::min(below, 4294967295.0)),
            below > 4294967295.0 ? 0.0f : static_cast<float>(1 / (1 - dropout_p))};
}

inline void require_norm(uintptr_t weight, uintptr_t mean, uintptr_t rstd, int64_t rows) {
    require(weight != 0, "weight is null");
    require(rows == 0 || (mean != 0 && rstd != 0), "mean or rstd is null");
}

inline LayerNormFwd layer_norm_fwd_of(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                                      int dtype, uintptr_t weight, int weight_dtype, uintptr_t bias, int bias_dtype,
                                      uintptr_t y, uintptr_t h, uintptr_t mean, uintptr_t rstd, int64_t rows,
                                      int64_t cols, float eps) {
    require_matrix(x, rows, cols, x_stride, "x");
    require_matrix(y, rows, cols, cols, "y");
    if (residual != 0 || h != 0) {
        require_matrix(residual, rows, cols, residual_stride, "residual");
        require_matrix(h, rows, cols, cols, "h");
    }
    require_norm(weight, mean, rstd, rows);
    return {pointer<void>(x),
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
}

inline LayerNormBwd layer_norm_bwd_of(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride, uintptr_t h,
                                      int64_t h_stride, int dtype, uintptr_t weight, int weight_dtype, uintptr_t mean,
                                      uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, int bias_dtype,
                                      int64_t rows, int64_t cols) {
    require_matrix(dy, rows, cols, dy_stride, "dy");
    require_matrix(h, rows, cols, h_stride, "x");
    if (dh != 0) require_matrix(dh, rows, cols, dh_stride, "dh");
    require_norm(weight, mean, rstd, rows);
    return {pointer<void>(dy),
            dy_stride,
            pointer<void>(dh),
            dh_stride,
            pointer<void>(h),
            h_stride,
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
}

inline GeluFwd gelu_fwd_of(uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias, int bias_dtype, uintptr_t y,
                           bool tanh, int64_t rows, int64_t cols) {
    require_matrix(x, rows, cols, x_stride, "x");
    require_matrix(y, rows, cols, cols, "y");
    return {pointer<void>(x),
            x_stride,
            dtype_of(dtype),
            pointer<void>(bias),
            dtype_of(bias_dtype),
            pointer<void>(y),
            tanh,
            rows,
            cols};
}

inline GeluBwd gelu_bwd_of(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias,
                           int bias_dtype, uintptr_t dx, uintptr_t dbias, bool tanh, int64_t rows, int64_t cols) {
    require_matrix(dy, rows, cols, dy_stride, "dy");
    require_matrix(x, rows, cols, x_stride, "x");
    return {pointer<void>(dy),
            dy_stride,
            pointer<void>(x),
            x_stride,
            dtype_of(dtype),
            pointer<void>(bias),
            dtype_of(bias_dtype),
            pointer<void>(dx),
            pointer<void>(dbias),
            tanh,
            rows,
            cols};
}

inline EmbeddingFwd embedding_fwd_of(uintptr_t tokens, uintptr_t positions, int64_t places, int64_t length,
                                     uintptr_t token, int64_t token_rows, uintptr_t position, int64_t position_rows,
                                     uintptr_t y, int dtype, int64_t cols, float scale) {
    require_matrix(y, places, cols, cols, "y");
    require(places == 0 || tokens != 0, "tokens is null");
    require(token_rows == 0 || token != 0, "token is null");
    require(length >= 1 || places == 0, "length must be at least 1");
    return {pointer<int64_t>(tokens),
            pointer<int64_t>(positions),
            places,
            length,
            pointer<void>(token),
            token_rows,
            pointer<void>(position),
            position_rows,
            pointer<void>(y),
            dtype_of(dtype),
            cols,
            scale};
}

inline EmbeddingBwd embedding_bwd_of(uintptr_t dy, int64_t dy_stride, uintptr_t indices, int64_t places, int64_t length,
                                     uintptr_t dtable, int64_t table_rows, int dtype, int64_t cols, float scale) {
    require_matrix(dy, places, cols, dy_stride, "dy");
    require_matrix(dtable, table_rows, cols, cols, "dtable");
    require(length >= 1 || places == 0, "length must be at least 1");
    return {pointer<void>(dy),     dy_stride,  pointer<int64_t>(indices), places, length,
            pointer<void>(dtable), table_rows, dtype_of(dtype),           cols,   scale};
}

inline CrossEntropyFwd cross_entropy_fwd_of(uintptr_t logits, int64_t stride, int dtype, uintptr_t targets,
                                            int64_t ignore_index, int64_t rows, int64_t cols, int64_t first,
                                            int64_t classes, float smoothing, uintptr_t state, uintptr_t denominator,
                                            uintptr_t lse, uintptr_t loss) {
    if (cols) require_matrix(logits, rows, cols, stride, "logits");
    require(rows >= 0 && cols >= 0 && first >= 0 && first + cols <= classes, "the columns are not among the classes");
    require(rows == 0 || state != 0 || (loss != 0 && cols == classes), "a slice of the columns needs a state");
    require(rows == 0 || (targets != 0 && (loss == 0 || lse != 0)), "targets or lse is null");
    return {pointer<void>(logits),
            stride,
            dtype_of(dtype),
            pointer<int64_t>(targets),
            ignore_index,
            rows,
            cols,
            first,
            classes,
            smoothing,
            pointer<void>(state),
            pointer<float>(denominator),
            pointer<float>(lse),
            pointer<float>(loss)};
}

inline CrossEntropyBwd cross_entropy_bwd_of(uintptr_t logits, int64_t stride, int dtype, uintptr_t targets,
                                            int64_t ignore_index, uintptr_t lse, uintptr_t dloss, uintptr_t denominator,
                                            uintptr_t dlogits, int64_t dlogits_stride, int64_t rows, int64_t cols,
                                            int64_t vocab, int64_t first, int64_t classes, float smoothing) {
    require_matrix(logits, rows, cols, stride, "logits");
    require_matrix(dlogits, rows, cols, dlogits_stride, "dlogits");
    require(vocab >= 0 && vocab <= cols && first >= 0 && first + vocab <= classes,
            "the columns are not among the classes");
    require(rows <= 1 || dlogits_stride >= cols, "rows of dlogits may not overlap");
    require(rows == 0 || (targets != 0 && lse != 0), "targets or lse is null");
    require(dloss != 0, "dloss is null");
    return {pointer<void>(logits),
            stride,
            dtype_of(dtype),
            pointer<int64_t>(targets),
            ignore_index,
            pointer<float>(lse),
            pointer<float>(dloss),
            pointer<float>(denominator),
            pointer<void>(dlogits),
            dlogits_stride,
            rows,
            cols,
            vocab,
            first,
            classes,
            smoothing};
}

using Addresses = std::vector<uintptr_t>;

inline std::vector<AdamWTensor> adamw_tensors_of(const Addresses& params, const Addresses& grads,
                                                 const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
                                                 const std::vector<int64_t>& sizes,
                                                 const std::vector<int>& param_dtypes,
                                                 const std::vector<int>& grad_dtypes,
                                                 const std::vector<int>& moment_dtypes) {
    const size_t count = sizes.size();
    for (const Addresses* list : {&params, &grads, &exp_avgs, &exp_avg_sqs})
        require(list->size() == count, "the lists are not alike in length");
    for (const std::vector<int>* list : {&param_dtypes, &grad_dtypes, &moment_dtypes})
        require(list->size() == count, "the lists are not alike in length");
    std::vector<AdamWTensor> tensors(count);
    for (size_t i = 0; i < count; ++i) {
        require(sizes[i] == 0 || (sizes[i] > 0 && params[i] && grads[i] && exp_avgs[i] && exp_avg_sqs[i]),
                "a tensor is null");
        tensors[i] = {pointer<void>(params[i]),
                      pointer<void>(grads[i]),
                      pointer<void>(exp_avgs[i]),
                      pointer<void>(exp_avg_sqs[i]),
                      sizes[i],
                      dtype_of(param_dtypes[i]),
                      dtype_of(grad_dtypes[i]),
                      dtype_of(moment_dtypes[i])};
    }
    return tensors;
}

inline std::vector<GradTensor> grad_tensors_of(const Addresses& grads, const std::vector<int64_t>& sizes,
                                               const std::vector<int>& dtypes) {
    require(grads.size() == sizes.size() && grads.size() == dtypes.size(), "the lists are not alike in length");
    std::vector<GradTensor> tensors(grads.size());
    for (size_t i = 0; i < grads.size(); ++i) {
        require(sizes[i] == 0 || (sizes[i] > 0 && grads[i]), "a tensor is null");
        tensors[i] = {pointer<void>(grads[i]), sizes[i], dtype_of(dtypes[i])};
    }
    return tensors;
}

}  // namespace tinygpt
