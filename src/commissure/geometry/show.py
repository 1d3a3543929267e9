"""Figures of a trajectory: ranks with their phases, spectra over time, all layers at once.

They draw into a matplotlib figure that is given; axes of steps are 1 + step on a logarithmic scale, so that step 0
shows.  Shaded: what `segment_phases` finds, each phase named above.  Ranks count directions, alpha has no unit.
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
_NAME_SIZE = 9.0  # points; a letter is .6 of that wide
_NAME_ROW = 2.6 * _NAME_SIZE  # points: two lines of a phase's name
_MOST_ROWS = 3  # of names above a panel; a phase without room in these is only shaded


def phases_of(series: Series) -> tuple[Phase, ...]:
    """`segment_phases` of a series; errors are those known and the scatter between checkpoints, together."""
    known = np.where(np.isfinite(series.stderr), series.stderr, 0.0)
    errors = np.hypot(known, scatter(series.steps, series.ranks) * series.ranks)
    has_alpha = bool(np.isfinite(series.alpha).any())
    return segment_phases(series.steps, series.ranks, stderr=errors, alpha=series.alpha if has_alpha else None)


def draw_trajectory(figure: Any, series: Mapping[str, Series], *, x_label: str = "1 + step") -> None:
    """RankMe of every series with two errors as a band, its alpha below; side by side, each with its own phases."""
    if not series:
        raise InputError("series", series, "one series by name, at least")
    has_alpha = any(np.isfinite(one.alpha).any() for one in series.values())
    n_rows = 2 if has_alpha else 1
    panels = figure.subplots(
        n_rows, len(series), sharex=True, sharey="row", squeeze=False, height_ratios=(2, 1)[:n_rows]
    )
    colors = (_SERIES * len(series))[: len(series)]
    width = 60.0 * figure.get_size_inches()[0] / len(series)  # of a panel, points: 5/6 of its share
    for column, color, (name, one) in zip(panels.T, colors, series.items(), strict=True):
        x, upper = 1 + one.steps, column[0]
        ends = one.ranks - 2 * one.stderr, one.ranks + 2 * one.stderr
        upper.plot(x, one.ranks, "-o", color=color, markersize=3, linewidth=1.4)
        upper.fill_between(x, *ends, color=color, alpha=0.2, linewidth=0)
        upper.set(xscale="log", yscale="log")
        if has_alpha:
            column[1].plot(x, one.alpha, "-o", color=color, markersize=3, linewidth=1.4)
        n_above = _shade(column, phases_of(one), width)
        upper.set_title(name, pad=6 + n_above * _NAME_ROW)
        column[-1].set_xlabel(x_label)
    _plain_ticks(panels[0, 0].yaxis)
    panels[0, 0].set_ylabel("RankMe (directions)")
    if has_alpha:
        panels[1, 0].set_ylabel("alpha")
    figure.align_ylabels()


def draw_spectra(figure: Any, spectra: Mapping[int, Spectrum]) -> None:
    """Shares of the variance by rank, one curve a step, early ones dark, late ones light.

    >>> from matplotlib.figure import Figure
    >>> draw_spectra(Figure(), {0: Spectrum.of(np.array([2.0, 1.0])), 9: Spectrum.of(np.array([3.0, 1.0]))})
    """
    if not spectra:
        raise InputError("spectra", spectra, "one spectrum by step, at least")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    axes, steps = figure.subplots(), sorted(spectra)
    colors = ListedColormap(colormaps["viridis"](np.linspace(0, 0.9, 256)))  # its last yellow is lost on white
    scale = ScalarMappable(LogNorm(1 + steps[0], 1 + max(steps[-1], steps[0] + 1)), colors)
    for step in steps:
        shares = spectra[step].shares
        shares = shares[shares > np.finfo(np.float64).eps * shares[0]]
        axes.plot(np.arange(1, len(shares) + 1), shares, color=scale.to_rgba(np.array([1.0 + step]))[0], linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="rank of the eigenvalue", ylabel="share of the variance")
    _plain_ticks(axes.xaxis)
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
        drawn = axes.pcolormesh(_edges(steps), np.arange(len(sites) + 1) - 0.5, image, cmap="viridis", norm=scale,
                                edgecolors="face", linewidth=0.3)  # fmt: skip  # else pages shine through the seams
        axes.set(xscale="log", xlabel="1 + step", title={"raw": "rows as they are", "unit": "unit rows"}[frame])
        axes.grid(visible=False)
    panels[0].set_yticks(range(len(sites)), sites)
    panels[0].invert_yaxis()
    bar = figure.colorbar(drawn, ax=list(panels), label="RankMe (directions)")
    bar.outline.set_visible(False)
    _plain_ticks(bar.ax.yaxis)


def _edges(steps: Sequence[int]) -> Float64[np.ndarray, " edges"]:
    """Borders of the columns, halfway between steps in log(1 + step)."""
    at = np.log(1 + np.asarray(steps, np.float64))
    between = (at[1:] + at[:-1]) / 2
    first, last = (between[0] - at[0], at[-1] - between[-1]) if len(between) else (0.5, 0.5)
    return np.exp(np.concatenate([[at[0] - first], between, [at[-1] + last]]))


def _plain_ticks(axis: Any) -> None:
    """5, 10, 20 instead of powers of ten, and even steps where there are few of these."""
    from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if high > 5 * low else AutoLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _shade(panels: Sequence[Any], phases: Sequence[Phase], width: float) -> int:
    """Shade and name the phases on panels `width` points wide; says how many rows of names are above the first."""
    from matplotlib.transforms import ScaledTranslation

    left, right = np.log(panels[0].get_xlim())
    right_ends: list[float] = []  # of the names in each row, as shares of the width
    for phase in phases:
        start, stop = 1 + phase.start, 1 + phase.stop
        for axes in panels if stop > start else ():  # one checkpoint has no width, and would take all of the axis
            axes.axvspan(start, stop, color=_KINDS[phase.kind], alpha=0.12, linewidth=0)
        name = phase.kind.replace("-", "-\n")
        half = 0.3 * _NAME_SIZE * max(map(len, name.split("\n"))) / width
        middle = float(np.clip((np.log(start * stop) / 2 - left) / (right - left), half, max(half, 1 - half)))
        row = next((i for i, end in enumerate(right_ends) if end < middle - half), len(right_ends))
        if row == _MOST_ROWS:
            continue
        right_ends[row : row + 1] = [middle + half + 0.02]
        lift = ScaledTranslation(0, (3 + row * _NAME_ROW) / 72, panels[0].figure.dpi_scale_trans)
        panels[0].annotate(
            name, (np.sqrt(start * stop), 1.0), (middle, 1.0), xycoords=("data", "axes fraction"),
            textcoords=panels[0].transAxes + lift, ha="center", va="bottom", linespacing=1.0, fontsize=_NAME_SIZE,
            color=_KINDS[phase.kind],
            arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": _KINDS[phase.kind]} if row else None,
        )  # fmt: skip
    return len(right_ends)
