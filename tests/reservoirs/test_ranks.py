"""Ranks of networks whose states are known, and the participation ratio of known covariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure.core.errors import DegenerateError, InputError
from commissure.core.moments import measure
from commissure.reservoirs.ranks import generalization_rank, kernel_rank, numerical_rank, participation_ratio
from commissure.reservoirs.reservoir import Reservoir

LINE = np.diag(np.ones(9), 1)


def delay_line(**keywords):
    return Reservoir(LINE, inputs=np.eye(10)[:1], spectral_radius=None, **keywords)


def test_numerical_rank_counts_singular_values_above_the_tolerance():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (40, 20))
    states = (left * 10.0 ** -np.arange(6)) @ right.T
    assert [numerical_rank(states, tolerance=t) for t in (0.5, 0.05, 5e-4, 5e-7)] == [1, 2, 4, 6]
    assert numerical_rank(1e4 * states, tolerance=0.05) == numerical_rank(1e-4 * states, tolerance=0.05) == 2
    assert numerical_rank(np.zeros((3, 3))) == 0


def test_a_delay_line_tells_as_many_inputs_apart_as_it_has_nodes():
    assert kernel_rank(delay_line(activation="linear")) == 10
    assert kernel_rank(delay_line(activation="linear"), n_patterns=4) == 4
    assert kernel_rank(delay_line(activation="linear"), length=6) == 6  # what came in so far


def test_versions_of_one_input_span_fewer_directions():
    """A contracting network forgets the noise of long ago: with small noise only the template's direction is left."""
    rng = np.random.default_rng(0)
    reservoir = Reservoir(
        rng.normal(size=(40, 40)), inputs=rng.normal(size=(1, 40)), spectral_radius=0.9, input_gain=0.5
    )
    ranks = [generalization_rank(reservoir, noise=noise) for noise in (0.0, 1e-4, 0.1)]
    assert ranks[0] == 1
    assert ranks[0] <= ranks[1] < ranks[2] < kernel_rank(reservoir)


def test_ranks_repeat_by_seed():
    reservoir = delay_line()
    assert kernel_rank(reservoir, seed=3) == kernel_rank(reservoir, seed=3)
    assert generalization_rank(reservoir, seed=3) == generalization_rank(reservoir, seed=3)


@pytest.mark.parametrize("variances", [[1.0, 1.0, 1.0], [4.0, 1.0, 0.25], [1.0, 0.0, 0.0]])
def test_participation_ratio_of_a_known_covariance(variances):
    s = np.array(variances)
    points = np.concatenate([np.diag(np.sqrt(s)), -np.diag(np.sqrt(s))])
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    expected = s.sum() ** 2 / (s**2).sum()
    for states in (points + 5.0, points @ rotation, measure(torch.from_numpy(points))):
        assert participation_ratio(states) == pytest.approx(expected, rel=1e-12)


def test_the_unbiased_participation_ratio_does_not_depend_on_the_number_of_samples():
    """Its two parts are unbiased: their means over many small samples are those of the covariance."""
    s = np.array([3.0, 2.0, 1.0, 1.0, 0.5])
    expected = s.sum() ** 2 / (s**2).sum()
    rng = np.random.default_rng(0)
    samples = [np.sqrt(s) * rng.normal(size=(60, 5)) for _ in range(400)]
    plain = [participation_ratio(x) for x in samples]
    unbiased = [participation_ratio(x, unbiased=True) for x in samples]
    assert expected - np.mean(plain) > 0.1
    assert abs(np.mean(unbiased) - expected) < 0.05


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: numerical_rank(np.eye(2), tolerance=0), "tolerance"),
        (lambda: numerical_rank(np.ones(3)), "states"),
        (lambda: kernel_rank(delay_line(), length=0), "length"),
        (lambda: kernel_rank(delay_line(), n_patterns=0), "n_patterns"),
        (lambda: generalization_rank(delay_line(), noise=-0.1), "noise"),
        (lambda: generalization_rank(delay_line(), noise=True), "noise"),
        (lambda: kernel_rank(delay_line(), length=10.0), "length"),
        (lambda: kernel_rank(delay_line(), n_patterns=True), "n_patterns"),
        (lambda: kernel_rank(LINE), "reservoir"),
        (lambda: numerical_rank(np.eye(2), tolerance="0.1"), "tolerance"),
        (lambda: numerical_rank([[1.0, np.inf]]), "states[0, 1]"),
        (lambda: participation_ratio("x"), "states"),
        (lambda: participation_ratio(np.ones(3)), "states"),
    ],
)
def test_bad_input_is_refused_by_name(call, argument):
    with pytest.raises(InputError) as raised:
        call()
    assert raised.value.argument == argument


def test_a_participation_ratio_needs_variance_and_samples():
    with pytest.raises(DegenerateError, match="no variance"):
        participation_ratio(np.ones((5, 2)))
    with pytest.raises(DegenerateError, match="at least 2"):
        participation_ratio(np.ones((1, 2)))
    with pytest.raises(DegenerateError, match="at least 4"):
        participation_ratio(np.eye(3), unbiased=True)
