"""Tasks: what the series hold, and that training and test series are independent."""

from __future__ import annotations

import numpy as np
import pytest

from commissure.core.errors import InputError
from commissure.reservoirs.tasks import ChaoticForecast, MemoryCapacity, Multitask, NonlinearTransform


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


def test_the_square_wave_is_the_target_not_the_sine():
    """Oracle 11: the published code overwrites the square wave with its input."""
    data = NonlinearTransform().data(0, "train")
    assert data.inputs.shape == data.targets.shape == (2100, 1)
    assert set(np.unique(data.targets)) == {-1.0, 1.0}
    correlation = np.corrcoef(data.targets[:, 0], data.inputs[:, 0])[0, 1]
    assert correlation < 0.95
    assert correlation == pytest.approx(2 * np.sqrt(2) / np.pi, abs=1e-3)  # of a sine and its sign


@pytest.mark.parametrize("n_cycles", [10, 20.0, 40])
def test_the_sine_has_as_many_cycles_as_asked(n_cycles):
    u = NonlinearTransform(n_cycles=n_cycles).data(1, "test").inputs[:, 0]
    power = np.abs(np.fft.rfft(u)) ** 2
    assert np.argmax(power) == n_cycles
    assert power[int(n_cycles)] > 0.999 * power.sum()


def test_phases_differ_between_seeds_and_splits():
    task = NonlinearTransform()
    first = [task.data(seed, split).inputs[0, 0] for seed in range(10) for split in ("train", "test")]
    assert len(set(first)) == 20
    assert min(first) < -0.5
    assert max(first) > 0.5


MODULES = [np.arange(50 * i, 50 * (i + 1)) for i in range(8)]


@pytest.mark.parametrize("n_inputs", [2, 4, 8])
@pytest.mark.parametrize("layout", ["aligned", "interleaved"])
def test_multitask_channels_are_half_memory_half_transform(n_inputs, layout):
    task = Multitask(n_inputs=n_inputs, layout=layout)
    data = task.data(0, "train")
    half = n_inputs // 2
    assert data.inputs.shape == (2100, n_inputs)
    assert data.targets.shape == (2100, task.n_outputs) == (2100, half * 16 + half)
    is_memory = [columns.size == 16 for columns in task.columns]
    aligned = [True] * half + [False] * half
    assert is_memory == (aligned if layout == "aligned" else [True, False] * half)
    cycles = []
    for channel, columns in enumerate(task.columns):
        u, y = data.inputs[:, channel], data.targets[:, columns]
        if is_memory[channel]:
            for k in range(1, 17):
                np.testing.assert_array_equal(y[k:, k - 1], u[:-k])
        else:
            np.testing.assert_array_equal(y[:, 0], np.where(u >= 0, 1.0, -1.0))
            cycles.append(int(np.argmax(np.abs(np.fft.rfft(u)))))
    assert cycles == [10, 20, 30, 40][:half]
    memory = data.inputs[:, is_memory]
    assert np.abs(np.corrcoef(memory.T) - np.eye(half)).max() < 4 / np.sqrt(2100)


def test_two_inputs_enter_one_module_of_each_half():
    task = Multitask(n_inputs=2)
    drawn = set()
    for seed in range(12):
        io = task.io(MODULES, seed=seed)
        driven = [int(nodes[0]) // 50 for nodes in io.inputs]
        drawn.add(tuple(driven))
        assert driven[0] < 4 <= driven[1]
        read = [int(nodes[0]) // 50 for nodes in io.outputs]
        assert read == [i for i in range(8) if i not in driven]
        assert [columns.tolist() for columns in io.targets] == [list(range(16))] * 3 + [[16]] * 3
    assert len(drawn) > 4


def test_four_inputs_enter_even_modules_and_are_read_next_door():
    task = Multitask(n_inputs=4, layout="interleaved")
    io = task.io(MODULES, seed=3)
    assert [nodes.tolist() for nodes in io.inputs] == [MODULES[i].tolist() for i in (0, 2, 4, 6)]
    assert [nodes.tolist() for nodes in io.outputs] == [MODULES[i].tolist() for i in (1, 3, 5, 7)]
    assert [columns.tolist() for columns in io.targets] == [columns.tolist() for columns in task.columns]


def test_eight_inputs_enter_one_node_of_each_module():
    task = Multitask(n_inputs=8)
    io = task.io(MODULES, seed=0)
    assert [nodes.size for nodes in io.inputs] == [1] * 8
    for module, driven, read in zip(MODULES, io.inputs, io.outputs, strict=True):
        assert sorted([*driven, *read]) == module.tolist()
        assert read.size == 49
    assert len({int(driven[0]) % 50 for driven in io.inputs}) > 3
    assert task.io(MODULES, seed=1).inputs[0] != io.inputs[0]


def test_multitask_groups_need_a_multiple_of_modules():
    with pytest.raises(InputError, match="multiple of n_inputs = 4"):
        Multitask(n_inputs=4).io(MODULES[:6])
    with pytest.raises(InputError, match=r"modules\[2\]"):
        Multitask(n_inputs=8).io([[0, 1], [2, 3], [4], *[[i, i + 1] for i in range(5, 15, 2)]])


@pytest.mark.parametrize("value", [True, 20.5, float("nan"), "20", None, [20]])
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (MemoryCapacity, ("max_delay", "length", "warmup")),
        (NonlinearTransform, ("length", "warmup")),
        (ChaoticForecast, ("horizon", "length", "warmup")),
        (Multitask, ("max_delay", "length", "warmup")),
    ],
)
def test_numbers_of_steps_are_integers(kind, names, value):
    for name in names:
        with pytest.raises(InputError) as raised:
            kind(**{name: value})
        assert raised.value.argument == name


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Multitask(n_inputs=3), "n_inputs"),
        (lambda: Multitask(layout="mixed"), "layout"),
        (lambda: Multitask(max_delay=200), "max_delay"),
        (lambda: NonlinearTransform(n_cycles=0), "n_cycles"),
        (lambda: NonlinearTransform(n_cycles=1050), "n_cycles"),
        (lambda: NonlinearTransform(warmup=-1), "warmup"),
        (lambda: NonlinearTransform(length=0), "length"),
        (lambda: ChaoticForecast(system="lorentz"), "system"),
        (lambda: ChaoticForecast(system="narma", horizon=2), "horizon"),
        (lambda: ChaoticForecast(horizon=0), "horizon"),
        (lambda: ChaoticForecast(length=0), "length"),
        (lambda: ChaoticForecast(warmup=-1), "warmup"),
        (lambda: ChaoticForecast(length=1, warmup=0), "length"),
        (lambda: ChaoticForecast(system=["lorenz"]), "system"),
        (lambda: Multitask(n_inputs=4.0), "n_inputs"),
        (lambda: Multitask(layout=None), "layout"),
        (lambda: Multitask().io(None), "modules"),
        (lambda: Multitask().io([[0], [1], [2.0], [3]]), "modules[2]"),
        (lambda: MemoryCapacity(first_delay=True), "first_delay"),
        (lambda: NonlinearTransform(n_cycles=float("nan")), "n_cycles"),
        (lambda: NonlinearTransform(n_cycles="10"), "n_cycles"),
    ],
)
def test_bad_settings_are_refused_by_name(make, argument):
    with pytest.raises(InputError) as raised:
        make()
    assert raised.value.argument == argument
