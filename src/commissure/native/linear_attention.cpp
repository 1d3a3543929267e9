// Gated linear attention (arXiv 2312.06635, section 4) and its gradients, one head after another:
//
//   S_t = gamma_t S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t
//   R_t = q_t e_t^T + gamma_{t+1} R_{t+1}       (e_t the gradient of o_t, R_t that of S_t)
//   dq_t = S_t e_t,   dk_t = beta_t R_t v_t,   dv_t = beta_t R_t^T k_t,   dbeta_t = k_t^T R_t v_t
//
// in chunks: 4 D E + 4 C max(D, E) operations a token.
//
// The backward goes over a head twice: forward in time for the state before every segment of chunks, then back, with
// the states of a segment's chunks made again.  The gradient of log gamma_s sums what crosses s, of four kinds that are
// each exact where a gate is zero: from the chunk's start, to its end, inside it, and through it.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "linear_attention_chunk.h"
#include "mesa_gradients.h"

namespace commissure {
namespace {

// What is kept of one head while others of the group are worked on.
template <class T>
struct Memory {
    Buffer<double> gamma;            // of all tokens
    Buffer<T> state, d_state, kept;  // kept: states before each segment
};

template <class T>
class Heads : Chunk<T> {
    using Base = Chunk<T>;
    using typename Base::V;
    using Base::L, Base::C, Base::kOne, Base::m, Base::D, Base::E, Base::Dp, Base::Ep, Base::chunks, Base::segment;
    using Base::segments, Base::size, Base::gamma, Base::state, Base::k, Base::v, Base::k_room, Base::v_room;
    using Base::written, Base::y, Base::k_t, Base::within, Base::beta, Base::start, Base::end, Base::total, Base::token;
    using Base::live, Base::in, Base::out, Base::vec, Base::gather, Base::decay, Base::rows, Base::copy, Base::prefetch;
    using Base::advance, Base::turn, Base::turn_back, Base::multiply, Base::load, Base::store, Base::end_of;

   public:
    Heads(const AttentionView& view, bool backward)
        : Base(view), q_room(k_room.size()), e_room(backward ? v_room.size() : 0), q_t(backward ? k_room.size() : 0),
          v_t(e_room.size()), e_t(e_room.size()), x_t(q_t.size()), x(q_t.size()), scores(within.size()),
          d_scores(scores.size()), turned(scores.size()), states(backward ? size * size_t(segment) : 0) {
        for (int i = 0; i < m.group; ++i)
            memory[i] = {Buffer<double>(size_t(m.time)), Buffer<T>(size), Buffer<T>(backward ? size : 0),
                         Buffer<T>(backward ? size * size_t(segments) : 0)};
    }

    // A group of heads, a segment of each in turn: their rows share pages, which would be looked up anew for each head.
    void forward(int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) open(first, head);
        for (int64_t number = 0; number < segments; ++number)
            for (int64_t head = first; head < last; ++head) {
                enter(first, head);
                for (int64_t chunk = number * segment; chunk < end_of(number); ++chunk) attend(chunk * C);
            }
        for (int64_t head = first; head < last; ++head) {
            enter(first, head);
            store(out(m.final_state), state, Ep, E);
        }
    }

    void backward(int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) open(first, head);
        for (int64_t number = 0; number < segments; ++number)
            for (int64_t head = first; head < last; ++head) {
                enter(first, head);
                std::memcpy(kept + size * number, state, size * sizeof(T));
                if (number + 1 < segments)
                    for (int64_t chunk = number * segment; chunk < end_of(number); ++chunk) {
                        gather(chunk * C);
                        prefetch(1, m.k, D), prefetch(1, m.v, E);
                        advance();
                    }
            }
        for (int64_t head = first; head < last; ++head) {
            enter(first, head);
            load(d_state, in(m.d_final), Ep, E);
        }
        for (int64_t number = segments - 1; number >= 0; --number)
            for (int64_t head = first; head < last; ++head) {
                enter(first, head);
                retreat_segment(number);
            }
        for (int64_t head = first; head < last; ++head) {
            enter(first, head);
            store(out(m.d_initial), d_state, Ep, E);
        }
    }

   private:
    Memory<T> memory[kGroup];
    T *d_state = nullptr, *kept = nullptr;  // of the head in work
    Rows<T> q, e;                           // e = d_o
    Buffer<T> q_room, e_room;               // [token][element]
    Buffer<T> q_t, v_t, e_t, x_t, x;        // [element][token]; x: a result on its way out
    Buffer<T> scores, d_scores, turned;     // [token][token]
    Buffer<T> states;                       // before each chunk of a segment

