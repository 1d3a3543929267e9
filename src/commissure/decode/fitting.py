"""Fitting a POSSM: which windows a step sees, their targets and weights, and the loss.

Loss: interval-weighted mean squared error of the normalized behavior, plus `auxiliary_weight` times that of the
auxiliary targets where a recording has them.  Behavior is normalized by its mean and standard deviation over the
training samples.  Recordings with trials give one window a trial; continuous recordings give random windows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import CommissureWarning, InputError
from commissure.core.rng import generator
from commissure.decode.presets import FitConfig
from commissure.decode.recording import SpikeRecording, bin_index
from commissure.decode.windows import Batch, Window, collate, cut_window, interval_weights
from commissure.train import TrainResult, train

if TYPE_CHECKING:
    from commissure.decode.possm import POSSM

__all__ = ["TrainingBatch", "fit_possm"]


_FEW = 10  # places in a chunk; more are as good as everywhere


class TrainingBatch(NamedTuple):
    """A batch with normalized targets (nan where a recording has no auxiliary) and one weight a query."""

    batch: Batch
    target: Float[Tensor, "queries outputs"]
    weight: Float[Tensor, " queries"]


class Item(NamedTuple):
    """One sample of an epoch: a trial's window, or a place for a random window of a continuous recording."""

    recording: int
    window: Window | None


def fit_possm(
    model: POSSM,
    recordings: Sequence[SpikeRecording],
    *,
    config: FitConfig,
    validation: Sequence[SpikeRecording],
    seed: int,
    progress: Callable[[int, int, float], None] | None,
) -> TrainResult:
    """Train `model` in place; see `POSSM.fit`."""
    check_recordings(model, recordings, config)
    check_validation(model, recordings, validation)
    for recording in recordings:
        model.add_session(recording)
    targets = [_targets(model, recording) for recording in recordings]
    _set_normalization(model, np.concatenate(targets))
    model.output_offsets = _few_offsets(recordings, model.config.chunk_s)
    source = _Source(model, recordings, targets=targets, config=config, seed=seed)

    def score() -> float:
        return float(np.mean([model.score(recording) for recording in validation]))

    return train(
        model,
        source.draw,
        loss=lambda drawn: possm_loss(model, drawn, config.auxiliary_weight),
        config=config,
        seed=seed,
        validate=score if validation else None,
        progress=progress,
    )


def possm_loss(model: POSSM, drawn: TrainingBatch, auxiliary_weight: float) -> Tensor:
    """Weighted mean squared error of behavior, plus that of the auxiliary targets that exist."""
    outputs, _ = model(drawn.batch)
    n = model.config.out_dim
    error = (outputs - drawn.target.nan_to_num()).square()
    total = drawn.weight.sum().clamp_min(torch.finfo(error.dtype).tiny)
    loss = (drawn.weight * error[:, :n].mean(1)).sum() / total
    if model.config.auxiliary_dim:
        weight = drawn.weight * ~torch.isnan(drawn.target[:, n])
        loss = loss + auxiliary_weight * (weight * error[:, n:].mean(1)).sum() / total
    return loss


def check_recordings(model: POSSM, recordings: Sequence[SpikeRecording], config: FitConfig) -> None:
    """Refuse recordings this model cannot be fitted on, before any work."""
    if not recordings:
        raise InputError("recordings", recordings, "at least one SpikeRecording")
    for i, recording in enumerate(recordings):
        _check_behavior(f"recordings[{i}]", recording, model.config.out_dim)
        if recording.trials is None and config.window_s > recording.duration:
            raise InputError(
                "window_s", config.window_s, f"at most the recording's {recording.duration:.3f} s", "shorten the window"
            )
        model.check_chunk(recording)


def check_validation(model: POSSM, recordings: Sequence[SpikeRecording], validation: Sequence[SpikeRecording]) -> None:
    """Refuse validation recordings that training says nothing about: another session, other outputs."""
    known = {*model.sessions, *(recording.session for recording in recordings)}
    for i, recording in enumerate(validation):
        _check_behavior(f"validation[{i}]", recording, model.config.out_dim)
        if recording.session not in known:
            raise InputError(
                f"validation[{i}].session",
                recording.session,
                f"a session of the training recordings ({', '.join(sorted(known))})",
                "its embeddings would stay as they were drawn",
            )
        model.check_chunk(recording)


def _check_behavior(name: str, recording: SpikeRecording, out_dim: int) -> None:
    if not isinstance(recording, SpikeRecording):
        raise InputError(name, type(recording).__name__, "a SpikeRecording")
    if recording.behavior.shape[1] != out_dim:
        fix = f"make the model with out_dim={recording.behavior.shape[1]}"
        raise InputError(f"{name}.behavior", recording.behavior.shape, f"shape (samples, {out_dim})", fix)
    if not len(recording.behavior):
        raise InputError(f"{name}.behavior", recording.behavior.shape, "one sample or more: there is nothing to learn")


