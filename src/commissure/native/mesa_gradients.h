// The gradients of the Mesa layer but its query's, one head after another, from x_t = (H_t + Lambda)^-1 q_t and
// y_t = (H_t + Lambda)^-1 G_t^T e_t (e_t the gradient of o_t = G_t x_t):
//
//   R_t = x_t e_t^T + gamma_{t+1} R_{t+1}                      (gradient of G_t^T, the state here)
//   W_t = -x_t y_t^T - y_t x_t^T + gamma_{t+1} W_{t+1}          (twice that of H_t: symmetric, the upper half is kept)
//   dk_t = beta_t (R_t v_t + W_t k_t),   dv_t = beta_t R_t^T k_t,   dbeta_t = (k_t^T W_t k_t) / 2 + k_t^T R_t v_t
//
// The gradient of log gamma where a segment begins is the product of the state there and of its gradient.  Inside, the
// layer's homogeneity gives the rest (G, H and Lambda times one number leave o as it is):
//
//   dg_s - dg_{s+1} = y_s^T Lambda x_s - beta_s dbeta_s
//
// which is as exact as y; no state inside a segment is made again.  Included by linear_attention.cpp.
#pragma once

#include "linear_attention_chunk.h"

namespace commissure {
namespace {

// From one state that is kept to the next, in segments of `Heads`: rounding adds up in the gates' gradients between
// them (at 4, twice that of all states kept), and memory that is fresh in every call costs more than what it holds.
constexpr int kAnchor = 4;

// What is kept of one head while others of the group are worked on: of G^T (state) and of H (gram).
template <class T>
struct MesaMemory {
    Buffer<double> gamma, d_lamb;
    Buffer<T> state, gram, d_state, d_gram, kept, kept_gram;
    double following;  // the gate's gradient where the segment after the one in work begins
};

template <class T>
class MesaHeads : Chunk<T> {
    using Base = Chunk<T>;
    using typename Base::V;
    using Base::L, Base::C, Base::kOne, Base::m, Base::D, Base::E, Base::Dp, Base::Ep, Base::segment, Base::segments;
    using Base::size, Base::head, Base::gamma, Base::state, Base::k, Base::v, Base::k_room, Base::v_room, Base::written;
    using Base::k_t, Base::within, Base::h, Base::beta, Base::start, Base::end, Base::total, Base::token, Base::live;
    using Base::in, Base::out, Base::vec, Base::gather, Base::decay, Base::rows, Base::copy, Base::prefetch;
    using Base::weighted, Base::loose, Base::turn, Base::turn_back, Base::multiply, Base::end_of;
    using Base::load, Base::store;

   public:
    explicit MesaHeads(const AttentionView& view)
        : Base(view), gram_size(size_t(Dp) * Dp), x_room(k_room.size()), y_room(k_room.size()), e_room(v_room.size()),
          x_decayed(k_room.size()), y_decayed(k_room.size()), v_t(v_room.size()), d_k(k_room.size()),
          row(k_room.size()), lamb(size_t(Dp)), scores(within.size()), minus(within.size()), slopes(within.size()) {
        segment *= kAnchor, segments = (this->chunks + segment - 1) / segment;
        change = Buffer<double>(size_t(segment) * C);
        for (int i = 0; i < m.group; ++i)
            memory[i] = {Buffer<double>(size_t(m.time)), Buffer<double>(size_t(Dp)), Buffer<T>(size),
                         Buffer<T>(gram_size), Buffer<T>(size), Buffer<T>(gram_size),
                         Buffer<T>(size * size_t(segments)), Buffer<T>(gram_size * size_t(segments)), 0};
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
                    retreat(chunk * C, change + (chunk - number * segment) * C);
                gate_gradients(number);
            }
        for (int64_t index = first; index < last; ++index) {
            enter(first, index);
            store(out(m.d_initial), own->d_state, Ep, E);
            mirror();
            store(out(m.d_gram), own->d_gram, Dp, D);
            for (int i = 0; i < D; ++i) out(m.d_lamb)[head * D + i] = T(own->d_lamb[i]);
        }
    }

   private:
    size_t gram_size;
    MesaMemory<T> memory[kGroup];
    MesaMemory<T>* own = nullptr;  // of the head in work
    Rows<T> x, y, e;
    Buffer<T> x_room, y_room, e_room;  // [token][element]
    Buffer<T> x_decayed, y_decayed;    // minus x and y, decayed from the chunk's start
    Buffer<T> v_t, d_k, row;           // [element][token]; row: d_k on its way out
    Buffer<T> lamb;
    Buffer<T> scores, minus, slopes;   // [token][token], with decays: x k, its negative, gradients by x
    Buffer<double> change;             // dg_s - dg_{s+1}, of a segment

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
        std::memset(own->d_lamb, 0, size_t(Dp) * sizeof(double));
    }

    // The states after a chunk.
    void advance(int64_t t) {
        gather(t);
        prefetch(1, m.k, D), prefetch(1, m.v, E);
        Base::advance();
        for (int l = 0; l < C; ++l) {
            const T weight = beta[l] * end[l];
            weighted(k[l], Dp, weight, x_decayed + size_t(l) * Dp);
        }
        multiply(own->gram, Dp, Dp, Dp, &total, 0, {k.at, 1, k.stride, x_decayed, size_t(Dp), C}, {}, true);
    }

