// Exact filter of a family of HMMs whose members share their parts: U transition matrices, W emission tables, N = U W.
//
//   a_t[u,s,w] = p(u, w, z_{t+1} = s, x_1..x_t) 2^c        the joint, one power of two for all: never rounded by it
//   b[u,s,w] = a_t[u,s,w] E_w[s, x_{t+1}],  a_{t+1}[u,:,w] = A_u^T b[u,:,w]
//   p(u, w | x_1..x_{t+1}) ~ sum_s b,       p(x_{t+2} = v | ...) ~ sum_{s,w} M[s,w] E_w[s,v],   M = sum_u a_{t+1}
//
// The W emission variants lie next to each other and are the vectors' lanes; so are several sequences where W is small.
// Steps are independent across u but for what they are summed into, so a few variants at a time run kSteps tokens while
// they stay in the first-level cache; the scales, powers of two guessed from each token's overall frequency, are
// settled afterwards.  If a guess leaves the range of numbers, the stretch is done again from its start, token by
// token.
//
// Per task scales (exponents not null): every task is normalized by its own power of two at every token, so that none
// is lost that later data revive.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "hmm_filter.h"

#include "hmm_numbers.h"

namespace commissure {
namespace {

constexpr int kSteps = 8;          // tokens between two looks at the scales
constexpr int kBlock = 8;          // variants worked on together, at most
constexpr int kBlockBytes = 8192;  // of their states: two copies, evidence and mixture fit the first-level cache
constexpr int kFold = 8;           // variants between two additions of their sums in float64
constexpr int kWide = 6;           // vectors of a row in registers
constexpr double kLog2 = 0.69314718055994530942;

template <class T>
class Filter {
    static constexpr int L = kLanes<T>;
    using V = Vec<T>;
    static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

   public:
    explicit Filter(const HmmView& view)
        : m(view), U(m.variants), S(m.states), W(m.emissions), vocab(m.vocab),
          wide((m.vocab + 4 * L - 1) / (4 * L) * 4 * L), values(in(m.values)), by_token(in(m.by_token)),
          by_state(in(m.by_state)), is_shared(m.tables == 1), is_per_task(m.exponent != nullptr) {
        const size_t G = size_t(m.largest_group), widest = size_t((m.largest_group * W + L - 1) / L * L);
        const size_t most = S * widest;
        table_width = (vocab + 128 / int(sizeof(T)) - 1) / (128 / int(sizeof(T))) * (128 / int(sizeof(T)));
        state_size = U * most;
        for (Buffer<T>& block : scratch) block = Buffer<T>(kBlock * most);
        evidence_ = Buffer<T>((is_shared ? kSteps : 1) * most);
        mixed = Buffer<T>((is_shared ? kSteps : 1) * most);
        weight = Buffer<T>(widest), some = Buffer<T>(kSteps * widest), some_logs = Buffer<T>(kSteps * widest);
        total = Buffer<double>(kSteps * widest), surprise = Buffer<double>(kSteps * widest);
        factor = Buffer<T>(widest), probability = Buffer<T>(kSteps * G * table_width);
        exponents = Buffer<int32_t>(is_per_task ? U * widest : 0);
        mass = Buffer<double>(m.prune > 0 || m.transition ? kSteps * U * G : 0), unsure = Buffer<double>(G);
        live = Buffer<int64_t>(U), row = Buffer<int64_t>(G);
        evidence_log = Buffer<double>(G), mass_log = Buffer<double>(G);
        base = Buffer<double>(G), dropped = Buffer<double>(G);
        z = Buffer<double>(kSteps * G), shift = Buffer<int64_t>(kSteps * G), failed = Buffer<int64_t>(G);
    }

    void run(int64_t group) {
        const FlushSubnormals flush;
        open(group);
        if (m.start) {
            observe(now);
            settle(1);
            results(0, 0);
        }
        for (int64_t t = 0; t < length;) {
            for (int g = 0; g < G; ++g) base[g] = evidence_log[g] - mass_log[g];
            const int64_t due = kSteps - (place + t) % kSteps, left = length - t;
            int steps = is_per_task || m.epistemic ? 1 : int(due < left ? due : left);
            if (is_per_task)
                advance_tasks(t);
            else if (!advance(t, steps))
                advance(t, steps = 1);
            settle(steps);
            now = to(t + steps);
            for (int j = 0; j < steps; ++j) results(j, t + j + 1);
            t += steps;
            if (m.prune > 0 && (place + t) % m.period == 0) drop(steps - 1, t);
            spare ^= 1;
        }
        close();
    }

