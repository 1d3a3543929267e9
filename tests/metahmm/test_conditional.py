"""Conditional predictors: the soft prefix on Stacks and Hugging Face models, codes, streaming, exact HMMs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.mixer import select
from commissure.core.rng import isolated, torch_generator
from commissure.metahmm import MetaHMM, MetaHMMConfig
from commissure.metahmm.backbones import CausalLM, backbone, flops_per_token
from commissure.metahmm.conditional import ExactConditional, FactorEmbedding, SoftPrefix, hidden_states, pooled_codes
from commissure.metahmm.monte_carlo import MonteCarloPredictor
from commissure.metahmm.samplers import FactorPosterior, LatentFlow
from commissure.nn import Stack

spec = importlib.util.spec_from_file_location("dense", Path(__file__).with_name("dense.py"))
assert spec is not None
assert spec.loader is not None
dense: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense)

VOCAB, DIM, CODE = 7, 16, 3
TOKENS = torch.randint(VOCAB, (3, 6), generator=torch_generator(0, "tokens"))
CODES = torch.randn(3, 4, CODE, dtype=torch.float64, generator=torch_generator(0, "codes"))


def stack(mixers: list[str], **sizes: Any) -> Stack:
    return Stack(mixers, DIM, vocab=VOCAB, heads=2, **sizes)


def llama(bos: int | None = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, bos_token_id=bos, eos_token_id=None, **sizes)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": DIM, "n_layer": 2, "n_head": 2, "n_positions": 32}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=None, **sizes, **no_dropout)
    return transformers.GPT2LMHeadModel(config)


def mesanet() -> Any:
    pytest.importorskip("transformers")
    from commissure.mesa import MesaNetConfig, MesaNetForCausalLM

    sizes = {"vocab": VOCAB, "dim": DIM, "blocks": 2, "heads": 2, "head_dim": 4, "bos_token_id": 0}
    return MesaNetForCausalLM(MesaNetConfig(**sizes))


MODELS = {
    "attention": lambda: stack(["attention", "attention"], positions="rotary"),
    "positions": lambda: stack(["attention"], positions=12, tie=True, embed_scale=4.0, soft_cap=30.0),
    "gru": lambda: stack(["gru"]),
    "mesa": lambda: stack(["mesa", "mamba"]),
    "llama": llama,
    "gpt2": gpt2,
    "mesanet": mesanet,
}
STREAMING = [name for name in MODELS if name != "mesanet"]


def language_model(name: str) -> nn.Module:
    with isolated(1, name):
        return MODELS[name]().double().eval().requires_grad_(False)


def conditional(name: str, *, every_token: bool = False) -> SoftPrefix:
    return SoftPrefix(language_model(name), CODE, every_token=every_token).requires_grad_(False)


def randomized(model: SoftPrefix) -> SoftPrefix:
    """A projection that is not the zeros it starts from."""
    noise = torch.randn(model.projection.weight.shape, generator=torch_generator(3, "noise"), dtype=torch.float64)
    model.projection.weight.copy_(noise)
    return model


def base_log_probs(lm: Any, tokens: Tensor) -> Tensor:
    """The model's own predictions, called as its users call it."""
    if isinstance(lm, Stack):
        return lm.log_probs(tokens)
    started = torch.cat([tokens.new_zeros(len(tokens), 1), tokens], 1)
    return lm(input_ids=started).logits.log_softmax(-1)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_zero_projection_is_the_base_model(name: str, every_token: bool) -> None:
    """Oracle 13, for Stacks, Hugging Face models and MesaNet; and a projection that is not zero is heard."""
    model = conditional(name, every_token=every_token)
    expected = base_log_probs(model.lm, TOKENS)[:, None].expand(-1, 4, -1, -1)
    torch.testing.assert_close(model.log_probs(TOKENS, CODES), expected, rtol=0, atol=1e-12)
    heard = randomized(model).log_probs(TOKENS, CODES) - expected
    assert float(heard.abs().amax((1, 3)).min()) > 1e-4, "at every position, the prior included"


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_code_is_added_to_the_start_or_to_every_input(name: str, every_token: bool) -> None:
    """Against the same model run by hand on [start + W c, tokens], or [start, tokens] + W c."""
    model = randomized(conditional(name, every_token=every_token))
    lm: Any = model.lm
    for k in range(4):
        code = (CODES[:, k] @ model.projection.weight.T)[:, None]
        if isinstance(lm, Stack):
            start = (lm.start * lm.config.embed_scale).expand(3, 1, -1)
            vectors = torch.cat([start, lm.embed(TOKENS)], 1)
            vectors[:, : None if every_token else 1] += code
            expected = lm.logits(lm.hidden(vectors)[0]).log_softmax(-1)
        else:
            started = torch.cat([TOKENS.new_zeros(3, 1), TOKENS], 1)
            vectors = lm.get_input_embeddings()(started)
            vectors[:, : None if every_token else 1] += code
            expected = lm(inputs_embeds=vectors).logits.log_softmax(-1)
        torch.testing.assert_close(model.log_probs(TOKENS, CODES)[:, k], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("name", STREAMING)
def test_streaming_with_selected_particles(name: str, every_token: bool) -> None:
    model = randomized(conditional(name, every_token=every_token))
    rows, codes = TOKENS.repeat_interleave(4, 0), CODES.flatten(0, 1)
    expected = model.log_probs(TOKENS, CODES).flatten(0, 1)
    log_probs, state = model.prefill(rows[:, :2], codes)
    torch.testing.assert_close(log_probs, expected[:, :3], rtol=0, atol=1e-10)
    chosen = torch.tensor([7, 2, 2, 11])
    state = select(state, chosen)
    for t in range(2, 6):
        step, state = model.step(rows[chosen, t], state)
        torch.testing.assert_close(step, expected[chosen, t + 1], rtol=0, atol=1e-10)


def test_a_model_without_a_plain_cache_does_not_stream_wrongly() -> None:
    model = conditional("mesanet")
    _, state = model.prefill(TOKENS, CODES[:, 0])
    with pytest.raises(InputError, match="DynamicCache"):
        model.step(TOKENS[:, 0], state)


@pytest.mark.parametrize("name", ["gru", "llama"])
def test_predictions_are_causal(name: str) -> None:
    model = randomized(conditional(name))
    changed = TOKENS.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCAB
    before, after = model.log_probs(TOKENS, CODES), model.log_probs(changed, CODES)
    torch.testing.assert_close(before[:, :, :4], after[:, :, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, :, 4:], after[:, :, 4:])


@pytest.mark.parametrize(
    ("name", "weighting"),
    [(name, w) for name in ("llama", "gpt2", "gru", "mesanet") for w in ("plain", "importance", "smc")][:-1],
)
def test_every_weighting_on_every_kind_of_model(name: str, weighting: Any) -> None:
    """Oracle 13: codes that are ignored leave the base model; others do not, and what comes out is a distribution.

    MesaNet's Hugging Face form does not stream, so that it has no particles.
    """
    model = conditional(name)
    with isolated(4, "flow"):
        sampler = LatentFlow(model.lm, CODE, width=8).double()
    predictor = MonteCarloPredictor(model, sampler, n_samples=3, weighting=weighting)
    base = base_log_probs(model.lm, TOKENS)
    torch.testing.assert_close(predictor.log_probs(TOKENS), base, rtol=0, atol=1e-10)
    randomized(model)
    heard = predictor.log_probs(TOKENS)
    assert float((heard - base).abs().amax()) > 1e-3
    torch.testing.assert_close(heard.exp().sum(-1), torch.ones(3, 7, dtype=torch.float64))


def test_gradients_reach_the_code_the_embedding_and_the_model() -> None:
    with isolated(0, "model"):
        model = SoftPrefix(stack(["gru"]), CODE, embedding=FactorEmbedding((2, 3), CODE))
    codes = torch.tensor([[[0, 2]], [[1, 1]], [[1, 0]]])
    with torch.no_grad():
        randomized(model)
    (-model.log_probs(TOKENS, codes)[:, 0, 0, 3].mean()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["lm.embedding"] or not missing, "no token was read"
    assert float(model.embedding.weight.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]
    assert float(model.lm.start.grad.abs().sum()) > 0  # type: ignore[union-attr, operator]


def test_factor_embeddings_are_sums_of_one_vector_a_choice() -> None:
    embedding = FactorEmbedding((4, 2, 3), 5)
    w = embedding.weight
    torch.testing.assert_close(embedding(torch.tensor([[3, 1, 0]]))[0], w[3] + w[5] + w[6])
    for wrong in ([[4, 0, 0]], [[0, -1, 0]], [[0, 0]]):
        with pytest.raises(InputError, match="codes"):
            embedding(torch.tensor(wrong))
    with pytest.raises(InputError, match="sizes"):
        FactorEmbedding((), 5)


@pytest.mark.parametrize("name", MODELS)
def test_pooled_codes_are_means_of_hidden_states(name: str) -> None:
    lm: Any = language_model(name)
    hidden = hidden_states(lm, TOKENS)
    assert hidden.shape == (3, 7, DIM)
    if isinstance(lm, Stack):
        torch.testing.assert_close(lm.logits(hidden).log_softmax(-1), lm.log_probs(TOKENS), rtol=0, atol=1e-12)
    else:
        logits = lm.get_output_embeddings()
        if logits is not None and name != "mesanet":
            torch.testing.assert_close(logits(hidden).log_softmax(-1), base_log_probs(lm, TOKENS), rtol=0, atol=1e-10)
    torch.testing.assert_close(pooled_codes(lm, TOKENS), hidden[:, 1:].mean(1), rtol=0, atol=0)
    with pytest.raises(InputError, match="time >= 1"):
        pooled_codes(lm, TOKENS[:, :0])


def test_a_hugging_face_model_is_a_sequence_predictor() -> None:
    lm = language_model("gpt2")
    torch.testing.assert_close(CausalLM(lm).log_probs(TOKENS), base_log_probs(lm, TOKENS), rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="bos_token_id"):
        CausalLM(llama(bos=None))
    with pytest.raises(InputError, match="tokens"):
        CausalLM(lm).log_probs(TOKENS + VOCAB)


def test_flops_are_two_a_weight_and_attention() -> None:
    model = Stack(["attention"], 8, vocab=5, heads=2, head_dim=4, mlp="none")
    matrices = 8 * 24 + 8 * 8 + 5 * 8
    assert flops_per_token(model, 9) == 2 * matrices + 4 * 8 * 5
    tied = Stack(["attention"], 8, vocab=5, heads=2, head_dim=4, mlp="none", tie=True)
    assert flops_per_token(tied, 9) == flops_per_token(model, 9)
    assert flops_per_token(FactorPosterior(model, (3,)), 9) > flops_per_token(model, 9)
    with pytest.raises(InputError, match="length"):
        flops_per_token(model, 0)


def test_exact_conditionals_enumerate_state_paths() -> None:
    """p(x_1..x_4 | theta) by all 4^4 paths of states, for every task and sequence."""
    env = dense.small_environment()
    tokens = dense.sequences(env, 3, 4)
    tasks = torch.arange(env.n_tasks)
    log_probs = ExactConditional(env).log_probs(tokens, tasks[None, :, None].expand(3, -1, -1))
    joint = log_probs[:, :, :-1].gather(-1, tokens[:, None, :, None].expand(-1, len(tasks), -1, 1)).sum((2, 3)).exp()
    paths = torch.cartesian_prod(*[torch.arange(env.n_states)] * 4)
    for task in tasks.tolist():
        a, e = env.transition_matrix([task])[0], env.emission_matrix([task])[0]
        moves = env.initial[paths[:, 0]] * a[paths[:, :-1], paths[:, 1:]].prod(1)
        for b in range(3):
            expected = (moves * e[paths, tokens[b]].prod(1)).sum()
            torch.testing.assert_close(joint[b, task], expected, rtol=0, atol=1e-12)
    factors = env.task_to_factors(tasks)
    by_factors = ExactConditional(env).log_probs(tokens, factors.expand(3, -1, -1))
    torch.testing.assert_close(by_factors, log_probs, rtol=0, atol=0)


def test_exact_conditionals_stream() -> None:
    env = dense.small_environment()
    exact, tokens = ExactConditional(env), dense.sequences(env, 2, 6)
    codes = torch.tensor([[3], [9]])
    whole, _ = exact.prefill(tokens, codes)
    _, state = exact.prefill(tokens[:, :3], codes)
    state = select(state, torch.tensor([1, 0, 1]))
    for t in range(3, 6):
        log_probs, state = exact.step(tokens[[1, 0, 1], t], state)
        torch.testing.assert_close(log_probs, whole[[1, 0, 1], t + 1], rtol=0, atol=1e-12)


def test_an_impossible_token_leaves_no_prediction() -> None:
    """Not one of NaN: its log-likelihood is -inf from there, and other rows know nothing of it."""
    env = MetaHMM(MetaHMMConfig.from_preset("tiny").model_copy(update={"emission_noise": 0.0}), seed=0)
    exact, tokens = ExactConditional(env), torch.cartesian_prod(*[torch.arange(6)] * 3)
    log_probs, state = exact.prefill(tokens, torch.zeros(216, 1, dtype=torch.int64))
    log_lik = log_probs[:, :-1].gather(-1, tokens[..., None])[..., 0].cumsum(1)
    torch.testing.assert_close(log_lik[:, -1].exp().sum(), torch.ones((), dtype=torch.float64))
    lost = log_lik == -torch.inf
    assert 0 < int(lost[:, 0].sum()) < int(lost[:, 2].sum()) < 216
    assert bool((log_probs[:, 1:][lost] == -torch.inf).all())
    left = log_probs[:, 1:][~lost].exp().sum(-1)
    torch.testing.assert_close(left, torch.ones_like(left))
    alone, _ = exact.prefill(tokens[~lost[:, 2]], torch.zeros(int((~lost[:, 2]).sum()), 1, dtype=torch.int64))
    assert torch.equal(alone, log_probs[~lost[:, 2]])
    again, _ = exact.step(tokens[:, 0], state)
    assert bool((again[lost[:, 2]] == -torch.inf).all()), "an impossible past stays impossible"


TASKS = torch.arange(12).view(3, 4, 1)
READERS: dict[str, Any] = {
    "prefix": lambda tokens: randomized(conditional("gru")).log_probs(tokens, CODES),
    "exact": lambda tokens: ExactConditional(dense.small_environment()).log_probs(tokens, TASKS),
    "hidden": lambda tokens: hidden_states(language_model("gru"), tokens),
    "stack": lambda tokens: backbone(language_model("gru")).log_probs(tokens),
    "llama": lambda tokens: backbone(language_model("llama")).log_probs(tokens),
    "predictor": lambda tokens: MonteCarloPredictor(
        conditional("gru"), LatentFlow(language_model("gru"), CODE, width=8).double(), n_samples=2
    )(tokens),
}


@pytest.mark.parametrize("name", READERS)
def test_tokens_are_integers_of_any_width_within_the_vocabulary(name: str) -> None:
    reader, tokens = READERS[name], TOKENS % 6
    with isolated(0, "reader"):
        expected = reader(tokens)
    for dtype in (torch.int32, torch.uint8):
        with isolated(0, "reader"):
            found = reader(tokens.to(dtype))
        assert all(map(torch.equal, *((x,) if isinstance(x, Tensor) else x for x in (found, expected))))
    wrong = tokens.tolist(), tokens.numpy(), None, tokens.double(), tokens.bool(), tokens[0], tokens[None]
    for given in (*wrong, tokens - 6, tokens + VOCAB):
        with pytest.raises(InputError, match="tokens"):
            reader(given)


@pytest.mark.parametrize("codes", [TASKS.tolist(), TASKS.double(), TASKS[0], TASKS[:, :0], TASKS[:2], TASKS - 1])
def test_codes_of_tasks_are_checked(codes: Any) -> None:
    exact = ExactConditional(dense.small_environment())
    for wrong in (codes, TASKS + 5, TASKS.expand(-1, -1, 2)):
        with pytest.raises(InputError, match=r"codes|factors"):
            exact.log_probs(TOKENS % 6, wrong)
    with pytest.raises(InputError, match="tokens"):
        exact.step(TOKENS[:2, 0] % 6, exact.prefill(TOKENS % 6, TASKS[:, 0])[1])


def test_refusals() -> None:
    lm = language_model("gru")
    for wrong in (2.0, True, 0, -1, "3", None):
        with pytest.raises(InputError, match="code_dim"):
            SoftPrefix(lm, wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="dim"):
            FactorEmbedding((2,), wrong)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"sizes\[1\]"):
            FactorEmbedding((2, wrong), 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="sizes"):
        FactorEmbedding(5, 3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="embedding"):
        SoftPrefix(lm, 3, embedding=lm)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="env"):
        ExactConditional(lm)  # type: ignore[arg-type]
    for codes in (CODES.numpy(), CODES[0], CODES * torch.nan, CODES[:, :0]):
        with pytest.raises(InputError, match="codes"):
            SoftPrefix(lm, 3).log_probs(TOKENS, codes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="code_dim"):
        SoftPrefix(lm, 3, embedding=FactorEmbedding((2,), 4))
    with pytest.raises(InputError, match="codes"):
        SoftPrefix(lm, 3).log_probs(TOKENS, CODES[..., :2])
    with pytest.raises(InputError, match="codes"):
        SoftPrefix(lm, 3).log_probs(TOKENS, CODES.long())
    with pytest.raises(InputError, match="batch = 2"):
        SoftPrefix(lm, 3).log_probs(TOKENS[:2], CODES)
    with pytest.raises(InputError, match="one code for each of 3 rows"):
        SoftPrefix(lm, 3).prefill(TOKENS, CODES[:1, 0])
    with pytest.raises(InputError, match="start token"):
        backbone(Stack(["gru"], 8))
    with pytest.raises(InputError, match="lm"):
        backbone(nn.Linear(2, 2))
