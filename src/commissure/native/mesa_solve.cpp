// The Mesa layer's exact solves (arXiv 2506.05233, equation 8): for every token t of every head
//
//   H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T,   (H_t + diag(lamb)) x_t = q_t
//
// Many tokens of one head (or, for short inputs, one token of many heads) are put side by side in SIMD lanes and factored
// at once.  Within a group of tokens, A_t = zeta_t H_c + local_t + diag(lamb) from the group's start state H_c, which is
// kept in float64, so that rounding does not pile up over long sequences.  Single precision loses about 1e-7 times the
// condition number: where a bound on it is large, one step of iterative refinement with residuals in float64 repairs it.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "mesa_solve.h"

#include <cmath>

#include "mesa_lanes.h"

namespace commissure {
namespace {

// Single precision loses about 1e-7 times the condition number, so that up to here it keeps 1e-5 without refinement.
constexpr double kRefineAbove = 64.0;

int round_up(int64_t n, int to) { return int((n + to - 1) / to * to); }

template <class T>
class Worker {
    static constexpr int L = Lane<T>::L, P = kPanel, kBlock = L > P ? L : P;
    static constexpr bool kSingle = sizeof(T) == 4;
    using V = LaneVec<T>;
    using W = WideVec<T>;

   public:
    Worker(MesaView& view, const MesaPlan& plan)
        : m(view), D(int(view.dim)), wide(round_up(D, kBlock)), factor(round_up(D, P) / P),
          y(size_t(wide) * L), right(size_t(wide) * L), lamb(size_t(wide) * L), root(m.dof ? size_t(wide) * L : 0),
          keys(size_t(L) * wide), rows(size_t(L) * wide), sums(wide),
          start(plan.across_heads ? 0 : size_t(D) * wide), end(plan.across_heads ? 0 : size_t(D) * wide),
          wide_x(kSingle ? size_t(wide) * L : 0), wide_r(kSingle ? size_t(wide) * L : 0) {
        const V one = V{} + T(1);
        for (int i = D; i < P * factor.panels(); ++i) at(i, i) = one;  // systems are padded by the identity
    }

    // All tokens of one head, L at a time.
    void head(int64_t task) {
        const int64_t b = task / m.heads, h = task % m.heads;
        const T* initial = in(m.h_kk) + task * D * D;
        for (int i = 0; i < D; ++i)
            for (int j = 0; j < wide; ++j) start[size_t(i) * wide + j] = j < D ? double(initial[size_t(i) * D + j]) : 0.0;
        for (int l = 0; l < L; ++l) load_lamb(l, in(m.lamb) + h * D);
        norm = kSingle ? start_norm() : 0;
        for (int64_t t = 0; t < m.time; t += L) {
            const int count = int(m.time - t < L ? m.time - t : L);
            gather(b, t, h, count);
            const bool was_hard = is_hard();
            was_hard ? form<true>() : form<false>();
            V good = V{} + T(1);
            factor.factor(y, good);
            factor.backward(y);
            if (was_hard || is_hard()) refine_tokens();
            const V dof = m.dof ? degrees() : V{};
            for (int l = 0; l < count; ++l) finish(token(b, t + l, h), good[l] != 0, dof[l]);
            scatter(count, [&](int l) { return out(m.x) + token(b, t + l, h) * D; });
            std::swap(start, end);
        }
        T* last = out(m.h_final) + task * D * D;
        for (int i = 0; i < D; ++i)
            for (int j = i; j < D; ++j) last[size_t(i) * D + j] = last[size_t(j) * D + i] = T(start[size_t(i) * wide + j]);
    }

    // One token of L heads at a time: for few tokens.
    void heads(int64_t task) {
        const int64_t first = task * L, all = m.batch * m.heads;
        const int count = int(all - first < L ? all - first : L);
        for (int l = 0; l < L; ++l) load_lamb(l, l < count ? in(m.lamb) + (first + l) % m.heads * D : nullptr);
        for (int64_t t = 0; t < m.time; ++t) {
            const auto index = [&](int l) { return token((first + l) / m.heads, t, (first + l) % m.heads); };
            fill(y, count, [&](int l) { return in(m.q) + index(l) * D; });
            norm = 0;
            for (int l = 0; l < count; ++l) load_keys(l, index(l));
            form_heads(first, count, t == 0);
            std::memcpy(right, y, y.size() * sizeof(T));
            V good = V{} + T(1);
            factor.factor(y, good);
            factor.backward(y);
            if (is_hard()) refine_heads(first, count);
            const V dof = m.dof ? degrees() : V{};
            for (int l = 0; l < count; ++l) finish(index(l), good[l] != 0, dof[l]);
            scatter(count, [&](int l) { return out(m.x) + index(l) * D; });
        }
        if (m.time == 0)
            std::memcpy(out(m.h_final) + first * D * D, in(m.h_kk) + first * D * D, size_t(count) * D * D * sizeof(T));
    }

