"""What environments, oracle and divergences accept: integers, tokens and lengths, tables of probabilities, a prior.

Tensors, numpy arrays and nested sequences alike, tokens and ids in any integer dtype; everything else is an InputError
that names the argument.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer, Num
from torch import Tensor

from commissure.core.errors import InputError

__all__ = [
    "Device",
    "Ids",
    "Lengths",
    "Table",
    "Tokens",
    "checked_batch",
    "checked_matrices",
    "checked_prior",
    "checked_prune",
    "integers",
    "stochastic",
    "whole",
]

Tokens = Integer[Tensor, "batch time"] | Integer[np.ndarray, "batch time"] | Sequence[Sequence[int]]
Lengths = Integer[Tensor, " batch"] | Integer[np.ndarray, " batch"] | Sequence[int]
Device = torch.device | str
Table = Num[Tensor, "..."] | Num[np.ndarray, "..."] | Sequence  # of probabilities
Ids = Integer[Tensor, " n"] | Integer[np.ndarray, " n"] | Sequence[int]

ROW_TOLERANCE = 1e-3  # rows of matrices kept in half precision are off by 2.5e-4


def whole(argument: str, value: object, at_least: int) -> int:
    """An integer, numpy's too, not below `at_least`; a bool is none."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < at_least:
        raise InputError(argument, value, f"an integer >= {at_least}")
    return int(value)


def _tensor(argument: str, values: object, fix: str = "") -> Tensor:
    """Numbers as a tensor; what is not a tensor is copied."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.array(values, order="C"))
    except (TypeError, ValueError, RuntimeError):
        allowed = "numbers: a tensor, an array or sequences of equal lengths"
        raise InputError(argument, values, allowed, fix) from None


def integers(argument: str, values: object, *axes: str, fix: str = "") -> Int64[Tensor, "*shape"]:
    """`values` as int64 with these axes; nothing is cut off a fraction.

    >>> integers("ids", [3, 1], "n")
    tensor([3, 1])
    """
    tensor = _tensor(argument, values, fix)
    is_integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.ndim != len(axes) or (tensor.numel() and not is_integer):
        found = (tuple(tensor.shape), str(tensor.dtype))
        raise InputError(argument, found, f"integers with axes ({', '.join(axes)})", fix)
    return tensor.long()


def checked_batch(
    tokens: Tokens, lengths: Lengths | None, *, vocab: int | None = None, device: Device | None = None
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, " batch"]]:
    """Tokens and the rows' lengths (`time` where none are given) on one device, that of a tensor if it is None.

    With `vocab`, tokens are within [0, vocab) except in the padding.
    """
    fix = "pass tokens=batch.tokens, lengths=batch.lengths" if hasattr(tokens, "tokens") else ""
    found = integers("tokens", tokens, "batch", "time", fix=fix).to(device)
    batch, time = found.shape
    if lengths is None:
        ends = torch.full((batch,), time, device=found.device)
    else:
        ends = integers("lengths", lengths, "batch").to(found.device)
    if len(ends) != batch:
        raise InputError("lengths", tuple(ends.shape), f"shape ({batch},), one length a row")
    if bool(((ends < 0) | (ends > time)).any()):
        row = int(((ends < 0) | (ends > time)).nonzero()[0])
        raise InputError(f"lengths[{row}]", int(ends[row]), f"0 <= length <= time = {time}")
    if vocab is None:
        return found, ends
    outside = ((found < 0) | (found >= vocab)) & (torch.arange(time, device=found.device) < ends[:, None])
    if bool(outside.any()):
        row, position = outside.nonzero()[0].tolist()
        raise InputError(f"tokens[{row}, {position}]", int(found[row, position]), f"0 <= token < {vocab}")
    return found, ends


def stochastic(name: str, matrix: Table, ndim: int) -> Float64[Tensor, "*shape"]:
    """`matrix` in float64 with rows that sum to one; InputError unless they are probabilities within ROW_TOLERANCE.

    >>> stochastic("initial", [0.5, 0.5004], 1).sum().item()
    1.0
    """
    tensor = _tensor(name, matrix)
    if tensor.ndim != ndim or tensor.numel() == 0 or tensor.is_complex() or tensor.dtype == torch.bool:
        found = (tuple(tensor.shape), str(tensor.dtype))
        raise InputError(name, found, f"probabilities with {ndim} axes, none empty")
    rows = tensor.detach().double()
    sums = rows.sum(-1, keepdim=True)
    bad = ~((rows >= 0).all(-1) & ((sums[..., 0] - 1).abs() <= ROW_TOLERANCE))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        where = f"{name}{list(at)}" if at else name
        raise InputError(where, rows[at].tolist(), f"probabilities that sum to 1 within {ROW_TOLERANCE}")
    return rows / sums


def checked_matrices(
    names: tuple[str, str], initial: Table, transitions: Table, emissions: Table, device: Device | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Initial distribution ([states], or one for each transition matrix), transition and emission matrices, normalized.

    `names` are the caller's of the last two.  On `device`, or else on that of the transition matrices.
    """
    move, emit = names
    transitions, emissions = stochastic(move, transitions, 3), stochastic(emit, emissions, 3)
    n, states, successors = transitions.shape
    if successors != states:
        raise InputError(f"{move}.shape", tuple(transitions.shape), f"({n}, states, states)")
    if emissions.shape[1] != states:
        raise InputError(f"{emit}.shape", tuple(emissions.shape), f"(n, {states}, vocab): as many states as {move}")
    given = _tensor("initial", initial)
    starts = stochastic("initial", given, 2 if given.ndim == 2 else 1)
    if starts.shape not in ((states,), (n, states)):
        raise InputError("initial.shape", tuple(starts.shape), f"({states},) or ({n}, {states})")
    try:
        where = transitions.device if device is None else torch.device(device)
        return starts.to(where), transitions.to(where), emissions.to(where)
    except (TypeError, RuntimeError, AssertionError) as error:  # of torch, for what is no device or not there
        raise InputError("device", device, "a torch device of this machine", str(error).partition("\n")[0]) from None


