// The backbones of POSSM's streaming step: GRU, S4D and Mamba-1 layers, one input at a time, one sequence.
//
// `idle` does what needs no new input (GRU: W_hh h; S4D: a h and its read-out), `step` the rest.
#pragma once

#include "linear.h"
#include "possm_step.h"

namespace commissure {
namespace {

template <class T>
struct Layer {
    static constexpr int L = kLanes<T>;
    Backbone kind;
    int width, wide;  // R and R padded
    Matrix<T> first, second, third, fourth;
    Buffer<T> bias_first, bias_second, bias_third;
    // S4D: a_re, a_im, c_re, c_im by (block of channels, mode, lane), gain = 2 sum_n c_re + skip; Mamba: a, skip, conv
    int modes = 0, inner = 0, inner_wide = 0, taps = 0, rank = 0;
    Buffer<T> a_re, a_im, c_re, c_im, gain, conv_weight;

    Layer() = default;
    Layer(const PossmView& w, const LayerView& v) : kind(w.backbone), width(w.hidden), wide(padded<T>(w.hidden, 4)) {
        if (kind == Backbone::gru) build_gru(v);
        if (kind == Backbone::s4d) build_s4d(v);
        if (kind == Backbone::mamba) build_mamba(v);
    }

    void build_gru(const LayerView& v) {
        const int R = width, S = wide;
        auto gate = [R, S](const double* from, int inputs) {
            return [=](int i, int j) { return i % S < R ? from[size_t(i / S * R + i % S) * inputs + j] : 0.0; };
        };
        first = Matrix<T>(3 * S, v.inputs, gate(v.weight_ih, v.inputs));
        second = Matrix<T>(3 * S, R, gate(v.weight_hh, R));
        bias_first = Buffer<T>(first.rows()), bias_second = Buffer<T>(second.rows());
        for (int i = 0; i < 3 * R; ++i) {
            bias_first[i / R * S + i % R] = T(v.bias_ih[i]);
            bias_second[i / R * S + i % R] = T(v.bias_hh[i]);
        }
    }

    size_t at(int channel, int mode) const { return (size_t(channel / L) * modes + mode) * L + channel % L; }

    void build_s4d(const LayerView& v) {
        modes = v.modes;
        const int R = width, S = wide;
        a_re = Buffer<T>(size_t(S) * modes), a_im = Buffer<T>(size_t(S) * modes);
        c_re = Buffer<T>(size_t(S) * modes), c_im = Buffer<T>(size_t(S) * modes);
        gain = Buffer<T>(S);
        for (int r = 0; r < R; ++r) {
            double total = v.skip[r];
            for (int n = 0; n < modes; ++n) {
                const size_t from = size_t(r) * modes + n, to = at(r, n);
                a_re[to] = T(v.a_re[from]), a_im[to] = T(v.a_im[from]);
                c_re[to] = T(2 * v.c_re[from]), c_im[to] = T(2 * v.c_im[from]);
                total += 2 * v.c_re[from];
            }
            gain[r] = T(total);
        }
        first = Matrix<T>(2 * S, R, [&](int i, int j) {
            return i % S < R ? v.out_weight[size_t(i / S * R + i % S) * R + j] : 0.0;
        });
        bias_first = Buffer<T>(first.rows());
        for (int i = 0; i < 2 * R; ++i) bias_first[i / R * S + i % R] = T(v.out_bias[i]);
    }