   private:
    MesaView& m;
    int D, wide;
    Factor<T> factor;
    Buffer<T> y, right, lamb, root;  // [row][lane]: solution, right-hand side, lamb, its square root
    Buffer<T> keys, rows, sums;      // [lane][row]: keys, and rows on their way; sums of absolute values of H's rows
    Buffer<double> start, end;       // H before and after the group; blocks on and above the diagonal
    Buffer<double> wide_x, wide_r;
    T gamma[L], beta[L];
    double decay[L];           // gamma, not rounded
    double zeta[L], share[L];  // products of the group's decays: up to each token, and from it (times beta) to the end
    double norm = 0, lower = 0, upper = 0;  // maximum row sum of H; smallest and largest lamb

    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static T* out(void* p) { return static_cast<T*>(p); }
    int64_t token(int64_t b, int64_t t, int64_t h) const { return (b * m.time + t) * m.heads + h; }
    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static W& wvec(double* p) { return *reinterpret_cast<W*>(p); }
    V& at(int i, int j) { return vec(factor.at(j / P, i) + j % P * L); }

    // Lane l of lamb; padding rows and lanes are ones.
    void load_lamb(int l, const T* from) {
        if (l == 0) lower = INFINITY, upper = 0;
        for (int i = 0; i < wide; ++i) {
            const T value = from && i < D ? from[i] : T(1);
            lamb[size_t(i) * L + l] = value;
            if (m.dof) root[size_t(i) * L + l] = i < D ? T(std::sqrt(double(value))) : T(0);
            if (from && i < D) lower = value < lower ? value : lower, upper = value > upper ? value : upper;
        }
    }
    void load_keys(int l, int64_t index) {
        std::memcpy(keys + size_t(l) * wide, in(m.k) + index * D, D * sizeof(T));
        beta[l] = in(m.beta)[index];
        decay[l] = std::exp(double(in(m.g)[index]));
        gamma[l] = T(decay[l]);
    }
    // Put a row of D values per lane, at from(lane), into to[row][lane]; other lanes are zero.
    template <class From>
    void fill(T* to, int count, From from) {
        for (int l = 0; l < L; ++l) {
            if (l < count)
                std::memcpy(rows + size_t(l) * wide, from(l), D * sizeof(T));
            else
                std::memset(rows + size_t(l) * wide, 0, D * sizeof(T));
            for (int j = D; j < wide; ++j) rows[size_t(l) * wide + j] = 0;
        }
        for (int j = 0; j < wide; j += L) {
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = vec(rows + size_t(l) * wide + j);
            transpose<T>(v);
            for (int l = 0; l < L; ++l) vec(to + size_t(j + l) * L) = v[l];
        }
    }
    template <class To>
    void scatter(int count, To to) {
        for (int j = 0; j < wide; j += L) {
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = vec(y + size_t(j + l) * L);
            transpose<T>(v);
            for (int l = 0; l < L; ++l) vec(rows + size_t(l) * wide + j) = v[l];
        }
        for (int l = 0; l < count; ++l) std::memcpy(to(l), rows + size_t(l) * wide, D * sizeof(T));
    }
    void gather(int64_t b, int64_t t, int64_t h, int count) {
        double product = 1;
        for (int l = 0; l < L; ++l) {
            if (l < count) {
                load_keys(l, token(b, t + l, h));
                product *= decay[l];
            } else {
                std::memset(keys + size_t(l) * wide, 0, wide * sizeof(T));
                beta[l] = 0, gamma[l] = 1, decay[l] = 1;
            }
            zeta[l] = product;
        }
        double rest = 1;
        for (int l = L - 1; l >= 0; --l) {
            share[l] = rest * double(beta[l]);
            rest *= decay[l];
        }
        fill(y, count, [&](int l) { return in(m.q) + token(b, t + l, h) * D; });
        std::memcpy(right, y, y.size() * sizeof(T));
    }

