"""Figures and facts of networks: connectivity by modules, scores and measured regimes against the spectral radius.

Figures are matplotlib's, empty, in whatever style the caller has set.  Regimes are never read off the spectral radius:
lambda_1, the largest Lyapunov exponent in nats a step, is positive in the chaotic regime and negative in the ordered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from commissure.core.errors import InputError
from commissure.core.stats import mean_interval
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.partitions import groups
from commissure.reservoirs.spectral import spectral_radius

__all__ = ["Facts", "draw_connectivity", "draw_sweep", "facts", "module_order"]

_MOST_PIXELS = 1000  # a side; larger networks are drawn as means over squares of pairs
_WIDTHS = (0.5, 1.0, 1.6)  # of borders: finest modules, the next, all coarser ones
_LEAST_GAP = 0.06  # of the axis, between names at its right end

Curves = Mapping[str, Float[np.ndarray, "seeds radii"]]


@dataclass(frozen=True)
class Facts:
    """What there is to count; `within` is the share of all weight (its magnitude) inside modules, level by level."""

    nodes: int
    edges: int
    directed: bool
    density: float
    weight_min: float
    weight_max: float
    negative: float
    strongly_connected_parts: int
    largest_part: int
    reciprocity: float
    spectral_radius: float
    spectral_lower: float
    spectral_upper: float
    spectral_method: str
    modules: tuple[int, ...]
    within: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def facts(connectome: Connectome) -> Facts:
    """What a network is made of.

    >>> found = facts(Connectome.from_array(np.roll(np.eye(4), 1, axis=1), orientation="source_target"))
    >>> found.edges, found.strongly_connected_parts, round(found.spectral_radius, 9), found.reciprocity
    (4, 1, 1.0, 0.0)
    """
    weights = connectome.weights
    n_parts, part = connected_components(weights, connection="strong")
    radius = spectral_radius(connectome)
    row, size = np.repeat(np.arange(connectome.n_nodes), np.diff(weights.indptr)), np.abs(weights.data)
    within = [float(size[level[row] == level[weights.indices]].sum() / max(size.sum(), 1e-300))
              for level in connectome.levels]  # fmt: skip
    return Facts(
        nodes=connectome.n_nodes,
        edges=connectome.n_edges,
        directed=not connectome.is_undirected,
        density=connectome.density,
        weight_min=float(weights.data.min()) if weights.nnz else 0.0,
        weight_max=float(weights.data.max()) if weights.nnz else 0.0,
        negative=float((weights.data < 0).mean()) if weights.nnz else 0.0,
        strongly_connected_parts=int(n_parts),
        largest_part=int(np.bincount(part).max()),
        reciprocity=float((weights != 0).multiply(weights.T != 0).nnz / max(1, weights.nnz)),
        spectral_radius=radius.value,
        spectral_lower=radius.lower,
        spectral_upper=radius.upper,
        spectral_method=radius.method,
        modules=tuple(int(level.max()) + 1 for level in connectome.levels),
        within=tuple(within),
    )


def module_order(connectome: Connectome) -> Int[np.ndarray, " n"]:
    """The nodes with the members of every module of every level side by side; as they are without levels.

    >>> ring = Connectome.from_array(np.roll(np.eye(4), 1, axis=1), orientation="source_target")
    >>> module_order(ring.with_levels([[0, 1, 0, 1]])).tolist()
    [0, 2, 1, 3]
    """
    if not connectome.levels:
        return np.arange(connectome.n_nodes)
    return np.lexsort(connectome.levels)  # the last key, the coarsest partition, counts most


def draw_connectivity(figure: Any, connectome: Connectome, *, title: str = "") -> None:
    """The weights, nodes sorted by modules, with the borders of the modules: the coarser, the thicker.

    Colors are linear in the weight up to its 99th percentile; negative weights turn the scale into a diverging one.
    """
    order, n = module_order(connectome), connectome.n_nodes
    image, step = _image(connectome.weights, order)
    entries = np.abs(image[image != 0])
    top = float(np.quantile(entries, 0.99)) if len(entries) else 1.0
    signed = bool((image < 0).any())
    axes = figure.subplots()
    drawn = axes.imshow(
        np.where(image == 0, np.nan, image),  # absent edges keep the background
        cmap="RdBu_r" if signed else "viridis_r",
        vmin=-top if signed else 0.0,
        vmax=top,
        interpolation="nearest",
        extent=(0, n, n, 0),
    )
    for at, level in enumerate(connectome.levels):
        for module in groups(level[order]):
            start, size = int(module[0]), len(module)
            width = _WIDTHS[min(at, len(_WIDTHS) - 1)]
            box = [start, start + size, start + size, start, start], [start, start, start + size, start + size, start]
            axes.plot(*box, color="#c23a00", linewidth=width, solid_joinstyle="miter", clip_on=False)
    of = "weight" if step == 1 else f"mean weight of {step} x {step} pairs"
    clipped = "max" if float(np.abs(image).max()) > top else "neither"
    bar = figure.colorbar(
        drawn, ax=axes, shrink=0.8, label=of, extend="both" if signed and clipped == "max" else clipped
    )
    bar.outline.set_visible(False)
    sorted_by = ", sorted by modules" if connectome.levels else ""
    axes.set(xlabel=f"target node{sorted_by}", ylabel=f"source node{sorted_by}", xlim=(0, n), ylim=(n, 0), title=title)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def draw_sweep(
    figure: Any,
    radii: Float[np.ndarray, " radii"],
    scores: Mapping[str, Curves],
    *,
    exponents: Curves | None = None,
    score_label: str = "mean R² over targets",
) -> None:
    """Scores against the spectral radius, one panel a condition side by side; below them the measured regimes.

    `scores[condition][network]` (seeds, radii); lines are means over seeds, bands their 95 % Student intervals (none
    for one seed).  `exponents[network]`: largest Lyapunov exponents (seeds, radii), in nats a step.
    """
    radii = np.asarray(radii, np.float64)
    given = {f"scores[{c!r}][{k!r}]": v for c, curves in scores.items() for k, v in curves.items()}
    given |= {f"exponents[{k!r}]": v for k, v in (exponents or {}).items()}
    for name, values in given.items():
        if np.ndim(values) != 2 or np.shape(values)[1] != len(radii):
            raise InputError(name, np.shape(values), f"shape (seeds, {len(radii)}), one column a radius")
    order = np.argsort(radii)
    radii, scores = radii[order], {c: _columns(curves, order) for c, curves in scores.items()}
    names = list(dict.fromkeys(name for curves in scores.values() for name in curves))
    rows = 1 if exponents is None else 2
    panels = figure.subplots(rows, len(scores), squeeze=False, sharex=True, height_ratios=[1.6, 1][:rows])
    for column, (condition, curves) in enumerate(scores.items()):
        axes = panels[0, column]
        _curves(axes, radii, curves, names)
        axes.set(title=condition, ylabel=score_label if column == 0 else "")
        if rows == 1:
            axes.set_xlabel("spectral radius")
    _name_ends(panels[0, -1], radii, list(scores.values())[-1], names)
    if exponents is not None:
        _regimes(panels[1, 0], radii, _columns(exponents, order), names)
        for axes in panels[1, 1:]:
            axes.set_visible(False)
        for axes in panels[0, 1:]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("spectral radius")
    figure.align_ylabels()


def _image(weights: csr_array, order: Int[np.ndarray, " n"]) -> tuple[Float[np.ndarray, "rows columns"], int]:
    """The matrix in this order, and how many nodes a pixel holds."""
    n = len(order)
    step = -(-n // _MOST_PIXELS)
    pixel = np.empty(n, np.int64)
    pixel[order] = np.arange(n) // step
    members = np.bincount(pixel)
    into = csr_array((np.ones(n), (np.arange(n), pixel)), shape=(n, len(members)))
    return (into.T @ weights @ into).toarray() / np.outer(members, members), step


def _columns(curves: Curves, order: Int[np.ndarray, " radii"]) -> Curves:
    return {name: np.asarray(values)[:, order] for name, values in curves.items()}


def _curves(axes: Any, radii: Float[np.ndarray, " radii"], curves: Curves, names: list[str]) -> None:
    """Means over seeds with bands; the color of a network is its place in `names`."""
    for name, values in curves.items():
        color = f"C{names.index(name) if name in names else len(names)}"
        axes.plot(radii, np.mean(values, 0), "-o", markersize=3, color=color, label=name)
        if len(values) > 1:
            ends = np.array([mean_interval(column)[1:] for column in np.asarray(values).T]).T
            axes.fill_between(radii, *ends, color=color, alpha=0.2, linewidth=0)
    axes.grid(alpha=0.3)


def _name_ends(axes: Any, radii: Float[np.ndarray, " radii"], curves: Curves, names: list[str]) -> None:
    """The networks' names at the ends of their lines, pushed apart: no legend to look up."""
    low, high = axes.get_ylim()
    least = _LEAST_GAP * (high - low)
    ends = sorted((float(np.mean(values, 0)[-1]), name) for name, values in curves.items())
    place = -np.inf
    for value, name in ends:
        place = max(value, place + least)
        axes.annotate(
            name,
            (radii[-1], value),
            (1.02, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=f"C{names.index(name)}",
            va="center",
            fontsize="small",
            annotation_clip=False,
        )


def _regimes(axes: Any, radii: Float[np.ndarray, " radii"], exponents: Curves, names: list[str]) -> None:
    """Exponents with what their sign means."""
    _curves(axes, radii, exponents, names)
    low, high = axes.get_ylim()
    high = max(high, 0.15 * (high - low), 0.02)
    axes.set(xlabel="spectral radius", ylabel="largest Lyapunov\nexponent (nats a step)", ylim=(low, high))
    axes.axhspan(0, high, color="#c23a00", alpha=0.08, linewidth=0)
    axes.axhline(0, color="gray", linewidth=0.8)
    for place, name, va in ((1.0, "chaotic", "top"), (0.0, "ordered", "bottom")):  # beside the curves, not on them
        axes.text(1.02, place, name, transform=axes.transAxes, va=va, fontsize="small", style="italic")
