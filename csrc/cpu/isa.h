// Which instruction set's kernels serve.
#pragma once

#include <string>
#include <vector>

#include "../ops.h"

namespace tinygpt::cpu {

const CpuKernels& kernels();
std::string isa();
std::vector<std::string> supported_isas();  // what this build and this CPU both have, best last
bool set_isa(const std::string& name);      // false: not supported

}  // namespace tinygpt::cpu
