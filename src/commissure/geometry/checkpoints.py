"""The geometry of many checkpoints of a model on the same data, each computed once.

    sweep = CheckpointSweep(
        checkpoints={step: f"step{step}" for step in (0, 64, 512, 4000, 143000)},
        load=PretrainedCheckpoints("EleutherAI/pythia-160m"),
        batches=text_batches(texts, tokenizer),
        sites=["layers.*", "final_layer_norm"],
    )
    report = sweep.run(store=RunStore())
    series = report.trajectory.series("final_layer_norm")

With a run store a checkpoint is one run, and what is kept of it are moments, not metrics: another alpha window needs no
forward pass, and a killed sweep goes on where it was.

    key = SHA-256 of the loader and what it says of the revision, the batches, sites, pooling, frames, folds, the
          leading tokens left out, the function that calls the model, the lines of both functions, and the source of
          this package

A checkpoint that cannot be loaded or looked at is told as failed, is not kept, and the sweep goes on; the next run
tries it again.  Checkpoints run in any executor and give the same rows in each.
"""

from __future__ import annotations

import hashlib
import inspect
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.moments import Moments
from commissure.geometry.accumulator import CovarianceAccumulator
from commissure.geometry.power_law import FitRange
from commissure.geometry.recorder import look_at
from commissure.geometry.spectra import Spectrum
from commissure.geometry.tracing import Pooling, TraceFrame, TraceRow, check_settings, trace_row
from commissure.geometry.trajectory import Trajectory, TrajectoryRow
from commissure.runs import (
    Migration,
    Run,
    RunStore,
    append_only,
    check_workers,
    finished,
    one_thread,
    source_digest,
    sweep_bar,
)

__all__ = ["CheckpointSweep", "FailedCheckpoint", "SweepReport"]

Key = tuple[str, Pooling, TraceFrame]
Folds = Mapping[Key, tuple[Moments, ...]]


class FailedCheckpoint(NamedTuple):
    """A checkpoint that could not be looked at, and why."""

    step: int
    revision: str
    error: str


@dataclass(frozen=True, eq=False)
class SweepReport:
    """What was found; `missing` are the steps that Ctrl-C left out.

    `moments[step]()` gives the folds of every site, pooling and frame: read from the run store, where there is one, for
    those of many wide checkpoints do not fit into memory.
    """

    moments: Mapping[int, Callable[[], Folds]]
    failed: tuple[FailedCheckpoint, ...] = ()
    missing: tuple[int, ...] = ()

    @property
    def trajectory(self) -> Trajectory:
        """Alpha on ranks 11 to 100; `trajectory_of` for other windows."""
        return self.trajectory_of()

    def trajectory_of(self, *, fit_range: FitRange = (11, 100)) -> Trajectory:
        """All rows, alpha fitted on the ranks `fit_range`; from the moments, without a forward pass."""
        return Trajectory(
            tuple(
                TrajectoryRow(step, row)
                for step in sorted(self.moments)
                for row in self.rows(step, fit_range=fit_range)
            )
        )

    def rows(self, step: int, *, fit_range: FitRange = (11, 100)) -> tuple[TraceRow, ...]:
        """The report of one checkpoint, as `trace` gives it; a step without one is an InputError."""
        if step not in self.moments:
            raise InputError("step", step, f"one of {', '.join(map(str, sorted(self.moments))) or 'none'}")
        found = self.moments[step]()
        return tuple(trace_row(key, _accumulator(key, folds), fit_range=fit_range) for key, folds in found.items())

    def spectra(self, site: str, *, pooling: Pooling = "last", frame: TraceFrame = "raw") -> dict[int, Spectrum]:
        """The spectrum of one site at every step."""
        key: Key = (site, pooling, frame)
        spectra = {}
        for step in sorted(self.moments):
            found = self.moments[step]()
            if key not in found:
                raise InputError("site, pooling, frame", key, f"one that was traced: {', '.join(map(str, found))}")
            spectra[step] = _accumulator(key, found[key]).spectrum()
        return spectra