   private:
    const HmmView& m;
    int64_t U, S, W, vocab, wide, table_width;  // wide: tokens in whole runs of 4 vectors; table_width: by_state's rows
    const T *values, *by_token, *by_state;
    bool is_shared, is_per_task;
    int G = 0, lanes = 0;           // sequences side by side; lanes of a row, a multiple of L
    size_t size = 0;                // of one variant's state [S][lanes]
    int64_t length = 0, place = 0;  // tokens to come, tokens before
    bool is_direct = false;         // the caller's arrays have our layout
    const T* now = nullptr;         // the state [U][S][lanes]
    int spare = 0;                  // which of `stored` is free
    int64_t n_live = 0;
    size_t state_size = 0;
    Untouched<T> stored[2];
    Buffer<T> scratch[2], evidence_, mixed;  // b of a block of variants, twice; E[s,x]; M: of the steps of a stretch
    Buffer<T> weight, factor;                // of one variant's lanes: sums over the states, scales
    Buffer<T> some, some_logs, probability;  // sums of weights w and of w log w over a few variants; the predictive
    Buffer<double> total, surprise, mass, z;  // the same over all of them; a variant's; a sequence's
    Buffer<double> unsure, evidence_log, mass_log, base, dropped;  // of a sequence
    Buffer<int32_t> exponents;
    Buffer<int64_t> live, row, shift, failed;

    static const T* in(const void* p) { return static_cast<const T*>(p); }

    void open(int64_t group) {
        const int64_t first = m.group_starts[group];
        G = int(m.group_starts[group + 1] - first);
        lanes = int((G * W + L - 1) / L * L), size = size_t(S) * lanes;
        for (int g = 0; g < G; ++g) {
            const int64_t b = row[g] = m.group_rows[first + g];
            evidence_log[g] = m.log_evidence[b], mass_log[g] = m.log_mass[b], dropped[g] = m.dropped[b];
            failed[g] = std::isinf(m.log_evidence[b]) ? 0 : -1;
            m.impossible[b] = -1;
        }
        length = m.lengths[row[0]], place = m.position[row[0]];
        const T* given = in(m.joint) + row[0] * U * S * W;
        T* taken = static_cast<T*>(m.joint_out) + row[0] * U * S * W;
        is_direct = G == 1 && W == lanes && reinterpret_cast<uintptr_t>(given) % 64 == 0 &&
                    reinterpret_cast<uintptr_t>(taken) % 64 == 0;
        std::memset(evidence_, 0, evidence_.size() * sizeof(T));
        if (is_per_task) read_exponents();
        spare = 0, now = given;
        if (!is_direct) gather();
        n_live = 0;
        for (int64_t u = 0; u < U; ++u)
            if (is_any(now + u * size)) live[n_live++] = u;
    }
    bool is_any(const T* state) const {
        for (size_t i = 0; i < size; i += L)
            for (int l = 0; l < L; ++l)
                if (state[i + l] != T(0)) return true;
        return false;
    }
    void gather() {
        T* all = stored[1].get(state_size);
        now = all;
        std::memset(all, 0, size * U * sizeof(T));
        for (int g = 0; g < G; ++g) {
            const T* from = in(m.joint) + row[g] * U * S * W;
            for (int64_t i = 0; i < U * S; ++i) std::memcpy(all + i * lanes + g * W, from + i * W, W * sizeof(T));
        }
    }
    void read_exponents() {
        std::memset(exponents, 0, exponents.size() * sizeof(int32_t));
        for (int g = 0; g < G; ++g)
            for (int64_t u = 0; u < U; ++u)
                std::memcpy(exponents + u * lanes + g * W, m.exponent + (row[g] * U + u) * W, W * sizeof(int32_t));
    }
    // Where the state after token t goes.
    T* to(int64_t t) {
        if (is_direct && t == length) return static_cast<T*>(m.joint_out) + row[0] * U * S * W;
        return stored[spare].get(state_size);
    }
    void close() {
        for (int g = 0; g < G; ++g) {
            const int64_t b = row[g];
            T* out = static_cast<T*>(m.joint_out) + b * U * S * W;
            if (!is_direct || length == 0) {
                std::memset(out, 0, U * S * W * sizeof(T));
                for (int64_t i = 0; i < n_live; ++i)
                    for (int64_t s = live[i] * S; s < (live[i] + 1) * S; ++s)
                        std::memcpy(out + s * W, now + s * lanes + g * W, W * sizeof(T));
            } else {
                for (int64_t u = 0, i = 0; u < U; ++u)
                    if (i < n_live && live[i] == u)
                        ++i;
                    else
                        std::memset(out + u * size, 0, size * sizeof(T));
            }
            if (is_per_task)
                for (int64_t u = 0; u < U; ++u)
                    std::memcpy(m.exponent_out + (b * U + u) * W, exponents + u * lanes + g * W, W * sizeof(int32_t));
            m.log_mass_out[b] = mass_log[g], m.log_evidence_out[b] = evidence_log[g], m.dropped_out[b] = dropped[g];
            for (int64_t t = length + 1; t <= m.time; ++t) blank(g, t);
            if (!m.start) blank(g, 0);
        }
    }

