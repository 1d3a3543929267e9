"""Contract 1, the sequence mixer: one map from sequences to sequences that trains in parallel and streams in steps.

    y, S' = forward(x, S)          x (batch, time, dim), S the state before x, S' after each row's last element
    y_t, S_t = step(x_t, S_{t-1})  x_t (batch, dim)

A mixer is right when forward equals the scan of step, for any way of cutting the sequence; the eight laws are written
in `tests/laws/test_mixer.py`.  A State is a NamedTuple whose fields are batch-first tensors or
States; a model with a variable number of layers holds a plain tuple of States.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from commissure.core.errors import InputError

__all__ = ["SequenceMixer", "State", "detach", "map_state", "nbytes", "scan", "select", "where"]

State = Any  # a NamedTuple of batch-first tensors or of States; Python's types cannot say so


@runtime_checkable
class SequenceMixer(Protocol):
    """What every mixer offers; `forward` is reached by calling the module."""

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first element; `device` and `dtype` default to the parameters'."""

    def step(self, x_t: Float[Tensor, "batch dim"], state: State) -> tuple[Float[Tensor, "batch dim"], State]:
        """One element in, one out."""

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: State | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], State]:
        """A whole stretch; outputs past a row's length mean nothing, the state is the one at its length."""


def map_state(function: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply `function` to corresponding tensors of States of one shape.

    >>> from typing import NamedTuple
    >>> class S(NamedTuple):
    ...     h: torch.Tensor
    >>> map_state(torch.add, S(torch.ones(1)), S(torch.ones(1)))
    S(h=tensor([2.]))
    """
    if isinstance(state, Tensor):
        return function(state, *others)
    parts = tuple(map_state(function, *parts) for parts in zip(state, *others, strict=True))
    return type(state)(*parts) if hasattr(state, "_fields") else parts


def scan(
    mixer: SequenceMixer, x: Float[Tensor, "batch time dim"], state: State | None = None
) -> tuple[Float[Tensor, "batch time dim"], State]:
    """`forward` by repeated `step`: the reference every parallel form is held to."""
    if x.ndim != 3:
        raise InputError("x", tuple(x.shape), "shape (batch, time, dim)")
    state = mixer.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
    outputs = []
    for x_t in x.unbind(1):
        y_t, state = mixer.step(x_t, state)
        outputs.append(y_t)
    if not outputs:
        return mixer.forward(x, state)
    return torch.stack(outputs, 1), state


def select(state: State, index: Int[Tensor, " chosen"]) -> State:
    """Rows `index` of a State, repeats allowed: particles, beams, the sessions still running."""
    return map_state(lambda t: t.index_select(0, index), state)


def where(mask: Tensor, state: State, other: State) -> State:
    """Row by row, `state` where `mask` (batch,) is true, else `other`."""
    return map_state(lambda a, b: torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b), state, other)


def detach(state: State) -> State:
    """The same State outside the autograd graph (truncated backpropagation)."""
    return map_state(Tensor.detach, state)


def nbytes(state: State) -> int:
    """Bytes a State holds."""
    if isinstance(state, Tensor):
        return state.nelement() * state.element_size()
    return sum(nbytes(part) for part in state)
