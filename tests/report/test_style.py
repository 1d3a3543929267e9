"""Figures: deterministic, quiet, readable on both pages and by color-blind eyes."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest

from commissure.report.style import COLORS, figure, to_svg

PAGES = ("#ffffff", "#15181d")
# Machado, Oliveira & Fernandes (2009), severity 1.0, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}
DRAWN_TOGETHER = [
    ("possm-direct", "possm-ss", "Wiener", "Kalman", "GRU", "MLP"),
    ("C++ engine", "torch engine", "window decoder"),
    ("Mesa", "DeltaNet", "Gated DeltaNet", "gated linear attention", "attention"),
    ("Cholesky kernel", "hybrid", "best CG-30", "CG to 1e-4", "gated linear attention", "attention"),
    ("L1", "L2", "L3", "random", "rewired"),
    ("connectome", "degree+levels", "degree+modules", "degree"),
    ("toy clustered", "toy uniform", "toy squared"),
    ("toy iid", "toy wide"),
    ("plug-in", "corrected"),
    ("rank", "degree"),
    ("pool last", "pool first", "pool mean", "pool all"),
    ("raw norm", "raw norm:input", "unit norm:input"),
    ("tiny wide", "tiny narrow"),
]


def linear(color: str) -> np.ndarray:
    srgb = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def luminance(color: str) -> float:
    return float(linear(color) @ [0.2126, 0.7152, 0.0722])


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson's perceptually uniform color space."""
    to_lms = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
              [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
    to_lab = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
              [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))


@pytest.mark.parametrize("name", COLORS)
@pytest.mark.parametrize("page", PAGES)
def test_every_color_shows_on_both_pages(name: str, page: str) -> None:
    low, high = sorted((luminance(COLORS[name]), luminance(page)))
    assert (high + 0.05) / (low + 0.05) >= 3, "WCAG 2.1, graphical objects"


@pytest.mark.parametrize("vision", VISION)
def test_colors_drawn_together_stay_apart(vision: str) -> None:
    for names in DRAWN_TOGETHER:
        for a, b in itertools.combinations(names, 2):
            seen = [oklab(np.array(VISION[vision]) @ linear(COLORS[name])) for name in (a, b)]
            assert np.linalg.norm(seen[0] - seen[1]) >= 0.08, (a, b)
    assert set(itertools.chain(*DRAWN_TOGETHER)) == set(COLORS)


def test_svg_is_inline_and_clean(svg: str) -> None:
    tree = ElementTree.fromstring(svg)
    assert tree.tag.endswith("svg")
    assert tree.get("aria-label") == 'lines "of" <methods>'
    assert "currentColor" in svg
    assert "<text" in svg, "text stays text"
    for unwanted in ("<metadata", "<style", "<script", "DejaVu", "#010203", "<?xml", "<!DOCTYPE"):
        assert unwanted not in svg
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    assert used == set(re.findall(r' id="([^"]+)"', svg))


def test_svg_is_the_same_in_every_process() -> None:
    code = (
        "from commissure.report.style import figure, to_svg\n"
        "with figure() as (fig, ax): ax.plot([0, 1], [1, 0], 'o-')\n"
        "print(to_svg(fig))"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
        for _ in range(2)
    )
    assert first == second
    assert first.startswith("<svg")


def test_two_figures_share_no_id() -> None:
    texts = []
    for height in (1, 2):
        with figure() as (fig, ax):
            ax.plot([0, 1], [0, height], "o")
        texts.append(to_svg(fig))
    first, second = (set(re.findall(r' id="([^"]+)"', text)) for text in texts)
    assert first
    assert not first & second


def test_global_settings_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    with figure() as (fig, ax):
        ax.plot([0, 1])
    to_svg(fig)
    assert dict(matplotlib.rcParams) == before
    code = "import sys, commissure.report.style; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
