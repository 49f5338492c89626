// What every kernel takes. Pointers are raw, strides count elements, statistics are float.
#pragma once

#include <cstdint>

namespace tinygpt {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// h = x + residual where there is a residual, else h = x; y = layer_norm(h).
enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2 };

// C = A B + bias + add, then times factor, or through an activation. Every matrix of the size of C has contiguous rows.
struct Gemm {
    const float* a;  // [m, k], any strides
    int64_t a_row, a_col;
    const float* b;  // [k, n], any strides
    int64_t b_row, b_col;
    float* c;  // [m, n], rows c_row apart; overlaps nothing else, but may be add itself
    int64_t c_row;
    const float* bias;  // [n] or null
    const float* add;   // [m, n] or null, rows add_row apart
    int64_t add_row;
    const float* factor;  // [m, n] or null, rows factor_row apart
    int64_t factor_row;
    Activation activation;  // with none, slope is not written; with another, factor is null
    float* slope;           // [m, n]: the activation's derivative, rows slope_row apart
    int64_t slope_row;
    int64_t m, n, k;
};

// Heads of B rows of tokens, [B, tokens, heads, D]: the last dimension contiguous, the others as far apart as they say.
struct Heads {
    const void* data;
    int64_t batch, token, head;
};
struct HeadsOut {
    void* data;  // or null
    int64_t batch, token, head;
};

// What the forward and the backward of attention have in common.
struct Attention {
    Heads q;  // [B, T, H, D]
    Heads k;  // [B, S, K, D]
    Heads v;  // [B, S, K, D]
    int64_t B, T, S, H, K, D;
    DType dtype;  // of q, k, v, the output and the gradients
    bool causal;
    float scale;
    const int64_t* kv_lengths;  // [B] or null: S
    const int64_t* seed;        // of one element; null: no dropout
    uint32_t drop_below;        // a weight whose random word is below is dropped,
    float inverse_keep;         // and the others grow by this factor
};

struct AttentionFwd : Attention {
    void* y;     // [B, T, H, D], contiguous
    float* lse;  // [B, H, T]: -inf where a query sees no key
};

struct AttentionBwd : Attention {
    Heads y;           // [B, T, H, D], the forward's
    Heads dy;          // [B, T, H, D]
    const float* lse;  // [B, H, T]
    HeadsOut dq, dk, dv;
};

struct LayerNormFwd {
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    const void* residual;  // [rows, cols], rows residual_stride apart, or null
    int64_t residual_stride;
    DType dtype;         // of x, residual, y and h
    const void* weight;  // [cols]
    DType weight_dtype;
    const void* bias;  // [cols] or null
    DType bias_dtype;
    void* y;      // [rows, cols], contiguous
    void* h;      // [rows, cols], contiguous; null without a residual; may be x or residual
    float* mean;  // [rows]
    float* rstd;  // [rows]
    int64_t rows, cols;
    float eps;
};

struct LayerNormBwd {
    const void* dy;  // [rows, cols], rows dy_stride apart
    int64_t dy_stride;
    const void* dh;  // [rows, cols], rows dh_stride apart: added to dx; or null
    int64_t dh_stride;
    const void* x;  // [rows, cols], rows x_stride apart: what was normalised
    int64_t x_stride;
    DType dtype;         // of dy, dh, x and dx
    const void* weight;  // [cols]
    DType weight_dtype;
    const float* mean;  // [rows]
    const float* rstd;  // [rows]
    void* dx;           // [rows, cols], contiguous, or null; may be dy or dh
    void* dweight;      // [cols] in weight_dtype, or null
    void* dbias;        // [cols] in bias_dtype, or null
    DType bias_dtype;
    int64_t rows, cols;
};

// y = gelu(x + bias)
struct GeluFwd {
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    DType dtype;       // of x and y
    const void* bias;  // [cols] or null
    DType bias_dtype;
    void* y;    // [rows, cols], contiguous; may be x
    bool tanh;  // the tanh approximation
    int64_t rows, cols;
};

