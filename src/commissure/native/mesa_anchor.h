// Sixteen solves of the Mesa layer from one inverse, in single precision, where the gates are close to 1.
//
//   A_t = z_t (N_t + w_t Lambda),   N_t = gamma_1 H + c Lambda + sum_{i<=t} (beta_i / z_i) k_i k_i^T
//
// for the tokens t of a group, H the state before it, z_t = gamma_2 ... gamma_t, c = z_last^-1/2 and w_t = 1 / z_t - c.
// What forgetting adds to N_t is a multiple of Lambda alone, so that with P = (gamma_1 H + c Lambda)^-1, formed once,
//
//   N_t^-1 = P - sum_{i<=t} f_i f_i^T,   F = L^-1 K P,   L L^T = I + K P K^T       (rows of K: sqrt(beta_i / z_i) k_i)
//
// is causal linear attention, and Chebyshev's semi-iteration with it solves (N_t + w_t Lambda) z_t x_t = q_t: H being
// positive semidefinite, the spectrum of N_t^-1 (N_t + w_t Lambda) lies between 1 and 1 + w_t / c, and the gates alone
// say how many applications of N_t^-1 are needed.  About D^3 / 16 + 2 D^2 operations a token and 2 D^2 + 48 D for each
// application, all of them products of blocks; the same in torch: nn.mesa_solvers, block_rls.
//
// Included by a translation unit compiled once per instruction set: everything is in an unnamed namespace.
#pragma once

#include <cmath>

#include "mesa_lanes.h"

namespace commissure {
namespace {

// Place of a float64 state's element, kept like the factor in columns: L of them, row by row down to their diagonal
// block.
template <class T>
COMMISSURE_INLINE size_t state_place(int i, int j) {
    constexpr int L = Lane<T>::L;
    return size_t(j / L) * (j / L + 1) / 2 * L * L + size_t(i) * L + j % L;
}

// The error, in the norm of A, that Chebyshev's iteration may leave: what single precision loses anyway.
constexpr double kTolerance = 3e-7;
// Applications of N^-1 up to which it loses no more than a factorization a token does.  Measured at D = 128: 9e-7
// (5e-7) with 8, 2.6e-6 with 14, where the weights 1 / z reach 14.
constexpr int kMost = 8;

class Anchor {
    using T = float;
    using V = LaneVec<T>;
    using W = Wide<T>;
    // A product's block in registers: M rows of N vectors.  B: rows that are eliminated together.
    static constexpr int L = Lane<T>::L, M = 2 * kRows, N = 2, B = 8;

   public:
    static constexpr int C = 16;  // tokens of a group; dimensions are padded to it
    static_assert(C % (N * L) == 0 && B % L == 0 && B % M == 0, "groups are whole blocks");

    explicit Anchor(int dim)
        : D(dim), n((dim + C - 1) / C * C), lamb(n), matrix(size_t(n) * n), block(size_t(2 * B) * n),
          scaled_block(block.size()), keys(size_t(C) * n), queries(keys.size()), weighted(keys.size()),
          weighted_t(keys.size()), f(keys.size()), scaled_f(keys.size()), b(keys.size()), x(keys.size()),
          change(keys.size()), r(keys.size()), next(keys.size()), sums(size_t(n) * L) {
        for (int l = 0; l < C; ++l) tokens[l] = T(l);
        for (int count = 1; count <= kMost; ++count) {
            // Chebyshev's error, 2 rho^count, with rho = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), kappa = z_last^-1/2.
            const double rho = std::pow(kTolerance / 2, 1.0 / count);
            least[count] = 4 * std::log((1 - rho) / (1 + rho));
            if (operations(count) < double(D) * D * (D / 3.0 + 3)) most = count;
        }
    }

