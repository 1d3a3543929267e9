// The streaming step of POSSM (arXiv 2506.05320), exact: the numbers of the offline model, spike by spike.
//
// Encoder, one latent at the chunk's center, unit i's projected key k and value v, d the spike's time from the center:
//   score = c_i + sum_f A_if cos(w_f d) + B_if sin(w_f d),
//   A = (q1 k1 + q2 k2) / sqrt(H),  B = (q2 k1 - q1 k2) / sqrt(H)
//   o     = sum_n softmax_n R(d_n) v_n, kept as running (max, sum, total), so that spikes fold in as they arrive
// Decoder: keys and values of the latest hidden states stay in a ring; queries rotated for the default output times are
// tables.  Heads are kept split: [first of each pair | second of each pair | not rotated], all padded to whole vectors.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "possm_step.h"

#include "possm_model.h"

namespace commissure {
namespace {

constexpr int kBlock = 32;  // spikes per block: its tables (6 KB in float) stay in the first-level cache

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

    T* slot(int age) const {
        return const_cast<Buffer<T>&>(ring) + size_t((head + m.context - age) % m.context) * 2 * m.head.size;
    }

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
    const char* names[] = {"exp", "sin", "cos", "gelu", "sigmoid", "tanh", "softplus", "expm1"};
    constexpr int count = int(sizeof(names) / sizeof(names[0]));
    int which = 0;
    while (which < count && std::strcmp(name, names[which]) != 0) ++which;
    Buffer<T> lanes(L);
    for (size_t i = 0; i < n && which < count; i += L) {
        for (size_t k = 0; k < size_t(L); ++k) lanes[k] = i + k < n ? T(x[i + k]) : T(0);
        const Vec<T> v = load<T>(lanes);
        Vec<T> s, c;
        sincos_turns<T>(v, s, c);
        const Vec<T> results[count] = {exp_v<T>(v),     s,            c,                gelu_v<T>(v),
                                       sigmoid_v<T>(v), tanh_v<T>(v), softplus_v<T>(v), expm1_v<T>(v)};
        store<T>(lanes, results[which]);
        for (size_t k = 0; k < size_t(L) && i + k < n; ++k) y[i + k] = double(lanes[k]);
    }
    return which < count;
}

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

PossmStep* COMMISSURE_JOIN(possm_step, COMMISSURE_CLONE)(const PossmView& weights, const double* offsets, size_t n,
                                                         bool single) {
    return single ? make<float>(weights, offsets, n) : make<double>(weights, offsets, n);
}

bool COMMISSURE_JOIN(elementary, COMMISSURE_CLONE)(const char* name, bool single, const double* x, double* y,
                                                   size_t n) {
    return single ? elementary<float>(name, x, y, n) : elementary<double>(name, x, y, n);
}

}  // namespace commissure
