// Gated linear attention: the interface between the bindings and the kernel's clones (one per instruction set).
#pragma once

#include <cstdint>

namespace commissure {

constexpr int kGroup = 8;  // heads one thread works on side by side, at most

// Row-major arrays of float or of double: q, k, d_q, d_k [B,T,H,D]; v, o, d_o, d_v [B,T,H,E]; g, beta, d_g, d_beta
// [B,T,H], g of double always; states [B,H,D,E].  The Mesa layer's: y as q, lamb [H,D], d_lamb [B,H,D], Grams
// [B,H,D,D].  A null beta is all ones.
struct AttentionView {
    int64_t batch, time, heads, dim, value_dim;
    const void *q, *k, *v, *beta, *initial;
    const double* g;
    void *o, *final_state;          // of the forward
    const void *d_o, *d_final;      // of the backward, and all below
    void *d_q, *d_k, *d_v, *d_g, *d_beta, *d_initial;
    const void *y, *lamb, *gram, *d_gram_final;  // of the Mesa layer's backward, as all below
    void *d_lamb, *d_gram;
    int64_t group;                  // heads taken at once, 1 to kGroup
    int64_t next;                   // the next (batch, head) nobody has taken yet
};

struct AttentionKernel {
    // Take heads until none is left; any number of threads may.
    void (*forward)(AttentionView&, bool single);
    void (*backward)(AttentionView&, bool single);
    void (*mesa_gradients)(AttentionView&, bool single);
};
extern const AttentionKernel attention_kernel_baseline;
extern const AttentionKernel attention_kernel_v3;  // x86-64-v3: AVX2, FMA
extern const AttentionKernel attention_kernel_v4;  // x86-64-v4: AVX-512

}  // namespace commissure
