// Reservoirs that share one sparse matrix, all their steps:
//
//   p_t = scale_b (x_{t-1} W) + u_t W_in + bias         x_t = Q((1 - leak) x_{t-1} + leak f(p_t) + noise_t)
//   v_t = (1 - leak) v_{t-1} + leak f'(p_t) scale_b (v_{t-1} W)
//
// Rows are the lanes of vectors, [node][lane], so that an edge's weight and source are read once for all rows and each
// source is one place in memory.  A row alone has no lanes to fill: its edges are added up four at a time, which is the
// order of the lanes too, so that a row's bits do not depend on its company.
//
// Compiled once per instruction set (COMMISSURE_CLONE names the clone); see CMakeLists.txt.
#include "reservoir_scan.h"

#include "linear.h"
#include "mesa_lanes.h"

namespace commissure {
namespace {

constexpr int kTile = 16;  // targets whose sums are all there before any of them is updated
// Vectors of sums at a time, four accumulators each: what the registers hold.  Loads bound them, and a load of 64 bytes
// takes less than two of 32.
#if defined(__AVX512F__)
constexpr int kPass = 4, kPassBytes = 64;
#else
constexpr int kPass = 2, kPassBytes = kVectorBytes;
#endif

template <class T>
COMMISSURE_INLINE Vec<T> floor_v(Vec<T> x) {
    const Vec<T> nearest = (x + Simd<T>::kRound) - Simd<T>::kRound;
    return nearest > x ? nearest - T(1) : nearest;
}

// f(p), and f'(p) where it is wanted.
template <class T, bool wants_slope>
COMMISSURE_INLINE Vec<T> activate(int64_t activation, Vec<T> p, Vec<T>& slope) {
    using V = Vec<T>;
    const V zero = {}, one = splat<T>(1);
    V f;
    switch (activation) {
        case kLinear:
            if (wants_slope) slope = one;
            return p;
        case kRelu:
            if (wants_slope) slope = p > T(0) ? one : zero;
            return p < T(0) ? zero : p;  // NaN stays
        case kLeakyRelu:
            if (wants_slope) slope = p > T(0) ? one : one * T(0.5);
            return p > T(0) ? p : p * T(0.5);
        case kElu:
            f = p > T(0) ? p : expm1_v<T>(p > T(0) ? zero : p) * T(0.5);
            if (wants_slope) slope = p > T(0) ? one : f + T(0.5);
            return f;
        case kSigmoid:
            f = sigmoid_v<T>(p);
            if (wants_slope) slope = f * (T(1) - f);
            return f;
        case kStep:
            if (wants_slope) slope = zero;
            return p != p ? p : (p >= T(0.5) ? one : zero);
        default:
            f = tanh_v<T>(p);
            if (wants_slope) slope = T(1) - f * f;
            return f;
    }
}

// One block of rows; Index: of sources.
template <class T, class Index>
class Scan {
    using V = Vec<T>;
    static constexpr int L = kLanes<T>;
    using Wide = LaneVec<T>;
    static constexpr int K = Lane<T>::L;
    typedef T Loose __attribute__((vector_size(sizeof(Wide)), aligned(sizeof(T)), may_alias));  // anywhere in memory
    typedef T Block __attribute__((vector_size(kPassBytes), aligned(sizeof(T)), may_alias));
    static constexpr int kBlock = kPassBytes / kVectorBytes;  // vectors
    typedef T Quad __attribute__((vector_size(kEdgeGroup * sizeof(T))));
    typedef T LooseQuad __attribute__((vector_size(kEdgeGroup * sizeof(T)), aligned(sizeof(T)), may_alias));

   public:
    // Vectors of rows beside each other, at most.
    Scan(const ReservoirView& view, int64_t vectors)
        : m(view), N(view.nodes), N16((view.nodes + kTile - 1) / kTile * kTile),
          even(size_t(N16) * size_t(vectors) * size_t(1 + view.tangents) * L), odd(even.size()),
          sums(size_t(kTile) * size_t(vectors) * size_t(1 + view.tangents) * L), scale(size_t(vectors) * L),
          u(size_t(view.inputs) * size_t(vectors) * L), rate(size_t(N16)), bias(size_t(N16)),
          weights(size_t(view.inputs) * size_t(N16) * (view.is_own ? size_t(vectors) * L : 1)) {
        half = T(m.state_bits ? int64_t(1) << (m.state_bits - 1) : 0), steps = 2 * half - 1;
        std::memcpy(rate, m.leak, size_t(N) * sizeof(T));
        std::memcpy(bias, m.bias, size_t(N) * sizeof(T));
        if (m.is_own) return;
        for (int64_t c = 0; c < m.inputs; ++c)
            std::memcpy(weights + c * N16, in(m.input_weights) + c * N, size_t(N) * sizeof(T));
    }
    void run(int64_t first, int64_t last) {
        row = first, rows = last - first;
        rows == 1 && m.tangents == 0 ? alone() : together();
    }

