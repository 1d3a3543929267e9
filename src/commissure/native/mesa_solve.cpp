// The Mesa layer's exact solves (arXiv 2506.05233, equation 8): for every token t of every head
//
//   H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T,   (H_t + diag(lamb)) x_t = q_t
//
// Many tokens of one head (or, for short inputs, one token of many heads) are put side by side in SIMD lanes and
// factored at once.  In a group of tokens, A_t = zeta_t H_c + local_t + diag(lamb) from the group's start state H_c,
// which is kept in float64, so that rounding does not pile up over long sequences.  Single precision loses about 1e-7
// times the condition number: where a bound on it (the largest row sum of H over the smallest lamb) is large, one step
// of iterative refinement with residuals in float64 repairs it.  Where it is small and the gates are close to 1, groups
// in single precision share one inverse instead: mesa_anchor.h.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "mesa_solve.h"

#include <cmath>

#include "mesa_anchor.h"

namespace commissure {
namespace {

// Single precision loses about 1e-7 times the condition number, so that up to here it keeps 1e-5 without refinement.
constexpr double kRefineAbove = 64.0;
// Rows of a state asked for ahead of their turn: eight heads' rows in turn are no stream that the hardware recognizes.
constexpr int kAhead = 2;

int round_up(int64_t n, int to) { return int((n + to - 1) / to * to); }

template <class T>
class Worker {
    static constexpr int L = Lane<T>::L, P = kPanel, kBlock = L > P ? L : P;
    static constexpr bool kSingle = sizeof(T) == 4;
    using V = LaneVec<T>;
    using W = Wide<T>;

   public:
    Worker(MesaView& view, const MesaPlan& plan)
        : m(view), D(int(view.dim)), wide(round_up(D, kBlock)), factor(round_up(D, P) / P),
          y(size_t(wide) * L), right(size_t(wide) * L), lamb(size_t(wide) * L), root(m.dof ? size_t(wide) * L : 0),
          keys(size_t(L) * wide), rows(size_t(L) * wide), weight(size_t(L) * wide), sums(size_t(L) * wide),
          start(plan.across_heads ? 0 : size_t(wide) * (wide + L) / 2), end(start.size()),
          wide_keys(kSingle ? size_t(L) * wide : 0), exact(wide_keys.size()), wide_x(wide_keys.size()),
          wide_r(wide_keys.size()), anchor(kSingle && !m.dof && !plan.across_heads ? D : 0) {}