    // Store rows i of L systems, columns j .. j+L-1 (v[lane], transposed here); panels left of i's are not kept.
    COMMISSURE_INLINE void place(int i, int j, V* v) {
        transpose<T>(v);
        for (int c = 0; c < L; c += P) {
            const int panel = (j + c) / P;
            if (panel * P + P <= i || panel >= factor.panels()) continue;
            V* to = &vec(factor.at(panel, i));
            for (int e = 0; e < P && c + e < L; ++e) to[(j + c) % P + e] = v[c + e];
        }
    }
    bool is_hard() const { return kSingle && lower * kRefineAbove < norm + upper; }
    // A_t = zeta_t H_c + local_t + diag(lamb) for the group's tokens, and H after them; Exact: H's growth in float64,
    // because the rounding of a key that is repeated points the same way every time.
    template <bool Exact>
    void form() {
        T scale[L];
        for (int l = 0; l < L; ++l) scale[l] = T(zeta[l]);
        if (kSingle) std::memset(sums, 0, sums.size() * sizeof(T));
        for (int i = 0; i < D; ++i) {
            T weight[L];
            for (int l = 0; l < L; ++l) weight[l] = beta[l] * keys[size_t(l) * wide + i];
            double exact[L];
            for (int l = 0; l < L && Exact; ++l) exact[l] = share[l] * double(keys[size_t(l) * wide + i]);
            V across{};
            for (int j = i / L * L; j < wide; j += L) {
                const W before = wvec(start + size_t(i) * wide + j);
                const V base = __builtin_convertvector(before, V);
                V local{}, v[L];
                for (int l = 0; l < L; ++l) {
                    local = local * gamma[l] + weight[l] * vec(keys + size_t(l) * wide + j);
                    v[l] = base * scale[l] + local;
                }
                W after = before * zeta[L - 1];
                if (Exact)
                    for (int l = 0; l < L; ++l)
                        after += exact[l] * __builtin_convertvector(vec(keys + size_t(l) * wide + j), W);
                else
                    after += __builtin_convertvector(local, W);
                wvec(end + size_t(i) * wide + j) = after;
                if (kSingle) {
                    const V size = v[L - 1] < T(0) ? -v[L - 1] : v[L - 1];
                    across += size;
                    if (j > i) vec(sums + j) += size;
                }
                place(i, j, v);
            }
            if (kSingle)
                for (int l = 0; l < L; ++l) sums[i] += across[l];
            at(i, i) += vec(lamb + size_t(i) * L);
        }
        if (!kSingle) return;
        norm = 0;
        for (int i = 0; i < D; ++i) norm = sums[i] > norm ? sums[i] : norm;
    }
    double start_norm() {
        double largest = 0;
        for (int i = 0; i < D; ++i) {
            double total = 0;
            for (int j = 0; j < D; ++j) total += std::fabs(start[size_t(i) * wide + j]);
            largest = total > largest ? total : largest;
        }
        return largest;
    }
    // The same for one token of `count` heads, whose states are updated in h_final.
    void form_heads(int64_t first, int count, bool is_first) {
        for (int i = 0; i < D; ++i) {
            for (int l = 0; l < count; ++l) {
                const size_t place = size_t(first + l) * D * D + size_t(i) * D;
                const T *from = is_first ? in(m.h_kk) + place : out(m.h_final) + place, *key = keys + size_t(l) * wide;
                T *to = out(m.h_final) + place, *row = rows + size_t(l) * wide;
                const T own = key[i], weight = beta[l], decay = gamma[l];
                T total = 0;
                for (int j = 0; j < D; ++j) {
                    row[j] = to[j] = decay * from[j] + weight * (own * key[j]);
                    if (kSingle) total += row[j] < 0 ? -row[j] : row[j];
                }
                norm = total > norm ? total : norm;
            }
            for (int j = i / L * L; j < wide; j += L) {
                V v[L];
                for (int l = 0; l < L; ++l) v[l] = l < count ? vec(rows + size_t(l) * wide + j) : V{};
                place(i, j, v);
            }
            at(i, i) += vec(lamb + size_t(i) * L);
        }
    }

