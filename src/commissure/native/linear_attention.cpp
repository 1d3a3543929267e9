// Gated linear attention (arXiv 2312.06635, section 4) and its gradients, one head after another:
//
//   S_t = gamma_t S_{t-1} + beta_t k_t v_t^T,   o_t = S_t^T q_t
//   R_t = q_t e_t^T + gamma_{t+1} R_{t+1}       (e_t the gradient of o_t, R_t that of S_t)
//   dq_t = S_t e_t,   dk_t = beta_t R_t v_t,   dv_t = beta_t R_t^T k_t,   dbeta_t = k_t^T R_t v_t
//
// in chunks so short that their own triangle is a small part of the work: 4 D E + 4 C max(D, E) operations a token.  The
// state stays in the first-level cache.  Decays inside a chunk are products of its gates, in float64: nothing is divided,
// so that gates of zero and products that underflow are exact.
//
// The backward goes over a head twice: forward in time for the state before every segment of chunks, then back, with the
// states of a segment's chunks made again.  The gradient of log gamma_s sums what crosses s, of four kinds that are each
// exact where a gate is zero: from the chunk's start, to its end, inside it, and through it.
//
// Products are of two shapes: vectors over the values' elements, or, where a state is contracted over those, vectors over
// the chunk's tokens, so that no state is ever transposed.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "linear_attention.h"

#include <cmath>

#include "mesa_lanes.h"

namespace commissure {
namespace {

constexpr int kChunk = 16;         // tokens; also what dimensions are padded to
constexpr int kSegment = 4;        // chunks between two states that are kept, at least
constexpr int kBlockRows = 2 * kRows, kBlockVectors = 2;  // of a product's block in registers

int padded_to_chunk(int64_t n) { return int((n + kChunk - 1) / kChunk * kChunk); }

// The factors of sum_n a[row * m + step * n] b[stride * n + j]; in a triangle some n contribute nothing to some rows m.
enum class Shape { full, lower, upper };
template <class T>
struct Product {
    const T* a;
    size_t row, step;
    const T* b;
    size_t stride;
    int count;
    Shape shape = Shape::full;
};

// What is kept of one head while others of the group are worked on.
template <class T>
struct Memory {
    Buffer<double> gamma;            // of all tokens
    Buffer<T> state, d_state, kept;  // kept: states before each segment
};

template <class T>
class Heads {
    static constexpr int L = Lane<T>::L, C = kChunk, M = kBlockRows, N = kBlockVectors;
    static_assert(C % (N * L) == 0 && C % M == 0, "chunks are whole blocks");
    using V = LaneVec<T>;
    using W = Wide<T>;

   public:
    Heads(const AttentionView& view, bool backward)
        : m(view), D(int(m.dim)), E(int(m.value_dim)), Dp(padded_to_chunk(D)), Ep(padded_to_chunk(E)),
          chunks((m.time + C - 1) / C), segment(Dp / C > kSegment ? Dp / C : kSegment),
          segments((chunks + segment - 1) / segment), size(size_t(Dp) * Ep),
          q(size_t(C) * Dp), k(q.size()), v(size_t(C) * Ep), e(backward ? v.size() : 0), written(v.size()),
          y(v.size()), k_t(q.size()), q_t(backward ? q.size() : 0), v_t(backward ? v.size() : 0), e_t(v_t.size()),
          x_t(backward ? q.size() : 0), x(x_t.size()), scores(size_t(C) * C), d_scores(scores.size()),
          turned(scores.size()), within(scores.size()), states(backward ? size * size_t(segment) : 0) {
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
            store_state(out(m.final_state), state);
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
            load_state(d_state, in(m.d_final));
        }
        for (int64_t number = segments - 1; number >= 0; --number)
            for (int64_t head = first; head < last; ++head) {
                enter(first, head);
                retreat_segment(number);
            }
        for (int64_t head = first; head < last; ++head) {
            enter(first, head);
            store_state(out(m.d_initial), d_state);
        }
    }

   private:
    const AttentionView& m;
    int D, E, Dp, Ep;
    int64_t chunks, segment, segments;
    size_t size;                                  // of a state
    Memory<T> memory[kGroup];
    int64_t head = 0, b = 0, h = 0;               // the one in work: index into [B,H], batch, head
    double* gamma = nullptr;                      // its memory
    T *state = nullptr, *d_state = nullptr, *kept = nullptr;
    Buffer<T> q, k, v, e, written, y;             // [token][element]; e = d_o, written = beta v decayed to the end
    Buffer<T> k_t, q_t, v_t, e_t, x_t, x;         // [element][token]; x: a result on its way out
    Buffer<T> scores, d_scores, turned, within;   // [token][token], within[t][i] = gamma_{i+1} ... gamma_t
    Buffer<T> states;                             // before each chunk of a segment
    alignas(64) T beta[C], start[C], end[C], total;  // decay from the chunk's start to each token, from each to its end
    int64_t token[C];                             // index into [B,T,H]
    int live = 0;                                 // tokens in this chunk

    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static T* out(void* p) { return static_cast<T*>(p); }
    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static const V& vec(const T* p) { return *reinterpret_cast<const V*>(p); }

