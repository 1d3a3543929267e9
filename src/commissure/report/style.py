"""One figure style: matplotlib without pyplot, inline SVG that follows the page's text color, one color per method.

Colors lie in the band of luminance that has contrast >= 3 on white and on the dark page alike, and those drawn together
stay apart under simulated protanopia and deuteranopia (Machado et al. 2009).  Lines, text and ticks use `currentColor`.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["COLORS", "figure", "to_svg"]

COLORS: Mapping[str, str] = MappingProxyType(
    {
        "possm-direct": "#2f5fe8",
        "possm-ss": "#0097d6",
        "Wiener": "#858b94",
        "Kalman": "#c2188a",
        "GRU": "#c23a00",
        "MLP": "#ab9200",
        "C++ engine": "#00967a",
        "torch engine": "#b8500a",
        "window decoder": "#8660d0",
        "Mesa": "#2f5fe8",
        "DeltaNet": "#c23a00",
        "Gated DeltaNet": "#0097d6",
        "gated linear attention": "#ab9200",
        "attention": "#858b94",
        "Cholesky kernel": "#2f5fe8",
        "hybrid": "#0097d6",
        "best CG-30": "#c23a00",
        "CG to 1e-4": "#c2188a",
        "L1": "#ab9200",
        "L2": "#0097d6",
        "L3": "#2f5fe8",
        "random": "#858b94",
        "rewired": "#c23a00",
        "connectome": "#c2188a",
        "degree+levels": "#2f5fe8",
        "degree+modules": "#ab9200",
        "degree": "#858b94",
        "toy clustered": "#2f5fe8",
        "toy iid": "#c23a00",
        "toy uniform": "#ab9200",
        "toy squared": "#c2188a",
        "toy wide": "#0097d6",
        "rank": "#2f5fe8",
        "pool last": "#2f5fe8",
        "pool first": "#c23a00",
        "pool mean": "#ab9200",
        "pool all": "#0097d6",
        "plug-in": "#c23a00",
        "corrected": "#2f5fe8",
        "raw norm": "#2f5fe8",
        "raw norm:input": "#c23a00",
        "unit norm:input": "#ab9200",
        "tiny wide": "#2f5fe8",
        "tiny narrow": "#c23a00",
    }
)

_INK = "#010203"  # stands for the page's text color until `to_svg` writes currentColor in its place
_FAINT = "#80868f"  # grid lines: readable on both pages, drawn thin and transparent

_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.prop_cycle": cycler(color=list(COLORS.values())),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "grid.alpha": 0.35,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "commissure",
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.labelsize": 11,
    "ytick.color": _INK,
    "ytick.labelsize": 11,
}


@contextmanager
def figure(width: float = 6.4, height: float = 3.6) -> Iterator[tuple[Figure, Axes]]:
    """A figure (inches) with one axes in this style; the settings hold inside the block and are restored after it.

    More axes: `ax.remove()` and `fig.subplots(...)`.

    >>> with figure() as (fig, ax):
    ...     line = ax.plot([0, 1], [0, 1], color=COLORS["GRU"])
    >>> to_svg(fig).startswith("<svg")
    True
    """
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(fig)
        yield fig, fig.add_subplot()


def to_svg(fig: Figure, *, label: str = "") -> str:
    """The figure as an inline `<svg>`: same input, same text; no date, no background, no outside reference.

    `label` is what a screen reader says instead of the drawing.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL
    )  # it would style the page
    text = text.replace(_INK, "currentColor")
    text = re.sub(r"font(-family)?: ([^;\"']*?)'?DejaVu Sans'?[^;\"]*", _font, text)
    text = _own_ids(text)
    return _headed(text, label)


def _font(match: re.Match[str]) -> str:
    """Keep size and weight, take the page's family."""
    return f"font: {match[2]}sans-serif" if match[1] is None else "font-family: sans-serif"


def _own_ids(text: str) -> str:
    """Drop the ids nothing refers to and make the others this figure's own: many figures share one page."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    prefix = f"f{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)


def _headed(text: str, label: str) -> str:
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    width = float(box[1].split()[2])
    named = f' aria-label="{html.escape(label, quote=True)}"' if label else ' aria-hidden="true"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box[1]}" role="img"{named} '
        f'style="width: 100%; max-width: {width / 72:.2f}in; height: auto; stroke-linejoin: round">'
    )
    return head + text[text.index(">") + 1 :]