    void enter(int64_t first, int64_t index) {
        Memory<T>& own = memory[index - first];
        this->find(index);
        gamma = own.gamma, state = own.state, d_state = own.d_state, kept = own.kept;
    }
    void open(int64_t first, int64_t index) {
        enter(first, index);
        this->open_gates();
        load(state, in(m.initial), Ep, E);
    }
    void attend(int64_t t) {
        gather(t);
        decay(t);
        q = rows(in(m.q), D, Dp, q_room);
        prefetch(1, m.q, D), prefetch(1, m.k, D), prefetch(1, m.v, E);
        turn(k, Dp, k_t);
        multiply(scores, C, C, C, nullptr, 0, {q.at, q.stride, 1, k_t, C, D});
        for (int r = 0; r < C; ++r)
            for (int j = 0; j < C; j += L) vec(scores + r * C + j) *= vec(within + r * C + j) * vec(beta + j);
        multiply(y, Ep, C, Ep, nullptr, 0, {q.at, q.stride, 1, state, size_t(Ep), D});
        multiply(y, Ep, C, Ep, start, 1, {scores, C, 1, v.at, v.stride, C, Shape::lower});
        advance();
        for (int l = 0; l < live; ++l) copy(out(m.o) + token[l] * E, y + size_t(l) * Ep, E);
    }
    void retreat_segment(int64_t number) {
        const int64_t first = number * segment, last = end_of(number);
        std::memcpy(state, kept + size * number, size * sizeof(T));
        for (int64_t chunk = first; chunk < last; ++chunk) {
            std::memcpy(states + size * (chunk - first), state, size * sizeof(T));
            if (chunk + 1 == last) break;
            gather(chunk * C);
            advance();
        }
        for (int64_t chunk = last - 1; chunk >= first; --chunk) retreat(chunk * C, states + size * (chunk - first));
    }

