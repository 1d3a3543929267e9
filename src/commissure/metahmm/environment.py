"""Families of hidden Markov models assembled from shared blocks: the tasks of MetaHMM.

    A_u = rows of  base[b, dir, speed] + sum_f family[f, g_f, fdir, fspeed]          normalized
    E_w = rows of  sum_h emission[h, o_h, shift] + noise                             normalized
    z_1 ~ uniform,   x_t ~ E_w[z_t],   z_{t+1} ~ A_u[z_t]

| paper | name |
|---|---|
| theta, a task | task id `u * n_emissions + w`, row-major over `factor_names` |
| A_u, E_w, pi | `transitions[u]`, `emissions[w]`, `initial` |

`variant="corrected"` (the default) is the published description.  `variant="reference"` is what the published code
makes of it: the blocks with its defects (see `blocks`) and both tables rounded to half precision, so that rows sum to
1 within 2.5e-4 only.  The sampler draws from the normalized rows.  arXiv 2506.16288.
"""

from __future__ import annotations

import hashlib
from functools import cached_property, reduce

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from commissure.core.errors import InputError
from commissure.metahmm.blocks import Blocks, Variant, draw_blocks
from commissure.metahmm.config import MetaHMMConfig
from commissure.metahmm.factors import Factors, FactorSpace, Split
from commissure.metahmm.inputs import Ids, whole
from commissure.metahmm.sample import Sampler, Sequences

__all__ = ["MetaHMM", "MetaHMMConfig"]


class MetaHMM:
    """An environment: U transition and W emission matrices, one task for each pair of them.

    Attributes, float64: `initial` (states,), `transitions` (U, states, states), `emissions` (W, states, tokens); and
    `config`, `seed`, `variant`, `n_states`, `n_obs`, `n_transitions`, `n_emissions`, `n_tasks`, `factor_names`,
    `factor_sizes`.

    >>> env = MetaHMM.from_preset("e64", seed=0)
    >>> env.n_tasks, tuple(env.transitions.shape), tuple(env.emissions.shape)
    (64, (16, 6, 6), (4, 6, 10))
    >>> env.sample([3, 60], 8, seed=0).tokens.shape
    torch.Size([2, 8])
    """

    def __init__(self, config: MetaHMMConfig, *, seed: int, variant: Variant = "corrected") -> None:
        if not isinstance(variant, str) or variant not in ("corrected", "reference"):
            raise InputError("variant", variant, "'corrected' or 'reference'")
        if not isinstance(config, MetaHMMConfig):
            raise InputError("config", config, "a MetaHMMConfig", "for a named one: MetaHMM.from_preset(name, seed=0)")
        seed = whole("seed", seed, 0)
        self.config, self.seed, self.variant = config, seed, variant
        self.n_states, self.n_obs = config.n_states, config.n_obs
        self.n_transitions, self.n_emissions = config.n_transitions, config.n_emissions
        self.n_tasks = self.n_transitions * self.n_emissions
        self._factors = FactorSpace(config.transition_factors | config.emission_factors)
        self.factor_names, self.factor_sizes = self._factors.names, self._factors.sizes
        blocks = draw_blocks(config, seed=seed, variant=variant)
        self.digest = _digest(config, seed, variant, blocks)
        dtype = np.float64 if variant == "corrected" else np.float16
        self.initial = torch.full((self.n_states,), 1 / self.n_states, dtype=torch.float64)
        self.transitions = _stored(_transitions(blocks), dtype)
        self.emissions = _stored(_emissions(blocks, config.emission_noise), dtype)

    @classmethod
    def from_preset(cls, name: str, *, seed: int, variant: Variant = "corrected") -> MetaHMM:
        """ "small" (all the paper's runs), "medium", "default", "tiny" or "e64"; an unknown name lists them."""
        return cls(MetaHMMConfig.from_preset(name), seed=seed, variant=variant)

    def __repr__(self) -> str:
        sizes = f"n_tasks={self.n_tasks}, n_states={self.n_states}, n_obs={self.n_obs}"
        return f"MetaHMM({sizes}, seed={self.seed}, variant={self.variant!r})"

    @property
    def task_ids(self) -> Int64[Tensor, " tasks"]:
        """All task ids."""
        return torch.arange(self.n_tasks)

    def check_tasks(self, argument: str, ids: Ids) -> Int64[Tensor, " n"]:
        """Task ids as a tensor (n,); anything else, or an unknown id, raises `InputError` that names `argument`."""
        return self._factors.check_ids(argument, ids)

    def task_to_factors(self, ids: Ids) -> Int64[Tensor, "n factors"]:
        """Factor values of tasks, columns as in `factor_names`."""
        return self._factors.to_factors(ids)

    def factors_to_task(self, factors: Factors) -> Int64[Tensor, " n"]:
        """Task ids of factor values."""
        return self._factors.to_ids(factors)

    def split(self, n_val: int, *, seed: int, n_held_out_pairs: int = 0) -> Split:
        """Disjoint ids of training, validation and out-of-distribution tasks; see `FactorSpace.split`."""
        return self._factors.split(n_val, seed=seed, n_held_out_pairs=n_held_out_pairs)

    def transition_matrix(self, ids: Ids) -> Float64[Tensor, "n states states"]:
        """A of each task."""
        return self.transitions[self.check_tasks("ids", ids) // self.n_emissions]

    def emission_matrix(self, ids: Ids) -> Float64[Tensor, "n states tokens"]:
        """E of each task."""
        return self.emissions[self.check_tasks("ids", ids) % self.n_emissions]

    def sample(
        self,
        task_ids: Ids,
        length: int | tuple[int, int],
        *,
        seed: int,
        switch_to: Ids | None = None,
        switch_at: int | tuple[int, int] | None = None,
    ) -> Sequences:
        """One sequence of each task, from a uniform start; see `Sampler.sample`."""
        ids = self.check_tasks("task_ids", task_ids)
        to = None if switch_to is None else self.check_tasks("switch_to", switch_to)
        return self._sampler.sample(ids, length, seed=seed, switch_to=to, switch_at=switch_at)

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.initial.numpy(), self.transitions.numpy(), self.emissions.numpy())


