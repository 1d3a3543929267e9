"""The laws have teeth: four classic bugs, each caught by the laws it breaks, each beside its correct twin."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from commissure.nn import GRU, Attention
from commissure.nn.padding import last_elements, zero_padding

spec = importlib.util.spec_from_file_location("laws", Path(__file__).parent / "laws.py")
laws = importlib.util.module_from_spec(spec)
spec.loader.exec_module(laws)


class TopLeftMask(Attention):
    """Bug 1: the causal mask starts at the cache's first column, so a query sees too few of its predecessors."""

    def visible(self, seen, time, columns):
        column = torch.arange(columns, device=seen.device)
        mask = column <= torch.arange(time, device=seen.device)[:, None]
        return mask.expand(len(seen), time, columns)


class DroppedState(GRU):
    """Bug 2: forward starts from rest whatever state it is given."""

    def forward(self, x, state=None, *, lengths=None):
        return super().forward(x, None, lengths=lengths)


class Sum(NamedTuple):
    """A running sum and how many elements are in it."""

    total: Tensor
    count: Tensor


class Leaky(nn.Module):
    """h_t = a h_{t-1} + x_t, in closed form: y_t = sum_s a^(t - s) x_s + a^(t + 1) h."""

    lag = 0

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(dim, dtype=torch.float64))

    def init_state(self, batch_size, *, device=None, dtype=None):
        dtype, device = dtype or self.decay.dtype, device or self.decay.device
        total = torch.zeros(batch_size, len(self.decay), dtype=dtype, device=device)
        return Sum(total, torch.zeros(batch_size, dtype=torch.int64, device=device))

    def step(self, x_t, state):
        total = self.decay * state.total + x_t
        return total, Sum(total, state.count + 1)

    def forward(self, x, state=None, *, lengths=None):
        x = zero_padding(x, lengths)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        time = torch.arange(x.shape[1], device=x.device)
        age = (time[:, None] - time)[:, :, None]
        powers = torch.where(age >= 0, self.decay ** (age.clamp(min=0) + self.lag), 0.0)
        y = torch.einsum("tsd,bsd->btd", powers, x) + self.decay ** (time[:, None] + 1) * state.total[:, None]
        seen = torch.full((len(x),), x.shape[1], device=x.device) if lengths is None else lengths
        totals = torch.cat([state.total[:, None], y], 1)
        return y, Sum(last_elements(totals, seen + 1, 1)[:, 0], state.count + seen)


class DecayOffByOne(Leaky):
    """Bug 3: the newest element has already decayed once."""

    lag = 1


class Mean(Leaky):
    """The mean of everything seen."""

    def step(self, x_t, state):
        total, count = state.total + x_t, state.count + 1
        return total / count[:, None], Sum(total, count)

    def forward(self, x, state=None, *, lengths=None):
        x = zero_padding(x, lengths)
        state = self.init_state(len(x), device=x.device, dtype=x.dtype) if state is None else state
        totals = x.cumsum(1) + state.total[:, None]
        counts = state.count[:, None] + torch.arange(1, x.shape[1] + 1, device=x.device)
        seen = x.shape[1] if lengths is None else lengths
        return self.mean(totals, counts[:, :, None]), Sum(x.sum(1) + state.total, state.count + seen)

    def mean(self, totals, counts):
        return totals / counts


class NonCausalMean(Mean):
    """Bug 4: the mean of the whole stretch at every time, as in training on complete sequences."""

    def mean(self, totals, counts):
        return (totals[:, -1:] / counts[:, -1:]).expand_as(totals)


BUGS = [
    (TopLeftMask, Attention, "forward_is_the_scan_of_step"),
    (DroppedState, GRU, "any_chunking_gives_the_same"),
    (DecayOffByOne, Leaky, "forward_is_the_scan_of_step"),
    (NonCausalMean, Mean, "outputs_are_causal"),
]


def broken_laws(mixer):
    """Names of the laws a mixer breaks."""
    broken = []
    for law in laws.LAWS:
        try:
            laws.hold(law, lambda dim: mixer(dim).double(), shrink=False)
        except AssertionError:
            broken.append(law.__name__)
    return broken


@pytest.mark.parametrize(("bug", "twin", "law"), BUGS, ids=lambda value: getattr(value, "__name__", value))
def test_bug_is_caught_and_its_twin_passes(bug, twin, law):
    assert law in broken_laws(bug)
    assert broken_laws(twin) == []
