"""Sweeps: models x seeds, each network evaluated for every radius, noise and precision at once.

A cell is one (model, seed): one network, one batched simulation.  Cells run in any executor and give the same rows for
any number of workers; with a run store a killed sweep goes on where it was.  At one seed every model gets the same
input series and the same noise, so that models are compared in pairs.
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from commissure.core.errors import BackendMissing, InputError
from commissure.native.reservoir import ACTIVATIONS, Activation
from commissure.reservoirs.cells import (
    Cell,
    CellStore,
    Finished,
    IORule,
    Model,
    ModuleInputs,
    Settings,
    SweepRow,
    run_cell,
)
from commissure.reservoirs.compare import Comparison, SweepScore, compare, sweep_scores
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.inputs import named, real, whole
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.tasks.data import Task
from commissure.runs import RunStore, check_workers, finished, sweep_bar

if TYPE_CHECKING:
    import pandas

__all__ = ["ModuleInputs", "Sweep", "SweepResult", "SweepRow"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SweepResult:
    """Rows by model, then seed; `missing` names the cells that Ctrl-C left out."""

    rows: tuple[SweepRow, ...]
    missing: tuple[tuple[str, int], ...] = ()

    def scores(self) -> tuple[SweepScore, ...]:
        """`module_r2` of every model, seed and condition."""
        return sweep_scores(self.rows)

    def compare(
        self, a: str, b: str, *, measure: Literal["score", "capacity"] = "score", seed: int = 0
    ) -> tuple[Comparison, ...]:
        """Model `a` against model `b`, paired by seed, under every condition; see `reservoirs.compare`."""
        return compare(self.scores(), a, b, measure=measure, seed=seed)

    def to_frame(self) -> pandas.DataFrame:
        """All rows as a pandas table, one column a field."""
        try:
            import pandas
        except ImportError as error:
            raise BackendMissing("pandas", "frames", "the table of a sweep") from error
        names = [f.name for f in fields(SweepRow)]
        return pandas.DataFrame([[getattr(row, name) for name in names] for row in self.rows], columns=names)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Models by name, and all they are evaluated for; see `evaluate` for the settings.

    `models`: each a Connectome, or gives one by seed: an object with `.sample(seed)` or a function.  `io`: one map,
    several, or a rule (network, seed) -> maps such as `ModuleInputs`.  Whatever other processes are to run must be
    picklable: objects and top-level functions, not lambdas.

    >>> from commissure.reservoirs.block_model import HierarchicalSBM
    >>> from commissure.reservoirs.block_tree import BlockTree
    >>> from commissure.reservoirs.tasks import MemoryCapacity
    >>> tree = BlockTree.balanced(branching=2, depth=2, leaf_size=5)
    >>> models = {f"L{level}": HierarchicalSBM(tree, level=level) for level in (1, 2)}
    >>> sweep = Sweep(models=models, spectral_radius=[0.8], seeds=range(2))
    >>> result = sweep.run(MemoryCapacity(max_delay=2, length=100, warmup=10), workers=0)
    >>> [(row.model, row.seed, row.output) for row in result.rows[:4]]
    [('L1', 0, 0), ('L1', 0, 1), ('L1', 0, 2), ('L1', 1, 0)]
    """

    models: Mapping[str, Model]
    spectral_radius: Sequence[float | None] = (0.6, 0.8, 1.0, 1.2, 1.4)
    seeds: Sequence[int] = field(default_factory=lambda: range(24))
    io: IORule = field(default_factory=ModuleInputs)
    read_noise: Sequence[float] = (0.0,)
    read_bits: Sequence[int | None] = (None,)
    weight_bits: Sequence[int | None] = (None,)
    penalties: float | Sequence[float] = 1e-6
    input_gain: float = 1.0
    leak: float | Float[np.ndarray, " nodes"] = 1.0
    activation: Activation = "tanh"
    lyapunov: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.models, Mapping) or not self.models:
            raise InputError("models", self.models, "at least one model by name")
        for name in ("spectral_radius", "seeds", "read_noise", "read_bits", "weight_bits"):
            values = self._values(name)
            if not values:
                raise InputError(name, getattr(self, name), "at least one value")
            if len(set(values)) < len(values):
                raise InputError(name, getattr(self, name), "distinct values")
        named("activation", self.activation, list(ACTIVATIONS))
        if not isinstance(self.dtype, torch.dtype):
            raise InputError("dtype", self.dtype, "torch.float32 or torch.float64")
        if not (isinstance(self.io, IOMap | Sequence) or callable(self.io)):
            raise InputError("io", self.io, "an IOMap, several, or a function of the network and the seed")
        for name, model in self.models.items():
            if not (isinstance(model, Connectome) or hasattr(model, "sample") or callable(model)):
                allowed = "a Connectome, an object with .sample(seed), or a function of the seed"
                raise InputError(f"models[{name!r}]", type(model).__name__, allowed)

    def _values(self, name: str) -> tuple[Any, ...]:
        """A setting that has several values, as plain numbers; their ranges are `evaluate`'s."""
        given = getattr(self, name)
        if (
            isinstance(given, str | bytes)
            or not isinstance(given, Sequence | np.ndarray)
            or getattr(given, "ndim", 1) != 1
        ):
            raise InputError(name, given, "several values, as a list")
        if name in ("spectral_radius", "read_noise", "penalties"):
            return tuple(
                None if value is None and name == "spectral_radius" else real(f"{name}[{i}]", value)
                for i, value in enumerate(given)
            )
        return tuple(
            None if value is None and name != "seeds" else whole(f"{name}[{i}]", value, 0)
            for i, value in enumerate(given)
        )

    def cells(self, task: Task) -> list[Cell]:
        """One for each model and seed."""
        settings = Settings(
            task=task,
            io=self.io if callable(self.io) or hasattr(self.io, "inputs") else tuple(self.io),
            spectral_radius=self._values("spectral_radius"),
            read_noise=self._values("read_noise"),
            read_bits=self._values("read_bits"),
            weight_bits=self._values("weight_bits"),
            input_gain=self.input_gain,
            leak=self.leak,
            activation=self.activation,
            penalties=(real("penalties", self.penalties),)
            if np.isscalar(self.penalties)
            else self._values("penalties"),
            lyapunov=self.lyapunov,
            dtype=self.dtype,
        )
        seeds = self._values("seeds")
        return [Cell(name, model, seed, settings) for name, model in self.models.items() for seed in seeds]

    def run(
        self,
        task: Task,
        *,
        store: RunStore | None = None,
        executor: Executor | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> SweepResult:
        """Run every cell that `store` does not hold; Ctrl-C ends with what is finished.

        `executor`: any; by default isolated processes, `workers` of them (None: one a core, 0: this process).
        `progress(done, total)` after every cell; by default a bar on stderr where that is a terminal.  A cell that
        fails ends the sweep with its error; finished ones stay in the store.
        """
        for name, given, kind in (("store", store, RunStore), ("task", task, Task)):
            if not isinstance(given, kind) and (given is not None or name == "task"):
                raise InputError(name, given, f"{kind.__name__}" + ("" if name == "task" else " or None"))
        check_workers(executor, workers)
        cells = self.cells(task)
        kept = None if store is None else CellStore(store)
        rows = {(c.name, c.seed): found for c in cells if kept is not None and (found := kept.get(c)) is not None}
        todo = [cell for cell in cells if (cell.name, cell.seed) not in rows]
        told: set[tuple[type[Warning], str]] = set()
        if todo and (executor is not None or workers != 0):
            _require_picklable(todo)
        with sweep_bar("cells", len(cells)) if progress is None else nullcontext(progress) as report:
            report(len(rows), len(cells))
            try:
                for i, result in finished(run_cell, todo, executor=executor, workers=workers):
                    cell = todo[i]
                    done = _named(cell, result)
                    if kept is not None:
                        kept.add(cell, done)
                    rows[cell.name, cell.seed] = done.rows
                    report(len(rows), len(cells))
                    for category, message in done.warned:
                        if (category, message) not in told:
                            told.add((category, message))
                            warnings.warn(f"{message} (model {cell.name!r}, seed {cell.seed})", category, stacklevel=2)
            except KeyboardInterrupt:
                sys.stderr.write(f"stopped: {len(rows)} of {len(cells)} cells finished\n")
        keys = [(cell.name, cell.seed) for cell in cells]
        return SweepResult(
            tuple(row for key in keys if key in rows for row in rows[key]),
            tuple(key for key in keys if key not in rows),
        )


def _named(cell: Cell, result: Callable[[], Finished]) -> Finished:
    try:
        return result()
    except Exception as error:
        error.add_note(f"in the cell of model {cell.name!r} at seed {cell.seed}")
        raise


def _require_picklable(cells: Sequence[Cell]) -> None:
    parts: dict[str, Any] = {f"models[{cell.name!r}]": cell.model for cell in cells}
    parts |= {"task": cells[0].settings.task, "io": cells[0].settings.io}
    for name, part in parts.items():
        try:
            pickle.dumps(part)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            fix = "give an object (HierarchicalSBM, a Connectome) or a top-level function, or run with workers=0"
            raise InputError(name, part, f"something other processes can be sent ({error})", fix) from None