   private:
    const ReservoirView& m;
    const int64_t N, N16;
    Buffer<T> even, odd;        // [node][lane]: the rows' states, then each of their tangents; before and after a step
    Buffer<T> sums;           // [target][lane]
    Buffer<T> scale, u;       // [lane], [input][lane]
    Buffer<T> rate, bias;     // [node]
    Buffer<T> weights;        // [input][node], with lanes where rows have their own
    T half, steps;            // of the levels
    int64_t row = 0, rows = 0;  // of the block
    int V_ = 0;               // vectors of rows
    size_t stride = 0;          // of a node
    T *now = even, *next = odd;

    void turn_over() {
        T* after = next;
        next = now, now = after;
    }
    static const T* in(const void* p) { return static_cast<const T*>(p); }
    static T* out(void* p) { return static_cast<T*>(p); }

    // Whether a step is tanh and nothing else: what most scans are, in a loop without branches.
    bool is_plain() const { return m.activation == kTanh && !m.noise && half == 0; }

    // The new state from the sum over edges, the drive, and the state before; `slope` is f' where tangents are wanted.
    template <bool is_plain, bool wants_slope>
    COMMISSURE_INLINE V update(V sum, V drive, V before, V own_scale, V own_rate, V noise, V& slope) const {
        const V f = activate<T, wants_slope>(is_plain ? int64_t(kTanh) : m.activation, sum * own_scale + drive, slope);
        V x = (T(1) - own_rate) * before + own_rate * f;
        if (is_plain) return x;
        x = m.noise ? x + noise : x;
        if (half == 0) return x;
        V level = floor_v<T>(x * (steps * T(0.5)));
        level = level < -half ? splat<T>(-half) : level;
        level = level > half - 1 ? splat<T>(half - 1) : level;
        return (level + T(0.5)) * (T(2) / steps);
    }

