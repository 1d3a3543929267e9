"""Facts and figures: counted by hand, and what is drawn is what was given, where it belongs."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from commissure.core.errors import InputError
from commissure.core.stats import mean_interval
from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.show import draw_connectivity, draw_sweep, facts, module_order
from commissure.reservoirs.spectral import spectral_radius

RADII = np.array([0.6, 1.0, 1.4])
SCORES = {"flat": np.array([[0.1, 0.2, 0.15], [0.2, 0.3, 0.2]]), "deep": np.array([[0.3, 0.5, 0.4], [0.4, 0.5, 0.3]])}


def test_facts_are_counted() -> None:
    weights = np.zeros((5, 5))
    weights[[0, 1, 1, 2, 3], [1, 0, 2, 3, 2]] = [2.0, 1.0, -3.0, 1.0, 1.0]
    network = Connectome.from_array(weights, orientation="source_target", levels=[[0, 0, 1, 1, 2], [0, 0, 0, 0, 1]])
    found = facts(network)
    assert (found.nodes, found.edges, found.directed, found.density) == (5, 5, True, 0.25)
    assert (found.weight_min, found.weight_max, found.negative) == (-3, 2, 0.2)
    assert (found.strongly_connected_parts, found.largest_part) == (3, 2)
    assert found.reciprocity == 0.8
    assert found.modules == (3, 2)
    assert found.within == pytest.approx((5 / 8, 1.0))
    assert found.spectral_radius == pytest.approx(2**0.5)
    radius = spectral_radius(network)
    told = (found.spectral_radius, found.spectral_lower, found.spectral_upper, found.spectral_method)
    assert told == radius
    assert facts(Connectome.from_array(np.zeros((2, 2)), orientation=None)).weight_max == 0


def shuffled() -> Connectome:
    rng = np.random.default_rng(0)
    fine = rng.permutation(np.repeat(np.arange(6), [3, 4, 5, 3, 4, 5]))
    tree = BlockTree.from_partitions([fine, np.array([0, 1, 0, 1, 0, 1])[fine]])
    return HierarchicalSBM(tree, p_within=0.9).sample(0)


def test_modules_lie_side_by_side() -> None:
    network = shuffled()
    order = module_order(network)
    assert sorted(order) == list(range(24))
    for level in network.levels:
        assert np.count_nonzero(np.diff(level[order])) == level.max()


def test_connectivity_is_drawn_in_that_order() -> None:
    network, figure = shuffled(), Figure()
    draw_connectivity(figure, network, title="mine")
    axes = figure.axes[0]
    order = module_order(network)
    drawn = np.nan_to_num(np.asarray(axes.images[0].get_array().filled(np.nan)))
    np.testing.assert_array_equal(drawn, network.to_array()[order][:, order])
    assert len(axes.lines) == 6 + 2
    for line, modules in ((axes.lines[0], network.levels[0]), (axes.lines[-1], network.levels[1])):
        start, end = np.min(line.get_xdata()), np.max(line.get_xdata())
        assert len(set(modules[order][int(start) : int(end)])) == 1
        assert list(line.get_xdata()) == list(line.get_ydata())[:1] + list(line.get_xdata())[1:]
    assert axes.lines[-1].get_linewidth() > axes.lines[0].get_linewidth()
    assert axes.get_title() == "mine"
    assert "source" in axes.get_ylabel()
    assert "target" in axes.get_xlabel()


def test_signs_make_a_diverging_scale_and_large_networks_are_means() -> None:
    signed = HierarchicalSBM(BlockTree.balanced(depth=1, leaf_size=20), weight_range=(-1, 1)).sample(0)
    figure = Figure()
    draw_connectivity(figure, signed)
    low, high = figure.axes[0].images[0].get_clim()
    assert low == -high < 0
    tree = BlockTree.balanced(depth=2, leaf_size=600)
    large = HierarchicalSBM(tree, n_edges=40_000).sample(0)
    figure = Figure()
    draw_connectivity(figure, large)
    pixels = np.nan_to_num(np.asarray(figure.axes[0].images[0].get_array().filled(np.nan)))
    assert pixels.shape == (800, 800)
    corner = large.to_array()[:300, 600:900].reshape(100, 3, 100, 3).mean((1, 3))
    np.testing.assert_allclose(pixels[:100, 200:300], corner, rtol=1e-12)
    assert "3 x 3" in figure.axes[1].get_ylabel()


def test_sweep_draws_means_and_intervals() -> None:
    figure = Figure()
    noisy = {name: values / 2 for name, values in SCORES.items()}
    exponents = {name: values - 1.0 for name, values in SCORES.items()}
    draw_sweep(figure, RADII, {"clean": SCORES, "noise": noisy}, exponents=exponents)
    clean, _, regimes, hidden = figure.axes
    assert [axes.get_title() for axes in figure.axes[:2]] == ["clean", "noise"]
    for line, band, name in zip(clean.lines, clean.collections, SCORES, strict=True):
        np.testing.assert_allclose(line.get_ydata(), SCORES[name].mean(0))
        ends = [mean_interval(column) for column in SCORES[name].T]
        corners = band.get_paths()[0].vertices[:, 1]
        assert corners.min() == pytest.approx(min(e.low for e in ends))
        assert corners.max() == pytest.approx(max(e.high for e in ends))
    np.testing.assert_allclose(regimes.lines[1].get_ydata(), exponents["deep"].mean(0))
    assert regimes.get_ylim()[1] > 0
    assert {text.get_text() for text in regimes.texts} == {"chaotic", "ordered"}
    assert not hidden.get_visible()
    assert clean.lines[0].get_color() == regimes.lines[0].get_color() != clean.lines[1].get_color()


def test_radii_in_any_order_give_one_line_from_left_to_right() -> None:
    figure, shuffled = Figure(), [2, 0, 1]
    given = {name: values[:, shuffled] for name, values in SCORES.items()}
    draw_sweep(figure, RADII[shuffled], {"clean": given}, exponents=given)
    for axes in figure.axes:
        for line, values in zip(axes.lines[:2], SCORES.values(), strict=True):
            assert line.get_xdata().tolist() == RADII.tolist()
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    assert all(text.get_position()[0] > 1 for text in figure.axes[1].texts), "no regime's name on a curve"


def test_names_stand_apart_at_the_ends_of_their_lines() -> None:
    figure = Figure()
    close = {name: np.full((1, 3), 0.4 + 1e-4 * i) for i, name in enumerate("abcd")} | {"low": np.zeros((1, 3))}
    draw_sweep(figure, RADII, {"clean": close})
    (axes,) = figure.axes
    assert not axes.collections, "no band for one seed"
    heights = {text.get_text(): text.xyann[1] for text in axes.texts}
    assert sorted(heights, key=heights.__getitem__) == ["low", "a", "b", "c", "d"]
    assert np.diff(sorted(heights.values())).min() >= 0.06 - 1e-9
    assert axes.get_xlabel() == "spectral radius"


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"scores\['clean'\]\['flat'\] = \(2, 2\): expected shape \(seeds, 3\)"):
        draw_sweep(Figure(), RADII, {"clean": {"flat": np.zeros((2, 2))}})
    with pytest.raises(InputError, match=r"exponents\['flat'\] = \(2, 2\): expected shape \(seeds, 3\)"):
        draw_sweep(Figure(), RADII, {"clean": SCORES}, exponents={"flat": np.zeros((2, 2))})
