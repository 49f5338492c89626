// The Python module of the simulation: the CUDA ops on addresses of the CPU, and what a test says of how they run.

#include <dlfcn.h>

#include "bindings.h"
#include "simt_runtime.h"
#include "simt_watch.h"

namespace py = pybind11;
using simt::host::Mode;
using simt::host::runtime;

namespace {

// Tells Python of the launch at hand. A kernel is named by its place in this file: its symbol is not exported.
void hand_over(const py::function& to) {
    Dl_info file;
    if (!dladdr(runtime.body.kernel, &file)) throw std::runtime_error("a kernel lies in no file");
    const auto offset = reinterpret_cast<uintptr_t>(runtime.body.kernel) - reinterpret_cast<uintptr_t>(file.dli_fbase);
    const auto tuple = [](dim3 d) { return py::make_tuple(d.x, d.y, d.z); };
    py::list arguments;
    for (const simt::host::Argument* a = runtime.body.arguments; a->data != nullptr; ++a)
        arguments.append(py::bytes(static_cast<const char*>(a->data), a->bytes));
    to(runtime.kernel, offset, tuple(runtime.grid), tuple(runtime.block), runtime.shared_bytes, arguments);
}

}  // namespace

void add_wrappers(py::module_& m);  // tests/cuda/wrappers.cu

PYBIND11_MODULE(_simt, m) {
    m.doc() = "CUDA kernels of tinygpt, run on the CPU.";
    m.def(
        "mode",
        [](const std::string& name, uint64_t seed) {
            static const std::map<std::string, Mode> modes = {
                {"fast", Mode::fast}, {"seeded", Mode::seeded}, {"check", Mode::check}, {"count", Mode::count}};
            if (!modes.count(name))
                throw std::invalid_argument("mode " + name + " is none of fast, seeded, check, count");
            runtime.mode = modes.at(name);
            runtime.random.seed(seed);
        },
        py::arg("name"), py::arg("seed") = 0, "How the launches that follow run.");
    m.def(
        "switch_off",
        [](const std::vector<std::string>& places) {
            runtime.off.clear();
            for (const auto& place : places) runtime.off[place] = true;
        },
        py::arg("places"),
        "Barriers, waits and atomics that do nothing (an atomic: is none) from now on, as `file.cu:line`.");
    m.def(
        "elsewhere",
        [](const py::object& run) {
            runtime.elsewhere = nullptr;
            if (!run.is_none()) runtime.elsewhere = [to = py::function(run)] { hand_over(to); };
        },
        py::arg("run"),
        "Launches that follow do not run here: run(name, offset of the kernel in this file, grid, block, bytes of "
        "dynamic "
        "shared memory, bytes of each argument) is called instead. None: here again.");
    m.def(
        "watch",
        [](uintptr_t address, std::vector<int64_t> sizes, std::vector<int64_t> strides, size_t itemsize, bool writable,
           bool initialised, const std::string& name) {
            simt::host::watch({address, std::move(sizes), std::move(strides), itemsize, writable, initialised, name});
        },
        py::arg("address"), py::arg("sizes"), py::arg("strides"), py::arg("itemsize"), py::arg("writable"),
        py::arg("initialised"), py::arg("name"), "Mode `check` allows accesses to the elements of this view too.");
    m.def("counts", &simt::host::counts_json, "What mode `count` has counted so far, by kernel, as JSON.");
    m.def("forget_counts", &simt::host::forget_counts, "Count from nothing again.");
    m.def("launches", [] { return simt::host::runtime.launch; }, "How many kernels have been launched.");
    m.def("watch_nothing", &simt::host::watch_nothing, "Forget every view.");
    tinygpt::cuda::add_ops(m);
    add_wrappers(m);
}
