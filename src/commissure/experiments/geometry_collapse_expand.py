"""Claim `geometry.collapse_expand`: a tiny language model first collapses, then expands while it learns its corpus.

    .36 M parameters: 2 blocks, dim 64, context 32, vocabulary 2048; AdamW, 4e-3 with a cosine, 1000 steps
    collapse = start / min over steps below 100      expansion = RankMe at the end / min      both after the last norm

Alignment is the Spearman correlation of the model's probabilities with those of the longest context found in the
training tokens (infinity-gram); it should rise from the collapse to the end.  Beside it, as it comes and not judged: a
model of dim 32 at a constant rate whose rank may fall a little late, in its first directions only.
arXiv 2509.23024, sections 3 and 4.
"""

from __future__ import annotations

import numpy as np

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.geometry_tiny import FRAMES, change, curve, runs, text_tokens
from commissure.experiments.rows import interval_row
from commissure.geometry.tiny import TinyRun, TinySetting
from commissure.geometry.tracing import TraceFrame
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

WIDE = TinySetting(
    dim=64, n_blocks=2, heads=4, vocab=2048, context=32, final_gain=True, steps=1000, batch_size=16, lr=4e-3,
    schedule="cosine", weight_decay=0.1, looks=60, n_contexts=1280,
)  # fmt: skip
NARROW = TinySetting(
    dim=32, n_blocks=2, heads=4, context=16, final_gain=True, steps=6000, batch_size=24, lr=6e-3, weight_decay=0.1,
    looks=60, n_contexts=2560,
)  # fmt: skip
EARLY = 100
MIDDLE = (1000, 2500)  # of the narrow model: around the peaks seen in a prototype
SITES = {"blocks.0:input": "embedding", "blocks.1:input": "block", "norm:input": "before", "norm": "after"}
_SMALL = {"steps": 60, "looks": 12, "n_contexts": 160}
_SETTINGS: dict[Budget, tuple[int, TinySetting, TinySetting | None]] = {
    "smoke": (1, WIDE.model_copy(update=_SMALL), None),
    "quick": (3, WIDE, None),
    "full": (5, WIDE, NARROW),
}


def run(ctx: Context) -> Outcome:
    """Train by every seed; judge collapse, expansion and alignment."""
    n_seeds, wide, narrow = _SETTINGS[ctx.budget]
    share = 1.0 if narrow is None else 0.3
    found = {"wide": runs(wide, n_seeds, lambda done, text: ctx.progress(share * done, text))}
    if narrow is not None:
        found["narrow"] = runs(
            narrow, n_seeds, lambda done, text: ctx.progress(share + (1 - share) * done, f"dim 32, {text}")
        )
    rows = _rows(found)
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, data=text_tokens(wide.vocab)[1])


def _rows(found: dict[str, list[TinyRun]]) -> list[Row]:
    wide = found["wide"]
    collapse, expansion = (np.array([pair[k] for pair in map(_moves, wide)]) for k in (0, 1))
    at_min = [int(curve(one, "rankme").argmin()) for one in wide]
    when = np.array([float(one.steps[at]) for one, at in zip(wide, at_min, strict=True)])
    gain = np.array([one.alignment[-1] - one.alignment[at] for one, at in zip(wide, at_min, strict=True)])
    falls = np.array([one.held_out[0] - one.held_out[-1] for one in wide])
    rows = [
        Row("collapse", f"least over seeds of start over minimum before step {EARLY}", float(collapse.min())),
        Row("expansion", "least over seeds of RankMe at the end over the minimum", float(expansion.min())),
        Row("alignment", "least over seeds of the rise of alignment from the minimum to the end", float(gain.min())),
        interval_row("collapses", "start over minimum", collapse),
        interval_row("expansions", "end over minimum", expansion),
        interval_row("gains", "rise of alignment", gain),
        interval_row("when", "step of the minimum", when),
        interval_row("loss", "fall of the held-out loss", falls, "nats"),
    ]
    for site, name in SITES.items():
        for frame in FRAMES:
            moves = np.array([_moves(one, site, frame) for one in wide])
            at = f"{name}, {frame}"
            rows.append(interval_row(f"collapse_{name}_{frame}", f"start over minimum, {at}", moves[:, 0]))
            rows.append(interval_row(f"expansion_{name}_{frame}", f"end over minimum, {at}", moves[:, 1]))
    for measure, label in (
        ("rankme", "RankMe"),
        ("participation_ratio", "participation ratio"),
        ("rankme_without_top", "RankMe without the first 10 directions"),
        ("top_share", "share of the first direction"),
    ) * ("narrow" in found):
        for frame in FRAMES:
            pairs = np.array([change(one, curve(one, measure, "norm", frame), MIDDLE) for one in found["narrow"]])
            text = f"dim 32, {label}, {frame}: last 38 % over steps {MIDDLE[0]} to {MIDDLE[1]}"
            rows.append(interval_row(f"narrow_{measure}_{frame}", text, pairs[:, 1] / pairs[:, 0]))
    return rows


def _moves(run: TinyRun, site: str = "norm", frame: TraceFrame = "raw") -> tuple[float, float]:
    """Start over minimum before step 100, end over that minimum."""
    ranks = curve(run, "rankme", site, frame)
    least = ranks[run.steps < EARLY].min()
    return float(ranks[0] / least), float(ranks[-1] / least)


def _figure(found: dict[str, list[TinyRun]]) -> str:
    with figure(8.0, 3.4) as (fig, ax):
        ax.remove()
        left, right = fig.subplots(1, 2)
        for name, text in (("wide", "dim 64"), ("narrow", "dim 32, constant rate")):
            for k, one in enumerate(found.get(name, [])):
                style = {"color": COLORS[f"tiny {name}"], "alpha": 0.7, "linewidth": 1.2}
                left.plot(one.steps + 1, curve(one, "rankme"), label=text if k == 0 else None, **style)
                right.plot(one.steps + 1, one.alignment, label=text if k == 0 else None, **style)
        for panel, label in ((left, "RankMe after the last norm"), (right, "Spearman with the infinity-gram")):
            panel.set(xscale="log", xlabel="1 + step", ylabel=label)
        left.set_yscale("log")
        right.legend(loc="upper left", fontsize=9)
        return to_svg(fig, label="RankMe and alignment of tiny language models over training")
