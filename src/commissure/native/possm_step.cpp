// The streaming step of POSSM (arXiv 2506.05320), exact: the numbers of the offline model, spike by spike.
//
// Encoder, one latent at the chunk's center, unit i's projected key k and value v, d the spike's time from the center:
//   score = c_i + sum_f A_if cos(w_f d) + B_if sin(w_f d),  A = (q1 k1 + q2 k2) / sqrt(H),  B = (q2 k1 - q1 k2) / sqrt(H)
//   o     = sum_n softmax_n R(d_n) v_n, kept as running (max, sum, total), so that spikes fold in as they arrive
// Decoder: keys and values of the latest hidden states stay in a ring; queries rotated for the default output times are
// tables.  Heads are kept split: [first of each pair | second of each pair | not rotated], each padded to whole vectors.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "possm_step.h"

#include <cmath>

#include "possm_backbone.h"

namespace commissure {
namespace {

constexpr int kBlock = 32;  // spikes per block: its tables (6 KB in float) stay in the first-level cache
constexpr double kTwoPi = 6.283185307179586476925;

// Where dimension h of a head lies in the split layout.
template <class T>
struct Split {
    int frequencies, width, pairs, rest, size;  // pairs, rest: padded
    Split(int frequencies_, int width_)
        : frequencies(frequencies_), width(width_), pairs(padded<T>(frequencies_, 2)), rest(padded<T>(width - 2 * frequencies_, 4)),
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
    for (int i = 0; i < padded<T>(n); i += L) store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
}

template <class T>
struct FeedForward {
    int dim = 0, inner = 0, wide = 0;
    Matrix<T> in, out;
    Buffer<T> norm_weight, norm_bias, in_bias, out_bias;

    FeedForward() = default;
    FeedForward(const FeedForwardView& v, int dim_) : dim(dim_), inner(v.inner), wide(padded<T>(v.inner, 4)) {
        const int W = wide, M = inner;
        in = Matrix<T>(2 * W, dim, [&](int i, int j) {
            return i % W < M ? v.in_weight[size_t(i / W * M + i % W) * dim + j] : 0.0;
        });
        out = Matrix<T>(dim, M, [&](int i, int j) { return v.out_weight[size_t(i) * M + j]; });
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
      head(w.frequencies, w.head), inverse_period(w.frequencies), ffn(w.ffn, w.dim), has_in(w.in_weight != nullptr),
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
        for (int h = 0; h < width; ++h) units[size_t(u) * row + values + token.at(h)] = T(w.unit_value[size_t(u) * width + h]);
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
        for (int h = 0; h < width; ++h) split[size_t(i) * token.size + token.at(h)] = w.out_weight[size_t(i) * width + h];
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
        decoder_ffn = FeedForward<T>(w.decoder_ffn, dim);
        dec_out = Matrix<T>(dim, S, [&](int i, int j) { return columns[size_t(i) * S + j]; });
        dec_base = copied<T>(start, dim, wide);
        readout = Matrix<T>(outputs, dim, read);
    } else {
        for (int p = 0; p < outputs; ++p)
            for (int i = 0; i < dim; ++i) bias[p] += read(p, i) * start[i];
        readout = Matrix<T>(outputs, S, [&](int p, int j) {
            double total = 0;
            for (int i = 0; i < dim; ++i) total += read(p, i) * columns[size_t(i) * S + j];
            return total;
        });
    }
    readout_bias = copied<T>(bias, outputs, readout.rows());
}

template <class T>
class Engine final : public PossmStep {
    static constexpr int L = kLanes<T>;

   public:
    explicit Engine(Model<T>* model) : m(*model) {
        size_t state = 0, ready = 0, scratch = 0;
        for (int i = 0; i < m.n_layers; ++i) {
            state += m.layers[i].state_size(), ready += m.layers[i].idle_size();
            if (m.layers[i].scratch_size() > scratch) scratch = m.layers[i].scratch_size();
        }
        if (m.ffn.scratch_size() > scratch) scratch = m.ffn.scratch_size();
        if (kMaxColumns * m.decoder_ffn.scratch_size() > scratch) scratch = kMaxColumns * m.decoder_ffn.scratch_size();
        layer_state = Buffer<T>(state), layer_ready = Buffer<T>(ready), work = Buffer<T>(scratch);
        total = Buffer<T>(m.token.size), latent = Buffer<T>(m.wide);
        current = Buffer<T>(m.hidden_wide), normed = Buffer<T>(m.hidden_wide);
        ring = Buffer<T>(size_t(m.context) * 2 * m.head.size + m.key_value.rows());
        turns = Buffer<T>(kBlock * m.token.pairs);
        cosine = Buffer<T>(kBlock * m.token.pairs), sine = Buffer<T>(kBlock * m.token.pairs);
        weight = Buffer<T>(kBlock);
        attention = Buffer<T>(padded<T>(m.context));
        mixed = Buffer<T>(kMaxColumns * m.head.size), read = Buffer<T>(kMaxColumns * m.wide);
        result = Buffer<T>(kMaxColumns * m.readout.rows());
        tables = Buffer<T>(kMaxColumns * m.table_size());
        reset();
    }
    ~Engine() override {
        if (__atomic_sub_fetch(&m.references, 1, __ATOMIC_ACQ_REL) == 0) delete &m;
    }