    // E[s, x_t] of every lane; of variant u, where each has its own table.
    const T* evidence(int64_t t, int j, int64_t u) {
        if (is_shared) return evidence_ + j * size;
        look_up(evidence_, t, j, u);
        return evidence_;
    }
    void look_up(T* e, int64_t t, int j, int64_t u) {
        for (int g = 0; g < G; ++g) {
            const int64_t before = j == 0 ? 0 : shift[(j - 1) * G + g];
            const T scale = T(std::ldexp(1.0, int(shift[j * G + g] - before)));
            const T* table = by_token + (u * vocab + m.tokens[row[g] * m.time + t + j]) * S * W;
            for (int64_t s = 0; s < S; ++s)
                for (int64_t w = 0; w < W; ++w) e[s * lanes + g * W + w] = table[s * W + w] * scale;
        }
    }
    // The running exponent of the scale of each step, from the mass before it.
    void choose_scales(int64_t t, int steps) {
        for (int g = 0; g < G; ++g) {
            const double before = mass_log[g] / kLog2;
            int64_t sum = std::isfinite(before) && !is_per_task ? -int64_t(std::floor(before)) : 0;
            for (int j = 0; j < steps; ++j) {
                if (!is_per_task) sum += m.shifts[m.tokens[row[g] * m.time + t + j]];
                shift[j * G + g] = sum;
            }
        }
    }

    // `steps` tokens from `now`; false where the scales leave the range, with nothing lost.
    bool advance(int64_t t, int steps) {
        choose_scales(t, steps);
        clear(steps);
        if (is_shared)
            for (int j = 0; j < steps; ++j) look_up(evidence_ + j * size, t, j, 0);
        T* last = to(t + steps);
        const int64_t fitting = kBlockBytes / int64_t(size * sizeof(T));
        const int64_t block = fitting < 1 ? 1 : fitting < kBlock ? fitting : kBlock;
        for (int64_t first = 0; first < n_live; first += block) {
            const int64_t stop = first + block < n_live ? first + block : n_live;
            for (int64_t i = first; i < stop; ++i) {
                const int64_t u = live[i];
                multiply(now + u * size, evidence(t, 0, u), scratch[0] + (i - first) * size);
                weigh(u, 0, steps);
            }
            for (int j = 0; j < steps; ++j)
                for (int64_t i = first; i < stop; ++i) {
                    const int64_t u = live[i];
                    const T* from = scratch[j & 1] + (i - first) * size;
                    T* mix = mixed + (is_shared ? j * size : 0);
                    if (!is_shared) std::memset(mix, 0, size * sizeof(T));
                    if (j + 1 < steps) {
                        T* to_next = scratch[(j + 1) & 1] + (i - first) * size;
                        move<true, true>(u, from, to_next, evidence(t, j + 1, u), mix);
                        weigh(u, j + 1, steps);
                    } else {
                        move<false, true>(u, from, last + u * size, nullptr, mix);
                    }
                    if (!is_shared) predict(mix, u, j);
                }
            if (first / kFold != stop / kFold || stop == n_live) fold(steps);
        }
        if (steps > 1 && !is_in_range(steps)) return false;
        if (is_shared)
            for (int j = 0; j < steps; ++j) predict(mixed + j * size, 0, j);
        return true;
    }
    bool is_in_range(int steps) {
        for (int j = 0; j < steps; ++j)
            for (int g = 0; g < G; ++g) {
                const double sum = mass_of(static_cast<const double*>(total) + j * lanes, g);
                if (failed[g] < 0 && !(sum > Range<T>::low && sum < Range<T>::high)) return false;
            }
        return true;
    }
    void clear(int steps) {
        if (is_shared) std::memset(mixed, 0, steps * size * sizeof(T));
        const size_t n = size_t(steps) * lanes;
        std::memset(some, 0, n * sizeof(T)), std::memset(some_logs, 0, n * sizeof(T));
        std::memset(total, 0, n * sizeof(double)), std::memset(surprise, 0, n * sizeof(double));
        std::memset(probability, 0, size_t(steps) * G * table_width * sizeof(T));
        if (m.prune > 0 || m.transition) std::memset(mass, 0, size_t(steps) * U * G * sizeof(double));
    }

