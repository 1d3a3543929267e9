"""Claims about MetaHMM: shrunken they show every row, and a broken part misses their gates."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commissure.experiments import (
    metahmm_bump,
    metahmm_contenders,
    metahmm_floor,
    metahmm_mixtures,
    metahmm_monte_carlo,
    metahmm_oracle,
    metahmm_peer,
    metahmm_search,
)
from commissure.experiments.claims import CLAIMS, Context, Outcome
from commissure.metahmm import MetaHMM
from commissure.metahmm.fit import FitConfig
from commissure.metahmm.oracle import BayesOracle
from commissure.native import backend

needs_kernels = pytest.mark.skipif(backend() != "c++", reason="times a kernel that was not built")


def run(module: ModuleType, budget: str = "smoke") -> Outcome:
    (claim,) = (claim for claim in CLAIMS if claim.module == module.__name__)
    outcome: Outcome = module.run(Context(budget, claim))  # type: ignore[arg-type]
    assert {bound.key for bound in claim.gate} <= {row.key for row in outcome.rows}
    return outcome


def values(outcome: Outcome) -> dict[str, float]:
    return {row.key: row.value for row in outcome.rows}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few sequences of a few tokens of environments that are soon filtered."""
    monkeypatch.setattr(metahmm_oracle, "PRESET", "e64")
    monkeypatch.setattr(metahmm_oracle, "LENGTH", 20)
    monkeypatch.setattr(metahmm_oracle, "_TRUTHS", tuple((n, "tiny", 4, f) for n, _, _, f in metahmm_oracle._TRUTHS))
    monkeypatch.setattr(metahmm_peer, "N_TASKS", (8, 128))
    for module in (metahmm_bump, metahmm_contenders):
        monkeypatch.setattr(module, "SEQUENCES", 6)
    monkeypatch.setattr(metahmm_bump, "_SIZES", {"smoke": (1, 2)})
    monkeypatch.setattr(metahmm_monte_carlo, "_SIZES", {"smoke": (1, 4)})
    monkeypatch.setattr(metahmm_mixtures, "N_SAMPLES", 5)
    monkeypatch.setattr(metahmm_mixtures, "FEW", 3)
    monkeypatch.setattr(metahmm_floor, "_SIZES", {"smoke": (1, 3)})
    monkeypatch.setattr(metahmm_floor, "LARGE", (2, 4, 8))
    monkeypatch.setattr(metahmm_floor, "BIAS_REPEATS", 10)


@pytest.mark.parametrize(
    "module", [metahmm_bump, metahmm_floor, metahmm_monte_carlo], ids=["bump", "floor", "monte_carlo"]
)
def test_a_small_run_shows_every_row_and_claims_nothing(module: ModuleType, small: None) -> None:
    outcome = run(module)
    assert (outcome.verdict, outcome.n_seeds) == ("NOT CLAIMED", 1)
    unseen = [row.key for row in outcome.rows if not np.isfinite(row.value)]
    assert all("entropy" in key for key in unseen), "few sequences may leave a bin of entropy empty"
    assert outcome.figure is not None
    assert outcome.figure.startswith("<svg")
    assert len(outcome.figure) < 200_000
    if module is metahmm_monte_carlo:
        found = values(outcome)
        assert 1.0 <= found["rival_cost"] / found["gated_cost"] < 1.3
        assert found["enumeration_cost"] == pytest.approx(64 / 4, rel=0.1), "half as wide"


@needs_kernels
def test_the_oracle_shows_every_row(small: None) -> None:
    outcome = run(metahmm_oracle)
    found = values(outcome)
    assert outcome.verdict == "NOT CLAIMED"
    assert all(np.isfinite(value) for value in found.values())
    assert max(found["brute_f64"], found["dense_f64"], found["chain_rule"]) < 1e-12
    assert 1e-9 < max(found["brute_f32"], found["dense_f32"]) < 1e-6, "float32 it was"
    assert outcome.figure is not None


@needs_kernels
def test_a_wrong_oracle_misses(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flattened(BayesOracle):
        def __call__(self, tokens: Tensor, lengths: Tensor | None = None) -> Any:
            told = super().__call__(tokens, lengths)
            return told._replace(log_probs=(told.log_probs * 0.999).log_softmax(-1))

    monkeypatch.setattr(metahmm_oracle, "BayesOracle", Flattened)
    found = values(run(metahmm_oracle))
    assert min(found["brute_f64"], found["dense_f32"], found["chain_rule"]) > 1e-5


def test_the_oracle_needs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metahmm_oracle, "backend", lambda: "python")
    assert metahmm_oracle.run(Context("smoke", CLAIMS[0])).verdict == "NOT RUN"


