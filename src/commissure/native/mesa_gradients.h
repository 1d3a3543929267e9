// The gradients of the Mesa layer but its query's, one head after another, from x = (H + Lambda)^-1 q and the negative of
// y = (H + Lambda)^-1 u, u_t = G_t^T e_t (e_t the gradient of o_t = G_t x_t):
//
//   R_t = x_t e_t^T + gamma_{t+1} R_{t+1}                      (gradient of G_t^T, the state here)
//   W_t = -x_t y_t^T - y_t x_t^T + gamma_{t+1} W_{t+1}          (twice that of H_t: symmetric, its upper triangle is kept)
//   dk_t = beta_t (R_t v_t + W_t k_t),   dv_t = beta_t R_t^T k_t,   dbeta_t = (k_t^T W_t k_t) / 2 + k_t^T R_t v_t
//
// The gradient of log gamma at a segment's start is the product of its state and the state's gradient.  From there it goes
// on from token to token: G, H and Lambda times one number give the same output, so that scaling the gates of what a token
// s and those after it see is scaling Lambda there and every beta before:
//
//   dg_s - dg_{s+1} = y_s^T Lambda x_s - beta_s dbeta_s
//
// which is exact where y is; no state inside a segment is needed.  Included by linear_attention.cpp.
#pragma once

#include "linear_attention_chunk.h"

namespace commissure {
namespace {

// What is kept of one head while others of the group are worked on; the Gram's states are G's beside H.
template <class T>
struct MesaMemory {
    Buffer<double> gamma;
    Buffer<T> state, gram, d_state, d_gram, kept, kept_gram, d_lamb;
};

template <class T>
class MesaHeads : Chunk<T> {
    using Base = Chunk<T>;
    using typename Base::V;
    using Base::L, Base::C, Base::kOne, Base::m, Base::D, Base::E, Base::Dp, Base::Ep, Base::segment, Base::segments;
    using Base::size, Base::head, Base::gamma, Base::state, Base::k, Base::v, Base::y, Base::k_t, Base::within;
    using Base::h, Base::beta, Base::start, Base::end, Base::total, Base::token, Base::live;
    using Base::in, Base::out, Base::vec, Base::gather, Base::decay, Base::rows, Base::copy, Base::prefetch;
    using Base::turn, Base::turn_back, Base::multiply, Base::end_of;

   public:
    explicit MesaHeads(const AttentionView& view)
        : Base(view), gram_size(size_t(Dp) * Dp), xy(2 * k.size()), yx(xy.size()), e(v.size()), v_t(v.size()),
          d_k(k.size()), row(k.size()), lamb(size_t(Dp)), scores(2 * within.size()), slope(size_t(segment) * C) {
        for (int i = 0; i < m.group; ++i)
            memory[i] = {Buffer<double>(size_t(m.time)), Buffer<T>(size), Buffer<T>(gram_size), Buffer<T>(size),
                         Buffer<T>(gram_size), Buffer<T>(size * size_t(segments)),
                         Buffer<T>(gram_size * size_t(segments)), Buffer<T>(size_t(Dp))};
    }

    void backward(int64_t first, int64_t last) {
        for (int64_t index = first; index < last; ++index) open(first, index);
        for (int64_t number = 0; number < segments; ++number)
            for (int64_t index = first; index < last; ++index) {
                enter(first, index);
                std::memcpy(own->kept + size * number, state, size * sizeof(T));
                std::memcpy(own->kept_gram + gram_size * number, own->gram, gram_size * sizeof(T));
                if (number + 1 < segments)
                    for (int64_t chunk = number * segment; chunk < end_of(number); ++chunk) advance(chunk * C);
            }
        for (int64_t number = segments - 1; number >= 0; --number)
            for (int64_t index = first; index < last; ++index) {
                enter(first, index);
                for (int64_t chunk = end_of(number) - 1; chunk >= number * segment; --chunk)
                    retreat(chunk * C, slope + (chunk - number * segment) * C);
                gate_gradients(number);
            }
        for (int64_t index = first; index < last; ++index) {
            enter(first, index);
            store(out(m.d_initial), own->d_state, Ep, E);
            mirror();
            store(out(m.d_gram), own->d_gram, Dp, D);
            copy(out(m.d_lamb) + size_t(head) * D, own->d_lamb, D);
        }
    }

   private:
    size_t gram_size;
    MesaMemory<T> memory[kGroup];
    MesaMemory<T>* own = nullptr;  // of the head in work
    Buffer<T> xy, yx;              // [2 tokens][element]: x, then -y; the same two exchanged and decayed from the start
    Buffer<T> e, v_t, d_k, row;    // as in Heads; d_k [element][token]
    Buffer<T> lamb;
    Buffer<T> scores;              // [2 tokens][token], with decays: of x's gradients, then x k
    Buffer<double> slope;          // dg_s - dg_{s+1}, of a segment

