"""The configuration of a MetaHMM environment and its sizes by name.

| paper, section 1.1 of the generative process | name |
|---|---|
| states, tokens | `n_states`, `n_obs` |
| base cycles, their directions and strides | `base_cycles`, `base_directions`, `base_speeds` |
| families, groups to choose from, cycles in a group | `cycle_families`, `group_per_family`, `cycle_per_group` |
| directions and strides of all families together | `family_directions`, `family_speeds` |
| groups of states, edge sets to choose from, shifts | `emission_groups`, `emission_group_size`, `emission_shifts` |

arXiv 2506.16288.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, model_validator

from commissure.core.config import Config
from commissure.core.errors import InputError

__all__ = ["MetaHMMConfig"]


class MetaHMMConfig(Config):
    """Sizes of an environment; the defaults are the published class defaults (preset "default").

    The paper's runs use "small".  "tiny" can be enumerated, "e64" trains in minutes on a CPU.

    >>> config = MetaHMMConfig.from_preset("small")
    >>> config.n_transitions, config.n_emissions
    (512, 24)
    >>> MetaHMMConfig.from_preset("large")
    Traceback (most recent call last):
    commissure.core.errors.InputError: name = 'large': expected one of small, medium, default, tiny, e64
    """

    n_states: int = Field(default=30, ge=3, description="a cycle has at least 3 states")
    n_obs: int = Field(default=60, ge=1)
    base_cycles: int = Field(default=4, ge=1)
    base_directions: int = Field(default=2, ge=1, le=2)
    base_speeds: int = Field(default=3, ge=1)
    cycle_families: int = Field(default=4, ge=0)
    group_per_family: int = Field(default=2, ge=1)
    cycle_per_group: int = Field(default=3, ge=1)
    family_directions: int = Field(default=2, ge=1, le=2)
    family_speeds: int = Field(default=2, ge=1)
    emission_groups: int = Field(default=4, ge=1)
    emission_group_size: int = Field(default=2, ge=1, description="edge sets to choose from, not states")
    emission_shifts: int = Field(default=2, ge=1)
    emission_edge_per_node: int = Field(default=3, ge=0)
    emission_noise: float = Field(default=1e-5, ge=0, allow_inf_nan=False, description="added to every edge")

    @model_validator(mode="after")
    def _fits(self) -> MetaHMMConfig:
        if self.base_speeds >= self.n_states:
            allowed = f"below n_states = {self.n_states}: a stride of n_states stays in place"
            raise InputError("base_speeds", self.base_speeds, allowed)
        if self.emission_groups > self.n_states:
            raise InputError("emission_groups", self.emission_groups, f"at most n_states = {self.n_states}")
        largest = -(-self.n_states // self.emission_groups)
        if largest > self.n_obs:
            allowed = f"at least {largest}: each state of a group has a token of its own first"
            raise InputError("n_obs", self.n_obs, allowed, "pass more tokens or more emission_groups")
        return self

    @classmethod
    def from_preset(cls, name: str) -> MetaHMMConfig:
        """ "small" (all the paper's runs), "medium", "default", "tiny" or "e64"; an unknown name lists them."""
        if not isinstance(name, str) or name not in _PRESETS:
            raise InputError("name", name, f"one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])

    @property
    def transition_factors(self) -> dict[str, int]:
        """Name and number of values of every choice that decides A, most significant first."""
        groups = {f"family_{f}_group": self.group_per_family for f in range(self.cycle_families)}
        return {
            "base_cycle": self.base_cycles,
            "base_direction": self.base_directions,
            "base_speed": self.base_speeds,
            **groups,
            "family_direction": self.family_directions,
            "family_speed": self.family_speeds,
        }

    @property
    def emission_factors(self) -> dict[str, int]:
        """Name and number of values of every choice that decides E, most significant first."""
        groups = {f"emission_{g}_option": self.emission_group_size for g in range(self.emission_groups)}
        return {**groups, "emission_shift": self.emission_shifts}

    @property
    def n_transitions(self) -> int:
        """Number U of transition matrices."""
        return math.prod(self.transition_factors.values())

    @property
    def n_emissions(self) -> int:
        """Number W of emission matrices."""
        return math.prod(self.emission_factors.values())


_SMALL: dict[str, Any] = {
    "n_states": 20,
    "n_obs": 50,
    "base_speeds": 2,
    "cycle_families": 3,
    "emission_groups": 3,
    "emission_shifts": 3,
}
_FEW_FACTORS: dict[str, Any] = {
    "base_speeds": 1,
    "cycle_families": 1,
    "cycle_per_group": 1,
    "family_directions": 1,
    "family_speeds": 1,
    "emission_groups": 2,
    "emission_shifts": 1,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "small": _SMALL,
    "medium": {**_SMALL, "base_speeds": 3, "cycle_families": 4, "emission_groups": 4},
    "default": {},
    "tiny": {
        **_FEW_FACTORS,
        "n_states": 4,
        "n_obs": 6,
        "base_cycles": 2,
        "base_directions": 1,
        "emission_noise": 1e-2,  # so that short sequences from every task are possible under every other
    },
    "e64": {**_FEW_FACTORS, "n_states": 6, "n_obs": 10, "emission_edge_per_node": 2, "emission_noise": 1e-3},
}
