"""Monte Carlo predictors against enumeration: unbiased, 1/K, corrected, what they cost, and the gate."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError
from commissure.core.mixer import State
from commissure.core.rng import isolated, spawn
from commissure.metahmm import MetaHMM
from commissure.metahmm.backbones import flops_per_token
from commissure.metahmm.conditional import ExactConditional, FactorEmbedding, SoftPrefix
from commissure.metahmm.divergence import evaluate_divergence, pointwise_divergence
from commissure.metahmm.monte_carlo import EntropyGate, MonteCarloPredictor, Weighting
from commissure.metahmm.oracle import BayesOracle
from commissure.metahmm.particles import _Particles, _resample, mixture
from commissure.metahmm.samplers import FactorPosterior, LatentFlow, OraclePosterior, TablePosterior
from commissure.nn import Stack

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

ENV = dense.small_environment()
ORACLE = dense.DenseOracle(ENV)
EXACT = ExactConditional(ENV)
POSTERIOR = dense.DensePosterior(ORACLE)
TOKENS = dense.sequences(ENV, 8, 10)
N = ENV.n_tasks
WRONG = torch.linspace(1, 8, N, dtype=torch.float64) / torch.linspace(1, 8, N, dtype=torch.float64).sum()
WEIGHTINGS: list[Weighting] = ["plain", "importance", "smc"]


class Counting:
    """An exact conditional that remembers what it was asked to decode."""

    vocab = EXACT.vocab

    def __init__(self) -> None:
        self.decoded: list[tuple[tuple[int, ...], int]] = []

    def log_probs(self, tokens: Tensor, codes: Tensor) -> Tensor:
        return EXACT.log_probs(tokens, codes)

    def prefill(self, tokens: Tensor, codes: Tensor) -> tuple[Tensor, State]:
        self.decoded += [(tuple(row.tolist()), int(code)) for row, code in zip(tokens, codes[:, 0], strict=True)]
        return EXACT.prefill(tokens, codes)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, State]:
        return EXACT.step(tokens, state)


class Everything:
    """Proposes every task once."""

    def propose(self, tokens: Tensor) -> TablePosterior:
        class Listed(TablePosterior):
            def sample(self, positions: Tensor, n: int, *, seed: int) -> Tensor:
                return self.codes.expand(len(tokens), len(positions), -1, -1)

        return Listed(torch.full((len(tokens), tokens.shape[1] + 1, N), -math.log(N), dtype=torch.float64))


def predictor(n_samples: int, weighting: Weighting = "plain", sampler: Any = POSTERIOR, **options: Any) -> Any:
    return MonteCarloPredictor(EXACT, sampler, n_samples=n_samples, weighting=weighting, **options)


def mean_divergence(model: Any, tokens: Tensor = TOKENS) -> float:
    return float(pointwise_divergence(model, tokens, oracle=ORACLE).divergence.mean())


@pytest.mark.parametrize("n_samples", [1, 4])
def test_the_mean_over_repeats_is_the_oracle(n_samples: int) -> None:
    """10,000 repeats, each a row of one batch; every probability within 4 standard errors (63 of them)."""
    repeats = TOKENS[:1, :8].expand(10_000, -1)
    drawn = predictor(n_samples).log_probs(repeats).exp()
    truth = ORACLE.log_probs(TOKENS[:1, :8])[0].exp()
    error = drawn.std(0) / 100
    z = (drawn.mean(0) - truth) / error
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) < 2


def test_the_excess_divergence_is_c_over_k() -> None:
    """To first order K E KL[p* || p_K] = sum_x Var_posterior[p(x | theta)] / (2 p*(x))."""
    tokens = TOKENS[:4, :6]
    truth = ORACLE(tokens)
    every = torch.arange(N)[None, :, None].expand(4, -1, -1)
    each, p = EXACT.log_probs(tokens, every).exp(), truth.log_probs.exp()
    posterior = truth.log_posterior.exp().transpose(1, 2)[..., None]
    constant = ((posterior * (each - p[:, None]).square()).sum(1) / (2 * p)).sum(-1)
    for n_samples in (50, 200):
        drawn = predictor(n_samples).log_probs(tokens.repeat_interleave(300, 0)).view(4, 300, 7, -1)
        excess = (p[:, None] * (truth.log_probs[:, None] - drawn)).sum(-1).mean(1)
        torch.testing.assert_close(n_samples * excess.mean(1), constant.mean(1), rtol=0.1, atol=0)


def test_the_sampling_floor_on_the_paper_s_environment() -> None:
    """The prototype's table on `small`: exact posterior, exact conditionals, Div at t = 4, 7, 10, within 15 %."""
    env = MetaHMM.from_preset("small", seed=15)
    oracle, exact = BayesOracle(env), ExactConditional(env)
    tasks = torch.randint(env.n_tasks, (160,), generator=torch.Generator().manual_seed(0))
    contexts = env.sample(tasks, 10, seed=0).tokens
    floor = {1: 1.70, 2: 0.97, 5: 0.39, 10: 0.18, 20: 0.075, 50: 0.025}
    sums = dict.fromkeys(floor, 0.0)

    class Fixed:
        def __init__(self, tokens: Tensor) -> None:
            self.proposal = OraclePosterior(oracle).propose(tokens)

        def propose(self, tokens: Tensor) -> TablePosterior:
            return self.proposal

    for tokens in contexts.split(20):
        sampler = Fixed(tokens)
        for n_samples in floor:
            model = MonteCarloPredictor(exact, sampler, n_samples=n_samples)
            measured = pointwise_divergence(model, tokens, oracle=oracle).divergence
            sums[n_samples] += float(measured[:, [4, 7, 10]].sum())
    assert {k: total / (3 * 160) for k, total in sums.items()} == pytest.approx(floor, rel=0.15)


