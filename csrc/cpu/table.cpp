#include "kernels.h"

namespace tinygpt::TINYGPT_ISA {

extern const CpuKernels cpu_kernels = {
    attention_fwd,   attention_bwd, gemm,          layer_norm_fwd,    layer_norm_bwd,    gelu_fwd,
    gelu_bwd,        embedding_fwd, embedding_bwd, cross_entropy_fwd, cross_entropy_bwd, adamw_,
    clip_grad_norm_,
};

}  // namespace tinygpt::TINYGPT_ISA
