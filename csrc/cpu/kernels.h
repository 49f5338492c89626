// The kernels of one instruction set, by name; table.cpp puts them where isa.cpp can choose.
#pragma once

#include "../ops.h"

namespace tinygpt::TINYGPT_ISA {

bool attention_fwd(const AttentionFwd&);
bool attention_bwd(const AttentionBwd&);
bool gemm(const Gemm&);
bool layer_norm_fwd(const LayerNormFwd&);
bool layer_norm_bwd(const LayerNormBwd&);
bool gelu_fwd(const GeluFwd&);
bool gelu_bwd(const GeluBwd&);
bool embedding_fwd(const EmbeddingFwd&);
bool embedding_bwd(const EmbeddingBwd&);
bool cross_entropy_fwd(const CrossEntropyFwd&);
bool cross_entropy_bwd(const CrossEntropyBwd&);
bool adamw_(const AdamW&);
bool clip_grad_norm_(const ClipGradNorm&);

}  // namespace tinygpt::TINYGPT_ISA