def test_one_sample_is_one_conditional() -> None:
    """What K = 1 gives is p(. | x, theta) of some task at every position: nothing else is mixed in."""
    drawn = predictor(1).log_probs(TOKENS)
    every = EXACT.log_probs(TOKENS, torch.arange(N)[None, :, None].expand(8, -1, -1))
    nearest = (drawn[:, None] - every).abs().amax(-1).amin(1)
    assert float(nearest.max()) < 1e-12


def test_enumeration_with_importance_weights_is_the_oracle() -> None:
    out = predictor(N, "importance", Everything())(TOKENS)
    torch.testing.assert_close(out.log_probs, ORACLE.log_probs(TOKENS), rtol=0, atol=1e-12)
    posterior = ORACLE(TOKENS).log_posterior.exp()
    torch.testing.assert_close(out.ess, 1 / posterior.square().sum(-1), rtol=1e-10, atol=0)
    uniform = EXACT.log_probs(TOKENS, torch.arange(N)[None, :, None].expand(8, -1, -1)).exp().mean(1)
    plain = predictor(N, "plain", Everything()).log_probs(TOKENS)
    torch.testing.assert_close(plain.exp(), uniform, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wrong", [WRONG, torch.full((N,), 1 / N, dtype=torch.float64)], ids=["skewed", "uniform"])
@pytest.mark.parametrize("weighting", ["importance", "smc"])
def test_a_wrong_sampler_is_corrected(weighting: Weighting, wrong: Tensor) -> None:
    """Oracle 12: divergence falls as 1/K to nothing; the plain average keeps q's bias at any K."""
    sampler = dense.DensePosterior(ORACLE, wrong)
    few, many = (mean_divergence(predictor(n, weighting, sampler)) for n in (50, 5000))
    plain_few, plain_many = (mean_divergence(predictor(n, "plain", sampler)) for n in (50, 5000))
    assert many < 1e-3
    assert few > 10 * many
    assert plain_many > 0.8 * plain_few > 0.1


def test_particles_are_rejuvenated() -> None:
    """q at position 0 almost never proposes the tasks that turn out to matter; later q does."""

    class Late:
        def propose(self, tokens: Tensor) -> TablePosterior:
            table = ORACLE(tokens).log_posterior.clone()
            best = table[:, -1].argmax(-1)
            table[:, 0] = 0.0
            table[:, 0].scatter_(1, best[:, None], -12.0)
            return TablePosterior(table.log_softmax(-1))

    assert mean_divergence(predictor(200, "smc", Late())) < 0.02
    assert mean_divergence(predictor(200, "importance", Late())) < 0.02


def test_particles_that_collapsed_move_once_the_sampler_knows_better() -> None:
    """Copies weigh the same ever after: an ESS that counted each of them would stay 10, and nothing would move.

    Up to position 10 q proposes one task that no token supports, so that resampling alone thins 10 particles out; from
    then on it is the posterior.
    """

    class Late:
        def propose(self, tokens: Tensor) -> TablePosterior:
            table = ORACLE(tokens).log_posterior.clone()
            table[:, 1:11] = -8.0 * (table[:, -1:] > table[:, -1:].amin(-1, keepdim=True))
            return TablePosterior(table.log_softmax(-1))

    tokens = dense.sequences(ENV, 100, 16, seed=1)
    out = predictor(10, "smc", Late())(tokens)
    measured = pointwise_divergence(predictor(10, "smc", Late()), tokens, oracle=ORACLE).divergence.mean(0)
    assert float(measured[12:].mean()) < 0.1 * float(measured[10])
    assert float(out.ess[:, 6:11].mean()) < 3, "copies are not samples"
    assert float(out.ess[:, 12:].mean()) > 8, "moves are"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_chunks_of_an_evaluation_draw_their_own_numbers(weighting: Weighting) -> None:
    """The same sequences twice, in two chunks: not the same divergences; and the seed still decides all of them."""
    model, twice = predictor(2, weighting), torch.cat([TOKENS, TOKENS])
    measured = pointwise_divergence(model, twice, oracle=ORACLE, batch_size=8).divergence
    assert not torch.equal(measured[:8], measured[8:])
    torch.testing.assert_close(pointwise_divergence(model, twice, oracle=ORACLE, batch_size=8).divergence, measured)
    own = pointwise_divergence(model, TOKENS, oracle=ORACLE).divergence
    torch.testing.assert_close(own, measured[:8])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_result_is_the_seeds_and_ends_do_not_matter(weighting: Weighting) -> None:
    model = predictor(6, weighting)
    first = model(TOKENS)
    assert torch.equal(first.log_probs, model(TOKENS).log_probs)
    other = predictor(6, weighting, seed=1)(TOKENS)
    assert not torch.allclose(first.log_probs, other.log_probs)
    shorter = model(TOKENS[:, :4])
    torch.testing.assert_close(shorter.log_probs, first.log_probs[:, :5], rtol=0, atol=1e-12)
    torch.testing.assert_close(first.log_probs.exp().sum(-1), torch.ones(8, 11, dtype=torch.float64))


def test_a_code_is_decoded_once_and_no_further_than_needed() -> None:
    counting = Counting()
    model = MonteCarloPredictor(counting, POSTERIOR, n_samples=50, weighting="importance")
    out = model(TOKENS)
    assert len(counting.decoded) == int(out.n_forward.sum())
    assert int(out.n_forward.max()) <= N
    assert sum(len(row) + 1 for row, _ in counting.decoded) == int(out.n_tokens.sum()), "padding costs too"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_sampler_s_head_is_counted_where_it_runs(weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    known, posterior, _, _ = learned()
    logits, calls = posterior.logits, []

    def counted(factor: int, h: Tensor, embedded: Tensor) -> Tensor:
        calls.append(h.shape[:-1].numel() * (factor == 0))
        return logits(factor, h, embedded)

    monkeypatch.setattr(posterior, "logits", counted)
    out = MonteCarloPredictor(known, posterior, n_samples=5, weighting=weighting)(TOKENS)
    assert int(out.n_head.sum()) == sum(calls) > 0


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predictor(7, "importance")(TOKENS)
    monkeypatch.setattr("commissure.metahmm.monte_carlo._CELLS", 1)
    monkeypatch.setattr("commissure.metahmm.monte_carlo._ROWS", 3)
    blocks = predictor(7, "importance")(TOKENS)._replace(n_tokens=whole.n_tokens)  # padding is the blocks' own
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_gate_falls_back_outside_its_range(weighting: Weighting) -> None:
    class Implicit:
        def log_probs(self, tokens: Tensor) -> Tensor:
            return torch.full((*tokens.shape, 6), 1 / 6, dtype=torch.float64).log()[:, [0, *range(tokens.shape[1])]]

    fallback = Implicit()
    open_gate = predictor(20, weighting, gate=EntropyGate(-1.0), fallback=fallback)
    torch.testing.assert_close(open_gate.log_probs(TOKENS), predictor(20, weighting).log_probs(TOKENS))
    closed = predictor(20, weighting, gate=EntropyGate(1e3), fallback=fallback)(TOKENS)
    torch.testing.assert_close(closed.log_probs, fallback.log_probs(TOKENS))
    assert not bool(closed.sampled.any())
    assert bool(closed.ess.isnan().all())
    if weighting != "smc":
        assert int(closed.n_tokens.sum()) == 0
    some = predictor(400, weighting, gate=EntropyGate(1.0, 2.0), fallback=fallback)(TOKENS)
    entropy = ORACLE(TOKENS).task_entropy
    clear = ((entropy - 1).abs() > 0.2) & ((entropy - 2).abs() > 0.2)
    assert torch.equal(some.sampled[clear], ((entropy >= 1) & (entropy < 2))[clear])
    assert bool(some.sampled.any())
    torch.testing.assert_close(some.log_probs[~some.sampled], fallback.log_probs(TOKENS)[~some.sampled])
    free = predictor(400, weighting).log_probs(TOKENS)
    torch.testing.assert_close(some.log_probs[some.sampled], free[some.sampled], rtol=0, atol=1e-12)


def test_effective_samples() -> None:
    weights, ess = mixture(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -50.0, -50.0, -50.0]], dtype=torch.float64))
    torch.testing.assert_close(ess, torch.tensor([4.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(weights.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    with pytest.raises(DegenerateError, match="draw more"):
        mixture(torch.full((1, 3), -math.inf))


def heard(prefix: SoftPrefix) -> SoftPrefix:
    """A projection that is not the zeros it starts from."""
    with torch.no_grad(), isolated(1, "projection"):
        torch.nn.init.normal_(prefix.projection.weight)
    return prefix


def learned() -> tuple[SoftPrefix, FactorPosterior, LatentFlow, Stack]:
    with isolated(0, "models"):
        sizes = ENV.factor_sizes
        lm = Stack(["gru", "attention"], 8, vocab=ENV.n_obs, heads=2).double()
        known = SoftPrefix(lm, 4, embedding=FactorEmbedding(sizes, 4).double()).double().eval()
        return known, FactorPosterior(lm, sizes).double(), LatentFlow(lm, 8, width=16).double(), lm


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_learned_parts_in_every_weighting(weighting: Weighting) -> None:
    known, posterior, flow, lm = learned()
    by_vector = heard(SoftPrefix(lm, 8).double())
    for conditional, sampler in ((heard(known), posterior), (by_vector, flow)):
        model = MonteCarloPredictor(conditional, sampler, n_samples=5, weighting=weighting)
        out = model(TOKENS)
        torch.testing.assert_close(out.log_probs.exp().sum(-1), torch.ones(8, 11, dtype=torch.float64))
        assert bool(((out.ess >= 1 - 1e-9) & (out.ess <= 5 + 1e-9)).all())
        measured = evaluate_divergence(model, TOKENS, oracle=ORACLE, n_resamples=100)
        assert measured.overall.divergence.estimate > 0


def test_importance_and_particles_converge_to_enumeration_of_the_learned_decoder() -> None:
    """Both correct a learned q to the decoder's own posterior, whatever the decoder has learned."""
    known, posterior, _, _ = learned()
    heard(known)
    every = torch.cartesian_prod(*(torch.arange(size) for size in ENV.factor_sizes))
    each = known.log_probs(TOKENS, every.expand(8, -1, -1)).detach()
    seen = each[:, :, :-1].gather(-1, TOKENS[:, None, :, None].expand(-1, len(every), -1, 1))[..., 0]
    log_weights = torch.nn.functional.pad(seen.cumsum(-1), (1, 0)).log_softmax(1)
    expected = torch.logsumexp(log_weights[..., None] + each, 1)
    for weighting in ("importance", "smc"):
        model = MonteCarloPredictor(known, posterior, n_samples=4000, weighting=weighting)
        torch.testing.assert_close(model.log_probs(TOKENS), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_codes_that_are_ignored_leave_the_language_model(weighting: Weighting) -> None:
    """Oracle 13: a zero projection gives the base model for any K; both are exact up to the sum over samples."""
    known, posterior, _, lm = learned()
    assert float(known.projection.weight.detach().abs().max()) == 0, "fine-tuning starts at the base model"
    for n_samples in (1, 6):
        model = MonteCarloPredictor(known, posterior, n_samples=n_samples, weighting=weighting)
        torch.testing.assert_close(model.log_probs(TOKENS), lm.log_probs(TOKENS).detach(), rtol=0, atol=1e-12)


def test_flops_count_decoded_codes_and_the_sampler() -> None:
    known, posterior, _, lm = learned()
    model = MonteCarloPredictor(known, posterior, n_samples=30)
    out = model(TOKENS)
    encoder, head = flops_per_token(lm, 11), flops_per_token(posterior, 11) - flops_per_token(lm, 11)
    decoder = flops_per_token(known, 11) * int(out.n_tokens.sum()) / (8 * 11)
    assert model.flops_per_token(out) == pytest.approx(decoder + encoder + 30 * head)
    gated = MonteCarloPredictor(known, posterior, n_samples=30, gate=EntropyGate(1e3), fallback=lm)
    assert gated.flops_per_token(gated(TOKENS)) == pytest.approx(2 * encoder + 60 * head)
    assert predictor(3).flops_per_token(predictor(3)(TOKENS)) == 0, "an exact conditional and the oracle are no modules"


class Sparse:
    """Four tasks with tokens of their own, so that most codes exclude most sequences."""

    initial = torch.tensor([0.75, 0.25], dtype=torch.float64)
    transitions = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5]]], dtype=torch.float64)
    emissions = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]], [[1.0, 0.0, 0.0], [0.2, 0.0, 0.8]]]).double()


