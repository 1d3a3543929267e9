// What stays fixed while POSSM's step runs: weights packed for the kernels, tables of rotations, and their layout.
//
// Heads are kept split: [first of each pair | second of each pair | not rotated], each padded to whole vectors.  Unit
// rows hold A, B and the value (see possm_step.cpp); everything is computed in float64 and rounded once.
#pragma once

#include <cmath>

#include "possm_backbone.h"

namespace commissure {
namespace {

constexpr double kTwoPi = 6.283185307179586476925;

// Where dimension h of a head lies in the split layout.
template <class T>
struct Split {
    int frequencies, width, pairs, rest, size;  // pairs, rest: padded
    Split(int frequencies_, int width_)
        : frequencies(frequencies_), width(width_), pairs(padded<T>(frequencies_, 2)),
          rest(padded<T>(width - 2 * frequencies_, 4)),
          size(2 * pairs + rest) {}
    int at(int h) const {
        if (h >= 2 * frequencies) return 2 * pairs + h - 2 * frequencies;
        return (h % 2 ? pairs : 0) + h / 2;
    }
};

template <class T>
T dot(const T* a, const T* b, int n) {
    Vec<T> total{};
    for (int i = 0; i < n; i += kLanes<T>) total += load(a + i) * load(b + i);
    return sum<T>(total);
}

// LayerNorm over the first n of x; the padding of y stays zero because that of weight and bias is.
template <class T>
void layer_norm(const T* x, int n, const T* weight, const T* bias, T* y) {
    constexpr int L = kLanes<T>;
    const int whole = n / L * L;
    Vec<T> totals{};
    for (int i = 0; i < whole; i += L) totals += load(x + i);
    T total = sum<T>(totals);
    for (int i = whole; i < n; ++i) total += x[i];
    const T mean = total / T(n);
    Vec<T> squares{};
    for (int i = 0; i < whole; i += L) squares += (load(x + i) - mean) * (load(x + i) - mean);
    T variance = sum<T>(squares);
    for (int i = whole; i < n; ++i) variance += (x[i] - mean) * (x[i] - mean);
    const T scale = T(1) / std::sqrt(variance / T(n) + T(1e-5));
    for (int i = 0; i < padded<T>(n); i += L)
        store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

template <class T>
struct FeedForward {
    int dim = 0, inner = 0, wide = 0;
    Matrix<T> in, out;
    Buffer<T> norm_weight, norm_bias, in_bias, out_bias;

    FeedForward() = default;
    FeedForward(const FeedForwardView& v, int dim_, Use use) : dim(dim_), inner(v.inner), wide(padded<T>(v.inner, 4)) {
        const int W = wide, M = inner;
        in = Matrix<T>(2 * W, dim, [&](int i, int j) {
            return i % W < M ? v.in_weight[size_t(i / W * M + i % W) * dim + j] : 0.0;
        }, use);
        out = Matrix<T>(dim, M, [&](int i, int j) { return v.out_weight[size_t(i) * M + j]; }, use);
        in_bias = Buffer<T>(2 * W);
        for (int i = 0; i < 2 * M; ++i) in_bias[i / M * W + i % M] = T(v.in_bias[i]);
        out_bias = copied<T>(v.out_bias, dim, out.rows());
        norm_weight = copied<T>(v.norm_weight, dim, out.rows());
        norm_bias = copied<T>(v.norm_bias, dim, out.rows());
    }
    size_t scratch_size() const { return out.rows() + 2 * size_t(wide); }  // per column

    // z += W2 (u * gelu(g)) + b2 for n columns z[b * ld]
    void apply(int n, T* z, int ld, T* scratch) const {
        T *normed = scratch, *both = scratch + size_t(n) * ld;
        for (int b = 0; b < n; ++b) layer_norm<T>(z + b * ld, dim, norm_weight, norm_bias, normed + b * ld);
        in.apply(n, normed, ld, in_bias, 0, both, 2 * wide);
        for (int b = 0; b < n; ++b) {
            T* u = both + size_t(b) * 2 * wide;
            for (int i = 0; i < wide; i += kLanes<T>) store(u + i, load(u + i) * gelu_v<T>(load(u + wide + i)));
            for (int i = 0; i < ld; i += kLanes<T>) store(z + b * ld + i, load(z + b * ld + i) + load(out_bias + i));
        }
        out.apply(n, both, 2 * wide, z, ld, z, ld);
    }
};

// cos, sin of 2 pi d / period for each frequency; the angle is reduced in float64, in turns.
template <class T>
void rotation(const Buffer<double>& inverse_period, int frequencies, double d, T* cosine, T* sine) {
    for (int f = 0; f < frequencies; ++f) {
        const double turns = d * inverse_period[f], angle = kTwoPi * (turns - std::rint(turns));
        cosine[f] = T(std::cos(angle));
        sine[f] = T(std::sin(angle));
    }
}

// All that stays fixed: packed weights and tables, shared by an engine and its copies.
template <class T>
struct Model {
    int references = 1;
    bool softmax, null_always;
    int context, dim, wide, hidden, hidden_wide, outputs, n_layers, default_times;
    double chunk_s;
    Split<T> token, head;
    Buffer<double> inverse_period;
    Buffer<T> units, unit_score;  // rows [A | B | value split], value only when additive; c_i
    int row;
    Buffer<T> base, null_total;   // latent + out_bias; R(d) null value
    double null_score = 0;
    Matrix<T> out, in, key_value, dec_out, readout;
    FeedForward<T> ffn, decoder_ffn;
    bool has_in, has_decoder_ffn, has_norm;
    Buffer<T> in_bias, norm_weight, norm_bias, dec_base, readout_bias, key_value_bias;
    Layer<T>* layers = nullptr;
    Buffer<T> query;             // session query / sqrt(H), split
    Buffer<T> default_tables;

    Model(const PossmView& w, const double* times, int n_times);
    ~Model() { delete[] layers; }
    Model(const Model&) = delete;

    void build_encoder(const PossmView& w);
    void build_decoder(const PossmView& w);
    size_t table_size() const { return size_t(context) * (head.size + 2 * size_t(head.pairs)); }

    // For one output time and each context: the rotated query, then cos and sin for the values.
    void fill_table(double time, T* table) const {
        for (int j = 0; j < context; ++j, table += head.size + 2 * head.pairs) {
            T *cosine = table + head.size, *sine = cosine + head.pairs;
            rotation<T>(inverse_period, head.frequencies, -(j * chunk_s) - time, cosine, sine);
            const int P = head.pairs;
            for (int f = 0; f < head.frequencies; ++f) {
                table[f] = query[f] * cosine[f] + query[P + f] * sine[f];
                table[P + f] = query[P + f] * cosine[f] - query[f] * sine[f];
            }
            for (int i = 2 * P; i < head.size; ++i) table[i] = query[i];
        }
    }
};

template <class T>
Model<T>::Model(const PossmView& w, const double* times, int n_times)
    : softmax(w.softmax), null_always(w.null_always), context(w.context), dim(w.dim), wide(padded<T>(w.dim, 4)),
      hidden(w.hidden), hidden_wide(padded<T>(w.hidden, 4)), outputs(w.outputs), n_layers(w.n_layers),
      default_times(n_times), chunk_s(w.chunk_s), token(w.frequencies, w.softmax ? w.head : w.dim),
      head(w.frequencies, w.head), inverse_period(w.frequencies), ffn(w.ffn, w.dim, Use::single),
      has_in(w.in_weight != nullptr),
      has_decoder_ffn(w.has_decoder_ffn), has_norm(w.context_norm_weight != nullptr) {
    for (int f = 0; f < w.frequencies; ++f) inverse_period[f] = 1.0 / w.periods[f];
    build_encoder(w);
    if (has_in) {
        in = Matrix<T>(hidden, dim, [&](int i, int j) { return w.in_weight[size_t(i) * dim + j]; });
        in_bias = copied<T>(w.in_bias, hidden, hidden_wide);
    }
    layers = new Layer<T>[n_layers];
    for (int i = 0; i < n_layers; ++i) layers[i] = Layer<T>(w, w.layers[i]);
    build_decoder(w);
    default_tables = Buffer<T>(n_times * table_size());
    for (int i = 0; i < n_times; ++i) fill_table(times[i], default_tables + i * table_size());
}

template <class T>
void Model<T>::build_encoder(const PossmView& w) {
    const int width = softmax ? w.head : dim, P = token.pairs, F = token.frequencies;
    const int values = softmax ? 2 * P : 0;
    row = values + token.size;
    units = Buffer<T>(size_t(w.units) * row), unit_score = Buffer<T>(w.units);
    base = copied<T>(w.latent, dim, wide);
    null_total = Buffer<T>(token.size);
    for (int u = 0; u < w.units; ++u)
        for (int h = 0; h < width; ++h)
            units[size_t(u) * row + values + token.at(h)] = T(w.unit_value[size_t(u) * width + h]);
    if (!softmax) return;
    const double scale = 1.0 / std::sqrt(double(w.head));
    const double* q = w.query;
    for (int u = 0; u < w.units; ++u) {
        const double* k = w.unit_key + size_t(u) * width;
        T* to = units + size_t(u) * row;
        for (int f = 0; f < F; ++f) {
            to[f] = T(scale * (q[2 * f] * k[2 * f] + q[2 * f + 1] * k[2 * f + 1]));
            to[P + f] = T(scale * (q[2 * f + 1] * k[2 * f] - q[2 * f] * k[2 * f + 1]));
        }
        double fixed = 0;
        for (int h = 2 * F; h < width; ++h) fixed += q[h] * k[h];
        unit_score[u] = T(scale * fixed);
    }
    // The null token: at the center in every chunk, or at the start (-chunk / 2) of an empty one, where it is alone.
    const double d = null_always ? 0.0 : -chunk_s / 2;
    for (int h = 0; h < width; ++h) {
        null_score += scale * q[h] * w.null_key[h];
        double value = w.null_value[h];
        if (h < 2 * F) {
            const double turns = d / w.periods[h / 2], angle = kTwoPi * (turns - std::rint(turns));
            const double other = h % 2 ? w.null_value[h - 1] : -w.null_value[h + 1];
            value = value * std::cos(angle) + other * std::sin(angle);
        }
        null_total[token.at(h)] = T(value);
    }
    for (int i = 0; i < dim; ++i) base[i] = T(w.latent[i] + w.out_bias[i]);
    // Columns of padding stay zero: the sum over split dimensions is the sum over the head's.
    Buffer<double> split(size_t(dim) * token.size);
    for (int i = 0; i < dim; ++i)
        for (int h = 0; h < width; ++h)
            split[size_t(i) * token.size + token.at(h)] = w.out_weight[size_t(i) * width + h];
    out = Matrix<T>(dim, token.size, [&](int i, int j) { return split[size_t(i) * token.size + j]; });
}

template <class T>
void Model<T>::build_decoder(const PossmView& w) {
    const int H = w.head, S = head.size, R = hidden;
    Buffer<double> split(size_t(2) * S * R), columns(size_t(dim) * S);
    query = Buffer<T>(S);
    for (int h = 0; h < H; ++h) {
        query[head.at(h)] = T(w.session_query[h] / std::sqrt(double(H)));
        for (int j = 0; j < R; ++j) {
            split[size_t(head.at(h)) * R + j] = w.key_weight[size_t(h) * R + j];
            split[size_t(S + head.at(h)) * R + j] = w.value_weight[size_t(h) * R + j];
        }
        for (int i = 0; i < dim; ++i) columns[size_t(i) * S + head.at(h)] = w.dec_out_weight[size_t(i) * H + h];
    }
    key_value = Matrix<T>(2 * S, R, [&](int i, int j) { return split[size_t(i) * R + j]; });
    key_value_bias = Buffer<T>(key_value.rows());
    if (has_norm) {
        norm_weight = copied<T>(w.context_norm_weight, R, hidden_wide);
        norm_bias = copied<T>(w.context_norm_bias, R, hidden_wide);
    }
    // Scale and mean of the outputs are folded into the readout; without an FFN so is the attention's output matrix.
    auto read = [&](int p, int i) { return w.readout_weight[size_t(p) * dim + i] * w.output_scale[p]; };
    Buffer<double> bias(outputs);
    for (int p = 0; p < outputs; ++p) bias[p] = w.readout_bias[p] * w.output_scale[p] + w.output_mean[p];
    Buffer<double> start(dim);
    for (int i = 0; i < dim; ++i) start[i] = w.session_embedding[i] + w.dec_out_bias[i];
    if (has_decoder_ffn) {
        decoder_ffn = FeedForward<T>(w.decoder_ffn, dim, Use::several);
        dec_out = Matrix<T>(dim, S, [&](int i, int j) { return columns[size_t(i) * S + j]; }, Use::several);
        dec_base = copied<T>(start, dim, wide);
        readout = Matrix<T>(outputs, dim, read, Use::several);
    } else {
        for (int p = 0; p < outputs; ++p)
            for (int i = 0; i < dim; ++i) bias[p] += read(p, i) * start[i];
        readout = Matrix<T>(outputs, S, [&](int p, int j) {
            double total = 0;
            for (int i = 0; i < dim; ++i) total += read(p, i) * columns[size_t(i) * S + j];
            return total;
        }, Use::several);
    }
    readout_bias = copied<T>(bias, outputs, readout.rows());
}

}  // namespace
}  // namespace commissure