    void build_mamba(const LayerView& v) {
        modes = v.modes, inner = v.inner, taps = v.taps, rank = v.rank;
        const int R = width, E = inner, W = inner_wide = padded<T>(inner, 4);
        first = Matrix<T>(2 * W, R, [&](int i, int j) {
            return i % W < E ? v.in_weight[size_t(i / W * E + i % W) * R + j] : 0.0;
        });
        second = Matrix<T>(rank + 2 * modes, E, [&](int i, int j) { return v.x_weight[size_t(i) * E + j]; });
        third = Matrix<T>(E, rank, [&](int i, int j) { return v.dt_weight[size_t(i) * rank + j]; });
        fourth = Matrix<T>(R, E, [&](int i, int j) { return v.out_weight[size_t(i) * E + j]; });
        bias_first = Buffer<T>(first.rows());
        bias_second = Buffer<T>(second.rows() + fourth.rows());  // zeros: x_proj and out_proj have no bias
        bias_third = copied<T>(v.dt_bias, E, W);
        gain = copied<T>(v.skip, E, W);
        conv_weight = Buffer<T>(size_t(taps + 1) * W);  // taps, oldest first, then the bias
        a_re = Buffer<T>(size_t(W) * modes);
        for (int e = 0; e < E; ++e) {
            for (int t = 0; t < taps; ++t) conv_weight[size_t(t) * W + e] = T(v.conv_weight[size_t(e) * taps + t]);
            conv_weight[size_t(taps) * W + e] = T(v.conv_bias[e]);
            for (int n = 0; n < modes; ++n) a_re[at(e, n)] = T(v.a[size_t(e) * modes + n]);
        }
    }

    // Numbers of T in the state and in what `idle` prepares.
    size_t state_size() const {
        if (kind == Backbone::gru) return wide;
        if (kind == Backbone::s4d) return 2 * size_t(wide) * modes;
        return size_t(inner_wide) * (taps - 1 + modes);
    }
    size_t idle_size() const {
        if (kind == Backbone::gru) return second.rows();
        return kind == Backbone::s4d ? state_size() + wide : 0;
    }
    size_t scratch_size() const {
        if (kind == Backbone::gru) return first.rows();
        if (kind == Backbone::s4d) return size_t(wide) + first.rows();
        return size_t(first.rows()) + second.rows() + 3 * size_t(inner_wide) + third.rows();
    }

    void idle(const T* state, T* ready) const {
        if (kind == Backbone::gru) second.apply(state, bias_second, ready);
        if (kind == Backbone::s4d) idle_s4d(state, ready);
    }
    void step(const T* x, T* state, const T* ready, T* y, T* scratch) const {
        if (kind == Backbone::gru) step_gru(x, state, ready, y, scratch);
        if (kind == Backbone::s4d) step_s4d(x, state, ready, y, scratch);
        if (kind == Backbone::mamba) step_mamba(x, state, y, scratch);
    }

    void step_gru(const T* x, T* h, const T* ready, T* y, T* gates) const {
        first.apply(x, bias_first, gates);
        for (int i = 0; i < wide; i += L) {
            const Vec<T> reset = sigmoid_v<T>(load(gates + i) + load(ready + i));
            const Vec<T> update = sigmoid_v<T>(load(gates + wide + i) + load(ready + wide + i));
            const Vec<T> fresh = tanh_v<T>(load(gates + 2 * wide + i) + reset * load(ready + 2 * wide + i));
            const Vec<T> next = fresh + update * (load(h + i) - fresh);
            store(h + i, next);
            store(y + i, next);
        }
    }

    void idle_s4d(const T* state, T* ready) const {
        const size_t half = size_t(wide) * modes;
        for (int block = 0; block < wide / L; ++block) {
            Vec<T> real{}, imaginary{};
            for (int n = 0; n < modes; ++n) {
                const size_t i = (size_t(block) * modes + n) * L;
                const Vec<T> re = load(state + i), im = load(state + half + i);
                const Vec<T> ar = load(a_re + i), ai = load(a_im + i);
                const Vec<T> next_re = ar * re - ai * im, next_im = ar * im + ai * re;
                store(ready + i, next_re);
                store(ready + half + i, next_im);
                real += load(c_re + i) * next_re;
                imaginary += load(c_im + i) * next_im;
            }
            store(ready + 2 * half + block * L, real - imaginary);
        }
    }

