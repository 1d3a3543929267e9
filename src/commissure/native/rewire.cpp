// Word t of a stream is read by its counter, so that the plain-Python reference follows the same proposals.
#include "rewire.h"

#include <cmath>
#include <utility>
#include <vector>

namespace commissure {
namespace {

// Word i of stream `key`: splitmix64 (Steele, Lea & Flood 2014) read by its counter.
uint64_t random_word(uint64_t key, uint64_t i) {
    uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// A number from 0 to bound - 1, the high half of the product; its bias is below bound / 2^64.
int64_t below(int64_t bound, uint64_t word) {
    return int64_t((static_cast<unsigned __int128>(word) * uint64_t(bound)) >> 64);
}

// Edges by class: any edge, then any edge of its class, itself included.
class Pairs {
public:
    Pairs(int64_t edges, int64_t classes, const int64_t* class_of)
        : edges_(edges), class_of_(class_of), start_(classes + 1), order_(edges) {
        for (int64_t e = 0; e < edges; ++e) ++start_[class_of[e] + 1];
        for (int64_t c = 0; c < classes; ++c) start_[c + 1] += start_[c];
        std::vector<int64_t> next(start_);
        for (int64_t e = 0; e < edges; ++e) order_[next[class_of[e]]++] = e;
    }
    std::pair<int64_t, int64_t> pick(uint64_t key, uint64_t t) const {
        const int64_t e = below(edges_, random_word(key, 3 * t));
        const int64_t first = start_[class_of_[e]], count = start_[class_of_[e] + 1] - first;
        return {e, order_[first + below(count, random_word(key, 3 * t + 1))]};
    }

private:
    int64_t edges_;
    const int64_t* class_of_;
    std::vector<int64_t> start_, order_;
};

// The edges there are, by open addressing at most half full; an undirected edge has one entry.
class EdgeSet {
public:
    EdgeSet(int64_t nodes, int64_t edges, bool undirected) : nodes_(nodes), undirected_(undirected) {
        uint64_t size = 16;
        while (size < 2 * uint64_t(edges)) size *= 2;
        mask_ = size - 1;
        slots_.assign(size, kEmpty);
    }
    bool has(int64_t a, int64_t b) const { return slots_[find(entry(a, b))] != kEmpty; }
    void add(int64_t a, int64_t b) {
        const uint64_t x = entry(a, b);
        slots_[find(x)] = x;
    }
    // Entries behind the hole move up, as long as that brings them nearer to where they belong.
    void remove(int64_t a, int64_t b) {
        uint64_t hole = find(entry(a, b));
        for (uint64_t i = (hole + 1) & mask_; slots_[i] != kEmpty; i = (i + 1) & mask_) {
            const uint64_t away = (i - home(slots_[i])) & mask_;
            if (away < ((i - hole) & mask_)) continue;
            slots_[hole] = slots_[i];
            hole = i;
        }
        slots_[hole] = kEmpty;
    }

private:
    static constexpr uint64_t kEmpty = ~uint64_t(0);
    uint64_t entry(int64_t a, int64_t b) const {
        if (undirected_ && b < a) std::swap(a, b);
        return uint64_t(a) * uint64_t(nodes_) + uint64_t(b);
    }
    uint64_t home(uint64_t x) const { return random_word(x, 0) & mask_; }
    uint64_t find(uint64_t x) const {
        uint64_t i = home(x);
        while (slots_[i] != kEmpty && slots_[i] != x) i = (i + 1) & mask_;
        return i;
    }
    int64_t nodes_;
    bool undirected_;
    uint64_t mask_;
    std::vector<uint64_t> slots_;
};

// The ends of edges at each node.  End i belongs to edge i / 2, its other end is i ^ 1, sources are even.
class Incidence {
public:
    explicit Incidence(const SwapView& view) : ends_(view.ends), undirected_(view.undirected) {
        start_.resize(view.nodes + 1), at_.resize(2 * view.edges), place_.resize(2 * view.edges);
        for (int64_t i = 0; i < 2 * view.edges; ++i) ++start_[ends_[i] + 1];
        for (int64_t v = 0; v < view.nodes; ++v) start_[v + 1] += start_[v];
        std::vector<int64_t> next(start_);
        for (int64_t i = 0; i < 2 * view.edges; ++i) at_[place_[i] = next[ends_[i]]++] = i;
        seen_[0].assign(view.nodes, 0), seen_[1].assign(view.nodes, 0);
    }
    void exchange(int64_t i, int64_t j) {
        std::swap(ends_[i], ends_[j]);
        std::swap(place_[i], place_[j]);
        at_[place_[i]] = i, at_[place_[j]] = j;
    }
    // Whether a path leads from a to b: searched from both, a node at a time, until they meet or one has no more.
    bool leads(int64_t a, int64_t b) {
        ++round_;
        const int64_t from[2] = {a, b};
        for (int side = 0; side < 2; ++side) {
            queue_[side].assign(1, from[side]);
            seen_[side][from[side]] = round_;
        }
        for (size_t next = 0; next < queue_[0].size() && next < queue_[1].size(); ++next)
            for (int side = 0; side < 2; ++side)
                if (expand(queue_[side][next], side)) return true;
        return false;
    }

private:
    bool expand(int64_t node, int side) {
        for (int64_t k = start_[node]; k < start_[node + 1]; ++k) {
            const int64_t end = at_[k];
            if (!undirected_ && (end & 1) != side) continue;
            const int64_t other = ends_[end ^ 1];
            if (seen_[1 - side][other] == round_) return true;
            if (seen_[side][other] == round_) continue;
            seen_[side][other] = round_;
            queue_[side].push_back(other);
        }
        return false;
    }
    int64_t* ends_;
    bool undirected_;
    int64_t round_ = 0;
    std::vector<int64_t> start_, at_, place_, seen_[2], queue_[2];
};

int64_t class_of(const SwapView& v, int64_t a, int64_t b) {
    for (const int64_t* label = v.labels; label != v.labels + v.levels * v.nodes; label += v.nodes)
        if (label[a] == label[b]) return label[a];
    return v.classes - 1;
}

// Two nodes' parts in a change of energy: the strength at `up` grows by delta, the one at `down` falls by it.
double cost(const std::vector<double>& excess, int64_t up, int64_t down, double delta) {
    return up == down ? 0.0 : 2.0 * delta * (excess[up] - excess[down] + delta);
}

}  // namespace

int64_t swap_edges(const SwapView& v) {
    if (v.edges == 0) return 0;
    EdgeSet edges(v.nodes, v.edges, v.undirected);
    std::vector<int64_t> classes(v.edges);
    for (int64_t e = 0; e < v.edges; ++e) {
        edges.add(v.ends[2 * e], v.ends[2 * e + 1]);
        classes[e] = class_of(v, v.ends[2 * e], v.ends[2 * e + 1]);
    }
    const Pairs pairs(v.edges, v.classes, classes.data());
    Incidence graph(v);
    int64_t accepted = 0;
    for (int64_t t = 0; t < v.proposals; ++t) {
        const auto [e, f] = pairs.pick(v.key, t);
        const int64_t flip = v.undirected ? int64_t(random_word(v.key, 3 * t + 2) >> 63) : 0;
        const int64_t i = 2 * e + 1, j = 2 * f + 1 - flip;  // these two ends change places: a-b, c-d to a-d, c-b
        const int64_t a = v.ends[i ^ 1], b = v.ends[i], c = v.ends[j ^ 1], d = v.ends[j];
        if (a == d || c == b || class_of(v, a, d) != classes[e] || class_of(v, c, b) != classes[e]) continue;
        if (edges.has(a, d) || edges.has(c, b)) continue;
        graph.exchange(i, j);
        // Every path that used a lost edge can go round it: two searches are enough.
        if (v.keep_connected && !(graph.leads(a, b) && graph.leads(c, d))) {
            graph.exchange(i, j);
            continue;
        }
        edges.remove(a, b), edges.remove(c, d);
        edges.add(a, d), edges.add(c, b);
        ++accepted;
    }
    return accepted;
}

int64_t anneal_weights(const AnnealView& v) {
    if (v.edges == 0) return 0;
    const Pairs pairs(v.edges, v.classes, v.class_of);
    const int64_t targets = v.undirected ? 0 : v.nodes;  // where the strengths of the targets begin
    std::vector<double> excess(targets + v.nodes);
    for (size_t i = 0; i < excess.size(); ++i) excess[i] = -v.strengths[i];
    for (int64_t e = 0; e < v.edges; ++e) {
        excess[v.ends[2 * e]] += v.weights[e];
        excess[targets + v.ends[2 * e + 1]] += v.weights[e];
    }
    int64_t accepted = 0;
    double temperature = v.temperature;
    for (int64_t t = 0; t < v.stages * v.proposals; ++t) {
        if (t && t % v.proposals == 0) temperature *= v.cooling;
        const auto [e, f] = pairs.pick(v.key, t);
        const double delta = v.weights[f] - v.weights[e];
        if (delta == 0) continue;
        const int64_t a = v.ends[2 * e], b = targets + v.ends[2 * e + 1];
        int64_t c = v.ends[2 * f], d = targets + v.ends[2 * f + 1];
        if (b == c || a == d) std::swap(c, d);  // undirected edges with a node in common: it keeps its strength
        const double change = cost(excess, a, c, delta) + cost(excess, b, d, delta);
        const double chance = double(random_word(v.key, 3 * t + 2) >> 11) * 0x1p-53;
        if (change > 0 && chance >= std::exp(-change / temperature)) continue;
        std::swap(v.weights[e], v.weights[f]);
        excess[a] += delta, excess[b] += delta;
        excess[c] -= delta, excess[d] -= delta;
        ++accepted;
    }
    return accepted;
}

}  // namespace commissure