    // A head, by its Lambda.
    void enter(const T* penalties) {
        for (int i = 0; i < n; ++i) lamb[i] = i < D ? penalties[i] : T(1);
    }
    // Whether a group is cheaper here than token by token; `g` and `beta` of its tokens are `step` apart.
    bool open(const T* g, const T* inputs, int64_t step) {
        double product = 0;
        for (int l = 0; l < C; ++l) {
            if (!(g[l * step] <= 0)) return false;
            if (l > 0) product += double(g[l * step]);
        }
        for (count = 1; count <= most && !(product >= least[count]); ++count) {
        }
        if (count > most) return false;
        product = 1;
        for (int l = 0; l < C; ++l) {
            const double decay = std::exp(double(g[l * step]));
            l == 0 ? first = decay : product *= decay;
            z[l] = product, beta[l] = double(inputs[l * step]);
        }
        return true;
    }
    // Token l's; the next group's lie `away` from them, the solution goes `to`.
    void load(int l, const T* query, const T* key, const T* to, int64_t away) {
        copy(queries + size_t(l) * n, query);
        // The solution there before was as wide as n; where it was not finite, so was what fills up.
        std::memset(queries + size_t(l) * n + D, 0, size_t(n - D) * sizeof(T));
        copy(keys + size_t(l) * n, key);
        // A head's rows lie apart: they are asked for before their time.
        for (int j = 0; j < D; j += 64 / int(sizeof(T))) {
            __builtin_prefetch(query + away + j, 0, 2);
            __builtin_prefetch(key + away + j, 0, 2);
            __builtin_prefetch(to + j, 1, 2);
        }
    }
    void store(int l, T* to) const { copy(to, queries + size_t(l) * n); }

    // The state after the group and its largest row sum; N without the group's keys is left in `matrix`.
    double advance(const Buffer<double>& start, Buffer<double>& end) {
        const double last = z[C - 1], center = 1 / std::sqrt(last);
        const int wide = (D + L - 1) / L * L;
        const W through = W::splat(first * last), once = W::splat(first);
        weigh([&](int l) { return beta[l] * last / z[l]; });
        std::memset(sums, 0, sums.size() * sizeof(T));
        for (int j = 0; j < n; j += N * L) {
            V down[N] = {};
            for (int i = 0; i < j; i += M) grow<false>(i, j, wide, start, end, once, through, down);
            for (int i = j; i < j + N * L; i += M) grow<true>(i, j, wide, start, end, once, through, down);
            for (int s = 0; s < N; ++s)
                for (int l = 0; l < L; ++l) sums[size_t(j + s * L + l) * L] += down[s][l];
        }
        for (int i = 0; i < n; ++i) matrix[size_t(i) * n + i] += T(center * double(lamb[i]));
        return largest_sum();
    }
    // False where a pivot is not a positive number.
    bool solve() {
        if (!invert()) return false;
        mirror();
        weigh([&](int l) { return std::sqrt(beta[l] / z[l]); });
        turn(weighted, weighted_t);
        for (int j = 0; j < n; j += N * L)
            for (int i = 0; i < C; i += M) {
                V c[M][N] = {};
                add(c, weighted + size_t(i) * n, n, 1, matrix + j, n, n);
                put(c, scaled_f + size_t(i) * n + j, n);
            }
        for (int j = 0; j < C; j += N * L)
            for (int i = 0; i < C; i += M) {
                V c[M][N] = {};
                add(c, scaled_f + size_t(i) * n, n, 1, weighted_t + j, C, n);
                put(c, gram + i * C + j, C);
            }
        if (!factor_gram()) return false;
        for (int j = 0; j < n; j += N * L)
            for (int i = 0; i < C; i += M) {
                V c[M][N] = {};
                add(c, gram + i * C, C, 1, scaled_f + j, n, i + M);
                put(c, f + size_t(i) * n + j, n);
            }
        turn(queries, b);
        iterate();
        turn_back(x, queries);
        return true;
    }

   private:
    int D, n, count = 0, most = 0;  // applications of N^-1, and of how many it is the faster way
    double least[kMost + 1];          // the smallest sum of log gates that so many applications are enough for
    double first = 0, z[C], beta[C];  // gamma_1; its successors' products; the input gates
    Buffer<T> lamb, matrix;           // matrix: N_0, upper triangle, then -P, full
    Buffer<T> block, scaled_block;    // rows of it that are being eliminated, and times the pivots' inverse
    Buffer<T> keys, queries;          // [token][element]; the queries' place is taken by the solutions
    Buffer<T> weighted, weighted_t;   // keys with weights; [element][token]
    Buffer<T> f, scaled_f;            // F, and L F
    Buffer<T> b, x, change, r, next;  // [element][token]: queries, solution, its last change, residuals
    Buffer<T> sums;
    alignas(64) T gram[C * C], scores[C * C], tokens[C];

    // A token's.  D = 32, 40, 48, 64, 80, 96, 128 break even with one factorization a token at 3.5, 1.5, 5.2, 6.8, 9.4,
    // 10, 15 applications as measured, and at 2.3, 1.8, 4.3, 6.4, 8.5, 10.6, 14.9 by this count; 16 and 24 never do.
    double operations(int applications) const {
        return double(n) * n * n / C + (applications + 1) * double(n) * (2 * n + 3 * C);
    }
    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static const V& vec(const T* p) { return *reinterpret_cast<const V*>(p); }
    static bool is_positive(T pivot) { return pivot > 0 && pivot <= T(3.4e38); }

