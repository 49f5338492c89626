#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace tinygpt::cuda {

void add_ops(pybind11::module_& m);

}  // namespace tinygpt::cuda
