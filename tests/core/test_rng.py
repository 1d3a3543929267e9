"""Randomness: children by path, the same for any order, and no global generator touched."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.core.errors import InputError
from commissure.core.rng import generator, isolated, spawn, torch_generator


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**63), st.lists(st.integers() | st.text(max_size=5), max_size=3))
def test_children_are_repeatable_63_bit_seeds(seed: int, path: list[int | str]) -> None:
    child = spawn(seed, *path)
    assert child == spawn(seed, *path)
    assert 0 <= child < 2**63
    torch.Generator().manual_seed(child)


def test_children_do_not_depend_on_order_or_siblings() -> None:
    forward = [spawn(3, "trial", k) for k in range(20)]
    backward = [spawn(3, "trial", k) for k in reversed(range(20))]
    assert forward == backward[::-1]


def test_distinct_paths_give_distinct_children() -> None:
    paths = [(), (0,), (1,), ("0",), ("",), (0, 0), (0, 1), ("ab",), ("a", "b"), ("b", "a")]
    seeds = {spawn(seed, *path) for seed in range(50) for path in paths}
    assert len(seeds) == 50 * len(paths)


def test_a_literal_value_pins_the_stream() -> None:
    """Seeds stored with old results must still mean the same."""
    assert spawn(0, "init") == 6689282563346080673


def test_numpy_scalars_are_the_numbers_they_hold() -> None:
    assert spawn(np.int64(7), np.int32(3), np.str_("a")) == spawn(7, 3, "a")


@pytest.mark.parametrize("key", [1.0, None, True, ("a",)])
def test_bad_path(key: object) -> None:
    with pytest.raises(InputError, match=r"^path = .*: expected integers and strings"):
        spawn(0, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 1.0, True, None, "0"])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(InputError, match=r"^seed = "):
        spawn(seed)  # type: ignore[arg-type]


def test_generators_differ_by_path_and_repeat() -> None:
    assert (generator(0, "a").random(4) == generator(0, "a").random(4)).all()
    assert (generator(0, "a").random(4) != generator(0, "b").random(4)).all()
    draws = [torch.rand(4, generator=torch_generator(0, name)) for name in ("a", "a", "b")]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_no_global_generator_is_touched() -> None:
    broken = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(3, 3))
    states = (random.getstate(), np.random.get_state()[1].tobytes(), torch.random.get_rng_state())  # noqa: NPY002
    generator(0).random()
    torch.rand(1, generator=torch_generator(0))
    with pytest.raises(RuntimeError, match=r"shape"), isolated(0, "init"):
        broken(torch.ones(1, 4))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # noqa: NPY002
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_isolated_repeats_and_nests() -> None:
    with isolated(0, "a"):
        first, second = torch.rand(2), torch.rand(2)
    with isolated(0, "a"):
        again = torch.rand(2)
        with isolated(5):
            torch.rand(100)
        assert torch.equal(torch.rand(2), second)
    assert torch.equal(first, again)
