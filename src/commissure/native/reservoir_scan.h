// Reservoirs that share one sparse matrix: the interface between the bindings and the kernel's clones, one an
// instruction set.
#pragma once

#include <cstdint>

namespace commissure {

constexpr int64_t kEdgeGroup = 4;  // entries of each row of the matrix come in groups of four

enum ReservoirActivation : int64_t { kTanh, kLinear, kRelu, kLeakyRelu, kElu, kSigmoid, kStep };

// Row-major arrays of T, float or double, unless said otherwise; null where there is nothing.
struct ReservoirView {
    int64_t batch, time, nodes, inputs, tangents;
    int64_t activation, state_bits;  // 0 bits: states are not rounded
    bool is_own;                     // every row has input weights of its own
    bool is_wide;                    // sources are int32, not uint16
    const int64_t* starts;           // [nodes+1]: the entries of each target
    const void *sources, *values;
    const void *x, *state;           // [batch,time,inputs], [batch,nodes]
    const void* input_weights;       // [inputs,nodes] or [batch,inputs,nodes]
    const void *scale, *leak, *bias; // [batch], [nodes], [nodes]
    const void *noise, *tangents_in; // [batch,time,nodes], [batch,tangents,nodes], or null
    void *states, *tangents_out;     // [batch,time,nodes], [batch,tangents,nodes] or null
    int64_t rows;                    // that are worked on side by side
    int64_t next;                    // the next row nobody has taken yet
};

struct ReservoirKernel {
    void (*scan)(ReservoirView&, bool single);  // take rows until none is left; any number of threads may
    int64_t (*lanes)(bool single);              // rows that fill one vector
};
extern const ReservoirKernel reservoir_kernel_baseline;
extern const ReservoirKernel reservoir_kernel_v3;  // x86-64-v3: AVX2, FMA
extern const ReservoirKernel reservoir_kernel_v4;  // x86-64-v4: AVX-512, here for its 32 registers

}  // namespace commissure