    // Gradients of one chunk from those of the states after it, which become those before it.
    void retreat(int64_t t, double* changes) {
        gather(t);
        decay(t);
        x = rows(in(m.q), D, Dp, x_room), y = rows(in(m.y), D, Dp, y_room), e = rows(in(m.d_o), E, Ep, e_room);
        if (t > 0) {
            prefetch(-1, m.q, D), prefetch(-1, m.y, D), prefetch(-1, m.k, D);
            prefetch(-1, m.v, E), prefetch(-1, m.d_o, E);
        }
        turn(k, Dp, k_t), turn(v, Ep, v_t);
        penalty_gradients(changes);
        score();
        alignas(64) T by_key[C], by_value[C];
        key_gradients(by_key);
        value_gradients(by_value);
        for (int l = 0; l < live; ++l) {
            const T d_beta = T(0.5) * (by_key[l] + by_value[l]);
            out(m.d_beta)[token[l]] = d_beta;
            changes[l] -= double(beta[l]) * double(d_beta);
        }
        write();
    }
    // y^T Lambda x of each token, and minus the sum of their x y.
    void penalty_gradients(double* changes) {
        V sums[C] = {};
        for (int j = 0; j < Dp; j += L) {
            V all{};
            for (int l = 0; l < C; ++l) {
                const V product = loose(x[l] + j) * loose(y[l] + j);
                sums[l] += product * vec(lamb + j);
                all += product;
            }
            for (int s = 0; s < L; ++s) own->d_lamb[j + s] -= double(all[s]);
        }
        for (int l = 0; l < C; ++l) changes[l] = double(added(sums[l]));
    }
    static T added(V lanes) {
        T all = 0;
        for (int s = 0; s < L; ++s) all += lanes[s];
        return all;
    }
    void score() {
        static constexpr T kMinusOne = -1;
        multiply(slopes, C, C, C, nullptr, 0, {y.at, y.stride, 1, k_t, C, D});
        multiply(slopes, C, C, C, &kMinusOne, 0, {e.at, e.stride, 1, v_t, C, E});
        multiply(scores, C, C, C, nullptr, 0, {x.at, x.stride, 1, k_t, C, D});
        for (int i = 0; i < C * C; i += L) {
            vec(slopes + i) *= vec(within + i), vec(scores + i) *= vec(within + i);
            vec(minus + i) = -vec(scores + i);
        }
    }
    void key_gradients(T* by_key) {
        const T* twice = own->d_gram;
        multiply(d_k, C, Dp, C, nullptr, 0, {own->d_state, size_t(Ep), 1, v_t, C, E});
        for (int i = 0; i < Dp; i += Base::M) {  // rows of W: above the diagonal its columns
            T* place = d_k + size_t(i) * C;
            multiply(place, C, Base::M, C, &kOne, 0, {twice + i, 1, size_t(Dp), k_t, C, i},
                     {twice + size_t(i) * Dp + i, size_t(Dp), 1, k_t + size_t(i) * C, C, Dp - i});
        }
        for (int i = 0; i < Dp; ++i)
            for (int j = 0; j < C; j += L) vec(d_k + size_t(i) * C + j) *= vec(end + j);
        multiply(d_k, C, Dp, C, &kOne, 0, {x.at, 1, x.stride, slopes, C, C}, {y.at, 1, y.stride, minus, C, C});
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
        T* d_v = Base::y;
        multiply(d_v, Ep, C, Ep, nullptr, 0, {k.at, k.stride, 1, own->d_state, size_t(Ep), D});
        multiply(d_v, Ep, C, Ep, end, 1, {scores, 1, C, e.at, e.stride, C, Shape::upper});
        for (int l = 0; l < C; ++l) {
            T* to = d_v + size_t(l) * Ep;
            V sum{};
            for (int j = 0; j < Ep; j += L) {
                sum += vec(to + j) * loose(v[l] + j);
                vec(to + j) *= beta[l];
            }
            by_value[l] = added(sum);
            if (l < live) copy(out(m.d_v) + token[l] * E, to, E);
        }
    }
    // The gradients of the states before the chunk.
    void write() {
        for (int l = 0; l < C; ++l) {
            weighted(e[l], Ep, start[l], written + size_t(l) * Ep);
            weighted(x[l], Dp, -start[l], x_decayed + size_t(l) * Dp);
            weighted(y[l], Dp, -start[l], y_decayed + size_t(l) * Dp);
        }
        multiply(own->d_state, Ep, Dp, Ep, &total, 0, {x.at, 1, x.stride, written, size_t(Ep), C});
        multiply(own->d_gram, Dp, Dp, Dp, &total, 0, {x.at, 1, x.stride, y_decayed, size_t(Dp), C},
                 {y.at, 1, y.stride, x_decayed, size_t(Dp), C}, true);
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
        const double first_gate = whole;
        double rest = whole;
        for (int64_t t = begin; t < stop; ++t) rest -= change[t - begin];
        // What is missing where the next segment begins is rounding: shared out.
        const double share = number + 1 < segments ? (own->following - rest) / double(stop - begin) : 0;
        for (int64_t t = begin; t < stop; ++t) {
            out(m.d_g)[(this->b * m.time + t) * m.heads + h] = gamma[t] > 0 ? T(whole) : T(0);
            whole += share - change[t - begin];
        }
        own->following = first_gate;
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