def _transitions(blocks: Blocks) -> np.ndarray:
    """(U, states, states): every base cycle with every choice of a group in each family."""
    n_families, n_groups, *directed = blocks.family.shape
    n_states = blocks.base.shape[-1]
    base = blocks.base.reshape(*blocks.base.shape[:3], *[1] * (n_families + 2), n_states, n_states)
    family = np.zeros((*[1] * n_families, *directed[:2], n_states, n_states), np.int64)
    for f, block in enumerate(blocks.family):
        axes = [n_groups if axis == f else 1 for axis in range(n_families)]
        family = family + block.reshape(*axes, *directed)
    counts = (base + family).reshape(-1, n_states, n_states)
    totals = counts.sum(-1, keepdims=True)
    if not totals.all():
        fix = "pass variant='corrected', or speeds that divide n_states"
        raise InputError("base_speeds", blocks.base.shape[2], "strides that leave every state a successor", fix)
    return counts / totals


def _emissions(blocks: Blocks, noise: float) -> np.ndarray:
    """(W, states, tokens): every choice of an option in each group, at every shift."""
    n_groups, n_options, *shifted = blocks.emission.shape
    edges = reduce(
        np.add,
        (
            block.reshape(*[n_options if axis == g else 1 for axis in range(n_groups)], *shifted)
            for g, block in enumerate(blocks.emission)
        ),
    )
    weights = edges.reshape(-1, *shifted[1:]) + noise
    return weights / weights.sum(-1, keepdims=True)


def _stored(table: np.ndarray, dtype: type[np.floating]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table.astype(dtype).astype(np.float64)))


def _digest(config: MetaHMMConfig, seed: int, variant: Variant, blocks: Blocks) -> str:
    """SHA-256 of the configuration, the seed, the variant and the blocks drawn: numpy's streams may change."""
    sha = hashlib.sha256(f"{config.model_dump_json()} {seed} {variant}".encode())
    for block in blocks:
        sha.update(block.astype("<i8").tobytes())
    return sha.hexdigest()
