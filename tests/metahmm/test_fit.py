"""Training on an environment: sizes, streams, resumption, and learning that brings a predictor closer to the oracle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.rng import isolated
from commissure.metahmm import MetaHMM
from commissure.metahmm.conditional import FactorEmbedding, SoftPrefix, pooled_codes
from commissure.metahmm.divergence import evaluate_divergence
from commissure.metahmm.fit import ContextCodes, FitConfig, KnownFactors, fit, implicit_stack
from commissure.metahmm.samplers import FactorPosterior, LatentFlow
from commissure.nn import Stack
from commissure.train import Checkpoint

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

ENV = dense.small_environment()
QUICK = FitConfig(steps=6, batch_size=4, length=8)


def tiny_stack(dim: int = 8) -> Stack:
    with isolated(0, "stack"):
        return Stack(["gru"], dim, vocab=ENV.n_obs)


def conditional(dim: int = 8) -> SoftPrefix:
    with isolated(1, "prefix"):
        return SoftPrefix(tiny_stack(dim), 4, embedding=FactorEmbedding(ENV.factor_sizes, 4))


def posterior(dim: int = 8) -> FactorPosterior:
    with isolated(2, "posterior"):
        return FactorPosterior(tiny_stack(dim), ENV.factor_sizes)


def flow() -> LatentFlow:
    with isolated(3, "flow"):
        return LatentFlow(tiny_stack(), 8, width=8)


@pytest.mark.parametrize(("size", "millions"), [("1.1m", 1.07), ("2m", 1.98), ("6.3m", 6.33), ("25m", 25.2)])
def test_the_paper_s_sizes(size: str, millions: float) -> None:
    """Oracle 14, at the paper's 50 tokens: to the digits printed there."""
    with torch.device("meta"):
        stack = implicit_stack(size, vocab=50)
    count = sum(p.numel() for p in stack.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.005 if millions < 10 else 0.05)
    layers, width = len(stack.blocks), stack.dim
    heads = stack.blocks[0].mixer.heads  # type: ignore[union-attr]
    assert 1e6 * count == pytest.approx(layers * (4 * width * 64 * heads + 8 * width**2) + 100 * width, rel=0.005)


@pytest.mark.parametrize("mixer", ["attention", "gru", "mesa", "gated_deltanet", "mamba"])
def test_any_mixer_makes_and_trains_a_predictor(mixer: str) -> None:
    model = implicit_stack("cpu", vocab=ENV.n_obs, mixer=mixer)
    result = fit(model, ENV, config=FitConfig(steps=2, batch_size=2, length=6))
    assert len(result.losses) == 2
    assert not model.training
    assert model.log_probs(dense.sequences(ENV, 2, 5)).shape == (2, 6, 6)


def test_training_brings_every_part_closer_to_the_oracle() -> None:
    """Implicit: less divergence.  Conditional: less than implicit, told the task.  Posterior: nearer the exact one."""
    oracle = dense.DenseOracle(ENV)
    tokens, config = dense.sequences(ENV, 64, 12, seed=9), FitConfig(steps=250, batch_size=16, length=12, lr=1e-2)
    tasks = torch.randint(ENV.n_tasks, (64,), generator=torch.Generator().manual_seed(5))
    told = ENV.sample(tasks, 12, seed=3).tokens
    implicit = tiny_stack(24)
    before = evaluate_divergence(implicit, tokens, oracle=oracle, n_resamples=100).overall.divergence
    fit(implicit, ENV, config=config)
    after = evaluate_divergence(implicit, tokens, oracle=oracle, n_resamples=100).overall.divergence
    assert after.high < before.low
    known = conditional(24)
    fit(known, ENV, config=config)
    nll = -known.log_probs(told, ENV.task_to_factors(tasks)[:, None])[:, 0, :-1].gather(-1, told[..., None]).mean()
    assert float(nll.detach()) < float(-implicit.log_probs(told)[:, :-1].gather(-1, told[..., None]).mean().detach())
    sampler = posterior(24)
    exact = oracle(tokens).log_posterior
    every = ENV.task_to_factors(torch.arange(ENV.n_tasks)).expand(64, 13, -1, -1)

    def distance() -> float:
        log_q = sampler.propose(tokens).log_prob(torch.arange(13), every).detach()
        return float((exact.exp() * (exact - log_q)).sum(-1).mean())

    untrained = distance()
    fit(sampler, ENV, config=config)
    assert distance() < 0.5 * untrained