@dataclass(frozen=True, kw_only=True, eq=False)
class CheckpointSweep:
    """What to look at; see `trace` for sites, pooling, frames, folds and `skip`.

    `checkpoints`: training step -> revision, in what words `load(revision) -> model` understands.  A loader with a
    method `identity(revision) -> str` says itself when two checkpoints are the same; others are told apart by what
    they are pickled to.  The lines of `load` and `forward` count, not those of functions they call.  `batches`,
    `forward`: as `GeometryRecorder` takes them.  Whatever other processes are to run must be picklable, and a loader
    in threads must not draw from torch's global generator, which they share.

    >>> def load(revision: str) -> nn.Module:
    ...     return nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    >>> batches = [torch.randn(9, 2, generator=torch.Generator().manual_seed(0))]
    >>> sweep = CheckpointSweep(checkpoints={0: "a", 5: "b"}, load=load, batches=batches, sites=["0"])
    >>> sweep.run(workers=0).trajectory.series("0").steps.tolist()
    [0.0, 5.0]
    """

    checkpoints: Mapping[int, str]
    load: Callable[[str], nn.Module]
    batches: Sequence[Any]
    sites: Sequence[str]
    pooling: Sequence[Pooling] = ("last",)
    frames: Sequence[TraceFrame] = ("raw", "unit")
    n_folds: int = 2
    skip: int = 0
    forward: Callable[[nn.Module, Any], object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoints, Mapping) or not self.checkpoints:
            raise InputError("checkpoints", self.checkpoints, "a mapping of steps to revisions, one at least")
        for step, revision in self.checkpoints.items():
            if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
                raise InputError("checkpoints", step, "steps >= 0")
            if not isinstance(revision, str):
                raise InputError(f"checkpoints[{step}]", revision, "the name of a revision")
        if not callable(self.load):
            raise InputError("load", self.load, "a function from a revision to a model")
        if not isinstance(self.batches, Sequence) or isinstance(self.batches, str) or not len(self.batches):
            raise InputError("batches", type(self.batches).__name__, "a list of batches, one at least")
        if self.forward is not None and not callable(self.forward):
            raise InputError("forward", self.forward, "a function of a model and a batch, or None")
        check_settings(  # now, not once a checkpoint: each would be loaded before it fails
            sites=self.sites, pooling=self.pooling, frames=self.frames, n_folds=self.n_folds, skip=self.skip
        )

    def run(
        self,
        *,
        store: RunStore | None = None,
        executor: Executor | None = None,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> SweepReport:
        """Look at every checkpoint that `store` does not hold; Ctrl-C ends with what is finished.

        `executor`: any; by default isolated processes, `workers` of them (None: one a core, 0: this process).
        `progress(done, total)` after every checkpoint; by default a bar on stderr where that is a terminal.
        """
        if store is not None and not isinstance(store, RunStore):
            raise InputError("store", store, "RunStore or None")
        check_workers(executor, workers)
        kept = None if store is None else _Kept(store)
        common = self._digest() if kept is not None else ""
        jobs = [_Job(int(step), self.checkpoints[step], self) for step in sorted(self.checkpoints)]
        keys = {job.step: _key(common, self.load, job.revision) for job in jobs if kept is not None}
        found: dict[int, Callable[[], Folds]] = {}
        for step, key in keys.items():
            if kept is not None and key is not None and kept.has(key):
                found[step] = partial(kept.get, key)
        todo = [job for job in jobs if job.step not in found]
        if todo and (executor is not None or workers != 0):
            _picklable("load, batches, forward", (self.load, self.batches, self.forward))
        failed: list[FailedCheckpoint] = []
        with sweep_bar("checkpoints", len(jobs)) if progress is None else nullcontext(progress) as report:
            report(len(found), len(jobs))
            try:
                for i, result in finished(_look, todo, executor=executor, workers=workers):
                    job = todo[i]
                    try:
                        folds, wall_s = result()
                    except Exception as error:
                        failed.append(FailedCheckpoint(job.step, job.revision, f"{type(error).__name__}: {error}"))
                    else:
                        key = keys.get(job.step)
                        if kept is not None and key is not None:
                            kept.add(key, job, folds, wall_s)
                            found[job.step] = partial(kept.get, key)
                        else:
                            found[job.step] = partial(_same, folds)
                    report(len(found) + len(failed), len(jobs))
            except KeyboardInterrupt:
                sys.stderr.write(f"stopped: {len(found)} of {len(jobs)} checkpoints finished\n")
        seen = {*found, *(one.step for one in failed)}
        return SweepReport(found, tuple(sorted(failed)), tuple(job.step for job in jobs if job.step not in seen))

    def _digest(self) -> str:
        """Of all that checkpoints share."""
        settings = (tuple(self.sites), tuple(self.pooling), tuple(self.frames), self.n_folds, self.skip)
        parts = _content(self.batches), repr(settings), _picklable("forward", self.forward), _source(self.forward)
        return hashlib.sha256("\n".join((source_digest(), *parts)).encode()).hexdigest()


class _Job(NamedTuple):
    step: int
    revision: str
    sweep: CheckpointSweep


def _look(job: _Job) -> tuple[Folds, float]:
    """Load a checkpoint and trace it: the same to the last bit wherever it runs."""
    start, s = time.perf_counter(), job.sweep
    with one_thread():
        model = s.load(job.revision)
        if not isinstance(model, nn.Module):
            raise InputError("load", type(model).__name__, f"a model for revision {job.revision!r}")
        settings = {"sites": s.sites, "pooling": s.pooling, "frames": s.frames, "n_folds": s.n_folds, "skip": s.skip}
        traced = look_at(model, s.batches, settings, s.forward)
    if not traced.accumulators:
        raise InputError("sites", s.sites, "modules that the forward pass calls")
    # As it comes back from the store: half of each matrix.
    folds = {key: tuple(map(_symmetric, accumulator.folds)) for key, accumulator in traced.accumulators.items()}
    return folds, time.perf_counter() - start


def _symmetric(one: Moments) -> Moments:
    upper = one.scatter.cpu().triu()
    return Moments(one.n_samples, one.mean.cpu(), upper + upper.triu(1).T)


def _accumulator(key: Key, folds: tuple[Moments, ...]) -> CovarianceAccumulator:
    found = CovarianceAccumulator(len(folds[0].mean), n_folds=len(folds), frame=key[2])
    found.folds = folds
    return found


def _same(folds: Folds) -> Folds:
    return folds


def _key(common: str, load: Callable[[str], nn.Module], revision: str) -> str | None:
    """None where the loader cannot say what the revision is: the look will tell why, and nothing is kept."""
    loader = _picklable("load", load)
    try:
        said = load.identity(revision) if hasattr(load, "identity") else revision
    except Exception:
        return None
    return hashlib.sha256(f"{common} {loader} {_source(load)} {said}".encode()).hexdigest()


def _picklable(name: str, value: object) -> str:
    try:
        return hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        fix = "give a top-level function or an object of a top-level class, or run with workers=0 and no store"
        raise InputError(name, value, f"something that can be pickled ({error})", fix) from None


def _source(value: object) -> str:
    """Digest of the lines of a function, or of an object's class: what is pickled of them is only a name."""
    while isinstance(value, partial):
        value = value.func
    try:
        text = inspect.getsource(value if inspect.isroutine(value) or inspect.isclass(value) else type(value))
    except (OSError, TypeError):  # typed at a prompt, or compiled
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: Any) -> str:
    """A text that is equal for equal batches."""
    if isinstance(value, Tensor | np.ndarray) and value.dtype != object:  # whose bytes are addresses
        flat = value.detach().cpu().reshape(-1) if isinstance(value, Tensor) else value
        array = flat.view(torch.uint8).numpy() if isinstance(flat, Tensor) else flat
        kind = f"{value.dtype} {tuple(value.shape)}"
        return f"{kind} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_content(value[name])}" for name in sorted(value)) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_content, value)) + ")"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    raise InputError("batches", type(value).__name__, "tensors, numbers and texts, in lists and mappings")


