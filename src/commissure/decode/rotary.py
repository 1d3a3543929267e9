"""Rotary time: a pair of coordinates turned by an angle proportional to a time difference.

    R(t) x:  (x_{2f}, x_{2f+1}) -> (x_{2f} cos a - x_{2f+1} sin a, x_{2f} sin a + x_{2f+1} cos a),   a = 2 pi t / T_f

for the first 2F of the head's coordinates (F periods T_f, log-spaced from `t_min` to `t_max`), the others unturned.
Scores between a turned query and a turned key depend on the difference of their times alone, so only differences are
ever turned here: a float32 angle of an absolute time loses everything after a few hundred seconds.

Source: POSSM, arXiv 2506.05320 (as in POYO, arXiv 2310.16046); the angle is reduced to one turn in float64 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["RotaryTime"]


class RotaryTime(nn.Module):
    """The periods, kept in float64 whatever the model's dtype, and the angles of time differences.

    >>> RotaryTime(3, t_min=1e-2, t_max=1.0).periods
    tensor([0.0100, 0.1000, 1.0000], dtype=torch.float64)
    """

    periods: Tensor

    def __init__(self, n: int, *, t_min: float, t_max: float) -> None:
        super().__init__()
        periods = torch.logspace(math.log10(t_min), math.log10(t_max), n, dtype=torch.float64)
        self.register_buffer("periods", periods, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryTime:
        """Follow the device, not the dtype."""
        periods = self.periods
        super()._apply(fn, recurse)
        self.periods = periods.to(self.periods.device)
        return self

    def forward(
        self, time: Float[Tensor, "*shape"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*shape n"], Float[Tensor, "*shape n"]]:
        """Cosine and sine of 2 pi time / period; `time` in seconds (float64), reduced to one turn in float64."""
        turns = time.double().unsqueeze(-1) / self.periods
        angle = (2 * math.pi * (turns - turns.round())).to(dtype)
        return angle.cos(), angle.sin()
