"""Parameters that weight decay leaves alone: a mark on each, carried over by name where parameters are replaced.

Loading a checkpoint, sharding a model or exchanging a table makes new parameters, without the mark.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

__all__ = ["exempt", "exempted"]


def exempted(module: nn.Module) -> frozenset[str]:
    """Names of the marked parameters, under every name they have.

    >>> linear = nn.Linear(2, 2)
    >>> exempt(linear, ["bias"])
    >>> sorted(exempted(linear))
    ['bias']
    """
    named = module.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if getattr(parameter, "_no_weight_decay", False))


def exempt(module: nn.Module, names: Collection[str]) -> None:
    """Mark the parameters of these names."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in names:
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
