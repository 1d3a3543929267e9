"""What the reservoir claims share: networks of eight modules, their settings, the memory of one.

Every network of one seed has the same input series and the same driven module, so networks are compared in pairs.  The
seeds are not those with which the gates were chosen.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.cells import ModuleInputs
from commissure.reservoirs.connectome import Connectome
from commissure.reservoirs.evaluation import evaluate, module_r2
from commissure.reservoirs.io_map import IOMap
from commissure.reservoirs.moments import IllConditionedWarning
from commissure.reservoirs.tasks import MemoryCapacity

__all__ = ["FIRST_SEED", "RADII", "SETTINGS", "TASK", "Setting", "block_model", "memory"]

RADII = (0.6, 0.8, 1.0, 1.2, 1.4)
FIRST_SEED = 100
TASK = MemoryCapacity(max_delay=16, length=2000, warmup=100)


class Setting(NamedTuple):
    """Factor of the input, penalty of the readout, share of the edges removed."""

    input_gain: float
    penalty: float
    prune: float


SETTINGS: Mapping[str, Setting] = {
    "inferred": Setting(0.25932, 1.3454e-10, 0.36),  # from the published counts of cycles and the default search
    "gain1": Setting(1.0, 1.3454e-10, 0.36),
    "default": Setting(1.0, 1.0, 0.0),  # what the published program does when told nothing
}


def block_model(level: int, *, prune: float) -> HierarchicalSBM:
    """8 modules of 50 nodes with `level` levels of hierarchy, 0 a random network; the edges expected are the same."""
    return HierarchicalSBM(BlockTree.balanced(), level=level, prune=prune)


def memory(
    network: Connectome,
    seed: int,
    *,
    input_gain: float,
    penalties: float | Sequence[float],
    io: Sequence[IOMap] | None = None,
    radii: Sequence[float] = RADII,
    read_noise: Sequence[float] = (0.0,),
    read_bits: Sequence[int | None] = (None,),
    dtype: torch.dtype = torch.float64,
) -> dict[tuple[float, int | None], Float[np.ndarray, " radii"]]:
    """Mean R^2 over delays, modules read and maps, at every radius; by (noise, bits) of the states read.

    Without `io` one module of the network, drawn by `seed`, is driven, and every other one read.
    """
    io = io or ModuleInputs()(network, seed)
    with warnings.catch_warnings():  # the published penalty is too small for some Gram matrices: solved from states
        warnings.simplefilter("ignore", IllConditionedWarning)
        scores = evaluate(
            network,
            TASK,
            io=io,
            spectral_radius=radii,
            input_gain=input_gain,
            penalties=penalties,
            read_noise=read_noise,
            read_bits=read_bits,
            seed=seed,
            dtype=dtype,
        )
    found: dict[tuple[float, int | None], list[float]] = {}
    for row in module_r2(scores):
        found.setdefault((row.read_noise, row.read_bits), []).append(row.score)
    return {condition: np.array(values) for condition, values in found.items()}
