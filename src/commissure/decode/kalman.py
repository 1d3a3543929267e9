"""The Kalman filter: behavior as a linear Gaussian process, seen through the spike counts of each bin.

    s_t = A s_{t-1} + a + w,   w ~ N(0, W)         z_t = C s_t + c + q,   q ~ N(0, Q)         s_0 ~ N(m0, P0)

    G_t = P_t (I + C'Q^{-1}C P_t)^{-1}             (the filtered covariance)
    m_t <- m_t + G_t C'Q^{-1} (z_t - C m_t - c)    then   m_{t+1} = A m_t + a,   P_{t+1} = A G_t A' + W

| symbol | name |
|---|---|
| s_t | standardized kinematics of bins t + `lead`, ..., t - `history`: outputs, and auxiliary ones if `position` |
| z_t | counts of bin t to the power `power` (1/2: variance-stabilized) |
| Q | (1 - `shrinkage`) sample covariance + `shrinkage` its diagonal + `noise_floor` * mean variance * I |

`lead` is the observation lag: spikes of bin t inform the movement up to `lead` bins later, which motor cortex precedes.
The filter is causal: the output for bin t uses counts up to bin t only, and each segment restarts at the training
distribution of first states.  Beyond a segment's ends, in the fit, kinematics hold their last value.
Source: Wu, Gao, Bienenstock, Donoghue & Black, Neural Computation 2006 (Kalman filter, lag, square-root counts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from commissure.core.errors import DegenerateError, InputError, NotFittedError
from commissure.core.lsq import ridge
from commissure.decode.metrics import r2_score
from commissure.decode.recording import BinnedSegment, SpikeRecording
from commissure.decode.segments import check_units, fold_of_rows, score_within, training_segments, values_at

__all__ = ["KalmanFilter", "KalmanParameters", "KalmanSelection", "kalman_filter", "kalman_gains"]

_NOISE_FLOOR = 1e-3  # of the mean variance: bounds the condition of Q by about 1e3 * n_units, silent units included
_PRIOR = (
    1e-6  # relative ridge of A and C: keeps constant kinematics (a column of zeros) solvable, changes no digit shown
)
_LEADS = (0, 1, 2, 3)
_HISTORIES = (0, 1, 2)
_SHRINKAGES = (0.1, 0.3, 0.6, 1.0)
_POWERS = (0.5, 0.75)
_CONVERGED = 1e-13  # relative change of the covariance after which the gain is taken as steady


class KalmanSelection(NamedTuple):
    """The setting of a fitted filter; `score` is the cross-validated R2, None where nothing was selected."""

    lead: int
    history: int
    position: bool
    shrinkage: float
    power: float
    score: float | None


class KalmanParameters(NamedTuple):
    """The fitted model, in standardized units; see the module's table."""

    transition: Float[np.ndarray, "state state"]
    offset: Float[np.ndarray, " state"]
    process_noise: Float[np.ndarray, "state state"]
    observation: Float[np.ndarray, "n_units state"]
    baseline: Float[np.ndarray, " n_units"]
    observation_noise: Float[np.ndarray, "n_units n_units"]
    initial_mean: Float[np.ndarray, " state"]
    initial_covariance: Float[np.ndarray, "state state"]


