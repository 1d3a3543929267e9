"""The small language model whose geometry is logged: what it is, what it sees, what is told."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from commissure.core.errors import CommissureWarning, InputError
from commissure.core.rng import generator
from commissure.geometry import InfinityGram, TinySetting, byte_pair_tokens, infinity_gram_alignment, rankme, train_tiny
from commissure.geometry import tiny as module
from commissure.train.loop import learning_rate_factor

TOKENS = (generator(0, "tiny test").zipf(1.5, 6000) - 1) % 300
SETTING = TinySetting(dim=8, n_blocks=2, vocab=300, steps=6, looks=4, n_contexts=64, n_folds=4, warmup_steps=2)


def test_weights_begin_as_stated_and_the_last_norm_has_none() -> None:
    setting = TinySetting(dim=64, n_blocks=3, vocab=600, heads=4)
    model = module._model(setting, 0)
    spread = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
    writers = {name for name in spread if name.endswith(("mixer.out.weight", "mlp.down.weight"))}
    assert len(writers) == 6
    for name, value in spread.items():
        assert value == pytest.approx(0.02 / 6**0.5 if name in writers else 0.02, rel=0.06), name
    assert not list(model.norm.parameters())
    gained = module._model(setting.model_copy(update={"final_gain": True}), 0)
    assert {name for name, _ in gained.norm.named_parameters()} == {"weight", "bias"}
    assert torch.equal(module._model(setting, 0).embedding, model.embedding)
    assert not torch.equal(module._model(setting, 1).embedding, model.embedding)


def test_the_default_is_the_recipe() -> None:
    model = module._model(TinySetting(), 0)
    assert sum(p.numel() for p in model.parameters()) == 36_112  # 2 x 1024 x 16 of tokens, 8 x 16 of places, one block
    config = module._config(TinySetting())
    assert [learning_rate_factor(step, config) for step in (100, 1000, 4999)] == [1.0, 1.0, 1.0]
    assert learning_rate_factor(0, config) == pytest.approx(1 / 101)
    assert learning_rate_factor(49, config) == pytest.approx(50 / 101)
    assert (config.betas, config.weight_decay, config.clip, config.keep) == ((0.9, 0.95), 0.0, 1.0, "last")
    cosine = module._config(TinySetting(schedule="cosine"))
    assert learning_rate_factor(4999, cosine) == pytest.approx(0.1, abs=1e-3)
    assert 0.5 < learning_rate_factor(2500, cosine) < 0.62


def test_contexts_are_those_of_the_held_out_tokens_for_every_seed() -> None:
    taught, held = module._split(np.arange(200) % 300, TinySetting(vocab=300))
    assert (taught.tolist(), held.tolist()) == (list(range(180)), list(range(180, 200)))
    looked = module._contexts(held, TinySetting(vocab=300, n_contexts=50))
    assert looked.shape == (50, 9)
    assert (np.diff(looked) == 1).all()
    assert looked.min() >= 180
    draw = module._draws(taught, SETTING, 3)
    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert int(draw(5).max()) < 180


def test_what_is_told_is_of_the_model_at_that_step() -> None:
    found = train_tiny(TOKENS, SETTING, seed=0)
    assert found.steps.tolist() == [0, 1, 3, 6]
    assert len(found.losses) == 6
    taught, held = module._split(TOKENS, SETTING)
    looked = module._contexts(held, SETTING)
    rows = torch.from_numpy(looked)
    with torch.no_grad():
        hidden = found.model.hidden(found.model.embed(rows[:, :-1]))[0][:, -1]
        logits = found.model.logits(hidden)
    assert found.held_out[-1] == pytest.approx(float(F.cross_entropy(logits, rows[:, -1])), rel=1e-5)
    assert found.held_out[0] == pytest.approx(np.log(300), abs=0.05)
    series = found.trajectory.series("norm")
    assert series.ranks[-1] == pytest.approx(rankme(hidden.double()), rel=1e-4)
    log_probs = logits.log_softmax(-1).gather(1, rows[:, -1:]).numpy()
    corpus = InfinityGram(taught).next_tokens(looked)
    corpus = type(corpus)(*(part[:, -1:] for part in corpus))
    assert found.alignment[-1] == pytest.approx(infinity_gram_alignment(log_probs, corpus), abs=1e-6)
    sites = list(dict.fromkeys(row.geometry.site for row in found.trajectory.rows))
    assert sorted(sites) == ["blocks.0:input", "blocks.1:input", "norm", "norm:input"]
    assert {row.geometry.alpha_window for row in found.trajectory.rows} == {(1, 4)}


def test_looking_changes_nothing_and_a_seed_decides_everything() -> None:
    often = train_tiny(TOKENS, SETTING.model_copy(update={"looks": 7}), seed=0)
    rarely = train_tiny(TOKENS, SETTING, seed=0)
    np.testing.assert_array_equal(often.losses, rarely.losses)
    assert often.held_out[-1] == rarely.held_out[-1]
    assert not np.array_equal(rarely.losses, train_tiny(TOKENS, SETTING, seed=1).losses)
    assert rarely.losses[-1] < rarely.losses[0]


def test_a_corpus_without_ranks_ends_no_run() -> None:
    setting = SETTING.model_copy(update={"steps": 1, "looks": 2})
    found = train_tiny(np.arange(400) % 290, setting, seed=0)  # every context has been followed by one token alone
    assert np.isnan(found.alignment).all()
    assert np.isfinite(found.held_out).all()


def test_a_balanced_loss_weighs_rare_tokens_up_to_a_cap() -> None:
    taught = np.repeat([0, 1, 2], [9000, 900, 100])
    weights = module._weights(taught, TinySetting(vocab=300, loss="balanced"))
    assert weights is not None
    assert float(weights[taught].mean()) == pytest.approx(1, rel=1e-5)
    assert float(weights[1] / weights[0]) == pytest.approx(10, rel=1e-5)
    rare = np.append(np.zeros(10**6, int), 1)
    capped = module._weights(rare, TinySetting(vocab=300, loss="balanced"))
    assert capped is not None
    assert float(capped[1] / capped[0]) == pytest.approx(20 * 300, rel=1e-4)  # of a token of frequency 1 / (20 vocab)
    assert module._weights(taught, TinySetting(vocab=300)) is None


def test_the_loss_is_that_of_the_next_token() -> None:
    model, rows = module._model(SETTING, 0), torch.from_numpy(TOKENS[:90].reshape(10, 9))
    weights = torch.linspace(0.5, 2, 300)
    logits = model.logits(model.hidden(model.embed(rows[:, :-1]))[0]).flatten(0, 1)
    for given in (None, weights):
        expected = F.cross_entropy(logits, rows[:, 1:].flatten(), weight=given)
        assert module._loss(model, rows, given).item() == pytest.approx(expected.item(), rel=1e-6)


def test_text_becomes_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    text = "the whole and the halves of the whole — and the rest. " * 30
    tokens = byte_pair_tokens(text, vocab=300)
    assert len(tokens) < len(text.encode())
    assert tokens.max() < 300
    np.testing.assert_array_equal(tokens, byte_pair_tokens(text, vocab=300))
    marked = byte_pair_tokens("the <unk> cat <unk>", vocab=300, special=["<unk>"])
    assert len(set(marked[marked == marked.min()])) == 1
    assert (marked == 0).sum() == 2  # special tokens have the first numbers
    found = importlib.util.find_spec

    def hidden(name: str, *rest: Any) -> Any:
        return None if name == "tokenizers" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    with pytest.warns(CommissureWarning, match="bytes"):
        assert byte_pair_tokens(text).tolist() == list(text.encode())


def test_bad_input_is_named() -> None:
    for tokens in (TOKENS[:100], TOKENS + 1000, TOKENS.astype(float), TOKENS[None]):
        with pytest.raises(InputError, match="tokens"):
            train_tiny(tokens, SETTING, seed=0)
    with pytest.raises(InputError, match="text"):
        byte_pair_tokens("")
    with pytest.raises(InputError, match="vocab"):
        byte_pair_tokens("a", vocab=256)  # the special token needs a number of its own
    for special in ("<unk>", [""], [3]):
        with pytest.raises(InputError, match="special"):
            byte_pair_tokens("a", special=special)
    with pytest.raises(InputError, match="dim"):
        TinySetting(dim=1)


def test_norms_of_a_stack_can_be_looked_at_from_both_sides() -> None:
    found = train_tiny(TOKENS, SETTING, seed=0)
    before, after = (found.trajectory.series(site, frame="unit").ranks for site in ("norm:input", "norm"))
    assert not np.allclose(before, after)
    assert isinstance(found.model.norm, nn.LayerNorm)
