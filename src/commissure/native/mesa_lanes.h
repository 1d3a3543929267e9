// Cholesky factors of many symmetric systems at once: one system per SIMD lane, everything vertical.
//
//   A = U^T U,   U^T y = q,   U x = y
//
// Storage: panels of kPanel columns, each row by row down to the panel's diagonal block, [row][column][lane]; so only
// the upper triangle is kept, and a product of two panels streams through both.  The diagonal of U holds 1 / U_ii.
// Left-looking by column panels: the panel in work stays in the first-level cache while the earlier ones stream past.
// Included by translation units compiled once per instruction set: everything is static or in an unnamed namespace.
#pragma once

#include "linear.h"

namespace commissure {
namespace {

constexpr int kPanel = 4;
#if defined(__AVX512VL__)
// Eight lanes of float too: registers twice as wide are no faster where they are executed in halves, and the factor of
// sixteen systems is twice as far from fitting into the caches.
constexpr int kWideBytes = 64;
#else
constexpr int kWideBytes = kVectorBytes;
#endif
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int kRows = 4;  // rows of a block kept in registers: 16 accumulators of 32 registers
#else
constexpr int kRows = 2;  // 8 of 16
#endif

template <class T>
struct Lane;
template <>
struct Lane<float> {
    static constexpr int L = kVectorBytes / 4;
    typedef float V __attribute__((vector_size(L * 4), may_alias));
    typedef int32_t I __attribute__((vector_size(L * 4), may_alias));
};
template <>
struct Lane<double> {
    static constexpr int L = kWideBytes / 8;
    typedef double V __attribute__((vector_size(L * 8), may_alias));
    typedef int64_t I __attribute__((vector_size(L * 8), may_alias));
};
template <class T>
using LaneVec = typename Lane<T>::V;

// The lanes of LaneVec<T> in float64, as whole registers (vectors wider than a register would go through memory).
template <class T>
struct Wide {
    static constexpr int n = Lane<T>::L / Lane<double>::L;
    typedef T Part __attribute__((vector_size(Lane<double>::L * sizeof(T)), may_alias));
    using V = LaneVec<double>;
    V part[n];

    COMMISSURE_INLINE static Wide load(const double* p) {
        Wide w;
        for (int i = 0; i < n; ++i) w.part[i] = reinterpret_cast<const V*>(p)[i];
        return w;
    }
    COMMISSURE_INLINE void store(double* p) const {
        for (int i = 0; i < n; ++i) reinterpret_cast<V*>(p)[i] = part[i];
    }
    COMMISSURE_INLINE static Wide from(LaneVec<T> v) {
        Wide w;
        Part parts[n];
        std::memcpy(parts, &v, sizeof(v));
        for (int i = 0; i < n; ++i) w.part[i] = __builtin_convertvector(parts[i], V);
        return w;
    }
    COMMISSURE_INLINE LaneVec<T> narrow() const {
        LaneVec<T> v;
        Part parts[n];
        for (int i = 0; i < n; ++i) parts[i] = __builtin_convertvector(part[i], Part);
        std::memcpy(&v, parts, sizeof(v));
        return v;
    }
    COMMISSURE_INLINE static Wide splat(double x) {
        Wide w;
        for (int i = 0; i < n; ++i) w.part[i] = x - V{};
        return w;
    }
    COMMISSURE_INLINE Wide operator*(const Wide& other) const {
        Wide w;
        for (int i = 0; i < n; ++i) w.part[i] = part[i] * other.part[i];
        return w;
    }
    COMMISSURE_INLINE void add(const Wide& a, double b) {
        for (int i = 0; i < n; ++i) part[i] += a.part[i] * b;
    }
    COMMISSURE_INLINE void add(const Wide& a, const Wide& b) {
        for (int i = 0; i < n; ++i) part[i] += a.part[i] * b.part[i];
    }
};

// The column panels of U for systems of n unknowns (rounded up to whole panels by the caller).
template <class T>
class Factor {
    static constexpr int L = Lane<T>::L, P = kPanel;
    using V = LaneVec<T>;

   public:
    explicit Factor(int panels) : panels_(panels), data_(start(panels)), columns_(size_t(panels) * P * P * L) {}

    // Row `row` of column panel `panel`: kPanel vectors.
    T* at(int panel, int row) { return data_ + start(panel) + size_t(row) * P * L; }
    int panels() const { return panels_; }

