"""Reservoirs against reservoirpy and resdag, beside the rivals of `commissure.reservoirs.bench`: CPU seconds, ratios.

    python benchmarks/reservoirs.py [--full] [--turns N]

One, 16 and 64 sequences of one network from rest, in float64 and in float32 on both sides; states are compared first,
in float64.  Best settings: reservoirpy with the matrix in scipy's CSR, sequences one after another, which is what it
does; resdag in inference mode, dense and in torch's CSR.  CPU seconds are those of the whole process with the number
of threads that OMP_NUM_THREADS gives; a peer that is not installed is left out.  Then the whole sweep and its memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from scipy.sparse import csr_array

from commissure.core.rng import generator
from commissure.native.reservoir import reservoir_matrix, reservoir_scan
from commissure.reservoirs.bench import (
    FULL,
    QUICK,
    ROWS,
    bench_memory,
    bench_states,
    bench_sweep,
    gains,
    random_network,
)
from commissure.runs.turns import alternate

WORK = 4e7  # multiply-adds a call
Peer = Callable[[csr_array, np.ndarray, np.ndarray], dict[str, Callable[[], object]]]


def ours(weights: csr_array, x: np.ndarray, w_in: np.ndarray) -> dict[str, Callable[[], object]]:
    """The scan, all rows together."""
    u, v = torch.from_numpy(x), torch.from_numpy(w_in)
    matrix, rest = reservoir_matrix(weights, dtype=u.dtype), torch.zeros(len(x), w_in.shape[1], dtype=u.dtype)
    return {"commissure": lambda: reservoir_scan(matrix, u, rest, v).states}


def reservoirpy(weights: csr_array, x: np.ndarray, w_in: np.ndarray) -> dict[str, Callable[[], object]]:
    """Its node with a CSR matrix, one sequence after another."""
    from reservoirpy.nodes import Reservoir
    from scipy.sparse import csr_matrix

    matrix = csr_matrix(weights.T).astype(x.dtype)
    bias = np.zeros(w_in.shape[1], x.dtype)
    node = Reservoir(W=matrix, Win=w_in.T.copy(), bias=bias, lr=1.0, dtype=x.dtype.type)

    def run() -> np.ndarray:
        states = []
        for sequence in x:
            node.reset()
            states.append(node.run(sequence))
        return np.stack(states)

    node.initialize(x[0])
    return {"reservoirpy": run}


def resdag(weights: csr_array, x: np.ndarray, w_in: np.ndarray) -> dict[str, Callable[[], object]]:
    """Its layer, all rows together, dense and sparse."""
    from resdag.init.input_feedback.base import InputFeedbackInitializer
    from resdag.init.topology.base import TopologyInitializer
    from resdag.layers import ESNLayer

    class Given(TopologyInitializer):
        prescaled = True

        def initialize(self, weight: torch.Tensor, spectral_radius: float | None = None) -> torch.Tensor:
            return weight.copy_(torch.from_numpy(weights.toarray().T))

    class GivenInputs(InputFeedbackInitializer):
        def initialize(self, weight: torch.Tensor, **_: object) -> torch.Tensor:
            return weight.copy_(torch.from_numpy(w_in.T))

    u = torch.from_numpy(x)

    def run(layer: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            layer.reset_state()
            return layer(u)

    found: dict[str, Callable[[], object]] = {}
    for name, is_sparse in (("resdag dense", False), ("resdag sparse", True)):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its CSR layout a beta
            layer = ESNLayer(
                w_in.shape[1], 1, bias=False, dtype=u.dtype, topology=Given(), feedback_initializer=GivenInputs(),
                sparse=is_sparse,
            )  # fmt: skip
        found[name] = lambda layer=layer: run(layer)
    return found


def compare(nodes: int, density: float, rows: int, dtype: type[np.floating], peers: list[Peer], turns: int) -> None:
    """One line a peer."""
    weights, rng = random_network(nodes, density), generator(1, "bench inputs")
    steps = int(np.clip(WORK / (rows * (weights.nnz + 20 * nodes)), 5, 500))
    x, w_in = rng.uniform(-1, 1, (rows, steps, 1)), rng.uniform(-1, 1, (1, nodes))
    exact = {name: run for peer in (ours, *peers) for name, run in peer(weights, x, w_in).items()}
    expected = np.asarray(exact["commissure"]())
    errors = {name: float(np.abs(np.asarray(run()) - expected).max()) for name, run in exact.items()}
    cast = [weights.astype(dtype), x.astype(dtype), w_in.astype(dtype)]
    timed = {name: run for peer in (ours, *peers) for name, run in peer(*cast).items()}
    spent = alternate(list(timed.values()), repeats=turns)
    own = np.median(spent[0]) / (rows * steps) * 1e6
    for name, gain in zip(list(timed)[1:], gains(spent), strict=True):
        print(
            f"{nodes:5d} nodes {density:5.2f} {rows:3d} rows {np.dtype(dtype).name}: {own:8.2f} us a row and step; "
            f"{name:14s} takes {gain.low:6.2f} {gain.median:6.2f} {gain.high:6.2f} times as long"
            f" (states differ by {errors[name]:.0e})",
            flush=True,
        )


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description="Reservoirs against reservoirpy and resdag.")
    parser.add_argument("--full", action="store_true", help="every size, not the published one alone")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    installed = [name for name in ("reservoirpy", "resdag") if importlib.util.find_spec(name)]
    print(f"smallest, median, largest of {options.turns} turns;", *(f"{name} {version(name)}" for name in installed))
    peers = [{"reservoirpy": reservoirpy, "resdag": resdag}[name] for name in installed]
    for nodes, density in FULL if options.full else QUICK:
        for rows in ROWS:
            for dtype in (np.float64, np.float32):
                compare(nodes, density, rows, dtype, peers, options.turns)
                for row in bench_states(nodes, density, rows=rows, single=dtype == np.float32, repeats=options.turns):
                    print("  ", row, flush=True)
    for row in (*bench_sweep(), bench_memory()):
        print(row, flush=True)


if __name__ == "__main__":
    main()
