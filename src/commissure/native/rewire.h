// Rewiring a network edge by edge: swaps of edge ends, and exchanges of weights that bring back the nodes' strengths.
//
// Every proposal t reads words 3 t, 3 t + 1 and 3 t + 2 of one stream, whether or not the ones before it were accepted.
#pragma once

#include <cstdint>

namespace commissure {

struct SwapView {
    int64_t nodes, edges, levels, proposals;
    bool undirected, keep_connected;
    const int64_t* labels;  // [levels, nodes], all different from one level to the next: 0 ... classes - 2
    int64_t classes;        // one for each label, and one for the edges between nodes that share no label
    int64_t* ends;          // [edges, 2], source and target: read and written
    uint64_t key;
};

struct AnnealView {
    int64_t nodes, edges, classes, stages, proposals;  // proposals of each stage
    bool undirected;
    const int64_t *ends, *class_of;  // [edges, 2], [edges]: weights change places within a class
    double* weights;                 // [edges], read and written
    const double* strengths;         // wanted: [2, nodes], out and in, or [nodes] of an undirected network
    double temperature, cooling;     // of the first stage, and its factor from one stage to the next
    uint64_t key;
};

int64_t swap_edges(const SwapView& view);      // the number of accepted proposals
int64_t anneal_weights(const AnnealView& view);

}  // namespace commissure
