"""The filter of an HMM family under the laws, on tokens and on soft evidence."""

from __future__ import annotations

import torch

from commissure.metahmm.filter import HMMFilter


def family(dim: int, variants: int, states: int, emissions: int) -> HMMFilter:
    """A random family over `dim` tokens."""
    initial, transitions, emission, prior = (
        torch.rand(shape, dtype=torch.float64).pow(2).add(1e-3)
        for shape in ((states,), (variants, states, states), (emissions, states, dim), (variants * emissions,))
    )
    rows = (x / x.sum(-1, keepdim=True) for x in (initial, transitions, emission))
    return HMMFilter(*rows, prior=prior / prior.sum())


def tokens(generator: torch.Generator, batch: int, time: int, dim: int) -> torch.Tensor:
    """One-hot rows."""
    index = torch.randint(dim, (batch, time), generator=generator)
    return torch.nn.functional.one_hot(index, dim).double()


def evidence(generator: torch.Generator, batch: int, time: int, dim: int) -> torch.Tensor:
    """Likelihoods of noisy observations."""
    return torch.rand(batch, time, dim, generator=generator, dtype=torch.float64) + 0.05


CASES = [
    ("hmm-filter-tokens", lambda dim: family(dim, 3, 4, 2)),
    ("hmm-filter-evidence", lambda dim: family(dim, 2, 5, 3)),
    ("hmm-filter-single", lambda dim: family(dim, 1, 3, 1)),
]
INPUTS = {"hmm-filter-tokens": tokens, "hmm-filter-evidence": evidence, "hmm-filter-single": evidence}
