// The Mesa layer's exact solves: the interface between the bindings and the kernel's clones (one per instruction set).
#pragma once

#include <cstdint>

namespace commissure {

// Row-major arrays of float or of double: q, k, x [B,T,H,D]; g, beta, dof [B,T,H]; lamb [H,D]; h_kk, h_final [B,H,D,D].
struct MesaView {
    int64_t batch, time, heads, dim;
    const void *q, *k, *g, *beta, *lamb, *h_kk;
    void *x, *h_final, *dof;  // dof: null when not wanted
    int64_t next;             // the next task nobody has taken yet
    int64_t failed;           // smallest index into [B,T,H] of a system that is not positive definite; -1 for none
    // Of a step (time 1), which has an output instead of x: v, o [B,1,H,E]; h_kv, h_kv_final [B,H,D,E].  Else null.
    int64_t value_dim = 0;
    const void *v = nullptr, *h_kv = nullptr;
    void *o = nullptr, *h_kv_final = nullptr;
};

// How the systems are put into SIMD lanes, and how many independent tasks that makes.
struct MesaPlan {
    bool across_heads;
    int64_t tasks;
    double work;  // floating-point operations of all tasks
};

struct MesaKernel {
    MesaPlan (*plan)(const MesaView&, bool single);
    void (*run)(MesaView&, const MesaPlan&, bool single);  // takes tasks until none is left; any number of threads may
};
extern const MesaKernel mesa_kernel_baseline;
extern const MesaKernel mesa_kernel_v3;  // x86-64-v3: AVX2, FMA
extern const MesaKernel mesa_kernel_v4;  // x86-64-v4: AVX-512

}  // namespace commissure
