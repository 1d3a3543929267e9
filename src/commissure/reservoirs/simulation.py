"""Simulate many rows of one network and read them as they go: states become moments (or factors) and are dropped.

A row is (input map, series, spectral radius).  Rows of one call share the sparse matrix; a stretch of `CHUNK` steps is
held at a time.  What a row gives does not depend on which rows run beside it: noise comes from (seed, series) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from commissure.core.rng import generator
from commissure.native.reservoir import Activation, ReservoirMatrix, reservoir_scan
from commissure.native.reservoir_reference import quantized
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import ReadoutFactor, ReadoutMoments
from commissure.reservoirs.tasks.data import Split, TaskData

__all__ = ["Condition", "Group", "Simulation", "readout_groups"]

CHUNK = 256  # steps; long enough for the products, short enough for the cache
_HELD = 1 << 24  # states held at a time, 64 MB in float32: more input maps than fit run one block after another

# A tangent may shrink by e^-10 a step before float32 underflows in so many.
_TANGENT_STEPS = 8


class Condition(NamedTuple):
    """What stands between a state and its readout."""

    noise: float
    bits: int | None


class Group(NamedTuple):
    """Readouts of one input map that read equally many nodes and fit equally many targets, multiplied together."""

    readouts: tuple[int, ...]
    nodes: Int[np.ndarray, "readouts features"]
    targets: Int[np.ndarray, "readouts outputs"]

    def columns(self, n_nodes: int) -> Int[Tensor, "readouts 1 columns"]:
        """Where [1, x, y] of every readout is in [states, 1, targets]."""
        ones = np.full((len(self.readouts), 1), n_nodes)
        return torch.from_numpy(np.concatenate([ones, self.nodes, n_nodes + 1 + self.targets], 1))[:, None]


class Reading(NamedTuple):
    """What one group's readouts need under one condition; batch axes (radii, readouts)."""

    train: ReadoutMoments | ReadoutFactor
    test: ReadoutMoments | ReadoutFactor


class Collected(NamedTuple):
    """Readings by (input map, group, condition), and Lyapunov exponents by input map, one a radius."""

    readings: dict[tuple[int, int, Condition], Reading]
    exponents: dict[int, Float[np.ndarray, " radii"]]


def readout_groups(io: IOMap, n_targets: int) -> list[Group]:
    """The readouts of a map by their numbers of nodes and targets, in order of first appearance."""
    targets = io.targets or (np.arange(n_targets),) * io.n_readouts
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, (nodes, columns) in enumerate(zip(io.outputs, targets, strict=True)):
        sizes.setdefault((len(nodes), len(columns)), []).append(i)
    return [
        Group(tuple(same), np.stack([io.outputs[i] for i in same]), np.stack([targets[i] for i in same]))
        for same in sizes.values()
    ]