    // Rows side by side.
    void together() {
        V_ = int((rows + L - 1) / L), stride = size_t(V_) * L * size_t(1 + m.tangents);
        const int lanes = V_ * L;
        for (int r = 0; r < lanes; ++r) scale[r] = r < rows ? in(m.scale)[row + r] : T(0);
        for (int r = 0; r < rows; ++r) {
            for (int64_t j = 0; j < N; ++j) now[size_t(j) * stride + r] = in(m.state)[(row + r) * N + j];
            for (int64_t k = 0; k < m.tangents; ++k)
                for (int64_t j = 0; j < N; ++j)
                    now[size_t(j) * stride + (k + 1) * lanes + r] =
                        in(m.tangents_in)[((row + r) * m.tangents + k) * N + j];
            if (!m.is_own) continue;
            for (int64_t c = 0; c < m.inputs; ++c)
                for (int64_t j = 0; j < N; ++j)
                    weights[(c * N16 + j) * lanes + r] = in(m.input_weights)[((row + r) * m.inputs + c) * N + j];
        }
        for (int64_t t = 0; t < m.time; ++t) {
            for (int64_t c = 0; c < m.inputs; ++c)
                for (int r = 0; r < rows; ++r) u[c * lanes + r] = in(m.x)[((row + r) * m.time + t) * m.inputs + c];
            for (int64_t j = 0; j < N; j += kTile) {
                const int targets = int(N - j < kTile ? N - j : kTile);
                add_up(j, targets);
                if (m.tangents)
                    advance<false, true>(t, j, targets);
                else
                    is_plain() ? advance<true, false>(t, j, targets) : advance<false, false>(t, j, targets);
                tell(t, j, targets);
            }
            turn_over();
        }
        for (int r = 0; r < rows && m.tangents; ++r)
            for (int64_t k = 0; k < m.tangents; ++k)
                for (int64_t j = 0; j < N; ++j)
                    out(m.tangents_out)[((row + r) * m.tangents + k) * N + j] =
                        now[size_t(j) * stride + (k + 1) * lanes + r];
    }
    // The sums of a tile, all lanes; a function of its own, for its loops need all registers.
    __attribute__((noinline)) void add_up(int64_t start, int targets) {
        const int vectors = int(stride) / L;
        for (int i = 0; i < targets; ++i) {
            T* to = sums + size_t(i) * stride;
            int v = 0;
            for (; v + kPass <= vectors; v += kPass) pass<kPass / kBlock, Block>(start + i, v * L, to);
            switch (vectors - v) {
                case 3: pass<3, V>(start + i, v * L, to); break;
                case 2: pass<2, V>(start + i, v * L, to); break;
                case 1: pass<1, V>(start + i, v * L, to); break;
            }
        }
    }
    template <int P, class W>
    COMMISSURE_INLINE void pass(int64_t j, int first, T* to) const {
        constexpr int lanes = int(sizeof(W) / sizeof(T));
        W sum[kEdgeGroup][P] = {};
        const Index* source = static_cast<const Index*>(m.sources) + m.starts[j];
        const Index* end = static_cast<const Index*>(m.sources) + m.starts[j + 1];
        const T* value = in(m.values) + m.starts[j];
        const T* from = now + first;
        for (; source < end; source += kEdgeGroup, value += kEdgeGroup)
            for (int a = 0; a < kEdgeGroup; ++a) {
                const W w = value[a] - W{};
                const T* x = from + size_t(source[a]) * stride;
                for (int v = 0; v < P; ++v) sum[a][v] += w * *reinterpret_cast<const W*>(x + v * lanes);
            }
        for (int v = 0; v < P; ++v)
            *reinterpret_cast<W*>(to + first + v * lanes) = (sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v]);
    }
    // The new states of a tile; a function of its own, so that constants stay in registers, and with its own copies of
    // members, which stores could change for all that a compiler knows.
    template <bool is_plain, bool has_tangents>
    __attribute__((noinline)) void advance(int64_t t, int64_t start, int targets) {
        const int lanes = V_ * L;
        const int64_t inputs = m.inputs;
        const bool is_own = m.is_own;
        const T *u = this->u, *scale = this->scale, *weights = this->weights;
        for (int i = 0; i < targets; ++i) {
            const int64_t j = start + i;
            const T* sum = sums + size_t(i) * stride;
            const T* before = now + size_t(j) * stride;
            T* after = next + size_t(j) * stride;
            const V own_rate = splat<T>(rate[j]), own_bias = splat<T>(bias[j]);
            for (int v = 0; v < lanes; v += L) {
                V drive = own_bias, slope = {}, noise = {};
                for (int64_t c = 0; c < inputs; ++c) {
                    const V w = is_own ? load(weights + (c * N16 + j) * lanes + v) : splat<T>(weights[c * N16 + j]);
                    drive += w * load(u + c * lanes + v);
                }
                if (!is_plain && m.noise)
                    for (int r = 0; r < L && v + r < rows; ++r)
                        noise[r] = in(m.noise)[((row + v + r) * m.time + t) * N + j];
                const V factor = load(scale + v);
                store(after + v, update<is_plain, has_tangents>(load(sum + v), drive, load(before + v), factor,
                                                                own_rate, noise, slope));
                if (!has_tangents) continue;
                for (int at = lanes + v; at < int(stride); at += lanes)
                    store(after + at, (T(1) - own_rate) * load(before + at) +
                                          own_rate * (slope * (factor * load(sum + at))));
            }
        }
    }
    // The states of a tile, row by row.
    void tell(int64_t t, int64_t j, int targets) const {
        const T* from = next + size_t(j) * stride;
        T* to = out(m.states) + (row * m.time + t) * N + j;
        const size_t apart = size_t(m.time) * size_t(N);  // of two rows
        int r = 0;
        for (; targets == kTile && r + K <= rows; r += K)
            for (int i = 0; i < kTile; i += K) {
                Wide block[K];
                const T* corner = from + size_t(i) * stride + r;
                for (int n = 0; n < K; ++n) block[n] = *reinterpret_cast<const Loose*>(corner + size_t(n) * stride);
                transpose<T>(block);
                for (int n = 0; n < K; ++n) *reinterpret_cast<Loose*>(to + size_t(r + n) * apart + i) = block[n];
            }
        for (; r < rows; ++r)
            for (int i = 0; i < targets; ++i) to[size_t(r) * apart + i] = from[size_t(i) * stride + r];
    }

