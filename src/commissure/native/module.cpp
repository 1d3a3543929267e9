// The extension module: each kernel file adds its bindings here.
#include <nanobind/nanobind.h>

NB_MODULE(_kernels, m) {
    m.doc() = "C++ kernels of commissure; use them through commissure.native's doors.";
}
