"""Models for tests of sweeps: top-level, so that other processes can have them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from commissure.reservoirs.block_model import HierarchicalSBM
from commissure.reservoirs.block_tree import BlockTree
from commissure.reservoirs.connectome import Connectome

TREE = BlockTree.balanced(branching=2, depth=2, leaf_size=6)


def flat(seed: int) -> Connectome:
    return HierarchicalSBM(TREE, p_within=0.8, level=1).sample(seed)


@dataclass(frozen=True)
class Logged:
    """Leaves a file for every network it samples."""

    folder: str
    pause_s: float = 0.0
    failing_seed: int = -1
    interrupted_seed: int = -1

    def sample(self, seed: int) -> Connectome:
        time.sleep(self.pause_s)
        if seed == self.failing_seed:
            raise RuntimeError("no such network")
        if seed == self.interrupted_seed:
            signal.raise_signal(signal.SIGINT)
        Path(self.folder, f"{seed}.{os.getpid()}.{time.monotonic_ns()}").touch()
        return flat(seed)