class KalmanFilter:
    """Velocity (and position) Kalman filter on binned counts.

    - `bin_s`: width of the bins (seconds).
    - `lead`, `history`: bins of kinematics after and before the current one in the state; `position`: whether the
      recording's `auxiliary` columns are part of it; `shrinkage` in [0, 1]: of the observation noise; `power` of the
      counts.  Each one that is None is selected by cross-validation over trials, one at a time, twice in turn.
    - `folds`: of the cross-validation.

    >>> rng = np.random.default_rng(0)
    >>> velocity = np.cumsum(rng.normal(size=(400, 1)), axis=0)
    >>> velocity = velocity - velocity.mean()
    >>> counts = rng.poisson(np.exp(1 + 0.05 * velocity * [[1.0, -1.0, 0.5, -0.5]]))
    >>> recording = SpikeRecording.from_counts(counts, 0.1, behavior=velocity, session="demo")
    >>> KalmanFilter(lead=0, history=0, shrinkage=0.1, power=0.5).fit(recording).score(recording) > 0.8
    True
    """

    def __init__(
        self,
        bin_s: float = 0.1,
        *,
        lead: int | None = None,
        history: int | None = None,
        position: bool | None = None,
        shrinkage: float | None = None,
        power: float | None = None,
        folds: int = 5,
    ) -> None:
        for name, value in (("lead", lead), ("history", history)):
            if value is not None and value < 0:
                raise InputError(name, value, "an integer >= 0 (bins)")
        if shrinkage is not None and not 0 <= shrinkage <= 1:
            raise InputError("shrinkage", shrinkage, "a number in [0, 1]")
        if power is not None and not 0 < power <= 1:
            raise InputError("power", power, "a number in (0, 1]", "0.5 is the square root")
        if folds < 2:
            raise InputError("folds", folds, "an integer >= 2")
        self.bin_s, self.lead, self.history, self.position = bin_s, lead, history, position
        self.shrinkage, self.power, self.folds = shrinkage, power, folds
        self._fitted: _Fitted | None = None

    def fit(
        self,
        recordings: SpikeRecording | Sequence[SpikeRecording],
        *,
        seed: int = 0,
        progress: Callable[[int, int, float], None] | None = None,
    ) -> KalmanFilter:
        """Fit on one recording or several of one session; `progress(done, total, score)` follows the selection."""
        segments = training_segments(recordings, self.bin_s)
        if self.position and any(segment.auxiliary is None for segment in segments):
            raise InputError("position", True, "recordings with auxiliary columns", "pass auxiliary= or position=None")
        unit_ids = (recordings if isinstance(recordings, SpikeRecording) else recordings[0]).unit_ids
        selection = self._select(segments, seed, progress)
        self._fitted = _Fitted(unit_ids, selection, *_fit_model(segments, selection))
        return self

    @property
    def selection(self) -> KalmanSelection:
        """The setting in use and its cross-validated R2."""
        return self._model().selection

    @property
    def parameters(self) -> KalmanParameters:
        """The fitted linear Gaussian model."""
        return self._model().parameters

    @property
    def noise_floor(self) -> float:
        """What was added to every variance of the observation noise, as a fraction of their mean."""
        return _NOISE_FLOOR

    def predict(self, recording: SpikeRecording, *, at: ArrayLike | None = None) -> Float[np.ndarray, "n n_outputs"]:
        """Behavior at times `at` (seconds, default the recording's own): the output of the bin holding each time."""
        model = self._model()
        check_units(model.unit_ids, recording)
        return values_at(recording, at, self.bin_s, _decode(model, recording.binned(self.bin_s)))

    def score(self, recording: SpikeRecording, *, interval: ArrayLike | None = None) -> float:
        """R2 (uniform average over outputs) on the samples in `interval` (n, 2) `[start, stop)` s; None: on all."""
        return score_within(recording, self.predict(recording), interval)

    def _model(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError("KalmanFilter is not fitted: call fit(recordings) first")
        return self._fitted

    def _select(
        self, segments: list[BinnedSegment], seed: int, progress: Callable[[int, int, float], None] | None
    ) -> KalmanSelection:
        has_auxiliary = all(segment.auxiliary is not None for segment in segments)
        longest = max(len(segment.counts) for segment in segments)
        candidates: dict[str, tuple[float, ...]] = {
            "lead": tuple(n for n in _LEADS if n < longest) if self.lead is None else (self.lead,),
            "history": tuple(n for n in _HISTORIES if n < longest) if self.history is None else (self.history,),
            "position": ((True, False) if has_auxiliary else (False,)) if self.position is None else (self.position,),
            "shrinkage": _SHRINKAGES if self.shrinkage is None else (self.shrinkage,),
            "power": _POWERS if self.power is None else (self.power,),
        }
        chosen = {name: values[min(1, len(values) - 1)] for name, values in candidates.items()}
        chosen["position"] = candidates["position"][0]
        searched = [name for name, values in candidates.items() if len(values) > 1]
        if not searched:
            return KalmanSelection(**chosen, score=None)  # type: ignore[arg-type]
        blocks = _blocks(segments, self.folds, seed)
        total = 2 * sum(len(candidates[name]) for name in searched)
        scores: dict[KalmanSelection, float] = {}
        done = 0
        for name in searched * 2:
            trials = {}
            for value in candidates[name]:
                setting = KalmanSelection(**{**chosen, name: value}, score=None)  # type: ignore[arg-type]
                if setting not in scores:
                    scores[setting] = _held_out_score(blocks, setting)
                trials[value] = scores[setting]
                done += 1
                if progress is not None:
                    progress(done, total, trials[value])
            chosen[name] = max(trials, key=lambda value: trials[value])
        best = KalmanSelection(**chosen, score=None)  # type: ignore[arg-type]
        return best._replace(score=scores[best])


def kalman_gains(
    parameters: KalmanParameters, n_steps: int
) -> tuple[Float[np.ndarray, "n_steps state state"], Float[np.ndarray, "state n_units"]]:
    """Filtered covariances G_t of each step and the matrix C'Q^{-1}; the gain of step t is their product.

    Gains do not depend on the data.  Once the covariance stops changing the steady one is repeated.
    """
    information = np.linalg.solve(parameters.observation_noise, parameters.observation).T
    seen = information @ parameters.observation
    identity = np.eye(len(seen))
    predicted = parameters.initial_covariance
    filtered = np.empty((n_steps, *seen.shape))
    for step in range(n_steps):
        # P (I + S P)^{-1} needs no inverse of P, which is singular: past kinematics are known once they have passed
        updated = np.linalg.solve((identity + seen @ predicted).T, predicted.T).T
        filtered[step] = (updated + updated.T) / 2
        following = parameters.transition @ filtered[step] @ parameters.transition.T + parameters.process_noise
        if np.abs(following - predicted).max() <= _CONVERGED * np.abs(predicted).max():
            filtered[step:] = filtered[step]
            break
        predicted = following
    return filtered, information


def kalman_filter(
    parameters: KalmanParameters, observations: Sequence[Float[np.ndarray, "time n_units"]]
) -> list[Float[np.ndarray, "time state"]]:
    """Filtered state means E[s_t | z_0..z_t] of several segments, each from the initial distribution."""
    longest = max(len(z) for z in observations)
    filtered, information = kalman_gains(parameters, longest)
    seen = information @ parameters.observation
    state = np.tile(parameters.initial_mean, (len(observations), 1))
    means = np.empty((longest, *state.shape))
    evidence = np.zeros_like(means)  # of padded bins: never read, a segment's states before them do not depend on it
    for row, z in enumerate(observations):
        evidence[: len(z), row] = (z - parameters.baseline) @ information.T
    for step in range(longest):
        state = state + (evidence[step] - state @ seen.T) @ filtered[step].T
        means[step] = state
        state = state @ parameters.transition.T + parameters.offset
    return [means[: len(z), row] for row, z in enumerate(observations)]


class _Kinematics(NamedTuple):
    """Where the outputs are in the state and how they were standardized."""

    columns: slice
    mean: Float[np.ndarray, " n_outputs"]
    deviation: Float[np.ndarray, " n_outputs"]


class _Fitted(NamedTuple):
    unit_ids: tuple[str, ...]
    selection: KalmanSelection
    parameters: KalmanParameters
    kinematics: _Kinematics


def _fit_model(segments: list[BinnedSegment], setting: KalmanSelection) -> tuple[KalmanParameters, _Kinematics]:
    values = [_kinematics(segment, setting.position) for segment in segments]
    stacked = np.concatenate(values)
    mean, deviation = np.nanmean(stacked, axis=0), np.nanstd(stacked, axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    states = [_states((v - mean) / deviation, setting.lead, setting.history) for v in values]
    width, n_outputs = stacked.shape[1], segments[0].behavior.shape[1]
    all_states = np.concatenate(states)
    counts = np.concatenate([segment.counts for segment in segments]) ** setting.power
    known = np.isfinite(all_states).all(1)
    transition, offset, process_noise = _fit_transition(states, width)
    x, z = all_states[known], counts[known]
    observed = ridge(x, z, penalty=_PRIOR * len(x))
    noise = _regularized(z - observed.predict(x), setting.shrinkage)
    initial_mean, initial_covariance = _first_states(states, x)
    parameters = KalmanParameters(
        transition,
        offset,
        process_noise,
        observed.coefficients.T,
        observed.intercept,
        noise,
        initial_mean,
        initial_covariance,
    )
    first = setting.lead * width
    return parameters, _Kinematics(slice(first, first + n_outputs), mean[:n_outputs], deviation[:n_outputs])


def _kinematics(segment: BinnedSegment, position: bool) -> Float[np.ndarray, "time width"]:
    if position and segment.auxiliary is not None:
        return np.hstack([segment.behavior, segment.auxiliary])
    return segment.behavior


def _states(values: Float[np.ndarray, "time width"], lead: int, history: int) -> Float[np.ndarray, "time state"]:
    """Values of bins t + lead, ..., t - history side by side; beyond the ends the last value is held."""
    time = np.arange(len(values))
    return np.hstack([values[np.clip(time + shift, 0, len(values) - 1)] for shift in range(lead, -history - 1, -1)])


def _fit_transition(
    states: list[Float[np.ndarray, "time state"]], width: int
) -> tuple[Float[np.ndarray, "state state"], Float[np.ndarray, " state"], Float[np.ndarray, "state state"]]:
    """A, a, W: the newest block is regressed on the state before, the older ones are moved down by one block."""
    before = np.concatenate([s[:-1] for s in states])
    after = np.concatenate([s[1:, :width] for s in states])
    known = np.isfinite(before).all(1) & np.isfinite(after).all(1)
    n_known, size = int(known.sum()), before.shape[1]
    if n_known < 2:
        raise DegenerateError(
            f"{n_known} pair(s) of neighboring bins with behavior: no dynamics to fit; use smaller bins"
        )
    newest = ridge(before[known], after[known], penalty=_PRIOR * n_known)
    residual = after[known] - newest.predict(before[known])
    transition, offset, noise = np.eye(size, k=-width), np.zeros(size), np.zeros((size, size))
    transition[:width] = newest.coefficients.T
    offset[:width] = newest.intercept
    noise[:width, :width] = residual.T @ residual / n_known
    return transition, offset, noise


def _first_states(
    states: list[Float[np.ndarray, "time state"]], known: Float[np.ndarray, "n state"]
) -> tuple[Float[np.ndarray, " state"], Float[np.ndarray, "state state"]]:
    """Mean and covariance of the segments' first states; of all states where too few segments have one."""
    first = np.stack([s[0] for s in states])
    first = first[np.isfinite(first).all(1)]
    sample = first if len(first) >= 2 * known.shape[1] else known
    return sample.mean(0), np.atleast_2d(np.cov(sample.T, bias=True))


def _regularized(residual: Float[np.ndarray, "n n_units"], shrinkage: float) -> Float[np.ndarray, "n_units n_units"]:
    covariance = residual.T @ residual / len(residual)
    variances = np.diag(covariance)
    mean_variance = float(variances.mean())
    if mean_variance == 0:
        raise DegenerateError("the counts do not vary: no observation noise to fit; check the units or the bin width")
    return (1 - shrinkage) * covariance + np.diag(shrinkage * variances + _NOISE_FLOOR * mean_variance)


def _decode(model: _Fitted, segments: list[BinnedSegment]) -> list[Float[np.ndarray, "time n_outputs"]]:
    means = kalman_filter(model.parameters, [segment.counts**model.selection.power for segment in segments])
    k = model.kinematics
    return [m[:, k.columns] * k.deviation + k.mean for m in means]


def _blocks(segments: list[BinnedSegment], folds: int, seed: int) -> list[tuple[int, BinnedSegment]]:
    """(fold, segment) pairs: whole segments, or a continuous recording cut where the fold changes."""
    fold = fold_of_rows([len(segment.counts) for segment in segments], folds, seed=seed)
    pairs, start = [], 0
    for segment in segments:
        here: Int[np.ndarray, " time"] = fold[start : start + len(segment.counts)]
        cuts = [0, *(np.flatnonzero(np.diff(here)) + 1).tolist(), len(here)]
        for low, high in pairwise(cuts):
            auxiliary = None if segment.auxiliary is None else segment.auxiliary[low:high]
            part = BinnedSegment(
                segment.counts[low:high],
                segment.behavior[low:high],
                auxiliary,
                segment.times[low:high],
                float(segment.start + (segment.times[low] - segment.times[0])),
            )
            pairs.append((int(here[low]), part))
        start += len(here)
    return pairs


def _held_out_score(blocks: list[tuple[int, BinnedSegment]], setting: KalmanSelection) -> float:
    """R2 over the bins of all folds, each decoded by a filter fitted on the other folds."""
    targets, predictions = [], []
    for fold in sorted({number for number, _ in blocks}):
        train = [segment for number, segment in blocks if number != fold]
        test = [segment for number, segment in blocks if number == fold]
        model = _Fitted((), setting, *_fit_model(train, setting))
        targets += [segment.behavior for segment in test]
        predictions += _decode(model, test)
    y, p = np.concatenate(targets), np.concatenate(predictions)
    labeled = np.isfinite(y).all(1)
    return r2_score(y[labeled], p[labeled])
