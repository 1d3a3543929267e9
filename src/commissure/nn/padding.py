"""Ragged batches: the checks at every mixer's boundary, and the elements that end at each row's length.

A batch is (batch, time, dim) with `lengths` (batch,): row b holds lengths[b] elements, what follows is padding of any
value, NaN included.  Every mixer sets the padding to zero on entry; it is causal, so no valid output can see it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.mixer import State

__all__ = ["check_batch", "check_sequence", "check_step", "last_elements", "state_batch", "valid", "zero_padding"]


def check_step(x_t: Float[Tensor, "batch dim"], dim: int, state: State) -> None:
    """Raise `InputError` unless `x_t` is (batch, dim) and the state has as many rows."""
    if x_t.ndim != 2 or x_t.shape[1] != dim:
        raise InputError("x_t", tuple(x_t.shape), f"shape (batch, {dim})", "pass one element a row")
    check_batch(state, x_t.shape[0])


def check_sequence(
    x: Float[Tensor, "batch time dim"], dim: int, state: State | None, lengths: Int[Tensor, " batch"] | None
) -> None:
    """Raise `InputError` unless `x` is (batch, time, dim), `state` has its rows and 0 <= lengths <= time."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != dim:
        raise InputError("x", tuple(getattr(x, "shape", ())) or type(x).__name__, f"shape (batch, time, {dim})")
    if state is not None:
        check_batch(state, x.shape[0])
    if lengths is not None:
        check_lengths(lengths, x.shape[0], x.shape[1])


def check_lengths(lengths: Int[Tensor, " batch"], batch: int, time: int) -> None:
    """Raise `InputError` unless `lengths` is an integer tensor (batch,) within [0, time]."""
    if not isinstance(lengths, Tensor) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise InputError("lengths", getattr(lengths, "dtype", type(lengths).__name__), "an integer tensor (batch,)")
    if lengths.shape != (batch,):
        raise InputError("lengths", tuple(lengths.shape), f"shape ({batch},), one length a row")
    outside = ((lengths < 0) | (lengths > time)).nonzero()
    if len(outside):
        row = int(outside[0])
        raise InputError(f"lengths[{row}]", int(lengths[row]), f"0 <= length <= time = {time}")


def check_batch(state: State, batch: int) -> None:
    """Raise `InputError` unless the State holds `batch` rows."""
    rows = state_batch(state)
    if rows != batch:
        raise InputError("state", f"{rows} rows", f"{batch} rows, as the input", "use core.mixer.select or init_state")


def state_batch(state: State) -> int:
    """Rows of a State: the first axis of its first tensor; `InputError` for what is none."""
    first: object = state
    while isinstance(first, tuple) and first:
        first = first[0]
    if not isinstance(first, Tensor) or first.ndim == 0:
        raise InputError("state", state, "a State: tensors in tuples", "begin with model.init_state(batch)")
    return first.shape[0]


def valid(lengths: Int[Tensor, " batch"], time: int) -> Tensor:
    """Mask (batch, time), true before each row's length.

    >>> valid(torch.tensor([0, 2]), 3).int().tolist()
    [[0, 0, 0], [1, 1, 0]]
    """
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def zero_padding(
    x: Float[Tensor, "batch time dim"], lengths: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch time dim"]:
    """`x` with its padding set to zero; without lengths, `x` itself."""
    return x if lengths is None else x.masked_fill(~valid(lengths, x.shape[1])[:, :, None], 0.0)


def last_elements(x: Float[Tensor, "batch time *rest"], lengths: Int[Tensor, " batch"], count: int) -> Tensor:
    """The `count` elements that end at each row's length, (batch, count, *rest); zeros where a row has fewer.

    >>> last_elements(torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]), torch.tensor([3, 1]), 2).tolist()
    [[2.0, 3.0], [0.0, 4.0]]
    """
    index = lengths[:, None] - count + torch.arange(count, device=lengths.device)
    shape = (*index.shape, *[1] * (x.ndim - 2))
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], count, *x.shape[2:])
    taken = x.gather(1, index.clamp(min=0).view(shape).expand(-1, -1, *x.shape[2:]))
    return taken.masked_fill((index < 0).view(shape), 0.0)