    // Factor A's panel q, the earlier ones being done, and solve its rows of U^T y = y on the way.  Lanes whose pivot
    // is not a positive number are cleared in `good`.
    void factor(int q, T* y, V& good) {
        T* own = at(q, 0);
        for (int p = 0; p < q; ++p) eliminate(at(p, 0), own, 0, p);
        diagonal(own, q, good);
        forward(own, y, q);
    }
    void forward(T* y) {
        for (int q = 0; q < panels_; ++q) forward(at(q, 0), y, q);
    }
    // Solve U x = y in place.
    void backward(T* y) {
        for (int q = panels_ - 1; q >= 0; --q) {
            const V* own = vectors(at(q, 0));
            V* out = vectors(y);
            V x[P];
            for (int c = P - 1; c >= 0; --c) {
                V v = out[q * P + c];
                for (int e = c + 1; e < P; ++e) v -= own[(q * P + c) * P + e] * x[e];
                out[q * P + c] = x[c] = v * own[(q * P + c) * P + c];
            }
            for (int i = 0; i < q * P; ++i) {
                const V* u = own + i * P;
                out[i] -= (u[0] * x[0] + u[1] * x[1]) + (u[2] * x[2] + u[3] * x[3]);
            }
        }
    }
    // tr(diag(lamb) A^-1) = || U^-T diag(lamb)^1/2 ||^2, kPanel columns at a time; `root` is [row][lane].
    Wide<T> weighted_trace(const T* root) {
        Wide<T> total{};
        V* z = vectors(columns_);
        for (int p = 0; p < panels_; ++p) {
            std::memset(columns_ + size_t(p) * P * P * L, 0, size_t(panels_ - p) * P * P * L * sizeof(T));
            for (int c = 0; c < P; ++c) z[(p * P + c) * P + c] = vectors(root)[p * P + c];
            for (int q = p; q < panels_; ++q) {
                eliminate(at(q, 0), columns_, p * P, q);
                V sum{};
                for (int i = q * P * P; i < (q + 1) * P * P; ++i) sum += z[i] * z[i];
                total.add(Wide<T>::from(sum), 1.0);
            }
        }
        return total;
    }

   private:
    int panels_;
    Buffer<T> data_, columns_;

    static size_t start(int panel) { return size_t(P) * P * L * panel * (panel + 1) / 2; }
    static V* vectors(T* p) { return reinterpret_cast<V*>(p); }
    static const V* vectors(const T* p) { return reinterpret_cast<const V*>(p); }

