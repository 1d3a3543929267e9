"""Traces of models: what hooks see, what padding does, and that a model is left as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import measure
from commissure.geometry.ablation import ablate_subspace, project
from commissure.geometry.effective_rank import rankme
from commissure.geometry.spectra import spectrum
from commissure.geometry.tracing import MissingMaskWarning, pool, trace


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, str]:
        """A causal mean over the tokens that are not padding, and something else beside it."""
        weight = attention_mask[..., None].to(x.dtype)
        mean = (x * weight).cumsum(1) / weight.cumsum(1).clamp(min=1)
        return x + torch.tanh(self.mix(mean)), "beside"


class Model(nn.Module):
    """A small language model in Hugging Face's manner."""

    def __init__(self, dim: int = 6, vocab: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocab, dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(3))
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, vocab)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        for layer in self.layers:
            x, _ = layer(x, mask)
        return self.lm_head(self.norm(x))


def tokens(batch: int = 9, time: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(20, (batch, time), generator=torch.Generator().manual_seed(seed))


def states(model: Model, ids: Tensor) -> Tensor:
    """What the head sees, computed by hand."""
    x = model.embed(ids)
    for layer in model.layers:
        x, _ = layer(x, torch.ones_like(ids))
    return model.norm(x)


def test_the_head_sees_what_the_trace_says() -> None:
    model = Model()
    ids = tokens(40)
    with torch.no_grad(), trace(model, sites=["lm_head:input"], pooling=["last", "first", "mean", "all"]) as traced:
        model(ids[:15])
        model(ids[15:])
    x = states(model, ids).detach()
    rows = {"last": x[:, -1], "first": x[:, 0], "mean": x.mean(1), "all": x.reshape(-1, 6)}
    found = {(row.pooling, row.frame): row for row in traced.report(fit_range=(1, 3))}
    for pooling, expected in rows.items():
        for frame in ("raw", "unit"):
            row = found[pooling, frame]
            assert row.n_samples == len(expected)
            assert row.rankme == pytest.approx(rankme(spectrum(expected.double(), frame=frame)), rel=1e-4)
            assert row.alpha is not None
            assert row.alpha_window == (1, 3)


def test_padding_on_either_side_is_no_padding() -> None:
    model = Model()
    ids, lengths = tokens(12, 9), torch.arange(12) % 6 + 4
    alone = [states(model, ids[i : i + 1, :n])[0].detach() for i, n in enumerate(lengths.tolist())]
    for side in ("left", "right"):
        padded, mask = torch.full((12, 12), 3), torch.zeros(12, 12, dtype=torch.int64)
        for i, n in enumerate(lengths.tolist()):
            place = slice(12 - n, 12) if side == "left" else slice(0, n)
            padded[i, place], mask[i, place] = ids[i, :n], 1
        for pooling, expected in {
            "last": torch.stack([x[-1] for x in alone]),
            "first": torch.stack([x[0] for x in alone]),
            "mean": torch.stack([x.mean(0) for x in alone]),
            "all": torch.cat(alone),
        }.items():
            with torch.no_grad(), trace(model, sites=["lm_head:input"], pooling=[pooling], frames=["raw"]) as traced:
                model(input_ids=padded, attention_mask=mask)
            moments = traced.accumulators["lm_head:input", pooling, "raw"].moments
            np.testing.assert_allclose(moments.mean, measure(expected).mean, atol=1e-5)
            np.testing.assert_allclose(moments.scatter, measure(expected).scatter, atol=1e-4)


def test_a_mask_is_not_that_of_another_batch() -> None:
    model, ids = Model(), tokens()
    half = torch.ones_like(ids)
    half[:, 4:] = 0
    with torch.no_grad(), trace(model, sites=["norm"], pooling=["all"], frames=["raw"]) as traced:
        model(input_ids=ids, attention_mask=half)
        model(input_ids=ids)
        model(ids)
        assert traced.accumulators["norm", "all", "raw"].n_samples == 9 * 4 + 2 * 9 * 7
        traced.mask = half.bool()
        model(ids)
        assert traced.accumulators["norm", "all", "raw"].n_samples == 2 * 9 * 4 + 2 * 9 * 7
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert traced.accumulators["norm", "all", "raw"].n_samples == 2 * 9 * 4 + 3 * 9 * 7
        traced.mask = half[:, :5].bool()
        with pytest.raises(InputError, match="mask"):
            model(ids)


def test_leading_tokens_can_be_left_out() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    assert pool(x, "all", mask=mask, skip=1).tolist() == x[0, 2:].tolist() + x[1, 1:2].tolist()
    assert pool(x, "mean", mask=mask, skip=2).tolist() == x[0, 3:].tolist()
    assert pool(x, "last", mask=mask, skip=3).tolist() == [x[0, 3].tolist(), x[1, 1].tolist()]
    assert pool(x[:, 0], "mean").tolist() == x[:, 0].tolist()


def test_a_model_is_left_as_it_was() -> None:
    model, ids = Model(), tokens()
    expected = model(ids)
    with trace(model, sites=["*", "layers.*", "lm_head:input"], pooling=["all"]) as traced:
        told = model(ids)
    assert torch.equal(told, expected)
    assert told.requires_grad
    assert not any(fold.scatter.requires_grad for acc in traced.accumulators.values() for fold in acc.folds)
    assert not _hooks(model)
    with pytest.raises(RuntimeError, match="stop"), trace(model, sites=["norm"]):
        raise RuntimeError("stop")
    assert not _hooks(model)


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_sites_by_pattern_in_the_order_of_the_model() -> None:
    model = Model()
    with torch.no_grad(), trace(model, sites=["lm_head:input", "layers.*"], frames=["raw"]) as traced:
        model(tokens())
    assert traced.sites == ("lm_head:input", "layers.0", "layers.1", "layers.2")
    assert [row.site for row in traced.report()] == ["layers.0", "layers.1", "layers.2", "lm_head:input"]
    row = traced.report()[0]
    assert (row.rankme_corrected, row.alpha) == (None, None)  # nine rows of six: too few for either
    assert not math.isnan(row.rankme_stderr)


def test_frames_tell_norms_from_directions() -> None:
    class Sink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:, :1] + 1000 * torch.eye(x.shape[2])[0] * x[:, :1, :1], x[:, 1:]], 1)

    model = nn.Sequential(Sink())
    x = torch.randn(200, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trace(model, sites=["0"], pooling=["all"]) as traced:
        model(x)
    raw, unit = traced.report(fit_range=(1, 5))
    assert (raw.frame, unit.frame) == ("raw", "unit")
    assert raw.top_share > 0.99
    assert unit.rankme > 4
    with torch.no_grad(), trace(model, sites=["0"], pooling=["all"], frames=["raw"], skip=1) as traced:
        model(x)
    assert traced.report(fit_range=(1, 5))[0].rankme > 4.5


def test_a_table() -> None:
    pytest.importorskip("pandas")
    model = Model()
    with torch.no_grad(), trace(model, sites=["norm"], n_folds=4) as traced:
        model(tokens(40))
    table = traced.to_frame()
    assert list(table["frame"]) == ["raw", "unit"]
    assert table["rankme_corrected"].notna().all()


def test_bad_traces() -> None:
    model = Model()
    for arguments, message in (
        ({"sites": ["nrom"]}, r"sites\[0\] = 'nrom'.*close: norm"),
        ({"sites": ["norm:output"]}, r"sites\[0\]"),
        ({"sites": "norm"}, "sites"),
        ({"sites": []}, "sites"),
        ({"sites": [1]}, "sites"),
        ({"sites": ["norm"], "pooling": "last"}, "pooling"),
        ({"sites": ["norm"], "pooling": ["cls"]}, "pooling"),
        ({"sites": ["norm"], "frames": ["sign"]}, "frames"),
        ({"sites": ["norm"], "n_folds": 0}, "n_folds"),
        ({"sites": ["norm"], "skip": -1}, "skip"),
    ):
        with pytest.raises(InputError, match=message):
            trace(model, **arguments)
    with trace(model, sites=["norm"]) as traced:
        pass
    with pytest.raises(DegenerateError, match="no forward pass"):
        traced.report()
    with traced, pytest.raises(InputError, match="entered twice"):
        traced.__enter__()
    assert not _hooks(model)
    for x, mask in ((torch.ones(2), None), (torch.ones(1, 2, 3), torch.ones(2, 2, dtype=torch.bool))):
        with pytest.raises(InputError, match=r"states|mask"):
            pool(x, "all", mask=mask)


def test_an_automatic_window_is_told_row_by_row() -> None:
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 3))
    scales = torch.ones(40)
    scales[:8] = 30 / torch.arange(1, 9)
    model[0].weight.data = torch.diag(scales)
    with torch.no_grad(), trace(model, sites=["*"], frames=["raw"]) as traced:
        model(torch.randn(2000, 40, generator=torch.Generator().manual_seed(0)))
    wide, narrow = traced.report(fit_range="auto")
    assert wide.alpha_window == (1, 8)
    assert wide.alpha == pytest.approx(2.0, abs=0.1)
    assert (narrow.alpha, narrow.alpha_window) == (None, None)