    // One token, every task by its own scale.
    void advance_tasks(int64_t t) {
        choose_scales(t, 1);
        if (is_shared) look_up(evidence_, t, 0, 0);
        T* last = to(t + 1);
        for (int64_t i = 0; i < n_live; ++i) {
            const int64_t u = live[i];
            T* b = scratch[0];
            multiply(now + u * size, evidence(t, 0, u), b);
            int32_t* own_exponents = exponents + u * lanes;
            for (int l = 0; l < lanes; ++l) {
                const int e = weight[l] > T(0) ? std::ilogb(weight[l]) : 0;
                own_exponents[l] += e;
                factor[l] = T(std::ldexp(1.0, -e));
            }
            for (int64_t s = 0; s < S; ++s)
                for (int v = 0; v < lanes; v += L) store(b + s * lanes + v, load(b + s * lanes + v) * load(factor + v));
            move<false, false>(u, b, last + u * size, nullptr, nullptr);
        }
        observe(last);
    }
    // Totals, entropies and predictive of a state as it is.
    void observe(const T* state) {
        clear(1);
        for (int g = 0; g < G; ++g) shift[g] = is_per_task ? -highest(state, g) : 0;
        for (int64_t i = 0; i < n_live; ++i) {
            const int64_t u = live[i];
            const T* a = state + u * size;
            T* mix = mixed;
            if (!is_shared) std::memset(mix, 0, size * sizeof(T));
            factors(u);
            for (int v = 0; v < lanes; v += L) {
                V sum = {};
                for (int64_t s = 0; s < S; ++s) {
                    const V x = load(a + s * lanes + v) * load(factor + v);
                    sum += x;
                    store(mix + s * lanes + v, load(mix + s * lanes + v) + x);
                }
                store(weight + v, sum);
            }
            weigh(u, 0, 1);
            if (i % kFold == kFold - 1 || i + 1 == n_live) fold(1);
            if (!is_shared) predict(mix, u, 0);
        }
        if (is_shared) predict(mixed, 0, 0);
    }
    int64_t highest(const T* state, int g) const {
        int64_t most = std::numeric_limits<int32_t>::min();
        for (int64_t i = 0; i < n_live; ++i)
            for (int64_t w = g * W; w < (g + 1) * W; ++w) {
                const T* a = state + live[i] * size + w;
                bool any = false;
                for (int64_t s = 0; s < S && !any; ++s) any = a[s * lanes] != T(0);
                if (any && exponents[live[i] * lanes + w] > most) most = exponents[live[i] * lanes + w];
            }
        return most == std::numeric_limits<int32_t>::min() ? 0 : most;
    }
    // What each lane's numbers of variant u count.  Above the highest exponent are those of empty lanes alone, which
    // have stayed behind.
    void factors(int64_t u) {
        for (int l = 0; l < lanes; ++l) factor[l] = T(1);
        if (!is_per_task) return;
        for (int g = 0; g < G; ++g)
            for (int64_t l = g * W; l < (g + 1) * W; ++l) {
                const int64_t e = exponents[u * lanes + l] + shift[g];
                factor[l] = e > 0 || e < -Range<T>::bias + 1 ? T(0) : T(std::ldexp(1.0, int(e)));
            }
    }

