"""Neural networks on binned counts: a recurrent one and a feed-forward one, the baselines that POSSM has to match.

    BinnedGRU   h_t = GRU(dropout(relu(U n_t + u)), h_{t-1}),      y_t = V dropout(h_t) + v
    BinnedMLP   e_t = dropout(relu(U n_t + u)),      g = dropout(relu(sum_{l<L} W_l e_{t-l} + w)),
                y_t = V dropout(relu(G g + g_0)) + v                      (`layers` hidden layers, here 2)

| symbol | name |
|---|---|
| n_t | raw counts of the units in bin t |
| h_t | `hidden_dim` values, zero at the start of each segment |
| L | `lags`; embeddings e before a segment's start are zero, and a constant input marks the bins that exist |

In training each trial loses every unit with one probability drawn from U(0, `unit_dropout`), without rescaling.  The
loss is the mean squared error of the standardized outputs over bins that have behavior.  A batch holds whole trials, or
random windows of `window_s` of a continuous recording.  Nothing crosses from one segment to the next.
Binned networks for kinematics: Glaser et al., arXiv 1708.00909; GRU: Cho et al., arXiv 1406.1078.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor, nn

from commissure.core.config import Config
from commissure.core.errors import InputError, NotFittedError
from commissure.core.rng import generator, isolated
from commissure.decode.recording import BinnedSegment, SpikeRecording
from commissure.decode.segments import check_units, score_within, training_segments, values_at
from commissure.train import TrainConfig, TrainResult, train

__all__ = ["BinnedGRU", "BinnedMLP"]

Network = TypeVar("Network", bound="_BinnedNetwork")  # not Self: run-time type checks work method by method

_PREDICTED_AT_ONCE = 64  # segments a batch in `predict`: bounds the memory of padding


class _BinnedNetwork(ABC):
    """Fit and prediction of a causal network from counts (batch, time, units) to outputs (batch, time, outputs)."""

    bin_s: float
    unit_dropout: float
    window_s: float
    training: TrainConfig
    _fitted: _Fitted | None = None

    @abstractmethod
    def _network(self, n_units: int, n_outputs: int) -> nn.Module:
        """A fresh network, initialized from torch's global generator."""

    def fit(
        self: Network,
        recordings: SpikeRecording | Sequence[SpikeRecording],
        *,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> Network:
        """Train on one recording or several of one session; `progress(step, steps, loss)` after each step."""
        segments = training_segments(recordings, self.bin_s)
        given = [recordings] if isinstance(recordings, SpikeRecording) else list(recordings)
        behavior = np.concatenate([segment.behavior for segment in segments])
        mean, deviation = np.nanmean(behavior, axis=0), np.nanstd(behavior, axis=0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        is_windowed = any(recording.trials is None for recording in given)
        window = max(1, round(self.window_s / self.bin_s)) if is_windowed else None
        batches = _Batches(segments, mean, deviation, self.training, self.unit_dropout, window, seed)
        with isolated(seed, "init"):
            network = self._network(segments[0].counts.shape[1], behavior.shape[1])

        def loss(batch: _Batch) -> Tensor:
            error = (network(batch.counts) - batch.target) * batch.weight
            return error.square().sum() / (batch.weight.sum() * batch.target.shape[-1]).clamp_min(1.0)

        result = train(network, batches.draw, loss=loss, config=self.training, seed=seed, progress=progress)
        self._fitted = _Fitted(given[0].unit_ids, network, mean, deviation, result)
        return self

    @property
    def module(self) -> nn.Module:
        """The trained network, counts to standardized outputs."""
        return self._model().network

    @property
    def result(self) -> TrainResult:
        """What the training did: losses by step."""
        return self._model().result

    def predict(self, recording: SpikeRecording, *, at: ArrayLike | None = None) -> Float[np.ndarray, "n n_outputs"]:
        """Behavior at times `at` (seconds, default the recording's own): the output of the bin holding each time."""
        model = self._model()
        check_units(model.unit_ids, recording)
        segments = recording.binned(self.bin_s)
        outputs: list[np.ndarray] = []
        with torch.inference_mode():
            for first in range(0, len(segments), _PREDICTED_AT_ONCE):
                part = segments[first : first + _PREDICTED_AT_ONCE]
                values = model.network(_padded([segment.counts for segment in part])).double().numpy()
                outputs += [
                    v[: len(s.counts)] * model.deviation + model.mean for v, s in zip(values, part, strict=True)
                ]
        return values_at(recording, at, self.bin_s, outputs)

    def score(self, recording: SpikeRecording, *, interval: ArrayLike | None = None) -> float:
        """R2 (uniform average over outputs) on the samples in `interval` (n, 2) `[start, stop)` s; None: on all."""
        return score_within(recording, self.predict(recording), interval)

    def _model(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError(f"{type(self).__name__} is not fitted: call fit(recordings) first")
        return self._fitted


class _GRUOptions(Config):
    """Ranges of `BinnedGRU`'s arguments."""

    bin_s: float = Field(gt=0)
    input_dim: int = Field(ge=1)
    hidden_dim: int = Field(ge=1)
    input_dropout: float = Field(ge=0, lt=1)
    hidden_dropout: float = Field(ge=0, lt=1)
    unit_dropout: float = Field(ge=0, lt=1)
    window_s: float = Field(gt=0)


_TRAINING = TrainConfig(steps=300, batch_size=16, lr=3e-3, weight_decay=1e-3)

_GRU_PRESETS = {
    "tuned": (64, 0.3, 0.3, 0.0),
    "strong": (256, 0.5, 0.5, 0.3),
}


class BinnedGRU(_BinnedNetwork):
    """Linear + ReLU, dropout, one GRU layer, dropout, linear readout, on raw counts.

    - `bin_s`, `window_s`: seconds; the latter only matters for continuous recordings.
    - `input_dim`, `hidden_dim`: widths; `input_dropout`, `hidden_dropout`: of the input layer's and the GRU's outputs.
    - `unit_dropout`: upper end of the uniform draw of each trial's unit drop-out probability.
    - `training`: steps, batch size, learning rate and weight decay.

    The defaults are the preset "strong".

    >>> BinnedGRU.from_preset("tuned").hidden_dropout
    0.3
    """

    def __init__(
        self,
        bin_s: float = 0.1,
        *,
        input_dim: int = 256,
        hidden_dim: int = 256,
        input_dropout: float = 0.5,
        hidden_dropout: float = 0.5,
        unit_dropout: float = 0.3,
        window_s: float = 1.0,
        training: TrainConfig = _TRAINING,
    ) -> None:
        _GRUOptions(
            bin_s=bin_s,
            input_dim=input_dim,
            hidden_dim=hidden_dim,
            input_dropout=input_dropout,
            hidden_dropout=hidden_dropout,
            unit_dropout=unit_dropout,
            window_s=window_s,
        )
        self.bin_s, self.input_dim, self.hidden_dim = bin_s, input_dim, hidden_dim
        self.input_dropout, self.hidden_dropout, self.unit_dropout = input_dropout, hidden_dropout, unit_dropout
        self.window_s, self.training = window_s, training

    @classmethod
    def from_preset(cls, name: str, *, bin_s: float = 0.1) -> BinnedGRU:
        """ "tuned": input width 64, dropout .3/.3; "strong": width 256, dropout .5/.5, unit dropout U(0, .3)."""
        if name not in _GRU_PRESETS:
            raise InputError("name", name, f"one of {', '.join(sorted(_GRU_PRESETS))}")
        width, into, hidden, unit = _GRU_PRESETS[name]
        return cls(bin_s, input_dim=width, input_dropout=into, hidden_dropout=hidden, unit_dropout=unit)

    def _network(self, n_units: int, n_outputs: int) -> nn.Module:
        return _GRUNetwork(n_units, self.input_dim, self.hidden_dim, n_outputs, self.input_dropout, self.hidden_dropout)


class _MLPOptions(Config):
    """Ranges of `BinnedMLP`'s arguments."""

    bin_s: float = Field(gt=0)
    lags: int = Field(ge=1)
    input_dim: int = Field(ge=1)
    hidden_dim: int = Field(ge=1)
    layers: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    unit_dropout: float = Field(ge=0, lt=1)
    window_s: float = Field(gt=0)


class BinnedMLP(_BinnedNetwork):
    """Multilayer perceptron on the last `lags` bins (the current one included), each embedded by one shared layer.

    The shared layer has `input_dim` outputs; without it the first layer has so many weights that it overfits.
    `layers` hidden layers of `hidden_dim` follow.

    - `bin_s`, `window_s`: seconds; the latter only matters for continuous recordings.
    - `dropout`: after every layer but the last; `unit_dropout`: upper end of the uniform draw of each trial's
      unit drop-out probability.
    - `training`: steps, batch size, learning rate and weight decay.

    >>> BinnedMLP(lags=4).lags
    4
    """

    def __init__(
        self,
        bin_s: float = 0.1,
        *,
        lags: int = 6,
        input_dim: int = 64,
        hidden_dim: int = 256,
        layers: int = 2,
        dropout: float = 0.3,
        unit_dropout: float = 0.3,
        window_s: float = 1.0,
        training: TrainConfig = _TRAINING,
    ) -> None:
        _MLPOptions(
            bin_s=bin_s,
            lags=lags,
            input_dim=input_dim,
            hidden_dim=hidden_dim,
            layers=layers,
            dropout=dropout,
            unit_dropout=unit_dropout,
            window_s=window_s,
        )
        self.bin_s, self.lags, self.input_dim, self.hidden_dim, self.layers = bin_s, lags, input_dim, hidden_dim, layers
        self.dropout, self.unit_dropout, self.window_s, self.training = dropout, unit_dropout, window_s, training

    def _network(self, n_units: int, n_outputs: int) -> nn.Module:
        return _MLPNetwork(n_units, self.lags, self.input_dim, self.hidden_dim, self.layers, n_outputs, self.dropout)


class _GRUNetwork(nn.Module):
    def __init__(
        self, n_units: int, input_dim: int, hidden_dim: int, n_outputs: int, input_dropout: float, hidden_dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(n_units, input_dim), nn.ReLU(), nn.Dropout(input_dropout))
        self.recurrent = nn.GRU(input_dim, hidden_dim, batch_first=True)
        self.readout = nn.Sequential(nn.Dropout(hidden_dropout), nn.Linear(hidden_dim, n_outputs))

    def forward(self, counts: Float[Tensor, "batch time n_units"]) -> Float[Tensor, "batch time n_outputs"]:
        return self.readout(self.recurrent(self.embed(counts))[0])


class _MLPNetwork(nn.Module):
    """A causal convolution over bins is the same map of the last `lags` bins at every bin."""

    def __init__(
        self, n_units: int, lags: int, input_dim: int, hidden_dim: int, layers: int, n_outputs: int, dropout: float
    ) -> None:
        super().__init__()
        self.lags = lags
        self.embed = nn.Sequential(nn.Linear(n_units, input_dim), nn.ReLU(), nn.Dropout(dropout))
        self.lagged = nn.Conv1d(input_dim + 1, hidden_dim, lags)
        parts: list[nn.Module] = [nn.ReLU(), nn.Dropout(dropout)]
        for _ in range(layers - 1):
            parts += [nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout)]
        self.rest = nn.Sequential(*parts, nn.Linear(hidden_dim, n_outputs))

    def forward(self, counts: Float[Tensor, "batch time n_units"]) -> Float[Tensor, "batch time n_outputs"]:
        marked = nn.functional.pad(self.embed(counts), (0, 1), value=1.0)
        padded = nn.functional.pad(marked.transpose(1, 2), (self.lags - 1, 0))
        return self.rest(self.lagged(padded).transpose(1, 2))


class _Fitted(NamedTuple):
    unit_ids: tuple[str, ...]
    network: nn.Module
    mean: Float[np.ndarray, " n_outputs"]
    deviation: Float[np.ndarray, " n_outputs"]
    result: TrainResult


class _Batch(NamedTuple):
    counts: Float[Tensor, "batch time n_units"]
    target: Float[Tensor, "batch time n_outputs"]
    weight: Float[Tensor, "batch time 1"]


class _Batches:
    """Batches by step number: segments in random order, every segment once before any comes again."""

    def __init__(
        self,
        segments: list[BinnedSegment],
        mean: Float[np.ndarray, " n_outputs"],
        deviation: Float[np.ndarray, " n_outputs"],
        training: TrainConfig,
        unit_dropout: float,
        window: int | None,
        seed: int,
    ) -> None:
        self.counts = [segment.counts for segment in segments]
        self.targets = [(segment.behavior - mean) / deviation for segment in segments]
        self.unit_dropout, self.window, self.seed, self.size = unit_dropout, window, seed, training.batch_size
        rng = generator(seed, "order")
        needed = training.steps * training.batch_size
        if window is None:
            rounds = -(-needed // len(segments))
            order = np.concatenate([rng.permutation(len(segments)) for _ in range(rounds)])
        else:  # long segments hold more windows
            lengths = np.array([len(counts) for counts in self.counts], dtype=np.float64)
            order = rng.choice(len(segments), size=needed, p=lengths / lengths.sum())
        self.order = order[:needed].reshape(training.steps, training.batch_size)

    def draw(self, step: int) -> _Batch:
        rng = generator(self.seed, "batch", step)
        counts, targets = [], []
        for row in self.order[step]:
            x, y = self.counts[row], self.targets[row]
            if self.window is not None and len(x) > self.window:
                start = int(rng.integers(len(x) - self.window + 1))
                x, y = x[start : start + self.window], y[start : start + self.window]
            kept = rng.random(x.shape[1]) >= rng.uniform(0, self.unit_dropout)
            counts.append(x * kept)
            targets.append(y)
        target = _padded(targets, fill=np.nan)
        known = torch.isfinite(target).all(-1, keepdim=True)
        return _Batch(_padded(counts), torch.where(known, target, 0.0), known.to(target.dtype))


def _padded(arrays: Sequence[np.ndarray], *, fill: float = 0.0) -> Float[Tensor, "batch time width"]:
    out = np.full((len(arrays), max(len(a) for a in arrays), arrays[0].shape[1]), fill, dtype=np.float32)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return torch.from_numpy(out)