    void enter(int64_t first, int64_t index) {
        own = &memory[index - first];
        this->find(index);
        gamma = own->gamma, state = own->state;
        copy(lamb, in(m.lamb) + h * D, D);
    }
    void open(int64_t first, int64_t index) {
        enter(first, index);
        this->open_gates();
        load(state, in(m.initial), Ep, E);
        load(own->gram, in(m.gram), Dp, D);
        load(own->d_state, in(m.d_final), Ep, E);
        // The gradient of a Gram, twice, without what is not symmetric.
        T* twice = own->d_gram;
        const T* d_final = in(m.d_gram_final) + size_t(head) * D * D;
        std::memset(twice, 0, gram_size * sizeof(T));
        for (int i = 0; i < D; ++i)
            for (int j = 0; j < D; ++j) twice[size_t(i) * Dp + j] = d_final[i * D + j] + d_final[j * D + i];
        std::memset(own->d_lamb, 0, size_t(Dp) * sizeof(T));
    }
    void load(T* to, const T* from, int width, int columns) {
        std::memset(to, 0, size_t(Dp) * width * sizeof(T));
        for (int i = 0; i < D; ++i) copy(to + size_t(i) * width, from + (size_t(head) * D + i) * columns, columns);
    }
    void store(T* to, const T* from, int width, int columns) {
        for (int i = 0; i < D; ++i) copy(to + (size_t(head) * D + i) * columns, from + size_t(i) * width, columns);
    }

    // The states after a chunk.
    void advance(int64_t t) {
        gather(t);
        prefetch(1, m.k, D), prefetch(1, m.v, E);
        Base::advance();
        for (int l = 0; l < C; ++l) {
            const T weight = beta[l] * end[l];
            for (int j = 0; j < Dp; j += L) vec(yx + size_t(l) * Dp + j) = vec(k + size_t(l) * Dp + j) * weight;
        }
        multiply(own->gram, Dp, Dp, Dp, &total, 0, {k, 1, size_t(Dp), yx, size_t(Dp), C}, true);
    }

