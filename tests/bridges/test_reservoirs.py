"""A reservoir's readout is the ridge of the core, recursive least squares, and a Mesa layer that reads its states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.core import moments
from commissure.core.lsq import RecursiveLeastSquares, effective_dof, ridge, ridge_from_moments
from commissure.nn.mesa import mesa_attention
from commissure.reservoirs.moments import ReadoutFactor, ReadoutMoments, joint_columns
from commissure.reservoirs.readout import RidgeReadout
from commissure.reservoirs.reservoir import Reservoir
from commissure.reservoirs.tasks import MemoryCapacity

TOLERANCE = 1e-10
PENALTY, NODES = 0.3, 12


@pytest.fixture(scope="module")
def series() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training states and targets of a reservoir that remembers, and test states."""
    task = MemoryCapacity(max_delay=3, length=60, warmup=10)
    weights = np.random.default_rng(0).normal(size=(NODES, NODES))
    reservoir = Reservoir(weights, spectral_radius=0.9, dtype=torch.float64)
    train, test = task.data(0, "train"), task.data(0, "test")
    states = [reservoir(torch.from_numpy(data.inputs)[None])[0][0, data.warmup :].numpy() for data in (train, test)]
    return states[0], train.targets[train.warmup :], states[1]


def assert_same(a: np.ndarray, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) <= TOLERANCE * np.max(np.abs(b))


@pytest.mark.parametrize("solver", ["sequential", "cholesky", "block_rls", "cg"])
def test_a_mesa_layer_that_reads_the_states_is_the_readout(series: tuple[np.ndarray, ...], solver: str) -> None:
    """Keys are training states, values their targets; test states only ask: their input gate is 0."""
    x, y, u = series
    length, asked = len(x), len(u)
    states = np.concatenate([x, u])[None, :, None]
    values = np.concatenate([y, np.zeros((asked, y.shape[1]))])[None, :, None]
    learn = np.concatenate([np.ones(length), np.zeros(asked)])[None, :, None]
    rows = [torch.from_numpy(array) for array in (states, states, values, np.zeros_like(learn), learn)]
    lamb = torch.full((1, NODES), PENALTY, dtype=torch.float64)
    options = {"max_cg_steps": 8 * NODES} if solver == "cg" else {}
    answers = mesa_attention(*rows, lamb, solver=solver, **options).output[0, length:, 0].numpy()
    assert_same(answers, RidgeReadout(PENALTY).fit(x, y).predict(u))


def test_streamed_moments_and_factors_are_the_ridge_of_all_rows(series: tuple[np.ndarray, ...]) -> None:
    x, y, _ = series
    expected = ridge(x, y, penalty=PENALTY, intercept=False)
    for kind in (ReadoutMoments, ReadoutFactor):
        held = kind.empty((), n_features=NODES, n_outputs=y.shape[1])
        for start in range(0, len(x), 13):
            a, b = (torch.from_numpy(rows[start : start + 13].T.copy()) for rows in (x, y))
            held = held.update(joint_columns(a, b))
        path = held.path([PENALTY])
        assert_same(path.coefficients[0], expected.coefficients)
        assert path.effective_dof[0] == pytest.approx(expected.effective_dof, rel=TOLERANCE)
        assert path.effective_dof[0] == pytest.approx(effective_dof(np.linalg.eigvalsh(x.T @ x), PENALTY))


def test_an_intercept_is_that_of_centered_moments(series: tuple[np.ndarray, ...]) -> None:
    x, y, u = series
    joint = moments.measure(torch.from_numpy(np.hstack([x, y])))
    readout = RidgeReadout(PENALTY, intercept=True).fit(x, y)
    assert_same(readout.predict(u), ridge_from_moments(joint, NODES, penalty=PENALTY).predict(u))


def test_recursive_least_squares_learns_the_readout_online(series: tuple[np.ndarray, ...]) -> None:
    x, y, u = series
    rls = RecursiveLeastSquares(n_features=NODES, n_outputs=y.shape[1], penalty=PENALTY)
    state = rls.init_state()
    for x_t, y_t in zip(x, y, strict=True):
        state = rls.update(state, x_t, y_t)
    assert_same(rls.predict(state, u), RidgeReadout(PENALTY).fit(x, y).predict(u))
