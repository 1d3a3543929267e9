"""Reservoirs: what does this network compute?  Hierarchical modular networks, connectomes, their nulls, their tasks.

    from commissure.reservoirs import HierarchicalSBM, IOMap, evaluate, module_r2
    from commissure.reservoirs.tasks import MemoryCapacity
    network = HierarchicalSBM.from_preset("milisav2025").sample(seed=0)
    io = IOMap.from_modules(network.modules(), inputs=[0])          # drive one module, read the others
    print(module_r2(evaluate(network, MemoryCapacity(), io=io, spectral_radius=[0.8, 1.0])))

Names load on first use, so that the command line shows its help without torch.  bioRxiv 2025.06.20.660760.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from commissure.reservoirs.block_model import HierarchicalSBM
    from commissure.reservoirs.block_tree import BlockTree
    from commissure.reservoirs.cells import ModuleInputs
    from commissure.reservoirs.communities import LouvainHierarchy, louvain_hierarchy
    from commissure.reservoirs.connectome import Connectome
    from commissure.reservoirs.datasets import hcp_s400, meg_timescales
    from commissure.reservoirs.dynamics import Lyapunov, Regime, lyapunov, regime
    from commissure.reservoirs.evaluation import ModuleScore, Score, evaluate, module_r2
    from commissure.reservoirs.io_map import IOMap
    from commissure.reservoirs.nulls import Rewired, RewireStatistics, rewire
    from commissure.reservoirs.readout import RidgeReadout
    from commissure.reservoirs.reservoir import Reservoir, ReservoirState
    from commissure.reservoirs.spectral import SpectralRadius, spectral_radius
    from commissure.reservoirs.spiking import LIFReservoir, LIFState
    from commissure.reservoirs.sweep import Sweep, SweepResult

# Where the names are.
_MODULES = (
    "connectome",
    "block_tree",
    "block_model",
    "communities",
    "datasets",
    "nulls",
    "spectral",
    "reservoir",
    "io_map",
    "readout",
    "evaluation",
    "dynamics",
    "cells",
    "sweep",
    "spiking",
)

__all__ = [
    "BlockTree",
    "Connectome",
    "HierarchicalSBM",
    "IOMap",
    "LIFReservoir",
    "LIFState",
    "LouvainHierarchy",
    "Lyapunov",
    "ModuleInputs",
    "ModuleScore",
    "Regime",
    "Reservoir",
    "ReservoirState",
    "RewireStatistics",
    "Rewired",
    "RidgeReadout",
    "Score",
    "SpectralRadius",
    "Sweep",
    "SweepResult",
    "evaluate",
    "hcp_s400",
    "louvain_hierarchy",
    "lyapunov",
    "meg_timescales",
    "module_r2",
    "regime",
    "rewire",
    "spectral_radius",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (importlib.import_module(f"commissure.reservoirs.{path}") for path in _MODULES)
        return next(getattr(module, name) for module in modules if name in module.__all__)
    raise AttributeError(f"module 'commissure.reservoirs' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