    // c[m][s] += sum_n a[row m + step n] b[stride n + s L], s from S on
    template <int S = 0>
    COMMISSURE_INLINE static void add(V (&c)[M][N], const T* a, size_t row, size_t step, const T* b, size_t stride,
                                      int terms) {
        for (int e = 0; e < terms; ++e, a += step, b += stride) {
            V right[N];
            for (int s = S; s < N; ++s) right[s] = vec(b + s * L);
            for (int m = 0; m < M; ++m) {
                const V left = a[row * m] - V{};
                for (int s = S; s < N; ++s) c[m][s] += left * right[s];
            }
        }
    }
    COMMISSURE_INLINE static void put(const V (&c)[M][N], T* to, size_t stride) {
        for (int m = 0; m < M; ++m)
            for (int s = 0; s < N; ++s) vec(to + stride * m + s * L) = c[m][s];
    }
    COMMISSURE_INLINE void copy(T* to, const T* from) const {
        int i = 0;
        for (; i + L <= D; i += L) std::memcpy(to + i, from + i, sizeof(V));
        for (; i < D; ++i) to[i] = from[i];
    }
    // L rows of `from` to columns of `to`.
    COMMISSURE_INLINE static void flip(const T* from, size_t stride, T* to, size_t to_stride) {
        V v[L];
        for (int r = 0; r < L; ++r) v[r] = vec(from + r * stride);
        transpose<T>(v);
        for (int r = 0; r < L; ++r) vec(to + r * to_stride) = v[r];
    }
    void turn(const T* from, T* to) const {
        for (int l = 0; l < C; l += L)
            for (int j = 0; j < n; j += L) flip(from + size_t(l) * n + j, n, to + size_t(j) * C + l, C);
    }
    void turn_back(const T* from, T* to) const {
        for (int l = 0; l < C; l += L)
            for (int j = 0; j < n; j += L) flip(from + size_t(j) * C + l, C, to + size_t(l) * n + j, n);
    }
    template <class Weight>
    void weigh(Weight weight) {
        for (int l = 0; l < C; ++l) {
            const T w = T(weight(l));
            for (int j = 0; j < n; j += L) vec(weighted + size_t(l) * n + j) = vec(keys + size_t(l) * n + j) * w;
        }
    }
    // M rows of N L columns of the state, of N, and their part of the row sums.
    template <bool Diagonal>
    COMMISSURE_INLINE void grow(int i, int j, int wide, const double* start, double* end, const W& once,
                                const W& through, V (&down)[N]) {
        V c[M][N] = {};
        add(c, keys + i, 1, n, weighted + j, n, C);
        alignas(64) T local[M * N * L];
        put(c, local, N * L);
        for (int m = 0; m < M; ++m) {
            V size{};
            for (int s = 0; s < N; ++s) {
                const int row = i + m, column = j + s * L;
                V& to = vec(matrix + size_t(row) * n + column);
                if (column >= wide || (Diagonal && row >= column + L)) {
                    to = V{};
                    continue;
                }
                const size_t place = state_place<T>(row, column);
                const W before = W::load(start + place);
                to = (before * once).narrow();
                W after = before * through;
                after.add(W::from(vec(local + (m * N + s) * L)), 1.0);
                after.store(end + place);
                const V now = after.narrow(), own = now < T(0) ? -now : now;
                size += own;
                if (!Diagonal || row < column) down[s] += own;
            }
            vec(sums + size_t(i + m) * L) += size;
        }
    }
    double largest_sum() const {
        double largest = 0;
        for (int i = 0; i < D; ++i) {
            double sum = 0;
            for (int l = 0; l < L; ++l) sum += double(sums[size_t(i) * L + l]);
            largest = sum > largest ? sum : largest;
        }
        return largest;
    }