    // All tokens of one head, L at a time.
    void head(int64_t task) {
        const int64_t b = task / m.heads, h = task % m.heads;
        const T* initial = in(m.h_kk) + task * D * D;
        std::memset(static_cast<double*>(start), 0, start.size() * sizeof(double));
        for (int j = 0; j < D; ++j)
            for (int i = 0; i < D && i < j / L * L + L; ++i) entry(start, i, j) = double(initial[size_t(i) * D + j]);
        for (int l = 0; l < L; ++l) load_lamb(l, in(m.lamb) + h * D);
        norm = kSingle ? start_norm() : 0;
        if constexpr (kSingle) anchor.enter(in(m.lamb) + h * D);
        int count;
        for (int64_t t = 0; t < m.time; t += count) {
            count = int(m.time - t < L ? m.time - t : L);
            if constexpr (kSingle)
                if (anchored(b, t, h)) {
                    count = Anchor::C;
                    continue;
                }
            gather(b, t, h, count);
            const bool was_hard = is_hard();
            V good = V{} + T(1);
            was_hard ? solve<true>(good) : solve<false>(good);
            if (was_hard || is_hard()) refine_tokens();
            const V dof = m.dof ? degrees() : V{};
            for (int l = 0; l < count; ++l) finish(token(b, t + l, h), good[l] != 0, dof[l]);
            scatter(count, [&](int l) { return out(m.x) + token(b, t + l, h) * D; });
            std::swap(start, end);
        }
        T* last = out(m.h_final) + task * D * D;
        for (int i = 0; i < D; ++i)
            for (int j = i; j < D; ++j) last[size_t(i) * D + j] = last[size_t(j) * D + i] = T(entry(start, i, j));
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
            for (int panel = 0; panel < factor.panels(); ++panel) factor.factor(panel, y, good);
            factor.backward(y);
            if (is_hard()) refine_heads(first, count);
            const V dof = m.dof ? degrees() : V{};
            for (int l = 0; l < count; ++l) finish(index(l), good[l] != 0, dof[l]);
            if (m.v)
                read(first, count);
            else
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
    Buffer<T> keys, rows;            // [lane][row]: keys, and rows on their way in or out
    Buffer<T> weight, sums;          // [row][lane]: beta k; the rows' sums of absolute values of H after the group
    Buffer<double> start, end;       // H before and after the group
    Buffer<double> wide_keys, exact;  // the same as keys, and as weight with the decay to the group's end
    Buffer<double> wide_x, wide_r;   // [row][lane]: solution and residual
    Anchor anchor;                   // of no dimension, and so never taken, where it does not apply
    alignas(64) T beta[L];
    T gamma[L];
    double decay[L];              // gamma, not rounded
    alignas(64) double zeta[L];   // the product of the group's decays up to each token
    alignas(64) double share[L];  // the same from each token to the group's end
    double norm = 0, lower = 0, upper = 0;  // maximum row sum of H; smallest and largest lamb

    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static T* out(void* p) { return static_cast<T*>(p); }
    static V magnitude(V v) { return v < T(0) ? -v : v; }
    int64_t token(int64_t b, int64_t t, int64_t h) const { return (b * m.time + t) * m.heads + h; }
    static V& vec(T* p) { return *reinterpret_cast<V*>(p); }
    static double& entry(Buffer<double>& state, int i, int j) { return state[state_place<T>(i, j)]; }
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
            T* row = rows + size_t(l) * wide;
            if (l < count)
                std::memcpy(row, from(l), D * sizeof(T));
            else
                std::memset(row, 0, D * sizeof(T));
            std::memset(row + D, 0, (wide - D) * sizeof(T));
        }
        turn(rows, to);
    }
    // [lane][row] to [row][lane]
    void turn(T* from, T* to) {
        for (int j = 0; j < wide; j += L) {
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = vec(from + size_t(l) * wide + j);
            transpose<T>(v);
            for (int l = 0; l < L; ++l) vec(to + size_t(j + l) * L) = v[l];
        }
    }
    // Solutions from y[row][lane] to rows[lane][row].
    void turn_back() {
        for (int j = 0; j < wide; j += L) {
            V v[L];
            for (int l = 0; l < L; ++l) v[l] = vec(y + size_t(j + l) * L);
            transpose<T>(v);
            for (int l = 0; l < L; ++l) vec(rows + size_t(l) * wide + j) = v[l];
        }
    }
    template <class To>
    void scatter(int count, To to) {
        turn_back();
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
            share[l] = rest;
            rest *= decay[l];
        }
        fill(y, count, [&](int l) { return in(m.q) + token(b, t + l, h) * D; });
        std::memcpy(right, y, y.size() * sizeof(T));
    }

