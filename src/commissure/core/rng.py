"""Randomness: one integer seed, children by path, no global generator ever touched.

A child seed depends on the parent and on the path of names alone, so results are the same for any number of workers
and any order of execution.  Children are drawn by numpy's `SeedSequence` (O'Neill's seed_seq design).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from commissure.core.errors import InputError

__all__ = ["generator", "isolated", "spawn", "torch_generator"]


def spawn(seed: int, *path: int | str) -> int:
    """Child seed (63 bits) of `seed` at `path`.

    >>> spawn(0, "init") == spawn(0, "init"), spawn(0, "init") == spawn(0, "dropout")
    (True, False)
    """
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise InputError("seed", seed, "an integer >= 0")
    words = [int.from_bytes(hashlib.sha256(repr(_plain(key)).encode()).digest()[:8], "little") for key in path]
    state = np.random.SeedSequence(int(seed), spawn_key=tuple(words)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def generator(seed: int, *path: int | str) -> np.random.Generator:
    """A numpy generator (PCG64) for the child of `seed` at `path`."""
    return np.random.default_rng(spawn(seed, *path))


def torch_generator(seed: int, *path: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the child of `seed` at `path`."""
    return torch.Generator(device=device).manual_seed(spawn(seed, *path))


@contextmanager
def isolated(seed: int, *path: int | str) -> Iterator[None]:
    """Run torch code that can only use the global generator (module initialization, dropout), then restore it.

    >>> before = torch.random.get_rng_state()
    >>> with isolated(0, "init"):
    ...     first = torch.rand(1)
    >>> with isolated(0, "init"):
    ...     second = torch.rand(1)
    >>> bool(first == second), bool((torch.random.get_rng_state() == before).all())
    (True, True)
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(spawn(seed, *path))
        yield


def _plain(key: object) -> int | str:
    """A path element as Python's own type: numpy's scalars have another repr, and would name another child."""
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return int(key)
    if isinstance(key, str):
        return str(key)
    raise InputError("path", key, "integers and strings")