    // The matrix becomes minus its inverse: B rows at a time are swept (Gauss and Jordan's elimination, symmetric),
    //   A_pp -> -A_pp^-1,   A_pj -> A_pp^-1 A_pj,   A_ij -> A_ij - A_ip A_pp^-1 A_pj,
    // all of them one update of rank B if the rows' own columns are set to -1 in what is multiplied, and cleared.
    // Two such steps at a time, so that the matrix is read and written once for both.
    bool invert() {
        for (int p = 0; p < n; p += 2 * B) {
            lift(p, 0);
            lift(p + B, 1);
            if (!eliminate(p, 0)) return false;
            // The second rows after the first step, whose part of them is then taken out of it.
            T* second = block + size_t(B) * n;
            for (int j = 0; j < n; j += N * L)
                for (int i = 0; i < B; i += M)
                    update(second + size_t(i) * n + j, block + p + B + i, scaled_block + j, B);
            for (int i = 0; i < B; ++i)
                for (int j = p + B; j < p + 2 * B; j += L)
                    vec(block + size_t(i) * n + j) = vec(scaled_block + size_t(i) * n + j) = V{};
            if (!eliminate(p, 1)) return false;
            for (int j = 0; j < n; j += N * L)
                for (int i = 0; i < j + N * L; i += M)
                    update(matrix + size_t(i) * n + j, block + i, scaled_block + j, 2 * B);
        }
        return true;
    }
    // to += a^T b
    void update(T* to, const T* a, const T* b, int terms) const {
        V c[M][N];
        for (int m = 0; m < M; ++m)
            for (int s = 0; s < N; ++s) c[m][s] = vec(to + size_t(m) * n + s * L);
        add(c, a, 1, n, b, n, terms);
        put(c, to, n);
    }
    // Rows p .. p+B-1, also left of the diagonal, out of the matrix into a half of `block`.
    void lift(int p, int half) {
        T* to = block + size_t(half) * B * n;
        for (int j = 0; j < p; j += L)
            for (int i = 0; i < B; i += L) {
                T* from = matrix + size_t(j) * n + p + i;
                flip(from, n, to + size_t(i) * n + j, n);
                for (int r = 0; r < L; ++r) vec(from + size_t(r) * n) = V{};
            }
        for (int i = 0; i < B; ++i) {
            T *row = matrix + size_t(p + i) * n, *out = to + size_t(i) * n;
            for (int j = p; j < n; j += L) vec(out + j) = vec(row + j), vec(row + j) = V{};
            if (L < B)  // what is below the diagonal is only there within blocks of L
                for (int j = 0; j < i; ++j) out[p + j] = to[size_t(j) * n + p + i];
        }
    }
    bool eliminate(int p, int half) {
        T *own = block + size_t(half) * B * n, *scaled = scaled_block + size_t(half) * B * n;
        alignas(64) T pivots[B][B];
        for (int i = 0; i < B; ++i)
            for (int j = 0; j < B; j += L) {
                V& from = vec(own + size_t(i) * n + p + half * B + j);
                vec(&pivots[i][j]) = from, from = vec(tokens + j) == T(i) ? V{} - T(1) : V{};
            }
        if (!sweep(pivots)) return false;
        for (int j = 0; j < n; j += N * L)
            for (int i = 0; i < B; i += M) {
                V c[M][N] = {};
                add(c, &pivots[i][0], B, 1, own + j, n, B);
                put(c, scaled + size_t(i) * n + j, n);
            }
        return true;
    }
    // Minus the inverse of B rows, in place.
    static bool sweep(T (&rows)[B][B]) {
        constexpr int U = B / L;
        V a[B][U];
        bool good = true;
        for (int i = 0; i < B; ++i)
            for (int u = 0; u < U; ++u) a[i][u] = vec(&rows[i][u * L]);
#pragma GCC unroll 8
        for (int j = 0; j < B; ++j) {
            const T pivot = a[j][j / L][j % L], inverse = 1 / pivot;
            good &= is_positive(pivot);
            V row[U], scaled[U];
            for (int u = 0; u < U; ++u) row[u] = a[j][u], scaled[u] = row[u] * inverse;
#pragma GCC unroll 8
            for (int i = 0; i < B; ++i) {
                const T factor = scaled[i / L][i % L];
                for (int u = 0; u < U; ++u) a[i][u] -= row[u] * factor;
                a[i][j / L][j % L] = factor;
            }
            for (int u = 0; u < U; ++u) a[j][u] = scaled[u];
            a[j][j / L][j % L] = -inverse;
        }
        for (int i = 0; i < B; ++i)
            for (int u = 0; u < U; ++u) vec(&rows[i][u * L]) = a[i][u];
        return good;
    }
    void mirror() {
        for (int i = 0; i < n; i += L)
            for (int j = 0; j < i; j += L) flip(matrix + size_t(j) * n + i, n, matrix + size_t(i) * n + j, n);
    }
    // `gram` = -K P K^T, minus the Gram matrix, becomes -L^-1: [I + K P K^T, I] is eliminated, both in one matrix,
    // where the lower triangle of the second takes the place of that of the first.  Not inlined: it would take
    // registers from the products around it.
    __attribute__((noinline)) bool factor_gram() {
        T pivots[C];
        for (int i = 0; i < C; ++i)
            for (int u = 0; u < C; u += L) {
                V& own = vec(gram + i * C + u);
                own = (vec(tokens + u) == T(i) ? V{} + T(1) : V{}) - own;
            }
        bool good = true;
        for (int j = 0; j < C; ++j) {
            T* row = gram + j * C;
            good &= is_positive(row[j]);
            const T inverse = 1 / (pivots[j] = row[j]);
            V parts[C / L];
            for (int u = 0; u < C / L; ++u)
                parts[u] = vec(tokens + u * L) == T(j) ? V{} + T(1) : vec(row + u * L);
            for (int i = j + 1; i < C; ++i) {
                const T factor = gram[i * C + j] * inverse;
                for (int u = 0; u < C / L; ++u) {
                    V& own = vec(gram + i * C + u * L);
                    own = (vec(tokens + u * L) == T(j) ? V{} : own) - parts[u] * factor;
                }
            }
        }
        for (int i = 0; i < C; ++i) {
            const T scale = -1 / std::sqrt(pivots[i]);
            for (int u = 0; u < C; u += L) {
                V& own = vec(gram + i * C + u);
                own = vec(tokens + u) == T(i) ? V{} + scale : vec(tokens + u) < T(i) ? own * scale : V{};
            }
        }
        return good;
    }