    // A group of tokens by `Anchor`; false, with nothing changed, where each needs its own factorization.  So do the
    // first ones, which tell whether H + Lambda is positive definite: then it stays so.
    bool anchored(int64_t b, int64_t t, int64_t h) {
        if (t == 0 || m.time - t < Anchor::C || is_hard()) return false;
        const int64_t index = token(b, t, h);
        if (!anchor.open(in(m.g) + index, in(m.beta) + index, m.heads)) return false;
        for (int l = 0; l < Anchor::C; ++l) {
            const int64_t place = token(b, t + l, h) * D;
            anchor.load(l, in(m.q) + place, in(m.k) + place, out(m.x) + place, m.heads * D * Anchor::C);
        }
        const double before = norm;
        norm = anchor.advance(start, end);
        if (is_hard() || !anchor.solve()) {
            norm = before;
            return false;
        }
        for (int l = 0; l < Anchor::C; ++l) anchor.store(l, out(m.x) + token(b, t + l, h) * D);
        std::swap(start, end);
        return true;
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
    // Systems are padded by the identity; anew every time, because a system that cannot be factored spoils it.
    void pad() {
        for (int i = D; i < P * factor.panels(); ++i)
            for (int j = i; j < P * factor.panels(); ++j) at(i, j) = V{} + T(i == j ? 1 : 0);
    }
    bool is_hard() const { return kSingle && lower * kRefineAbove < norm + upper; }
    // Factor A_t = zeta_t H_c + local_t + diag(lamb) for the group's tokens and solve; L columns are formed just before
    // they are needed, while they are in the first-level cache.  Exact: H's growth in float64, because the rounding of
    // a key that is repeated points the same way every time.
    template <bool Exact>
    void solve(V& good) {
        if (kSingle) std::memset(sums, 0, sums.size() * sizeof(T));
        pad();
        turn(keys, weight);
        if (Exact) widen_keys();
        const V scale = vec(beta);
        for (int i = 0; i < D; ++i) {
            T* own = weight + size_t(i) * L;
            if (Exact) (W::from(vec(own)) * W::from(scale) * W::load(share)).store(exact + size_t(i) * L);
            vec(own) *= scale;
        }
        for (int j = 0; j < D; j += kBlock) {
            for (int c = j; c < j + kBlock && c < D; c += L) form<Exact>(c);
            for (int q = j / P; q < (j + kBlock) / P && q < factor.panels(); ++q) factor.factor(q, y, good);
        }
        factor.backward(y);
        if (kSingle) norm = largest_sum();
    }
    // Columns j .. j+L-1 of the group's systems, and of H after the group.
    template <bool Exact>
    void form(int j) {
        T scale[L];
        for (int l = 0; l < L; ++l) scale[l] = T(zeta[l]);
        const int stop = j + L < D ? j + L : D;
        V down{};
        for (int i = 0; i < stop; ++i) {
            const W before = W::load(&entry(start, i, j));
            const V base = before.narrow();
            V local{}, v[L];
            for (int l = 0; l < L; ++l) {
                local = local * gamma[l] + weight[size_t(i) * L + l] * vec(keys + size_t(l) * wide + j);
                v[l] = base * scale[l] + local;
            }
            W after = before * W::splat(zeta[L - 1]);
            if (Exact)
                for (int l = 0; l < L; ++l)
                    after.add(W::load(wide_keys + size_t(l) * wide + j), exact[size_t(i) * L + l]);
            else
                after.add(W::from(local), 1.0);
            after.store(&entry(end, i, j));
            if (kSingle) {
                const V size = magnitude(v[L - 1]);
                vec(sums + size_t(i) * L) += size;
                if (i < j) down += size;
            }
            place(i, j, v);
        }
        for (int l = 0; l < L && kSingle; ++l) sums[size_t(j + l) * L] += down[l];
        for (int i = j; i < stop; ++i) at(i, i) += vec(lamb + size_t(i) * L);
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
    double start_norm() {
        double largest = 0;
        for (int i = 0; i < D; ++i) {
            double sum = 0;
            for (int j = 0; j < D; ++j) sum += std::fabs(i < j ? entry(start, i, j) : entry(start, j, i));
            largest = sum > largest ? sum : largest;
        }
        return largest;
    }
    // The same for one token of `count` heads, whose states are updated in h_final.
    void form_heads(int64_t first, int count, bool is_first) {
        pad();
        for (int i = 0; i < D; ++i) {
            for (int l = 0; l < count; ++l) {
                const size_t place = size_t(first + l) * D * D + size_t(i) * D;
                const T *from = is_first ? in(m.h_kk) + place : out(m.h_final) + place;
                T *to = out(m.h_final) + place, *row = rows + size_t(l) * wide, *key = keys + size_t(l) * wide;
                const T own = key[i], weight = beta[l], decay = gamma[l];
                V sizes{};
                for (int j = 0; j < D; j += L) {
                    // (own * key) first: the state stays symmetric to the last bit.
                    const size_t bytes = (D - j < L ? D - j : L) * sizeof(T);
                    __builtin_prefetch(from + j + kAhead * D), __builtin_prefetch(to + j + kAhead * D, 1);
                    V old{};
                    bytes == sizeof(V) ? std::memcpy(&old, from + j, sizeof(V)) : std::memcpy(&old, from + j, bytes);
                    const V now = old * decay + own * vec(key + j) * weight;
                    bytes == sizeof(V) ? std::memcpy(to + j, &now, sizeof(V)) : std::memcpy(to + j, &now, bytes);
                    vec(row + j) = now;
                    if (kSingle) sizes += magnitude(now);
                }
                double total = 0;
                for (int e = 0; e < L && kSingle; ++e) total += double(sizes[e]);
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

    // h_kv = gamma h_kv + beta k v^T and o = h_kv^T x of `count` heads: one pass over each state, row by row (several
    // rows at once save loads of o and are half as fast where the states come from memory).
    void read(int64_t first, int count) {
        const size_t E = size_t(m.value_dim);
        turn_back();
        for (int l = 0; l < count; ++l) {
            const T *from = in(m.h_kv) + size_t(first + l) * D * E, *value = in(m.v) + size_t(first + l) * E;
            T *to = out(m.h_kv_final) + size_t(first + l) * D * E, *o = out(m.o) + size_t(first + l) * E;
            const T *key = keys + size_t(l) * wide, *x = rows + size_t(l) * wide;
            std::memset(o, 0, E * sizeof(T));
            for (int i = 0; i < D; ++i)
                read_row(from + i * E, to + i * E, value, o, E, gamma[l], beta[l] * key[i], x[i]);
        }
    }
    static void read_row(const T* __restrict from, T* __restrict to, const T* __restrict value, T* __restrict o,
                         size_t E, T decay, T weight, T x) {
        for (size_t j = 0; j < E; ++j) {
            const T now = from[j] * decay + weight * value[j];
            to[j] = now;
            o[j] += x * now;
        }
    }

    // x += A^-1 (q - A x), the residual in float64.
    void correct() {
        for (int i = 0; i < D; ++i) {
            const V x = vec(y + size_t(i) * L);
            vec(y + size_t(i) * L) = W::load(wide_r + size_t(i) * L).narrow();
            vec(right + size_t(i) * L) = x;
        }
        for (size_t i = size_t(D) * L; i < y.size(); ++i) y[i] = 0;
        factor.forward(y);
        factor.backward(y);
        for (int i = 0; i < D; ++i) vec(y + size_t(i) * L) += vec(right + size_t(i) * L);
    }
    void widen_keys() {
        for (size_t i = 0; i < keys.size(); ++i) wide_keys[i] = double(keys[i]);
    }
    // x in float64, and q - lamb x.
    void widen() {
        for (int i = 0; i < wide; ++i) {
            const W x = W::from(vec(y + size_t(i) * L)), product = x * W::from(vec(lamb + size_t(i) * L));
            W rest = W::from(vec(right + size_t(i) * L));
            rest.add(product, -1.0);
            x.store(wide_x + size_t(i) * L), rest.store(wide_r + size_t(i) * L);
        }
    }
    void refine_tokens() {
        widen_keys();
        widen();
        const W scale = W::load(zeta) * W::splat(-1.0);
        constexpr int R = 2 * kRows < L ? 2 * kRows : L;
        for (int i = 0; i < D; i += R) {
            W total[R] = {};
            for (int j = 0; j < i; ++j) {
                const W x = W::load(wide_x + size_t(j) * L);
                const double* left = &entry(start, j, i);
                for (int r = 0; r < R; ++r) total[r].add(x, left[r]);
            }
            for (int j = i; j < D; ++j) {
                const W x = W::load(wide_x + size_t(j) * L);
                const double* below = &entry(start, i, j);
                for (int r = 0; r < R; ++r) total[r].add(x, below[r * L]);
            }
            for (int r = 0; r < R; ++r) {
                W rest = W::load(wide_r + size_t(i + r) * L);
                rest.add(total[r], scale);
                rest.store(wide_r + size_t(i + r) * L);
            }
        }
        W product[L] = {};
        for (int j = 0; j < D; ++j) {
            const W x = W::load(wide_x + size_t(j) * L);
            for (int s = 0; s < L; ++s) product[s].add(x, wide_keys[size_t(s) * wide + j]);
        }
        for (int s = 0; s < L; ++s) {
            alignas(64) double weight[L] = {};
            double left = double(beta[s]);
            for (int l = s; l < L; ++l) {
                if (l > s) left *= decay[l];
                weight[l] = -left;
            }
            product[s] = product[s] * W::load(weight);
        }
        for (int j = 0; j < D; ++j) {
            W rest = W::load(wide_r + size_t(j) * L);
            for (int s = 0; s < L; ++s) rest.add(product[s], wide_keys[size_t(s) * wide + j]);
            rest.store(wide_r + size_t(j) * L);
        }
        correct();
    }
    void refine_heads(int64_t first, int count) {
        widen();
        for (int l = 0; l < count; ++l)
            for (int i = 0; i < D; i += P) {
                // Sums over several rows at once: one alone would wait for its own additions.
                const T* row[P];
                double total[P] = {};
                for (int r = 0; r < P; ++r)
                    row[r] = out(m.h_final) + (size_t(first + l) * D + (i + r < D ? i + r : i)) * D;
                for (int j = 0; j < D; ++j)
                    for (int r = 0; r < P; ++r) total[r] += double(row[r][j]) * wide_x[size_t(j) * L + l];
                for (int r = 0; r < P && i + r < D; ++r) wide_r[size_t(i + r) * L + l] -= total[r];
            }
        correct();
    }

    V degrees() {
        W kept = W::from(V{} + T(D));
        kept.add(factor.weighted_trace(root), -1.0);
        return kept.narrow();
    }
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
    const bool across_heads = m.time <= 1 || across < along;
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
