"""The State helpers of the mixer contract, on a mixer small enough to check by hand."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.mixer import SequenceMixer, detach, map_state, nbytes, scan, select, where


class Inner(NamedTuple):
    total: Tensor
    count: Tensor


class Outer(NamedTuple):
    inner: Inner
    last: Tensor


class RunningMean(torch.nn.Module):
    """y_t = the mean of x_0 .. x_t."""

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> Outer:
        zeros = torch.zeros(batch_size, 2, device=device, dtype=dtype)
        return Outer(Inner(zeros, torch.zeros(batch_size, device=device, dtype=torch.int64)), zeros)

    def step(self, x_t: Tensor, state: Outer) -> tuple[Tensor, Outer]:
        inner = Inner(state.inner.total + x_t, state.inner.count + 1)
        return inner.total / inner.count[:, None], Outer(inner, x_t)

    def forward(self, x: Tensor, state: Outer | None = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Outer]:
        assert x.shape[1] == 0, "only the empty sequence is needed here"
        return x, self.init_state(len(x), dtype=x.dtype) if state is None else state


def example() -> Outer:
    return Outer(Inner(torch.arange(6.0).view(3, 2), torch.tensor([1, 2, 3])), torch.ones(3, 2, dtype=torch.float64))


def test_protocol_is_structural() -> None:
    assert isinstance(RunningMean(), SequenceMixer)
    assert not isinstance(torch.nn.Linear(1, 1), SequenceMixer)


def test_scan_steps_from_the_first_element_and_continues() -> None:
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]], dtype=torch.float64)
    y, state = scan(RunningMean(), x)
    assert y.tolist() == [[[1.0, 0.0], [2.0, 0.0], [3.0, 2.0]]]
    assert state.inner.count.tolist() == [3]
    head, middle = scan(RunningMean(), x[:, :1])
    tail, end = scan(RunningMean(), x[:, 1:], middle)
    assert torch.equal(torch.cat([head, tail], 1), y)
    assert torch.equal(end.inner.total, state.inner.total)
    assert y.dtype == torch.float64


def test_scan_of_nothing_keeps_the_state() -> None:
    _, state = scan(RunningMean(), torch.ones(1, 2, 2))
    y, same = scan(RunningMean(), torch.ones(1, 0, 2), state)
    assert y.shape == (1, 0, 2)
    assert same is state


def test_scan_refuses_other_ranks() -> None:
    with pytest.raises(InputError, match=r"x = \(2, 3\): expected shape \(batch, time, dim\)"):
        scan(RunningMean(), torch.ones(2, 3))


def test_select_repeats_and_reorders_every_field() -> None:
    state = select(example(), torch.tensor([2, 0, 2, 2]))
    assert state.inner.total.tolist() == [[4, 5], [0, 1], [4, 5], [4, 5]]
    assert state.inner.count.tolist() == [3, 1, 3, 3]
    assert state.last.shape == (4, 2)
    assert isinstance(state, Outer)
    assert isinstance(state.inner, Inner)


def test_where_chooses_whole_rows() -> None:
    other = map_state(torch.zeros_like, example())
    state = where(torch.tensor([True, False, True]), example(), other)
    assert state.inner.total.tolist() == [[0, 1], [0, 0], [4, 5]]
    assert state.inner.count.tolist() == [1, 0, 3]


def test_map_state_refuses_states_of_different_shape() -> None:
    with pytest.raises(ValueError, match=r"zip"):
        map_state(torch.add, example(), (*example(), torch.ones(3)))


def test_detach_and_nbytes() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    state = Outer(Inner(x * 2, torch.ones(3, dtype=torch.int64)), x)
    cut = detach(state)
    assert not cut.inner.total.requires_grad
    assert not cut.last.requires_grad
    assert state.inner.total.requires_grad
    assert nbytes(state) == 3 * 2 * 4 + 3 * 8 + 3 * 2 * 4
