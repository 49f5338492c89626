// The module tinygpt_kernels._C: raw pointers and sizes in, nothing of torch anywhere.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <new>

#include "arguments.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/threads.h"
#if defined(TINYGPT_CUDA)
#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace tinygpt {
namespace {

void add_layer_norm_fwd(uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride, int dtype,
                        uintptr_t weight, int weight_dtype, uintptr_t bias, int bias_dtype, uintptr_t y, uintptr_t h,
                        uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols, float eps) {
    const LayerNormFwd arguments = layer_norm_fwd_of(x, x_stride, residual, residual_stride, dtype, weight,
                                                     weight_dtype, bias, bias_dtype, y, h, mean, rstd, rows, cols, eps);
    py::gil_scoped_release released;
    if (!cpu::kernels().layer_norm_fwd(arguments)) throw std::bad_alloc();
}

void gemm(uintptr_t a, int64_t a_row, int64_t a_col, uintptr_t b, int64_t b_row, int64_t b_col, uintptr_t c,
          int64_t c_row, uintptr_t bias, uintptr_t add, int64_t add_row, uintptr_t factor, int64_t factor_row,
          int activation, uintptr_t slope, int64_t slope_row, int64_t m, int64_t n, int64_t k) {
    require(m >= 0 && n >= 0 && k >= 0, "m, n and k must be at least 0");
    require(activation >= 0 && activation <= 2, "an activation is 0 (none), 1 (gelu) or 2 (gelu, tanh)");
    require(m == 0 || n == 0 || (activation != 0) == (slope != 0), "slope belongs to an activation");
    require(activation == 0 || factor == 0, "factor and an activation exclude each other");
    for (int64_t stride : {a_row, a_col, b_row, b_col, add_row, factor_row})
        require(stride >= 0, "a stride is negative");
    require(m <= 1 || (c_row >= n && (slope == 0 || slope_row >= n)), "rows of c or slope overlap");
    require(m == 0 || n == 0 || (c != 0 && (k == 0 || (a != 0 && b != 0))), "a, b or c is null");
    const Extent target{c, m, n, c_row, 1}, second{slope, m, n, slope_row, 1}, added{add, m, n, add_row, 1};
    const Extent read[] = {
        {a, m, k, a_row, a_col}, {b, k, n, b_row, b_col}, {bias, 1, n, n, 1}, {factor, m, n, factor_row, 1}};
    for (const Extent& e : read) require(!overlap(e, target) && !overlap(e, second), "an output overlaps an input");
    require(!overlap(target, second) && !overlap(added, second), "slope overlaps c or add");
    require((add == c && add_row == c_row) || !overlap(added, target), "add overlaps c and is not c");
    const Gemm arguments{pointer<float>(a),
                         a_row,
                         a_col,
                         pointer<float>(b),
                         b_row,
                         b_col,
                         pointer<float>(c),
                         c_row,
                         pointer<float>(bias),
                         pointer<float>(add),
                         add_row,
                         pointer<float>(factor),
                         factor_row,
                         static_cast<Activation>(activation),
                         pointer<float>(slope),
                         slope_row,
                         m,
                         n,
                         k};
    py::gil_scoped_release released;
    if (!cpu::kernels().gemm(arguments)) throw std::bad_alloc();
}

void attention_fwd(uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
                   const Strides& v_strides, int dtype, uintptr_t kv_lengths, uintptr_t seed, uintptr_t y,
                   uintptr_t lse, bool causal, float scale, double dropout_p, const py::tuple& sizes) {
    const AttentionFwd arguments{attention_of(q, q_strides, k, k_strides, v, v_strides, dtype, kv_lengths, seed, causal,
                                              scale, dropout_p, sizes),
                                 pointer<void>(y), pointer<float>(lse)};
    if (arguments.B * arguments.T * arguments.H == 0) return;
    require(y != 0 && lse != 0, "y or lse is null");
    py::gil_scoped_release released;
    if (!cpu::kernels().attention_fwd(arguments)) throw std::bad_alloc();
}

void attention_bwd(uintptr_t dy, const Strides& dy_strides, uintptr_t q, const Strides& q_strides, uintptr_t k,
                   const Strides& k_strides, uintptr_t v, const Strides& v_strides, int dtype, uintptr_t kv_lengths,
                   uintptr_t seed, uintptr_t y, const Strides& y_strides, uintptr_t lse, uintptr_t dq,
                   const Strides& dq_strides, uintptr_t dk, const Strides& dk_strides, uintptr_t dv,
                   const Strides& dv_strides, bool causal, float scale, double dropout_p, const py::tuple& sizes) {
    const Attention common = attention_of(q, q_strides, k, k_strides, v, v_strides, dtype, kv_lengths, seed, causal,
                                          scale, dropout_p, sizes);
    const int64_t queries = common.B * common.T * common.H;
    require(queries == 0 || lse != 0, "lse is null");
    const AttentionBwd arguments{common,
                                 heads_of<Heads>(y, y_strides, queries, "y is null"),
                                 heads_of<Heads>(dy, dy_strides, queries, "dy is null"),
                                 pointer<float>(lse),
                                 heads_of<HeadsOut>(dq, dq_strides, 0, "dq"),
                                 heads_of<HeadsOut>(dk, dk_strides, 0, "dk"),
                                 heads_of<HeadsOut>(dv, dv_strides, 0, "dv")};
    py::gil_scoped_release released;
    if (!cpu::kernels().attention_bwd(arguments)) throw std::bad_alloc();
}

void layer_norm_fwd(uintptr_t x, int64_t x_stride, int dtype, uintptr_t weight, int weight_dtype, uintptr_t bias,
                    int bias_dtype, uintptr_t y, uintptr_t mean, uintptr_t rstd, int64_t rows, int64_t cols,
                    float eps) {
    add_layer_norm_fwd(x, x_stride, 0, 0, dtype, weight, weight_dtype, bias, bias_dtype, y, 0, mean, rstd, rows, cols,
                       eps);
}

void add_layer_norm_bwd(uintptr_t dy, int64_t dy_stride, uintptr_t dh, int64_t dh_stride, uintptr_t h, int64_t h_stride,
                        int dtype, uintptr_t weight, int weight_dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dx,
                        uintptr_t dweight, uintptr_t dbias, int bias_dtype, int64_t rows, int64_t cols) {
    const LayerNormBwd arguments =
        layer_norm_bwd_of(dy, dy_stride, dh, dh_stride, h, h_stride, dtype, weight, weight_dtype, mean, rstd, dx,
                          dweight, dbias, bias_dtype, rows, cols);
    py::gil_scoped_release released;
    if (!cpu::kernels().layer_norm_bwd(arguments)) throw std::bad_alloc();
}

void layer_norm_bwd(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int dtype, uintptr_t weight,
                    int weight_dtype, uintptr_t mean, uintptr_t rstd, uintptr_t dx, uintptr_t dweight, uintptr_t dbias,
                    int bias_dtype, int64_t rows, int64_t cols) {
    add_layer_norm_bwd(dy, dy_stride, 0, 0, x, x_stride, dtype, weight, weight_dtype, mean, rstd, dx, dweight, dbias,
                       bias_dtype, rows, cols);
}

void gelu_fwd(uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias, int bias_dtype, uintptr_t y, bool tanh,
              int64_t rows, int64_t cols) {
    const GeluFwd arguments = gelu_fwd_of(x, x_stride, dtype, bias, bias_dtype, y, tanh, rows, cols);
    py::gil_scoped_release released;
    if (!cpu::kernels().gelu_fwd(arguments)) throw std::bad_alloc();
}

void gelu_bwd(uintptr_t dy, int64_t dy_stride, uintptr_t x, int64_t x_stride, int dtype, uintptr_t bias, int bias_dtype,
              uintptr_t dx, uintptr_t dbias, bool tanh, int64_t rows, int64_t cols) {
    const GeluBwd arguments =
        gelu_bwd_of(dy, dy_stride, x, x_stride, dtype, bias, bias_dtype, dx, dbias, tanh, rows, cols);
    py::gil_scoped_release released;
    if (!cpu::kernels().gelu_bwd(arguments)) throw std::bad_alloc();
}

void embedding_fwd(uintptr_t tokens, uintptr_t positions, int64_t places, int64_t length, uintptr_t token,
                   int64_t token_rows, uintptr_t position, int64_t position_rows, uintptr_t y, int dtype, int64_t cols,
                   float scale) {
    const EmbeddingFwd arguments = embedding_fwd_of(tokens, positions, places, length, token, token_rows, position,
                                                    position_rows, y, dtype, cols, scale);
    py::gil_scoped_release released;
    if (!cpu::kernels().embedding_fwd(arguments)) throw std::bad_alloc();
}

void embedding_bwd(uintptr_t dy, int64_t dy_stride, uintptr_t indices, int64_t places, int64_t length, uintptr_t dtable,
                   int64_t table_rows, int dtype, int64_t cols, float scale) {
    const EmbeddingBwd arguments =
        embedding_bwd_of(dy, dy_stride, indices, places, length, dtable, table_rows, dtype, cols, scale);
    py::gil_scoped_release released;
    if (!cpu::kernels().embedding_bwd(arguments)) throw std::bad_alloc();
}

void cross_entropy_fwd(uintptr_t logits, int64_t stride, int dtype, uintptr_t targets, int64_t ignore_index,
                       int64_t rows, int64_t cols, int64_t first, int64_t classes, float smoothing, uintptr_t state,
                       uintptr_t denominator, uintptr_t lse, uintptr_t loss) {
    const CrossEntropyFwd arguments = cross_entropy_fwd_of(logits, stride, dtype, targets, ignore_index, rows, cols,
                                                           first, classes, smoothing, state, denominator, lse, loss);
    py::gil_scoped_release released;
    if (!cpu::kernels().cross_entropy_fwd(arguments)) throw std::bad_alloc();
}

void cross_entropy_bwd(uintptr_t logits, int64_t stride, int dtype, uintptr_t targets, int64_t ignore_index,
                       uintptr_t lse, uintptr_t dloss, uintptr_t denominator, uintptr_t dlogits, int64_t dlogits_stride,
                       int64_t rows, int64_t cols, int64_t vocab, int64_t first, int64_t classes, float smoothing) {
    const CrossEntropyBwd arguments =
        cross_entropy_bwd_of(logits, stride, dtype, targets, ignore_index, lse, dloss, denominator, dlogits,
                             dlogits_stride, rows, cols, vocab, first, classes, smoothing);
    py::gil_scoped_release released;
    if (!cpu::kernels().cross_entropy_bwd(arguments)) throw std::bad_alloc();
}

void adamw_(const Addresses& params, const Addresses& grads, const Addresses& exp_avgs, const Addresses& exp_avg_sqs,
            const std::vector<int64_t>& sizes, const std::vector<int>& param_dtypes,
            const std::vector<int>& grad_dtypes, const std::vector<int>& moment_dtypes, int64_t step, double lr,
            double beta1, double beta2, double eps, double weight_decay, double grad_scale) {
    const auto tensors =
        adamw_tensors_of(params, grads, exp_avgs, exp_avg_sqs, sizes, param_dtypes, grad_dtypes, moment_dtypes);
    const AdamW arguments{
        tensors.data(), static_cast<int64_t>(tensors.size()), step, lr, beta1, beta2, eps, weight_decay, grad_scale};
    py::gil_scoped_release released;
    if (!cpu::kernels().adamw_(arguments)) throw std::bad_alloc();
}

void clip_grad_norm_(const Addresses& grads, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes,
                     double max_norm, uintptr_t norm) {
    require(norm != 0, "norm is null");
    const auto tensors = grad_tensors_of(grads, sizes, dtypes);
    const ClipGradNorm arguments{tensors.data(), static_cast<int64_t>(tensors.size()), max_norm, pointer<float>(norm)};
    py::gil_scoped_release released;
    if (!cpu::kernels().clip_grad_norm_(arguments)) throw std::bad_alloc();
}

}  // namespace
}  // namespace tinygpt

