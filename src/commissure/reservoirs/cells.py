"""One cell of a sweep: one network, sampled and evaluated; what names it, and where it is kept.

    key = SHA-256 of the model, the task, the input maps, every setting, the seed and the source of this package

A cell is run in any process and gives the same rows in each; only the process that opened the store writes it down.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import issparse

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.native.reservoir import Activation
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import Score, evaluate
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.tasks.data import Task
from commissure.runs import Migration, RunStore, append_only, one_thread, source_digest

__all__ = ["ModuleInputs", "Settings", "SweepRow"]


@runtime_checkable
class NetworkModel(Protocol):
    """What draws networks by seed: `HierarchicalSBM`, for one."""

    def sample(self, seed: int) -> Connectome:
        """One network."""


Model = NetworkModel | Connectome | Callable[[int], Connectome]
IORule = IOMap | Sequence[IOMap] | Callable[[Connectome, int], IOMap | Sequence[IOMap]]


@dataclass(frozen=True, kw_only=True)
class ModuleInputs:
    """Input maps by modules: all nodes of one module driven, every other module a readout.

    `which`: "random", one drawn by the seed alone (the same for every model); "each", every
    module in turn; or modules by number.  `level` 0 is the finest; `n_outputs` reads so many nodes of each.

    >>> network = Connectome.from_array(np.ones((4, 4)) - np.eye(4), orientation=None, levels=[[0, 0, 1, 1]])
    >>> [io.inputs[0].tolist() for io in ModuleInputs(which="each")(network, 0)]
    [[0, 1], [2, 3]]
    """

    which: str | tuple[int, ...] = "random"
    level: int = 0
    n_outputs: int | None = None

    def __call__(self, network: Connectome, seed: int) -> tuple[IOMap, ...]:
        """The maps of a network."""
        modules = network.modules(self.level)
        is_name = isinstance(self.which, str)
        if not (self.which in ("random", "each") if is_name else isinstance(self.which, Sequence) and self.which):
            raise InputError("which", self.which, "'random', 'each' or the numbers of modules")
        if self.which == "random":
            inputs = [int(generator(seed, "driven module").integers(len(modules)))]
        else:
            inputs = list(range(len(modules))) if self.which == "each" else [*self.which]
        return tuple(IOMap.from_modules(modules, inputs=[i], n_outputs=self.n_outputs, seed=seed) for i in inputs)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every cell of a sweep has in common; see `evaluate`."""

    task: Task
    io: IORule
    spectral_radius: tuple[float | None, ...]
    read_noise: tuple[float, ...]
    read_bits: tuple[int | None, ...]
    weight_bits: tuple[int | None, ...]
    input_gain: float
    leak: float | Float[np.ndarray, " nodes"]
    activation: Activation
    penalties: tuple[float, ...]
    lyapunov: bool
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class SweepRow(Score):
    """A `Score` of one model at one seed with weights rounded to `weight_bits`."""

    model: str
    seed: int
    weight_bits: int | None


class Cell(NamedTuple):
    """One network to sample and evaluate."""

    name: str
    model: Model
    seed: int
    settings: Settings

    @property
    def key(self) -> str:
        """The digest of all that its rows depend on."""
        parts = canonical((self.model, self.seed, self.settings))
        return hashlib.sha256(f"{source_digest()} {parts}".encode()).hexdigest()


class Finished(NamedTuple):
    """The rows of a cell, the seconds they took, and what it warned of."""

    rows: tuple[SweepRow, ...]
    wall_s: float
    warned: tuple[tuple[type[Warning], str], ...]


def run_cell(cell: Cell) -> Finished:
    """Sample, simulate, read out: the same to the last bit wherever it runs."""
    start, s, rows = time.perf_counter(), cell.settings, []
    with warnings.catch_warnings(record=True) as caught, one_thread():
        warnings.simplefilter("always")
        network = sampled(cell.model, cell.seed)
        io = s.io(network, cell.seed) if callable(s.io) else s.io
        for bits in s.weight_bits:
            scores = evaluate(
                network,
                s.task,
                io=io,
                spectral_radius=s.spectral_radius,
                input_gain=s.input_gain,
                leak=s.leak,
                activation=s.activation,
                penalties=s.penalties,
                read_noise=s.read_noise,
                read_bits=s.read_bits,
                weight_bits=bits,
                lyapunov=s.lyapunov,
                seed=cell.seed,
                dtype=s.dtype,
            )
            rows += [SweepRow(**vars(score), model=cell.name, seed=cell.seed, weight_bits=bits) for score in scores]
    warned = tuple(dict.fromkeys((w.category, str(w.message)) for w in caught))
    return Finished(tuple(rows), time.perf_counter() - start, warned)


def sampled(model: Model, seed: int) -> Connectome:
    """The network of a model at a seed."""
    if isinstance(model, Connectome):
        return model
    network = model.sample(seed) if hasattr(model, "sample") else model(seed)
    if not isinstance(network, Connectome):
        raise InputError("models", type(network).__name__, "models that give a Connectome")
    return network


def canonical(value: object) -> str:
    """A text that is equal for equal contents, in this process or another.

    >>> canonical({"b": (1, None), "a": np.zeros(2)}) == canonical({"a": np.zeros(2), "b": (1, None)})
    True
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.integer, np.floating, torch.dtype)):
        return repr(value.item() if isinstance(value, np.generic) else value)
    if isinstance(value, np.ndarray):
        data = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array({value.dtype.str}, {value.shape}, {data})"
    if issparse(value):
        coordinates = value.tocoo()  # type: ignore[attr-defined]
        return f"sparse{canonical((value.shape, *coordinates.coords, coordinates.data))}"  # type: ignore[attr-defined]
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{canonical(k)}: {canonical(v)}' for k, v in value.items()))}}}"
    if isinstance(value, (list, tuple, range)):
        return f"({', '.join(map(canonical, value))})"
    if isinstance(value, partial):
        return f"partial{canonical((value.func, value.args, value.keywords))}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if dataclasses.is_dataclass(value):
        return kind + canonical({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if hasattr(value, "__dict__"):
        return kind + canonical(vars(value))
    return kind + hashlib.sha256(pickle.dumps(value)).hexdigest()


_MIGRATIONS: tuple[Migration, ...] = (
    (
        """CREATE TABLE reservoir_cells (
            key TEXT PRIMARY KEY, created TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL,
            wall_s REAL NOT NULL, rows TEXT NOT NULL
        ) STRICT""",
        *append_only("reservoir_cells"),
    ),
)


class CellStore:
    """The cells of a run store: finished once, never computed again."""

    def __init__(self, store: RunStore) -> None:
        store.migrate("reservoirs", _MIGRATIONS)
        self._store = store

    def get(self, cell: Cell) -> tuple[SweepRow, ...] | None:
        """The rows of a finished cell, under the name the model has now; None where it is to do."""
        found = self._store.query("SELECT rows FROM reservoir_cells WHERE key = ?", (cell.key,))
        return tuple(_row({**row, "model": cell.name}) for row in json.loads(found[0][0])) if found else None

    def add(self, cell: Cell, finished: Finished) -> None:
        """Keep a cell; one that another process finished meanwhile stays as it is."""
        created = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = json.dumps([vars(row) for row in finished.rows])
        values = (cell.key, created, cell.name, cell.seed, finished.wall_s, rows)
        with self._store.transaction() as connection:
            connection.execute("INSERT OR IGNORE INTO reservoir_cells VALUES (?, ?, ?, ?, ?, ?)", values)


def _row(values: dict[str, Any]) -> SweepRow:
    return SweepRow(**{**values, "target_scores": tuple(values["target_scores"])})
