"""What `mesa_attention` and its kin refuse at their boundary: one reduction a tensor where all is well, else a search.

The order is cheap first: a sum is finite only if every element is (a finite sum that overflows is looked at again), the
extremes of the gates tell NaN as well.  Initial states are symmetrized and must be positive semidefinite to rounding.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import CommissureWarning, InputError
from commissure.nn.linear_attention import check_shapes

__all__ = [
    "HALF",
    "Gate",
    "caller_level",
    "check_cg",
    "check_gram",
    "check_operands",
    "check_state",
    "check_values",
    "input_gate",
    "log_gate",
    "sequence_bounds",
]

FIRST_GUESSES = ("diag", "zero", "query")
HALF = (torch.float16, torch.bfloat16)
# Rounding leaves H unsymmetric and its least eigenvalue below zero by far less than this part of its largest entry,
# before it is stored; a dtype it was stored in adds its own.
STATE_TOLERANCE = 1e-5


def check_cg(chunk_size: int, max_steps: int, eps: float, init: str) -> None:
    """Raise `InputError` unless conjugate gradients can run so."""
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise InputError("chunk_size", chunk_size, "an integer >= 1")
    if not isinstance(max_steps, int) or max_steps < 0:
        raise InputError("max_cg_steps", max_steps, "an integer >= 0")
    if not (isinstance(eps, int | float) and 0.0 <= eps < 1.0):
        raise InputError("cg_eps", eps, "a number in [0, 1): the relative residual to stop at, 0 for a fixed count")
    if init not in FIRST_GUESSES:
        raise InputError("cg_init", init, f"one of {', '.join(FIRST_GUESSES)}")


def check_operands(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor) -> None:
    """Raise `InputError` for shapes, devices, NaN or values outside their range; the first offending index is named."""
    named = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "lamb": lamb}
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise InputError(name, type(x).__name__, "a tensor", "convert it with torch.as_tensor")
    check_shapes(q, k, v, g, beta)
    heads, dim = q.shape[2:]
    if lamb.shape != (heads, dim):
        raise InputError("lamb", tuple(lamb.shape), f"shape ({heads}, {dim}): one number a head and key dimension")
    for name, x in named.items():
        if not x.dtype.is_floating_point or x.device != q.device:
            raise InputError(name, f"{x.dtype} on {x.device}", f"a floating-point tensor on {q.device}, as q")
    smallest = torch.finfo(lamb.dtype).tiny
    positive = Gate(lamb, smallest, torch.finfo(lamb.dtype).max, "a finite number > 0")
    check_values({"q": q, "k": k, "v": v}, {"g": log_gate(g), "beta": input_gate(beta), "lamb": positive})


class Gate(NamedTuple):
    """Numbers with their least and greatest allowed one."""

    values: Tensor
    least: float
    most: float
    allowed: str
    fix: str = ""


def log_gate(g: Tensor) -> Gate:
    """Logarithms of forget gates."""
    return Gate(g, -math.inf, 0.0, "log gamma <= 0 (-inf forgets everything)", "pass the logarithm of the gate")


def input_gate(beta: Tensor) -> Gate:
    """Input gates and write strengths."""
    return Gate(beta, 0.0, 1.0, "a number in [0, 1]")


def check_values(finite: Mapping[str, Tensor], gates: Mapping[str, Gate]) -> None:
    """Raise `InputError` for what is not finite and for gates outside their range; one wait for the device."""
    with torch.no_grad():
        sums = [x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite() for x in finite.values()]
        extremes = [(gate, *gate.values.aminmax()) for gate in gates.values() if gate.values.numel()]
        if bool(
            torch.stack([*sums, *((gate.least <= low) & (high <= gate.most) for gate, low, high in extremes)]).all()
        ):
            return
        for name, x in finite.items():
            _refuse(name, x, ~x.isfinite(), "finite numbers")
        for name, gate in gates.items():
            is_bad = ~((gate.values >= gate.least) & (gate.values <= gate.most))
            _refuse(name, gate.values, is_bad, gate.allowed, gate.fix)


def check_state(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "batch heads dim width"]:
    """The state in the dtype of the computation; `InputError` unless it has the shape and is finite."""
    if x.shape != shape:
        raise InputError(f"initial_state.{name}", tuple(x.shape), f"shape {shape}, key-major, a row for each sequence")
    if not x.dtype.is_floating_point or x.device != device:
        raise InputError(f"initial_state.{name}", f"{x.dtype} on {x.device}", f"a floating-point tensor on {device}")
    if x.dtype in HALF:
        _warn_half_precision()
    if not bool(x.detach().sum().isfinite()):
        _refuse(f"initial_state.{name}", x, ~x.isfinite(), "finite numbers")
    return x.to(dtype)


def check_gram(h_kk: Float[Tensor, "batch heads dim dim"], stored: torch.dtype) -> Float[Tensor, "batch heads dim dim"]:
    """h_kk symmetrized; `InputError` unless it is symmetric and positive semidefinite to the rounding of `stored`.

    Rounding every entry to precision eps moves no eigenvalue by more than eps |H|_F (Weyl).  That is nothing beside
    Lambda in float32; in half precision the negative part is lifted away, or H + Lambda could be indefinite.
    """
    if h_kk.numel() == 0:
        return h_kk
    name, rounding = "initial_state.h_kk", torch.finfo(stored)
    with torch.no_grad():
        scale = h_kk.abs().amax((2, 3), keepdim=True)
        unequal = (h_kk - h_kk.mT).abs() > (STATE_TOLERANCE + rounding.eps) * scale + rounding.smallest_normal
        if bool(unequal.any()):
            _refuse(name, h_kk, unequal, "a symmetric matrix a head", "pass the state of an earlier call")
        slack = STATE_TOLERANCE * scale + rounding.eps * torch.linalg.matrix_norm(h_kk, keepdim=True)
        shifted = torch.diag_embed((slack + rounding.smallest_normal)[..., 0].expand_as(h_kk[..., 0]))
        failed = torch.linalg.cholesky_ex(h_kk + shifted).info != 0
        if bool(failed.any()):
            batch, head = failed.nonzero()[0].tolist()
            least = float(torch.linalg.eigvalsh(h_kk[batch, head])[0])
            raise InputError(
                f"{name}[{batch}, {head}]",
                f"least eigenvalue {least:.3g}",
                "a positive semidefinite matrix",
                "pass the state of an earlier call",
            )
    symmetric = (h_kk + h_kk.mT) / 2
    if stored not in HALF:
        return symmetric
    least = torch.linalg.eigvalsh(symmetric.detach().double())[..., :1]
    lift = least.clamp(max=0.0).neg().to(h_kk.dtype)
    return symmetric + torch.diag_embed(lift.expand_as(h_kk[..., 0]))


def sequence_bounds(cu_seqlens: Int[Tensor, " sequences_plus_1"], batch: int, time: int) -> list[int]:
    """Where the packed sequences begin and end; `InputError` unless they cut one row of `time` elements."""
    if not isinstance(cu_seqlens, Tensor):
        raise InputError("cu_seqlens", type(cu_seqlens).__name__, "a tensor", "convert it with torch.as_tensor")
    if batch != 1:
        raise InputError("cu_seqlens", f"given with batch = {batch}", "a batch of 1", "pack the sequences into one row")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype.is_floating_point:
        raise InputError("cu_seqlens", (tuple(cu_seqlens.shape), cu_seqlens.dtype), "integers, shape (sequences + 1,)")
    bounds = cu_seqlens.tolist()
    falls = [i for i in range(1, len(bounds)) if bounds[i] < bounds[i - 1]]
    if bounds[0] != 0 or bounds[-1] != time or falls:
        shown = f"cu_seqlens[{falls[0]}]" if falls else "cu_seqlens"
        raise InputError(shown, bounds[falls[0]] if falls else bounds, f"numbers that grow from 0 to time = {time}")
    return bounds


def _refuse(name: str, x: Tensor, is_bad: Tensor, allowed: str, fix: str = "") -> None:
    """Raise for the first bad element, if there is one."""
    bad = is_bad.nonzero()
    if len(bad):
        index = bad[0].tolist()
        raise InputError(f"{name}{index}", float(x[tuple(index)].detach()), allowed, fix)


@cache
def _warn_half_precision() -> None:
    warnings.warn(
        "a Mesa state in half precision has lost what the layer needs; from here on it is float32: keep it so",
        CommissureWarning,
        stacklevel=caller_level(),
    )


def caller_level() -> int:
    """The `stacklevel` of a warning that points at the first line outside this library and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("commissure", "torch"):
        frame, level = frame.f_back, level + 1
    return level