    void reset() override {
        std::memset(static_cast<T*>(layer_state), 0, layer_state.size() * sizeof(T));
        contexts = head = 0;
        is_ready = false;
        open();
    }

    void fold(const int64_t* units, const double* offsets, size_t n) override {
        for (size_t start = 0; start < n; start += kBlock) {
            const int count = int(n - start < size_t(kBlock) ? n - start : size_t(kBlock));
            rotate(offsets + start, count);
            if (m.softmax) weigh(units + start, count);
            accumulate(units + start, count);
        }
        spikes += n;
    }

    void idle() override {
        if (is_ready) return;
        T *state = layer_state, *ready = layer_ready;
        for (int i = 0; i < m.n_layers; ++i) {
            m.layers[i].idle(state, ready);
            state += m.layers[i].state_size(), ready += m.layers[i].idle_size();
        }
        is_ready = true;
    }

    void close(const double* offsets, size_t n, double* out) override {
        idle();
        encode();
        advance();
        for (size_t start = 0; start < n; start += kMaxColumns) {
            const int count = int(n - start < size_t(kMaxColumns) ? n - start : size_t(kMaxColumns));
            const T* table = m.default_tables + start * m.table_size();
            if (offsets) {
                for (int b = 0; b < count; ++b) m.fill_table(offsets[start + b], tables + b * m.table_size());
                table = tables;
            }
            decode(table, count, out + start * m.outputs);
        }
        open();
    }

    size_t state_size() const override {
        size_t size = 5 + m.token.width + 2 * size_t(m.context) * m.head.width;
        for (int i = 0; i < m.n_layers; ++i) size += m.layers[i].public_size();
        return size;
    }
    void save(double* out) const override;
    void load(const double* in) override;
    PossmStep* clone() const override {
        __atomic_add_fetch(&m.references, 1, __ATOMIC_ACQ_REL);
        Engine* copy = new Engine(&m);
        Buffer<double> state(state_size());
        save(state);
        copy->load(state);
        return copy;
    }

   private:
    Model<T>& m;
    Buffer<T> layer_state, layer_ready, work, total, latent, current, normed, ring;
    Buffer<T> turns, cosine, sine, weight, attention, mixed, read, result, tables;
    T top = 0, mass = 0;  // running maximum and sum of the open chunk's softmax
    uint64_t spikes = 0;
    int contexts = 0, head = 0;  // hidden states seen (at most `context`), place of the newest in the ring
    bool is_ready = false;

    T* slot(int age) const { return const_cast<Buffer<T>&>(ring) + size_t((head + m.context - age) % m.context) * 2 * m.head.size; }

    void open() {
        spikes = 0;
        top = -INFINITY, mass = 0;
        std::memset(static_cast<T*>(total), 0, total.size() * sizeof(T));
        if (m.softmax && m.null_always) take_null();
    }
    void take_null() {
        top = T(m.null_score), mass = 1;
        std::memcpy(static_cast<T*>(total), static_cast<const T*>(m.null_total), total.size() * sizeof(T));
    }

    void rotate(const double* offsets, int count) {
        const int F = m.token.frequencies, P = m.token.pairs;
        const double* inverse = m.inverse_period;
        for (int s = 0; s < count; ++s) {
            const double d = offsets[s];
            T* to = turns + s * P;
            for (int f = 0; f < F; ++f) {
                const double u = d * inverse[f];
                to[f] = T(u - ((u + Simd<double>::kRound) - Simd<double>::kRound));
            }
        }
        for (int i = 0; i < count * P; i += L) {
            Vec<T> s, c;
            sincos_turns<T>(commissure::load(turns + i), s, c);
            store(sine + i, s);
            store(cosine + i, c);
        }
    }

