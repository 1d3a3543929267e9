// Python bindings of network rewiring; sizes and ranges are checked by the door.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "rewire.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

template <class T>
using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

int64_t swap(Matrix<int64_t> ends, Matrix<const int64_t> labels, int64_t classes, bool undirected, bool keep_connected,
             int64_t proposals, uint64_t key) {
    const SwapView view{int64_t(labels.shape(1)), int64_t(ends.shape(0)), int64_t(labels.shape(0)), proposals,
                        undirected, keep_connected, labels.data(), classes, ends.data(), key};
    nb::gil_scoped_release release;
    return swap_edges(view);
}

int64_t anneal(Matrix<const int64_t> ends, Vector<double> weights, Vector<const int64_t> class_of, int64_t classes,
               Vector<const double> strengths, int64_t nodes, bool undirected, int64_t stages, int64_t proposals,
               double temperature, double cooling, uint64_t key) {
    const AnnealView view{nodes, int64_t(ends.shape(0)), classes, stages, proposals, undirected, ends.data(),
                          class_of.data(), weights.data(), strengths.data(), temperature, cooling, key};
    nb::gil_scoped_release release;
    return anneal_weights(view);
}

}  // namespace

void bind_rewire(nb::module_& m) {
    m.def("swap_edges", &swap, "ends"_a.noconvert(), "labels"_a.noconvert(), "classes"_a, "undirected"_a,
          "keep_connected"_a, "proposals"_a, "key"_a);
    m.def("anneal_weights", &anneal, "ends"_a.noconvert(), "weights"_a.noconvert(), "class_of"_a.noconvert(),
          "classes"_a, "strengths"_a.noconvert(), "nodes"_a, "undirected"_a, "stages"_a, "proposals"_a,
          "temperature"_a, "cooling"_a, "key"_a);
}

}  // namespace commissure