@pytest.mark.parametrize("make", [tiny_stack, conditional, posterior, flow], ids=lambda f: f.__name__)
def test_a_run_repeats_itself_and_goes_on_from_its_checkpoint(make: Any, tmp_path: Path) -> None:
    codes = ContextCodes(ENV, tiny_stack(), length=5) if make is flow else None
    before = torch.random.get_rng_state()
    whole = fit(make(), ENV, codes=codes, config=QUICK, seed=3)
    again = fit(make(), ENV, codes=codes, config=QUICK, seed=3)
    other = fit(make(), ENV, codes=codes, config=QUICK, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert whole.losses == again.losses != other.losses

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "run", every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(make(), ENV, codes=codes, config=QUICK, seed=3, checkpoint=checkpoint, progress=stop)
    resumed = fit(make(), ENV, codes=codes, config=QUICK, seed=3, checkpoint=checkpoint)
    assert resumed.losses == whole.losses
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_another_run_s_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "run")
    fit(flow(), ENV, codes=ContextCodes(ENV, tiny_stack(), length=5), config=QUICK, checkpoint=checkpoint)
    elsewhere = MetaHMM(ENV.config, seed=1)
    with isolated(7, "other"):
        other_lm = Stack(["gru"], 8, vocab=ENV.n_obs)
    for env, codes, tasks in (
        (elsewhere, ContextCodes(elsewhere, tiny_stack(), length=5), None),
        (ENV, ContextCodes(ENV, tiny_stack(), length=6), None),
        (ENV, ContextCodes(ENV, other_lm, length=5), None),
        (ENV, ContextCodes(ENV, tiny_stack(), length=5), torch.arange(4)),
    ):
        with pytest.raises(InputError, match="same configuration"):
            fit(flow(), env, codes=codes, tasks=tasks, config=QUICK, checkpoint=checkpoint)


def test_only_the_given_tasks_are_drawn() -> None:
    seen: list[Tensor] = []

    class Watching(KnownFactors):
        def __call__(self, task_ids: Tensor, *, seed: int) -> Tensor:
            seen.append(task_ids)
            return super().__call__(task_ids, seed=seed)

    tasks = torch.tensor([3, 5, 11])
    fit(conditional(), ENV, tasks=tasks, codes=Watching(ENV), config=FitConfig(steps=20, batch_size=8, length=4))
    drawn = torch.cat(seen)
    assert sorted(drawn.unique().tolist()) == [3, 5, 11]
    assert float((drawn[:, None] == tasks).double().mean(0).min()) > 0.2, "uniformly"
    assert not torch.equal(seen[0], seen[1])


def test_tasks_are_ids_in_any_form() -> None:
    losses = {
        fit(tiny_stack(), ENV, tasks=tasks, config=QUICK).losses  # type: ignore[arg-type]
        for tasks in ([3, 5], (3, 5), torch.tensor([3, 5]), torch.tensor([3, 5]).int(), torch.tensor([3, 5]).numpy())
    }
    assert len(losses) == 1


@pytest.mark.parametrize("vocab", [ENV.n_obs - 1, ENV.n_obs + 1])
def test_a_predictor_has_the_environment_s_tokens(vocab: int) -> None:
    other = Stack(["gru"], 8, vocab=vocab)
    embedding = FactorEmbedding(ENV.factor_sizes, 4)
    for model in (other, SoftPrefix(other, 4, embedding=embedding)):
        with pytest.raises(InputError, match="n_obs = 6"):
            fit(model, ENV, config=QUICK)
    readers: tuple[Any, ...] = (
        lambda: fit(FactorPosterior(other, ENV.factor_sizes), ENV, config=QUICK),
        lambda: ContextCodes(ENV, other, length=2)(torch.arange(2), seed=0),
    )
    for read in readers:  # what only reads tokens may know more of them
        if vocab > ENV.n_obs:
            read()
        else:
            with pytest.raises(InputError, match="n_obs = 6"):
                read()


def test_context_codes_do_not_change_with_the_model() -> None:
    lm = tiny_stack().train()
    codes, tasks = ContextCodes(ENV, lm, length=9), torch.arange(6)
    before = codes(tasks, seed=4)
    fit(lm, ENV, config=QUICK)
    assert torch.equal(codes(tasks, seed=4), before)
    assert not torch.equal(ContextCodes(ENV, lm, length=9)(tasks, seed=4), before)


def test_context_codes_come_from_another_sequence_of_the_task() -> None:
    lm = tiny_stack()
    codes, tasks = ContextCodes(ENV, lm, length=9), torch.arange(6)
    expected = pooled_codes(lm, ENV.sample(tasks, 9, seed=4).tokens)
    assert torch.equal(codes(tasks, seed=4), expected)
    assert not torch.equal(codes(tasks, seed=5), expected)
    tokens: list[Tensor] = []
    contexts: list[Tensor] = []

    class Spy(ContextCodes):
        def __call__(self, task_ids: Tensor, *, seed: int) -> Tensor:
            contexts.append(self.env.sample(task_ids, QUICK.length, seed=seed).tokens)
            return super().__call__(task_ids, seed=seed)

    class Prefix(SoftPrefix):
        def prefill(self, rows: Tensor, given: Tensor) -> Any:
            tokens.append(rows)
            return super().prefill(rows, given)

    fit(Prefix(lm, 8), ENV, codes=Spy(ENV, tiny_stack(), length=QUICK.length), config=QUICK)
    assert len(tokens) == len(contexts) == QUICK.steps
    assert not any(torch.equal(own, context) for own, context in zip(tokens, contexts, strict=True))


