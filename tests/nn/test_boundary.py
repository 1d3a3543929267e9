"""What every mixer refuses at its boundary, and the ragged-batch functions behind it."""

from __future__ import annotations

import pytest
import torch

import commissure.nn
from commissure.core.errors import InputError
from commissure.nn import Stack, mixer
from commissure.nn.names import MIXERS as NAMES
from commissure.nn.padding import check_sequence, last_elements, zero_padding

MIXERS = [
    *(pytest.param(lambda name=name: mixer(name, 6), id=name) for name in sorted(NAMES)),
    pytest.param(lambda: Stack(["gru"], 6), id="stack"),
]


@pytest.mark.parametrize("make", MIXERS)
def test_wrong_shapes_are_named(make):
    layer = make()
    with pytest.raises(InputError, match=r"x = \(2, 3, 5\): expected shape \(batch, time, 6\)"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(InputError, match=r"x = \(3, 6\)"):
        layer(torch.zeros(3, 6))
    with pytest.raises(InputError, match=r"x_t = \(2, 5\): expected shape \(batch, 6\)"):
        layer.step(torch.zeros(2, 5), layer.init_state(2))
    with pytest.raises(InputError, match="2 rows"):
        layer(torch.zeros(3, 4, 6), layer.init_state(2))
    with pytest.raises(InputError, match="2 rows"):
        layer.step(torch.zeros(3, 6), layer.init_state(2))


@pytest.mark.parametrize("make", MIXERS)
@pytest.mark.parametrize("state", [None, (), "state", (None,)], ids=["none", "empty", "text", "tuple"])
def test_a_step_without_a_state_says_where_to_begin(make, state):
    layer = make()
    with pytest.raises(InputError, match=r"^state = .*begin with model.init_state\(batch\)"):
        layer.step(torch.zeros(2, 6), state)


@pytest.mark.parametrize("make", MIXERS)
def test_wrong_lengths_are_named(make):
    layer, x = make(), torch.zeros(2, 3, 6)
    for lengths, message in (
        (torch.tensor([1]), r"shape \(2,\)"),
        (torch.tensor([1, 4]), r"lengths\[1\] = 4: expected 0 <= length <= time = 3"),
        (torch.tensor([-1, 0]), r"lengths\[0\] = -1"),
        (torch.tensor([1.0, 2.0]), "integer tensor"),
        ([1, 2], "integer tensor"),
    ):
        with pytest.raises(InputError, match=message):
            layer(x, lengths=lengths)


@pytest.mark.parametrize("make", MIXERS)
@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_and_stretches(make, batch):
    layer = make()
    y, state = layer(torch.zeros(batch, 0, 6))
    assert y.shape == (batch, 0, 6)
    y, state = layer(torch.zeros(batch, 2, 6), state)
    assert y.shape == (batch, 2, 6)
    assert layer.step(torch.zeros(batch, 6), state)[0].shape == (batch, 6)
    y, _ = layer(torch.zeros(batch, 0, 6), lengths=torch.zeros(batch, dtype=torch.int64))
    assert y.shape == (batch, 0, 6)


def test_last_elements_and_zero_padding():
    x = torch.arange(1.0, 7).view(2, 3, 1)
    lengths = torch.tensor([2, 0])
    assert last_elements(x, lengths, 3).squeeze(2).tolist() == [[0, 1, 2], [0, 0, 0]]
    assert last_elements(x[:, :0], lengths * 0, 2).squeeze(2).tolist() == [[0, 0], [0, 0]]
    assert zero_padding(x, lengths).squeeze(2).tolist() == [[1, 2, 0], [0, 0, 0]]
    assert zero_padding(x, None) is x


def test_all_is_sorted_and_complete():
    names = commissure.nn.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper() and name != "S4D", not name[0].isupper(), name))
    assert all(hasattr(commissure.nn, name) for name in names)


def test_what_is_no_tensor_is_named() -> None:
    with pytest.raises(InputError, match=r"x = 'list': expected shape \(batch, time, 4\)"):
        check_sequence([[1.0]], 4, None, None)  # type: ignore[arg-type]