    // b = a e, its sums over the states are the weights.
    void multiply(const T* a, const T* e, T* b) {
        int v = 0;
        for (; v + kWide * L <= lanes; v += kWide * L) multiply<kWide>(a + v, e + v, b + v, weight + v);
        for (; v + 3 * L <= lanes; v += 3 * L) multiply<3>(a + v, e + v, b + v, weight + v);
        for (; v < lanes; v += L) multiply<1>(a + v, e + v, b + v, weight + v);
    }
    template <int N>
    void multiply(const T* a, const T* e, T* b, T* sums) const {
        V sum[N] = {};
        const size_t width = lanes, end = size;
        for (size_t at = 0; at < end; at += width)
            for (int v = 0; v < N; ++v) {
                const V x = load(a + at + v * L) * load(e + at + v * L);
                sum[v] += x;
                store(b + at + v * L, x);
            }
        for (int v = 0; v < N; ++v) store(sums + v * L, sum[v]);
    }
    // out = A_u^T from, added to mix; with a token to follow, out is times its evidence, and its sums are the weights.
    template <bool more, bool mixes>
    void move(int64_t u, const T* from, T* out, const T* e, T* mix) {
        int v = 0;
        for (; v + kWide * L <= lanes; v += kWide * L) columns<kWide, more, mixes>(u, from, out, e, mix, v);
        for (; v + 3 * L <= lanes; v += 3 * L) columns<3, more, mixes>(u, from, out, e, mix, v);
        for (; v < lanes; v += L) columns<1, more, mixes>(u, from, out, e, mix, v);
    }
    // Columns with equally many entries come together: no branch inside such a run goes another way than before.
    template <int N, bool more, bool mixes>
    void columns(int64_t u, const T* from, T* out, const T* e, T* mix, int at) {
        V sum[N] = {};
        const int64_t *starts = m.starts + u * S, *stops = m.stops + u * S;
        from += at, out += at;
        if (more) e += at;
        if (mixes) mix += at;
        for (int64_t i = 0; i < S; i = stops[i]) {
            const Run r{starts[i], starts[i + 1] - starts[i], m.order + u * S + i, m.order + u * S + stops[i]};
            switch (r.count) {
                case 1: some_columns<N, 1, more, mixes>(r, from, out, e, mix, sum); break;
                case 2: some_columns<N, 2, more, mixes>(r, from, out, e, mix, sum); break;
                case 3: some_columns<N, 3, more, mixes>(r, from, out, e, mix, sum); break;
                case 4: some_columns<N, 4, more, mixes>(r, from, out, e, mix, sum); break;
                case 5: some_columns<N, 5, more, mixes>(r, from, out, e, mix, sum); break;
                default: some_columns<N, 0, more, mixes>(r, from, out, e, mix, sum);
            }
        }
        if (more)
            for (int v = 0; v < N; ++v) store(weight + at + v * L, sum[v]);
    }
    struct Run {
        int64_t first, count;
        const int32_t *target, *stop;
    };
    // K: entries of each column, 0 for any number.
    template <int N, int K, bool more, bool mixes>
    COMMISSURE_INLINE void some_columns(const Run& r, const T* from, T* out, const T* e, T* mix, V (&sum)[N]) const {
        const int32_t* row = m.rows + r.first;
        const T* value = values + r.first;
        const size_t width = lanes;
        const int64_t count = K ? K : r.count;
        for (const int32_t* target = r.target; target < r.stop; ++target, row += count, value += count) {
            V x[N] = {};
            for (int64_t n = 0; n < count; ++n) {
                const V c = splat(value[n]);
                const T* p = from + size_t(uint32_t(row[n])) * width;
                for (int v = 0; v < N; ++v) x[v] += c * load(p + v * L);
            }
            const size_t to = size_t(uint32_t(*target)) * width;
            if (mixes)
                for (int v = 0; v < N; ++v) store(mix + to + v * L, load(mix + to + v * L) + x[v]);
            if (more)
                for (int v = 0; v < N; ++v) sum[v] += x[v] = x[v] * load(e + to + v * L);
            for (int v = 0; v < N; ++v) store(out + to + v * L, x[v]);
        }
    }
    // Count the weights of variant u at step j.
    void weigh(int64_t u, int j, int steps) {
        T *sums = some + j * lanes, *logs = some_logs + j * lanes;
        for (int v = 0; v < lanes; v += L) {
            const V w = load(weight + v);
            store(sums + v, load(sums + v) + w);
            if (m.entropy) store(logs + v, load(logs + v) + w * log_v<T>(w));
        }
        if (m.transition || (m.prune > 0 && j == steps - 1))
            for (int g = 0; g < G; ++g) mass[(j * U + u) * G + g] = mass_of(static_cast<const T*>(weight), g);
    }
    // Sums over more than a few variants are float64.
    void fold(int steps) {
        for (int64_t i = 0; i < int64_t(steps) * lanes; ++i) {
            total[i] += double(some[i]), some[i] = 0;
            surprise[i] += double(some_logs[i]), some_logs[i] = 0;
        }
    }
    template <class Number>
    double mass_of(const Number* of, int g) const {
        double sum = 0;
        for (int64_t w = g * W; w < (g + 1) * W; ++w) sum += double(of[w]);
        return sum;
    }
    // Add the predictive of the mixture to step j's.
    void predict(const T* mix, int64_t u, int j) {
        const T* table = by_state + u * S * W * table_width;
        for (int g = 0; g < G; ++g) {
            T* p = probability + (j * G + g) * table_width;
            for (int64_t first = 0; first < wide; first += 4 * L) {
                V x[4];
                for (int v = 0; v < 4; ++v) x[v] = load(p + first + v * L);
                const T* e = table + first;
                for (int64_t s = 0; s < S; ++s)
                    for (int64_t w = 0; w < W; ++w, e += table_width) {
                        const V c = splat(mix[s * lanes + g * W + w]);
                        for (int v = 0; v < 4; ++v) x[v] += c * load(e + v * L);
                    }
                for (int v = 0; v < 4; ++v) store(p + first + v * L, x[v]);
            }
        }
    }

