// The CUDA kernels' hosts: what a call takes (ops.h), the stream it goes to, and memory that Python allocates for it.
// They check nothing but what a launch reports, allocate nothing and wait for nothing.
#pragma once

#include <string>
#include <vector>

#include "../ops.h"

namespace tinygpt::cuda {

using Stream = void*;  // a cudaStream_t

std::string probe();  // why kernels of this build cannot run on the current GPU; empty when they can
// head_dim 32, 64, 96 or 128. The rows of D elements of all tensors must begin at multiples of 16 bytes.
void attention_fwd(const AttentionFwd& a, Stream stream);

// `workspace` holds as many floats as attention_bwd_workspace says, and begins at a multiple of 16 bytes.
int64_t attention_bwd_workspace(int64_t B, int64_t H, int64_t T);
void attention_bwd(const AttentionBwd& a, float* workspace, Stream stream);

void layer_norm_fwd(const LayerNormFwd& a, Stream stream);

// Blocks whose sums of dweight and dbias are added up in the end: `partial` holds 2 * cols floats for each, and begins
// at a multiple of 16 bytes.
int64_t layer_norm_bwd_blocks(int64_t rows);
void layer_norm_bwd(const LayerNormBwd& a, float* partial, Stream stream);

void gelu_fwd(const GeluFwd& a, Stream stream);

// Shares of the rows whose sums of dbias are added up in the end: where dbias is wanted, `partial` holds cols floats
// for each, and begins at a multiple of 16 bytes.
int64_t gelu_bwd_lanes(int64_t rows, int64_t cols);
void gelu_bwd(const GeluBwd& a, float* partial, Stream stream);

void embedding_fwd(const EmbeddingFwd& a, Stream stream);

// Where indices are given they are sorted, a place stands in `order` where its index does, and dtable holds zeros: rows
// that no place used are left alone. `partial` holds embedding_bwd_partial(places) * cols floats, and begins at a
// multiple of 16 bytes. Where none are given (place % length is meant), neither is looked at, and all rows are written.
int64_t embedding_bwd_partial(int64_t places);
void embedding_bwd(const EmbeddingBwd& a, const int64_t* order, float* partial, Stream stream);

// lse [rows], and `loss` [rows]: of each row, 0 where its target does not count. All classes are there (first is 0,
// classes is cols); state and denominator are not looked at.
void cross_entropy_fwd(const CrossEntropyFwd& a, Stream stream);
// `dloss` is what cross_entropy_mean made of it; denominator is not looked at. First is 0, and classes is vocab.
void cross_entropy_bwd(const CrossEntropyBwd& a, Stream stream);

// The sum of `count` numbers, divided by the denominator or by the number of targets that count.
struct Mean {
    const float* values;  // [count]
    int64_t count;
    const int64_t* targets;  // [rows]
    int64_t ignore_index;
    int64_t rows;
    const float* denominator;  // [1], or null: the number of targets that count
    float* mean;               // [1]
};
void cross_entropy_mean(const Mean& a, Stream stream);

// head_dim 1 to 128; a.T is 1, a.kv_lengths the rows' lengths. Where there is more than one split, `workspace` holds
// B * H * splits * (D + 2) floats.
int64_t decode_attention_splits(int64_t B, int64_t S, int64_t H, int64_t K, int64_t D, DType dtype);
void decode_attention_fwd(const Attention& a, void* y, float* workspace, Stream stream);

// As many launches as there are tables of tensors: one, unless there are more than some 540.
void adamw_(const AdamW& a, Stream stream);

// `workspace` holds as many floats as clip_grad_norm_workspace says.
int64_t clip_grad_norm_workspace(const std::vector<int64_t>& sizes);
void clip_grad_norm_(const ClipGradNorm& a, float* workspace, Stream stream);

}  // namespace tinygpt::cuda
