// One chunk of gated linear attention and the state it leaves: what the kernels over heads are made of.
//
// Chunks are so short that their own triangle is a small part of the work, and the state stays in the first-level cache.
// Decays inside a chunk are products of its gates, in float64: nothing is divided, so that gates of zero and products that
// underflow are exact.  Products are of two shapes: vectors over the elements of a row, or, where a state is contracted over
// those, vectors over the chunk's tokens, so that no state is ever transposed.
//
// Included by translation units compiled once per instruction set: everything is in an unnamed namespace.
#pragma once

#include <cmath>

#include "linear_attention.h"
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

template <class T>
class Chunk {
   protected:
    static constexpr int L = Lane<T>::L, C = kChunk, M = kBlockRows, N = kBlockVectors;
    static_assert(C % (N * L) == 0 && C % M == 0, "chunks are whole blocks");
    using V = LaneVec<T>;
    using W = Wide<T>;

    explicit Chunk(const AttentionView& view)
        : m(view), D(int(m.dim)), E(int(m.value_dim)), Dp(padded_to_chunk(D)), Ep(padded_to_chunk(E)),
          chunks((m.time + C - 1) / C), segment(Dp / C > kSegment ? Dp / C : kSegment),
          segments((chunks + segment - 1) / segment), size(size_t(Dp) * Ep), k(size_t(C) * Dp), v(size_t(C) * Ep),
          written(v.size()), y(v.size()), k_t(k.size()), within(size_t(C) * C) {}

    const AttentionView& m;
    int D, E, Dp, Ep;
    int64_t chunks, segment, segments;
    size_t size;                                     // of a state
    int64_t head = 0, b = 0, h = 0;                  // the one in work: index into [B,H], batch, head
    double* gamma = nullptr;                         // its gates, of all tokens
    T* state = nullptr;                              // before the chunk in work
    Buffer<T> k, v, written, y;                      // [token][element]; written = beta v decayed to the end
    Buffer<T> k_t;                                   // [element][token]
    Buffer<T> within;                                // [token][token], within[t][i] = gamma_{i+1} ... gamma_t
    alignas(64) T beta[C], start[C], end[C], total;  // decay from the chunk's start to each token, from each to its end
    int64_t token[C];                                // index into [B,T,H]
    int live = 0;                                    // tokens in this chunk

    static constexpr T kOne = 1;
    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static T* out(void* p) { return static_cast<T*>(p); }
    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static const V& vec(const T* p) { return *reinterpret_cast<const V*>(p); }

    void find(int64_t index) { head = index, b = index / m.heads, h = index % m.heads; }
    void open_gates() {
        for (int64_t t = 0; t < m.time; ++t) gamma[t] = std::exp(m.g[(b * m.time + t) * m.heads + h]);
    }
    int64_t end_of(int64_t number) const { return number + 1 < segments ? (number + 1) * segment : chunks; }
    void load_state(T* to, const T* from) {
        std::memset(to, 0, size * sizeof(T));
        for (int i = 0; i < D; ++i) copy(to + size_t(i) * Ep, from + (size_t(head) * D + i) * E, E);
    }
    void store_state(T* to, const T* from) const {
        for (int i = 0; i < D; ++i) copy(to + (size_t(head) * D + i) * E, from + size_t(i) * Ep, E);
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

    // result[m][j] = scale[each * m] result[m][j] + product, result not read where scale is null; where it is symmetric,
    // its upper triangle, in whole blocks.
    COMMISSURE_INLINE static void multiply(T* result, int width, int n_rows, int columns, const T* scale, int each, Product<T> p,
                         bool is_symmetric = false) {
        for (int j = 0; j < columns; j += N * L)
            for (int i = 0; i < n_rows && (!is_symmetric || i < j + N * L); i += M) {
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
};

}  // namespace
}  // namespace commissure
