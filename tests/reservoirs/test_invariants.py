"""What no measure of a reservoir may depend on: the order of nodes, the sign of the input, who computes it."""

from __future__ import annotations

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commissure.reservoirs.capacity import information_processing_capacity, memory_capacity
from commissure.reservoirs.dynamics import lyapunov
from commissure.reservoirs.evaluation import evaluate
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.ranks import kernel_rank, participation_ratio
from commissure.reservoirs.reservoir import Reservoir
from commissure.reservoirs.tasks import ChaoticForecast, MemoryCapacity, Multitask, NonlinearTransform
from commissure.reservoirs.timescales import timescales

seeds = st.integers(0, 2**31)
few = settings(max_examples=12, deadline=None)
TASKS = (
    MemoryCapacity(max_delay=4, length=60, warmup=10),
    NonlinearTransform(n_cycles=4, length=60, warmup=10),
    Multitask(n_inputs=8, layout="interleaved", max_delay=4, length=200, warmup=10),
    *(ChaoticForecast(system=name, length=60, warmup=10) for name in ("lorenz", "henon", "mackey_glass", "narma")),
)


def problem(seed, n=24):
    """A signed network, a permutation of its nodes and an input."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.4)
    np.fill_diagonal(weights, 0.0)
    return weights, rng.permutation(n), rng.uniform(-1, 1, (400, 1))


def reservoir_of(weights, driven, **keywords):
    inputs = np.isin(np.arange(len(weights)), driven)[None].astype(float)
    return Reservoir(weights, inputs=inputs, spectral_radius=0.9, dtype=torch.float64, **keywords)


def states_of(reservoir, u):
    return reservoir(torch.from_numpy(u)[None])[0][0].numpy()


@few
@given(seed=seeds)
def test_scores_follow_the_nodes_when_they_are_renumbered(seed):
    weights, order, _ = problem(seed)
    new = np.argsort(order)  # where each old node is now
    io = IOMap(inputs=([0, 1, 2, 3],), outputs=([5, 6, 7, 8], [9, 11, 13]))
    moved = IOMap(inputs=(new[io.inputs[0]],), outputs=tuple(new[nodes] for nodes in io.outputs))
    task = MemoryCapacity(max_delay=3, length=200, warmup=20)
    keywords = {"penalties": 1e-3, "spectral_radius": [0.6, 1.1], "seed": seed % 1000, "dtype": torch.float64}
    first = evaluate(weights, task, io=io, **keywords)
    second = evaluate(weights[order][:, order], task, io=moved, **keywords)
    np.testing.assert_allclose([s.score for s in first], [s.score for s in second], atol=1e-9)
    np.testing.assert_allclose([s.capacity for s in first], [s.capacity for s in second], atol=1e-9)


@few
@given(seed=seeds)
def test_measures_follow_the_nodes_when_they_are_renumbered(seed):
    weights, order, u = problem(seed)
    driven = np.arange(6)
    first = reservoir_of(weights, driven)
    second = reservoir_of(weights[order][:, order], np.argsort(order)[driven])
    x, y = states_of(first, u), states_of(second, u)
    np.testing.assert_allclose(y, x[:, order], atol=1e-12)
    np.testing.assert_allclose(timescales(y).values, timescales(x).values[order], rtol=1e-6)
    assert participation_ratio(y) == pytest.approx(participation_ratio(x), rel=1e-9)
    # measured states, so that capacities do not hang on directions of the size of rounding
    noise = 1e-3 * np.random.default_rng(seed).normal(size=x.shape)
    np.testing.assert_allclose(
        memory_capacity(y + noise[:, order], u, max_delay=6), memory_capacity(x + noise, u, max_delay=6), atol=1e-9
    )
    whole = [lyapunov(reservoir, u, k=24, seed=1).exponents.sum() for reservoir in (first, second)]
    if np.isfinite(whole).all():
        assert whole[0] == pytest.approx(whole[1], rel=1e-9)
    assert kernel_rank(first) == kernel_rank(second)


@few
@given(seed=seeds, leak=st.floats(0.2, 1.0))
def test_measures_do_not_see_the_sign_of_the_input(seed, leak):
    """Without a bias, -u gives -x."""
    weights, _, u = problem(seed)
    reservoir = reservoir_of(weights, np.arange(6), leak=leak)
    x, y = states_of(reservoir, u), states_of(reservoir, -u)
    np.testing.assert_array_equal(x, -y)
    np.testing.assert_allclose(timescales(y).values, timescales(x).values, rtol=1e-12)
    np.testing.assert_allclose(memory_capacity(y, -u, max_delay=4), memory_capacity(x, u, max_delay=4), atol=1e-9)
    processed = [information_processing_capacity(s, v, max_delays=[3, 2]).total for s, v in ((x, u), (y, -u))]
    assert processed[0] == pytest.approx(processed[1], abs=1e-6)
    np.testing.assert_allclose(lyapunov(reservoir, -u).exponents, lyapunov(reservoir, u).exponents, rtol=1e-12)


@few
@given(seed=seeds)
def test_the_scale_and_units_of_states_do_not_matter(seed):
    weights, _, u = problem(seed)
    x = states_of(reservoir_of(weights, np.arange(6)), u)
    assert participation_ratio(1e3 * x + 7.0) == pytest.approx(participation_ratio(x), rel=1e-6)
    np.testing.assert_allclose(
        memory_capacity(4.0 * x + 0.5, u, max_delay=4), memory_capacity(x, u, max_delay=4), atol=1e-6
    )


def test_the_sweeps_exponent_is_the_exponent():
    """`evaluate` carries one tangent in float32 beside its rows; `lyapunov` carries its own."""
    weights, _, _ = problem(5, n=40)
    task, io = MemoryCapacity(max_delay=3, length=1500, warmup=100), IOMap(inputs=(np.arange(6),), outputs=([9, 10],))
    for radius in (0.5, 0.9, 1.4):
        (row,) = evaluate(weights, task, io=io, spectral_radius=radius, penalties=1e-3, lyapunov=True, seed=3)
        reservoir = Reservoir(weights, inputs=io.input_weights(40), spectral_radius=radius, dtype=torch.float64)
        found = lyapunov(reservoir, task.data(3, "train").inputs, warmup=100)
        assert row.lyapunov == pytest.approx(found.exponents[0], abs=max(3e-3, 3 * found.standard_errors[0]))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: getattr(task, "system", type(task).__name__))
@few
@given(seed=seeds)
def test_a_series_depends_on_its_seed_and_split_alone(task, seed):
    first = task.data(seed, "train")
    task.data(seed + 1, "train"), task.data(seed, "test")  # neither moves the other's random numbers
    again = pickle.loads(pickle.dumps(task)).data(np.int64(seed), "train")
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.inputs, task.data(seed, "test").inputs)
    assert not np.array_equal(first.inputs, task.data(seed + 1, "train").inputs)


@few
@given(seed=seeds, max_delay=st.integers(1, 10))
def test_the_input_is_the_same_for_every_number_of_delays(seed, max_delay):
    """So that scores of different delays are paired."""
    base = MemoryCapacity(max_delay=3, length=50, warmup=10)
    other = replace(base, max_delay=max_delay)
    np.testing.assert_array_equal(base.data(seed, "test").inputs, other.data(seed, "test").inputs)


def test_series_are_the_same_for_any_number_of_workers():
    jobs = [(task, seed, split) for task in TASKS for seed in (0, 1) for split in ("train", "test")]
    expected = [series(job) for job in jobs]
    spawn = multiprocessing.get_context("spawn")
    order = np.random.default_rng(0).permutation(len(jobs))
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        found = list(pool.map(series, [jobs[i] for i in order]))
    assert found == [expected[i] for i in order]


def series(job):
    """The bytes of a series (at the top of the module: workers import it)."""
    task, seed, split = job
    data = task.data(seed, split)
    return data.inputs.tobytes(), data.targets.tobytes(), data.warmup