    // Gradients of one chunk from the state before it and the gradient of that after it, which becomes that before it.
    void retreat(int64_t t, const T* before) {
        gather(t);
        decay(t);
        q = rows(in(m.q), D, Dp, q_room);
        e = rows(in(m.d_o), E, Ep, e_room);
        if (t >= segment * C) {
            prefetch(-segment, m.q, D), prefetch(-segment, m.k, D);
            prefetch(-segment, m.v, E), prefetch(-segment, m.d_o, E);
        }
        turn(q, Dp, q_t), turn(k, Dp, k_t), turn(v, Ep, v_t), turn(e, Ep, e_t);
        alignas(64) T arriving[C], leaving[C], crossing[C];
        score(crossing);
        const T through = total * overlap(before, d_state);
        query_gradients(before, arriving);
        key_gradients(leaving);
        value_gradients();
        gate_gradients(arriving, leaving, crossing, through);
        for (int l = 0; l < C; ++l)
            this->weighted(e[l], Ep, start[l], written + size_t(l) * Ep);
        multiply(d_state, Ep, Dp, Ep, &total, 0, {q.at, 1, q.stride, written, size_t(Ep), C});
    }
    // Scores and their gradients, both with decays; what crosses each gate from token to token.
    void score(T* crossing) {
        multiply(scores, C, C, C, nullptr, 0, {q.at, q.stride, 1, k_t, C, D});
        multiply(d_scores, C, C, C, nullptr, 0, {e.at, e.stride, 1, v_t, C, E});
        alignas(64) T later[C] = {};
        for (int s = C - 1; s >= 0; --s) {
            T *own = scores + s * C, *grad = d_scores + s * C;
            for (int j = 0; j < C; j += L) {
                const V decay = vec(within + s * C + j);
                vec(own + j) *= decay;
                vec(later + j) += vec(own + j) * vec(grad + j) * vec(beta + j);
                vec(grad + j) *= decay;
            }
            T total = 0;
            for (int i = 0; i < s; ++i) total += later[i];
            crossing[s] = total;
        }
    }
    T overlap(const T* a, const T* b) const {
        V total[4] = {};
        for (size_t i = 0; i < size; i += 4 * L)
            for (int s = 0; s < 4; ++s) total[s] += vec(a + i + s * L) * vec(b + i + s * L);
        const V all = (total[0] + total[1]) + (total[2] + total[3]);
        T sum = 0;
        for (int l = 0; l < L; ++l) sum += all[l];
        return sum;
    }
    // x_t times `scale`, lane by lane, and the sums over elements of its products with `other`.
    void weigh(const T* scale, const T* other, T* sums) {
        V total[C / L] = {};
        for (int i = 0; i < Dp; ++i)
            for (int s = 0; s < C / L; ++s) {
                V& place = vec(x_t + size_t(i) * C + s * L);
                if (scale) place *= vec(scale + s * L);
                total[s] += place * vec(other + size_t(i) * C + s * L);
            }
        for (int s = 0; s < C / L; ++s) vec(sums + s * L) = total[s];
    }
    void query_gradients(const T* before, T* arriving) {
        multiply(x_t, C, Dp, C, nullptr, 0, {before, size_t(Ep), 1, e_t, C, E});
        weigh(start, q_t, arriving);
        turn({d_scores, C}, C, turned);
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < C; j += L) vec(turned + i * C + j) *= beta[i];
        multiply(x_t, C, Dp, C, &kOne, 0, {k.at, 1, k.stride, turned, C, C});
        emit(out(m.d_q));
    }
    void key_gradients(T* leaving) {
        alignas(64) T total[C];
        multiply(x_t, C, Dp, C, nullptr, 0, {d_state, size_t(Ep), 1, v_t, C, E});
        weigh(end, k_t, leaving);
        for (int l = 0; l < C; ++l) leaving[l] *= beta[l];
        multiply(x_t, C, Dp, C, &kOne, 0, {q.at, 1, q.stride, d_scores, C, C});
        weigh(nullptr, k_t, total);
        for (int l = 0; l < live; ++l) out(m.d_beta)[token[l]] = total[l];
        for (int i = 0; i < Dp; ++i)
            for (int j = 0; j < C; j += L) vec(x_t + size_t(i) * C + j) *= vec(beta + j);
        emit(out(m.d_k));
    }
    void emit(T* to) {
        turn_back(x_t, Dp, x);
        for (int l = 0; l < live; ++l) copy(to + token[l] * D, x + size_t(l) * Dp, D);
    }
    void value_gradients() {
        multiply(y, Ep, C, Ep, nullptr, 0, {k.at, k.stride, 1, d_state, size_t(Ep), D});
        multiply(y, Ep, C, Ep, end, 1, {scores, 1, C, e.at, e.stride, C, Shape::upper});
        for (int l = 0; l < live; ++l) {
            T* row = y + size_t(l) * Ep;
            for (int j = 0; j < Ep; j += L) vec(row + j) *= beta[l];
            copy(out(m.d_v) + token[l] * E, row, E);
        }
    }
    void gate_gradients(const T* arriving, const T* leaving, const T* crossing, T through) {
        T before[C], sum = 0;
        for (int s = 0; s < C; ++s) before[s] = sum, sum += leaving[s];
        sum = 0;
        for (int s = C - 1; s >= 0; --s) {
            sum += arriving[s];
            if (s < live) out(m.d_g)[token[s]] = sum + before[s] + crossing[s] + through;
        }
    }
};

// Work on groups of heads until none is left.
template <class Work>
void take(AttentionView& m, const Work& work) {
    const int64_t all = m.batch * m.heads;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&m.next, m.group, __ATOMIC_RELAXED);
        if (first >= all) return;
        work(first, first + m.group < all ? first + m.group : all);
    }
}
template <class T>
void forward(AttentionView& m) {
    Heads<T> heads(m, false);
    take(m, [&](int64_t first, int64_t last) { heads.forward(first, last); });
}
template <class T>
void backward(AttentionView& m) {
    Heads<T> heads(m, true);
    take(m, [&](int64_t first, int64_t last) { heads.backward(first, last); });
}
template <class T>
void mesa_gradients(AttentionView& m) {
    MesaHeads<T> heads(m);
    take(m, [&](int64_t first, int64_t last) { heads.backward(first, last); });
}
void forward_any(AttentionView& m, bool single) { single ? forward<float>(m) : forward<double>(m); }
void backward_any(AttentionView& m, bool single) { single ? backward<float>(m) : backward<double>(m); }
void mesa_any(AttentionView& m, bool single) { single ? mesa_gradients<float>(m) : mesa_gradients<double>(m); }

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

const AttentionKernel COMMISSURE_JOIN(attention_kernel, COMMISSURE_CLONE) = {forward_any, backward_any, mesa_any};

}  // namespace commissure