def _targets(model: POSSM, recording: SpikeRecording) -> Float[np.ndarray, "samples outputs"]:
    if not model.config.auxiliary_dim:
        return recording.behavior
    auxiliary = recording.auxiliary
    if auxiliary is None:
        warnings.warn(
            f"session {recording.session!r} has no auxiliary targets: it is fitted on its behavior alone; give the "
            "recording auxiliary= (for example the hand's position), or make the model with auxiliary_dim=0",
            CommissureWarning,
            stacklevel=4,
        )
        auxiliary = np.full((len(recording.behavior), model.config.auxiliary_dim), np.nan)
    elif auxiliary.shape[1] != model.config.auxiliary_dim:
        raise InputError(
            "recording.auxiliary",
            auxiliary.shape,
            f"shape (samples, {model.config.auxiliary_dim})",
            "set auxiliary_dim",
        )
    return np.concatenate((recording.behavior, auxiliary), 1)


def _few_offsets(recordings: Sequence[SpikeRecording], chunk_s: float) -> tuple[float, ...] | None:
    """Where in a chunk the samples lie (seconds from its start), if at no more than `_FEW` places: binned behavior.

    A readout is only trained there, so a stream reads out there.
    """
    if any(recording.trials is None for recording in recordings):
        return None  # random windows put samples everywhere
    found: set[float] = set()
    for recording in recordings:
        starts = recording.segments[recording.segment_index(recording.behavior_times), 0]
        elapsed = recording.behavior_times - starts
        found |= set(np.abs((elapsed - chunk_s * bin_index(elapsed, 0.0, chunk_s)).round(6)).tolist())
    return tuple(sorted(found)) if 0 < len(found) <= _FEW else None


def _set_normalization(model: POSSM, targets: Float[np.ndarray, "samples outputs"]) -> None:
    known = ~np.isnan(targets).all(0)
    mean, std = np.zeros(targets.shape[1]), np.ones(targets.shape[1])
    mean[known], std[known] = np.nanmean(targets[:, known], 0), np.nanstd(targets[:, known], 0)
    std[std == 0] = 1.0
    model.target_mean.copy_(torch.from_numpy(mean))
    model.target_std.copy_(torch.from_numpy(std))


class _Source:
    """Draws the batch of a step, a function of the seed and the step alone."""

    def __init__(
        self,
        model: POSSM,
        recordings: Sequence[SpikeRecording],
        *,
        targets: Sequence[np.ndarray],
        config: FitConfig,
        seed: int,
    ) -> None:
        self.model, self.recordings, self.config, self.seed = model, recordings, config, seed
        mean, std = model.target_mean.double().cpu().numpy(), model.target_std.double().cpu().numpy()
        self.targets = [(t - mean) / std for t in targets]
        self.weights = [interval_weights(r, config.interval_weights) for r in recordings]
        self.sessions = [model.session_row(r.session) for r in recordings]
        self.unit_starts = [model.unit_start(r.session) for r in recordings]
        self.items: list[Item] = []
        for i, recording in enumerate(recordings):
            if recording.trials is None:
                self.items += [Item(i, None)] * max(1, int(recording.duration / config.window_s))
            else:
                self.items += [Item(i, self._cut(i, start, stop)) for start, stop in recording.segments]

    def _cut(self, i: int, start: float, stop: float) -> Window:
        return cut_window(self.recordings[i], start, stop=stop, chunk_s=self.model.config.chunk_s)

    def _chosen(self, step: int) -> list[Item]:
        """The step's items: each epoch is one permutation of all of them."""
        n, size = len(self.items), self.config.batch_size
        places = range(step * size, (step + 1) * size)
        orders = {e: generator(self.seed, "order", e).permutation(n) for e in {place // n for place in places}}
        return [self.items[orders[place // n][place % n]] for place in places]

    def draw(self, step: int) -> TrainingBatch:
        """The batch of this step."""
        chosen, rng = self._chosen(step), generator(self.seed, "windows", step)
        windows, keep = [], []
        for item in chosen:
            recording = self.recordings[item.recording]
            window = item.window
            if window is None:
                first, last = recording.segments[0]
                start = rng.uniform(first, last - self.config.window_s)
                window = self._cut(item.recording, start, start + self.config.window_s)
            windows.append(window)
            if self.config.unit_dropout is not None:
                keep.append(self.config.unit_dropout.keep(recording.n_units, rng))
        device, dtype = self.model.unit_embedding.device, self.model.unit_embedding.dtype
        rows = [item.recording for item in chosen]
        batch = collate(
            windows,
            [self.sessions[r] for r in rows],
            [self.unit_starts[r] for r in rows],
            keep=keep or None,
            device=device,
        )
        target = np.concatenate([self.targets[r][w.samples] for r, w in zip(rows, windows, strict=True)])
        weight = np.concatenate([self.weights[r][w.samples] for r, w in zip(rows, windows, strict=True)])
        return TrainingBatch(
            batch, torch.from_numpy(target).to(device, dtype), torch.from_numpy(weight).to(device, dtype)
        )
