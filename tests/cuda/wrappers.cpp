// The kernels of wrappers.cu as functions of the simulation's module, on addresses.

#include "wrappers.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void add_wrappers(py::module_& m) {
    m.def("run", [](const std::string& name, uintptr_t in, uintptr_t out, int blocks, size_t shared_bytes) {
        if (!wrappers::run(name.c_str(), at<const float>(in), at<float>(out), blocks, shared_bytes))
            throw std::invalid_argument("no kernel is called " + name);
    });
    m.def("mma", [](bool is_bfloat, uintptr_t in, uintptr_t start, uintptr_t out) {
        wrappers::mma(is_bfloat, at<const uint32_t>(in), at<const float>(start), at<float>(out));
    });
    m.def("ldmatrix", [](int count, bool transposed, uintptr_t in, uintptr_t out) {
        wrappers::ldmatrix(count, transposed, at<const uint16_t>(in), at<uint32_t>(out));
    });
    m.def("shuffle", [](uintptr_t in, uintptr_t out) { wrappers::shuffle(at<const float>(in), at<float>(out)); });
    m.def("copy", [](uintptr_t in, uintptr_t out) { wrappers::copy(at<const float>(in), at<float>(out)); });
    m.def("pack", [](bool is_bfloat, uintptr_t in, uintptr_t out, uintptr_t back) {
        wrappers::pack(is_bfloat, at<const float>(in), at<uint32_t>(out), at<float>(back));
    });
    m.def("store", [](uintptr_t in, uintptr_t out) { wrappers::store(at<const float>(in), at<float>(out)); });
    m.def("power", [](uintptr_t in, uintptr_t out) { wrappers::power(at<const float>(in), at<float>(out)); });
    m.def("count", [](uintptr_t out) { wrappers::count(at<float>(out)); });
    m.def("number", [](uintptr_t out) { wrappers::number(at<float>(out)); });
}