# Ablation


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_removed_and_kept_are_the_whole() -> None:
    x = normal(50, 5) * torch.arange(1, 6) + 2
    moments = measure(x)
    for k in range(6):
        removed, kept = project(x, moments, remove_top=k), project(x, moments, keep_top=k)
        np.testing.assert_allclose(removed + kept - moments.mean, x, atol=1e-12)
    np.testing.assert_allclose(project(x, moments, remove_top=5), moments.mean.expand_as(x), atol=1e-12)
    np.testing.assert_allclose(project(x, moments, keep_top=5), x, atol=1e-12)
    values = spectrum(x).values
    np.testing.assert_allclose(spectrum(project(x, moments, remove_top=2)).values[:3], values[2:], rtol=1e-9)
    np.testing.assert_allclose(spectrum(project(x, moments, keep_top=2)).values[:2], values[:2], rtol=1e-9)


def test_a_model_without_some_directions() -> None:
    model, ids = Model(), tokens(40)
    expected = model(ids)
    with torch.no_grad(), trace(model, sites=["layers.1"], pooling=["all"], frames=["raw"]) as traced:
        model(ids)
    moments = traced.accumulators["layers.1", "all", "raw"].moments
    with torch.no_grad():
        with ablate_subspace(model, "layers.1", moments, keep_top=6):
            np.testing.assert_allclose(model(ids), expected.detach(), atol=1e-5)
        with ablate_subspace(model, "layers.1", moments, remove_top=6):
            constant = model(ids)
        assert torch.equal(model(ids), expected)
    assert float(constant.std(0).max()) < 1e-5
    with pytest.raises(RuntimeError, match="stop"), ablate_subspace(model, "norm", measure(normal(9, 6)), keep_top=1):
        raise RuntimeError("stop")
    assert not _hooks(model)


def test_bad_ablations() -> None:
    model, moments = Model(), measure(normal(9, 6))
    for site, named, message in (
        ("nrom", {"keep_top": 1}, "site"),
        ("norm", {}, "remove_top"),
        ("norm", {"keep_top": 1, "remove_top": 1}, "remove_top"),
        ("norm", {"keep_top": 7}, "keep_top"),
        ("norm", {"remove_top": True}, "remove_top"),
    ):
        with pytest.raises(InputError, match=message), ablate_subspace(model, site, moments, **named):
            pass
    with pytest.raises(InputError, match="x"):
        project(normal(3, 5), moments, keep_top=1)


def test_padding_without_a_mask_is_warned_of_once() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, pad_token_id=3)
    model, ids = transformers.GPT2Model(config).eval(), torch.tensor([[1, 2, 3, 3]])
    with torch.no_grad(), trace(model, sites=["ln_f"]) as traced:
        with pytest.warns(MissingMaskWarning, match="padding token 3"):
            model(input_ids=ids)
        model(input_ids=ids)  # once is enough: a second warning would be an error here
    for kwargs, mask in (({"attention_mask": (ids != 3).long()}, None), ({}, ids != 3)):
        with torch.no_grad(), trace(model, sites=["ln_f"]) as traced:
            traced.mask = mask
            model(input_ids=ids, **kwargs)
    with torch.no_grad(), trace(model, sites=["ln_f"]):
        model(input_ids=ids[:, :2])  # nothing is padded


def test_samples_that_are_equal_do_not_end_a_report() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    same, mixed = torch.ones(8, 3), torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    mixed[::2] = 1.0  # a fold of equal rows
    for x, is_degenerate in ((same, True), (mixed, False)):
        with trace(model, sites=["0"], frames=["raw"], n_folds=2) as traced:
            model(x)
        (row,) = traced.report(fit_range=(1, 2))
        assert np.isnan(row.rankme) == is_degenerate
        assert np.isnan(row.rankme_stderr)
        assert row.rankme_corrected is None
        assert (row.alpha is None) == is_degenerate
