"""Claim `decode.timing`: where fine timing might carry information, POSSM against the binned GRU.

Real: the 50 ms session (chunk = bin).  Simulated: reaching whose spikes lock to a 20 Hz rhythm at phases that depend on
velocity, so that counts in 50 ms bins lose what the phases say.  There POSSM has the true spike times in chunks of 50
or 25 ms, the GRU bins of 50, 25 or 12.5 ms; each contender's best width counts.  Splits, seeds and intervals as in
`decode.accuracy`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from commissure.core.errors import InputError
from commissure.decode import SpikeRecording
from commissure.decode.recordings import mihi_chewie
from commissure.experiments.claims import Context, Outcome
from commissure.experiments.decode_contenders import make, seed_row, simulated_trials, split
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]


class Comparison(NamedTuple):
    """One comparison: a recording for each seed, widths in seconds."""

    label: str
    recording_of: Callable[[int], SpikeRecording]
    chunks: tuple[float, ...]
    bins: tuple[float, ...]
    n_seeds: int


_COMPARISONS = {
    "fine": Comparison("50 ms session", lambda _: mihi_chewie("chewie-2013-10-03", 0.05), (0.05,), (0.05,), 5),
    "timing": Comparison(
        "simulated spike phases",
        lambda seed: simulated_trials(seed, bin_s=0.05, timing=0.8),
        (0.05, 0.025),
        (0.05, 0.025, 0.0125),
        3,  # the finest bins make the GRU slow
    ),
}


def run(ctx: Context) -> Outcome:
    """Fit both contenders at every width (the table runs it at the full budget only)."""
    try:
        _COMPARISONS["fine"].recording_of(0)
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the 50 ms recording could not be had ({error})")
    rows, by_width = [], {}
    for i, (key, comparison) in enumerate(_COMPARISONS.items()):
        best, notes = {}, []
        for method, widths in (("possm-direct", comparison.chunks), ("GRU", comparison.bins)):
            scores = _scores(ctx, comparison, method, widths=widths, done=i / 2)
            by_width[key, method] = (widths, scores)
            best[method] = scores[:, scores.mean(0).argmax()]
            shown = (f"{m:.3f} at {1000 * w:g} ms" for w, m in zip(widths, scores.mean(0), strict=True))
            notes.append(f"{method} {', '.join(shown)}")
        label = f"{comparison.label}: possm-direct minus GRU, R²"
        rows.append(seed_row(f"{key}_direct_minus_gru", label, best["possm-direct"] - best["GRU"], "; ".join(notes)))
    n_seeds = min(comparison.n_seeds for comparison in _COMPARISONS.values())
    data = "real: Chewie, 50 ms bins; simulated reaching at true spike times"
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(by_width), n_seeds, "", data)


def _scores(ctx: Context, comparison: Comparison, method: str, *, widths: tuple[float, ...], done: float) -> np.ndarray:
    """Test R2 by seed and width."""
    scores = np.zeros((comparison.n_seeds, len(widths)))
    for seed in range(comparison.n_seeds):
        ctx.progress(done + 0.5 * seed / comparison.n_seeds, f"{comparison.label}, {method}, seed {seed}")
        recording = comparison.recording_of(seed)
        train, test = split(recording, seed)
        for i, width in enumerate(widths):
            decoder = make(method, recording, bin_s=width, seed=seed)
            decoder.fit(train, seed=seed)
            scores[seed, i] = decoder.score(test)
    return scores


def _figure(by_width: dict[tuple[str, str], tuple[tuple[float, ...], np.ndarray]]) -> str:
    with figure(6.4, 3.2) as (fig, axes):
        for method, marker in (("possm-direct", "o"), ("GRU", "s")):
            widths, scores = by_width["timing", method]
            milliseconds = 1e3 * np.array(widths)
            axes.plot(milliseconds, scores.T, marker=marker, ls="none", ms=4, alpha=0.5, color=COLORS[method])
            axes.plot(milliseconds, scores.mean(0), marker=marker, color=COLORS[method], label=method)
        axes.set_xlabel("width of chunk or bin (ms)")
        axes.set_ylabel("R² on held-out trials")
        axes.legend(loc="lower left")
        return to_svg(fig, label="Simulated spike phases: R² against the width of POSSM's chunk and the GRU's bin")
