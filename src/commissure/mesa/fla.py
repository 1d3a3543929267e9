"""Weights of flash-linear-attention's MesaNet, in and out.

    stack = build_stack(fla_config(weights))
    load_fla(stack, weights)

| flash-linear-attention | here |
|---|---|
| `model.layers.N.attn.{q,k,v}_proj`, `{q,k}_conv1d` | queries, keys, values |
| `attn.a_proj`, `attn.b_proj` | forget and input gate |
| `attn.lambda_params` (heads * head_dim) | Lambda before softplus and floor |
| `attn.o_norm`, `attn.o_proj` | norm of each head, output |
| `mlp.gate_proj`, `mlp.up_proj` | one matrix, the gate's rows first |

Its model has no forget cap, no soft cap and no scale on embeddings, and rounds the width of its MLP; `fla_config` sets
the same, all sizes read from the tensors.  Layers with an output gate (`g_proj`) and attention layers are refused.
Source: fla/layers/mesa_net.py and fla/models/mesa_net, version 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.mesa.config import MesaNetConfig
from commissure.nn.stack import Stack

__all__ = ["fla_config", "load_fla", "to_fla"]

_FIRST = "model.layers.0."
_TOP: dict[str, tuple[str, ...]] = {
    "embedding": ("model.embeddings.weight",),
    "norm.weight": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
_BLOCK: dict[str, tuple[str, ...]] = {
    "norm.weight": ("attn_norm.weight",),
    "mlp_norm.weight": ("mlp_norm.weight",),
    "mlp.up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
    "mixer.inputs.q_proj.weight": ("attn.q_proj.weight",),
    "mixer.inputs.k_proj.weight": ("attn.k_proj.weight",),
    "mixer.inputs.v_proj.weight": ("attn.v_proj.weight",),
    "mixer.inputs.q_conv1d.weight": ("attn.q_conv1d.weight",),
    "mixer.inputs.k_conv1d.weight": ("attn.k_conv1d.weight",),
    "mixer.a_proj.weight": ("attn.a_proj.weight",),
    "mixer.a_proj.bias": ("attn.a_proj.bias",),
    "mixer.b_proj.weight": ("attn.b_proj.weight",),
    "mixer.b_proj.bias": ("attn.b_proj.bias",),
    "mixer.lambda_params": ("attn.lambda_params",),
    "mixer.output.o_norm.weight": ("attn.o_norm.weight",),
    "mixer.output.o_proj.weight": ("attn.o_proj.weight",),
}


def fla_config(
    weights: Mapping[str, Tensor],
    *,
    lambda_lower_bound: float = 0.25,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> MesaNetConfig:
    """The configuration under which `weights` mean what they mean there; sizes from the tensors' shapes.

    `lambda_lower_bound` and the token ids are in its config.json, not in the weights.
    """
    shape = {name: tuple(weights[name].shape) for name in _needed(weights)}
    vocab, dim = shape["model.embeddings.weight"]
    blocks = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    return MesaNetConfig(
        vocab=vocab,
        dim=dim,
        blocks=blocks,
        heads=shape[f"{_FIRST}attn.a_proj.bias"][0],
        head_dim=shape[f"{_FIRST}attn.o_norm.weight"][0],
        mlp_ratio=shape[f"{_FIRST}mlp.up_proj.weight"][0] / dim,
        conv_size=shape[f"{_FIRST}attn.q_conv1d.weight"][-1],
        tie="lm_head.weight" not in weights,
        scale_embeddings=False,
        soft_cap=None,
        forget_cap=None,
        lambda_lower_bound=lambda_lower_bound,
        head_norm_eps=1e-6,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )


def load_fla(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the `Stack` that is, or is in, `model`; dtype and device stay the model's.

    Unknown, missing and misshapen tensors raise `InputError`, which lists them; the model is then unchanged.
    """
    stack = _stack_of(model)
    ours = dict(stack.named_parameters())
    expected = to_fla(stack)
    _refuse("unknown", weights.keys() - expected.keys(), "no tensors but those of this model's blocks")
    _refuse("missing", expected.keys() - weights.keys(), "every tensor of the model")
    wrong = {f"{name} {tuple(weights[name].shape)}" for name in expected if weights[name].shape != expected[name].shape}
    _refuse("misshapen", wrong, "the model's sizes: build it from fla_config(weights)")
    with torch.no_grad():
        for name, sources in _names(stack).items():
            ours[name].copy_(torch.cat([weights[source] for source in sources]))


def to_fla(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the `Stack` that is, or is in, `model`, under flash-linear-attention's names; no copies."""
    stack = _stack_of(model)
    ours = dict(stack.named_parameters())
    weights: dict[str, Tensor] = {}
    for name, sources in _names(stack).items():
        whole = ours[name].detach()
        pieces = whole.chunk(len(sources))
        weights.update(zip(sources, pieces, strict=True))
    return weights


def _names(stack: Stack) -> dict[str, tuple[str, ...]]:
    """Our names and theirs, for every parameter of a Stack."""
    names = {name: sources for name, sources in _TOP.items() if not (name == "head" and stack.config.tie)}
    for block in range(len(stack.blocks)):
        for name, sources in _BLOCK.items():
            names[f"blocks.{block}.{name}"] = tuple(f"model.layers.{block}.{source}" for source in sources)
    return names


def _stack_of(model: nn.Module) -> Stack:
    """The Stack in a model, if it is one that flash-linear-attention could hold."""
    stacks = [module for module in model.modules() if isinstance(module, Stack)]
    if len(stacks) != 1:
        raise InputError("model", f"{type(model).__name__} with {len(stacks)} Stacks", "a module with one Stack")
    unlike = dict(stacks[0].named_parameters()).keys() ^ _names(stacks[0]).keys()
    if unlike:
        fix = "only Mesa blocks with a SwiGLU network and convolutions have names there"
        raise InputError("model", sorted(unlike), "the parameters of flash-linear-attention's MesaNet", fix)
    return stacks[0]


def _needed(weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors whose shapes give the sizes."""
    names = ["model.embeddings.weight"]
    names += [f"{_FIRST}{n}" for n in ("attn.a_proj.bias", "attn.o_norm.weight", "attn.q_conv1d.weight")]
    names += [f"{_FIRST}mlp.up_proj.weight"]
    _refuse("missing", {name for name in names if name not in weights}, "a MesaNetForCausalLM's state dict")
    return names


def _refuse(problem: str, names: set[str], allowed: str) -> None:
    if names:
        raise InputError("weights", f"{len(names)} {problem}: {', '.join(sorted(names))}", allowed)
