"""What the oracle accepts: matrices with rows of probabilities, a prior, a pruning threshold, a padded batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError

__all__ = ["checked_lengths", "checked_prior", "checked_prune", "stochastic"]

ROW_TOLERANCE = 1e-3  # rows of matrices kept in half precision are off by 2.5e-4


def stochastic(name: str, matrix: Float[Tensor, "*shape"], ndim: int) -> Float[Tensor, "*shape"]:
    """`matrix` in float64 with rows that sum to one; InputError unless they are probabilities within ROW_TOLERANCE.

    >>> stochastic("initial", torch.tensor([0.5, 0.5004]), 1).sum().item()
    1.0
    """
    if matrix.ndim != ndim or min(matrix.shape) < 1 or not matrix.dtype.is_floating_point:
        raise InputError(
            name, (tuple(matrix.shape), str(matrix.dtype)), f"a floating tensor with {ndim} axes, none empty"
        )
    rows = matrix.double()
    sums = rows.sum(-1, keepdim=True)
    bad = ~((rows >= 0).all(-1) & ((sums[..., 0] - 1).abs() <= ROW_TOLERANCE))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        where = f"{name}{list(at)}" if at else name
        raise InputError(where, rows[at].tolist(), f"probabilities that sum to 1 within {ROW_TOLERANCE}")
    return rows / sums


def checked_prior(
    prior: Float[Tensor, " n"] | Sequence[float] | None, tasks: Int[Tensor, " n"] | Sequence[int] | None, n_tasks: int
) -> Float[Tensor, " tasks"]:
    """The prior of all tasks, zero for those that are not assumed.

    >>> checked_prior([0.25, 0.75], [3, 0], 4).tolist()
    [0.75, 0.0, 0.0, 0.25]
    """
    ids = torch.arange(n_tasks) if tasks is None else torch.as_tensor(tasks).cpu()
    if ids.ndim != 1 or not len(ids) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise InputError("tasks", tuple(ids.shape), "a list of task ids, not empty")
    outside = ((ids < 0) | (ids >= n_tasks)).nonzero()
    if len(outside):
        raise InputError(f"tasks[{int(outside[0])}]", int(ids[outside[0]]), f"0 <= id < {n_tasks}")
    if len(ids.unique()) < len(ids):
        raise InputError("tasks", "an id twice", "every id once", "give a task more weight through prior")
    if prior is None:
        weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    else:
        weights = torch.as_tensor(prior, dtype=torch.float64).cpu()
    if weights.shape != ids.shape:
        raise InputError("prior", tuple(weights.shape), f"shape ({len(ids)},), one probability a task")
    if not bool((weights >= 0).all()) or not abs(float(weights.sum()) - 1) <= 1e-6:
        raise InputError("prior", float(weights.sum()), "probabilities that sum to 1 within 1e-6", "divide by the sum")
    return torch.zeros(n_tasks, dtype=torch.float64).index_put((ids.long(),), weights / weights.sum())


def checked_prune(prune: float, variants: Float[Tensor, " variants"]) -> float:
    """`prune`, below the prior mass of every transition variant that has any."""
    least = float(variants[variants > 0].min())
    if not 0 <= prune < least:
        allowed = f"0 <= prune < {least:.3g}, the least prior mass of a transition variant"
        raise InputError("prune", prune, allowed, "the true one could be left out before any evidence; 1e-8 is safe")
    return float(prune)


def checked_lengths(tokens: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"] | None) -> Int[Tensor, " batch"]:
    """The rows' lengths in int64, `time` where none are given."""
    if tokens.ndim != 2 or tokens.dtype != torch.int64:
        raise InputError("tokens", (tuple(tokens.shape), str(tokens.dtype)), "an int64 tensor (batch, time)")
    batch, time = tokens.shape
    if lengths is None:
        return torch.full((batch,), time, dtype=torch.int64, device=tokens.device)
    if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise InputError("lengths", (tuple(lengths.shape), str(lengths.dtype)), f"integers, shape ({batch},)")
    outside = ((lengths < 0) | (lengths > time)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise InputError(f"lengths[{row}]", int(lengths[row]), f"0 <= length <= time = {time}")
    return lengths.to(torch.int64)
