"""The claims that train models: shrunken they give every row, and their verdict follows what was found."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from commissure.experiments import mesa_lds, mesa_mqar
from commissure.experiments.claims import CLAIMS, Context, Outcome
from commissure.mesa.tasks import MQAR, LinearSystem


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tasks, two steps, evaluations of eight sequences."""
    for module in (mesa_mqar, mesa_lds):
        config = module.FitConfig
        monkeypatch.setattr(module, "_SIZES", {"smoke": (1, 2), "quick": (3, 2)})
        monkeypatch.setattr(
            module, "FitConfig", lambda config=config, **given: config(**{**given, "batch_size": 2, "test_size": 8})
        )
    monkeypatch.setattr(mesa_mqar, "TASKS", {16: MQAR(n_pairs=2, length=12, vocab=16), 24: MQAR(n_pairs=3, length=12)})
    monkeypatch.setattr(mesa_lds, "TASK", LinearSystem(length=20))


def run(module: ModuleType, budget: str) -> Outcome:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome: Outcome = module.run(Context(budget, claim))  # type: ignore[arg-type]
    assert {bound.key for bound in claim.gate} <= {row.key for row in outcome.rows}
    return outcome


@pytest.mark.parametrize("module", [mesa_mqar, mesa_lds], ids=["mqar", "lds"])
def test_a_small_run_shows_every_row_and_claims_nothing(module: ModuleType, small: None) -> None:
    outcome = run(module, "smoke")
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 1)
    assert all(np.isfinite(row.value) for row in outcome.rows)
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert len(outcome.figure) < 200_000


def verdicts(module: ModuleType, found: dict, *, broken: dict) -> tuple[str, str]:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    good, bad = (claim.judge(module._rows(values), 5) for values in (found, {**found, **broken}))
    return good, bad


def test_mqar_misses_where_a_rival_is_as_good() -> None:
    seeds = np.array([0.0, 0.001, 0.002, 0.001, 0.0])
    found = {(name, n): (0.99 if name == "Mesa" else 0.5) + seeds for name in mesa_mqar.MIXERS for n in mesa_mqar.TASKS}
    for name in ("Gated DeltaNet", "gated linear attention"):
        for n in mesa_mqar.TASKS:
            assert verdicts(mesa_mqar, found, broken={(name, n): 0.985 + seeds}) == ("PASS", "MISS")
    assert verdicts(mesa_mqar, found, broken={("Mesa", 16): 0.9 + seeds}) == ("PASS", "MISS")
    assert verdicts(mesa_mqar, found, broken={("attention", 16): 1 + 0 * seeds}) == ("PASS", "PASS"), "context only"


def test_lds_misses_where_a_rival_is_as_good() -> None:
    noise = 1 + 0.001 * np.arange(5)[:, None] * np.ones(64)
    levels = {name: 0.01 if name == "Mesa" else 0.2 for name in [*mesa_lds.LAYERS, "ridge"]}
    found = {name: level * noise for name, level in levels.items()}
    for name in ("Gated DeltaNet", "gated linear attention"):
        assert verdicts(mesa_lds, found, broken={name: 0.0105 * noise}) == ("PASS", "MISS")
    late = found["gated linear attention"].copy()
    late[:, -mesa_lds.LATE :] = 0.03
    assert verdicts(mesa_lds, found, broken={"gated linear attention": late}) == ("PASS", "MISS")
    assert verdicts(mesa_lds, found, broken={"ridge": 0.001 * noise}) == ("PASS", "PASS"), "context only"
