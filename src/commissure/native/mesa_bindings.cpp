// Python bindings of the Mesa solve: chooses the clone for this machine and shares the tasks out over threads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "clones.h"
#include "mesa_solve.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

// Those this build has and this machine can run, best last.
std::vector<Clone<MesaKernel>> available() {
    std::vector<Clone<MesaKernel>> clones{{"baseline", &mesa_kernel_baseline}};
#if COMMISSURE_HAS_V3
    if (runs_v3()) clones.push_back({"x86-64-v3", &mesa_kernel_v3});
#endif
#if COMMISSURE_HAS_V4
    if (runs_v4()) clones.push_back({"x86-64-v4", &mesa_kernel_v4});
#endif
    return clones;
}

const MesaKernel& mesa_kernel(const std::string& name) {
    static const std::vector<Clone<MesaKernel>> clones = available();
    return choose(clones, name);
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

int64_t run(MesaView& view, bool single, int threads, const std::string& clone) {
    const MesaKernel& kernel = mesa_kernel(clone);
    nb::gil_scoped_release release;
    const MesaPlan plan = kernel.plan(view, single);
    share_out(plan.work, plan.tasks, threads, [&] { kernel.run(view, plan, single); });
    return view.failed;
}

// Addresses of contiguous arrays, sizes checked by the door; both return the index into [B,T,H] of a system that is not
// positive definite, or -1.
int64_t mesa_solve(uintptr_t q, uintptr_t k, uintptr_t g, uintptr_t beta, uintptr_t lamb, uintptr_t h_kk, uintptr_t x,
                   uintptr_t h_final, uintptr_t dof, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                   bool single, int threads, const std::string& clone) {
    MesaView view{batch,    time,     heads, dim,         at(q),   at(k), at(g), at(beta),
                  at(lamb), at(h_kk), at(x), at(h_final), at(dof), 0,     -1};
    return run(view, single, threads, clone);
}

int64_t mesa_step(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t g, uintptr_t beta, uintptr_t lamb, uintptr_t h_kk,
                  uintptr_t h_kv, uintptr_t o, uintptr_t h_kk_final, uintptr_t h_kv_final, int64_t batch, int64_t heads,
                  int64_t dim, int64_t value_dim, bool single, int threads, const std::string& clone) {
    MesaView view{batch,    1,        heads,   dim,            at(q),   at(k), at(g), at(beta),
                  at(lamb), at(h_kk), nullptr, at(h_kk_final), nullptr, 0,     -1};
    view.value_dim = value_dim, view.v = at(v), view.h_kv = at(h_kv), view.o = at(o), view.h_kv_final = at(h_kv_final);
    return run(view, single, threads, clone);
}

}  // namespace

void bind_mesa(nb::module_& m) {
    m.def("mesa_solve", &mesa_solve, "q"_a, "k"_a, "g"_a, "beta"_a, "lamb"_a, "h_kk"_a, "x"_a, "h_final"_a, "dof"_a,
          "batch"_a, "time"_a, "heads"_a, "dim"_a, "single"_a, "threads"_a, "clone"_a);
    m.def("mesa_step", &mesa_step, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "lamb"_a, "h_kk"_a, "h_kv"_a, "o"_a,
          "h_kk_final"_a, "h_kv_final"_a, "batch"_a, "heads"_a, "dim"_a, "value_dim"_a, "single"_a, "threads"_a,
          "clone"_a);
    m.def(
        "mesa_clones",
        [] {
            std::vector<std::string> names;
            for (const Clone<MesaKernel>& clone : available()) names.push_back(clone.name);
            return names;
        },
        "The instruction sets of the Mesa solve this machine can run, best last.");
}

}  // namespace commissure
