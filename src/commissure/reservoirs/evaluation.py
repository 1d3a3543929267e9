"""How well a network does a task: one simulation for every spectral radius, input, readout, noise and precision.

    x_t = (1 - leak) x_{t-1} + leak f(radius / rho(W) x_{t-1} W + gain u_t W_in),   x_0 = 0
    read_t = Q(x_t[nodes] + sigma n_t),      prediction = read_t b,      R^2 = 1 - SSE / SST on the test series

| here        | meaning                                                                                    |
|-------------|--------------------------------------------------------------------------------------------|
| `io`        | where the task enters and which nodes each readout reads; several maps run side by side     |
| sigma n_t   | `read_noise` times standard normal numbers; equal for every radius and input, so that paired |
| Q           | the nearest of 2^`read_bits` levels from -1 to 1, the upper of two; None: left out          |
| b           | ridge without an intercept, penalty fixed or by generalized cross-validation               |
| `score`     | mean R^2 over a readout's targets (`module_r2` averages readouts, then inputs)             |
| `capacity`  | sum of squared correlations over a readout's targets: Jaeger's memory capacity for delays  |

Every (radius, input, series) is a row of one batched scan, cut in time; states become `ReadoutMoments` and are dropped.
bioRxiv 2025.06.20.660760, Methods; Jaeger, GMD report 152 (2001).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from commissure.core.errors import DegenerateError, InputError
from commissure.native.reservoir import ACTIVATIONS, Activation, reservoir_matrix
from commissure.reservoirs.connectome import Connectome, as_csr
from commissure.reservoirs.inputs import real
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import IllConditionedWarning, ReadoutFactor, ReadoutMoments
from commissure.reservoirs.reservoir import check_bits, gains, per_node, rounded
from commissure.reservoirs.simulation import Condition, Reading, Simulation
from commissure.reservoirs.tasks.data import Split, Task, TaskData

__all__ = ["ModuleScore", "Score", "evaluate", "module_r2"]

T = TypeVar("T")


@dataclass(frozen=True)
class Score:
    """One readout under one condition; `input` is the index of its map in `io`, `output` of its readout there.

    `solver`: "moments", or "factor" where the penalty was too small for the normal equations.  `lyapunov`: the largest
    exponent on the training series in nats a step, None where it was not asked for.
    """

    spectral_radius: float | None
    input: int
    output: int
    read_noise: float
    read_bits: int | None
    penalty: float
    score: float
    capacity: float
    target_scores: tuple[float, ...]
    solver: Literal["moments", "factor"]
    lyapunov: float | None


@dataclass(frozen=True)
class ModuleScore:
    """Scores of one condition averaged over the readouts of each input, then over the inputs."""

    spectral_radius: float | None
    read_noise: float
    read_bits: int | None
    score: float
    capacity: float
    lyapunov: float | None


def evaluate(
    network: Connectome | csr_array | Float[np.ndarray, "nodes nodes"],
    task: Task,
    *,
    io: IOMap | Sequence[IOMap],
    spectral_radius: float | Sequence[float | None] | None = 0.9,
    input_gain: float = 1.0,
    leak: float | Float[np.ndarray, " nodes"] = 1.0,
    activation: Activation = "tanh",
    penalties: float | Sequence[float] = 1e-6,
    read_noise: float | Sequence[float] = 0.0,
    read_bits: int | Sequence[int | None] | None = None,
    weight_bits: int | None = None,
    lyapunov: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Score, ...]:
    """Scores for every radius, input map, noise, precision and readout, in this order, from one batched simulation.

    `network` weights[i, j] from source i to target j; `spectral_radius` None leaves the weights as they are;
    `penalties` several: the smallest generalized cross-validation error of each readout decides.  Training and test
    series come from `task.data(seed, ...)`, both start at rest.  `dtype` is the simulation's: moments are float64.
    Memory does not grow with the length of the series.

    A penalty below 50 eps of the largest eigenvalue of a readout's Gram matrix warns (`IllConditionedWarning`) and is
    solved from a QR decomposition in a second pass; just above it scores are right to about 1e-5.  Nodes that no input
    reaches warn (`DisconnectedWarning`).

    >>> from commissure.reservoirs.tasks import MemoryCapacity
    >>> ring = np.roll(np.eye(6), 1, axis=1)
    >>> task = MemoryCapacity(max_delay=2, length=200, warmup=10)
    >>> io = IOMap(inputs=([0],), outputs=([1, 2], [2, 3]))
    >>> scores = evaluate(ring, task, io=io, spectral_radius=[0.2, 0.4], activation="linear")
    >>> [(s.spectral_radius, s.output, round(s.score, 1)) for s in scores]
    [(0.2, 0, 1.0), (0.2, 1, 0.5), (0.4, 0, 1.0), (0.4, 1, 0.5)]
    """
    maps, radii = _several("io", io), _several("spectral_radius", spectral_radius)
    values = [real(f"penalties[{i}]", v, 0.0) for i, v in enumerate(_several("penalties", penalties))]
    noises, bits = _several("read_noise", read_noise), _several("read_bits", read_bits)
    conditions = _conditions(noises, bits)
    simulation = _simulation(network, task, maps, radii, input_gain, leak, activation, weight_bits, seed, dtype)
    everything = range(len(maps)), range(len(radii))
    collected = simulation.collect(
        ReadoutMoments, inputs=everything[0], radii=everything[1], conditions=conditions, lyapunov=lyapunov
    )
    solved = _solve(simulation, collected.readings, values)
    return tuple(
        _row(solved[i, r, condition, o], radii[r], i, o, condition, collected.exponents, r)
        for r, i, condition in product(range(len(radii)), range(len(maps)), conditions)
        for o in range(maps[i].n_readouts)
    )


def module_r2(scores: Iterable[Score]) -> tuple[ModuleScore, ...]:
    """The published score: mean R^2 over the readouts of each input map, then over input maps, for every condition.

    >>> from dataclasses import replace
    >>> one = Score(0.9, 0, 0, 0.0, None, 1.0, 0.5, 1.0, (0.5,), "moments", None)
    >>> [(row.score, row.capacity) for row in module_r2([one, replace(one, output=1, score=0.25)])]
    [(0.375, 1.0)]
    """
    grouped: dict[tuple[float | None, float, int | None], dict[int, list[Score]]] = {}
    for s in scores:
        grouped.setdefault((s.spectral_radius, s.read_noise, s.read_bits), {}).setdefault(s.input, []).append(s)

    def mean(inputs: dict[int, list[Score]], name: str) -> float:
        return float(np.mean([np.mean([getattr(s, name) for s in same]) for same in inputs.values()]))

    return tuple(
        ModuleScore(*key, mean(found, "score"), mean(found, "capacity"), _mean_exponent(found))
        for key, found in grouped.items()
    )


class _Solution(NamedTuple):
    """One readout, fitted and scored."""

    penalty: float
    r2: Float[np.ndarray, " outputs"]
    squared_correlation: Float[np.ndarray, " outputs"]
    solver: Literal["moments", "factor"]


def _solve(
    simulation: Simulation, readings: dict[tuple[int, int, Condition], Reading], penalties: list[float]
) -> dict[tuple[int, int, Condition, int], _Solution]:
    """Every readout by (input map, radius, condition, readout); those beyond the normal equations by a second pass."""
    solved, beyond = {}, {}
    for (i, g, condition), reading in readings.items():
        for split, sums in reading._asdict().items():
            if not bool(torch.isfinite(cast(ReadoutMoments, sums).lower).all()):
                fix = "take a smaller spectral radius or a bounded activation"
                raise DegenerateError(f"states of the {split} series, input map {i}, grew beyond float64: {fix}")
        bad = cast(ReadoutMoments, reading.train).is_sub_precision(min(penalties)).any(1)
        good = np.flatnonzero(~bad)
        if len(good):
            part = Reading(reading.train.select(good), reading.test.select(good))
            solved.update(_fitted(simulation, part, penalties, i, g, condition, good))
        if bad.any():
            beyond[i, g, condition] = np.flatnonzero(bad)
    if beyond:
        largest = max(len(rows) for rows in beyond.values())
        warnings.warn(
            f"penalty {min(penalties):g} is below 50 eps of the largest eigenvalue of the states' Gram matrix for "
            f"{len(beyond)} of {len(readings)} groups of readouts (up to {largest} spectral radii): these are solved "
            "from a QR decomposition of the states; pass a larger penalty to avoid it",
            IllConditionedWarning,
            stacklevel=3,
        )
        inputs = sorted({i for i, _, _ in beyond})
        radii = sorted({int(r) for rows in beyond.values() for r in rows})
        conditions = [c for c in dict.fromkeys(c for _, _, c in readings) if any(c == key[2] for key in beyond)]
        again = simulation.collect(ReadoutFactor, inputs=inputs, radii=radii, conditions=conditions).readings
        for (i, g, condition), rows in beyond.items():
            reading, at = again[i, g, condition], np.searchsorted(radii, rows)
            part = Reading(reading.train.select(at), reading.test.select(at))
            solved.update(_fitted(simulation, part, penalties, i, g, condition, rows))
    return solved


def _fitted(
    simulation: Simulation,
    reading: Reading,
    penalties: list[float],
    i: int,
    g: int,
    condition: Condition,
    radii: Int[np.ndarray, " radii"],
) -> dict[tuple[int, int, Condition, int], _Solution]:
    path = reading.train.path(penalties)
    best = path.best() if len(penalties) > 1 else np.zeros(path.effective_dof.shape[1:], np.int64)
    coefficients = np.take_along_axis(path.coefficients, best[None, ..., None, None], 0)[0]
    scores = reading.test.score(coefficients)
    solver: Literal["moments", "factor"] = "moments" if isinstance(reading.train, ReadoutMoments) else "factor"
    return {
        (i, int(r), condition, o): _Solution(
            penalties[best[a, b]], scores.r2[a, b], scores.squared_correlation[a, b], solver
        )
        for a, r in enumerate(radii)
        for b, o in enumerate(simulation.groups[i][g].readouts)
    }


def _row(
    solution: _Solution,
    radius: float | None,
    i: int,
    o: int,
    condition: Condition,
    exponents: dict[int, Float[np.ndarray, " radii"]],
    r: int,
) -> Score:
    return Score(
        spectral_radius=radius,
        input=i,
        output=o,
        read_noise=condition.noise,
        read_bits=condition.bits,
        penalty=solution.penalty,
        score=float(solution.r2.mean()),
        capacity=float(solution.squared_correlation.sum()),
        target_scores=tuple(solution.r2.tolist()),
        solver=solution.solver,
        lyapunov=float(exponents[i][r]) if i in exponents else None,
    )


def _mean_exponent(inputs: dict[int, list[Score]]) -> float | None:
    found = [same[0].lyapunov for same in inputs.values()]
    return None if None in found else float(np.mean(cast(list[float], found)))


def _simulation(
    network: object,
    task: Task,
    maps: list[IOMap],
    radii: list[float | None],
    input_gain: float,
    leak: float | Float[np.ndarray, " nodes"],
    activation: Activation,
    weight_bits: int | None,
    seed: int,
    dtype: torch.dtype,
) -> Simulation:
    """Everything checked and in the form that the scan takes."""
    weights = as_csr("network", network)
    nodes = weights.shape[0]
    if activation not in ACTIVATIONS:
        raise InputError("activation", activation, f"one of {', '.join(ACTIVATIONS)}")
    rates = per_node("leak", leak, nodes)
    if not ((rates > 0) & (rates <= 1)).all():
        raise InputError("leak", leak, "0 < leak <= 1")
    series: dict[Split, TaskData] = {"train": task.data(seed, "train"), "test": task.data(seed, "test")}
    for split, data in series.items():
        _check_series(split, data)
    network = network if isinstance(network, Connectome) else _without_loops(weights)
    for i, each in enumerate(maps):
        _check_map(f"io[{i}]", each, task)
        each.check(network)
    factors = gains(weights, radii)
    check_bits("weight_bits", weight_bits, 2)
    if weight_bits is not None:
        weights = rounded(weights, weight_bits)
    return Simulation(
        matrix=reservoir_matrix(weights, dtype=dtype),
        gains=torch.tensor(factors, dtype=dtype),
        series=series,
        io=tuple(maps),
        input_gain=real("input_gain", input_gain),
        leak=torch.from_numpy(rates).to(dtype),
        activation=activation,
        seed=seed,
    )


def _conditions(noises: list[float], bits: list[int | None]) -> list[Condition]:
    for i, noise in enumerate(noises):
        real(f"read_noise[{i}]", noise, 0.0)
    for i, number in enumerate(bits):
        check_bits(f"read_bits[{i}]", number, 1)
    return [Condition(float(noise), number) for noise, number in product(noises, bits)]


def _check_series(split: Split, data: TaskData) -> None:
    name = f"task.data(seed, {split!r})"
    if data.inputs.ndim != 2 or data.targets.ndim != 2 or len(data.inputs) != len(data.targets):
        shapes = data.inputs.shape, data.targets.shape
        raise InputError(name, shapes, "inputs (time, channels) and targets (time, outputs)")
    if not 0 <= data.warmup < len(data.inputs):
        raise InputError(f"{name}.warmup", data.warmup, f"an integer from 0 to {len(data.inputs) - 1}")
    for part, array in (("inputs", data.inputs), ("targets", data.targets)):
        if not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise InputError(f"{name}.{part}[{at[0]}, {at[1]}]", float(array[at]), "finite numbers")


def _check_map(name: str, io: IOMap, task: Task) -> None:
    if not isinstance(io, IOMap):
        raise InputError(name, io, "an IOMap", "IOMap.from_modules(network.modules(), inputs=[0])")
    if io.n_inputs != task.n_inputs:
        raise InputError(f"{name}.inputs", io.n_inputs, f"one array for each of the task's {task.n_inputs} channels")
    for o, columns in enumerate(io.targets or ()):
        if columns.max() >= task.n_outputs:
            raise InputError(
                f"{name}.targets[{o}]", int(columns.max()), f"columns of the task, 0 to {task.n_outputs - 1}"
            )


def _without_loops(weights: csr_array) -> Connectome:
    loopless = weights.copy()
    loopless.setdiag(0.0)
    return Connectome.from_array(loopless, orientation="source_target")


def _several(name: str, value: T | Sequence[T]) -> list[T]:
    """One value or several, as a list of at least one."""
    values = [cast(T, value)] if value is None or isinstance(value, IOMap) or np.isscalar(value) else list(value)  # type: ignore[arg-type]
    if not values:
        raise InputError(name, value, "at least one")
    return values
