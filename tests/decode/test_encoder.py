"""The ragged encoder against a double loop, the padded layout, closed forms and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from commissure.decode.encoder import SpikeEncoder, SpikeTokens, encode_padded_reference, segment_softmax
from commissure.decode.rotary import RotaryTime
from commissure.nn.rotary import turn_pairs

CHUNK_S = 0.05


def make_encoder(kind: str = "softmax", null_token: str = "empty", dim: int = 64) -> SpikeEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = SpikeEncoder(
            dim, chunk_s=CHUNK_S, kind=kind, null_token=null_token, t_min=1e-4, t_max=10.0, dropout=0.0
        ).double()
        for parameter in encoder.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def make_tokens(counts: list[int], n_units: int = 7, seed: int = 0) -> SpikeTokens:
    rng = np.random.default_rng(seed)
    n = sum(counts)
    slot = np.repeat(np.arange(len(counts)), counts)
    order = rng.permutation(n)
    return SpikeTokens(
        torch.from_numpy(rng.integers(0, n_units, n)),
        torch.from_numpy(rng.uniform(-CHUNK_S / 2, CHUNK_S / 2, n)),
        torch.from_numpy(slot[order]),
        len(counts),
    )


def make_embedding(n_units: int = 7, dim: int = 64) -> torch.Tensor:
    return torch.randn(n_units, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def turned(x: np.ndarray, time: float, periods: np.ndarray) -> np.ndarray:
    """R(t) x, one pair at a time."""
    y = x.copy()
    for f, period in enumerate(periods):
        angle = 2 * math.pi * time / period
        y[2 * f] = x[2 * f] * math.cos(angle) - x[2 * f + 1] * math.sin(angle)
        y[2 * f + 1] = x[2 * f] * math.sin(angle) + x[2 * f + 1] * math.cos(angle)
    return y


def double_loop(encoder: SpikeEncoder, tokens: SpikeTokens, embedding: torch.Tensor) -> np.ndarray:
    """Every chunk, every spike, softmax written out, in numpy."""
    p = {name: t.detach().numpy() for name, t in encoder.named_parameters()}
    periods = encoder.turn.periods.numpy()

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return (x - x.mean()) / math.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    latents = []
    for b in range(tokens.n_slots):
        spikes = [(embedding[u].numpy(), float(t)) for u, t, s in zip(*tokens[:3], strict=True) if s == b]
        if encoder.kind == "additive":
            z = p["latent"] + sum((turned(e, t, periods) for e, t in spikes), np.zeros(embedding.shape[1]))
        else:
            if encoder.null_token == "always":
                spikes.append((p["null_embedding"], 0.0))
            elif not spikes:
                spikes.append((p["null_embedding"], -CHUNK_S / 2))
            query = p["query.weight"] @ norm(p["latent"], "query_norm")
            scores, values = [], []
            for e, t in spikes:
                key, value = np.split(p["key_value.weight"] @ norm(e + p["token_type"], "context_norm"), 2)
                scores.append(query @ turned(key, t, periods) / 8)
                values.append(turned(value, t, periods))
            weights = np.exp(np.array(scores) - max(scores))
            pooled = (weights / weights.sum()) @ np.array(values)
            z = p["latent"] + p["out.weight"] @ pooled + p["out.bias"]
        value, gate = np.split(p["ffn.wide.weight"] @ norm(z, "ffn.norm") + p["ffn.wide.bias"], 2)
        gelu = gate * np.array([0.5 * (1 + math.erf(g / math.sqrt(2))) for g in gate])
        latents.append(z + p["ffn.narrow.weight"] @ (value * gelu) + p["ffn.narrow.bias"])
    return np.array(latents)


@pytest.mark.parametrize("kind", ["softmax", "additive"])
@pytest.mark.parametrize("null_token", ["empty", "always"])
def test_equals_a_double_loop_over_spikes(kind: str, null_token: str) -> None:
    encoder, tokens, embedding = make_encoder(kind, null_token), make_tokens([3, 0, 1, 40, 0]), make_embedding()
    np.testing.assert_allclose(
        encoder(tokens, embedding).detach().numpy(), double_loop(encoder, tokens, embedding), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("null_token", ["empty", "always"])
def test_equals_the_padded_layout_with_its_gradients(null_token: str) -> None:
    encoder, tokens = make_encoder("softmax", null_token), make_tokens([5, 0, 1, 900, 12])
    embedding = make_embedding().requires_grad_()
    probe = torch.randn(5, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [embedding, *encoder.parameters()]
    ragged = torch.autograd.grad((encoder(tokens, embedding) * probe).sum(), leaves)
    padded = torch.autograd.grad((encode_padded_reference(encoder, tokens, embedding) * probe).sum(), leaves)
    for ours, theirs in zip(ragged, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["softmax", "additive"])
def test_gradcheck(kind: str) -> None:
    encoder, tokens = make_encoder(kind, dim=32), make_tokens([2, 0, 4], n_units=3)
    embedding = make_embedding(3, 32).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: encoder(tokens, e), (embedding,), atol=1e-7)


def test_one_spike_has_weight_one_and_a_closed_form() -> None:
    encoder, embedding = make_encoder(), make_embedding()
    time = torch.tensor([0.0123], dtype=torch.float64)
    tokens = SpikeTokens(torch.tensor([4]), time, torch.tensor([0]), 1)
    _, value = encoder.key_value_table(embedding)
    z = encoder.latent + encoder.out(turn_pairs(value[4:5], *encoder.turn(time, torch.float64)))
    torch.testing.assert_close(encoder(tokens, embedding), z + encoder.ffn(z), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "additive"])
def test_order_of_spikes_and_names_of_units_do_not_matter(kind: str) -> None:
    encoder, tokens, embedding = make_encoder(kind), make_tokens([30, 2, 9]), make_embedding()
    order, names = torch.randperm(41, generator=torch.Generator().manual_seed(3)), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    expected = encoder(tokens, embedding)
    shuffled = SpikeTokens(*(field[order] for field in tokens[:3]), 3)
    torch.testing.assert_close(encoder(shuffled, embedding), expected, rtol=0, atol=1e-12)
    renamed = tokens._replace(unit=names.argsort()[tokens.unit])
    torch.testing.assert_close(encoder(renamed, embedding[names]), expected, rtol=0, atol=1e-12)


def test_a_doubled_spike_counts_only_with_the_null_token() -> None:
    embedding = make_embedding()
    once = SpikeTokens(torch.tensor([1]), torch.tensor([0.01], dtype=torch.float64), torch.tensor([0]), 1)
    twice = SpikeTokens(*(torch.cat((field, field)) for field in once[:3]), 1)
    for kind, null_token, changes in (
        ("softmax", "empty", False), ("softmax", "always", True), ("additive", "empty", True),
    ):  # fmt: skip
        encoder = make_encoder(kind, null_token)
        difference = (encoder(once, embedding) - encoder(twice, embedding)).abs().max()
        assert (difference > 1e-3) == changes, (kind, null_token)


def test_rotation_keeps_lengths_and_scores_depend_on_differences() -> None:
    turn = RotaryTime(16, t_min=1e-4, t_max=10.0)
    x, y = make_embedding(2)
    at = {t: turn(torch.tensor([t], dtype=torch.float64), torch.float64) for t in (0.02, 0.07, 0.05)}
    torch.testing.assert_close(turn_pairs(x, *(a[0] for a in at[0.02])).norm(), x.norm(), rtol=1e-12, atol=0)
    pair = turn_pairs(x, *(a[0] for a in at[0.02])) @ turn_pairs(y, *(a[0] for a in at[0.07]))
    torch.testing.assert_close(pair, x @ turn_pairs(y, *(a[0] for a in at[0.05])), rtol=0, atol=1e-9)


def test_segment_softmax_is_the_softmax_of_each_segment() -> None:
    score = torch.tensor([1000.0, -3.0, 1001.0, 2.0], dtype=torch.float64)
    weight = segment_softmax(score, torch.tensor([2, 0, 2, 0]), 4)
    torch.testing.assert_close(weight[[0, 2]], torch.softmax(score[[0, 2]], 0))
    torch.testing.assert_close(weight[[1, 3]], torch.softmax(score[[1, 3]], 0))
