"""Claim `geometry.three_phases`: collapse, expansion and a small late compression of a language model that fits a CPU.

    36,112 parameters: one block, dim 16, context 8, last norm without gain, AdamW at a constant 1e-2, 5000 steps
    early = min over steps below 60 / start      expansion = middle / min      late change = late / middle
    middle: looks in steps 500 to 1100; late: the last 38 %

Windows and gate were fixed beforehand, on a prototype.  All sites and both frames are shown: rows as they are, and
scaled to length 1, so that a fall of a few norms is not taken for one of directions.  Beside it the same model with a
loss that weighs rare tokens up.  The published late fall is a factor of 2 to 4; this one is a few percent.
arXiv 2509.23024, sections 3 and 5.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.experiments.geometry_tiny import FRAMES, change, curve, runs, text_tokens
from commissure.experiments.rows import interval_row
from commissure.geometry.tiny import TinyRun, TinySetting
from commissure.geometry.tracing import TraceFrame
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

MIDDLE = (500, 1100)
EARLY = 60
SITES = {"blocks.0:input": "embeddings", "norm:input": "before the last norm", "norm": "after the last norm"}
_DRAWN: tuple[tuple[TraceFrame, str, str], ...] = (
    ("raw", "norm", "after the last norm"),
    ("raw", "norm:input", "before it"),
    ("unit", "norm:input", "before it, unit rows"),
)
_SETTINGS: dict[Budget, tuple[int, TinySetting]] = {
    "smoke": (1, TinySetting(steps=700, looks=20, n_contexts=256)),
    "quick": (3, TinySetting(steps=2000)),
    "full": (5, TinySetting()),
}


def run(ctx: Context) -> Outcome:
    """Train by every seed with either loss; judge the one with the plain loss after the last norm."""
    n_seeds, setting = _SETTINGS[ctx.budget]
    balanced = setting.model_copy(update={"loss": "balanced"})
    found = {
        "skewed": runs(setting, n_seeds, lambda done, text: ctx.progress(done / 2, text)),
        "balanced": runs(balanced, n_seeds, lambda done, text: ctx.progress(0.5 + done / 2, f"balanced, {text}")),
    }
    rows = _rows(found)
    data = text_tokens(setting.vocab)[1]
    return Outcome(tuple(rows), ctx.judge(rows, n_seeds), _figure(found), n_seeds, data=data)


def _rows(found: dict[str, list[TinyRun]]) -> list[Row]:
    plain = found["skewed"]
    ranks = [curve(one, "rankme") for one in plain]
    early = np.array([r[one.steps < EARLY].min() / r[0] for one, r in zip(plain, ranks, strict=True)])
    depth = np.array([r[0] / r.min() for r in ranks])
    when = np.array([one.steps[r.argmin()] for one, r in zip(plain, ranks, strict=True)])
    middles = np.array([change(one, r, MIDDLE)[0] / r.min() for one, r in zip(plain, ranks, strict=True)])
    rises = _changes(plain, "alpha", difference=True)
    rows = [
        Row("early", f"largest over seeds of RankMe's minimum before step {EARLY} over its start", float(early.max())),
        Row("expansion", "least over seeds of middle over minimum", float(middles.min())),
        interval_row("late", "late over middle, RankMe after the last norm", _changes(plain, "rankme")),
        Row("alpha_rise", "least over seeds of the late rise of alpha, ranks 1 to 8", float(rises.min())),
        interval_row("depth", "start over minimum, at any step", depth),
        interval_row("when", "step of the minimum", when.astype(float)),
        interval_row("alpha", "late rise of alpha", rises),
    ]
    for loss, ran in found.items():
        for site, label in SITES.items():
            for frame in FRAMES:
                key = f"{loss}_{'embedding' if ':' in site and 'blocks' in site else site.replace(':', '_')}_{frame}"
                text = (
                    f"late over middle, {loss} loss, {label}, {'rows as they are' if frame == 'raw' else 'unit rows'}"
                )
                rows.append(interval_row(key, text, _changes(ran, "rankme", site, frame)))
    for measure, label in (
        ("participation_ratio", "participation ratio"),
        ("top_share", "share of the first direction"),
    ):
        rows.append(interval_row(measure, f"late over middle, {label}", _changes(plain, measure)))
    for key, label in (
        ("held_out", "loss of held-out tokens (nats)"),
        ("alignment", "Spearman with the infinity-gram"),
    ):
        pairs = np.array([change(one, getattr(one, key), MIDDLE) for one in plain])
        rows.append(interval_row(key, f"{label}, late minus middle", pairs[:, 1] - pairs[:, 0]))
    return rows


def _changes(
    ran: list[TinyRun], measure: str, site: str = "norm", frame: TraceFrame = "raw", *, difference: bool = False
) -> Float64[np.ndarray, " runs"]:
    """Late over middle of every run, or late minus middle."""
    pairs = np.array([change(one, curve(one, measure, site, frame), MIDDLE) for one in ran])
    return pairs[:, 1] - pairs[:, 0] if difference else pairs[:, 1] / pairs[:, 0]


def _figure(found: dict[str, list[TinyRun]]) -> str:
    with figure(8.0, 5.6) as (fig, ax):
        ax.remove()
        panels = fig.subplots(2, 2, sharex=True)
        measures = (("rankme", "RankMe"), ("alpha", "alpha, ranks 1 to 8"))
        for row, (measure, name) in zip(panels, measures, strict=True):
            for panel, (loss, ran) in zip(row, found.items(), strict=True):
                for k, one in enumerate(ran):
                    for frame, site, text in _DRAWN:
                        style = {"color": COLORS[f"{frame} {site}"], "alpha": 0.6, "linewidth": 1.0}
                        label = text if k == 0 else None
                        panel.plot(one.steps + 1, curve(one, measure, site, frame), label=label, **style)
                panel.set_xscale("log")
                if measure == "rankme":
                    panel.set_title(f"{loss} loss")
            row[0].set_ylabel(name)
            row[1].sharey(row[0])
        for panel in panels[1]:
            panel.set_xlabel("1 + step")
        panels[1, 0].legend(loc="upper left", fontsize=9)
        return to_svg(
            fig, label="RankMe and alpha over training, plain and balanced loss, before and after the last norm"
        )
