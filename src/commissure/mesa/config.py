"""MesaNet's configuration: the paper's block around Mesa layers, its sizes by name, and the Stack they build.

    e_0 = sqrt(n_e) W_e token            x <- x + mixer(rms(x)),   x <- x + W_2 (silu(W_g rms(x)) * W_1 rms(x))
    logits = c tanh(W_e rms(x) / c)      W_e tied, branches of width 3 n_e, c = 30

| paper | name | | paper | name |
|---|---|---|---|---|
| n_e | `dim` | | b_gamma | `forget_cap` |
| n_a | `head_dim` | | lower bound of Lambda | `lambda_lower_bound` |
| N | `blocks` | | k, epsilon | `max_cg_steps`, `cg_eps` |

Weights are fan-in normal; those that write to the residual stream have their variance scaled by 2 / N.
`hybrid="hawk"` alternates RG-LRU blocks (1.25 n_e channels, gates in 16 blocks: as many parameters as a Mesa layer) and
Mesa, RG-LRU first, as the first block then mixes neighboring tokens cheaply.
von Oswald et al., arXiv 2506.05233, appendices E.1 and G; Hawk: arXiv 2402.19427.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator
from torch import nn

from commissure.core.config import Config
from commissure.core.errors import InputError
from commissure.core.mixer import SequenceMixer
from commissure.nn.convolution import ShortConvolution
from commissure.nn.decay import exempt
from commissure.nn.heads import HeadOutput
from commissure.nn.mesa import MesaLayer
from commissure.nn.names import MixerFactory
from commissure.nn.rg_lru import RGLRU
from commissure.nn.stack import MLP, Stack

__all__ = ["MesaNetConfig", "build_stack"]


class MesaNetConfig(Config):
    """Sizes and options of a MesaNet; the defaults are the paper's 140M.

    >>> MesaNetConfig.from_preset("440m", hybrid="hawk").blocks
    28
    >>> MesaNetConfig.from_preset("7b")
    Traceback (most recent call last):
    commissure.core.errors.InputError: name = '7b': expected one of 140m, 440m, 940m
    """

    vocab: int = Field(default=50257, ge=1, description="GPT-2's byte pair encoding")
    dim: int = Field(default=768, ge=1)
    blocks: int = Field(default=14, ge=1)
    heads: int = Field(default=6, ge=1)
    head_dim: int = Field(default=128, ge=1)
    hybrid: Literal["hawk"] | None = None
    mlp_ratio: float = Field(default=3.0, gt=0)
    conv_size: int = Field(default=4, ge=1)
    tie: bool = Field(default=True, description="the output matrix is the embedding")
    scale_embeddings: bool = Field(default=True, description="multiply embeddings by sqrt(dim)")
    soft_cap: float | None = Field(default=30.0, gt=0)
    lambda_lower_bound: float = Field(default=0.25, gt=0)
    forget_cap: float | None = Field(default=0.9975, gt=0, le=1)
    head_norm_eps: float = Field(default=1e-5, gt=0, description="under the root of each head's RMS norm")
    solver: Literal["auto", "cholesky", "block_rls", "cg", "sequential", "triton"] = "auto"
    max_cg_steps: int = Field(default=30, ge=0)
    cg_eps: float = Field(default=0.0, ge=0)
    cg_init: Literal["diag", "zero", "query"] = "diag"
    bos_token_id: int | None = Field(default=None, ge=0, description="needed for the prior")
    eos_token_id: int | None = Field(default=None, ge=0)
    pad_token_id: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _tokens_in_vocabulary(self) -> MesaNetConfig:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab:
                raise InputError(
                    name, token, f"a token below vocab = {self.vocab}", f"pass {name}= (None: there is none)"
                )
        return self

    @classmethod
    def from_preset(cls, name: str, *, hybrid: Literal["hawk"] | None = None) -> MesaNetConfig:
        """The paper's sizes: "140m", "440m" or "940m"; an unknown name lists them."""
        if name not in _PRESETS:
            raise InputError("name", name, f"one of {', '.join(_PRESETS)}")
        blocks, heads, dim = _PRESETS[name]
        end = _GPT2_END_OF_TEXT
        return cls(blocks=blocks, heads=heads, dim=dim, hybrid=hybrid, bos_token_id=end, eos_token_id=end)


_PRESETS = {"140m": (14, 6, 768), "440m": (28, 8, 1024), "940m": (28, 12, 1536)}  # N, h, n_e; n_a = 128 always
_GPT2_END_OF_TEXT = 50256  # separates documents, so it begins and ends each
_HAWK_WIDTH = 1.25  # channels of RG-LRU over n_e, the paper's hidden multiplier
_HAWK_GATE_BLOCKS = 16  # as published for Hawk; small widths take the largest common divisor


def build_stack(config: MesaNetConfig) -> Stack:
    """The model of a configuration, with the paper's initialization; predictions begin after the first token.

    The embedding is trained without weight decay, as every Lambda is.

    >>> stack = build_stack(MesaNetConfig(vocab=11, dim=16, blocks=2, heads=2, head_dim=8, hybrid="hawk"))
    >>> [type(block.mixer).__name__ for block in stack.blocks]
    ['RGLRU', 'MesaLayer']
    """
    hawk = config.hybrid == "hawk"
    mixers = [_hawk if hawk and block % 2 == 0 else _mesa_factory(config) for block in range(config.blocks)]
    stack = Stack(
        mixers,
        config.dim,
        vocab=config.vocab,
        mlp="swiglu",
        mlp_ratio=config.mlp_ratio,
        tie=config.tie,
        embed_scale=math.sqrt(config.dim) if config.scale_embeddings else 1.0,
        soft_cap=config.soft_cap,
        start_token=False,
    )
    _initialize(stack, config.blocks)
    for module in stack.modules():
        if isinstance(module, HeadOutput) and isinstance(module.o_norm, nn.RMSNorm):
            module.o_norm.eps = config.head_norm_eps
    exempt(stack, ["embedding"])
    return stack


def _hawk(dim: int) -> SequenceMixer:
    return RGLRU(dim, width=_HAWK_WIDTH, gate_blocks=math.gcd(_HAWK_GATE_BLOCKS, round(_HAWK_WIDTH * dim)))


def _mesa_factory(config: MesaNetConfig) -> MixerFactory:
    return lambda dim: MesaLayer(
        dim,
        heads=config.heads,
        head_dim=config.head_dim,
        conv_size=config.conv_size,
        lambda_lower_bound=config.lambda_lower_bound,
        forget_cap=config.forget_cap,
        solver=config.solver,
        max_cg_steps=config.max_cg_steps,
        cg_eps=config.cg_eps,
        cg_init=config.cg_init,
    )


def _initialize(stack: Stack, blocks: int) -> None:
    """Fan-in normal for every matrix and convolution; those that write to the residual stream times sqrt(2 / N)."""
    writers = {id(module) for module in map(_residual_writer, stack.modules())}
    for module in stack.modules():
        if isinstance(module, nn.Linear):
            gain = 2 / blocks if id(module) in writers else 1.0
            nn.init.normal_(module.weight, std=math.sqrt(gain / module.in_features))
        elif isinstance(module, ShortConvolution):
            nn.init.normal_(module.weight, std=module.width**-0.5)


def _residual_writer(module: nn.Module) -> nn.Module | None:
    """The matrix through which a mixer or a position-wise network writes to the residual stream."""
    if isinstance(module, MLP):
        return module.down
    if isinstance(module, HeadOutput):
        return module.o_proj
    return module.out_proj if isinstance(module, RGLRU) else None
