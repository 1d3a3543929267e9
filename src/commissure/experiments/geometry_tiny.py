"""What the two claims on tiny language models share: their text, their runs, and what is read off a trajectory.

    middle = mean RankMe over looks in a window of steps      late = the same over the last 38 % of the steps

Text: WikiText-2, validation and test part, byte-level BPE with "<unk>" as one token; without it the English prose that
Python brings along, which a row then says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Bool, Float64, Int64

from commissure.core.errors import InputError
from commissure.datasets.text import python_topics, wikitext2
from commissure.geometry.tiny import TinyRun, TinySetting, byte_pair_tokens, train_tiny
from commissure.geometry.tracing import TraceFrame

__all__ = ["FRAMES", "change", "curve", "late", "runs", "text_tokens"]

FIRST_SEED = 100  # smaller ones were looked at while the claims were written
FRAMES: tuple[TraceFrame, ...] = ("raw", "unit")
LATE = 0.62  # of the steps: the last 38 %


@cache
def text_tokens(vocab: int) -> tuple[Int64[np.ndarray, " tokens"], str]:
    """The tokens, and what they are of."""
    try:
        text, name = wikitext2("valid").text + wikitext2("test").text, "real: WikiText-2, validation and test part"
    except InputError:
        text, name = python_topics().text, "real: Python's reference, WikiText-2 could not be had"
    tokens = byte_pair_tokens(text, vocab=vocab)
    return tokens, f"{name}, {len(tokens):,} tokens"


def runs(
    setting: TinySetting, n_seeds: int, progress: Callable[[float, str], None], *, first: int = FIRST_SEED
) -> list[TinyRun]:
    """One run a seed."""
    tokens, _ = text_tokens(setting.vocab)
    found = []
    for i in range(n_seeds):
        found.append(train_tiny(tokens, setting, seed=first + i, frames=FRAMES))
        progress((i + 1) / n_seeds, f"seed {first + i}: loss {found[-1].held_out[-1]:.2f}")
    return found


def curve(run: TinyRun, measure: str, site: str = "norm", frame: TraceFrame = "raw") -> Float64[np.ndarray, " looks"]:
    """A measure of `TraceRow` at every look; nan where there is none."""
    rows = [row.geometry for row in run.trajectory.rows if (row.geometry.site, row.geometry.frame) == (site, frame)]
    values = [getattr(row, measure) for row in rows]
    return np.array([np.nan if value is None else value for value in values])


def late(run: TinyRun) -> Bool[np.ndarray, " looks"]:
    """Looks in the last 38 % of the steps."""
    return run.steps >= LATE * run.steps[-1]


def change(run: TinyRun, values: Float64[np.ndarray, " looks"], window: tuple[int, int]) -> tuple[float, float]:
    """Means over the looks within `window` (steps, both ends included) and over the late ones."""
    inside = (run.steps >= window[0]) & (run.steps <= window[1])
    return float(values[inside].mean()), float(values[late(run)].mean())
