// Sixteen solves of the Mesa layer from one inverse, in single precision, where the gates are close to 1.
//
//   A_t = z_t (N_t + w_t Lambda),   N_t = gamma_1 H + c Lambda + sum_{i<=t} (beta_i / z_i) k_i k_i^T,   w_t = 1 / z_t - c
//
// for the tokens t of a group, H the state before it, z_t = gamma_2 ... gamma_t and c = z_last^-1/2.  What forgetting
// adds to N_t is a multiple of Lambda alone, so that with P = (gamma_1 H + c Lambda)^-1, formed once for the group,
//
//   N_t^-1 = P - sum_{i<=t} f_i f_i^T,   F = L^-1 K P,   L L^T = I + K P K^T       (rows of K: sqrt(beta_i / z_i) k_i)
//
// is causal linear attention, and Chebyshev's semi-iteration with it solves (N_t + w_t Lambda) z_t x_t = q_t: H being
// positive semidefinite, the spectrum of N_t^-1 (N_t + w_t Lambda) lies between 1 and 1 + w_t / c, and the gates alone
// say how many applications of N_t^-1 are needed.  About D^3 / 16 + 2 D^2 operations a token and 2 D^2 + 64 D for each
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
        : D(dim), n((dim + C - 1) / C * C), lamb(n), matrix(size_t(n) * n), block(size_t(B) * n), scaled_block(block.size()),
          keys(size_t(C) * n), queries(keys.size()), weighted(keys.size()), weighted_t(keys.size()), f(keys.size()),
          scaled_f(keys.size()), b(keys.size()), x(keys.size()), change(keys.size()), r(keys.size()), next(keys.size()),
          sums(size_t(n) * L) {
        for (int count = 1; count <= kMost; ++count) {
            // Chebyshev's error, 2 rho^count, with rho = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), kappa = z_last^-1/2.
            const double rho = std::pow(kTolerance / 2, 1.0 / count);
            least[count] = 4 * std::log((1 - rho) / (1 + rho));
        }
    }

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
        for (count = 1; count <= kMost && !(product >= least[count]); ++count) {
        }
        if (count > kMost) return false;
        product = 1;
        for (int l = 0; l < C; ++l) {
            const double decay = std::exp(double(g[l * step]));
            l == 0 ? first = decay : product *= decay;
            z[l] = product, beta[l] = double(inputs[l * step]);
        }
        return true;
    }
    void load(int l, const T* query, const T* key) {
        std::memcpy(queries + size_t(l) * n, query, D * sizeof(T));
        std::memcpy(keys + size_t(l) * n, key, D * sizeof(T));
    }
    void store(int l, T* to) const { std::memcpy(to, queries + size_t(l) * n, D * sizeof(T)); }

    // The state after the group and its largest row sum; N without the group's keys is left in `matrix`.
    double advance(const Buffer<double>& start, Buffer<double>& end) {
        const double last = z[C - 1], center = 1 / std::sqrt(last);
        const int wide = (D + L - 1) / L * L;
        const W through = W::splat(first * last), once = W::splat(first);
        weigh([&](int l) { return beta[l] * last / z[l]; });
        std::memset(sums, 0, sums.size() * sizeof(T));
        for (int j = 0; j < n; j += N * L) {
            V down[N] = {};
            for (int i = 0; i < j + N * L; i += M) {
                V c[M][N] = {};
                add(c, keys + i, 1, n, weighted + j, n, C);
                for (int r = 0; r < M; ++r)
                    for (int s = 0; s < N; ++s) {
                        const int row = i + r, column = j + s * L;
                        V& to = vec(matrix + size_t(row) * n + column);
                        to = V{};
                        if (column >= wide || row >= column + L) continue;
                        const size_t place = state_place<T>(row, column);
                        const W before = W::load(start + place);
                        to = (before * once).narrow();
                        W after = before * through;
                        after.add(W::from(c[r][s]), 1.0);
                        after.store(end + place);
                        const V now = after.narrow(), size = now < T(0) ? -now : now;
                        vec(sums + size_t(row) * L) += size;
                        if (row < column) down[s] += size;
                    }
            }
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
    int D, n, count = 0;
    double least[kMost + 1];          // the smallest sum of log gates that so many applications are enough for
    double first = 0, z[C], beta[C];  // gamma_1; its successors' products; the input gates
    Buffer<T> lamb, matrix;           // matrix: N_0, upper triangle, then -P, full
    Buffer<T> block, scaled_block;    // rows of it that are being eliminated, and times the pivots' inverse
    Buffer<T> keys, queries;          // [token][element]; the queries' place is taken by the solutions
    Buffer<T> weighted, weighted_t;   // keys with weights; [element][token]
    Buffer<T> f, scaled_f;            // F, and L F
    Buffer<T> b, x, change, r, next;  // [element][token]: queries, solution, its last change, residuals
    Buffer<T> sums;
    alignas(64) T gram[C * C], scores[C * C];

    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static const V& vec(const T* p) { return *reinterpret_cast<const V*>(p); }
    static bool is_positive(T pivot) { return pivot > 0 && pivot <= T(3.4e38); }

    // c[m][s] += sum_n a[row m + step n] b[stride n + s L]
    COMMISSURE_INLINE static void add(V (&c)[M][N], const T* a, size_t row, size_t step, const T* b, size_t stride,
                                      int terms) {
        for (int e = 0; e < terms; ++e, a += step, b += stride) {
            V right[N];
            for (int s = 0; s < N; ++s) right[s] = vec(b + s * L);
            for (int m = 0; m < M; ++m) {
                const V left = a[row * m] - V{};
                for (int s = 0; s < N; ++s) c[m][s] += left * right[s];
            }
        }
    }
    COMMISSURE_INLINE static void put(const V (&c)[M][N], T* to, size_t stride) {
        for (int m = 0; m < M; ++m)
            for (int s = 0; s < N; ++s) vec(to + stride * m + s * L) = c[m][s];
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
    bool invert() {
        for (int p = 0; p < n; p += B) {
            T pivots[B][B];
            for (int j = 0; j < p; j += L)
                for (int i = 0; i < B; i += L) {
                    flip(matrix + size_t(j) * n + p + i, n, block + size_t(i) * n + j, n);
                    for (int r = 0; r < L; ++r) vec(matrix + size_t(j + r) * n + p + i) = V{};
                }
            for (int i = 0; i < B; ++i) {
                T* row = matrix + size_t(p + i) * n;
                for (int j = 0; j < B; ++j) pivots[i][j] = i <= j ? row[p + j] : matrix[size_t(p + j) * n + p + i];
                for (int j = p; j < n; j += L) vec(block + size_t(i) * n + j) = vec(row + j);
                for (int j = 0; j < B; ++j) block[size_t(i) * n + p + j] = T(i == j ? -1 : 0);
            }
            for (int i = 0; i < B; ++i)
                for (int j = p; j < n; j += L) vec(matrix + size_t(p + i) * n + j) = V{};
            if (!sweep(pivots)) return false;
            for (int j = 0; j < n; j += N * L)
                for (int i = 0; i < B; i += M) {
                    V c[M][N] = {};
                    add(c, &pivots[i][0], B, 1, block + j, n, B);
                    put(c, scaled_block + size_t(i) * n + j, n);
                }
            for (int j = 0; j < n; j += N * L)
                for (int i = 0; i < j + N * L; i += M) {
                    T* to = matrix + size_t(i) * n + j;
                    V c[M][N];
                    for (int m = 0; m < M; ++m)
                        for (int s = 0; s < N; ++s) c[m][s] = vec(to + size_t(m) * n + s * L);
                    add(c, block + i, 1, n, scaled_block + j, n, B);
                    put(c, to, n);
                }
        }
        return true;
    }
    // Minus the inverse of a few rows, in place.
    static bool sweep(T (&a)[B][B]) {
        bool good = true;
        for (int j = 0; j < B; ++j) {
            good &= is_positive(a[j][j]);
            const T inverse = 1 / a[j][j];
            T row[B];
            for (int c = 0; c < B; ++c) row[c] = a[j][c];
            for (int i = 0; i < B; ++i) {
                const T factor = row[i] * inverse;
                for (int c = 0; c < B; ++c) a[i][c] -= factor * row[c];
                a[i][j] = factor;
            }
            for (int c = 0; c < B; ++c) a[j][c] = row[c] * inverse;
            a[j][j] = -inverse;
        }
        return good;
    }
    void mirror() {
        for (int i = 0; i < n; i += L)
            for (int j = 0; j < i; j += L) flip(matrix + size_t(j) * n + i, n, matrix + size_t(i) * n + j, n);
    }
    // `gram` = -K P K^T, minus the Gram matrix, becomes -L^-1: [I + K P K^T, I] is eliminated, both in one matrix,
    // where the lower triangle of the second takes the place of that of the first.
    bool factor_gram() {
        T pivots[C];
        for (int i = 0; i < C; ++i)
            for (int j = 0; j < C; ++j) gram[i * C + j] = T(i == j ? 1 : 0) - gram[i * C + j];
        bool good = true;
        for (int j = 0; j < C; ++j) {
            T* row = gram + j * C;
            good &= is_positive(row[j]);
            pivots[j] = row[j];
            const T inverse = 1 / row[j];
            row[j] = 1;
            for (int i = j + 1; i < C; ++i) {
                T* other = gram + i * C;
                const T factor = other[j] * inverse;
                other[j] = 0;
                for (int c = 0; c < C; ++c) other[c] -= factor * row[c];
            }
        }
        for (int i = 0; i < C; ++i) {
            const T scale = -1 / std::sqrt(pivots[i]);
            for (int j = 0; j < C; ++j) gram[i * C + j] = j <= i ? gram[i * C + j] * scale : T(0);
        }
        return good;
    }

    // Chebyshev's semi-iteration on every token, from zero; everything [element][token].
    void iterate() {
        alignas(64) T tau[C], last[C], keep[C], w[C], twice_center[C], square[C], scale[C];
        const double c = 1 / std::sqrt(z[C - 1]);
        for (int l = 0; l < C; ++l) {
            const double added = 1 / z[l] - c;
            w[l] = T(added), twice_center[l] = T(added / c + 2), square[l] = T(0.25 * added * added / (c * c));
            tau[l] = T(2) / twice_center[l], keep[l] = 0, scale[l] = T(1 / z[l]);
        }
        T *now = r, *after = next;
        std::memcpy(now, b, b.size() * sizeof(T));
        std::memset(x, 0, x.size() * sizeof(T));
        std::memset(change, 0, change.size() * sizeof(T));
        alignas(64) T gain[C];
        for (int l = 0; l < C; ++l) gain[l] = tau[l];
        for (int step = 1;; ++step) {
            step_all(now, after, keep, gain, w);
            if (step == count) break;
            for (int l = 0; l < C; ++l) {
                last[l] = tau[l];
                tau[l] = 1 / (twice_center[l] - square[l] * tau[l]);
                keep[l] = square[l] * tau[l] * last[l], gain[l] = 2 * tau[l];
            }
            T* other = now;
            now = after, after = other;
        }
        for (int i = 0; i < n; ++i)
            for (int l = 0; l < C; l += L) vec(x + size_t(i) * C + l) *= vec(scale + l);
    }
    // change = keep change + gain (N^-1 now - x); x += change; after = b - w Lambda x
    void step_all(const T* now, T* after, const T* keep, const T* gain, const T* w) {
        for (int l = 0; l < C; l += N * L)
            for (int i = 0; i < C; i += M) {
                V c[M][N] = {};
                add(c, f + size_t(i) * n, n, 1, now + l, C, n);
                for (int m = 0; m < M; ++m)
                    for (int s = 0; s < N; ++s)
                        for (int e = 0; e < L; ++e) scores[(i + m) * C + l + s * L + e] = i + m <= l + s * L + e ? c[m][s][e] : 0;
            }
        for (int l = 0; l < C; l += N * L)
            for (int i = 0; i < n; i += M) {
                V c[M][N] = {};
                add(c, matrix + i, 1, n, now + l, C, n);
                add(c, f + i, 1, n, scores + l, C, C);
                for (int m = 0; m < M; ++m)
                    for (int s = 0; s < N; ++s) {
                        const int t = l + s * L;
                        const size_t place = size_t(i + m) * C + t;
                        V &own = vec(x + place), &moved = vec(change + place);
                        moved = vec(keep + t) * moved - vec(gain + t) * (c[m][s] + own);
                        own += moved;
                        vec(after + place) = vec(b + place) - vec(w + t) * lamb[i + m] * own;
                    }
            }
    }
};

}  // namespace
}  // namespace commissure
