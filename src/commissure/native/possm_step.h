// POSSM's streaming step: the interface between the bindings and the clones of the kernel (one per instruction set).
#pragma once

#include <cstddef>
#include <cstdint>

namespace commissure {

// Pointers into the caller's float64 arrays (row-major, shapes checked by PossmWeights); read during construction only.
struct FeedForwardView {
    int inner;
    const double *norm_weight, *norm_bias, *in_weight, *in_bias, *out_weight, *out_bias;
};
struct LayerView {
    // GRU
    int inputs;
    const double *weight_ih, *weight_hh, *bias_ih, *bias_hh;
    // S4D and Mamba
    int modes;
    const double *a_re, *a_im, *c_re, *c_im, *skip, *out_weight, *out_bias;
    // Mamba
    int inner, taps, rank;
    const double *in_weight, *conv_weight, *conv_bias, *x_weight, *dt_weight, *dt_bias, *a;
};
enum class Backbone { gru, s4d, mamba };

struct PossmView {
    bool softmax, null_always;
    Backbone backbone;
    double chunk_s;
    int context, dim, head, hidden, frequencies, units, outputs, n_layers;
    const double *periods, *unit_key, *unit_value, *null_key, *null_value, *query, *latent, *out_weight, *out_bias;
    FeedForwardView ffn;
    const double *in_weight, *in_bias;
    const LayerView* layers;
    const double *context_norm_weight, *context_norm_bias, *key_weight, *value_weight;  // norm: null pointers for none
    const double *session_query, *session_embedding, *dec_out_weight, *dec_out_bias;
    bool has_decoder_ffn;
    FeedForwardView decoder_ffn;
    const double *readout_weight, *readout_bias, *output_scale, *output_mean;
};

class PossmStep {
   public:
    virtual ~PossmStep();
    virtual void reset() = 0;
    // Fold n spikes into the open chunk: rows of the unit table, times relative to the chunk's center; both checked.
    virtual void fold(const int64_t* units, const double* offsets, size_t n) = 0;
    // Close the chunk; with n > 0 also read out at n times relative to its end (offsets null: the default ones).
    virtual void close(const double* offsets, size_t n, double* out) = 0;
    virtual void idle() = 0;
    // State, as doubles: [spikes, contexts, idle done, max, sum, total[value width], keys, values (newest first),
    // layers]
    virtual size_t state_size() const = 0;
    virtual void save(double* out) const = 0;
    virtual void load(const double* in) = 0;
    virtual PossmStep* clone() const = 0;  // shares the weights
};

using PossmFactory = PossmStep* (*)(const PossmView&, const double* offsets, size_t n, bool single);
PossmStep* possm_step_baseline(const PossmView&, const double* offsets, size_t n, bool single);
PossmStep* possm_step_v3(const PossmView&, const double* offsets, size_t n, bool single);  // x86-64-v3: AVX2, FMA

// y[i] = name(x[i]) through the vector functions of elementary.h, for their tests; false for an unknown name.
bool elementary_baseline(const char* name, bool single, const double* x, double* y, size_t n);
bool elementary_v3(const char* name, bool single, const double* x, double* y, size_t n);

}  // namespace commissure
