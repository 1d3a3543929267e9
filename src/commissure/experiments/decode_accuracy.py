"""Claim `decode.accuracy`: hand velocity from three real recordings, both POSSM presets against tuned baselines.

Each seed splits the trials 80/20 and draws the initial weights; all methods share splits and seeds.  R2 over the
concatenated test bins of a session (100 ms, chunk = bin), uniform over the two dimensions, no interval weights.  A
seed's score is the mean over sessions; differences are paired by seed, intervals are Student's over seeds.

Without the recordings the comparison runs on simulated sessions and says so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from commissure.core.errors import InputError
from commissure.decode import SpikeRecording
from commissure.decode.recordings import mihi_chewie
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.decode_contenders import Decoder, make, seed_row, simulated_trials, split
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]


class Sizes(NamedTuple):
    """What a budget buys."""

    sessions: tuple[str, ...]
    n_seeds: int
    methods: tuple[str, ...]
    steps: int | None  # of the networks; None: each at its own setting


_SESSIONS = ("chewie-2013-10-03", "chewie-2013-12-19", "mihi-2014-03-03")
_FIRST = ("possm-direct", "GRU", "MLP", "Kalman", "Wiener")
_SIZES: dict[Budget, Sizes] = {
    "smoke": Sizes(_SESSIONS[1:2], 1, _FIRST, 20),
    "quick": Sizes(_SESSIONS[1:2], 3, _FIRST, None),
    "full": Sizes(_SESSIONS, 5, (*_FIRST, "possm-ss"), None),
}


class Example(NamedTuple):
    """Some test trials of one session, nan between them: seconds end to end, horizontal velocity."""

    session: str
    times: np.ndarray
    measured: np.ndarray
    decoded: np.ndarray


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
                ctx.progress(done / n_fits, f"{name}, seed {seed}, {method}")
    rows = _rows(scores, list(sessions))
    note = reason if ctx.budget == "full" else f"one session, seeds: {sizes.n_seeds}. {reason}"
    assert example is not None
    picture = _figure(scores, list(sessions), example)
    return Outcome(tuple(rows), ctx.judge(rows, sizes.n_seeds), picture, sizes.n_seeds, note, data)


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


def _rows(scores: dict[str, np.ndarray], sessions: list[str]) -> list[Row]:
    rows = []
    direct = scores["possm-direct"]
    for method, name, label in (("Wiener", "wiener", "Wiener"), ("GRU", "gru", "strong binned GRU")):
        rows.append(seed_row(f"direct_minus_{name}", f"possm-direct minus {label}", direct - scores[method]))
    for method, name in (("possm-ss", "ss"), ("MLP", "mlp"), ("Kalman", "kalman")):
        if method in scores:
            rows.append(seed_row(f"direct_minus_{name}", f"possm-direct minus {method}", direct - scores[method]))
    for method, values in scores.items():
        by_session = ", ".join(f"{s} {m:.3f}" for s, m in zip(sessions, values.mean(0), strict=True))
        rows.append(seed_row(f"r2_{method}", f"R² of {method}", values, note=by_session))
    return rows


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
