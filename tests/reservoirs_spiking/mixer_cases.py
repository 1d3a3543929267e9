"""Spiking reservoirs under the laws: long steps and strong inputs, so that neurons fire within a few elements."""

from __future__ import annotations

import numpy as np
import torch

from commissure.core.rng import generator
from commissure.reservoirs.spiking import LIFReservoir


def reservoir(dim: int, **options: object) -> LIFReservoir:
    """Nine neurons, half of the pairs connected."""
    rng = generator(int(torch.randint(2**31, ())), "network")
    weights = rng.normal(size=(9, 9)) * (rng.random((9, 9)) < 0.5)
    np.fill_diagonal(weights, 0)
    settings = {"time_step": 5e-3, "refractory_period": 1e-2, "input_gain": 60.0, "weight_gain": 0.5, "seed": 3}
    return LIFReservoir(weights, inputs=dim, dtype=torch.float64, **{**settings, **options})


CASES = [
    ("lif-trace", lambda dim: reservoir(dim, inhibitory_fraction=0.2)),
    ("lif-spikes", lambda dim: reservoir(dim, output="spikes")),
    ("lif-single-exponential", lambda dim: reservoir(dim, synaptic_rise=0.0, refractory_period=0.0)),
]