    void settle(int steps) {
        for (int j = 0; j < steps; ++j)
            for (int g = 0; g < G; ++g) z[j * G + g] = mass_of(static_cast<const double*>(total) + j * lanes, g);
    }
    // What is told about time t, from step j; `base` is the log of what one unit of the state's numbers stood for.
    void results(int j, int64_t t) {
        if (m.epistemic) uncertainties(j);
        for (int g = 0; g < G; ++g) {
            const double sum = z[j * G + g], log_sum = std::log(sum), told = log_sum - double(shift[j * G + g]) * kLog2;
            const int64_t b = row[g], at = b * (m.time + 1) + t;
            if (failed[g] < 0 && !(sum > 0)) failed[g] = t, m.impossible[b] = t - 1;
            if (failed[g] >= 0) {
                blank(g, t);
                m.evidence[at] = evidence_log[g] = -std::numeric_limits<double>::infinity();
                mass_log[g] = 0;
                continue;
            }
            if (t > 0) evidence_log[g] = base[g] + told, mass_log[g] = is_per_task ? told : log_sum;
            m.evidence[at] = evidence_log[g], m.drops[at] = dropped[g];
            if (m.entropy) m.entropy[at] = log_sum - mass_of(static_cast<const double*>(surprise) + j * lanes, g) / sum;
            if (m.transition)
                for (int64_t u = 0; u < U; ++u)
                    static_cast<T*>(m.transition)[at * U + u] = T(mass[(j * U + u) * G + g] / sum);
            if (m.emission)
                for (int64_t w = 0; w < W; ++w)
                    static_cast<T*>(m.emission)[at * W + w] = T(double(total[j * lanes + g * W + w]) / sum);
            tell(probability + (j * G + g) * table_width, g, at);
        }
    }
    void tell(const T* p, int g, int64_t at) {
        T* out = static_cast<T*>(m.log_probs) + at * vocab;
        double sum = 0, entropy = 0;
        for (int64_t v = 0; v < vocab; ++v) sum += double(p[v]);
        const T log_sum = T(std::log(sum));
        for (int64_t first = 0; first < wide; first += L) {
            T lines[L];
            const V line = log_v<T>(load(p + first)) - log_sum;
            std::memcpy(lines, &line, sizeof(line));
            for (int64_t v = first; v < first + L && v < vocab; ++v) {
                out[v] = p[v] > T(0) ? lines[v - first] : -std::numeric_limits<T>::infinity();
                if (p[v] > T(0)) entropy -= double(p[v]) * double(out[v]);
            }
        }
        if (m.epistemic) m.epistemic[at] = entropy / sum - unsure[g];
    }
    void blank(int g, int64_t t) {
        const int64_t at = row[g] * (m.time + 1) + t;
        const auto fill = [](T* to, int64_t n) {
            for (int64_t i = 0; i < n; ++i) to[i] = std::numeric_limits<T>::quiet_NaN();
        };
        fill(static_cast<T*>(m.log_probs) + at * vocab, vocab);
        m.evidence[at] = m.drops[at] = kNan;
        if (m.entropy) m.entropy[at] = kNan;
        if (m.epistemic) m.epistemic[at] = kNan;
        if (m.transition) fill(static_cast<T*>(m.transition) + at * U, U);
        if (m.emission) fill(static_cast<T*>(m.emission) + at * W, W);
    }