PYBIND11_MODULE(_C, m) {
    using namespace tinygpt;
    m.doc() =
        "tinygpt's compiled kernels. Pointers are integers, strides count elements, 0 stands for an absent tensor.";
    m.def("gemm", &gemm, py::arg("a"), py::arg("a_row"), py::arg("a_col"), py::arg("b"), py::arg("b_row"),
          py::arg("b_col"), py::arg("c"), py::arg("c_row"), py::arg("bias"), py::arg("add"), py::arg("add_row"),
          py::arg("factor"), py::arg("factor_row"), py::arg("activation"), py::arg("slope"), py::arg("slope_row"),
          py::arg("m"), py::arg("n"), py::arg("k"));
    m.def("attention_fwd", &attention_fwd, py::arg("q"), py::arg("q_strides"), py::arg("k"), py::arg("k_strides"),
          py::arg("v"), py::arg("v_strides"), py::arg("dtype"), py::arg("kv_lengths"), py::arg("seed"), py::arg("y"),
          py::arg("lse"), py::arg("causal"), py::arg("scale"), py::arg("dropout_p"), py::arg("sizes"));
    m.def("attention_bwd", &attention_bwd, py::arg("dy"), py::arg("dy_strides"), py::arg("q"), py::arg("q_strides"),
          py::arg("k"), py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("dtype"),
          py::arg("kv_lengths"), py::arg("seed"), py::arg("y"), py::arg("y_strides"), py::arg("lse"), py::arg("dq"),
          py::arg("dq_strides"), py::arg("dk"), py::arg("dk_strides"), py::arg("dv"), py::arg("dv_strides"),
          py::arg("causal"), py::arg("scale"), py::arg("dropout_p"), py::arg("sizes"));
    m.def("layer_norm_fwd", &layer_norm_fwd, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("weight"),
          py::arg("weight_dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"), py::arg("mean"),
          py::arg("rstd"), py::arg("rows"), py::arg("cols"), py::arg("eps"));
    m.def("layer_norm_bwd", &layer_norm_bwd, py::arg("dy"), py::arg("dy_stride"), py::arg("x"), py::arg("x_stride"),
          py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("dx"),
          py::arg("dweight"), py::arg("dbias"), py::arg("bias_dtype"), py::arg("rows"), py::arg("cols"));
    m.def("add_layer_norm_fwd", &add_layer_norm_fwd, py::arg("x"), py::arg("x_stride"), py::arg("residual"),
          py::arg("residual_stride"), py::arg("dtype"), py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"),
          py::arg("bias_dtype"), py::arg("y"), py::arg("h"), py::arg("mean"), py::arg("rstd"), py::arg("rows"),
          py::arg("cols"), py::arg("eps"));
    m.def("add_layer_norm_bwd", &add_layer_norm_bwd, py::arg("dy"), py::arg("dy_stride"), py::arg("dh"),
          py::arg("dh_stride"), py::arg("h"), py::arg("h_stride"), py::arg("dtype"), py::arg("weight"),
          py::arg("weight_dtype"), py::arg("mean"), py::arg("rstd"), py::arg("dx"), py::arg("dweight"),
          py::arg("dbias"), py::arg("bias_dtype"), py::arg("rows"), py::arg("cols"));
    m.def("gelu_fwd", &gelu_fwd, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("bias"),
          py::arg("bias_dtype"), py::arg("y"), py::arg("tanh"), py::arg("rows"), py::arg("cols"));
    m.def("gelu_bwd", &gelu_bwd, py::arg("dy"), py::arg("dy_stride"), py::arg("x"), py::arg("x_stride"),
          py::arg("dtype"), py::arg("bias"), py::arg("bias_dtype"), py::arg("dx"), py::arg("dbias"), py::arg("tanh"),
          py::arg("rows"), py::arg("cols"));
    m.def("embedding_fwd", &embedding_fwd, py::arg("tokens"), py::arg("positions"), py::arg("places"),
          py::arg("length"), py::arg("token"), py::arg("token_rows"), py::arg("position"), py::arg("position_rows"),
          py::arg("y"), py::arg("dtype"), py::arg("cols"), py::arg("scale"));
    m.def("embedding_bwd", &embedding_bwd, py::arg("dy"), py::arg("dy_stride"), py::arg("indices"), py::arg("places"),
          py::arg("length"), py::arg("dtable"), py::arg("table_rows"), py::arg("dtype"), py::arg("cols"),
          py::arg("scale"));
    m.def("cross_entropy_fwd", &cross_entropy_fwd, py::arg("logits"), py::arg("stride"), py::arg("dtype"),
          py::arg("targets"), py::arg("ignore_index"), py::arg("rows"), py::arg("cols"), py::arg("first"),
          py::arg("classes"), py::arg("smoothing"), py::arg("state"), py::arg("denominator"), py::arg("lse"),
          py::arg("loss"));
    m.def("cross_entropy_bwd", &cross_entropy_bwd, py::arg("logits"), py::arg("stride"), py::arg("dtype"),
          py::arg("targets"), py::arg("ignore_index"), py::arg("lse"), py::arg("dloss"), py::arg("denominator"),
          py::arg("dlogits"), py::arg("dlogits_stride"), py::arg("rows"), py::arg("cols"), py::arg("vocab"),
          py::arg("first"), py::arg("classes"), py::arg("smoothing"));
    m.def("adamw_", &adamw_, py::arg("params"), py::arg("grads"), py::arg("exp_avgs"), py::arg("exp_avg_sqs"),
          py::arg("sizes"), py::arg("param_dtypes"), py::arg("grad_dtypes"), py::arg("moment_dtypes"), py::arg("step"),
          py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
          py::arg("grad_scale"));
    m.def("clip_grad_norm_", &clip_grad_norm_, py::arg("grads"), py::arg("sizes"), py::arg("dtypes"),
          py::arg("max_norm"), py::arg("norm"));
    m.def("isa", &cpu::isa, "The instruction set whose kernels serve.");
    m.def("supported_isas", &cpu::supported_isas, "Instruction sets this build and this CPU both have, best last.");
    m.def(
        "set_isa",
        [](const std::string& name) {
            require(cpu::set_isa(name), ("instruction set '" + name + "' is not supported here").c_str());
        },
        py::arg("name"), "Serve from another instruction set's kernels; for tests and measurements.");
    m.def(
        "set_grain",
        [](int64_t elements) {
            require(elements >= 1, "a grain is at least 1");
            return cpu::set_grain(elements);
        },
        py::arg("elements"), "How many elements are worth a thread; returns how many were. For tests.");
#if defined(TINYGPT_CUDA)
    cuda::add_ops(m);
    m.attr("cuda_architectures") = TINYGPT_CUDA_ARCHITECTURES;
    m.attr("cuda_compiler") = TINYGPT_CUDA_COMPILER;
#endif
}