    // One row: nodes are the lanes of everything but the sums.
    void alone() {
        scale[0] = in(m.scale)[row];
        std::memcpy(now, in(m.state) + row * N, size_t(N) * sizeof(T));
        for (int64_t c = 0; c < m.inputs && m.is_own; ++c)
            std::memcpy(weights + c * N16, in(m.input_weights) + (row * m.inputs + c) * N, size_t(N) * sizeof(T));
        for (int64_t t = 0; t < m.time; ++t) {
            T* to = out(m.states) + (row * m.time + t) * N;
            for (int64_t start = 0; start < N; start += kTile) {
                const int targets = int(N - start < kTile ? N - start : kTile);
                add_up_alone(now, m.starts + start, static_cast<const Index*>(m.sources), in(m.values), targets, sums);
                is_plain() ? advance_alone<true>(t, start, targets) : advance_alone<false>(t, start, targets);
            }
            std::memcpy(to, next, size_t(N) * sizeof(T));
            turn_over();
        }
    }
    template <bool is_plain>
    __attribute__((noinline)) void advance_alone(int64_t t, int64_t start, int targets) {
        const int64_t inputs = m.inputs;
        const T* input = in(m.x) + (row * m.time + t) * inputs;
        const T *now = this->now, *rate = this->rate, *bias = this->bias, *weights = this->weights, *sums = this->sums;
        T* next = this->next;
        const V factor = splat<T>(scale[0]);
        for (int v = 0; v < targets; v += L) {
            const int64_t j = start + v;
            V drive = load(bias + j), slope, noise = {};
            for (int64_t c = 0; c < inputs; ++c) drive += load(weights + c * N16 + j) * splat<T>(input[c]);
            for (int i = 0; !is_plain && m.noise && i < L && j + i < N; ++i)
                noise[i] = in(m.noise)[(row * m.time + t) * N + j + i];
            store(next + j, update<is_plain, false>(load(sums + v), drive, load(now + j), factor, load(rate + j),
                                                    noise, slope));
        }
    }
    // The sums of a tile; a function of its own, for its loop needs all registers.
    __attribute__((noinline)) static void add_up_alone(const T* from, const int64_t* starts, const Index* sources,
                                                       const T* values, int targets, T* to) {
        const Index* source = sources + starts[0];
        const T* value = values + starts[0];
        for (int i = 0; i < targets; ++i) {
            Quad sum = {};
            for (const Index* end = sources + starts[i + 1]; source < end; source += kEdgeGroup, value += kEdgeGroup) {
                // Loaded as words and taken apart: compilers else widen them in vector registers, and move each back.
                uint64_t words[sizeof(Index) / 2];
                std::memcpy(words, source, sizeof(words));
                const auto place = [&](int a) {
                    return size_t(Index(words[a * sizeof(Index) / 8] >> (a * sizeof(Index) * 8 % 64)));
                };
                const Quad x = {from[place(0)], from[place(1)], from[place(2)], from[place(3)]};
                sum += *reinterpret_cast<const LooseQuad*>(value) * x;
            }
            to[i] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
};

template <class T, class Index>
void run(ReservoirView& m) {
    Scan<T, Index> scan(m, (m.rows + kLanes<T> - 1) / kLanes<T>);
    for (;;) {
        const int64_t first = __atomic_fetch_add(&m.next, m.rows, __ATOMIC_RELAXED);
        if (first >= m.batch) return;
        scan.run(first, first + m.rows < m.batch ? first + m.rows : m.batch);
    }
}
template <class T>
void run_index(ReservoirView& m) {
    m.is_wide ? run<T, uint32_t>(m) : run<T, uint16_t>(m);
}
void scan(ReservoirView& m, bool single) { single ? run_index<float>(m) : run_index<double>(m); }
int64_t lanes(bool single) { return single ? kLanes<float> : kLanes<double>; }

}  // namespace

#define COMMISSURE_JOIN_(a, b) a##_##b
#define COMMISSURE_JOIN(a, b) COMMISSURE_JOIN_(a, b)

const ReservoirKernel COMMISSURE_JOIN(reservoir_kernel, COMMISSURE_CLONE) = {scan, lanes};

}  // namespace commissure
