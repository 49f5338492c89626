// A kernel that does nothing: if its code does not suit the GPU, none of this build does.

#include "kernels.h"
#include "simt.cuh"

namespace tinygpt::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

std::string probe() { return simt::obstacle(nothing); }

}  // namespace tinygpt::cuda
