"""Task samplers: densities that integrate to one, draws that follow them, posteriors that can be learned."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import isolated
from commissure.metahmm.fit import FitConfig, fit
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.samplers import Coupling, FactorPosterior, LatentFlow, OraclePosterior, TablePosterior
from commissure.nn import Stack

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

ENV = dense.small_environment()
TOKENS = dense.sequences(ENV, 3, 6)
POSITIONS = torch.arange(7)


def encoder() -> Stack:
    with isolated(0, "encoder"):
        return Stack(["gru"], 8, vocab=ENV.n_obs).double()


def factor_posterior() -> FactorPosterior:
    with isolated(0, "heads"):
        return FactorPosterior(encoder(), (3, 2, 2)).double()


def flow(code_dim: int = 2) -> LatentFlow:
    """Its couplings and its scale away from the identity they start from."""
    with isolated(0, "flow"):
        model = LatentFlow(encoder(), code_dim, layers=3, components=3, width=8).double()
        for parameter in model.couplings.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    model.set_scale(torch.randn(50, code_dim, dtype=torch.float64) * 1.7 + 0.3)
    return model.requires_grad_(False)


def test_the_factor_posterior_is_normalized_at_every_position() -> None:
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))
    log_q = factor_posterior().propose(TOKENS).log_prob(POSITIONS, every.expand(3, 7, -1, -1))
    torch.testing.assert_close(log_q.exp().sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert float(log_q.std(-1).min().detach()) > 0


def test_factor_samples_follow_their_log_prob() -> None:
    proposal = factor_posterior().propose(TOKENS)
    codes = proposal.sample(POSITIONS, 20_000, seed=0)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(2))
    expected = proposal.log_prob(POSITIONS, every.expand(3, 7, -1, -1)).exp().detach()
    number = (codes * torch.tensor([4, 2, 1])).sum(-1)
    counts = torch.nn.functional.one_hot(number, 12).double().mean(2)
    z = (counts - expected) / (expected * (1 - expected) / 20_000).sqrt()
    assert float(z.abs().max()) < 4.5, "252 frequencies"
    assert float(z.square().mean()) < 1.3


def test_the_factor_posterior_is_causal_and_one_pass() -> None:
    model = factor_posterior()
    changed = TOKENS.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % ENV.n_obs
    codes = torch.zeros(3, 7, 1, 3, dtype=torch.int64)
    first, second = (model.propose(x).log_prob(POSITIONS, codes).detach() for x in (TOKENS, changed))
    torch.testing.assert_close(first[:, :4], second[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(first[:, 4:], second[:, 4:])


def test_a_factor_sees_those_before_it() -> None:
    """The same marginals cannot say that two factors are equal; the chain can, and training finds it."""
    with isolated(0, "chain"):
        model = FactorPosterior(Stack(["gru"], 8, vocab=2), (2, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    tokens = torch.zeros(64, 0, dtype=torch.int64)
    twins = torch.arange(64)[:, None].expand(-1, 2) % 2
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(tokens, twins).backward()
        optimizer.step()
    assert float(model.loss(tokens, twins).detach()) == pytest.approx(math.log(2), abs=0.02)
    codes = model.propose(tokens[:1]).sample(torch.tensor([0]), 200, seed=0)[0, 0]
    assert float((codes[:, 0] == codes[:, 1]).double().mean()) > 0.95
    assert 60 < int(codes[:, 0].sum()) < 140


@pytest.mark.parametrize("make", [factor_posterior, flow], ids=["factors", "flow"])
def test_draws_are_the_seeds_and_do_not_depend_on_other_positions(make: Any) -> None:
    proposal = make().propose(TOKENS)
    whole = proposal.sample(POSITIONS, 5, seed=1)
    assert torch.equal(whole, proposal.sample(POSITIONS, 5, seed=1))
    torch.testing.assert_close(whole[:, 3:5], proposal.sample(torch.tensor([3, 4]), 5, seed=1), rtol=1e-12, atol=1e-12)
    assert not torch.equal(whole, proposal.sample(POSITIONS, 5, seed=2))
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_the_flow_density_integrates_to_one() -> None:
    """On a grid fine enough for its scales; at two different contexts."""
    model = flow()
    h = model.context(TOKENS)[0, [0, 6]]
    side = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for context in h:
        density = model.log_density(grid, context.expand(len(grid), -1)).exp()
        assert float(density.sum() * (side[1] - side[0]) ** 2) == pytest.approx(1, abs=1e-3)


def test_flow_samples_follow_their_density() -> None:
    """E_q[f(c)] by samples and by the grid, for f = coordinates, squares, product."""
    model = flow()
    proposal = model.propose(TOKENS)
    drawn = proposal.sample(torch.tensor([6]), 40_000, seed=0)[0, 0]
    side = torch.linspace(-30, 30, 1201, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    h = model.context(TOKENS)[0, 6]
    mass = model.log_density(grid, h.expand(len(grid), -1)).exp() * (side[1] - side[0]) ** 2
    for f in (lambda c: c[:, 0], lambda c: c[:, 1], lambda c: c[:, 0] ** 2, lambda c: c[:, 0] * c[:, 1]):
        values = f(drawn)
        assert abs(float(values.mean() - (f(grid) * mass).sum())) < 4 * float(values.std()) / 200


def test_the_flow_prior_is_its_density_before_the_first_token() -> None:
    proposal = flow(3).propose(TOKENS)
    codes = proposal.sample(POSITIONS, 4, seed=0)
    at_start = torch.stack([proposal.log_prob(torch.tensor([0]), codes[:, p, None])[:, 0] for p in range(7)], 1)
    torch.testing.assert_close(proposal.log_prior(codes), at_start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_odd", [False, True])
@pytest.mark.parametrize("code_dim", [2, 5])
def test_couplings_invert_and_know_their_determinant(code_dim: int, is_odd: bool) -> None:
    with isolated(0, "coupling"):
        layer = Coupling(code_dim, 3, 8, is_odd=is_odd).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        c, h = torch.randn(code_dim, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    z, log_det = layer(c, h)
    torch.testing.assert_close(layer.inverse(z, h), c, rtol=0, atol=1e-12)
    jacobian: Any = torch.autograd.functional.jacobian(lambda x: layer(x, h)[0], c)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian)[1], rtol=0, atol=1e-12)


def test_the_frozen_model_is_a_copy() -> None:
    """What the caller passed can be trained on, keeps its mode, and leaves the flow as it is."""
    lm = encoder().train()
    with isolated(0, "flow"):
        model = LatentFlow(lm, 4, width=8).double()
    before = model.context(TOKENS)
    assert lm.training
    assert all(p.requires_grad for p in lm.parameters())
    assert not any(p.requires_grad for p in model.lm.parameters())
    assert model.train().base.training
    assert not model.lm.training, "dropout is off in what is frozen"
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(1)
    assert torch.equal(model.context(TOKENS), before)


def test_the_frozen_model_stays_frozen() -> None:
    with isolated(0, "flow"):
        model = LatentFlow(Stack(["gru"], 8, vocab=ENV.n_obs), 4, width=8)
    before = {name: t.clone() for name, t in model.lm.state_dict().items()}

    class Codes:
        key = "test"

        def __call__(self, task_ids: Tensor, *, seed: int) -> Tensor:
            return task_ids[:, None] * torch.tensor([1.0, 2.0, 0.0, -1.0]) + 3

    start = model.base[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    fit(model, ENV, codes=Codes(), config=FitConfig(steps=3, batch_size=4, length=5))
    for name, tensor in model.lm.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(start, model.base[0].weight)  # type: ignore[arg-type]
    assert float(model.mean[0]) == pytest.approx(10.5, abs=1)
    assert float(model.scale[2]) == 1, "a constant entry keeps its scale"


def test_tables_of_named_tasks() -> None:
    log_probs = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    codes = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 0]])
    table = TablePosterior(log_probs, codes=codes)
    drawn = table.sample(torch.arange(3), 1000, seed=0)
    looked_up = table.log_prob(torch.arange(3), drawn)
    for k, code in enumerate(codes):
        is_code = (drawn == code).all(-1)
        torch.testing.assert_close(looked_up[is_code], log_probs[..., k, None].expand(-1, -1, 1000)[is_code])
        assert bool(((is_code.double().mean(-1) - log_probs[..., k].exp()).abs() < 0.06).all())
    for wrong in ([2, 1], [3, 0], [-1, 0]):
        with pytest.raises(InputError, match="codes"):
            table.log_prior(torch.tensor(wrong).expand(2, 3, 1, 2))


def test_impossible_tasks_are_never_drawn() -> None:
    log_probs = torch.tensor([-math.inf, math.log(0.5), math.log(0.5), -math.inf], dtype=torch.float64)
    drawn = TablePosterior(log_probs.expand(1, 1, 4)).sample(torch.tensor([0]), 100_000, seed=0)
    assert sorted(drawn.unique().tolist()) == [1, 2]


def test_the_oracle_s_posterior_is_the_dense_one() -> None:
    oracle = BayesOracle(ENV)
    proposal = OraclePosterior(oracle).propose(TOKENS)
    expected = dense.DenseOracle(ENV)(TOKENS).log_posterior
    codes = torch.arange(16)[:, None].expand(3, 7, -1, -1)
    torch.testing.assert_close(proposal.log_prob(POSITIONS, codes), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(proposal.log_prior(codes), expected[:, :1].expand(-1, 7, -1), rtol=0, atol=1e-12)
    named = OraclePosterior(oracle, codes=ENV.task_to_factors(torch.arange(16))).propose(TOKENS)
    factors = named.sample(POSITIONS, 3, seed=0)
    ids = proposal.sample(POSITIONS, 3, seed=0)[..., 0]
    assert torch.equal(ENV.factors_to_task(factors.flatten(0, 2)), ids.flatten())


def proposals() -> dict[str, tuple[Any, Tensor]]:
    """With codes that each can give the density of."""
    return {
        "factors": (factor_posterior().propose(TOKENS), torch.zeros(3, 7, 1, 3, dtype=torch.int64)),
        "flow": (flow().propose(TOKENS), torch.zeros(3, 7, 1, 2, dtype=torch.float64)),
        "oracle": (OraclePosterior(BayesOracle(ENV)).propose(TOKENS), (torch.arange(21) % 16).view(3, 7, 1, 1)),
    }


@pytest.mark.parametrize("name", ["factors", "flow", "oracle"])
def test_proposals_check_what_they_are_asked(name: str) -> None:
    proposal, codes = proposals()[name]
    assert proposal.log_prob(POSITIONS.int(), codes).shape == proposal.log_prior(codes).shape == (3, 7, 1)
    for positions in ([0], torch.tensor([-1]), torch.tensor([7]), torch.tensor([0.0]), torch.tensor([[0]])):
        with pytest.raises(InputError, match="positions"):
            proposal.sample(positions, 2, seed=0)
        with pytest.raises(InputError, match="positions"):
            proposal.log_prob(positions, codes[:, :1])
    for n in (0, 2.0, True, None):
        with pytest.raises(InputError, match="n = "):
            proposal.sample(POSITIONS, n, seed=0)
    outside = codes + math.inf if codes.is_floating_point() else codes + 16
    for wrong in (codes.tolist(), codes.numpy(), codes > 0, codes[0], codes[:2], codes[..., :0], outside, None):
        with pytest.raises(InputError, match="codes"):
            proposal.log_prob(POSITIONS, wrong)
        with pytest.raises(InputError, match="codes"):
            proposal.log_prior(wrong)
    with pytest.raises(InputError, match="codes"):
        proposal.log_prob(POSITIONS, codes[:, :2])


def test_refusals() -> None:
    for wrong in (1, 2.0, True, "3", None):
        with pytest.raises(InputError, match="code_dim"):
            LatentFlow(encoder(), wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="factor_sizes"):
            FactorPosterior(encoder(), (wrong, 0))  # type: ignore[arg-type]
    for name in ("layers", "components", "width"):
        with pytest.raises(InputError, match=name):
            LatentFlow(encoder(), 4, **{name: 0})
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    for codes in (zeros, zeros[:1, :2], zeros[:, :2] * math.nan, zeros[:, :2].tolist(), zeros[:, :2].long()):
        with pytest.raises(InputError, match="codes"):
            flow().set_scale(codes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="codes"):
        flow().loss(TOKENS, zeros[:2, :2])
    with pytest.raises(InputError, match="factors"):
        factor_posterior().loss(TOKENS, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(InputError, match="oracle"):
        OraclePosterior(encoder())  # type: ignore[arg-type]
    table = torch.zeros(2, 3, 4)
    for log_probs in (table.tolist(), table[0], table.long(), table * math.nan, table - math.inf, table[..., :0]):
        with pytest.raises(InputError, match="log_probs"):
            TablePosterior(log_probs)  # type: ignore[arg-type]
    for codes in (torch.zeros(4, 1, dtype=torch.int64), torch.arange(3)[:, None], torch.arange(4), torch.rand(4, 1)):
        with pytest.raises(InputError, match="codes"):
            TablePosterior(table, codes=codes)
    with pytest.raises(InputError, match="log_prior"):
        TablePosterior(table, log_prior=table[0, 0, :3])


def test_the_oracle_s_own_prior_goes_with_its_posterior() -> None:
    prior = torch.linspace(1, 8, 16, dtype=torch.float64) / torch.linspace(1, 8, 16, dtype=torch.float64).sum()
    proposal = OraclePosterior(BayesOracle(ENV, prior=prior)).propose(TOKENS)
    codes = torch.arange(16)[:, None].expand(3, 7, -1, -1)
    torch.testing.assert_close(proposal.log_prior(codes).exp(), prior.expand(3, 7, -1), rtol=1e-12, atol=0)
