// Python bindings of gated linear attention.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "clones.h"
#include "linear_attention.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace commissure {
namespace {

const AttentionKernel& attention_kernel(const std::string& name) {
    static const std::vector<Clone<AttentionKernel>> clones = [] {
        std::vector<Clone<AttentionKernel>> found{{"baseline", &attention_kernel_baseline}};
#if COMMISSURE_HAS_V3
        if (runs_v3()) found.push_back({"x86-64-v3", &attention_kernel_v3});
#endif
#if COMMISSURE_HAS_V4
        if (runs_v4()) found.push_back({"x86-64-v4", &attention_kernel_v4});
#endif
        return found;
    }();
    return choose(clones, name);
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Share the heads out in groups of equal size; `products`: floating-point operations a token, as multiples of D E.
template <class Run>
void attend(AttentionView& m, int products, int threads, const Run& run) {
    const int64_t all = m.batch * m.heads, even = (all + threads - 1) / threads;
    m.group = even < 1 ? 1 : even < kGroup ? even : kGroup;
    const double operations = double(all * m.time) * products * double(m.dim * m.value_dim);
    share_out(operations, (all + m.group - 1) / m.group, threads, run);
}

// Addresses of contiguous arrays, sizes checked by the door.
void linear_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t g, uintptr_t beta, uintptr_t initial,
                      uintptr_t o, uintptr_t final_state, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                      int64_t value_dim, bool single, int threads, const std::string& clone) {
    const AttentionKernel& kernel = attention_kernel(clone);
    AttentionView m{};
    m.batch = batch, m.time = time, m.heads = heads, m.dim = dim, m.value_dim = value_dim;
    m.q = at(q), m.k = at(k), m.v = at(v), m.beta = at(beta), m.initial = at(initial);
    m.g = static_cast<const double*>(at(g));
    m.o = at(o), m.final_state = at(final_state);
    nb::gil_scoped_release release;
    attend(m, 5, threads, [&] { kernel.forward(m, single); });
}

void linear_attention_backward(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t g, uintptr_t beta, uintptr_t initial,
                               uintptr_t d_o, uintptr_t d_final, uintptr_t d_q, uintptr_t d_k, uintptr_t d_v,
                               uintptr_t d_g, uintptr_t d_beta, uintptr_t d_initial, int64_t batch, int64_t time,
                               int64_t heads, int64_t dim, int64_t value_dim, bool single, int threads,
                               const std::string& clone) {
    const AttentionKernel& kernel = attention_kernel(clone);
    AttentionView m{};
    m.batch = batch, m.time = time, m.heads = heads, m.dim = dim, m.value_dim = value_dim;
    m.q = at(q), m.k = at(k), m.v = at(v), m.beta = at(beta), m.initial = at(initial);
    m.g = static_cast<const double*>(at(g));
    m.d_o = at(d_o), m.d_final = at(d_final), m.d_q = at(d_q), m.d_k = at(d_k), m.d_v = at(d_v), m.d_g = at(d_g);
    m.d_beta = at(d_beta), m.d_initial = at(d_initial);
    nb::gil_scoped_release release;
    attend(m, 14, threads, [&] { kernel.backward(m, single); });
}

void mesa_gradients(uintptr_t x, uintptr_t y, uintptr_t k, uintptr_t v, uintptr_t g, uintptr_t beta, uintptr_t lamb,
                    uintptr_t h_kk, uintptr_t h_kv, uintptr_t d_o, uintptr_t d_h_kk_final, uintptr_t d_h_kv_final,
                    uintptr_t d_k, uintptr_t d_v, uintptr_t d_g, uintptr_t d_beta, uintptr_t d_lamb, uintptr_t d_h_kk,
                    uintptr_t d_h_kv, int64_t batch, int64_t time, int64_t heads, int64_t dim, int64_t value_dim,
                    bool single, int threads, const std::string& clone) {
    const AttentionKernel& kernel = attention_kernel(clone);
    AttentionView m{};
    m.batch = batch, m.time = time, m.heads = heads, m.dim = dim, m.value_dim = value_dim;
    m.q = at(x), m.k = at(k), m.v = at(v), m.beta = at(beta), m.initial = at(h_kv);
    m.g = static_cast<const double*>(at(g));
    m.d_o = at(d_o), m.d_final = at(d_h_kv_final), m.d_k = at(d_k), m.d_v = at(d_v), m.d_g = at(d_g);
    m.d_beta = at(d_beta), m.d_initial = at(d_h_kv);
    m.y = at(y), m.lamb = at(lamb), m.gram = at(h_kk), m.d_gram_final = at(d_h_kk_final);
    m.d_lamb = at(d_lamb), m.d_gram = at(d_h_kk);
    nb::gil_scoped_release release;
    attend(m, 14, threads, [&] { kernel.mesa_gradients(m, single); });
}

}  // namespace

void bind_linear_attention(nb::module_& m) {
    m.def("linear_attention", &linear_attention, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "initial"_a, "o"_a, "final"_a,
          "batch"_a, "time"_a, "heads"_a, "dim"_a, "value_dim"_a, "single"_a, "threads"_a, "clone"_a);
    m.def("linear_attention_backward", &linear_attention_backward, "q"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "initial"_a,
          "d_o"_a, "d_final"_a, "d_q"_a, "d_k"_a, "d_v"_a, "d_g"_a, "d_beta"_a, "d_initial"_a, "batch"_a, "time"_a,
          "heads"_a, "dim"_a, "value_dim"_a, "single"_a, "threads"_a, "clone"_a);
    m.def("mesa_gradients", &mesa_gradients, "x"_a, "y"_a, "k"_a, "v"_a, "g"_a, "beta"_a, "lamb"_a, "h_kk"_a, "h_kv"_a,
          "d_o"_a, "d_h_kk_final"_a, "d_h_kv_final"_a, "d_k"_a, "d_v"_a, "d_g"_a, "d_beta"_a, "d_lamb"_a, "d_h_kk"_a,
          "d_h_kv"_a, "batch"_a, "time"_a, "heads"_a, "dim"_a, "value_dim"_a, "single"_a, "threads"_a, "clone"_a);
}

}  // namespace commissure
