// Exact filtering of a family of HMMs: the interface between the bindings and the kernel's clones, one an instruction
// set.
#pragma once

#include <cstdint>

namespace commissure {

// Row-major arrays; "T" is float or double.  U transition variants, S states, W emission variants, V tokens; emission
// tables are shared by all u (tables = 1) or every u has its own (tables = U).
struct HmmView {
    int64_t batch, time, variants, states, emissions, vocab, tables;
    // Columns of each A_u, ordered by their number of entries: column i of u is target order[u S + i] with the entries
    // starts[u S + i] ... starts[u S + i + 1] of (rows, values).
    // stops[u S + i]: the first column after i with more entries.
    const int64_t *starts, *stops;
    const int32_t *order, *rows;
    const void *values;               // T
    const void *by_token, *by_state;  // T: [tables,V,S,W] and [tables,S,W,V]
    const int32_t* shifts;            // [V]: -log2 of about the probability of each token, 0 to 8
    const int64_t *tokens, *lengths;  // [B,time], [B]
    // The state, read and written: T [B,U,S,W]; int32 [B,U,W] or null; [B].
    const void* joint;
    const int32_t* exponent;
    const double *log_mass, *log_evidence, *dropped;
    const int64_t* position;
    void* joint_out;
    int32_t* exponent_out;
    double *log_mass_out, *log_evidence_out, *dropped_out;
    // Results, [B,time+1,...]; null where they are not wanted, but log_probs, evidence and drops.
    void* log_probs;                    // T [V]
    double *evidence, *entropy, *drops, *epistemic;
    void *transition, *emission;        // T [U], T [W]
    int64_t* impossible;                // [B]: the first token of probability zero, or -1
    double prune;                       // drop variants of less posterior mass, every `period` positions
    int64_t period;
    bool start;                         // whether results are wanted before the first token
    // Rows that are worked on side by side: rows[group_starts[i]] ... of equal length and position.
    const int64_t *group_rows, *group_starts;
    int64_t groups, largest_group;
    int64_t next;                       // the next group nobody has taken yet
};

struct HmmKernel {
    void (*filter)(HmmView&, bool single);  // take groups until none is left; any number of threads may
};
extern const HmmKernel hmm_kernel_baseline;
extern const HmmKernel hmm_kernel_v3;  // x86-64-v3: AVX2, FMA
extern const HmmKernel hmm_kernel_v4;  // x86-64-v4: AVX-512

}  // namespace commissure