class Always:
    """q never looks: these log-probabilities at every position."""

    def __init__(self, *log_probs: float) -> None:
        self.log_probs = torch.tensor(log_probs, dtype=torch.float64)

    def propose(self, tokens: Tensor) -> TablePosterior:
        return TablePosterior(self.log_probs.expand(len(tokens), tokens.shape[1] + 1, -1))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_codes_that_exclude_the_tokens_weigh_nothing(weighting: Weighting) -> None:
    """Most of what a uniform q draws is impossible after three tokens; the oracle drops the same tasks."""
    family, tokens = Sparse(), torch.tensor([[0, 1, 0, 1], [0, 2, 2, 0], [1, 2, 1, 0]])
    exact, oracle = ExactConditional(family), BayesOracle(family)
    each = exact.log_probs(tokens, torch.arange(4)[None, :, None].expand(3, -1, -1))
    seen = each[:, :, :-1].gather(-1, tokens[:, None, :, None].expand(-1, 4, -1, 1))[..., 0].cumsum(-1)
    assert bool(((seen[..., -1] == -math.inf).sum(1) > 0).all()), "each row excludes a task"
    model = MonteCarloPredictor(exact, Always(*[-math.log(4)] * 4), n_samples=4000, weighting=weighting)
    out = model(tokens)
    expected = oracle.log_probs(tokens)
    if weighting == "plain":
        allowed = (torch.nn.functional.pad(seen, (1, 0)) > -math.inf).double()[..., None]
        expected = ((each.exp() * allowed).sum(1) / allowed.sum(1)).log()
    torch.testing.assert_close(out.log_probs.exp(), expected.exp(), rtol=0, atol=0.04)
    torch.testing.assert_close(out.log_probs.exp().sum(-1), torch.ones(3, 5, dtype=torch.float64))
    assert bool(out.ess.isfinite().all())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_where_every_code_is_impossible_it_says_so(weighting: Weighting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("commissure.metahmm.monte_carlo._CELLS", 1)  # a row at a time
    model = MonteCarloPredictor(
        ExactConditional(Sparse()), Always(0, *[-math.inf] * 3), n_samples=5, weighting=weighting
    )
    assert bool(model.log_probs(torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]])).exp().isfinite().all())
    with pytest.raises(DegenerateError, match=r"tokens\[1, :3\]: impossible under each of the 5 codes"):
        model(torch.tensor([[0, 1, 0, 0], [0, 2, 2, 0]]))