    void enter(int64_t first, int64_t index) {
        Memory<T>& own = memory[index - first];
        head = index, b = index / m.heads, h = index % m.heads;
        gamma = own.gamma, state = own.state, d_state = own.d_state, kept = own.kept;
    }
    void open(int64_t first, int64_t index) {
        enter(first, index);
        for (int64_t t = 0; t < m.time; ++t) gamma[t] = std::exp(m.g[(b * m.time + t) * m.heads + h]);
        load_state(state, in(m.initial));
    }
    int64_t end_of(int64_t number) const { return number + 1 < segments ? (number + 1) * segment : chunks; }
    void load_state(T* to, const T* from) {
        std::memset(to, 0, size * sizeof(T));
        for (int i = 0; i < D; ++i) copy(to + size_t(i) * Ep, from + (size_t(head) * D + i) * E, E);
    }
    void store_state(T* to, const T* from) {
        for (int i = 0; i < D; ++i) copy(to + (size_t(head) * D + i) * E, from + size_t(i) * Ep, E);
    }

    void attend(int64_t t) {
        gather(t);
        decay(t);
        rows(q, Dp, in(m.q), D);
        prefetch(1, m.q, D), prefetch(1, m.k, D), prefetch(1, m.v, E);
        turn(k, Dp, k_t);
        multiply(scores, C, C, C, nullptr, 0, {q, size_t(Dp), 1, k_t, C, D});
        for (int r = 0; r < C; ++r)
            for (int j = 0; j < C; j += L) vec(scores + r * C + j) *= vec(within + r * C + j) * vec(beta + j);
        multiply(y, Ep, C, Ep, nullptr, 0, {q, size_t(Dp), 1, state, size_t(Ep), D});
        multiply(y, Ep, C, Ep, start, 1, {scores, C, 1, v, size_t(Ep), C, Shape::lower});
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

    // The chunk's keys, values and decays to its end; tokens after the last write nothing and forget nothing.
    void gather(int64_t t) {
        live = int(m.time - t < C ? m.time - t : C);
        for (int l = 0; l < C; ++l) {
            token[l] = (b * m.time + t + l) * m.heads + h;
            beta[l] = l < live ? (m.beta ? in(m.beta)[token[l]] : T(1)) : T(0);
        }
        rows(k, Dp, in(m.k), D);
        rows(v, Ep, in(m.v), E);
        double product = 1;
        for (int l = C - 1; l >= 0; --l) {
            end[l] = T(product);
            if (l < live) product *= gamma[t + l];
        }
        total = T(product);
    }
    // The decays from its start and inside it.
    void decay(int64_t t) {
        alignas(64) double line[C] = {};
        double product = 1;
        for (int l = 0; l < C; ++l) {
            const double own = l < live ? gamma[t + l] : 1;
            start[l] = T(product *= own);
            for (int i = 0; i < C; i += L) {
                const W now = W::load(line + i) * W::splat(own);
                now.store(line + i);
                vec(within + l * C + i) = now.narrow();
            }
            line[l] = within[l * C + l] = 1;
        }
    }
    void rows(T* to, int width, const T* from, int n) {
        for (int l = 0; l < live; ++l) copy(to + size_t(l) * width, from + token[l] * n, n);
        if (live < C) std::memset(to + size_t(live) * width, 0, size_t(C - live) * width * sizeof(T));
    }
    COMMISSURE_INLINE static void copy(T* to, const T* from, int n) {
        int i = 0;
        for (; i + L <= n; i += L) std::memcpy(to + i, from + i, sizeof(V));
        for (; i < n; ++i) to[i] = from[i];
    }
    // A head's rows lie apart: the next chunk's are asked for while this one is worked on.
    void prefetch(int64_t chunks_away, const void* array, int n) const {
        const int64_t away = chunks_away * C * m.heads * n;
        if (!array) return;
        for (int l = 0; l < live; ++l)
            for (int i = 0; i < n; i += 64 / int(sizeof(T)))
                __builtin_prefetch(in(array) + token[l] * n + away + i, 0, 2);
    }
    // The state after the chunk.
    void advance() {
        for (int l = 0; l < C; ++l) {
            const T weight = beta[l] * end[l];
            for (int j = 0; j < Ep; j += L) vec(written + size_t(l) * Ep + j) = vec(v + size_t(l) * Ep + j) * weight;
        }
        multiply(state, Ep, Dp, Ep, &total, 0, {k, 1, size_t(Dp), written, size_t(Ep), C});
    }
    // [token][element] to [element][token]
    void turn(const T* from, int width, T* to) {
        for (int l = 0; l < C; l += L)
            for (int j = 0; j < width; j += L) {
                V block[L];
                for (int r = 0; r < L; ++r) block[r] = vec(from + size_t(l + r) * width + j);
                transpose<T>(block);
                for (int r = 0; r < L; ++r) vec(to + size_t(j + r) * C + l) = block[r];
            }
    }
    void turn_back(const T* from, int width, T* to) {
        for (int l = 0; l < C; l += L)
            for (int j = 0; j < width; j += L) {
                V block[L];
                for (int r = 0; r < L; ++r) block[r] = vec(from + size_t(j + r) * C + l);
                transpose<T>(block);
                for (int r = 0; r < L; ++r) vec(to + size_t(l + r) * width + j) = block[r];
            }
    }

    // result[m][j] = scale[each * m] result[m][j] + product, result not read where scale is null.
    static void multiply(T* result, int width, int n_rows, int columns, const T* scale, int each, Product<T> p) {
        for (int j = 0; j < columns; j += N * L)
            for (int i = 0; i < n_rows; i += M) {
                const int from = p.shape == Shape::upper ? i : 0;
                const int to = p.shape == Shape::lower && i + M < p.count ? i + M : p.count;
                V c[M][N] = {};
                const T *a = p.a + p.row * i + p.step * from, *b = p.b + p.stride * from + j;
                for (int n = from; n < to; ++n, a += p.step, b += p.stride) {
                    V right[N];
                    for (int s = 0; s < N; ++s) right[s] = vec(b + s * L);
                    for (int r = 0; r < M; ++r) {
                        const V left = a[p.row * r] - V{};
                        for (int s = 0; s < N; ++s) c[r][s] += left * right[s];
                    }
                }
                T* to_row = result + size_t(i) * width + j;
                for (int r = 0; r < M; ++r) {
                    const T kept = scale ? scale[(i + r) * each] : T(0);
                    for (int s = 0; s < N; ++s) {
                        V& place = vec(to_row + size_t(r) * width + s * L);
                        place = scale ? c[r][s] + place * kept : c[r][s];
                    }
                }
            }
    }

    // Gradients of one chunk from the state before it and the gradient of that after it, which becomes that before it.
    void retreat(int64_t t, const T* before) {
        gather(t);
        decay(t);
        rows(q, Dp, in(m.q), D);
        rows(e, Ep, in(m.d_o), E);
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
            for (int j = 0; j < Ep; j += L) vec(written + size_t(l) * Ep + j) = vec(e + size_t(l) * Ep + j) * start[l];
        multiply(d_state, Ep, Dp, Ep, &total, 0, {q, 1, size_t(Dp), written, size_t(Ep), C});
    }
    // Scores and their gradients, both with decays; what crosses each gate from token to token.
    void score(T* crossing) {
        multiply(scores, C, C, C, nullptr, 0, {q, size_t(Dp), 1, k_t, C, D});
        multiply(d_scores, C, C, C, nullptr, 0, {e, size_t(Ep), 1, v_t, C, E});
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
    static constexpr T kOne = 1;
    void query_gradients(const T* before, T* arriving) {
        multiply(x_t, C, Dp, C, nullptr, 0, {before, size_t(Ep), 1, e_t, C, E});
        weigh(start, q_t, arriving);
        if (!m.d_q) return;
        turn(d_scores, C, turned);
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < C; j += L) vec(turned + i * C + j) *= beta[i];
        multiply(x_t, C, Dp, C, &kOne, 0, {k, 1, size_t(Dp), turned, C, C});
        emit(out(m.d_q));
    }
    void key_gradients(T* leaving) {
        alignas(64) T total[C];
        multiply(x_t, C, Dp, C, nullptr, 0, {d_state, size_t(Ep), 1, v_t, C, E});
        weigh(end, k_t, leaving);
        for (int l = 0; l < C; ++l) leaving[l] *= beta[l];
        multiply(x_t, C, Dp, C, &kOne, 0, {q, 1, size_t(Dp), d_scores, C, C});
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
        multiply(y, Ep, C, Ep, nullptr, 0, {k, size_t(Dp), 1, d_state, size_t(Ep), D});
        multiply(y, Ep, C, Ep, end, 1, {scores, 1, C, e, size_t(Ep), C, Shape::upper});
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

template <class T>
void run(AttentionView& m, bool backward) {
    Heads<T> heads(m, backward);
    const int64_t all = m.batch * m.heads;
    for (;;) {
        const int64_t first = __atomic_fetch_add(&m.next, m.group, __ATOMIC_RELAXED);
        if (first >= all) return;
        const int64_t last = first + m.group < all ? first + m.group : all;
        backward ? heads.backward(first, last) : heads.forward(first, last);
    }
}
void forward_any(AttentionView& m, bool single) { single ? run<float>(m, false) : run<double>(m, false); }
void backward_any(AttentionView& m, bool single) { single ? run<float>(m, true) : run<double>(m, true); }

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

const AttentionKernel COMMISSURE_JOIN(attention_kernel, COMMISSURE_CLONE) = {forward_any, backward_any};

}  // namespace commissure
