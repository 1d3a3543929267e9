"""Test-time compute: how hard every Mesa layer of a model solves its systems, set from outside.

    x_k -> (H + Lambda)^-1 q     k conjugate gradient steps, or as many as ||r_k|| <= eps ||r_0|| takes

A trained MesaNet keeps most of its quality with fewer steps; fixed steps hurt late tokens most, a relative epsilon
hurts all alike.  von Oswald et al., arXiv 2506.05233, section 5.
"""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple

from torch import nn

from commissure.core.errors import InputError
from commissure.nn.mesa import MesaLayer

__all__ = ["Undo", "set_test_time_compute"]


class Settings(NamedTuple):
    """A layer's solver before the call."""

    solver: str
    max_cg_steps: int
    cg_eps: float


class Undo:
    """What `set_test_time_compute` returns: leaving its `with` block, or `restore()`, undoes the call."""

    def __init__(self, before: list[tuple[MesaLayer, Settings]]) -> None:
        self._before = before

    def restore(self) -> None:
        """Give every layer the settings it had."""
        for layer, settings in self._before:
            _apply(layer, settings)

    def __enter__(self) -> Undo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()


def set_test_time_compute(model: nn.Module, *, eps: float | None = None, steps: int | None = None) -> Undo:
    """Let every `MesaLayer` in `model` solve by conjugate gradients, from now on or within a `with` block.

    `steps` alone: exactly so many.  `eps` alone: until the residual has fallen by this factor, at most the layer's
    `max_cg_steps`.  Both: until then, at most `steps`.  A model without Mesa layers, and neither of the two given,
    raise `InputError`.

    >>> layer = MesaLayer(8, heads=2, head_dim=4)
    >>> with set_test_time_compute(layer, steps=5):
    ...     print(layer.solver, layer.max_cg_steps)
    cg 5
    >>> layer.solver, layer.max_cg_steps
    ('auto', 30)
    """
    if eps is None and steps is None:
        raise InputError("eps, steps", (None, None), "at least one of them", "pass eps=1e-4 or steps=10")
    if eps is not None and not (isinstance(eps, int | float) and 0 < eps < 1):
        raise InputError("eps", eps, "a number in (0, 1), relative to the first residual")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise InputError("steps", steps, "an integer >= 0")
    layers = [module for module in model.modules() if isinstance(module, MesaLayer)]
    if not layers:
        raise InputError("model", type(model).__name__, "a module with at least one MesaLayer inside")
    before = [(layer, Settings(layer.solver, layer.max_cg_steps, layer.cg_eps)) for layer in layers]
    for layer, settings in before:
        _apply(layer, Settings("cg", settings.max_cg_steps if steps is None else steps, 0.0 if eps is None else eps))
    return Undo(before)


def _apply(layer: MesaLayer, settings: Settings) -> None:
    layer.solver, layer.max_cg_steps, layer.cg_eps = settings