    void weigh(const int64_t* units, int count) {
        const int P = m.token.pairs;
        T highest = top;
        for (int s = 0; s < count; ++s) {
            const T* row = m.units + size_t(units[s]) * m.row;
            Vec<T> score{};
            for (int f = 0; f < P; f += L)
                score += commissure::load(row + f) * commissure::load(cosine + s * P + f) +
                         commissure::load(row + P + f) * commissure::load(sine + s * P + f);
            weight[s] = sum<T>(score) + m.unit_score[units[s]];
            highest = weight[s] > highest ? weight[s] : highest;
        }
        if (highest > top) {
            const T fade = exp_v<T>(splat<T>(top - highest))[0];
            for (int i = 0; i < m.token.size; i += L) store(total + i, commissure::load(total + i) * fade);
            mass *= fade;
            top = highest;
        }
        for (int s = 0; s < count; s += L) store(weight + s, exp_v<T>(commissure::load(weight + s) - top));
        T added = 0;
        for (int s = 0; s < count; ++s) added += weight[s];
        mass += added;
    }

    void accumulate(const int64_t* units, int count) {
        const int P = m.token.pairs, values = m.softmax ? 2 * P : 0;
        using commissure::load;
        for (int f = 0; f < P; f += 2 * L) {
            Vec<T> a0{}, a1{}, b0{}, b1{};
            for (int s = 0; s < count; ++s) {
                const T* v = m.units + size_t(units[s]) * m.row + values + f;
                const T *c = cosine + s * P + f, *n = sine + s * P + f;
                const Vec<T> p = splat<T>(m.softmax ? weight[s] : T(1));
                const Vec<T> c0 = load(c), c1 = load(c + L), n0 = load(n), n1 = load(n + L);
                const Vec<T> x0 = load(v), x1 = load(v + L), y0 = load(v + P), y1 = load(v + P + L);
                a0 += p * (x0 * c0 - y0 * n0);
                a1 += p * (x1 * c1 - y1 * n1);
                b0 += p * (x0 * n0 + y0 * c0);
                b1 += p * (x1 * n1 + y1 * c1);
            }
            store(total + f, load(total + f) + a0);
            store(total + f + L, load(total + f + L) + a1);
            store(total + P + f, load(total + P + f) + b0);
            store(total + P + f + L, load(total + P + f + L) + b1);
        }
        for (int i = 2 * P; i < m.token.size; i += 4 * L) {
            Vec<T> t[4] = {};
            for (int s = 0; s < count; ++s) {
                const T* v = m.units + size_t(units[s]) * m.row + values + i;
                const Vec<T> p = splat<T>(m.softmax ? weight[s] : T(1));
                for (int k = 0; k < 4; ++k) t[k] += p * load(v + k * L);
            }
            for (int k = 0; k < 4; ++k) store(total + i + k * L, load(total + i + k * L) + t[k]);
        }
    }

    void encode() {
        using commissure::load;
        if (m.softmax) {
            if (spikes == 0) take_null();
            const T inverse = T(1) / mass;
            for (int i = 0; i < m.token.size; i += L) store(total + i, load(total + i) * inverse);
            m.out.apply(total, m.base, latent);
        } else {
            for (int i = 0; i < m.dim; ++i) latent[i] = m.base[i] + total[m.token.at(i)];
        }
        m.ffn.apply(1, latent, m.wide, work);
    }

    void advance() {
        const T* input = latent;
        if (m.has_in) {
            m.in.apply(latent, m.in_bias, current);
            input = current;
        }
        T *state = layer_state, *ready = layer_ready;
        for (int i = 0; i < m.n_layers; ++i) {
            m.layers[i].step(input, state, ready, current, work);
            input = current;
            state += m.layers[i].state_size(), ready += m.layers[i].idle_size();
        }
        is_ready = false;
        const T* source = current;
        if (m.has_norm) {
            layer_norm<T>(current, m.hidden, m.norm_weight, m.norm_bias, normed);
            source = normed;
        }
        head = (head + 1) % m.context;
        contexts = contexts < m.context ? contexts + 1 : contexts;
        // The product's padding may reach past the slot: it goes through the spare room at the ring's end.
        T* spare = ring + size_t(m.context) * 2 * m.head.size;
        m.key_value.apply(source, m.key_value_bias, spare);
        std::memcpy(slot(0), spare, 2 * size_t(m.head.size) * sizeof(T));
    }

