// The kernels of one instruction set, by name; table.cpp puts them where isa.cpp can choose.
#pragma once

#include "../ops.h"

namespace tinygpt::TINYGPT_ISA {

bool layer_norm_fwd(const LayerNormFwd&);
bool layer_norm_bwd(const LayerNormBwd&);

}  // namespace tinygpt::TINYGPT_ISA