    void step_s4d(const T* x, T* state, const T* ready, T* y, T* scratch) const {
        const size_t half = size_t(wide) * modes;
        T *active = scratch, *gated = scratch + wide;
        for (int block = 0; block < wide / L; ++block) {
            const int r = block * L;
            const Vec<T> input = load(x + r);
            store(active + r, gelu_v<T>(load(ready + 2 * half + r) + load(gain + r) * input));
            for (int n = 0; n < modes; ++n) {
                const size_t i = (size_t(block) * modes + n) * L;
                store(state + i, load(ready + i) + input);
                store(state + half + i, load(ready + half + i));
            }
        }
        first.apply(active, bias_first, gated);
        for (int i = 0; i < wide; i += L) store(y + i, load(gated + i) * sigmoid_v<T>(load(gated + wide + i)));
    }

    void step_mamba(const T* x, T* state, T* y, T* scratch) const {
        const int W = inner_wide;
        T *both = scratch, *mixed = both + first.rows(), *conv = mixed + second.rows();
        T *rate = conv + W, *gated = rate + third.rows();
        T *past = state, *h = state + size_t(W) * (taps - 1);
        first.apply(x, bias_first, both);
        for (int i = 0; i < W; i += L) {
            const T *weight = conv_weight + i, *now = both + i;
            T* before = past + i;
            Vec<T> total = load(weight + size_t(taps) * W) + load(weight + size_t(taps - 1) * W) * load(now);
            for (int t = 0; t < taps - 1; ++t) total += load(weight + size_t(t) * W) * load(before + size_t(t) * W);
            for (int t = 0; t < taps - 1; ++t)
                store(before + size_t(t) * W, t + 2 < taps ? load(before + size_t(t + 1) * W) : load(now));
            store(conv + i, total * sigmoid_v<T>(total));
        }
        second.apply(conv, bias_second, mixed);
        third.apply(mixed, bias_third, rate);
        const T *input_gain = mixed + rank, *output_gain = mixed + rank + modes;
        for (int i = 0; i < W; i += L) {
            const Vec<T> dt = softplus_v<T>(load(rate + i)), u = load(conv + i), driven = dt * u;
            const Vec<T> z = load(both + W + i);
            Vec<T> total = load(gain + i) * u;
            for (int n = 0; n < modes; ++n) {
                const size_t k = size_t(i) * modes + size_t(n) * L;
                const Vec<T> next = exp_v<T>(dt * load(a_re + k)) * load(h + k) + driven * input_gain[n];
                store(h + k, next);
                total += next * output_gain[n];
            }
            store(gated + i, total * z * sigmoid_v<T>(z));
        }
        fourth.apply(gated, bias_second, y);
    }

    // The state between the padded layout and the documented one: GRU h[R]; S4D re[R, N], im[R, N]; Mamba
    // past[K - 1, E], h[E, N].
    size_t public_size() const {
        if (kind == Backbone::gru) return width;
        if (kind == Backbone::s4d) return 2 * size_t(width) * modes;
        return size_t(inner) * (taps - 1 + modes);
    }
    template <class Move>
    void exchange(Move move) const {  // move(index in the public layout, index in the padded one)
        size_t out = 0;
        if (kind == Backbone::gru)
            for (int r = 0; r < width; ++r) move(out++, size_t(r));
        if (kind == Backbone::s4d)
            for (int part = 0; part < 2; ++part)
                for (int r = 0; r < width; ++r)
                    for (int n = 0; n < modes; ++n) move(out++, part * size_t(wide) * modes + at(r, n));
        if (kind == Backbone::mamba) {
            for (int t = 0; t < taps - 1; ++t)
                for (int e = 0; e < inner; ++e) move(out++, size_t(t) * inner_wide + e);
            for (int e = 0; e < inner; ++e)
                for (int n = 0; n < modes; ++n) move(out++, size_t(inner_wide) * (taps - 1) + at(e, n));
        }
    }
};

}  // namespace
}  // namespace commissure
