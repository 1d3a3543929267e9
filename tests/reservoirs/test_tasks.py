"""Tasks: what the series hold, and that training and test series are independent."""

from __future__ import annotations

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.reservoirs.tasks import MemoryCapacity


def test_memory_targets_are_the_delayed_input():
    data = MemoryCapacity().data(3, "train")
    assert data.inputs.shape == (2100, 1)
    assert data.targets.shape == (2100, 16)
    assert data.warmup == 100
    for k in range(1, 17):
        np.testing.assert_array_equal(data.targets[k:, k - 1], data.inputs[:-k, 0])
        assert not data.targets[:k, k - 1].any()


def test_memory_delays_may_begin_at_zero():
    task = MemoryCapacity(first_delay=0, max_delay=3, length=10, warmup=5)
    data = task.data(0, "test")
    assert task.n_outputs == data.targets.shape[1] == 4
    np.testing.assert_array_equal(data.targets[:, 0], data.inputs[:, 0])


def test_memory_input_is_uniform():
    u = MemoryCapacity(length=20_000).data(0, "train").inputs[:, 0]
    assert -1 <= u.min() < -0.99
    assert 0.99 < u.max() <= 1
    assert abs(u.mean()) < 4 / np.sqrt(3 * u.size)
    assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 4 / np.sqrt(u.size)


def test_memory_series_of_seeds_and_splits_are_independent():
    task = MemoryCapacity(length=20_000)
    series = [task.data(seed, split).inputs[:, 0] for seed in (0, 1) for split in ("train", "test")]
    correlation = np.corrcoef(series) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(20_000)
    np.testing.assert_array_equal(series[0], task.data(0, "train").inputs[:, 0])


@pytest.mark.parametrize(
    ("keywords", "argument"),
    [
        ({"max_delay": 101}, "max_delay"),
        ({"max_delay": 0}, "max_delay"),
        ({"first_delay": 2}, "first_delay"),
        ({"length": 0}, "length"),
    ],
)
def test_memory_refuses_bad_settings(keywords, argument):
    with pytest.raises(InputError) as raised:
        MemoryCapacity(**keywords)
    assert raised.value.argument == argument


def test_tasks_refuse_an_unknown_split_and_a_bad_seed():
    with pytest.raises(InputError, match="split = 'valid'"):
        MemoryCapacity().data(0, "valid")
    with pytest.raises(InputError, match="seed = -1"):
        MemoryCapacity().data(-1, "train")
