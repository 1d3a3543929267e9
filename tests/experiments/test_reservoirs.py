"""Claims about reservoirs: shrunken they show every row, and networks without a hierarchy miss their gates."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.experiments import (
    reservoirs_connectome,
    reservoirs_hierarchy,
    reservoirs_noise,
    reservoirs_scores,
    reservoirs_timescales,
)
from commissure.experiments.claims import CLAIMS, Context, Outcome
from commissure.reservoirs import BlockTree, Connectome, HierarchicalSBM
from commissure.reservoirs.tasks import MemoryCapacity

ALL = (reservoirs_hierarchy, reservoirs_noise, reservoirs_connectome, reservoirs_timescales)
TREE = BlockTree.balanced(leaf_size=12)


def run(module: ModuleType) -> Outcome:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome: Outcome = module.run(Context("smoke", claim))
    assert {bound.key for bound in claim.gate} <= {row.key for row in outcome.rows}
    return outcome


def block_model(level: int, *, prune: float) -> HierarchicalSBM:
    return HierarchicalSBM(TREE, level=level, prune=prune)


def connectome() -> Connectome:
    return HierarchicalSBM(TREE, directed=False).sample(seed=0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of 96 nodes and short series."""
    task = MemoryCapacity(max_delay=4, length=150, warmup=20)
    for module in (reservoirs_scores, reservoirs_timescales):
        monkeypatch.setattr(module, "TASK", task)
    for module in (reservoirs_hierarchy, reservoirs_noise, reservoirs_timescales):
        monkeypatch.setattr(module, "block_model", block_model)
    monkeypatch.setattr(reservoirs_connectome, "hcp_s400", connectome)
    louvain = partial(reservoirs_connectome.louvain_hierarchy, n_runs=2)
    monkeypatch.setattr(reservoirs_connectome, "louvain_hierarchy", louvain)
    monkeypatch.setattr(reservoirs_timescales, "meg_timescales", lambda: np.random.default_rng(0).random(TREE.n_nodes))
    for module in ALL:
        monkeypatch.setattr(module, "_SEEDS", {"smoke": 2})


@pytest.mark.parametrize("module", ALL, ids=lambda module: module.__name__.rpartition("_")[2])
def test_a_small_run_shows_every_row_and_claims_nothing(module: ModuleType, small: None) -> None:
    outcome = run(module)
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 2)
    assert all(np.isfinite(row.value) for row in outcome.rows)
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert len(outcome.figure) < 200_000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("module", [reservoirs_connectome, reservoirs_timescales])
def test_without_the_connectome_nothing_is_run(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Connectome:
        raise InputError("COMMISSURE_DATA", "nowhere", "an existing folder")

    monkeypatch.setattr(reservoirs_connectome, "hcp_s400", absent)
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome = module.run(Context("smoke", claim))
    assert outcome.verdict == "NOT RUN"
    assert "COMMISSURE_DATA" in outcome.note


def test_networks_without_a_hierarchy_miss_the_gates(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def random_model(level: int, *, prune: float) -> HierarchicalSBM:
        return block_model(0, prune=prune + level / 1000)  # another network at every level

    for module in (reservoirs_hierarchy, reservoirs_noise):
        monkeypatch.setattr(module, "block_model", random_model)
        monkeypatch.setattr(module, "_SEEDS", {"smoke": 12})
        assert run(module).verdict == "MISS"