    // Gradients of one chunk from those of the states after it, which become those before it.
    void retreat(int64_t t, double* slopes) {
        gather(t);
        decay(t);
        T *x = xy, *minus_y = xy + size_t(C) * Dp;
        rows(x, Dp, in(m.q), D);
        rows(minus_y, Dp, in(m.y), D);
        rows(e, Ep, in(m.d_o), E);
        prefetch(-1, m.q, D), prefetch(-1, m.y, D), prefetch(-1, m.k, D), prefetch(-1, m.v, E), prefetch(-1, m.d_o, E);
        turn(k, Dp, k_t), turn(v, Ep, v_t);
        penalty_gradients(slopes);
        score();
        alignas(64) T by_key[C], by_value[C];
        key_gradients(by_key);
        value_gradients(by_value);
        for (int l = 0; l < live; ++l) {
            const T d_beta = T(0.5) * (by_key[l] + by_value[l]);
            out(m.d_beta)[token[l]] = d_beta;
            slopes[l] -= double(beta[l]) * double(d_beta);
        }
        write();
    }
    // y^T Lambda x of each token, and minus the sum of their x y, taking the sign of y away on the way.
    void penalty_gradients(double* slopes) {
        T* x = xy;
        T* y_rows = xy + size_t(C) * Dp;
        for (int l = 0; l < C; ++l) {
            V sum{};
            for (int j = 0; j < Dp; j += L) {
                V& y_part = vec(y_rows + size_t(l) * Dp + j);
                y_part = -y_part;
                const V product = vec(x + size_t(l) * Dp + j) * y_part;
                sum -= product * vec(lamb + j);
                vec(own->d_lamb + j) += product;
            }
            T all = 0;
            for (int s = 0; s < L; ++s) all += sum[s];
            slopes[l] = all;
        }
    }
    void score() {
        const T *x = xy, *minus_y = xy + size_t(C) * Dp;
        T *slopes = scores, *own_scores = scores + C * C;
        multiply(slopes, C, C, C, nullptr, 0, {e, size_t(Ep), 1, v_t, C, E});
        multiply(slopes, C, C, C, &kOne, 0, {minus_y, size_t(Dp), 1, k_t, C, D});
        multiply(own_scores, C, C, C, nullptr, 0, {x, size_t(Dp), 1, k_t, C, D});
        for (int i = 0; i < C * C; i += L) vec(slopes + i) *= vec(within + i), vec(own_scores + i) *= vec(within + i);
    }
    void key_gradients(T* by_key) {
        const T* twice = own->d_gram;
        multiply(d_k, C, Dp, C, nullptr, 0, {own->d_state, size_t(Ep), 1, v_t, C, E});
        for (int i = 0; i < Dp; i += Base::M) {  // rows of W: above the diagonal its columns
            T* place = d_k + size_t(i) * C;
            multiply(place, C, Base::M, C, &kOne, 0, {twice + i, 1, size_t(Dp), k_t, C, i});
            multiply(place, C, Base::M, C, &kOne, 0,
                     {twice + size_t(i) * Dp + i, size_t(Dp), 1, k_t + size_t(i) * C, C, D - i});
        }
        for (int i = 0; i < Dp; ++i)
            for (int j = 0; j < C; j += L) vec(d_k + size_t(i) * C + j) *= vec(end + j);
        multiply(d_k, C, Dp, C, &kOne, 0, {xy, 1, size_t(Dp), scores, C, 2 * C});
        V sums[C / L] = {};
        for (int i = 0; i < Dp; ++i)
            for (int s = 0; s < C / L; ++s) {
                V& place = vec(d_k + size_t(i) * C + s * L);
                sums[s] += place * vec(k_t + size_t(i) * C + s * L);
                place *= vec(beta + s * L);
            }
        for (int s = 0; s < C / L; ++s) vec(by_key + s * L) = sums[s];
        turn_back(d_k, Dp, row);
        for (int l = 0; l < live; ++l) copy(out(m.d_k) + token[l] * D, row + size_t(l) * Dp, D);
    }
    void value_gradients(T* by_value) {
        multiply(y, Ep, C, Ep, nullptr, 0, {k, size_t(Dp), 1, own->d_state, size_t(Ep), D});
        multiply(y, Ep, C, Ep, end, 1, {scores + C * C, 1, C, e, size_t(Ep), C, Shape::upper});
        for (int l = 0; l < C; ++l) {
            T* to = y + size_t(l) * Ep;
            V sum{};
            for (int j = 0; j < Ep; j += L) {
                sum += vec(to + j) * vec(v + size_t(l) * Ep + j);
                vec(to + j) *= beta[l];
            }
            T all = 0;
            for (int s = 0; s < L; ++s) all += sum[s];
            by_value[l] = all;
            if (l < live) copy(out(m.d_v) + token[l] * E, to, E);
        }
    }
    // The gradients of the states before the chunk.
    void write() {
        for (int l = 0; l < 2 * C; ++l) {
            const T weight = start[l % C];
            const T* from = xy + size_t((l + C) % (2 * C)) * Dp;
            for (int j = 0; j < Dp; j += L) vec(yx + size_t(l) * Dp + j) = vec(from + j) * weight;
        }
        for (int l = 0; l < C; ++l)
            for (int j = 0; j < Ep; j += L) vec(e + size_t(l) * Ep + j) *= start[l];
        multiply(own->d_state, Ep, Dp, Ep, &total, 0, {xy, 1, size_t(Dp), e, size_t(Ep), C});
        multiply(own->d_gram, Dp, Dp, Dp, &total, 0, {xy, 1, size_t(Dp), yx, size_t(Dp), 2 * C}, true);
    }
    void gate_gradients(int64_t number) {
        const T *first = own->kept + size * number, *gram = own->kept_gram + gram_size * number;
        V sum{};
        for (size_t i = 0; i < size; i += L) sum += vec(first + i) * vec(own->d_state + i);
        double whole = 0;
        for (int i = 0; i < Dp; ++i) {
            const T *a = gram + size_t(i) * Dp, *b = own->d_gram + size_t(i) * Dp;
            whole += 0.5 * double(a[i]) * double(b[i]);
            const int aligned = i / L * L + L;
            for (int j = i + 1; j < aligned; ++j) whole += double(a[j]) * double(b[j]);
            for (int j = aligned; j < Dp; j += L) sum += vec(a + j) * vec(b + j);
        }
        for (int s = 0; s < L; ++s) whole += double(sum[s]);
        const int64_t begin = number * segment * C, stop = end_of(number) * C < m.time ? end_of(number) * C : m.time;
        for (int64_t t = begin; t < stop; ++t) {
            out(m.d_g)[(this->b * m.time + t) * m.heads + h] = gamma[t] > 0 ? T(whole) : T(0);
            whole -= slope[t - begin];
        }
    }
    // Half of the symmetric gradient, from its upper triangle.
    void mirror() {
        T* twice = own->d_gram;
        for (int i = 0; i < D; ++i)
            for (int j = i; j < D; ++j) twice[size_t(j) * Dp + i] = twice[size_t(i) * Dp + j] *= T(0.5);
    }
};

}  // namespace
}  // namespace commissure