_MIGRATIONS: tuple[Migration, ...] = (
    (
        """CREATE TABLE geometry_checkpoints (
            key TEXT PRIMARY KEY, run_id INTEGER NOT NULL REFERENCES runs (id)
        ) STRICT""",
        *append_only("geometry_checkpoints"),
    ),
)


class _Kept:
    """The checkpoints of a run store; the arrays of one are counts, means and upper triangles, fold by fold."""

    def __init__(self, store: RunStore) -> None:
        store.migrate("geometry", _MIGRATIONS)
        self._store = store

    def has(self, key: str) -> bool:
        return bool(self._store.query("SELECT 1 FROM geometry_checkpoints WHERE key = ?", (key,)))

    def get(self, key: str) -> Folds:
        """The moments of a finished checkpoint."""
        run = self._store.query("SELECT run_id FROM geometry_checkpoints WHERE key = ?", (key,))[0][0]
        return {tuple(one): self._folds(run, i) for i, one in enumerate(self._store.run(run).config["keys"])}

    def _folds(self, run: int, i: int) -> tuple[Moments, ...]:
        counts, means, halves = (self._store.array(run, f"{i} {part}") for part in ("counts", "means", "halves"))
        dim = means.shape[1]
        rows, columns = np.triu_indices(dim)
        found = []
        for count, mean, half in zip(counts, means, halves, strict=True):
            scatter = np.empty((dim, dim))
            scatter[rows, columns] = half
            scatter[columns, rows] = half
            found.append(Moments(int(count), torch.from_numpy(mean.copy()), torch.from_numpy(scatter)))
        return tuple(found)

    def add(self, key: str, job: _Job, folds: Folds, wall_s: float) -> None:
        """Keep a checkpoint; one that another process finished meanwhile stays as it is."""
        arrays: dict[str, np.ndarray] = {}
        for i, held in enumerate(folds.values()):
            upper = np.triu_indices(len(held[0].mean))
            arrays[f"{i} counts"] = np.array([one.n_samples for one in held])
            arrays[f"{i} means"] = np.stack([one.mean.numpy() for one in held])
            arrays[f"{i} halves"] = np.stack([one.scatter.numpy()[upper] for one in held])
        config = {"step": job.step, "revision": job.revision, "keys": [list(one) for one in folds]}
        with self._store.transaction() as connection:
            if not self.has(key):
                run = self._store.add(Run("geometry", job.revision, config=config, wall_s=wall_s), arrays=arrays)
                connection.execute("INSERT INTO geometry_checkpoints VALUES (?, ?)", (key, run))
