"""What the accuracy claims of `decode` share: the contenders at their chosen settings, splits, simulated trials, rows.

Every setting was chosen on inner splits of the training trials of split 0 (LOG.md).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from commissure.core.rng import generator
from commissure.core.stats import mean_interval
from commissure.decode import (
    POSSM,
    BinnedGRU,
    BinnedMLP,
    KalmanFilter,
    SpikeRecording,
    WienerFilter,
    simulate_reaching,
)
from commissure.experiments.claims import Row

__all__ = ["Decoder", "make", "seed_row", "simulated_trials", "split"]


class Decoder(Protocol):
    """What every contender offers."""

    def fit(self, recordings: SpikeRecording, *, seed: int = 0) -> object: ...

    def predict(self, recording: SpikeRecording) -> np.ndarray: ...

    def score(self, recording: SpikeRecording) -> float: ...


def split(recording: SpikeRecording, seed: int) -> tuple[SpikeRecording, SpikeRecording]:
    """A random 80/20 split of the trials."""
    assert recording.trials is not None
    order = generator(seed, "split").permutation(len(recording.trials))
    n_train = int(0.8 * len(order))
    return recording.select_trials(order[:n_train]), recording.select_trials(order[n_train:])


def make(method: str, recording: SpikeRecording, *, bin_s: float, seed: int, steps: int | None = None) -> Decoder:
    """A fresh decoder at the setting chosen for it (see LOG.md); `steps` shortens the networks' training."""
    if method == "Wiener":
        return WienerFilter(bin_s)
    if method == "Kalman":
        return KalmanFilter(bin_s)
    if method.startswith("possm"):
        # the source of the Mihi session leaves the hand's position out
        auxiliary = 2 if method == "possm-direct" and recording.auxiliary is not None else 0
        model = POSSM.from_preset(method, chunk_s=bin_s, auxiliary_dim=auxiliary, seed=seed)
        if steps is not None:
            model.fit_config = model.fit_config.model_copy(update={"steps": steps})
        return model
    network = BinnedGRU.from_preset("strong", bin_s=bin_s) if method == "GRU" else BinnedMLP(bin_s)
    if steps is not None:
        network.training = network.training.model_copy(update={"steps": steps})
    return network


def simulated_trials(seed: int, *, bin_s: float, timing: float = 0.0) -> SpikeRecording:
    """Simulated random-target reaching at true spike times, in trials of 2 s.

    The target is the mean velocity of each bin, asked for 1 ms before the bin's end: a decoder with finer bins then
    knows the same spikes.
    """
    duration_s, trial_s = 240.0, 2.0
    (recording,) = simulate_reaching(duration_s=duration_s, seed=seed, timing=timing)
    starts = np.arange(int(duration_s / trial_s)) * trial_s
    (binned,) = recording.binned(bin_s)
    times = binned.times + bin_s / 2 - 1e-3
    inside = times < duration_s
    return SpikeRecording(
        recording.times,
        recording.units,
        unit_ids=recording.unit_ids,
        behavior=binned.behavior[inside],
        behavior_times=times[inside],
        session=recording.session,
        trials=np.stack((starts, starts + trial_s), 1),
        auxiliary=None if binned.auxiliary is None else binned.auxiliary[inside],
    )


def seed_row(key: str, label: str, values: np.ndarray, note: str = "") -> Row:
    """A row whose value is the mean over seeds of the mean over sessions."""
    by_seed = values.mean(1) if values.ndim == 2 else values
    if len(by_seed) < 2:
        return Row(key, label, float(by_seed[0]), note=note)
    interval = mean_interval(by_seed)
    return Row(key, label, interval.estimate, interval.low, interval.high, note=note)