    // Chebyshev's semi-iteration on every token, from zero; everything [element][token].
    void iterate() {
        alignas(64) T tau[C], gain[C], keep[C] = {}, w[C], twice_center[C], square[C], scale[C];
        const double c = 1 / std::sqrt(z[C - 1]);
        for (int l = 0; l < C; ++l) {
            const double added = 1 / z[l] - c;
            w[l] = T(added), twice_center[l] = T(added / c + 2), square[l] = T(0.25 * added * added / (c * c));
            tau[l] = T(2) / twice_center[l], scale[l] = T(1 / z[l]);
        }
        apply<true>(b, r, keep, tau, w);
        T *now = r, *after = next;
        for (int step = 1; step < count; ++step) {
            for (int l = 0; l < C; ++l) {
                const T last = tau[l];
                tau[l] = 1 / (twice_center[l] - square[l] * last);
                keep[l] = square[l] * tau[l] * last, gain[l] = 2 * tau[l];
            }
            apply<false>(now, after, keep, gain, w);
            T* other = now;
            now = after, after = other;
        }
        for (int i = 0; i < n; ++i)
            for (int l = 0; l < C; l += L) vec(x + size_t(i) * C + l) *= vec(scale + l);
    }
    // change = keep change + gain (N^-1 now - x); x += change; after = b - w Lambda x
    template <bool First>
    void apply(const T* now, T* after, const T* keep, const T* gain, const T* w) {
        T *solution = x, *moves = change;
        const T *right = b, *penalty = lamb, *inverse = matrix, *rows = f;
        const int size = n;
        for (int l = 0; l < C; l += N * L) {
            for (int i = 0; i < l + N * L; i += M) {
                V c[M][N] = {};
                const T* left = rows + size_t(i) * size;
                i < l + L ? add<0>(c, left, size, 1, now + l, C, size) : add<1>(c, left, size, 1, now + l, C, size);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    for (int s = 0; s < N; ++s)
                        vec(scores + (i + m) * C + l + s * L) = vec(tokens + l + s * L) >= T(i + m) ? c[m][s] : V{};
            }
            const V keeps[N] = {vec(keep + l), vec(keep + l + L)}, gains[N] = {vec(gain + l), vec(gain + l + L)};
            const V added[N] = {vec(w + l), vec(w + l + L)};
            for (int i = 0; i < size; i += M) {
                V c[M][N] = {};
                add<0>(c, inverse + i, 1, size, now + l, C, size);
                add<0>(c, rows + i, 1, size, scores + l, C, l + L);
                add<1>(c, rows + size_t(l + L) * size + i, 1, size, scores + (l + L) * C + l, C, L);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    for (int s = 0; s < N; ++s) {
                        const size_t place = size_t(i + m) * C + l + s * L;
                        V own, moved;
                        if (First) {
                            own = moved = -gains[s] * c[m][s];
                        } else {
                            own = vec(solution + place);
                            moved = keeps[s] * vec(moves + place) - gains[s] * (c[m][s] + own);
                            own += moved;
                        }
                        vec(moves + place) = moved;
                        vec(solution + place) = own;
                        vec(after + place) = vec(right + place) - added[s] * penalty[i + m] * own;
                    }
            }
        }
    }
};

}  // namespace
}  // namespace commissure
