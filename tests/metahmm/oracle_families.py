"""Random families of HMMs for the oracle's tests, and their tasks one by one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Family(NamedTuple):
    """What `BayesOracle` reads."""

    initial: Tensor
    transitions: Tensor
    emissions: Tensor

    def tasks(self) -> tuple[Tensor, Tensor, Tensor]:
        """Initial distribution, transition and emission matrix of every task."""
        variants, kinds = len(self.transitions), len(self.emissions)
        return (
            self.initial.expand(variants * kinds, -1),
            self.transitions.repeat_interleave(kinds, 0),
            self.emissions.repeat(variants, 1, 1),
        )

    def sample(self, tasks: Tensor, time: int, *, seed: int) -> Tensor:
        """One sequence of each task."""
        generator = torch.Generator().manual_seed(seed)
        _, transition, emission = self.tasks()
        hidden = torch.multinomial(self.initial.expand(len(tasks), -1), 1, generator=generator)[:, 0]
        tokens = []
        for _ in range(time):
            tokens.append(torch.multinomial(emission[tasks, hidden], 1, generator=generator)[:, 0])
            hidden = torch.multinomial(transition[tasks, hidden], 1, generator=generator)[:, 0]
        return torch.stack(tokens, 1) if tokens else torch.empty(len(tasks), 0, dtype=torch.int64)


def normalized(x: Tensor) -> Tensor:
    """Rows that sum to one."""
    return x / x.sum(-1, keepdim=True)


def draw_family(
    variants: int, states: int, emissions: int, vocab: int, *, seed: int = 0, zeros: float = 0.5, sharp: int = 4
) -> Family:
    """Transitions with about `zeros` of their entries zero (no row empty), emissions far from flat, any start."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    transitions = uniform(variants, states, states) * (uniform(variants, states, states) > zeros)
    transitions = transitions + torch.eye(states, dtype=torch.float64)[torch.randperm(states, generator=generator)]
    emission = uniform(emissions, states, vocab) ** sharp + 1e-3
    return Family(normalized(uniform(states)), normalized(transitions), normalized(emission))


def draw_prior(n: int, *, seed: int = 0) -> Tensor:
    """A prior far from uniform."""
    return normalized(torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3 + 1e-3)
