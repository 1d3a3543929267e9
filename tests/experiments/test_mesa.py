"""Claims about the Mesa layer: what they measure is what they say, and a broken layer misses their gates."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commissure.core.lsq import ridge
from commissure.experiments import mesa_compute_curve, mesa_in_context, mesa_recall, mesa_speed
from commissure.experiments.claims import CLAIMS, Context, Outcome
from commissure.experiments.mesa_in_context import errors, regression
from commissure.experiments.mesa_recall import Pairs, accuracy, answers, draw, tuned
from commissure.mesa.bench import CONTENDERS, OURS
from commissure.native import backend
from commissure.report.results import Budget

needs_kernels = pytest.mark.skipif(backend() == "python", reason="built without the C++ kernels")


def run(module: ModuleType, budget: Budget = "smoke") -> Outcome:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome: Outcome = module.run(Context(budget, claim))
    keys = {row.key for row in outcome.rows}
    assert not outcome.rows or {bound.key for bound in claim.gate} <= keys
    return outcome


def values(outcome: Outcome) -> dict[str, float]:
    return {row.key: row.value for row in outcome.rows}


@pytest.mark.parametrize("module", [mesa_in_context, mesa_recall, mesa_compute_curve], ids=lambda m: m.__name__[23:])
def test_one_seed_claims_nothing_but_shows_everything(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_recall, "COUNTS", (32, 64))
    outcome = run(module)
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 1)
    assert all(np.isfinite(row.value) for row in outcome.rows)
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert values(run(module)) == values(outcome), "the same every time"


@pytest.mark.parametrize("kind", mesa_in_context.KINDS)
def test_the_regression_is_the_one_described(kind: str) -> None:
    task = regression(0, kind=kind, dim=8, time=4000, sequences=2)
    torch.testing.assert_close(task.k.norm(dim=-1), torch.ones(2, 4000, 1, dtype=torch.float64))
    for b in range(2):
        fit = torch.linalg.lstsq(task.k[b, :, 0], task.v[b, :, 0]).solution
        noise = task.v[b, :, 0] - task.k[b, :, 0] @ fit
        assert noise.std() == pytest.approx(0.05, rel=0.05)
        torch.testing.assert_close(task.q[b, :, 0] @ fit, task.targets[b, :, 0], rtol=0, atol=0.1)
        ascending, axes = torch.linalg.eigh(task.k[b, :, 0].T @ task.k[b, :, 0] / 4000)
        spectrum = ascending.flip(0)
        assert spectrum.sum() == pytest.approx(1.0)
        if kind == "isotropic":
            assert spectrum[0] < 1.3 * spectrum[-1]
        else:  # standard deviation 1/i, flattened a little by the normalization
            assert 10 < spectrum[0] / spectrum[-1] < 64
            assert axes[:, -1].abs().max() < 0.95, "along no coordinate"
    assert not torch.equal(task.q, task.k)
    assert not torch.equal(task.k, regression(1, kind=kind, dim=8, time=4000, sequences=2).k)


def test_errors_are_relative_to_the_targets() -> None:
    task = regression(0, kind="isotropic", dim=4, time=5, sequences=3)
    assert errors(task.targets, task).tolist() == [0.0] * 5
    np.testing.assert_allclose(errors(0.9 * task.targets, task), 0.01)


def test_the_rivals_in_context_are_what_they_are_called() -> None:
    """DeltaNet: one gradient step a token.  Linear attention: a sum, with the gain that is best on the targets."""
    task = regression(0, kind="isotropic", dim=6, time=20, sequences=3)
    curves = mesa_in_context._curves(task, 0.5)
    memory, total = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    stepped, summed = [], []
    for t in range(20):
        q, k, v = (x[:, t, 0] for x in task[:3])
        memory = memory + 0.5 * torch.einsum("bi,bj->bij", v - torch.einsum("bij,bj->bi", memory, k), k)
        total = total + torch.einsum("bi,bj->bij", v, k)
        stepped.append(torch.einsum("bij,bj->bi", memory, q))
        summed.append(torch.einsum("bij,bj->bi", total, q))
    np.testing.assert_allclose(curves["DeltaNet"], errors(torch.stack(stepped, 1).unsqueeze(2), task), rtol=1e-9)
    o = torch.stack(summed, 1).unsqueeze(2)
    tried = np.stack([errors(gain * o, task) for gain in np.linspace(-1, 1.5, 5001)])
    np.testing.assert_allclose(curves["gated linear attention"], tried.min(0), rtol=1e-4)
    assert (curves["gated linear attention"] <= tried.min(0) + 1e-12).all()


def test_mesa_recalls_as_ridge_does() -> None:
    pairs = draw(0, 40, 2)
    o = answers("Mesa", pairs, (1.0, 1.0))
    for b in range(2):
        fit = ridge(pairs.k[b], pairs.v[b], penalty=mesa_recall.PENALTY, intercept=False)
        np.testing.assert_allclose(o[b], fit.predict(pairs.k[b]), rtol=0, atol=1e-9)


def test_rivals_answer_after_all_writes() -> None:
    k, v = pairs = draw(0, 5, 3)
    gamma, beta = 0.9, 0.4
    memory = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    for t in range(5):
        memory = gamma * memory
        erased = v[:, t] - torch.einsum("bij,bi->bj", memory[0], k[:, t])
        for slot, written in enumerate((erased, v[:, t])):
            memory[slot] += beta * torch.einsum("bi,bj->bij", k[:, t], written)
    for name, state in zip(("Gated DeltaNet", "gated linear attention"), memory, strict=True):
        torch.testing.assert_close(answers(name, pairs, (gamma, beta)), k @ state, rtol=0, atol=1e-12)


def test_accuracy_counts_the_nearest_value() -> None:
    v = torch.eye(4, dtype=torch.float64)[None]
    o = v.clone()
    o[0, 3] = 2 * v[0, 1]
    assert accuracy(o, Pairs(v, v)) == 0.75
    assert accuracy(0.1 * v, Pairs(v, v)) == 1.0


def test_rivals_are_tuned_on_other_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tuned("DeltaNet", 64, 16)
    pairs = draw(3, 64, 16)
    best = accuracy(answers("DeltaNet", pairs, setting), pairs)
    assert best > 0.2 + accuracy(answers("DeltaNet", pairs, (1.0, 1.0)), pairs)
    seen: list[int] = []
    monkeypatch.setattr(mesa_recall, "draw", lambda seed, *args: (seen.append(seed), draw(seed, *args))[1])
    tuned("attention", 16, 2)
    assert seen
    assert not set(seen) & set(range(20))


def broken(module: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Let the module's Mesa layer answer otherwise."""
    right = module.mesa_attention

    def wrong(*args: Any, **options: Any) -> Any:
        made = right(*args, **options)
        return made._replace(output=change(made.output))

    monkeypatch.setattr(module, "mesa_attention", wrong)