def test_the_published_run() -> None:
    paper = FitConfig.from_preset("paper")
    assert (paper.steps, paper.batch_size, paper.length, paper.lr, paper.clip) == (50_000, 256, 200, 1e-3, 1.0)
    from commissure.train.loop import learning_rate_factor

    assert {learning_rate_factor(step, paper) for step in (0, 1, 25_000, 49_999)} == {1.0}
    with pytest.raises(InputError, match="one of cpu, paper"):
        FitConfig.from_preset("gpu")


def test_refusals() -> None:
    with pytest.raises(InputError, match="size"):
        implicit_stack("big", vocab=5)
    with pytest.raises(InputError, match="codes"):
        fit(tiny_stack(), ENV, codes=KnownFactors(ENV), config=QUICK)
    for tasks in ([], [16], [-1], [1.0], [True], [[1]], 3, "ab"):
        with pytest.raises(InputError, match="tasks"):
            fit(tiny_stack(), ENV, tasks=tasks, config=QUICK)  # type: ignore[arg-type]
    for length in (0, 2.0, True, None):
        with pytest.raises(InputError, match="length"):
            ContextCodes(ENV, tiny_stack(), length=length)  # type: ignore[arg-type]
    for name in ("config", "codes", "checkpoint"):
        with pytest.raises(InputError, match=name):
            fit(conditional(), ENV, **{name: {}})  # type: ignore[arg-type]
    for act in (KnownFactors, lambda env: ContextCodes(env, tiny_stack()), lambda env: fit(tiny_stack(), env)):
        with pytest.raises(InputError, match="env"):
            act(tiny_stack())  # type: ignore[arg-type, operator]
    with pytest.raises(InputError, match="vocab"):
        implicit_stack("cpu", vocab=0)
    with pytest.raises(InputError, match="mixer"):
        implicit_stack("cpu", vocab=5, mixer=5)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lm"):
        fit(nn.Linear(2, 2), ENV, config=QUICK)
    with pytest.raises(InputError, match=r"FitConfig\.keep"):
        FitConfig(keep="best")  # type: ignore[arg-type]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every batch of tokens that is drawn from here on."""
    drawn: list[Tensor] = []
    sample = MetaHMM.sample

    def watching(self: MetaHMM, *arguments: Any, **options: Any) -> Any:
        sequences = sample(self, *arguments, **options)
        drawn.append(sequences.tokens)
        return sequences

    monkeypatch.setattr(MetaHMM, "sample", watching)
    return drawn


def test_the_first_token_is_learned_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first loss is the mean of -log p over tokens 1 .. T of the model as it was made."""
    drawn, untrained, told = watched(monkeypatch), tiny_stack(), conditional()
    own = fit(tiny_stack(), ENV, config=QUICK).losses[0]
    known = fit(conditional(), ENV, config=QUICK).losses[0]
    first, second = drawn[0], drawn[QUICK.steps]
    want = -untrained.log_probs(first)[:, :-1].gather(-1, first[..., None]).mean()
    assert own == pytest.approx(float(want.detach()), rel=1e-6)
    factors = torch.zeros(len(second), 1, len(ENV.factor_sizes), dtype=torch.int64)  # not heard before training
    want = -told.log_probs(second, factors)[:, 0, :-1].gather(-1, second[..., None]).mean()
    assert known == pytest.approx(float(want.detach()), rel=1e-6)


def test_one_task_gives_another_sequence_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = watched(monkeypatch)
    fit(tiny_stack(), ENV, tasks=torch.tensor([3]), config=QUICK)
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == QUICK.steps


def test_only_attention_has_positions_and_the_seed_makes_the_model() -> None:
    assert implicit_stack("cpu", vocab=6).config.positions == "rotary"
    assert implicit_stack("cpu", vocab=6, mixer="gru").config.positions == "none"
    first, again, other = (implicit_stack("cpu", vocab=6, seed=seed).start for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_flow_is_standardized_on_the_given_tasks() -> None:
    class Ids:
        key = "ids"

        def __call__(self, task_ids: Tensor, *, seed: int) -> Tensor:
            return task_ids[:, None].expand(-1, 8).float()

    model = flow()
    fit(model, ENV, tasks=torch.tensor([9, 9, 9]), codes=Ids(), config=QUICK)
    assert float(model.mean[0]) == 9