@dataclass(frozen=True, eq=False, kw_only=True)
class Simulation:
    """One network, its two series and its input maps; `collect` runs rows of it.

    `gains`: the factor on `matrix` for each spectral radius.
    """

    matrix: ReservoirMatrix
    gains: Float[Tensor, " radii"]
    series: dict[Split, TaskData]
    io: tuple[IOMap, ...]
    input_gain: float
    leak: Float[Tensor, " nodes"]
    activation: Activation
    seed: int

    @property
    def n_nodes(self) -> int:
        return len(self.leak)

    @property
    def n_targets(self) -> int:
        return self.series["train"].targets.shape[1]

    @cached_property
    def groups(self) -> list[list[Group]]:
        """The groups of each input map."""
        return [readout_groups(io, self.n_targets) for io in self.io]

    def collect(
        self,
        kind: type[ReadoutMoments] | type[ReadoutFactor],
        *,
        inputs: Sequence[int],
        radii: Sequence[int],
        conditions: Sequence[Condition],
        lyapunov: bool = False,
    ) -> Collected:
        """Readings of these input maps at these radii under these conditions, from one pass over each series."""
        held = CHUNK * self.n_nodes * len(radii) * 2
        step = max(1, _HELD // held)
        found = Collected({}, {})
        for start in range(0, len(inputs), step):
            block = _Block(self, kind, inputs[start : start + step], radii, conditions)
            for splits in self._together(lyapunov):
                block.run(splits, lyapunov and "train" in splits)
            found.readings.update(block.readings())
            found.exponents.update(block.exponents)
        return found

    def _together(self, lyapunov: bool) -> list[tuple[Split, ...]]:
        """Series of one length share a scan; tangents are carried along the training series only."""
        train, test = self.series["train"], self.series["test"]
        alike = len(train.inputs) == len(test.inputs) and train.warmup == test.warmup
        return [("train", "test")] if alike and not lyapunov else [("train",), ("test",)]


class _Block:
    """Some input maps, all radii, all conditions: what is accumulated, and the loop over time."""

    def __init__(
        self,
        of: Simulation,
        kind: type[ReadoutMoments] | type[ReadoutFactor],
        inputs: Sequence[int],
        radii: Sequence[int],
        conditions: Sequence[Condition],
    ) -> None:
        self.of, self.inputs, self.conditions = of, inputs, conditions
        self.gains = of.gains[list(radii)]
        self.sums: dict[tuple[Split, int, int, Condition], list[ReadoutMoments | ReadoutFactor]] = {}  # by radius
        for i in inputs:
            for g, group in enumerate(of.groups[i]):
                sizes = group.nodes.shape[1], group.targets.shape[1]
                empty = kind.empty((len(group.readouts),), n_features=sizes[0], n_outputs=sizes[1])
                self.sums.update({(s, i, g, c): [empty] * len(radii) for s in of.series for c in conditions})
        # One pass gathers a readout's columns from the source's.  Memory for them is taken once: new pages cost more.
        self.source = torch.ones(CHUNK, of.n_nodes + 1 + of.n_targets, dtype=torch.float64)
        self.columns = {i: [group.columns(of.n_nodes) for group in of.groups[i]] for i in inputs}
        shapes = {index.shape for columns in self.columns.values() for index in columns}
        self.held = {shape: torch.empty(shape[0], CHUNK, shape[2], dtype=torch.float64) for shape in shapes}
        self.exponents: dict[int, Float[np.ndarray, " radii"]] = {}

    def readings(self) -> dict[tuple[int, int, Condition], Reading]:
        return {
            (i, g, c): Reading(_stacked(self.sums["train", i, g, c]), _stacked(self.sums["test", i, g, c]))
            for split, i, g, c in self.sums
            if split == "train"
        }

    def run(self, splits: tuple[Split, ...], lyapunov: bool) -> None:
        """Rows (series, input map, radius) from rest to the end of their series."""
        of, dtype, n_radii = self.of, self.of.matrix.values.dtype, len(self.gains)
        rows = [(split, i) for split in splits for i in self.inputs]
        x = torch.stack([torch.from_numpy(of.series[split].inputs).to(dtype) for split, _ in rows])
        drive = torch.stack([torch.from_numpy(of.input_gain * of.io[i].input_weights(of.n_nodes)) for _, i in rows])
        x, drive = x.repeat_interleave(n_radii, 0), drive.to(dtype).repeat_interleave(n_radii, 0)
        scan = _Scan(of, x, drive, self.gains.repeat(len(rows)), lyapunov)
        noise = {split: generator(of.seed, "read noise", split) for split in splits}
        warmup, length = of.series[splits[0]].warmup, x.shape[1]
        for start, stop in _stretches(warmup, length):
            states = scan.advance(start, stop)
            if start < warmup:
                scan.growth.zero_()
                continue
            drawn = {split: self._draw(noise[split], stop - start) for split in splits}
            for row, (split, i) in enumerate(rows):
                self._read(states[row * n_radii : (row + 1) * n_radii], split, i, slice(start, stop), drawn[split])
        if lyapunov:
            exponents = (scan.growth / (length - warmup)).view(-1, n_radii).numpy()
            self.exponents = dict(zip(self.inputs, exponents, strict=True))

    def _draw(self, noise: np.random.Generator, steps: int) -> Float64[Tensor, "time nodes"] | None:
        if not any(condition.noise for condition in self.conditions):
            return None
        return torch.from_numpy(noise.standard_normal((steps, self.of.n_nodes)))

    def _read(self, states: Tensor, split: Split, i: int, at: slice, noise: Tensor | None) -> None:
        """One stretch of one input map's states, radius by radius, into every condition's sums."""
        nodes, steps = self.of.n_nodes, states.shape[1]
        source = self.source[:steps]
        source[:, nodes + 1 :] = torch.from_numpy(self.of.series[split].targets[at])
        for r, each in enumerate(states):
            for condition in self.conditions:
                _observe(each, noise, condition, out=source[:, :nodes])
                for g, index in enumerate(self.columns[i]):
                    held = self.held[index.shape][:, :steps]
                    shape = len(index), steps, -1
                    torch.gather(source.expand(shape), 2, index.expand(shape), out=held)
                    sums = self.sums[split, i, g, condition]
                    sums[r] = sums[r].update(held.mT)


def _observe(
    states: Float[Tensor, "time nodes"],
    noise: Float64[Tensor, "time nodes"] | None,
    condition: Condition,
    *,
    out: Float64[Tensor, "time nodes"],
) -> None:
    """States with the noise and at the precision of a condition."""
    if condition.noise:
        torch.add(states, cast(Tensor, noise), alpha=condition.noise, out=out)
    else:
        out.copy_(states)
    if condition.bits is not None:
        out.copy_(quantized(out, condition.bits))


def _stacked(sums: list[ReadoutMoments | ReadoutFactor]) -> ReadoutMoments | ReadoutFactor:
    """One batch of what was summed apart."""
    return type(sums[0])(torch.stack([each[0] for each in sums]), *sums[0][1:])


class _Scan:
    """The rows' state as time goes on, and how much a tangent has grown (log, nats)."""

    def __init__(self, of: Simulation, x: Tensor, drive: Tensor, scale: Tensor, lyapunov: bool) -> None:
        self.of, self.x, self.drive, self.scale = of, x, drive, scale
        self.state = x.new_zeros(len(x), of.n_nodes)
        self.growth = torch.zeros(len(x), dtype=torch.float64)
        self.tangents: Tensor | None = None
        if lyapunov:
            first = generator(of.seed, "tangent").standard_normal(of.n_nodes)
            self.tangents = torch.from_numpy(first / np.linalg.norm(first)).to(x.dtype).repeat(len(x), 1, 1)

    def advance(self, start: int, stop: int) -> Float[Tensor, "rows time nodes"]:
        """States of the steps from `start` to `stop`."""
        step = stop - start if self.tangents is None else _TANGENT_STEPS
        parts = []
        for begin in range(start, stop, step):
            done = reservoir_scan(
                self.of.matrix,
                self.x[:, begin : min(begin + step, stop)],
                self.state,
                self.drive,
                scale=self.scale,
                leak=self.of.leak,
                activation=self.of.activation,
                tangents=self.tangents,
            )
            self.state = done.states[:, -1].clone()
            if done.tangents is not None:
                norm = done.tangents.double().norm(dim=(1, 2))
                self.growth += norm.log()
                self.tangents = done.tangents / norm.clamp(min=torch.finfo(self.x.dtype).tiny)[:, None, None].to(
                    self.x.dtype
                )
            parts.append(done.states)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _stretches(warmup: int, length: int) -> Iterator[tuple[int, int]]:
    """Cuts of at most `CHUNK` steps, one of them at the end of the warm-up."""
    for first, last in ((0, warmup), (warmup, length)):
        for start in range(first, last, CHUNK):
            yield start, min(start + CHUNK, last)