@pytest.mark.parametrize("module", [mesa_in_context, mesa_recall], ids=lambda m: m.__name__[23:])
def test_enough_seeds_pass_and_a_broken_layer_misses(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    if module is mesa_in_context:
        monkeypatch.setattr(mesa_in_context, "SEQUENCES", 32)
    else:
        monkeypatch.setattr(mesa_recall, "_SIZES", {"quick": (5, 16)})
        monkeypatch.setattr(mesa_recall, "COUNTS", (32, 64))
    assert run(module, "quick").verdict == "PASS"
    broken(module, monkeypatch, lambda o: o.roll(1, -1))
    assert run(module, "quick").verdict == "MISS"


def test_the_compute_curve_passes_and_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_compute_curve, "_SIZES", {"quick": (5, 3)})
    passed = run(mesa_compute_curve, "quick")
    assert passed.verdict == "PASS"
    found = values(passed)
    assert all(found[f"excess_{k}_512"] > found[f"excess_{j}_512"] for k, j in ((1, 2), (2, 5), (5, 10), (10, 20)))
    right = mesa_compute_curve.solve

    def backwards(task: Any, **options: Any) -> Any:
        if options.get("max_cg_steps", 200) < 200:
            options["max_cg_steps"] = 31 - options["max_cg_steps"]
        return right(task, **options)

    monkeypatch.setattr(mesa_compute_curve, "solve", backwards)
    missed = run(mesa_compute_curve, "quick")
    assert missed.verdict == "MISS"
    assert values(missed)["largest_ratio"] > 1


@needs_kernels
def test_speed_shows_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_speed, "TIME", 128)
    monkeypatch.setattr(mesa_speed, "DECODE", ((1, 2, 8), (2, 2, 8)))
    monkeypatch.setattr(mesa_speed, "_SIZES", {"smoke": (1, 1), "full": (1, 1)})
    for budget in ("smoke", "full"):
        outcome = run(mesa_speed, budget)  # type: ignore[arg-type]
        assert outcome.verdict == "NOT CLAIMED"
        assert all(np.isfinite(row.value) and row.value > 0 for row in outcome.rows)
        assert values(outcome)["error"] < 1e-5
        assert outcome.figure is not None
    assert any(key.startswith("us_literal") for key in values(outcome))


@needs_kernels
def test_speed_misses_on_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_speed, "TIME", 128)
    monkeypatch.setattr(mesa_speed, "DECODE", ((1, 2, 8), (2, 2, 8)))
    monkeypatch.setattr(mesa_speed, "_SIZES", {"quick": (5, 1)})
    exact = CONTENDERS[OURS]
    monkeypatch.setitem(CONTENDERS, OURS, lambda x: 1.001 * exact(x))
    outcome = run(mesa_speed, "quick")
    assert outcome.verdict == "MISS"
    assert values(outcome)["error"] > 5e-4


def test_speed_needs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesa_speed, "mesa_kernel_available", lambda: False)
    assert run(mesa_speed).verdict == "NOT RUN"
