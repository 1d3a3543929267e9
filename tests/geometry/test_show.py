"""Figures: what is drawn is what was given, and no phase's name covers another."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from commissure.core.errors import InputError
from commissure.geometry.show import draw_heat_map, draw_spectra, draw_trajectory, phases_of
from commissure.geometry.spectra import Spectrum
from commissure.geometry.tracing import TraceFrame, TraceRow
from commissure.geometry.trajectory import Series, Trajectory, TrajectoryRow

STEPS = np.array([0.0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023])
RANKS = np.array([20.0, 19, 12, 5, 3, 6, 9, 12, 11, 9, 7])
MISSING = np.full(11, np.nan)


def drawn(width: float, *series: Series) -> Figure:
    figure = Figure(figsize=(width, 5), layout="constrained")
    FigureCanvasAgg(figure)
    draw_trajectory(figure, {f"series {i}": one for i, one in enumerate(series)})
    figure.canvas.draw()
    return figure


def test_series_stand_side_by_side_with_their_own_phases() -> None:
    turned = 2 * RANKS[::-1]
    one, other = Series(STEPS, RANKS, RANKS / 50, 20 / RANKS), Series(STEPS, turned, turned / 50, 20 / turned)
    figure = drawn(10, one, other)
    assert len(figure.axes) == 4
    for column, series in enumerate((one, other)):
        upper, lower = figure.axes[column], figure.axes[2 + column]
        np.testing.assert_array_equal(upper.lines[0].get_ydata(), series.ranks)
        np.testing.assert_array_equal(lower.lines[0].get_ydata(), series.alpha)
        band = upper.collections[0].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx((series.ranks - 2 * series.stderr).min())
        assert band.max() == pytest.approx((series.ranks + 2 * series.stderr).max())
        phases = phases_of(series)
        assert [text.get_text().replace("\n", "") for text in upper.texts] == [phase.kind for phase in phases]
        spans = [patch.get_x() for patch in upper.patches]
        assert spans == [1 + phase.start for phase in phases]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylabel() == "RankMe (directions)"
    assert figure.axes[2].get_xlabel() == "1 + step"


@pytest.mark.parametrize("width", [4.0, 8.0])
def test_names_of_short_phases_do_not_overlap(width: float) -> None:
    steps = np.unique(np.geomspace(1, 30_000, 60).round())
    ranks = 40 * np.exp(np.sin(np.linspace(0, 22, len(steps))))
    figure = drawn(width, Series(steps, ranks, ranks / 100, np.full(len(steps), np.nan)))
    (axes,) = figure.axes
    assert len(axes.patches) == len(phases_of(Series(steps, ranks, ranks / 100, ranks * np.nan))) > 6
    assert len(axes.texts) == len(axes.patches) if width > 6 else len(axes.texts) >= 5
    frame, title = axes.get_window_extent(), axes.title.get_window_extent()
    words = [Text.get_window_extent(text) for text in axes.texts]  # without the line to their phase
    for i, box in enumerate(words):
        assert box.x0 >= frame.x0 - 1
        assert box.x1 <= frame.x1 + 1
        assert box.y1 <= title.y0
        assert not any(box.overlaps(other) for other in words[:i])


def test_ticks_can_be_read() -> None:
    for ranks in (RANKS, 9.5 + RANKS / 10):
        axes = drawn(6, Series(STEPS, ranks, MISSING, MISSING)).axes[0]
        low, high = axes.get_ylim()
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert sum(low <= float(label) <= high for label in labels) >= 3, "digits, no powers"


def test_one_checkpoint_is_seen() -> None:
    figure = drawn(6, Series(np.array([5.0]), np.array([7.0]), np.array([np.nan]), np.array([np.nan])))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low < 5.5
    assert high > 6.5
    assert axes.texts[0].get_text() == "flat"


def report(ranks: np.ndarray) -> Trajectory:
    frames: tuple[TraceFrame, ...] = ("raw", "unit")
    return Trajectory(tuple(
        TrajectoryRow(int(step), TraceRow(site, "last", frame, 99, 30, float(rank) + k + j, 0.2, None, None, 3.0, 2.0,
                                          0.4, None, None))
        for step, rank in zip(STEPS, ranks, strict=True)
        for k, site in enumerate(("h.0", "norm"))
        for j, frame in enumerate(frames)
    ))  # fmt: skip


def test_every_site_and_step_has_its_cell() -> None:
    figure = Figure()
    draw_heat_map(figure, report(RANKS))
    raw, unit = figure.axes[:2]
    np.testing.assert_array_equal(raw.collections[0].get_array(), np.stack([RANKS, RANKS + 1]))
    np.testing.assert_array_equal(unit.collections[0].get_array(), np.stack([RANKS + 1, RANKS + 2]))
    assert [label.get_text() for label in raw.get_yticklabels()] == ["h.0", "norm"]
    edges = raw.collections[0].get_coordinates()[0, :, 0]
    assert (edges[:-1] < 1 + STEPS).all()
    assert (edges[1:] > 1 + STEPS).all()
    with pytest.raises(InputError, match="mean"):
        draw_heat_map(Figure(), report(RANKS), pooling="mean")


def test_spectra_are_shares_colored_by_step() -> None:
    figure = Figure()
    spectra = {step: Spectrum.of(np.arange(1.0, 9) ** -k) for k, step in ((2, 100), (0, 0), (1, 10))}
    draw_spectra(figure, spectra)
    axes = figure.axes[0]
    for line, step in zip(axes.lines, (0, 10, 100), strict=True):
        np.testing.assert_allclose(line.get_ydata(), spectra[step].shares)
    greens = [line.get_color()[1] for line in axes.lines]
    assert greens == sorted(greens), "later ones are lighter"
    assert len(set(greens)) == 3
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match="series"):
        draw_trajectory(Figure(), {})
    with pytest.raises(InputError, match="spectra"):
        draw_spectra(Figure(), {})
