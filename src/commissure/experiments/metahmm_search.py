"""The settings of `metahmm.monte_carlo`, searched on a seed that no claim uses; what it found is in LOG.md.

Every trained part, the rival too, has three learning rates a factor of two apart; the one of the least mean Div on
training tasks is kept (a sampler's is the gated predictor's), so that held-out tasks choose no rate.  K and the gate's
threshold are read off one set of trained parts; the rival is as wide as the claim's K and threshold ask.  About
forty minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from commissure.experiments.metahmm_contenders import (
    DIM,
    STEPS,
    World,
    conditional,
    implicit,
    sampler,
    stack,
    world,
)
from commissure.experiments.metahmm_mixtures import Enumeration, Tabulated, cost, evaluate, gated
from commissure.experiments.metahmm_monte_carlo import rival_width
from commissure.metahmm.divergence import SequencePredictor

__all__ = ["GRIDS", "SAMPLES", "SEARCH_SEED", "THRESHOLDS", "Tried", "search"]

SEARCH_SEED = 100
_RATES = (4e-3, 8e-3, 16e-3)
GRIDS = {"implicit": _RATES, "conditional": _RATES, "sampler": _RATES, "rival": (1e-3, 2e-3, 4e-3)}
SAMPLES, THRESHOLDS = (32, 64, 128), (2.0, 3.0, 3.5)


class Tried(NamedTuple):
    """One setting: mean Div in nats by set and band, operations a token over the implicit predictor's."""

    part: str
    setting: str
    train_all: float
    train_amb: float
    held_out_all: float
    held_out_amb: float
    cost: float


def search(seed: int = SEARCH_SEED, steps: int = STEPS) -> Iterator[Tried]:
    """Every setting tried, in the order of the choices."""
    w = world(seed, steps)
    codes = w.codes(torch.arange(w.env.n_tasks), seed=0)
    bases = {lr: implicit(w, DIM, lr) for lr in GRIDS["implicit"]}
    rows = {lr: _tried(w, "implicit", f"{lr:g}", base) for lr, base in bases.items()}
    yield from rows.values()
    base = bases[_best(rows)]
    givens = {lr: conditional(w, lr) for lr in GRIDS["conditional"]}
    rows = {lr: _tried(w, "conditional", f"{lr:g}, all tasks", Enumeration(m, codes)) for lr, m in givens.items()}
    yield from rows.values()
    given = givens[_best(rows)]
    tables = {lr: Tabulated(sampler(w, given, lr)) for lr in GRIDS["sampler"]}
    rows = {lr: _tried(w, "sampler", f"{lr:g}, gated", gated(w, base, given, table)) for lr, table in tables.items()}
    yield from rows.values()
    table = tables[_best(rows)]
    for n in SAMPLES:
        for high in THRESHOLDS:
            yield _tried(w, "gated", f"K = {n}, H < {high:g}", gated(w, base, given, table, n=n, high=high))
    width = rival_width(w, rows[_best(rows)].cost * cost(base))
    for lr in GRIDS["rival"]:
        yield _tried(w, "rival", f"{lr:g}, width {width}", implicit(w, width, lr))


def _tried(w: World, part: str, setting: str, predictor: SequencePredictor) -> Tried:
    found = evaluate(w, "x", predictor)
    return Tried(
        part,
        setting,
        train_all=found["x train all"],
        train_amb=found["x train amb"],
        held_out_all=found["x held_out all"],
        held_out_amb=found["x held_out amb"],
        cost=found["x cost"] / cost(stack(w, DIM)),
    )


def _best(rows: dict[float, Tried]) -> float:
    return min(rows, key=lambda lr: rows[lr].train_all)
