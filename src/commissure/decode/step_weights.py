"""A fitted POSSM's parameters for one session, projected for the streaming engine (`native/possm_weights.py`).

With one latent and a fixed query time everything a spike contributes is a function of its unit and its time, so keys,
values and queries are computed here once, in float64, and never again in the stream.

Source: exact algebra on POSSM, arXiv 2506.05320, section 3.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.decode.feedforward import FeedForward
from commissure.native.possm_weights import (
    FeedForwardWeights,
    GRUWeights,
    LayerWeights,
    MambaWeights,
    PossmWeights,
    S4DWeights,
)
from commissure.nn import GRU, S4D, Mamba

if TYPE_CHECKING:
    from commissure.decode.possm import POSSM

__all__ = ["has_kernel", "step_weights"]

_KINDS: dict[type, Literal["gru", "s4d", "mamba"]] = {GRU: "gru", S4D: "s4d", Mamba: "mamba"}


def has_kernel(model: POSSM) -> bool:
    """Whether the C++ engine knows this model's backbone."""
    return model.config.backbone in _KINDS.values()


@torch.no_grad()
def step_weights(model: POSSM, session: str) -> PossmWeights:
    """The engine's arrays for `session`; a backbone without a kernel raises `InputError`."""
    row, first = model.session_row(session), model.unit_start(session)
    if not has_kernel(model):
        raise InputError("backbone", model.config.backbone, f"one of {sorted(_KINDS.values())}", "use engine='torch'")
    exact = copy.deepcopy(model).double().eval()
    encoder, readout, n = exact.encoder, exact.readout, exact.config.out_dim
    units = exact.unit_table()[first : first + len(model.sessions[session])]
    embedding = exact.session_embedding[row]
    key_weight, value_weight = readout.key_value.weight.chunk(2)
    project = exact.backbone.project
    norm = readout.context_norm
    arrays: dict[str, Tensor] = {}
    if encoder.kind == "softmax":
        key, value = encoder.key_value_table(units)
        null_key, null_value = encoder.key_value_table(encoder.null_embedding)
        arrays |= {"unit_key": key, "unit_value": value, "null_key": null_key, "null_value": null_value}
        arrays |= {"query": encoder.latent_query(), "out_weight": encoder.out.weight, "out_bias": encoder.out.bias}
    else:
        arrays["unit_value"] = units
    if isinstance(project, nn.Linear):
        arrays |= {"in_weight": project.weight, "in_bias": project.bias}
    if norm is not None:
        arrays |= {"context_norm_weight": norm.weight, "context_norm_bias": norm.bias}
    arrays |= {
        "periods": encoder.turn.periods,
        "latent": encoder.latent,
        "key_weight": key_weight,
        "value_weight": value_weight,
        "session_query": readout.query(readout.query_norm(embedding)),
        "session_embedding": embedding,
        "dec_out_weight": readout.out.weight,
        "dec_out_bias": readout.out.bias,
        "readout_weight": readout.output.weight[:n],
        "readout_bias": readout.output.bias[:n],
        "output_scale": exact.target_std[:n],
        "output_mean": exact.target_mean[:n],
    }
    return PossmWeights(
        encoder=encoder.kind,
        null_token=encoder.null_token,
        backbone=_KINDS[type(exact.backbone.mixers[0])],
        chunk_s=exact.config.chunk_s,
        context=exact.config.context,
        ffn=_feedforward(encoder.ffn),
        decoder_ffn=None if readout.ffn is None else _feedforward(readout.ffn),
        layers=tuple(_layer(mixer) for mixer in exact.backbone.mixers),
        **{name: _numpy(tensor) for name, tensor in arrays.items()},
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()


def _feedforward(ffn: FeedForward) -> FeedForwardWeights:
    return FeedForwardWeights(
        norm_weight=_numpy(ffn.norm.weight),
        norm_bias=_numpy(ffn.norm.bias),
        in_weight=_numpy(ffn.wide.weight),
        in_bias=_numpy(ffn.wide.bias),
        out_weight=_numpy(ffn.narrow.weight),
        out_bias=_numpy(ffn.narrow.bias),
    )


def _layer(mixer: nn.Module) -> LayerWeights:
    if isinstance(mixer, GRU):
        cell = dict(mixer.gru.named_parameters())
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return GRUWeights(**{name: _numpy(cell[f"{name}_l0"]) for name in names})
    if isinstance(mixer, S4D):
        system = mixer.discretize()
        return S4DWeights(
            a_re=_numpy(system.decay_real),
            a_im=_numpy(system.decay_imag),
            c_re=_numpy(system.readout_real),
            c_im=_numpy(system.readout_imag),
            skip=_numpy(mixer.skip),
            out_weight=_numpy(mixer.out.weight),
            out_bias=_numpy(mixer.out.bias),
        )
    assert isinstance(mixer, Mamba)
    return MambaWeights(
        in_weight=_numpy(mixer.in_proj.weight),
        conv_weight=_numpy(mixer.conv_weight),
        conv_bias=_numpy(mixer.conv_bias),
        x_weight=_numpy(mixer.x_proj.weight),
        dt_weight=_numpy(mixer.dt_proj.weight),
        dt_bias=_numpy(mixer.dt_proj.bias),
        a=_numpy(-mixer.log_decay.exp().t()),
        skip=_numpy(mixer.skip),
        out_weight=_numpy(mixer.out_proj.weight),
    )
