"""Mergeable streaming mean and covariance.

    S_{A+B} = S_A + S_B + n_A n_B / (n_A + n_B) (m_A - m_B)(m_A - m_B)'

with n the count, m the mean and S the scatter sum (x - m)(x - m)' of a set (Chan, Golub & LeVeque 1983).  Each block's
Gram is computed in the input's dtype around a provisional shift, the block's own mean rounded to that dtype, so that a
mean of 1e4 standard deviations costs nothing; totals are float64.  Half-precision blocks are computed in float32.

Sets merge in any order and from any process.  For the joint moments of x and y accumulate `torch.cat([x, y], -1)`:
`commissure.core.lsq.ridge_from_moments` solves from them without the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from commissure.core.errors import DegenerateError, InputError

__all__ = [
    "Moments",
    "covariance",
    "empty",
    "leave_one_out",
    "measure",
    "measure_reference",
    "merge",
    "update",
]

# Of a block of the Gram: products near full speed, and the centered copy of the rows stays small.
_ROWS, _COLUMNS = 1024, 256


class Moments(NamedTuple):
    """Number, mean and scatter (the sum of outer products around the mean) of a set of vectors, in float64."""

    n_samples: int
    mean: Float64[Tensor, " dim"]
    scatter: Float64[Tensor, "dim dim"]


def empty(dim: int, *, device: torch.device | str | None = None) -> Moments:
    """The moments of no samples of `dim` components: the neutral element of `merge`."""
    if dim < 1:
        raise InputError("dim", dim, "an integer >= 1")
    zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    return Moments(0, zeros[0].clone(), zeros)


def measure(x: Float[Tensor, "*samples dim"], *, mask: Bool[Tensor, "*samples"] | None = None) -> Moments:
    """Moments of one block, all leading axes being samples; rows where `mask` is false are ignored, whatever they hold.

    >>> block = measure(torch.tensor([[1.0], [3.0], [float("nan")]]), mask=torch.tensor([True, True, False]))
    >>> block.n_samples, block.mean.tolist(), covariance(block).tolist()
    (2, [2.0], [[2.0]])
    """
    rows = _rows(x, mask)
    if not len(rows):
        return empty(rows.shape[1], device=rows.device)
    shift = rows.mean(0)
    if not torch.isfinite(shift).all():
        _raise_not_finite(x, mask)
    scatter, rest = torch.zeros(len(shift), len(shift), dtype=torch.float64, device=rows.device), 0.0 * shift.double()
    for block in rows.split(_ROWS):
        shifted = block - shift
        rest += shifted.sum(0, dtype=torch.float64)
        for at in range(0, len(shift), _COLUMNS):  # right of the diagonal alone
            scatter[at : at + _COLUMNS, at:] += shifted[:, at : at + _COLUMNS].T @ shifted[:, at:]
    for at in range(_COLUMNS, len(shift), _COLUMNS):
        scatter[at : at + _COLUMNS, :at] = scatter[:at, at : at + _COLUMNS].T
    rest /= len(rows)  # what rounding left of the mean
    return Moments(len(rows), shift.double() + rest, scatter.addr_(rest, rest, alpha=-len(rows)))


def measure_reference(x: Float[Tensor, "*samples dim"], *, mask: Bool[Tensor, "*samples"] | None = None) -> Moments:
    """`measure` by two passes over the samples in float64, one sample at a time."""
    keep = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None else mask
    rows = [row.double() for row, kept in zip(x.reshape(-1, x.shape[-1]), keep.reshape(-1), strict=True) if kept]
    mean = sum(rows, torch.zeros(x.shape[-1], dtype=torch.float64)) / max(1, len(rows))
    scatter = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for row in rows:
        scatter += torch.outer(row - mean, row - mean)
    return Moments(len(rows), mean, scatter)


def update(
    state: Moments, x: Float[Tensor, "*samples dim"], *, mask: Bool[Tensor, "*samples"] | None = None
) -> Moments:
    """`state` with the samples of one more block; `state` itself is left alone.

    >>> state = update(update(empty(1), torch.tensor([[1.0], [2.0]])), torch.tensor([[3.0]]))
    >>> state.n_samples, state.mean.item(), covariance(state).item()
    (3, 2.0, 1.0)
    """
    if x.shape[-1:] != state.mean.shape:
        raise InputError("x", tuple(x.shape), f"shape (..., {len(state.mean)}), as the state's")
    return merge(state, measure(x, mask=mask))


def merge(*states: Moments) -> Moments:
    """Moments of the union of disjoint sets; the order matters only to rounding."""
    if not states:
        raise InputError("states", (), "at least one Moments")
    dims = [len(state.mean) for state in states]
    if len(set(dims)) > 1:
        raise InputError("states", dims, "one dimension for all")
    states = tuple(state for state in states if state.n_samples) or states[:1]
    total = sum(state.n_samples for state in states)
    anchor = states[0].mean  # means are averaged as offsets from one of them: no digits lost to a large common mean
    mean = anchor + sum((s.mean - anchor) * (s.n_samples / max(1, total)) for s in states[1:])
    scatter = states[0].scatter.clone()
    for state in states[1:]:
        scatter += state.scatter
    if len(states) > 1:
        offsets = torch.stack([(s.mean - mean) * s.n_samples**0.5 for s in states])
        scatter.addmm_(offsets.T, offsets)
    return Moments(total, mean, scatter)


def leave_one_out(folds: Sequence[Moments]) -> tuple[Moments, ...]:
    """For each fold the moments of all the others, by merging (one forward and one backward sweep)."""
    if len(folds) < 2:
        raise InputError("folds", len(folds), "at least 2 folds")
    neutral = empty(len(folds[0].mean), device=folds[0].mean.device)
    before, after = [neutral], [neutral]
    for left, right in zip(folds[:-1], reversed(folds[1:]), strict=True):
        before.append(merge(before[-1], left))
        after.append(merge(after[-1], right))
    return tuple(merge(left, right) for left, right in zip(before, reversed(after), strict=True))


def covariance(state: Moments, *, ddof: int = 1) -> Float64[Tensor, "dim dim"]:
    """Scatter / (count - ddof); `DegenerateError` with `ddof` samples or fewer."""
    if state.n_samples <= ddof:
        raise DegenerateError(f"covariance of {state.n_samples} samples with ddof = {ddof}: needs at least {ddof + 1}")
    return state.scatter / (state.n_samples - ddof)


def _rows(x: Tensor, mask: Tensor | None) -> Float[Tensor, "kept dim"]:
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise InputError("x", (tuple(x.shape), x.dtype), "a floating-point tensor of shape (..., dim)")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise InputError("mask", (tuple(mask.shape), mask.dtype), f"a bool tensor of shape {tuple(x.shape[:-1])}")
    x = x.detach()
    rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
    return rows if rows.dtype == torch.float64 else rows.float()


def _raise_not_finite(x: Tensor, mask: Tensor | None) -> None:
    bad = ~torch.isfinite(x.detach()).all(-1)
    at = (bad if mask is None else bad & mask).nonzero()
    if not len(at):
        raise InputError("x", float(x.detach().abs().max()), f"values whose sum fits {x.dtype}", "rescale x")
    index = tuple(at[0].tolist())
    raise InputError(f"x[{', '.join(map(str, index))}]", x.detach()[index].tolist(), "finite numbers", "mask the row")
