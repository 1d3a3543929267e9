"""Claim `decode.accuracy`: hand velocity from three real recordings, both POSSM presets against tuned baselines.

Each seed splits the trials 80/20 and draws the initial weights; all methods share splits and seeds.  R2 over the
concatenated test bins of a session (100 ms, chunk = bin), uniform over the two dimensions, no interval weights.  A
seed's score is the mean over sessions; differences are paired by seed, intervals are Student's over seeds.

Beyond the gate (full budget): the same comparison on the 50 ms session, and on simulated reaching whose spike phases
carry velocity.  There POSSM has the true spike times and chunks of 50 or 25 ms, the GRU bins of 50, 25 or 12.5 ms; the
best width of each counts.

Without the recordings the comparison runs on simulated sessions and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from commissure.core.errors import InputError
from commissure.core.rng import generator
from commissure.core.stats import Interval, mean_interval
from commissure.decode import POSSM, BinnedGRU, BinnedMLP, KalmanFilter, SpikeRecording, WienerFilter
from commissure.decode.recordings import mihi_chewie
from commissure.decode.simulate import simulate_reaching
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]


class Sizes(NamedTuple):
    """What a budget buys."""

    sessions: tuple[str, ...]
    n_seeds: int
    methods: tuple[str, ...]
    steps: int | None  # of the networks; None: each at its own setting
    beyond: bool


_SESSIONS = ("chewie-2013-10-03", "chewie-2013-12-19", "mihi-2014-03-03")
_TIMING_SEEDS = 3  # the finest bins make the GRU slow
_FIRST = ("possm-direct", "GRU", "MLP", "Kalman", "Wiener")
_SIZES: dict[Budget, Sizes] = {
    "smoke": Sizes(_SESSIONS[1:2], 1, _FIRST, 20, False),
    "quick": Sizes(_SESSIONS[1:2], 3, _FIRST, None, False),
    "full": Sizes(_SESSIONS, 5, (*_FIRST, "possm-ss"), None, True),
}


class Example(NamedTuple):
    """Some test trials of one session, nan between them: seconds end to end, horizontal velocity."""

    session: str
    times: np.ndarray
    measured: np.ndarray
    decoded: np.ndarray


class Decoder(Protocol):
    """What every contender offers."""

    def fit(self, recordings: SpikeRecording, *, seed: int = 0) -> object: ...

    def predict(self, recording: SpikeRecording) -> np.ndarray: ...

    def score(self, recording: SpikeRecording) -> float: ...


def run(ctx: Context) -> Outcome:
    """Fit every method on every session and seed of the budget."""
    sizes = _SIZES[ctx.budget]
    sessions, data, reason = _load(sizes.sessions)
    n_fits = len(sessions) * sizes.n_seeds * len(sizes.methods)
    scores: dict[str, np.ndarray] = {m: np.zeros((sizes.n_seeds, len(sessions))) for m in sizes.methods}
    done, example = 0, None
    for j, (name, recording) in enumerate(sessions.items()):
        for seed in range(sizes.n_seeds):
            train, test = split(recording, seed)
            for method in sizes.methods:
                decoder = make(method, recording, bin_s=0.1, seed=seed, steps=sizes.steps)
                decoder.fit(train, seed=seed)
                scores[method][seed, j] = decoder.score(test)
                if method == "possm-direct" and example is None:
                    example = _example(decoder, test)
                done += 1
                ctx.progress(done / n_fits * (0.5 if sizes.beyond else 1.0), f"{name}, seed {seed}, {method}")
    rows = _rows(scores, list(sessions))
    if sizes.beyond:
        rows += _beyond(ctx, sizes.n_seeds)
    note = reason if ctx.budget == "full" else f"one session, seeds: {sizes.n_seeds}. {reason}"
    assert example is not None
    picture = _figure(scores, list(sessions), example)
    return Outcome(tuple(rows), ctx.judge(rows, sizes.n_seeds), picture, sizes.n_seeds, note, data)


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


def _example(decoder: Decoder, test: SpikeRecording) -> Example:
    """The first trials of about 10 s."""
    assert test.trials is not None
    n = int(np.searchsorted(np.diff(test.trials, axis=1).ravel().cumsum(), 10.0)) or 1
    shown = test.select_trials(np.arange(min(n, len(test.trials))))
    decoded, trial = decoder.predict(shown), shown.segment_index(shown.behavior_times)
    step = float(np.median(np.diff(shown.behavior_times)))
    places = np.arange(len(trial)) + trial  # one empty place between trials
    times, measured, estimate = (np.full(places[-1] + 1, np.nan) for _ in range(3))
    times[:] = np.arange(places[-1] + 1) * step
    measured[places], estimate[places] = shown.behavior[:, 0], decoded[:, 0]
    return Example(shown.session, times, measured, estimate)


def _load(names: tuple[str, ...]) -> tuple[dict[str, SpikeRecording], str, str]:
    """Recordings by session, what they are, and why they are simulated where they are."""
    try:
        return {n: mihi_chewie(n) for n in names}, "real: Chewie and Mihi, M1, center-out reaching, 100 ms bins", ""
    except InputError as error:
        simulated = {f"simulated-{i}": simulated_trials(i, bin_s=0.1) for i in range(len(names))}
        return simulated, "SIMULATED reaching", f"the recordings could not be had ({error})"


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


def _rows(scores: dict[str, np.ndarray], sessions: list[str]) -> list[Row]:
    rows = []
    direct = scores["possm-direct"]
    for method, name, label in (("Wiener", "wiener", "Wiener"), ("GRU", "gru", "strong binned GRU")):
        rows.append(_row(f"direct_minus_{name}", f"possm-direct minus {label}", direct - scores[method]))
    for method, name in (("possm-ss", "ss"), ("MLP", "mlp"), ("Kalman", "kalman")):
        if method in scores:
            rows.append(_row(f"direct_minus_{name}", f"possm-direct minus {method}", direct - scores[method]))
    for method, values in scores.items():
        by_session = ", ".join(f"{s} {m:.3f}" for s, m in zip(sessions, values.mean(0), strict=True))
        rows.append(_row(f"r2_{method}", f"R² of {method}", values, note=by_session))
    return rows


def _row(key: str, label: str, values: np.ndarray, note: str = "") -> Row:
    """A row whose value is the mean over seeds of the mean over sessions."""
    by_seed = values.mean(1) if values.ndim == 2 else values
    interval = mean_interval(by_seed) if len(by_seed) > 1 else Interval(float(by_seed[0]), float("nan"), float("nan"))
    has_interval = np.isfinite(interval.low)
    return Row(
        key,
        label,
        interval.estimate,
        interval.low if has_interval else None,
        interval.high if has_interval else None,
        note=note,
    )


class Comparison(NamedTuple):
    """possm-direct against the GRU, each at several widths of chunk or bin (seconds), of which its best counts."""

    label: str
    recording_of: Callable[[int], SpikeRecording]
    chunks: tuple[float, ...]
    bins: tuple[float, ...]
    n_seeds: int


def _beyond(ctx: Context, n_seeds: int) -> list[Row]:
    """Where fine timing might carry information: the 50 ms session, and phases in a simulated rhythm."""
    comparisons = {
        "fine": Comparison(
            "50 ms session", lambda _: mihi_chewie("chewie-2013-10-03", 0.05), (0.05,), (0.05,), n_seeds
        ),
        "timing": Comparison(
            "simulated spike phases",
            lambda seed: simulated_trials(seed, bin_s=0.05, timing=0.8),
            (0.05, 0.025),
            (0.05, 0.025, 0.0125),
            _TIMING_SEEDS,
        ),
    }
    rows = []
    for i, (key, comparison) in enumerate(comparisons.items()):
        try:
            comparison.recording_of(0)
        except InputError:
            continue  # the recording is not here; the note of the claim says so
        ctx.progress(0.5 + 0.2 * i, comparison.label)
        rows.append(
            _compared(key, comparison, lambda f, i=i, c=comparison: ctx.progress(0.5 + 0.2 * i + 0.3 * f, c.label))
        )
    return rows


def _compared(key: str, comparison: Comparison, progress: Callable[[float], None]) -> Row:
    widths = {"possm-direct": comparison.chunks, "GRU": comparison.bins}
    best, notes = {}, []
    for method, options in widths.items():
        scores = np.zeros((comparison.n_seeds, len(options)))
        for seed in range(comparison.n_seeds):
            train, test = split(recording := comparison.recording_of(seed), seed)
            for i, width in enumerate(options):
                decoder = make(method, recording, bin_s=width, seed=seed)
                decoder.fit(train, seed=seed)
                scores[seed, i] = decoder.score(test)
            progress((seed + 1) / comparison.n_seeds / 2 + (0.5 if method == "GRU" else 0.0))
        best[method] = scores[:, scores.mean(0).argmax()]
        by_width = ", ".join(f"{m:.3f} at {1000 * w:g} ms" for w, m in zip(options, scores.mean(0), strict=True))
        notes.append(f"{method} {by_width}")
    note = "beyond the gate; R²: " + "; ".join(notes)
    label = f"{comparison.label}: possm-direct minus GRU, each at its best width"
    return _row(f"{key}_direct_minus_gru", label, best["possm-direct"] - best["GRU"], note)


def _figure(scores: dict[str, np.ndarray], sessions: list[str], example: Example) -> str:
    """Left: R2 of every method; right: some test trials of the first session, decoded and measured."""
    with figure(8.4, 0.8 + 0.5 * len(scores) * len(sessions) ** 0.5) as (fig, _):
        fig.clear()
        axes, trials = fig.subplots(1, 2, width_ratios=(1.0, 1.15))
        methods = sorted(scores, key=lambda m: scores[m].mean())
        for i, method in enumerate(methods):
            for j in range(len(sessions)):
                place = i + 0.22 * (j - (len(sessions) - 1) / 2)
                values = scores[method][:, j]
                axes.plot(values, np.full(len(values), place), "o", ms=4, alpha=0.5, color=COLORS[method])
                axes.plot(values.mean(), place, "|", ms=14, mew=2.5, color=COLORS[method])
        axes.set_yticks(range(len(methods)), methods)
        axes.set_xlabel("R² on held-out trials")
        trials.plot(example.times, example.measured, color=COLORS["Wiener"], lw=2.5, label="measured")
        trials.plot(example.times, example.decoded, color=COLORS["possm-direct"], lw=1.4, label="possm-direct")
        trials.set_xlabel("held-out trials, end to end (s)")
        trials.set_ylabel("horizontal velocity (cm/s)")
        trials.set_ylim(top=1.45 * np.nanmax(np.abs(example.measured)))
        trials.legend(ncols=2, loc="upper center")
        label = "Left: R² of each decoder on held-out trials, dots are seeds, bars their means, rows sessions. "
        return to_svg(fig, label=f"{label}Right: measured and decoded hand velocity of {example.session}.")
