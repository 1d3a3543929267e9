"""The geometry of a reservoir's states: kernel rank and participation ratio are functions of their spectrum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from commissure import geometry
from commissure.core.rng import generator
from commissure.reservoirs import ranks
from commissure.reservoirs.reservoir import Reservoir

NODES, LENGTH = 12, 40


def final_states(spectral_radius: float) -> tuple[Reservoir, torch.Tensor]:
    """A reservoir and its states after the inputs that its kernel rank is asked with."""
    weights = np.random.default_rng(0).normal(size=(NODES, NODES))
    reservoir = Reservoir(weights, spectral_radius=spectral_radius, dtype=torch.float64)
    drawn = generator(0, "kernel rank").uniform(-1, 1, (NODES, LENGTH, reservoir.n_inputs))
    return reservoir, reservoir(torch.from_numpy(drawn))[0][:, -1]


@pytest.mark.parametrize("spectral_radius", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-5])
def test_the_kernel_rank_counts_eigenvalues_of_the_states(spectral_radius: float, tolerance: float) -> None:
    reservoir, states = final_states(spectral_radius)
    values = geometry.spectrum(states, center=False).values
    counted = int((values > tolerance**2 * values[0]).sum())
    assert ranks.kernel_rank(reservoir, length=LENGTH, tolerance=tolerance) == counted


def test_kernel_ranks_of_these_reservoirs_differ() -> None:
    found = [ranks.kernel_rank(final_states(radius)[0], length=LENGTH, tolerance=1e-3) for radius in (0.1, 0.4, 0.9)]
    assert found[0] < found[1] <= found[2] <= NODES


@pytest.mark.parametrize("unbiased", [False, True])
def test_both_participation_ratios_are_one(unbiased: bool) -> None:
    _, states = final_states(0.9)
    expected = geometry.participation_ratio(states, unbiased=unbiased)
    assert abs(ranks.participation_ratio(states.numpy(), unbiased=unbiased) / expected - 1) <= 1e-10