def test_the_peer_computes_likelihoods() -> None:
    env = MetaHMM.from_preset("tiny", seed=0)
    tokens, ids = env.sample([3], 9, seed=0).tokens, torch.arange(env.n_tasks)
    found = metahmm_peer.filter_tasks(env.initial, env.transition_matrix(ids), env.emission_matrix(ids), tokens[0])
    want = BayesOracle(env)(tokens).log_evidence[0, -1]
    torch.testing.assert_close(found.logsumexp(0) - np.log(env.n_tasks), want, rtol=0, atol=1e-12)


def test_the_floor_of_e64_is_the_closed_form_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metahmm_floor, "LARGE", (800,))
    falls, closed_form, bias_z = metahmm_floor._e64(0, 60)
    assert 0.75 < falls[800] * 800 / closed_form < 1.25
    assert 0.8 < bias_z < 1.2
    right = metahmm_floor.MonteCarloPredictor

    class OfLogits(right):  # type: ignore[misc, valid-type]
        """The wrong average: samples one by one, their logits averaged."""

        def log_probs(self, tokens: Tensor) -> Tensor:
            each = [
                right(self.conditional, self.sampler, n_samples=1, seed=k).log_probs(tokens)
                for k in range(self.n_samples)
            ]
            return torch.stack(each).mean(0).log_softmax(-1)

    monkeypatch.setattr(metahmm_floor, "MonteCarloPredictor", OfLogits)
    monkeypatch.setattr(metahmm_floor, "LARGE", (2,))
    assert metahmm_floor._e64(0, 60)[2] > 1.5


def test_bump_misses_without_a_peak_of_its_own() -> None:
    (claim,) = (claim for claim in CLAIMS if claim.id == "metahmm.bump")
    times = np.arange(33)

    def seeds(*peaks: int, end: float = 0.5) -> dict[str, list[metahmm_bump.Measured]]:
        curves = [np.interp(times, (0, peak, 32), (0, 1, end)) for peak in peaks]
        rising = [np.linspace(0, 1, 33)] * len(peaks)  # what has no gate does not decide
        return {"train": made(curves), "held_out": made(rising)}

    def made(curves: list[np.ndarray]) -> list[metahmm_bump.Measured]:
        return [metahmm_bump.Measured(c, c, np.ones(len(metahmm_bump.ENTROPY_EDGES) - 1), 2.0, 1.0) for c in curves]

    for found, verdict in (
        (seeds(6, 12, 19), "PASS"),
        (seeds(6, 12, 21), "MISS"),
        (seeds(4, 12, 19), "MISS"),
        (seeds(6, 12, 19, end=0.9), "MISS"),
    ):
        assert claim.judge(metahmm_bump._rows(found), 3) == verdict


def test_bump_was_searched_at_its_length_on_seeds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(mixer: str, config: FitConfig, *, seed: int) -> dict[str, metahmm_bump.Measured]:
        assert seed >= metahmm_bump._SIZES["full"][0]
        curves = {"train": np.array([0.0, 2 * config.lr]), "held_out": np.array([1.0, 3.0])}
        return {name: metahmm_bump.Measured(c, c, c, 0.0, 0.0) for name, c in curves.items()}

    monkeypatch.setattr(metahmm_bump, "measure", fake)
    searched = list(metahmm_bump.search())
    assert all((tried.train, tried.held_out) == (tried.config.lr, 2.0) for tried in searched)
    assert (metahmm_bump.MIXER, metahmm_bump.CONFIG) in [(tried.mixer, tried.config) for tried in searched]


def test_monte_carlo_misses_where_the_rival_is_as_good() -> None:
    (claim,) = (claim for claim in CLAIMS if claim.id == "metahmm.monte_carlo")
    sets, bands, names = metahmm_monte_carlo.SETS, metahmm_monte_carlo.BANDS, metahmm_monte_carlo.SHOWN

    def seeds(**changed: float) -> list[dict[str, float]]:
        found = {f"{n} {s} {b}": 1.0 + (n == "rival") for n in names for s in sets for b in bands}
        costs = {f"{name} cost": 1.0 for name in names}
        return [{k: v * (1 + 0.001 * i) for k, v in {**found, **costs, **changed}.items()} for i in range(3)]

    assert claim.judge(metahmm_monte_carlo._rows(seeds()), 3) == "PASS"
    for which in sets:
        for band in ("all", "amb"):
            worse = seeds(**{f"rival {which} {band}": 0.99})
            assert claim.judge(metahmm_monte_carlo._rows(worse), 3) == "MISS"