struct GeluBwd {
    const void* dy;  // [rows, cols], rows dy_stride apart
    int64_t dy_stride;
    const void* x;  // [rows, cols], rows x_stride apart
    int64_t x_stride;
    DType dtype;       // of dy, x and dx
    const void* bias;  // [cols] or null
    DType bias_dtype;
    void* dx;     // [rows, cols], contiguous, or null; may be dy or x
    void* dbias;  // [cols] in bias_dtype, or null
    bool tanh;
    int64_t rows, cols;
};

// y = scale * token row + position row; NaN where an index is no row.
struct EmbeddingFwd {
    const int64_t* tokens;     // [places]
    const int64_t* positions;  // [places], or null: place % length
    int64_t places, length;
    const void* token;  // [token_rows, cols]
    int64_t token_rows;
    const void* position;  // [position_rows, cols] or null
    int64_t position_rows;
    void* y;      // [places, cols]
    DType dtype;  // of the tables and y
    int64_t cols;
    float scale;
};

// The gradient of one table: dtable[r] = scale * the sum of dy over the places with indices[place] == r.
struct EmbeddingBwd {
    const void* dy;  // [places, cols]
    int64_t dy_stride;
    const int64_t* indices;  // [places], or null: place % length
    int64_t places, length;
    void* dtable;  // [table_rows, cols]
    int64_t table_rows;
    DType dtype;  // of dy and dtable
    int64_t cols;
    float scale;
};

struct CrossEntropyFwd {
    const void* logits;  // [rows, cols], rows `stride` apart
    int64_t stride;
    DType dtype;
    const int64_t* targets;  // [rows]
    int64_t ignore_index;
    int64_t rows, cols;
    int64_t first, classes;  // the class of column 0, and how many there are; logits may be a slice of the columns
    float smoothing;
    void* state;  // two doubles per row, kept between slices, which come in order; null: there is one slice
    const float* denominator;  // [1], or null: the number of targets that count
    float* lse;                // [rows], written with loss
    float* loss;               // [1], or null: more columns will come
};

struct CrossEntropyBwd {
    const void* logits;  // [rows, cols], rows `stride` apart
    int64_t stride;
    DType dtype;             // of logits and dlogits
    const int64_t* targets;  // [rows]
    int64_t ignore_index;
    const float* lse;          // [rows]
    const float* dloss;        // [1]
    const float* denominator;  // [1], or null: the number of targets that count
    void* dlogits;             // [rows, cols], rows dlogits_stride apart; may be the logits
    int64_t dlogits_stride;
    int64_t rows, cols;
    int64_t vocab;           // columns from here on are padding: their gradient is 0
    int64_t first, classes;  // as in the forward
    float smoothing;
};

struct AdamWTensor {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    int64_t size;
    DType param_dtype, grad_dtype, moment_dtype;
};

struct AdamW {
    const AdamWTensor* tensors;
    int64_t count, step;
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
};

struct GradTensor {
    void* grad;
    int64_t size;
    DType dtype;
};

struct ClipGradNorm {
    const GradTensor* tensors;
    int64_t count;
    double max_norm;
    float* norm;  // [1], the norm before clipping
};

// One instruction set's kernels. False: no memory for the workspace.
struct CpuKernels {
    bool (*attention_fwd)(const AttentionFwd&);
    bool (*attention_bwd)(const AttentionBwd&);
    bool (*gemm)(const Gemm&);
    bool (*layer_norm_fwd)(const LayerNormFwd&);
    bool (*layer_norm_bwd)(const LayerNormBwd&);
    bool (*gelu_fwd)(const GeluFwd&);
    bool (*gelu_bwd)(const GeluBwd&);
    bool (*embedding_fwd)(const EmbeddingFwd&);
    bool (*embedding_bwd)(const EmbeddingBwd&);
    bool (*cross_entropy_fwd)(const CrossEntropyFwd&);
    bool (*cross_entropy_bwd)(const CrossEntropyBwd&);
    bool (*adamw_)(const AdamW&);
    bool (*clip_grad_norm_)(const ClipGradNorm&);
};

}  // namespace tinygpt
