"""What simulating reservoirs costs, beside other ways of doing it, in turns in one process.

| part | what is timed | unit of `ours` |
|---|---|---|
| states | sequences of one network from rest, all states kept | microseconds a sequence and step |
| sweep | five radii, training and test series simulated, seven module readouts fitted and scored | seconds |
| sweep + exponent | the same, and the largest Lyapunov exponent of each training series | seconds |
| memory | what a sweep of 20,000 steps adds to the peak memory after one of 2,000; `gain` counts 1 MB at least | MB |

`gain` is the rival's time over ours, turn by turn; `difference` the largest between the two in float64, of states or of
scores, taken before anything is timed.  Seconds are CPU seconds of the process, all its threads together.  Both sides
simulate in `dtype`; the spectral radius and the readouts are float64's.  The rival of a sweep computes every exponent
by a QR decomposition of every step, as its model does; it is timed on `EXPONENT_STEPS` steps and multiplied, which
`rival` says.  Memory is measured on Linux.

Floor of a step: nnz multiply-adds and as many loads of a weight and a 16-bit source a block of rows, `nodes` tanh and
stores a row.  A row of one block costs two loads (of its state and of a share of the weight) a multiply-add and vector.
Method: bioRxiv 2025.06.20.660760; sizes of its networks: 400 nodes, density .1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array
from torch import Tensor

from commissure.core.rng import generator
from commissure.native.reservoir import reservoir_matrix, reservoir_scan
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import evaluate
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.rivals import dense_states, loop_exponents, loop_states, module_scores, sparse_states
from commissure.reservoirs.spectral import spectral_radius
from commissure.reservoirs.tasks import MemoryCapacity
from commissure.runs.turns import Range, alternate

__all__ = [
    "RADII",
    "BenchRow",
    "bench",
    "bench_memory",
    "bench_states",
    "bench_sweep",
    "random_network",
]

RADII = (0.6, 0.8, 1.0, 1.2, 1.4)
PENALTY = 1e-4
EXPONENT_STEPS = 5
QUICK, FULL = ((400, 0.1),), tuple((nodes, density) for nodes in (400, 1000, 5000) for density in (0.01, 0.03, 0.1))
ROWS = (1, 16, 64)
_STATUS = Path("/proc/self/status")
_WORK = 1e8  # multiply-adds a call: some 50 ms of ours


@dataclass(frozen=True)
class BenchRow:
    """One rival at one size; see the table of the module for `part`, `ours`, `gain` and `difference`."""

    part: Literal["states", "sweep", "sweep + exponent", "memory"]
    rival: str
    nodes: int
    density: float
    rows: int
    dtype: str
    ours: float
    gain: Range
    difference: float


def gains(spent: Float[np.ndarray, "contenders repeats"]) -> list[Range]:
    """Every later contender's time over the first's."""
    return [Range.of(ratio) for ratio in spent[1:] / spent[0]]


@cache  # of 5000 nodes: a minute or more for its spectral radius
def random_network(nodes: int, density: float, seed: int = 0) -> csr_array:
    """Independent directed edges with weights uniform in [-1, 1], spectral radius .9.

    >>> random_network(50, 0.1).shape
    (50, 50)
    """
    rng = generator(seed, "bench network", nodes)
    edges = rng.choice(nodes * nodes, round(density * nodes * nodes), replace=False)
    places = np.divmod(edges, nodes)
    weights = csr_array((rng.uniform(-1, 1, len(edges)), places), shape=(nodes, nodes))
    return weights * (0.9 / spectral_radius(weights).value)


def bench_states(
    nodes: int, density: float, *, rows: int, single: bool = False, repeats: int = 5, steps: int | None = None
) -> tuple[BenchRow, ...]:
    """Sequences side by side, against the loop, dense and sparse products in torch; both sides in one precision.

    `steps`: of each sequence; by default as many as 1e8 multiply-adds take.
    """
    weights, rng = random_network(nodes, density), generator(1, "bench inputs")
    steps = steps or int(np.clip(_WORK / (rows * (weights.nnz + 20 * nodes)), 5, 500))
    x, w_in = rng.uniform(-1, 1, (rows, steps, 1)), rng.uniform(-1, 1, (1, nodes))
    exact = _contenders(weights, x, w_in, np.float64)
    ours = np.asarray(exact["commissure"]())
    different = {name: float(np.abs(np.asarray(run()) - ours).max()) for name, run in exact.items()}
    timed = _contenders(weights, x, w_in, np.float32) if single else exact
    spent = alternate(list(timed.values()), repeats=repeats)
    own = float(np.median(spent[0])) / (rows * steps) * 1e6
    dtype = "float32" if single else "float64"
    return tuple(
        BenchRow("states", name, nodes, density, rows, dtype, own, gain, different[name])
        for name, gain in zip(list(timed)[1:], gains(spent), strict=True)
    )


def _contenders(
    weights: csr_array, x: np.ndarray, w_in: np.ndarray, dtype: type[np.floating]
) -> dict[str, Callable[[], object]]:
    dense, u, v = weights.toarray().astype(dtype), x.astype(dtype), w_in.astype(dtype)
    w, u_t, v_t = (torch.from_numpy(array) for array in (dense, u, v))
    matrix, rest = reservoir_matrix(weights, dtype=w.dtype), torch.zeros(len(x), len(dense), dtype=w.dtype)
    by_target = _torch_csr(weights.T.tocsr().astype(dtype))
    return {
        "commissure": lambda: reservoir_scan(matrix, u_t, rest, v_t).states,
        "loop": lambda: loop_states(dense, u, v),
        "dense": lambda: dense_states(w, u_t, v_t),
        "sparse": lambda: sparse_states(by_target, u_t, v_t),
    }


def _torch_csr(weights: csr_array) -> Tensor:
    rows, columns = (torch.from_numpy(array.astype(np.int64)) for array in (weights.indptr, weights.indices))
    with warnings.catch_warnings():  # torch calls its CSR layout a beta
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(rows, columns, torch.from_numpy(weights.data), size=weights.shape)


class Sweep(NamedTuple):
    """A hierarchical network with its own spectral radius, its task, and where it is driven and read."""

    network: Connectome
    own: float
    task: MemoryCapacity
    io: IOMap


def _sweep(length: int) -> Sweep:
    network = HierarchicalSBM.from_preset("milisav2025", level=3).sample(0)
    io = IOMap.from_modules(network.modules(), inputs=[0])
    return Sweep(network, spectral_radius(network).value, MemoryCapacity(length=length), io)


def _ours(sweep: Sweep, *, lyapunov: bool = False, dtype: torch.dtype = torch.float64) -> list[float]:
    scores = evaluate(
        sweep.network,
        sweep.task,
        io=sweep.io,
        spectral_radius=RADII,
        penalties=[PENALTY],
        lyapunov=lyapunov,
        dtype=dtype,
    )
    return [score.score for score in scores]


def _loops(sweep: Sweep, dtype: type[np.floating] = np.float64) -> list[float]:
    w_in = sweep.io.input_weights(sweep.network.n_nodes).astype(dtype)
    dense = (sweep.network.to_array() / spectral_radius(sweep.network).value).astype(dtype)
    scores = []
    for radius in RADII:
        kept = []
        for data in (sweep.task.data(0, "train"), sweep.task.data(0, "test")):
            states = loop_states(dense * dtype(radius), data.inputs[None].astype(dtype), w_in)[0]
            kept.append((states[data.warmup :].astype(np.float64), data.targets[data.warmup :]))
        scores += module_scores(kept[0], kept[1], modules=sweep.io.outputs, penalty=PENALTY)
    return scores


def _exponents(sweep: Sweep, dtype: type[np.floating]) -> Callable[[], object]:
    """The exponents of `EXPONENT_STEPS` steps at radius 1."""
    dense = (sweep.network.to_array() / sweep.own).astype(dtype)
    drive = np.ones((1, EXPONENT_STEPS, 1), dtype), sweep.io.input_weights(len(dense)).astype(dtype)
    states = loop_states(dense, *drive)[0]
    return lambda: loop_exponents(dense, states)


def bench_sweep(*, length: int = 2000, repeats: int = 3) -> tuple[BenchRow, ...]:
    """The whole sweep against the loop, without and with the largest exponent; both sides in one precision."""
    sweep = _sweep(length)
    different = float(np.abs(np.subtract(_ours(sweep), _loops(sweep))).max())
    steps = len(RADII) * len(sweep.task.data(0, "train").inputs)
    extrapolated = f"loop, QR of {EXPONENT_STEPS} steps x {steps / EXPONENT_STEPS:g}"
    sizes, found = (sweep.network.n_nodes, sweep.network.density, 2 * len(RADII)), []
    for ours, theirs in ((torch.float64, np.float64), (torch.float32, np.float32)):
        runs: list[Callable[[], object]] = [
            lambda ours=ours: _ours(sweep, dtype=ours),
            lambda ours=ours: _ours(sweep, dtype=ours, lyapunov=True),
            lambda theirs=theirs: _loops(sweep, theirs),
            _exponents(sweep, theirs),
        ]
        own, with_exponent, loops, few = alternate(runs, repeats=repeats)
        parts: tuple[tuple[Literal["sweep", "sweep + exponent"], str, np.ndarray, np.ndarray], ...] = (
            ("sweep", "loop", own, loops),
            ("sweep + exponent", extrapolated, with_exponent, loops + few * (steps / EXPONENT_STEPS)),
        )
        for part, rival, spent, other in parts:
            gain, dtype = gains(np.stack([spent, other]))[0], np.dtype(theirs).name
            found.append(BenchRow(part, rival, *sizes, dtype, float(np.median(spent)), gain, different))
    return tuple(found)


def bench_memory(*, length: int = 20000) -> BenchRow:
    """What a sweep of `length` steps adds to the peak memory of a process that has done one of a tenth (Linux).

    Ours adds the two series themselves, which the task makes whole.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        ours, loop = pool.map(_added, ("ours", "loop"), (length, length))
    gain = loop / max(ours, 1.0)
    sweep = _sweep(length)
    sizes = sweep.network.n_nodes, sweep.network.density, 2 * len(RADII), "float64"
    return BenchRow("memory", "loop", *sizes, ours, Range(gain, gain, gain), 0.0)


def _added(kind: Literal["ours", "loop"], length: int) -> float:
    """Megabytes."""
    run = _ours if kind == "ours" else _loops
    run(_sweep(length // 10))
    before = _peak()
    run(_sweep(length))
    return _peak() - before


def _peak() -> float:
    """Megabytes that were in memory at once; not `getrusage`, whose peak a process inherits from its parent."""
    lines = _STATUS.read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def bench(*, full: bool = False, repeats: int = 5) -> tuple[BenchRow, ...]:
    """Every part: at the published size in a minute, or with `full` at all sizes, which takes some ten."""
    found: list[BenchRow] = []
    for nodes, density in FULL if full else QUICK:
        for rows in ROWS:
            for single in (False, True):
                found += bench_states(nodes, density, rows=rows, single=single, repeats=repeats)
    found += bench_sweep(repeats=min(repeats, 3))
    return (*found, bench_memory()) if full and _STATUS.exists() else tuple(found)