def test_gates() -> None:
    """One without ends is open for a density too, whose entropy is below zero here."""
    _, _, flow, lm = learned()
    flow.set_scale(1e-4 * torch.eye(8, dtype=torch.float64))
    prefix = SoftPrefix(lm, 8).double()
    assert not predictor_of(prefix, flow, EntropyGate(low=0.0), lm)(TOKENS).sampled.any()
    assert predictor_of(prefix, flow, EntropyGate(), lm)(TOKENS).sampled.all()
    for low, high in ((2, 1), (1, 1), (math.nan, 1), (0, math.nan), (True, 2), ("0", 1), (None, 1)):
        with pytest.raises(InputError, match="low, high"):
            EntropyGate(low, high)  # type: ignore[arg-type]


def predictor_of(conditional: Any, sampler: Any, gate: EntropyGate, fallback: Any) -> MonteCarloPredictor:
    return MonteCarloPredictor(conditional, sampler, n_samples=3, gate=gate, fallback=fallback)


def test_refusals() -> None:
    for wrong in (0, -1, 2.0, True, "3", None, math.nan):
        with pytest.raises(InputError, match="n_samples"):
            predictor(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="row"):
        predictor(1).from_row(-1)
    with pytest.raises(InputError, match="conditional"):
        MonteCarloPredictor(ENV, POSTERIOR, n_samples=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sampler"):
        MonteCarloPredictor(EXACT, ENV, n_samples=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gate"):
        predictor(1, gate=0.5, fallback=ORACLE)
    with pytest.raises(InputError, match="backbone"):
        predictor(1, gate=EntropyGate(), fallback=torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"fallback\.log_probs"):
        predictor(1, gate=EntropyGate(), fallback=Stack(["gru"], 8, vocab=9))(TOKENS)
    with pytest.raises(InputError, match="weighting"):
        predictor(1, "best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gate, fallback"):
        predictor(1, gate=EntropyGate(0.5))
    with pytest.raises(InputError, match="tokens"):
        predictor(1)(TOKENS[0])


def test_a_prior_that_is_not_uniform_is_weighed() -> None:
    """Every task once under the importance weights is the oracle with that prior; so are particles before they move."""
    oracle = BayesOracle(ENV, prior=WRONG)

    class Listed(Everything):
        def propose(self, tokens: Tensor) -> TablePosterior:
            proposal = super().propose(tokens)
            proposal.prior = WRONG.log()
            return proposal

    expected = oracle.log_probs(TOKENS)
    out = predictor(N, "importance", Listed())(TOKENS)
    torch.testing.assert_close(out.log_probs, expected, rtol=0, atol=1e-12)
    first = predictor(N, "smc", Listed())(TOKENS)
    torch.testing.assert_close(first.log_probs[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(first.ess[:, 0], (1 / WRONG.square().sum()).expand(8), rtol=1e-12, atol=0)


def test_a_move_is_accepted_by_prior_likelihood_and_proposal() -> None:
    """The logarithm of p(c') L(c') q(c) / (p(c) L(c) q(c')), each looked up; and what a pool says of its codes."""
    q = torch.rand(8, 11, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    particles = _Particles(EXACT, TablePosterior(q, log_prior=WRONG.log()), TOKENS, 5, 0)
    each = EXACT.log_probs(TOKENS, torch.arange(N)[None, :, None].expand(8, -1, -1))
    gained = each[:, :, :-1].gather(-1, TOKENS[:, None, :, None].expand(-1, N, -1, 1))[..., 0]
    rows, poor = torch.arange(8)[:, None], torch.ones(8, dtype=torch.bool)
    drawn = particles.pool.codes[particles.owner][..., 0]
    torch.testing.assert_close(particles.log_weights, WRONG.log()[drawn] - q[rows, 0, drawn], rtol=0, atol=1e-12)
    for t in range(1, 5):
        particles.observe(t)
        likelihood = gained[:, :, :t].sum(-1)
        kept = particles.owner
        candidate, log_ratio = particles._propose(t, kept, poor)
        there, here = particles.pool.codes[candidate][..., 0], particles.pool.codes[kept][..., 0]
        weight = WRONG.log() + likelihood - q[:, t]
        torch.testing.assert_close(log_ratio, weight[rows, there] - weight[rows, here], rtol=0, atol=1e-12)
        particles.rejuvenate(t, mixture(particles.log_weights)[0], poor)
        pool = particles.pool
        torch.testing.assert_close(pool.log_lik, likelihood[pool.row, pool.codes[:, 0]], rtol=0, atol=1e-12)
        torch.testing.assert_close(pool.log_probs, each[pool.row, pool.codes[:, 0], t], rtol=0, atol=1e-12)
        assert not bool(particles.log_weights.any()), "resampled particles weigh the same"


def test_no_code_is_decoded_for_the_fallback_alone() -> None:
    """Each row decodes the distinct codes of its sampled positions, none for the others."""
    counting, gate = Counting(), EntropyGate(1.0, 2.0)
    out = MonteCarloPredictor(counting, POSTERIOR, n_samples=20, gate=gate, fallback=ORACLE)(TOKENS)
    codes = POSTERIOR.propose(TOKENS).sample(torch.arange(11), 20, seed=spawn(0, "codes"))[..., 0]
    used = [codes[row][out.sampled[row]].unique() for row in range(8)]
    assert out.n_forward.tolist() == [len(some) for some in used]
    assert len(counting.decoded) == sum(map(len, used)) < sum(len(codes[row].unique()) for row in range(8))


def test_resampling_is_systematic_and_unbiased() -> None:
    """Each particle floor or ceil of n W times, n W on average, and never one without weight."""
    weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.0, 0.4, 0.0], dtype=torch.float64)
    index = _resample(weights.log().expand(4000, -1), seed=0)
    times = torch.nn.functional.one_hot(index, 7).sum(1).double()
    assert bool(((times - 7 * weights).abs() < 1).all())
    assert bool((times[:, weights == 0] == 0).all())
    error = times.std(0) / 4000**0.5
    assert bool(((times.mean(0) - 7 * weights).abs() <= 4 * error).all())


def test_particles_are_left_alone_while_half_of_them_count() -> None:
    """After one token: the first particles by their weights where ESS >= K / 2, others elsewhere."""
    n = 6
    out = predictor(n, "smc", dense.DensePosterior(ORACLE, WRONG))(TOKENS)
    proposal = TablePosterior(WRONG.log().expand(8, 11, N))
    codes = proposal.sample(torch.tensor([0]), n, seed=spawn(0, "particles"))[:, 0]
    each = EXACT.log_probs(TOKENS[:, :1], codes)
    log_weights = each[:, :, 0].gather(-1, TOKENS[:, :1, None].expand(-1, n, -1))[..., 0] - WRONG.log()[codes[..., 0]]
    log_weights, ess = mixture(log_weights)
    torch.testing.assert_close(out.ess[:, 1], ess, rtol=1e-12, atol=0)
    gap = (out.log_probs[:, 1] - torch.logsumexp(log_weights[..., None] + each[:, :, 1], 1)).abs().amax(-1)
    rich = ess >= n / 2
    assert bool(rich.any())
    assert not bool(rich.all())
    assert float(gap[rich].max()) < 1e-12 < 1e-3 < float(gap[~rich].min())


def test_particles_pay_for_every_position_they_run() -> None:
    class Metered(Counting):
        n_steps = 0

        def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, State]:
            self.n_steps += len(tokens)
            return super().step(tokens, state)

    metered = Metered()
    out = MonteCarloPredictor(metered, POSTERIOR, n_samples=10, weighting="smc")(TOKENS)
    assert int(out.n_forward.sum()) == len(metered.decoded)
    assert int(out.n_tokens.sum()) == metered.n_steps + sum(len(row) + 1 for row, _ in metered.decoded)
