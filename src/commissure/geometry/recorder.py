"""Geometry of a model while it trains: in any loop, in Hugging Face's Trainer, in Lightning.

    recorder = GeometryRecorder(batches, sites=["blocks.*", "norm"], steps=log_steps(5000))
    for step in range(5001):
        recorder.on_step(step, model)            # looks only at the steps asked for
        ...
    Trainer(..., callbacks=[recorder.for_transformers()])
    lightning.Trainer(..., callbacks=[recorder.for_lightning()])

A look leaves the run as it was: no gradient, every module back in its own mode, random numbers as before it, so that a
run with a recorder is the run without, bit for bit.  Step 0 is before the first update; step n after n of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from commissure.core.errors import BackendMissing, InputError
from commissure.core.rng import isolated
from commissure.geometry.power_law import FitRange
from commissure.geometry.tracing import Pooling, Trace, TraceFrame, trace
from commissure.geometry.trajectory import Trajectory, TrajectoryRow

__all__ = ["GeometryRecorder", "log_steps", "look_at"]


def log_steps(last: int, *, count: int = 90) -> tuple[int, ...]:
    """Steps from 0 to `last`, evenly spaced in log(1 + step), at most `count` of them.

    >>> log_steps(100, count=8)
    (0, 1, 3, 6, 13, 26, 51, 100)
    """
    for name, value, least in (("last", last, 1), ("count", count, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(name, value, f"an integer >= {least}")
    return tuple(sorted({round(float(step)) for step in np.expm1(np.linspace(0, np.log1p(last), count))}))


class GeometryRecorder:
    """Traces the model on the same `batches` at every step of `steps`, or every so many if that is a number.

    `batches`: gone through anew at every look (a list, a DataLoader), each a mapping of keywords, a tuple of arguments
    or one argument of the model; on another device than the model they are moved.  `forward(model, batch)` where the
    model is called otherwise.  Other arguments are those of `trace` and of its report.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> batches = [torch.randn(50, 3, generator=torch.Generator().manual_seed(0))]
    >>> recorder = GeometryRecorder(batches, sites=["0"], steps=2, fit_range=(1, 2))
    >>> for step in range(5):
    ...     _ = recorder.on_step(step, model)
    >>> recorder.trajectory.series("0").steps.tolist()
    [0.0, 2.0, 4.0]
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        sites: Sequence[str],
        steps: Collection[int] | int,
        pooling: Sequence[Pooling] = ("last",),
        frames: Sequence[TraceFrame] = ("raw", "unit"),
        n_folds: int = 16,
        skip: int = 0,
        fit_range: FitRange = (11, 100),
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        if iter(batches) is batches:
            raise InputError("batches", type(batches).__name__, "what can be gone through again", "pass list(batches)")
        every = [steps] if isinstance(steps, int) else list(steps)
        least = int(isinstance(steps, int))
        if not every or any(isinstance(s, bool) or not isinstance(s, int | np.integer) or s < least for s in every):
            raise InputError("steps", steps, "steps >= 0, or one number >= 1", "see log_steps")
        self.batches = batches
        self.steps = steps if isinstance(steps, int) else frozenset(int(step) for step in steps)
        self._settings: dict[str, Any] = {
            "sites": sites,
            "pooling": pooling,
            "frames": frames,
            "n_folds": n_folds,
            "skip": skip,
        }
        self._fit_range = fit_range
        self._forward = forward
        self._rows: dict[int, tuple[TrajectoryRow, ...]] = {}

    @property
    def trajectory(self) -> Trajectory:
        """What has been seen, in the order of steps."""
        return Trajectory(tuple(row for step in sorted(self._rows) for row in self._rows[step]))

    def is_due(self, step: int) -> bool:
        """Whether `step` is one of those to look at."""
        return step % self.steps == 0 if isinstance(self.steps, int) else step in self.steps

    def on_step(self, step: int, model: nn.Module) -> tuple[TrajectoryRow, ...]:
        """Look at `model` where the step is due and was not seen; its rows, or none."""
        if not self.is_due(step) or step in self._rows:
            return ()
        traced = look_at(model, self.batches, self._settings, self._forward)
        found = tuple(TrajectoryRow(step, row) for row in traced.report(fit_range=self._fit_range))
        self._rows[step] = found
        return found

    def for_transformers(self) -> Any:
        """A callback for Hugging Face's Trainer."""
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise BackendMissing("transformers", "hf", "the Trainer's callback") from error
        recorder = self

        class _Callback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                recorder.on_step(state.global_step, kwargs["model"])

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                recorder.on_step(state.global_step, kwargs["model"])

        return _Callback()

    def for_lightning(self) -> Any:
        """A callback for Lightning's Trainer; only its first process looks."""
        try:
            from lightning.pytorch import Callback
        except ImportError as error:
            raise BackendMissing("lightning", "lightning", "Lightning's callback") from error
        recorder = self

        class _Callback(Callback):
            def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
                self._look(trainer, pl_module)

            def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, *_: Any) -> None:
                self._look(trainer, pl_module)

            def _look(self, trainer: Any, pl_module: nn.Module) -> None:
                if trainer.is_global_zero:
                    recorder.on_step(trainer.global_step, pl_module)

        return _Callback()


def look_at(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Mapping[str, Any],
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Trace:
    """Trace `model` on `batches`, with the settings of `trace`; the model, its modes and random numbers stay."""
    modes = {module: module.training for module in model.modules()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), isolated(0, "geometry"), trace(model.eval(), **settings) as traced:
            for batch in batches:
                (forward or _call)(model, _moved(batch, device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return traced


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch
