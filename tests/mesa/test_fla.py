"""Weights of flash-linear-attention: round trip, refusals, and equality with its layer written out by definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.rng import torch_generator
from commissure.mesa import MesaNetConfig, build_stack, fla_config, load_fla, to_fla

VOCAB, DIM, BLOCKS, HEADS, HEAD_DIM, WIDTH, CONV = 17, 12, 2, 3, 5, 40, 4


def foreign_weights(seed: int = 0, *, tied: bool = False) -> dict[str, Tensor]:
    """A state dict as their MesaNetForCausalLM writes it: names and shapes from its public code."""
    generator = torch_generator(seed, "fla")
    inner = HEADS * HEAD_DIM
    layer = {
        "attn_norm.weight": (DIM,), "mlp_norm.weight": (DIM,), "attn.q_proj.weight": (inner, DIM),
        "attn.k_proj.weight": (inner, DIM), "attn.v_proj.weight": (inner, DIM), "attn.a_proj.weight": (HEADS, DIM),
        "attn.a_proj.bias": (HEADS,), "attn.b_proj.weight": (HEADS, DIM), "attn.b_proj.bias": (HEADS,),
        "attn.lambda_params": (inner,), "attn.q_conv1d.weight": (inner, 1, CONV),
        "attn.k_conv1d.weight": (inner, 1, CONV), "attn.o_norm.weight": (HEAD_DIM,),
        "attn.o_proj.weight": (DIM, inner), "mlp.gate_proj.weight": (WIDTH, DIM), "mlp.up_proj.weight": (WIDTH, DIM),
        "mlp.down_proj.weight": (DIM, WIDTH),
    }  # fmt: skip
    shapes = {"model.embeddings.weight": (VOCAB, DIM), "model.norm.weight": (DIM,)}
    shapes |= {} if tied else {"lm_head.weight": (VOCAB, DIM)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(BLOCKS) for name, shape in layer.items()}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for n, s in shapes.items()}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def their_layer(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """One sequence (time, dim) through their layer in the naive exact form: every H_t solved densely."""

    def convolved(name: str) -> Tensor:
        y = F.conv1d(F.pad((x @ w[f"{name}_proj.weight"].T).T, (CONV - 1, 0)), w[f"{name}_conv1d.weight"], groups=15).T
        y = F.silu(y).view(-1, HEADS, HEAD_DIM)
        return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    q, k = convolved("q"), convolved("k")
    v = (x @ w["v_proj.weight"].T).view(-1, HEADS, HEAD_DIM)
    beta = torch.sigmoid(x @ w["b_proj.weight"].T + w["b_proj.bias"])
    gamma = torch.sigmoid(x @ w["a_proj.weight"].T + w["a_proj.bias"])
    lamb = (F.softplus(w["lambda_params"]) + 0.25).view(HEADS, HEAD_DIM)
    outputs = torch.zeros(len(x), HEADS, HEAD_DIM, dtype=x.dtype)
    for h in range(HEADS):
        h_kk = h_kv = torch.zeros(HEAD_DIM, HEAD_DIM, dtype=x.dtype)
        for t in range(len(x)):
            h_kk = gamma[t, h] * h_kk + beta[t, h] * torch.outer(k[t, h], k[t, h])
            h_kv = gamma[t, h] * h_kv + beta[t, h] * torch.outer(k[t, h], v[t, h])
            outputs[t, h] = torch.linalg.solve(h_kk + torch.diag(lamb[h]), q[t, h]) @ h_kv
    return rms(outputs, w["o_norm.weight"]).flatten(1) @ w["o_proj.weight"].T


def their_model(tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    x = weights["model.embeddings.weight"][tokens]
    for n in range(BLOCKS):
        prefix = f"model.layers.{n}."
        w = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): t for name, t in w.items() if name.startswith("attn.")}
        x = x + their_layer(rms(x, w["attn_norm.weight"]), attn)
        y = rms(x, w["mlp_norm.weight"])
        hidden = F.silu(y @ w["mlp.gate_proj.weight"].T) * (y @ w["mlp.up_proj.weight"].T)
        x = x + hidden @ w["mlp.down_proj.weight"].T
    return rms(x, weights["model.norm.weight"]) @ weights.get("lm_head.weight", weights["model.embeddings.weight"]).T


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_same_weights_give_the_same_logits(tied: bool) -> None:
    weights = foreign_weights(tied=tied)
    stack = build_stack(fla_config(weights)).double()
    load_fla(stack, weights)
    tokens = torch.randint(VOCAB, (2, 70), generator=torch_generator(0, "tokens"))
    ours = stack.logits(stack.hidden(stack.embed(tokens))[0])
    theirs = torch.stack([their_model(row, weights) for row in tokens])
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    stack.float()
    single = stack.logits(stack.hidden(stack.embed(tokens))[0]).detach()
    assert float((single - theirs).norm() / theirs.norm()) <= 1e-5


def test_a_hugging_face_model_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from commissure.mesa import MesaNetForCausalLM

    weights = foreign_weights()
    model = MesaNetForCausalLM(fla_config(weights)).double()
    load_fla(model, weights)
    model.save_pretrained(tmp_path)
    loaded = MesaNetForCausalLM.from_pretrained(tmp_path).requires_grad_(False)
    tokens = torch.randint(VOCAB, (1, 9), generator=torch_generator(1, "tokens"))
    torch.testing.assert_close(loaded(tokens).logits[0], their_model(tokens[0], weights), rtol=1e-8, atol=1e-8)


def test_sizes_come_from_the_shapes() -> None:
    config = fla_config(foreign_weights(), eos_token_id=2)
    sizes = (config.vocab, config.dim, config.blocks, config.heads, config.head_dim, config.conv_size)
    assert sizes == (VOCAB, DIM, BLOCKS, HEADS, HEAD_DIM, CONV)
    assert round(config.mlp_ratio * DIM) == WIDTH
    assert (config.soft_cap, config.forget_cap, config.scale_embeddings) == (None, None, False)
    assert (config.tie, config.bos_token_id, config.eos_token_id) == (False, None, 2)
    assert fla_config(foreign_weights(tied=True)).tie


def test_round_trip_keeps_names_and_bits() -> None:
    weights = foreign_weights()
    stack = build_stack(fla_config(weights)).double()
    load_fla(stack, weights)
    exported = to_fla(stack)
    assert exported.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(exported[name], weight), name


def broken(change: str) -> dict[str, Tensor]:
    weights = foreign_weights()
    if change == "unknown":
        weights["model.layers.1.attn.g_proj.weight"] = torch.zeros(15, DIM)
    if change == "missing":
        del weights["model.layers.1.attn.o_norm.weight"], weights["model.norm.weight"]
    if change == "misshapen":
        weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(WIDTH + 1, DIM)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unknown", r"1 unknown: model\.layers\.1\.attn\.g_proj\.weight"),
        ("missing", r"2 missing: model\.layers\.1\.attn\.o_norm\.weight, model\.norm\.weight"),
        ("misshapen", r"1 misshapen: model\.layers\.1\.mlp\.up_proj\.weight \(41, 12\)"),
    ],
)
def test_wrong_tensors_are_listed_and_nothing_is_loaded(change: str, message: str) -> None:
    stack = build_stack(fla_config(foreign_weights())).double()
    before = {name: t.clone() for name, t in stack.state_dict().items()}
    with pytest.raises(InputError, match=message):
        load_fla(stack, broken(change))
    assert all(torch.equal(t, before[name]) for name, t in stack.state_dict().items())


def test_a_foreign_dict_is_refused() -> None:
    with pytest.raises(InputError, match=r"5 missing: model\.embeddings\.weight"):
        fla_config({"transformer.wte.weight": torch.zeros(3, 2)})


@pytest.mark.parametrize("fields", [{"hybrid": "hawk"}, {"conv_size": 1}], ids=["hawk", "no convolution"])
def test_a_model_they_cannot_hold_is_refused(fields: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"vocab": 7, "dim": 8, "blocks": 2, "heads": 2, "head_dim": 4}
    config = MesaNetConfig(**sizes, **fields)
    with pytest.raises(InputError, match="the parameters of flash-linear-attention's MesaNet"):
        to_fla(build_stack(config))
