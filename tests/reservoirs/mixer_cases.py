"""Reservoirs under the laws: leak, bias, every kind of node, noise, rounded weights and states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from commissure.reservoirs.reservoir import Reservoir

NODES = 9


def reservoir(dim: int, **options: Any) -> Reservoir:
    """A random signed network of nine nodes; drawn by torch's generator, as the laws want it."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    weights = rng.normal(size=(NODES, NODES)) * (rng.random((NODES, NODES)) < 0.5)
    weights[0, 1] = weights[1, 0] = 1.0  # a cycle, so that there is a radius to scale
    return Reservoir(weights, inputs=dim, dtype=torch.float64, **options)


LEAKS = np.linspace(0.2, 1.0, NODES)
CASES = [
    ("reservoir-tanh", lambda dim: reservoir(dim)),
    ("reservoir-leaky-bias", lambda dim: reservoir(dim, leak=0.3, bias=0.2, spectral_radius=1.3)),
    ("reservoir-leak-per-node", lambda dim: reservoir(dim, leak=LEAKS, activation="elu")),
    ("reservoir-sigmoid", lambda dim: reservoir(dim, activation="sigmoid", bias=np.linspace(-1, 1, NODES))),
    ("reservoir-noise", lambda dim: reservoir(dim, state_noise=0.1, leak=0.5)),
    ("reservoir-quantized", lambda dim: reservoir(dim, weight_bits=4, state_bits=6)),
]
