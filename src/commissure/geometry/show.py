"""Figures of a trajectory: ranks with their phases, spectra over time, all layers at once.

They draw into a matplotlib figure that is given, axes of steps are 1 + step on a logarithmic scale, so that step 0
shows.  Shaded: what `segment_phases` finds, each phase named above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from commissure.core.errors import InputError
from commissure.geometry.phases import Phase, scatter, segment_phases
from commissure.geometry.spectra import Spectrum
from commissure.geometry.tracing import Pooling, TraceFrame
from commissure.geometry.trajectory import Series, Trajectory

__all__ = ["draw_heat_map", "draw_spectra", "draw_trajectory", "phases_of"]

_KINDS = {
    "warmup": "#c23a00",
    "entropy-seeking": "#2f5fe8",
    "compression-seeking": "#ab9200",
    "flat": "#858b94",
    "undetermined": "#858b94",
}
_SERIES = ("#2f5fe8", "#c2188a", "#00967a", "#b8500a")
_LEAST_WIDTH = 0.07  # of the axis, for a phase's name above it


def phases_of(series: Series) -> tuple[Phase, ...]:
    """`segment_phases` of a series; errors are those known and the scatter between checkpoints, together."""
    known = np.where(np.isfinite(series.stderr), series.stderr, 0.0)
    errors = np.hypot(known, scatter(series.steps, series.ranks) * series.ranks)
    has_alpha = bool(np.isfinite(series.alpha).any())
    return segment_phases(series.steps, series.ranks, stderr=errors, alpha=series.alpha if has_alpha else None)


def draw_trajectory(figure: Any, series: Mapping[str, Series], *, x_label: str = "1 + step") -> None:
    """RankMe of every series, with two errors as bands, and its alpha below; phases are those of the first."""
    if not series:
        raise InputError("series", series, "one series by name, at least")
    has_alpha = any(np.isfinite(one.alpha).any() for one in series.values())
    panels = figure.subplots(2 if has_alpha else 1, sharex=True, squeeze=False, height_ratios=(2, 1)[: 1 + has_alpha])
    _shade(panels[:, 0], phases_of(next(iter(series.values()))))
    for color, (name, one) in zip(_SERIES * len(series), series.items(), strict=False):
        x = 1 + one.steps
        panels[0, 0].plot(x, one.ranks, "-o", color=color, markersize=3, linewidth=1.4, label=name)
        panels[0, 0].fill_between(
            x, one.ranks - 2 * one.stderr, one.ranks + 2 * one.stderr, color=color, alpha=0.2, linewidth=0
        )
        if has_alpha:
            panels[1, 0].plot(x, one.alpha, "-o", color=color, markersize=3, linewidth=1.4)
    panels[0, 0].set(xscale="log", yscale="log", ylabel="RankMe")
    if len(series) > 1:
        panels[0, 0].legend(loc="lower right")
    if has_alpha:
        panels[1, 0].set_ylabel("alpha")
    panels[-1, 0].set_xlabel(x_label)
    figure.align_ylabels()


def draw_spectra(figure: Any, spectra: Mapping[int, Spectrum]) -> None:
    """Shares of the variance by rank, one curve a step, early ones dark, late ones light."""
    if not spectra:
        raise InputError("spectra", spectra, "one spectrum by step, at least")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    axes, steps = figure.subplots(), sorted(spectra)
    scale = ScalarMappable(LogNorm(1, 1 + max(steps[-1], 1)), colormaps["viridis"])
    for step in steps:
        shares = spectra[step].shares
        shares = shares[shares > np.finfo(np.float64).eps * shares[0]]
        axes.plot(np.arange(1, len(shares) + 1), shares, color=scale.to_rgba(np.array([1.0 + step]))[0], linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="share of the variance")
    figure.colorbar(scale, ax=axes, label="1 + step").outline.set_visible(False)


def draw_heat_map(
    figure: Any, trajectory: Trajectory, *, pooling: Pooling = "last", frames: Sequence[TraceFrame] = ("raw", "unit")
) -> None:
    """RankMe of every site (rows, in the order of the model) at every step (columns), one panel a frame."""
    rows = [row for row in trajectory.rows if row.geometry.pooling == pooling and row.geometry.frame in frames]
    if not rows:
        raise InputError("pooling, frames", (pooling, tuple(frames)), "a pooling and frames that were traced")
    from matplotlib.colors import LogNorm

    sites = list(dict.fromkeys(row.geometry.site for row in rows))
    shown = [frame for frame in frames if any(row.geometry.frame == frame for row in rows)]
    steps = sorted({row.step for row in rows})
    ranks = [row.geometry.rankme for row in rows if np.isfinite(row.geometry.rankme)]
    scale = LogNorm(min(ranks, default=1.0), max(ranks, default=1.0) * (1 + 1e-9))
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, frame in zip(panels, shown, strict=True):
        image = np.full((len(sites), len(steps)), np.nan)
        for row in rows:
            if row.geometry.frame == frame:
                image[sites.index(row.geometry.site), steps.index(row.step)] = row.geometry.rankme
        drawn = axes.pcolormesh(_edges(steps), np.arange(len(sites) + 1) - 0.5, image, cmap="viridis", norm=scale)
        axes.set(xscale="log", xlabel="1 + step", title={"raw": "rows as they are", "unit": "unit rows"}[frame])
        axes.grid(visible=False)
    panels[0].set_yticks(range(len(sites)), sites)
    panels[0].invert_yaxis()
    figure.colorbar(drawn, ax=list(panels), label="RankMe").outline.set_visible(False)


def _edges(steps: Sequence[int]) -> Float64[np.ndarray, " edges"]:
    """Borders of the columns, halfway between steps in log(1 + step)."""
    at = np.log(1 + np.asarray(steps, np.float64))
    between = (at[1:] + at[:-1]) / 2
    first, last = (between[0] - at[0], at[-1] - between[-1]) if len(between) else (0.5, 0.5)
    return np.exp(np.concatenate([[at[0] - first], between, [at[-1] + last]]))


def _shade(panels: Sequence[Any], phases: Sequence[Phase]) -> None:
    whole = np.log((1 + phases[-1].stop) / (1 + phases[0].start)) or 1.0
    for phase in phases:
        start, stop = 1 + phase.start, 1 + phase.stop
        for axes in panels:
            axes.axvspan(start, stop, color=_KINDS[phase.kind], alpha=0.12, linewidth=0)
        if np.log(stop / start) / whole >= _LEAST_WIDTH:
            panels[0].annotate(
                phase.kind.replace("-", "-\n"), (np.sqrt(start * stop), 1.02), xycoords=("data", "axes fraction"),
                ha="center", va="bottom", fontsize=9, color=_KINDS[phase.kind],
            )  # fmt: skip