    // The posterior mean of the tasks' own predictive entropies, in `unsure`; a task of negligible mass is left out.
    void uncertainties(int j) {
        for (int g = 0; g < G; ++g) unsure[g] = 0;
        for (int64_t i = 0; i < n_live; ++i) {
            const int64_t u = live[i];
            factors(u);
            for (int g = 0; g < G; ++g)
                for (int64_t w = 0; w < W; ++w) unsure[g] += spread(u, g, w, z[j * G + g]) / z[j * G + g];
        }
    }
    // Mass times predictive entropy of one task.
    double spread(int64_t u, int g, int64_t w, double sum) {
        const int64_t lane = g * W + w;
        const T* a = now + u * size + lane;
        double in_all = 0;
        for (int64_t s = 0; s < S; ++s) in_all += double(a[s * lanes]);
        in_all *= double(factor[lane]);
        if (!(in_all > Range<T>::negligible * sum)) return 0;
        const T* table = by_state + ((is_shared ? 0 : u * S) * W + w) * table_width;
        V mass_in = {}, logs = {};
        for (int64_t first = 0; first < wide; first += 4 * L) {
            V x[4] = {};
            for (int64_t s = 0; s < S; ++s) {
                const V c = splat(a[s * lanes]);
                for (int v = 0; v < 4; ++v) x[v] += c * load(table + s * W * table_width + first + v * L);
            }
            for (int v = 0; v < 4; ++v) mass_in += x[v], logs += x[v] * log_v<T>(x[v]);
        }
        const double p = double(commissure::sum<T>(mass_in));
        return double(factor[lane]) * (p * std::log(p) - double(commissure::sum<T>(logs)));
    }

    // Leave out the variants that have less than `prune` of the posterior mass, from the next token on.
    void drop(int j, int64_t t) {
        T* state = const_cast<T*>(now);  // what this call has written
        for (int g = 0; g < G; ++g) {
            if (failed[g] >= 0) continue;
            double lost = 0;
            for (int64_t i = 0; i < n_live; ++i) {
                double& own = mass[(j * U + live[i]) * G + g];
                const double share = own / z[j * G + g];
                if (share >= m.prune) continue;
                lost += share, own = 0;
                T* a = state + live[i] * size + g * W;
                for (int64_t s = 0; s < S; ++s) std::memset(a + s * lanes, 0, W * sizeof(T));
            }
            dropped[g] += lost, mass_log[g] += std::log1p(-lost);
            m.drops[row[g] * (m.time + 1) + t] = dropped[g];
        }
        int64_t kept = 0;
        for (int64_t i = 0; i < n_live; ++i) {
            bool any = false;
            for (int g = 0; g < G; ++g) any = any || mass[(j * U + live[i]) * G + g] > 0;
            if (any) live[kept++] = live[i];
        }
        n_live = kept;
    }
};

template <class T>
void run(HmmView& m) {
    Filter<T> filter(m);
    for (;;) {
        const int64_t group = __atomic_fetch_add(&m.next, 1, __ATOMIC_RELAXED);
        if (group >= m.groups) return;
        filter.run(group);
    }
}

void filter(HmmView& m, bool single) { single ? run<float>(m) : run<double>(m); }

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

const HmmKernel COMMISSURE_JOIN(hmm_kernel, COMMISSURE_CLONE) = {filter};

}  // namespace commissure