def checked_prior(prior: Table | None, tasks: Ids | None, n_tasks: int) -> Float64[Tensor, " tasks"]:
    """The prior of all tasks, zero for those that are not assumed.

    >>> checked_prior([0.25, 0.75], [3, 0], 4).tolist()
    [0.75, 0.0, 0.0, 0.25]
    """
    ids = torch.arange(n_tasks) if tasks is None else integers("tasks", tasks, "n").cpu()
    if not len(ids):
        raise InputError("tasks", tasks, "one task id at least")
    outside = ((ids < 0) | (ids >= n_tasks)).nonzero()
    if len(outside):
        raise InputError(f"tasks[{int(outside[0])}]", int(ids[outside[0]]), f"0 <= id < {n_tasks}")
    if len(ids.unique()) < len(ids):
        raise InputError("tasks", "an id twice", "every id once", "give a task more weight through prior")
    if prior is None:
        weights = torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)
    else:
        weights = _tensor("prior", prior).detach().cpu()
    if weights.shape != ids.shape or weights.is_complex() or weights.dtype == torch.bool:
        found = (tuple(weights.shape), str(weights.dtype))
        raise InputError("prior", found, f"shape ({len(ids)},), one probability a task")
    weights = weights.double()
    if not bool((weights >= 0).all()) or not abs(float(weights.sum()) - 1) <= 1e-6:
        raise InputError("prior", float(weights.sum()), "probabilities that sum to 1 within 1e-6", "divide by the sum")
    return torch.zeros(n_tasks, dtype=torch.float64).index_put((ids,), weights / weights.sum())


def checked_prune(prune: float, variants: Float[Tensor, " variants"]) -> float:
    """`prune`, below the prior mass of every transition variant that has any."""
    least = float(variants[variants > 0].min())
    if isinstance(prune, bool) or not isinstance(prune, int | float | np.number) or not 0 <= prune < least:
        allowed = f"0 <= prune < {least:.3g}, the least prior mass of a transition variant"
        raise InputError("prune", prune, allowed, "the true one could be left out before any evidence; 1e-8 is safe")
    return float(prune)
