// Python bindings of the Mesa solve: chooses the clone for this machine and shares the tasks out over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "mesa_solve.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

// Starting a thread costs some 20 microseconds: each must have more to do than that.
constexpr double kWorkPerThread = 5e6;

struct Clone {
    std::string name;
    const MesaKernel* kernel;
};

// Those this build has and this machine can run, best last.
std::vector<Clone> available() {
    std::vector<Clone> clones{{"baseline", &mesa_kernel_baseline}};
#if COMMISSURE_HAS_V3
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
        clones.push_back({"x86-64-v3", &mesa_kernel_v3});
#if COMMISSURE_HAS_V4
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            clones.push_back({"x86-64-v4", &mesa_kernel_v4});
#endif
    }
#endif
    return clones;
}

const MesaKernel& choose(const std::string& name) {
    static const std::vector<Clone> clones = available();
    if (name.empty()) return *clones.back().kernel;
    for (const Clone& clone : clones)
        if (clone.name == name) return *clone.kernel;
    throw nb::value_error(("this machine or build has no clone '" + name + "'").c_str());
}

// Addresses of contiguous arrays, sizes checked by the door; returns the index into [B,T,H] of a system that is not
// positive definite, or -1.
int64_t mesa_solve(uintptr_t q, uintptr_t k, uintptr_t g, uintptr_t beta, uintptr_t lamb, uintptr_t h_kk, uintptr_t x,
                   uintptr_t h_final, uintptr_t dof, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                   bool single, int threads, const std::string& clone) {
    const MesaKernel& kernel = choose(clone);
    const auto at = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    MesaView view{batch,    time,     heads, dim,         at(q),   at(k), at(g), at(beta),
                  at(lamb), at(h_kk), at(x), at(h_final), at(dof), 0,     -1};
    nb::gil_scoped_release release;
    const MesaPlan plan = kernel.plan(view, single);
    int64_t wanted = int64_t(plan.work / kWorkPerThread);
    wanted = wanted < plan.tasks ? wanted : plan.tasks;
    wanted = wanted < threads ? wanted : threads;
    std::atomic<bool> is_full{false};
    const auto work = [&] {
        try {
            kernel.run(view, plan, single);
        } catch (const std::bad_alloc&) {
            is_full = true;
        }
    };
    std::vector<std::thread> helpers;
    try {
        for (int64_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do all the work
    }
    work();
    for (std::thread& helper : helpers) helper.join();
    if (is_full) throw std::bad_alloc();
    return view.failed;
}

}  // namespace

void bind_mesa(nb::module_& m) {
    m.def("mesa_solve", &mesa_solve, "q"_a, "k"_a, "g"_a, "beta"_a, "lamb"_a, "h_kk"_a, "x"_a, "h_final"_a, "dof"_a,
          "batch"_a, "time"_a, "heads"_a, "dim"_a, "single"_a, "threads"_a, "clone"_a);
    m.def(
        "mesa_clones",
        [] {
            std::vector<std::string> names;
            for (const Clone& clone : available()) names.push_back(clone.name);
            return names;
        },
        "The instruction sets of the Mesa solve this machine can run, best last.");
}

}  // namespace commissure
