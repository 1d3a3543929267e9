"""The Wiener filter: ridge regression of behavior on the spike counts of the current and the past bins.

    y_t = b + sum_{l=0}^{L-1} W_l f(n_{t-l}) + sum_{l=1}^{L-1} c_l [t - l < 0]

    min  sum_t |y_t - y^_t|^2 + penalty * (|W|^2 + |c|^2 / 100),      b free

| symbol | name |
|---|---|
| L | `lags` (bins, the current one included) |
| f | `transform`: the count itself, its power 3/4, its square root, or the z-scored square root |
| [t - l < 0] | start indicator: the bin would lie before the segment, where the counts are set to zero |

Nothing is read across segments.  Lag, penalty and transform are chosen by K-fold cross-validation over trials; a fold's
held-out residuals come exactly from one eigendecomposition of the whole design, r_k = (I - H_kk)^{-1} (y - H y)_k with
H the hat matrix (block form of Allen's PRESS, Technometrics 1974).  Method: Warland, Reinagel & Meister, J Neurophysiol
1997; the power 3/4 lies between raw counts and the variance-stabilizing square root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.core.lsq import RidgeFit, ridge
from commissure.decode.metrics import r2_score
from commissure.decode.recording import BinnedSegment, SpikeRecording
from commissure.decode.segments import check_units, fold_of_rows, score_within, training_segments, values_at

__all__ = ["WienerFilter", "WienerSelection", "lagged_counts"]

Transform = Literal["raw", "power", "sqrt", "zscored"]

_LAGS = (1, 2, 3, 4, 6, 8, 12, 16)
_LONGEST_S = 0.8  # reaching movements last about that long; older bins only add parameters
_START_SCALE = 10.0  # start indicators are 0 or 10, so their coefficients are penalized 100 times less than a count's
_PENALTIES = tuple(float(x) for x in np.logspace(-2, 2, 17))  # relative to the mean column sum of squares
_FOLD_BINS = 100  # a fold's hat matrix costs the square of its bins; at 50 ms that is 5 s, far beyond the lags
_SEARCHED: tuple[Transform, ...] = ("raw", "power", "sqrt")


class WienerSelection(NamedTuple):
    """The setting of a fitted filter; `score` is the cross-validated R2, None where nothing was selected."""

    lags: int
    penalty: float
    transform: Transform
    score: float | None


class WienerFilter:
    """Ridge regression on lagged counts.

    - `bin_s`: width of the bins (seconds).
    - `lags`: bins used, the current one included; `penalty`: the ridge's; `transform` of the counts.  Each one that is
      None is selected by cross-validation: first the transform at the middle lag, then the lag, each with its best
      penalty.
    - `folds`: of the cross-validation, more on long recordings; whole trials are held out, or contiguous blocks of a
      continuous recording.

    >>> rng = np.random.default_rng(0)
    >>> counts = rng.poisson(2.0, size=(200, 3))
    >>> recording = SpikeRecording.from_counts(counts, 0.1, behavior=counts @ [[1.0], [2.0], [-1.0]], session="demo")
    >>> round(WienerFilter(lags=1, penalty=1e-9, transform="raw").fit(recording).score(recording), 6)
    1.0
    """

    def __init__(
        self,
        bin_s: float = 0.1,
        *,
        lags: int | None = None,
        penalty: float | None = None,
        transform: Transform | None = None,
        folds: int = 10,
    ) -> None:
        if lags is not None and lags < 1:
            raise InputError("lags", lags, "an integer >= 1 (the current bin alone is lags=1)")
        if penalty is not None and not (np.isfinite(penalty) and penalty >= 0):
            raise InputError("penalty", penalty, "a number >= 0")
        if transform is not None and transform not in get_args(Transform):
            raise InputError("transform", transform, f"one of {', '.join(get_args(Transform))}")
        if folds < 2:
            raise InputError("folds", folds, "an integer >= 2")
        self.bin_s, self.lags, self.penalty, self.transform, self.folds = bin_s, lags, penalty, transform, folds
        self._fitted: _Fitted | None = None

    def fit(
        self,
        recordings: SpikeRecording | Sequence[SpikeRecording],
        *,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> WienerFilter:
        """Fit on one recording or several of one session; `progress(done, total, score)` follows the selection."""
        segments = training_segments(recordings, self.bin_s)
        unit_ids = (recordings if isinstance(recordings, SpikeRecording) else recordings[0]).unit_ids
        selection = self._select(segments, seed, progress)
        scaling = _scaling(segments, selection.transform)
        x, y, _ = _design(segments, scaling, selection.lags)
        self._fitted = _Fitted(unit_ids, selection, scaling, ridge(x, y, penalty=selection.penalty))
        return self

    @property
    def selection(self) -> WienerSelection:
        """Lags, penalty and transform in use, and their cross-validated R2."""
        return self._model().selection

    @property
    def coefficients(self) -> Float[np.ndarray, "n_features n_outputs"]:
        """Rows: units of the current bin, of the bin before, ...; then the lags - 1 start indicators."""
        return self._model().ridge.coefficients.copy()

    def predict(self, recording: SpikeRecording, *, at: ArrayLike | None = None) -> Float[np.ndarray, "n n_outputs"]:
        """Behavior at times `at` (seconds, default the recording's own): the output of the bin holding each time."""
        model = self._model()
        check_units(model.unit_ids, recording)
        outputs = [
            model.ridge.predict(lagged_counts(model.scaling(segment.counts), model.selection.lags))
            for segment in recording.binned(self.bin_s)
        ]
        return values_at(recording, at, self.bin_s, outputs)

    def score(self, recording: SpikeRecording, *, interval: ArrayLike | None = None) -> float:
        """R2 (uniform average over outputs) on the samples in `interval` (n, 2) `[start, stop)` s; None: on all."""
        return score_within(recording, self.predict(recording), interval)

    def _model(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError("WienerFilter is not fitted: call fit(recordings) first")
        return self._fitted

    def _select(
        self, segments: list[BinnedSegment], seed: int, progress: Callable[[int, int, float], None] | None
    ) -> WienerSelection:
        if self.lags is not None and self.penalty is not None and self.transform is not None:
            return WienerSelection(self.lags, self.penalty, self.transform, None)
        longest = max(len(segment.counts) for segment in segments)
        limit = max(1, min(longest, round(_LONGEST_S / self.bin_s)))
        lags = [self.lags] if self.lags is not None else [n for n in _LAGS if n <= limit]
        transforms = [self.transform] if self.transform is not None else list(_SEARCHED)
        lengths = [len(segment.counts) for segment in segments]
        folds = fold_of_rows(lengths, max(self.folds, sum(lengths) // _FOLD_BINS), seed=seed)
        total, done = len(lags) + len(transforms) - 1, 0
        tried: list[WienerSelection] = []

        def best(chosen: int, transform: Transform) -> None:
            nonlocal done
            x, y, labeled = _design(segments, _scaling(segments, transform), chosen)
            penalty, score = _best_penalty(x, y, folds[labeled], self.penalty)
            tried.append(WienerSelection(chosen, penalty, transform, score))
            done += 1
            if progress is not None:
                progress(done, total, score)

        middle = lags[len(lags) // 2]
        for transform in transforms:
            best(middle, transform)
        winner = max(tried, key=_score).transform
        for n in lags:
            if n != middle:
                best(n, winner)
        return max(tried, key=_score)


def lagged_counts(counts: Float[np.ndarray, "time n_units"], lags: int) -> Float[np.ndarray, "time n_features"]:
    """Counts of bins t, t-1, ..., t-lags+1 side by side, zeros before the start, then the `lags - 1` start indicators.

    >>> lagged_counts(np.array([[1.0], [2.0], [3.0]]), 2)
    array([[ 1.,  0., 10.],
           [ 2.,  1.,  0.],
           [ 3.,  2.,  0.]])
    """
    time, units = counts.shape
    features = np.zeros((time, lags * units + lags - 1))
    for lag in range(min(lags, time)):
        features[lag:, lag * units : (lag + 1) * units] = counts[: time - lag]
    for lag in range(1, lags):
        features[:lag, lags * units + lag - 1] = _START_SCALE
    return features


class _Scaling(NamedTuple):
    """The count transform f, z-scored where `deviation` is not one."""

    power: float
    mean: Float[np.ndarray, " n_units"] | float
    deviation: Float[np.ndarray, " n_units"] | float

    def __call__(self, counts: Float[np.ndarray, "time n_units"]) -> Float[np.ndarray, "time n_units"]:
        return (counts**self.power - self.mean) / self.deviation


class _Fitted(NamedTuple):
    unit_ids: tuple[str, ...]
    selection: WienerSelection
    scaling: _Scaling
    ridge: RidgeFit


def _scaling(segments: list[BinnedSegment], transform: Transform) -> _Scaling:
    power = {"raw": 1.0, "power": 0.75, "sqrt": 0.5, "zscored": 0.5}[transform]
    if transform != "zscored":
        return _Scaling(power, 0.0, 1.0)
    values = np.concatenate([segment.counts for segment in segments]) ** power
    deviation = values.std(0)
    return _Scaling(power, values.mean(0), np.where(deviation > 0, deviation, 1.0))  # a silent unit stays at zero


def _design(
    segments: list[BinnedSegment], scaling: _Scaling, lags: int
) -> tuple[Float[np.ndarray, "n_rows n_features"], Float[np.ndarray, "n_rows n_outputs"], Int[np.ndarray, " n_rows"]]:
    """Features and behavior of the bins that have behavior, and these bins' row numbers."""
    x = np.concatenate([lagged_counts(scaling(segment.counts), lags) for segment in segments])
    y = np.concatenate([segment.behavior for segment in segments])
    labeled = np.flatnonzero(np.isfinite(y).all(1))
    return x[labeled], y[labeled], labeled


def _score(selection: WienerSelection) -> float:
    return -np.inf if selection.score is None else selection.score


def _best_penalty(
    x: Float[np.ndarray, "n_rows n_features"],
    y: Float[np.ndarray, "n_rows n_outputs"],
    folds: Int[np.ndarray, " n_rows"],
    penalty: float | None,
) -> tuple[float, float]:
    """The penalty with the highest held-out R2 (or the one given), and that R2."""
    centered = x - x.mean(0)
    unit = float((centered**2).sum() / x.shape[1]) or 1.0
    penalties = [penalty] if penalty is not None else [unit * relative for relative in _PENALTIES]
    residuals = _held_out_residuals(centered, y - y.mean(0), folds, penalties)
    scores = [r2_score(y, y - residual) for residual in residuals]
    best = int(np.argmax(scores))
    return float(penalties[best]), scores[best]


def _held_out_residuals(
    x: Float[np.ndarray, "n_rows n_features"],
    y: Float[np.ndarray, "n_rows n_outputs"],
    folds: Int[np.ndarray, " n_rows"],
    penalties: Sequence[float],
) -> list[Float[np.ndarray, "n_rows n_outputs"]]:
    """Residuals of each row under the ridge (with free intercept) fitted without the row's fold; x, y are centered.

    H = 11'/n + U diag(s / (s + penalty)) U' with x x' = U diag(s) U': one decomposition for all folds and penalties.
    """
    n = len(x)
    if n <= x.shape[1]:
        s, u = np.linalg.eigh(x @ x.T)
    else:
        s, v = np.linalg.eigh(x.T @ x)
        u = x @ v / np.sqrt(np.maximum(s, np.finfo(float).tiny))
    kept = s > s[-1] * np.finfo(float).eps * max(x.shape)
    s, u = s[kept], u[:, kept]
    projected = u.T @ y
    shrinks = [s / (s + penalty) for penalty in penalties]
    results = [y - u @ (shrink[:, None] * projected) for shrink in shrinks]
    for fold in np.unique(folds):
        rows = folds == fold
        basis = u[rows]
        for penalty, shrink, residual in zip(penalties, shrinks, results, strict=True):
            hat = (basis * shrink) @ basis.T + 1 / n
            try:
                residual[rows] = np.linalg.solve(np.eye(len(hat)) - hat, residual[rows])
            except np.linalg.LinAlgError:
                raise DegenerateError(
                    f"cross-validation at penalty = {penalty}: {n} rows, {x.shape[1]} features, the fit without one "
                    "fold is not unique; pass a penalty > 0 or None"
                ) from None
    return results