    // Rows p*P .. p*P+3 of z (row-major, P columns): z_p = U_pp^-T (z_p - sum_k U_kp^T z_k), k from `first`.
    COMMISSURE_INLINE static void eliminate(const T* panel, T* columns, int first, int p) {
        const V* a = vectors(panel);
        V* z = vectors(columns);
        V* out = z + p * P * P;
        for (int r0 = 0; r0 < P; r0 += kRows) {
            V c[kRows][P];
            for (int r = 0; r < kRows; ++r)
                for (int s = 0; s < P; ++s) c[r][s] = out[(r0 + r) * P + s];
            for (int k = first; k < p * P; ++k) {
                const V *left = a + k * P + r0, *right = z + k * P;
                const V b0 = right[0], b1 = right[1], b2 = right[2], b3 = right[3];
                for (int r = 0; r < kRows; ++r) {
                    const V l = left[r];
                    c[r][0] -= l * b0, c[r][1] -= l * b1, c[r][2] -= l * b2, c[r][3] -= l * b3;
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int s = 0; s < P; ++s) out[(r0 + r) * P + s] = c[r][s];
        }
        const V* u = a + p * P * P;
        for (int s = 0; s < P; ++s) {
            V v[P];
            for (int r = 0; r < P; ++r) {
                v[r] = out[r * P + s];
                for (int e = 0; e < r; ++e) v[r] -= u[e * P + r] * v[e];
                out[r * P + s] = v[r] = v[r] * u[r * P + r];
            }
        }
    }

    static void diagonal(T* panel, int q, V& good) {
        V* a = vectors(panel);
        V* out = a + q * P * P;
        V c[P][P];
        for (int r = 0; r < P; ++r)
            for (int s = r; s < P; ++s) c[r][s] = out[r * P + s];
        for (int k = 0; k < q * P; ++k)
            for (int r = 0; r < P; ++r)
                for (int s = r; s < P; ++s) c[r][s] -= a[k * P + r] * a[k * P + s];
        for (int r = 0; r < P; ++r) {
            const V pivot = c[r][r];
            // Comparisons with NaN are false, so this also catches what is not a number.
            const auto fine = (pivot > T(0)) & (pivot <= splat_lane(kHuge));
            good = fine ? good : V{};
            const V inverse = T(1) / root(fine ? pivot : splat_lane(T(1)));
            out[r * P + r] = inverse;
            for (int s = r + 1; s < P; ++s) out[r * P + s] = c[r][s] = c[r][s] * inverse;
            for (int i = r + 1; i < P; ++i)
                for (int s = i; s < P; ++s) c[i][s] -= c[r][i] * c[r][s];
        }
    }

    static void forward(const T* panel, T* y, int q) {
        const V* a = vectors(panel);
        V* z = vectors(y);
        V even[P] = {}, odd[P] = {};
        for (int k = 0; k < q * P; k += 2)
            for (int c = 0; c < P; ++c) even[c] += a[k * P + c] * z[k], odd[c] += a[(k + 1) * P + c] * z[k + 1];
        for (int c = 0; c < P; ++c) {
            V v = z[q * P + c] - (even[c] + odd[c]);
            for (int e = 0; e < c; ++e) v -= a[(q * P + e) * P + c] * z[q * P + e];
            z[q * P + c] = v * a[(q * P + c) * P + c];
        }
    }

    static constexpr T kHuge = sizeof(T) == 4 ? T(3.4e38) : T(1.79e308);
    COMMISSURE_INLINE static V splat_lane(T x) { return x - V{}; }
    COMMISSURE_INLINE static V root(V v) {
        V out;
        for (int i = 0; i < L; ++i)
            out[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(float(v[i]))) : T(__builtin_sqrt(double(v[i])));
        return out;
    }
};

// Transposition of L vectors of L lanes: inside 128-bit lanes by unpacking, across them by doubling.
#if defined(__clang__)
#define COMMISSURE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define COMMISSURE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, typename Lane<T>::I{__VA_ARGS__})
#endif
template <int... J>
struct Sequence {};
template <int N, int... J>
struct Count : Count<N - 1, N - 1, J...> {};
template <int... J>
struct Count<0, J...> {
    using type = Sequence<J...>;
};

// Groups of `width` elements of a's and b's lower (upper) halves in turn, in every 128-bit lane of n elements.
constexpr int unpacked(int j, int n, int width, int lanes, bool upper) {
    return j / n * n + (j % n / width % 2 ? lanes : 0) + j % n / (2 * width) * width + j % width + (upper ? n / 2 : 0);
}
template <class T, int Width, bool Upper, int... J>
COMMISSURE_INLINE LaneVec<T> unpack(LaneVec<T> a, LaneVec<T> b, Sequence<J...>) {
    return COMMISSURE_SHUFFLE(a, b, unpacked(J, 16 / int(sizeof(T)), Width, Lane<T>::L, Upper)...);
}
template <class T, int S, bool Upper, int... J>
COMMISSURE_INLINE LaneVec<T> crossed(LaneVec<T> a, LaneVec<T> b, Sequence<J...>) {
    return COMMISSURE_SHUFFLE(a, b, (Upper ? (J & S ? Lane<T>::L + J : J + S) : (J & S ? Lane<T>::L + J - S : J))...);
}
template <class T, int S>
COMMISSURE_INLINE void cross(LaneVec<T>* v) {
    constexpr int L = Lane<T>::L;
    if constexpr (S < L) {
        using All = typename Count<L>::type;
        for (int i = 0; i < L; ++i)
            if (!(i & S)) {
                const LaneVec<T> a = v[i], b = v[i + S];
                v[i] = crossed<T, S, false>(a, b, All{});
                v[i + S] = crossed<T, S, true>(a, b, All{});
            }
        cross<T, 2 * S>(v);
    }
}
template <class T>
COMMISSURE_INLINE void transpose(LaneVec<T>* v) {
    constexpr int L = Lane<T>::L, n = 16 / int(sizeof(T));
    using All = typename Count<L>::type;
    for (int i = 0; i < L; i += n) {
        LaneVec<T>* r = v + i;
        if constexpr (n == 2) {
            const LaneVec<T> a = r[0], b = r[1];
            r[0] = unpack<T, 1, false>(a, b, All{}), r[1] = unpack<T, 1, true>(a, b, All{});
        } else {
            const LaneVec<T> a = unpack<T, 1, false>(r[0], r[1], All{}), b = unpack<T, 1, true>(r[0], r[1], All{});
            const LaneVec<T> c = unpack<T, 1, false>(r[2], r[3], All{}), d = unpack<T, 1, true>(r[2], r[3], All{});
            r[0] = unpack<T, 2, false>(a, c, All{}), r[1] = unpack<T, 2, true>(a, c, All{});
            r[2] = unpack<T, 2, false>(b, d, All{}), r[3] = unpack<T, 2, true>(b, d, All{});
        }
    }
    cross<T, n>(v);
}

}  // namespace
}  // namespace commissure
