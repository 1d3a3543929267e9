// Python bindings of the scan of reservoirs.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "clones.h"
#include "reservoir_scan.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

constexpr int64_t kVectors = 4;  // of rows, side by side

const ReservoirKernel& reservoir_kernel(const std::string& name) {
    static const std::vector<Clone<ReservoirKernel>> clones = [] {
        std::vector<Clone<ReservoirKernel>> found{{"baseline", &reservoir_kernel_baseline}};
#if COMMISSURE_HAS_V3
        if (runs_v3()) found.push_back({"x86-64-v3", &reservoir_kernel_v3});
#endif
#if COMMISSURE_HAS_V4
        if (runs_v4()) found.push_back({"x86-64-v4", &reservoir_kernel_v4});
#endif
        return found;
    }();
    return choose(clones, name);
}

template <class P>
void take(P*& pointer, const std::vector<uintptr_t>& addresses, size_t& next) {
    pointer = reinterpret_cast<P*>(addresses.at(next++));
}

// Addresses of contiguous arrays (0 for none) in the order of ReservoirView, sizes checked by the door.
void reservoir_scan(const std::vector<uintptr_t>& arrays, const std::vector<int64_t>& sizes, bool is_own, bool is_wide,
                    bool single, int threads, const std::string& clone) {
    const ReservoirKernel& kernel = reservoir_kernel(clone);
    ReservoirView m{};
    m.batch = sizes.at(0), m.time = sizes.at(1), m.nodes = sizes.at(2), m.inputs = sizes.at(3);
    m.tangents = sizes.at(4), m.activation = sizes.at(5), m.state_bits = sizes.at(6);
    m.is_own = is_own, m.is_wide = is_wide;
    size_t i = 0;
    take(m.starts, arrays, i), take(m.sources, arrays, i), take(m.values, arrays, i), take(m.x, arrays, i);
    take(m.state, arrays, i), take(m.input_weights, arrays, i), take(m.scale, arrays, i), take(m.leak, arrays, i);
    take(m.bias, arrays, i), take(m.noise, arrays, i), take(m.tangents_in, arrays, i), take(m.states, arrays, i);
    take(m.tangents_out, arrays, i);
    nb::gil_scoped_release release;
    if (m.batch == 0) return;
    const int64_t lanes = kernel.lanes(single), even = (m.batch + threads - 1) / threads;
    m.rows = std::min(kVectors * lanes, (even + lanes - 1) / lanes * lanes);
    const double edges = double(m.starts[m.nodes]) + 20 * double(m.nodes);
    const double work = double(m.batch) * double(m.time) * 2 * edges * double(1 + m.tangents);
    share_out(work, (m.batch + m.rows - 1) / m.rows, threads, [&] { kernel.scan(m, single); });
}

}  // namespace

void bind_reservoir(nb::module_& m) {
    m.def("reservoir_scan", &reservoir_scan, "arrays"_a, "sizes"_a, "is_own"_a, "is_wide"_a, "single"_a, "threads"_a,
          "clone"_a);
}

}  // namespace commissure
