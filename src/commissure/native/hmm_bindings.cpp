// Python bindings of the filter of HMM families.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <numeric>

#include "clones.h"
#include "hmm_filter.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

const HmmKernel& hmm_kernel(const std::string& name) {
    static const std::vector<Clone<HmmKernel>> clones = [] {
        std::vector<Clone<HmmKernel>> found{{"baseline", &hmm_kernel_baseline}};
#if COMMISSURE_HAS_V3
        if (runs_v3()) found.push_back({"x86-64-v3", &hmm_kernel_v3});
#endif
#if COMMISSURE_HAS_V4
        if (runs_v4()) found.push_back({"x86-64-v4", &hmm_kernel_v4});
#endif
        return found;
    }();
    return choose(clones, name);
}

// Rows of equal length and position side by side, as many as fill `wanted` lanes with their emission variants.
void group_rows(HmmView& m, int64_t wanted, std::vector<int64_t>& rows, std::vector<int64_t>& starts) {
    const int64_t side_by_side = std::max<int64_t>(1, wanted / m.emissions);
    rows.resize(m.batch);
    std::iota(rows.begin(), rows.end(), 0);
    const auto key = [&](int64_t b) { return std::make_pair(-m.lengths[b], m.position[b]); };
    const auto before = [&](int64_t a, int64_t b) { return key(a) < key(b); };
    if (side_by_side > 1) std::stable_sort(rows.begin(), rows.end(), before);
    m.largest_group = 1;
    for (int64_t i = 0; i < m.batch; ++i) {
        const bool goes_on = i > 0 && i - starts.back() < side_by_side && key(rows[i]) == key(rows[starts.back()]);
        if (!goes_on) starts.push_back(i);
        m.largest_group = std::max(m.largest_group, i + 1 - starts.back());
    }
    m.groups = int64_t(starts.size());
    starts.push_back(m.batch);
    m.group_rows = rows.data(), m.group_starts = starts.data();
}

template <class P>
void take(P*& pointer, const std::vector<uintptr_t>& addresses, size_t& next) {
    pointer = reinterpret_cast<P*>(addresses.at(next++));
}

// Addresses of contiguous arrays (0 for none) in the order of HmmView, sizes checked by the door.
void hmm_filter(const std::vector<uintptr_t>& model, const std::vector<uintptr_t>& input,
                const std::vector<uintptr_t>& output, const std::vector<int64_t>& sizes, double prune, int64_t period,
                bool start, double entries, bool single, int threads, const std::string& clone) {
    const HmmKernel& kernel = hmm_kernel(clone);
    HmmView m{};
    m.batch = sizes.at(0), m.time = sizes.at(1), m.variants = sizes.at(2), m.states = sizes.at(3);
    m.emissions = sizes.at(4), m.vocab = sizes.at(5), m.tables = sizes.at(6);
    m.prune = prune, m.period = period, m.start = start;
    size_t i = 0;
    take(m.starts, model, i), take(m.stops, model, i), take(m.order, model, i);
    take(m.rows, model, i), take(m.values, model, i);
    take(m.by_token, model, i), take(m.by_state, model, i), take(m.shifts, model, i);
    i = 0;
    take(m.tokens, input, i), take(m.lengths, input, i), take(m.joint, input, i), take(m.exponent, input, i);
    take(m.log_mass, input, i), take(m.log_evidence, input, i), take(m.dropped, input, i), take(m.position, input, i);
    i = 0;
    take(m.joint_out, output, i), take(m.exponent_out, output, i), take(m.log_mass_out, output, i);
    take(m.log_evidence_out, output, i), take(m.dropped_out, output, i), take(m.log_probs, output, i);
    take(m.evidence, output, i), take(m.entropy, output, i), take(m.drops, output, i), take(m.epistemic, output, i);
    take(m.transition, output, i), take(m.emission, output, i), take(m.impossible, output, i);
    std::vector<int64_t> rows, starts;
    nb::gil_scoped_release release;
    if (m.batch == 0) return;
    // Six registers of 32 bytes; one where variants are dropped, since a group keeps what any of its rows keeps.
    group_rows(m, (prune > 0 ? 1 : 6) * (single ? 8 : 4), rows, starts);
    const double work = double(m.batch) * double(m.time + 1) * 2 * entries * double(m.emissions);
    share_out(work, m.groups, threads, [&] { kernel.filter(m, single); });
}

}  // namespace

void bind_hmm(nb::module_& m) {
    m.def("hmm_filter", &hmm_filter, "model"_a, "input"_a, "output"_a, "sizes"_a, "prune"_a, "period"_a, "start"_a,
          "entries"_a, "single"_a, "threads"_a, "clone"_a);
}

}  // namespace commissure
