// The extension module: each kernel has its own bindings file and is announced here.
#include <nanobind/nanobind.h>

namespace commissure {
void bind_hmm(nanobind::module_& m);
void bind_linear_attention(nanobind::module_& m);
void bind_mesa(nanobind::module_& m);
void bind_possm(nanobind::module_& m);
void bind_reservoir(nanobind::module_& m);
void bind_rewire(nanobind::module_& m);
}

NB_MODULE(_kernels, m) {
    m.doc() = "C++ kernels of commissure; use them through commissure.native's doors.";
    commissure::bind_hmm(m);
    commissure::bind_linear_attention(m);
    commissure::bind_mesa(m);
    commissure::bind_possm(m);
    commissure::bind_reservoir(m);
    commissure::bind_rewire(m);
}
