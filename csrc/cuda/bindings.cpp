// The CUDA ops as functions of a Python module: of the one that is shipped, and of the one that simulates.

#include "bindings.h"

#include "../arguments.h"
#include "kernels.h"

namespace tinygpt::cuda {
namespace {

// 16-byte vectors of two-byte elements, of what `attention_of` has checked already.
void require_vectors(uintptr_t address, const Strides& strides, DType dtype, const char* name) {
    if (dtype == DType::f32) return;
    const auto [batch, token, head] = integers<3>(strides);
    require(address % 16 == 0 && batch % 8 == 0 && token % 8 == 0 && head % 8 == 0, name);
}

void attention_fwd_from(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
                        const Strides& v_strides, int dtype, uintptr_t kv_lengths, uintptr_t seed, uintptr_t y,
                        uintptr_t lse, bool causal, float scale, double dropout_p, const py::tuple& sizes,
                        uintptr_t stream) {
    const AttentionFwd a{attention_of(q, q_strides, k, k_strides, v, v_strides, dtype, kv_lengths, seed, causal, scale,
                                      dropout_p, sizes),
                         pointer<void>(y), pointer<float>(lse)};
    require_vectors(q, q_strides, a.dtype, "rows of q are not at multiples of 16 bytes");
    require_vectors(k, k_strides, a.dtype, "rows of k are not at multiples of 16 bytes");
    require_vectors(v, v_strides, a.dtype, "rows of v are not at multiples of 16 bytes");
    require(a.B * a.T * a.H == 0 || (y != 0 && lse != 0), "y or lse is null");
    attention_fwd(a, pointer<void>(stream));
}

void attention_bwd_from(uintptr_t dy, const Strides& dy_strides, uintptr_t q, const Strides& q_strides, uintptr_t k,
                        const Strides& k_strides, uintptr_t v, const Strides& v_strides, int dtype,
                        uintptr_t kv_lengths, uintptr_t seed, uintptr_t y, const Strides& y_strides, uintptr_t lse,
                        uintptr_t dq, const Strides& dq_strides, uintptr_t dk, const Strides& dk_strides, uintptr_t dv,
                        const Strides& dv_strides, bool causal, float scale, double dropout_p, const py::tuple& sizes,
                        uintptr_t workspace, uintptr_t stream) {
    const Attention common = attention_of(q, q_strides, k, k_strides, v, v_strides, dtype, kv_lengths, seed, causal,
                                          scale, dropout_p, sizes);
    const int64_t queries = common.B * common.T * common.H;
    require(queries == 0 || (lse != 0 && workspace != 0), "lse or workspace is null");
    const AttentionBwd a{common,
                         heads_of<Heads>(y, y_strides, queries, "y is null"),
                         heads_of<Heads>(dy, dy_strides, queries, "dy is null"),
                         pointer<float>(lse),
                         heads_of<HeadsOut>(dq, dq_strides, 0, "dq"),
                         heads_of<HeadsOut>(dk, dk_strides, 0, "dk"),
                         heads_of<HeadsOut>(dv, dv_strides, 0, "dv")};
    require_vectors(q, q_strides, a.dtype, "rows of q are not at multiples of 16 bytes");
    require_vectors(k, k_strides, a.dtype, "rows of k are not at multiples of 16 bytes");
    require_vectors(v, v_strides, a.dtype, "rows of v are not at multiples of 16 bytes");
    require_vectors(y, y_strides, a.dtype, "rows of y are not at multiples of 16 bytes");
    require_vectors(dy, dy_strides, a.dtype, "rows of dy are not at multiples of 16 bytes");
    require_vectors(dq, dq_strides, a.dtype, "rows of dq are not at multiples of 16 bytes");
    require_vectors(dk, dk_strides, a.dtype, "rows of dk are not at multiples of 16 bytes");
    require_vectors(dv, dv_strides, a.dtype, "rows of dv are not at multiples of 16 bytes");
    attention_bwd(a, pointer<float>(workspace), pointer<void>(stream));
}

void decode_attention_fwd_from(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides,
                               uintptr_t v, const Strides& v_strides, int dtype, uintptr_t lengths, uintptr_t y,
                               float scale, const py::tuple& sizes, uintptr_t workspace, uintptr_t stream) {
    const Attention a =
        attention_of(q, q_strides, k, k_strides, v, v_strides, dtype, lengths, 0, false, scale, 0.0, sizes);
    require(a.T == 1, "decode_attention takes one query a row");
    require(a.B * a.H == 0 || (y != 0 && lengths != 0), "y or lengths is null");
    require(workspace != 0 || decode_attention_splits(a.B, a.S, a.H, a.K, a.D, a.dtype) <= 1, "workspace is null");
    decode_attention_fwd(a, pointer<void>(y), pointer<float>(workspace), pointer<void>(stream));
}

}  // namespace

void add_ops(py::module_& m) {
    m.def("cuda_probe", &probe, "Why kernels of this build cannot run on the current GPU; empty when they can.");
    m.def("cuda_attention_fwd", &attention_fwd_from, py::arg("q"), py::arg("q_strides"), py::arg("k"),
          py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("dtype"), py::arg("kv_lengths"),
          py::arg("seed"), py::arg("y"), py::arg("lse"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"),
          py::arg("sizes"), py::arg("stream"));
    m.def("cuda_attention_bwd_workspace", &attention_bwd_workspace, py::arg("B"), py::arg("H"), py::arg("T"));
    m.def("cuda_attention_bwd", &attention_bwd_from, py::arg("dy"), py::arg("dy_strides"), py::arg("q"),
          py::arg("q_strides"), py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"),
          py::arg("dtype"), py::arg("kv_lengths"), py::arg("seed"), py::arg("y"), py::arg("y_strides"), py::arg("lse"),
          py::arg("dq"), py::arg("dq_strides"), py::arg("dk"), py::arg("dk_strides"), py::arg("dv"),
          py::arg("dv_strides"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"), py::arg("sizes"),
          py::arg("workspace"), py::arg("stream"));
    m.def(
        "cuda_layer_norm_fwd",
        [](uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, int dtype, uintptr_t weight,
           int weight_dtype, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t h, uintptr_t mean, uintptr_t rstd,
           int64_t rows, int64_t cols, float eps, uintptr_t stream) {
            const LayerNormFwd a = layer_norm_fwd_of(x, x_stride, residual, residual_stride, dtype, weight,
                                                     weight_dtype, bias, bias_dtype, y, h, mean, rstd, rows, cols, eps);
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
            require(partial != 0, "partial is null");
            const LayerNormBwd a =
                layer_norm_bwd_of(dy, dy_stride, dh, dh_stride, x, x_stride, dtype, weight, weight_dtype, mean, rstd,
                                  dx, dweight, dbias, bias_dtype, rows, cols);
            layer_norm_bwd(a, pointer<float>(partial), pointer<void>(stream));
        },
        py::arg("dy"), py::arg("dy_stride"), py::arg("dh"), py::arg("dh_stride"), py::arg("x"), py::arg("x_stride"),
        py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("dx"),
        py::arg("dweight"), py::arg("dbias"), py::arg("bias_dtype"), py::arg("rows"), py::arg("cols"),
        py::arg("partial"), py::arg("stream"));
    m.def(
        "cuda_gelu_fwd",
        [](uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias, int bias_dtype, uintptr_t y, bool tanh,
           int64_t rows, int64_t cols, uintptr_t stream) {
            gelu_fwd(gelu_fwd_of(x, x_stride, dtype, bias, bias_dtype, y, tanh, rows, cols), pointer<void>(stream));
        },
        py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"),
        py::arg("tanh"), py::arg("rows"), py::arg("cols"), py::arg("stream"));
    m.def("cuda_gelu_bwd_lanes", &gelu_bwd_lanes, py::arg("rows"), py::arg("cols"));
    m.def(
        "cuda_gelu_bwd",
        [](uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias, int bias_dtype,
           uintptr_t dx, uintptr_t dbias, bool tanh, int64_t rows, int64_t cols, uintptr_t partial, uintptr_t stream) {
            require(dbias == 0 || partial != 0, "partial is null");
            gelu_bwd(gelu_bwd_of(dy, dy_stride, x, x_stride, dtype, bias, bias_dtype, dx, dbias, tanh, rows, cols),
                     pointer<float>(partial), pointer<void>(stream));
        },
        py::arg("dy"), py::arg("dy_stride"), py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("bias"),
        py::arg("bias_dtype"), py::arg("dx"), py::arg("dbias"), py::arg("tanh"), py::arg("rows"), py::arg("cols"),
        py::arg("partial"), py::arg("stream"));
    m.def(
        "cuda_embedding_fwd",
        [](uintptr_t tokens, uintptr_t positions, int64_t places, int64_t length, uintptr_t token, int64_t token_rows,
           uintptr_t position, int64_t position_rows, uintptr_t y, int dtype, int64_t cols, float scale,
           uintptr_t stream) {
            embedding_fwd(embedding_fwd_of(tokens, positions, places, length, token, token_rows, position,
                                           position_rows, y, dtype, cols, scale),
                          pointer<void>(stream));
        },
        py::arg("tokens"), py::arg("positions"), py::arg("places"), py::arg("length"), py::arg("token"),
        py::arg("token_rows"), py::arg("position"), py::arg("position_rows"), py::arg("y"), py::arg("dtype"),
        py::arg("cols"), py::arg("scale"), py::arg("stream"));
    m.def("cuda_embedding_bwd_partial", &embedding_bwd_partial, py::arg("places"));
    m.def(
        "cuda_embedding_bwd",
        [](uintptr_t dy, int64_t dy_stride, uintptr_t indices, uintptr_t order, int64_t places, int64_t length,
           uintptr_t dtable, int64_t table_rows, int dtype, int64_t cols, float scale, uintptr_t partial,
           uintptr_t stream) {
            require(indices == 0 || places == 0 || order != 0, "order is null");
            require(indices == 0 || embedding_bwd_partial(places) == 0 || partial != 0, "partial is null");
            embedding_bwd(
                embedding_bwd_of(dy, dy_stride, indices, places, length, dtable, table_rows, dtype, cols, scale),
                pointer<int64_t>(order), pointer<float>(partial), pointer<void>(stream));
        },
        py::arg("dy"), py::arg("dy_stride"), py::arg("indices"), py::arg("order"), py::arg("places"), py::arg("length"),
        py::arg("dtable"), py::arg("table_rows"), py::arg("dtype"), py::arg("cols"), py::arg("scale"),
        py::arg("partial"), py::arg("stream"));
    m.def(
        "cuda_cross_entropy_fwd",
        [](uintptr_t logits, int64_t stride, int dtype, uintptr_t targets, int64_t ignore_index, int64_t rows,
           int64_t cols, float smoothing, uintptr_t lse, uintptr_t loss, uintptr_t stream) {
            cross_entropy_fwd(cross_entropy_fwd_of(logits, stride, dtype, targets, ignore_index, rows, cols, 0, cols,
                                                   smoothing, 0, 0, lse, loss),
                              pointer<void>(stream));
        },
        py::arg("logits"), py::arg("stride"), py::arg("dtype"), py::arg("targets"), py::arg("ignore_index"),
        py::arg("rows"), py::arg("cols"), py::arg("smoothing"), py::arg("lse"), py::arg("loss"), py::arg("stream"));
    m.def(
        "cuda_cross_entropy_bwd",
        [](uintptr_t logits, int64_t stride, int dtype, uintptr_t targets, int64_t ignore_index, uintptr_t lse,
           uintptr_t dloss, uintptr_t dlogits, int64_t dlogits_stride, int64_t rows, int64_t cols, int64_t vocab,
           float smoothing, uintptr_t stream) {
            cross_entropy_bwd(cross_entropy_bwd_of(logits, stride, dtype, targets, ignore_index, lse, dloss, 0, dlogits,
                                                   dlogits_stride, rows, cols, vocab, 0, vocab, smoothing),
                              pointer<void>(stream));
        },
        py::arg("logits"), py::arg("stride"), py::arg("dtype"), py::arg("targets"), py::arg("ignore_index"),
        py::arg("lse"), py::arg("dloss"), py::arg("dlogits"), py::arg("dlogits_stride"), py::arg("rows"),
        py::arg("cols"), py::arg("vocab"), py::arg("smoothing"), py::arg("stream"));
    m.def(
        "cuda_cross_entropy_mean",
        [](uintptr_t values, int64_t count, uintptr_t targets, int64_t ignore_index, int64_t rows,
           uintptr_t denominator, uintptr_t mean, uintptr_t stream) {
            require(mean != 0 && (count <= 0 || values != 0) && (rows <= 0 || targets != 0), "a pointer is null");
            cross_entropy_mean({pointer<float>(values), count, pointer<int64_t>(targets), ignore_index, rows,
                                pointer<float>(denominator), pointer<float>(mean)},
                               pointer<void>(stream));
        },
        py::arg("values"), py::arg("count"), py::arg("targets"), py::arg("ignore_index"), py::arg("rows"),
        py::arg("denominator"), py::arg("mean"), py::arg("stream"));
    m.def(
        "cuda_decode_attention_splits",
        [](int64_t B, int64_t S, int64_t H, int64_t K, int64_t D, int dtype) {
            require(K >= 1, "K must be at least 1");
            return decode_attention_splits(B, S, H, K, D, dtype_of(dtype));
        },
        py::arg("B"), py::arg("S"), py::arg("H"), py::arg("K"), py::arg("D"), py::arg("dtype"));
    m.def("cuda_decode_attention_fwd", &decode_attention_fwd_from, py::arg("q"), py::arg("q_strides"), py::arg("k"),
          py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("dtype"), py::arg("lengths"), py::arg("y"),
          py::arg("scale"), py::arg("sizes"), py::arg("workspace"), py::arg("stream"));
    m.def(
        "cuda_adamw_",
        [](const Addresses& params, const Addresses& grads, const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
           const std::vector<int64_t>& sizes, const std::vector<int>& param_dtypes, const std::vector<int>& grad_dtypes,
           const std::vector<int>& moment_dtypes, int64_t step, double lr, double beta1, double beta2, double eps,
           double weight_decay, double grad_scale, uintptr_t stream) {
            const auto tensors =
                adamw_tensors_of(params, grads, exp_avgs, exp_avg_sqs, sizes, param_dtypes, grad_dtypes, moment_dtypes);
            adamw_({tensors.data(), static_cast<int64_t>(tensors.size()), step, lr, beta1, beta2, eps, weight_decay,
                    grad_scale},
                   pointer<void>(stream));
        },
        py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"), py::arg("sizes"),
        py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("moment_dtypes"), py::arg("step"), py::arg("lr"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("grad_scale"),
        py::arg("stream"));
    m.def("cuda_clip_grad_norm_workspace", &clip_grad_norm_workspace, py::arg("sizes"));
    m.def(
        "cuda_clip_grad_norm_",
        [](const Addresses& grads, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes, double max_norm,
           uintptr_t norm, uintptr_t workspace, uintptr_t stream) {
            const auto tensors = grad_tensors_of(grads, sizes, dtypes);
            require(norm != 0, "norm is null");
            require(workspace != 0 || clip_grad_norm_workspace(sizes) == 0, "workspace is null");
            clip_grad_norm_({tensors.data(), static_cast<int64_t>(tensors.size()), max_norm, pointer<float>(norm)},
                            pointer<float>(workspace), pointer<void>(stream));
        },
        py::arg("grads"), py::arg("sizes"), py::arg("dtypes"), py::arg("max_norm"), py::arg("norm"),
        py::arg("workspace"), py::arg("stream"));
}

}  // namespace tinygpt::cuda