    // x += A^-1 (q - A x), the residual in float64.
    void correct() {
        for (int i = 0; i < D; ++i) {
            const V x = vec(y + size_t(i) * L);
            vec(y + size_t(i) * L) = __builtin_convertvector(wvec(wide_r + size_t(i) * L), V);
            vec(right + size_t(i) * L) = x;
        }
        for (size_t i = size_t(D) * L; i < y.size(); ++i) y[i] = 0;
        factor.forward(y);
        factor.backward(y);
        for (int i = 0; i < D; ++i) vec(y + size_t(i) * L) += vec(right + size_t(i) * L);
    }
    void widen() {
        for (int i = 0; i < wide; ++i) {
            const W x = __builtin_convertvector(vec(y + size_t(i) * L), W);
            wvec(wide_x + size_t(i) * L) = x;
            wvec(wide_r + size_t(i) * L) = __builtin_convertvector(vec(right + size_t(i) * L), W) -
                                           x * __builtin_convertvector(vec(lamb + size_t(i) * L), W);
        }
    }
    void refine_tokens() {
        widen();
        W scale;
        for (int l = 0; l < L; ++l) scale[l] = zeta[l];
        for (int i = 0; i < D; i += P) {
            W total[P] = {};
            for (int j = 0; j < D; ++j) {
                const W x = wvec(wide_x + size_t(j) * L);
                const bool is_left = j / P * P < i;
                for (int r = 0; r < P; ++r)
                    total[r] += x * (is_left ? start[size_t(j) * wide + i + r] : i + r < D ? start[size_t(i + r) * wide + j] : 0.0);
            }
            for (int r = 0; r < P; ++r) wvec(wide_r + size_t(i + r) * L) -= scale * total[r];
        }
        for (int s = 0; s < L; ++s) {
            if (beta[s] == 0) continue;
            const T* key = keys + size_t(s) * wide;
            W product{}, weight{};
            for (int j = 0; j < D; ++j) product += wvec(wide_x + size_t(j) * L) * double(key[j]);
            double left = double(beta[s]);
            for (int l = s; l < L; ++l) {
                if (l > s) left *= decay[l];
                weight[l] = left;
            }
            product *= weight;
            for (int j = 0; j < D; ++j) wvec(wide_r + size_t(j) * L) -= product * double(key[j]);
        }
        correct();
    }
    void refine_heads(int64_t first, int count) {
        widen();
        for (int l = 0; l < count; ++l)
            for (int i = 0; i < D; ++i) {
                const T* row = out(m.h_final) + size_t(first + l) * D * D + size_t(i) * D;
                double total = 0;
                for (int j = 0; j < D; ++j) total += double(row[j]) * wide_x[size_t(j) * L + l];
                wide_r[size_t(i) * L + l] -= total;
            }
        correct();
    }

    V degrees() { return __builtin_convertvector(double(D) - factor.weighted_trace(root), V); }
    void finish(int64_t index, bool good, T dof) {
        if (m.dof) out(m.dof)[index] = dof;
        if (good) return;
        int64_t seen = __atomic_load_n(&m.failed, __ATOMIC_RELAXED);
        while ((seen < 0 || index < seen) &&
               !__atomic_compare_exchange_n(&m.failed, &seen, index, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    }
};

template <class T>
MesaPlan plan(const MesaView& m) {
    constexpr int64_t L = Lane<T>::L;
    const int64_t all = m.batch * m.heads, groups = (all + L - 1) / L;
    const double D = double(m.dim), each = L * (D * D * D / 3 + 3 * D * D);
    const int64_t along = all * ((m.time + L - 1) / L), across = groups * m.time;
    const bool across_heads = m.time == 0 || across < along;
    return {across_heads, across_heads ? groups : all, each * double(across_heads ? across : along)};
}

template <class T>
void run(MesaView& m, const MesaPlan& plan) {
    Worker<T> worker(m, plan);
    for (;;) {
        const int64_t task = __atomic_fetch_add(&m.next, 1, __ATOMIC_RELAXED);
        if (task >= plan.tasks) return;
        if (plan.across_heads)
            worker.heads(task);
        else
            worker.head(task);
    }
}

MesaPlan plan_any(const MesaView& m, bool single) { return single ? plan<float>(m) : plan<double>(m); }
void run_any(MesaView& m, const MesaPlan& plan, bool single) { single ? run<float>(m, plan) : run<double>(m, plan); }

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

const MesaKernel COMMISSURE_JOIN(mesa_kernel, COMMISSURE_CLONE) = {plan_any, run_any};

}  // namespace commissure
