"""Random POSSM weights of every layout, small and unlike each other in every size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from commissure.native.possm import FeedForwardWeights, GRUWeights, MambaWeights, PossmWeights, S4DWeights

Maker = Callable[..., PossmWeights]


def random_weights(
    *,
    encoder: str = "softmax",
    null_token: str = "empty",
    backbone: str = "gru",
    decoder_norm: bool = True,
    decoder_ffn: bool = True,
    layers: int = 1,
    dim: int = 40,
    hidden: int = 20,
    head: int = 64,
    frequencies: int = 16,
    units: int = 11,
    outputs: int = 2,
    context: int = 3,
    inner: int | None = None,
    modes: int | None = None,
    t_min: float = 1e-4,
    seed: int = 0,
) -> PossmWeights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float | None = None) -> np.ndarray:
        return rng.normal(size=shape) * (shape[-1] ** -0.5 if scale is None else scale)

    def feed_forward() -> FeedForwardWeights:
        wide = 4 * dim
        return FeedForwardWeights(
            norm_weight=1 + normal(dim, scale=0.1),
            norm_bias=normal(dim, scale=0.1),
            in_weight=normal(2 * wide, dim),
            in_bias=normal(2 * wide),
            out_weight=normal(dim, wide),
            out_bias=normal(dim),
        )

    def gru(inputs: int) -> GRUWeights:
        return GRUWeights(
            weight_ih=normal(3 * hidden, inputs),
            weight_hh=normal(3 * hidden, hidden),
            bias_ih=normal(3 * hidden),
            bias_hh=normal(3 * hidden),
        )

    def s4d() -> S4DWeights:
        n = modes or 7
        decay, turn = np.exp(-rng.uniform(0.01, 1.0, (hidden, n))), rng.uniform(0, 3, (hidden, n))
        return S4DWeights(
            a_re=decay * np.cos(turn),
            a_im=decay * np.sin(turn),
            c_re=normal(hidden, n),
            c_im=normal(hidden, n),
            skip=normal(hidden, scale=1.0),
            out_weight=normal(2 * hidden, hidden),
            out_bias=normal(2 * hidden),
        )

    def mamba() -> MambaWeights:
        wide, n, rank = inner or 2 * hidden, modes or 5, max(1, hidden // 16)
        return MambaWeights(
            in_weight=normal(2 * wide, hidden),
            conv_weight=normal(wide, 4),
            conv_bias=normal(wide, scale=0.1),
            x_weight=normal(rank + 2 * n, wide),
            dt_weight=normal(wide, rank),
            dt_bias=np.log(np.expm1(rng.uniform(0.001, 0.3, wide))),
            a=-rng.uniform(0.1, 4.0, (wide, n)),
            skip=normal(wide, scale=1.0),
            out_weight=normal(hidden, wide),
        )

    extra: dict[str, Any] = {}
    if encoder == "softmax":
        extra |= {
            "unit_key": normal(units, head, scale=1.0),
            "null_key": normal(head, scale=1.0),
            "null_value": normal(head, scale=1.0),
            "query": normal(head, scale=1.0),
            "out_weight": normal(dim, head),
            "out_bias": normal(dim, scale=0.1),
        }
    if backbone != "gru":
        extra |= {"in_weight": normal(hidden, dim), "in_bias": normal(hidden)}
    if decoder_norm:
        extra |= {"context_norm_weight": 1 + normal(hidden, scale=0.1), "context_norm_bias": normal(hidden)}
    stack = [
        gru(dim if i == 0 else hidden) if backbone == "gru" else s4d() if backbone == "s4d" else mamba()
        for i in range(layers)
    ]
    return PossmWeights(  # type: ignore[arg-type]
        encoder=encoder,
        null_token=null_token,
        backbone=backbone,
        chunk_s=0.05,
        context=context,
        periods=np.geomspace(t_min, 10.0, frequencies),
        unit_value=normal(units, head if encoder == "softmax" else dim, scale=1.0),
        latent=normal(dim, scale=1.0),
        ffn=feed_forward(),
        layers=tuple(stack),
        key_weight=normal(head, hidden, scale=1.0),
        value_weight=normal(head, hidden),
        session_query=normal(head, scale=1.0),
        session_embedding=normal(dim, scale=1.0),
        dec_out_weight=normal(dim, head),
        dec_out_bias=normal(dim, scale=0.1),
        decoder_ffn=feed_forward() if decoder_ffn else None,
        readout_weight=normal(outputs, dim),
        readout_bias=normal(outputs),
        output_scale=rng.uniform(1, 20, outputs),
        output_mean=normal(outputs),
        **extra,
    )


@pytest.fixture(scope="session")
def make_weights() -> Maker:
    return random_weights
