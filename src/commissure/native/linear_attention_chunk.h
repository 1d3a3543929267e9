// One chunk of gated linear attention and the state it leaves: what the kernels over heads are made of.
//
// Chunks are so short that their own triangle is a small part of the work, and the state stays in the nearest cache.
// Decays inside a chunk are products of its gates, in float64: nothing is divided, so that gates of zero and products
// that underflow are exact.  Products are of two shapes: vectors over the elements of a row, or, where a state is
// contracted over those, vectors over the chunk's tokens, so that no state is ever transposed.
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

// Rows of elements of a chunk's tokens.
template <class T>
struct Rows {
    const T* at;
    size_t stride;
    const T* operator[](int l) const { return at + stride * size_t(l); }
};

template <class T>
class Chunk {
   protected:
    static constexpr int L = Lane<T>::L, C = kChunk, M = kBlockRows, N = kBlockVectors;
    static_assert(C % (N * L) == 0 && C % M == 0, "chunks are whole blocks");
    using V = LaneVec<T>;
    using W = Wide<T>;
    typedef T Loose __attribute__((vector_size(sizeof(V)), aligned(sizeof(T)), may_alias));  // anywhere in memory

    explicit Chunk(const AttentionView& view)
        : m(view), D(int(m.dim)), E(int(m.value_dim)), Dp(padded_to_chunk(D)), Ep(padded_to_chunk(E)),
          chunks((m.time + C - 1) / C), segment(Dp / C > kSegment ? Dp / C : kSegment),
          segments((chunks + segment - 1) / segment), size(size_t(Dp) * Ep), k_room(size_t(C) * Dp),
          v_room(size_t(C) * Ep), written(v_room.size()), y(v_room.size()), k_t(k_room.size()), within(size_t(C) * C) {}

    const AttentionView& m;
    int D, E, Dp, Ep;
    int64_t chunks, segment, segments;
    size_t size;                                     // of a state
    int64_t head = 0, b = 0, h = 0;                  // the one in work: index into [B,H], batch, head
    double* gamma = nullptr;                         // its gates, of all tokens
    T* state = nullptr;                              // before the chunk in work
    Rows<T> k, v;
    Buffer<T> k_room, v_room, written, y;            // [token][element]; written = beta v decayed to the end
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
    static V loose(const T* p) { return *reinterpret_cast<const Loose*>(p); }

    void find(int64_t index) { head = index, b = index / m.heads, h = index % m.heads; }
    void open_gates() {
        for (int64_t t = 0; t < m.time; ++t) gamma[t] = std::exp(m.g[(b * m.time + t) * m.heads + h]);
    }
    int64_t end_of(int64_t number) const { return number + 1 < segments ? (number + 1) * segment : chunks; }
    // A state of the head in work, between [B,H,D,columns] and rows of `width` with zeros after the last.
    void load(T* to, const T* from, int width, int columns) const {
        std::memset(to, 0, size_t(Dp) * width * sizeof(T));
        for (int i = 0; i < D; ++i) copy(to + size_t(i) * width, from + (size_t(head) * D + i) * columns, columns);
    }
    void store(T* to, const T* from, int width, int columns) const {
        for (int i = 0; i < D; ++i) copy(to + (size_t(head) * D + i) * columns, from + size_t(i) * width, columns);
    }
    // The chunk's keys, values and decays to its end; tokens after the last write nothing and forget nothing.
    void gather(int64_t t) {
        live = int(m.time - t < C ? m.time - t : C);
        for (int l = 0; l < C; ++l) {
            token[l] = (b * m.time + t + l) * m.heads + h;
            beta[l] = l < live ? (m.beta ? in(m.beta)[token[l]] : T(1)) : T(0);
        }
        k = rows(in(m.k), D, Dp, k_room);
        v = rows(in(m.v), E, Ep, v_room);
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
    // Where they are, or, where something is missing to whole chunks, a copy padded with zeros.
    Rows<T> rows(const T* from, int n, int width, T* room) const {
        if (live == C && n == width) return {from + token[0] * n, size_t(m.heads * n)};
        for (int l = 0; l < live; ++l) copy(room + size_t(l) * width, from + token[l] * n, n);
        if (live < C) std::memset(room + size_t(live) * width, 0, size_t(C - live) * width * sizeof(T));
        return {room, size_t(width)};
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
            weighted(v[l], Ep, weight, written + size_t(l) * Ep);
        }
        multiply(state, Ep, Dp, Ep, &total, 0, {k.at, 1, k.stride, written, size_t(Ep), C});
    }
    static void weighted(const T* from, int n, T weight, T* to) {
        for (int j = 0; j < n; j += L) vec(to + j) = loose(from + j) * weight;
    }
    // [token][element] to [element][token]
    static void turn(Rows<T> from, int width, T* to) {
        for (int l = 0; l < C; l += L)
            for (int j = 0; j < width; j += L) {
                V block[L];
                for (int r = 0; r < L; ++r) block[r] = loose(from[l + r] + j);
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

    COMMISSURE_INLINE static void accumulate(V (&c)[M][N], int i, int j, const Product<T>& p) {
        const int from = p.shape == Shape::upper ? i : 0;
        const int to = p.shape == Shape::lower && i + M < p.count ? i + M : p.count;
        const T *a = p.a + p.row * i + p.step * from, *b = p.b + p.stride * from + j;
        for (int n = from; n < to; ++n, a += p.step, b += p.stride) {
            V right[N];
            for (int s = 0; s < N; ++s) right[s] = loose(b + s * L);
            for (int r = 0; r < M; ++r) {
                const V left = a[p.row * r] - V{};
                for (int s = 0; s < N; ++s) c[r][s] += left * right[s];
            }
        }
    }
    // result[m][j] = scale[each * m] result[m][j] + products, result not read where scale is null; where it is
    // symmetric, its upper triangle, in whole blocks.
    COMMISSURE_INLINE static void multiply(T* result, int width, int n_rows, int columns, const T* scale, int each,
                                           Product<T> p, Product<T> more = {}, bool is_symmetric = false) {
        for (int j = 0; j < columns; j += N * L)
            for (int i = 0; i < n_rows && (!is_symmetric || i < j + N * L); i += M) {
                V c[M][N] = {};
                accumulate(c, i, j, p);
                if (more.count) accumulate(c, i, j, more);
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