    void decode(const T* table, int count, double* out) {
        using commissure::load;
        const int S = m.head.size, P = m.head.pairs;
        for (int b = 0; b < count; ++b) {
            const T* row = table + b * m.table_size();
            const size_t stride = S + 2 * size_t(P);
            T highest = -INFINITY;
            for (int j = 0; j < contexts; ++j) {
                attention[j] = dot<T>(row + j * stride, slot(j), S);
                highest = attention[j] > highest ? attention[j] : highest;
            }
            for (int j = 0; j < contexts; j += L) store(attention + j, exp_v<T>(load(attention + j) - highest));
            T sum_of = 0;
            for (int j = 0; j < contexts; ++j) sum_of += attention[j];
            T* o = mixed + b * S;
            std::memset(o, 0, S * sizeof(T));
            for (int j = 0; j < contexts; ++j) {
                const T p = attention[j] / sum_of;
                const T *c = row + j * stride + S, *n = c + P, *v = slot(j) + S;
                for (int f = 0; f < P; f += L) {
                    store(o + f, load(o + f) + p * (load(v + f) * load(c + f) - load(v + P + f) * load(n + f)));
                    store(o + P + f, load(o + P + f) + p * (load(v + f) * load(n + f) + load(v + P + f) * load(c + f)));
                }
                for (int i = 2 * P; i < S; i += L) store(o + i, load(o + i) + p * load(v + i));
            }
        }
        const T* source = mixed;
        int stride = S;
        if (m.has_decoder_ffn) {
            m.dec_out.apply(count, mixed, S, m.dec_base, 0, read, m.wide);
            m.decoder_ffn.apply(count, read, m.wide, work);
            source = read, stride = m.wide;
        }
        m.readout.apply(count, source, stride, m.readout_bias, 0, result, m.readout.rows());
        for (int b = 0; b < count; ++b)
            for (int p = 0; p < m.outputs; ++p) out[b * m.outputs + p] = double(result[b * m.readout.rows() + p]);
    }
};

template <class T>
void Engine<T>::save(double* out) const {
    const double head_values[] = {double(spikes), double(contexts), double(is_ready), double(top), double(mass)};
    for (double value : head_values) *out++ = value;
    for (int h = 0; h < m.token.width; ++h) *out++ = double(total[m.token.at(h)]);
    for (int part = 0; part < 2; ++part)
        for (int age = 0; age < m.context; ++age)
            for (int h = 0; h < m.head.width; ++h)
                *out++ = age < contexts ? double(slot(age)[part * m.head.size + m.head.at(h)]) : 0.0;
    const T* state = layer_state;
    for (int i = 0; i < m.n_layers; ++i) {
        m.layers[i].exchange([&](size_t to, size_t from) { out[to] = double(state[from]); });
        state += m.layers[i].state_size(), out += m.layers[i].public_size();
    }
}

template <class T>
void Engine<T>::load(const double* in) {
    reset();
    spikes = uint64_t(in[0]);
    contexts = int(in[1]);
    const bool ready = in[2] != 0;
    top = T(in[3]), mass = T(in[4]);
    in += 5;
    for (int h = 0; h < m.token.width; ++h) total[m.token.at(h)] = T(*in++);
    for (int part = 0; part < 2; ++part)
        for (int age = 0; age < m.context; ++age)
            for (int h = 0; h < m.head.width; ++h, ++in)
                if (age < contexts) slot(age)[part * m.head.size + m.head.at(h)] = T(*in);
    T* state = layer_state;
    for (int i = 0; i < m.n_layers; ++i) {
        m.layers[i].exchange([&](size_t from, size_t to) { state[to] = T(in[from]); });
        state += m.layers[i].state_size(), in += m.layers[i].public_size();
    }
    if (ready) idle();
}

template <class T>
PossmStep* make(const PossmView& weights, const double* offsets, size_t n) {
    return new Engine<T>(new Model<T>(weights, offsets, int(n)));
}

template <class T>
bool elementary(const char* name, const double* x, double* y, size_t n) {
    constexpr int L = kLanes<T>;
    const char* names[] = {"exp", "sin", "cos", "gelu", "sigmoid", "tanh", "softplus"};
    int which = 0;
    while (which < 7 && std::strcmp(name, names[which]) != 0) ++which;
    Buffer<T> lanes(L);
    for (size_t i = 0; i < n && which < 7; i += L) {
        for (size_t k = 0; k < size_t(L); ++k) lanes[k] = i + k < n ? T(x[i + k]) : T(0);
        const Vec<T> v = load<T>(lanes);
        Vec<T> s, c;
        sincos_turns<T>(v, s, c);
        const Vec<T> results[] = {exp_v<T>(v), s, c, gelu_v<T>(v), sigmoid_v<T>(v), tanh_v<T>(v), softplus_v<T>(v)};
        store<T>(lanes, results[which]);
        for (size_t k = 0; k < size_t(L) && i + k < n; ++k) y[i + k] = double(lanes[k]);
    }
    return which < 7;
}

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

PossmStep* COMMISSURE_JOIN(possm_step, COMMISSURE_CLONE)(const PossmView& weights, const double* offsets, size_t n, bool single) {
    return single ? make<float>(weights, offsets, n) : make<double>(weights, offsets, n);
}

bool COMMISSURE_JOIN(elementary, COMMISSURE_CLONE)(const char* name, bool single, const double* x, double* y, size_t n) {
    return single ? elementary<float>(name, x, y, n) : elementary<double>(name, x, y, n);
}

}  // namespace commissure