def test_the_table_holds_the_sampler_s_own_proposals() -> None:
    w = metahmm_contenders.world(0, 1)
    model = metahmm_contenders.sampler(w, metahmm_contenders.conditional(w, 1e-2), 1e-2)
    tokens, positions = w.tokens["train"][:2, :5], torch.arange(6)
    codes = w.codes(torch.arange(64), seed=0).expand(2, 6, -1, -1)
    table = metahmm_mixtures.Tabulated(model)
    with torch.no_grad():
        expected = model.propose(tokens).log_prob(positions, codes)
    found = table.propose(tokens).log_prob(positions, codes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert float(expected.std()) > 0.01
    steps = 1 + 4 + 4 * 2 + 4 * 2 * 2 + 4 * 2 * 2 * 2
    assert table.flops_per_token(33) - metahmm_mixtures.cost(model.lm) == pytest.approx(
        2 * 32 * (32 * steps + 4 + 2 * (steps - 1))
    )


def test_generated_sequences_follow_the_conditional_predictor() -> None:
    w = metahmm_contenders.world(0, 1)
    given = metahmm_contenders.conditional(w, 1e-2)
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.mul_(3)  # far from uniform, and told apart by the codes
        tokens, codes = metahmm_contenders.generated(w, given, 2000, 7)
        log_probs = given.log_probs(tokens, codes[:, None])[:, 0, :-1]
    surprise = -log_probs.gather(-1, tokens[..., None])[..., 0]
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    z = (surprise - entropy).mean(0) / (surprise - entropy).std(0) * len(tokens) ** 0.5
    assert float(z.abs().max()) < 5
    assert float(entropy.mean()) < 0.9 * np.log(10)
    assert len(codes.unique(dim=0)) == 64


def test_the_search_gives_every_part_as_many_rates(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    grids = metahmm_search.GRIDS
    assert {part: len(rates) for part, rates in grids.items()} == dict.fromkeys(metahmm_contenders.CHOSEN, 3)
    assert all(metahmm_contenders.CHOSEN[part] in rates for part, rates in grids.items())
    monkeypatch.setattr(metahmm_search, "GRIDS", {part: rates[:2] for part, rates in grids.items()})
    monkeypatch.setattr(metahmm_search, "SAMPLES", (3,))
    rows = list(metahmm_search.search(100, 1))
    assert [row.part for row in rows] == [p for p in grids if p != "rival" for _ in "12"] + ["gated"] * 3 + [
        "rival"
    ] * 2
    assert all(np.isfinite(row[2:]).all() for row in rows)
    assert rows[-1].cost >= rows[4].cost, "the rival costs at least what it is compared with"


def test_the_rival_is_the_narrowest_that_costs_as_much() -> None:
    w = metahmm_contenders.world(0, 1)
    operations = 3.3 * metahmm_mixtures.cost(metahmm_contenders.stack(w, 64))
    width = metahmm_monte_carlo.rival_width(w, operations)
    costs = [metahmm_mixtures.cost(metahmm_contenders.stack(w, d)) for d in (width - 4, width)]
    assert costs[0] < operations <= costs[1]


def test_enumeration_is_the_mixture_over_all_tasks() -> None:
    w = metahmm_contenders.world(0, 2)
    given = metahmm_contenders.conditional(w, 1e-2)
    codes, tokens = w.codes(torch.arange(64), seed=0), w.tokens["train"][:2, :3]
    found = metahmm_mixtures.Enumeration(given, codes).log_probs(tokens).exp()
    with torch.no_grad():
        each = given.log_probs(tokens, codes.expand(2, -1, -1)).exp().double()
    for row in range(2):
        joint = torch.ones(64, dtype=torch.float64)
        for t in range(4):
            torch.testing.assert_close(
                found[row, t].double(), joint @ each[row, :, t] / joint.sum(), rtol=1e-4, atol=1e-6
            )
            if t < 3:
                joint = joint * each[row, :, t, tokens[row, t]]
