"""Systems for the Mesa tests: random ones, and ill-conditioned ones with the spectra of trained heads."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOLVERS = ("cholesky", "block_rls", "cg", "sequential")


def problem(
    batch: int = 2,
    time: int = 23,
    heads: int = 2,
    dim: int = 4,
    value_dim: int = 3,
    *,
    seed: int = 0,
    sequences: int | None = None,
) -> list[Tensor]:
    """q, k, v, g, beta, lamb, h_kk, h_kv in float64; gates from 0.05 to 1, so that every solver's paths are taken."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    rows = batch if sequences is None else sequences
    q, k, v = (normal(batch, time, heads, width) for width in (dim, dim, value_dim))
    strength = torch.logspace(0, -3, heads, dtype=torch.float64)
    g = -3 * uniform(batch, time, heads) * strength
    root = normal(rows, heads, dim, dim)
    beta, lamb = uniform(batch, time, heads), 0.2 + uniform(heads, dim)
    return [q, k, v, g, beta, lamb, root @ root.mT, normal(rows, heads, dim, value_dim)]


def power_law(time: int, dim: int, *, gamma: float = 1.0, lamb: float = 0.25, seed: int = 0) -> list[Tensor]:
    """One head, unit keys and queries with spectrum 1/i, beta = 1: H + Lambda gets ever worse conditioned."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = 1 / torch.arange(1, dim + 1, dtype=torch.float64)
    draws = torch.randn(3, 1, time, 1, dim, generator=generator, dtype=torch.float64)
    q, k = (F.normalize(x * spectrum, dim=-1) for x in draws[:2])
    g = torch.full((1, time, 1), gamma, dtype=torch.float64).log()
    return [q, k, draws[2], g, torch.ones(1, time, 1, dtype=torch.float64), torch.full((1, dim), lamb).double()]


def dense(k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor | None = None) -> Tensor:
    """Every H_t + Lambda, (batch, time, heads, dim, dim): what no solver forms."""
    batch, time, heads, dim = k.shape
    h = k.new_zeros(batch, heads, dim, dim) if h_kk is None else h_kk
    found = []
    for t in range(time):
        h = g[:, t].exp()[..., None, None] * h + (beta[:, t, :, None] * k[:, t])[..., None] * k[:, t, :, None]
        found.append(h + torch.diag_embed(lamb))
    return torch.stack(found, 1)


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes held at once by tensors made inside, at most: every storage an operator returns, until it is freed."""
    meter = _Meter()
    with meter:
        yield lambda: meter.peak


class _Meter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self.watch(x.untyped_storage())
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return
        self.live[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.now -= self.live.pop(key)
