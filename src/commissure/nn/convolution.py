"""Short causal depthwise convolution: each channel mixes its own last `width` inputs.

    y_t = b + sum_{j < width} w_j x_{t - width + 1 + j}          per channel; w_{width-1} weighs the newest input

The inputs before a stretch are part of the caller's state: the last width - 1 of them, oldest first, zeros before the
first.  Fu et al., arXiv 2212.14052, section 3.1 (shift state-space model); Gu & Dao, arXiv 2312.00752, section 3.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from commissure.nn.padding import last_elements

__all__ = ["ShortConvolution", "causal_convolution"]


class ShortConvolution(nn.Module):
    """The convolution of `channels` channels, carried over stretches; `weight` has torch's Conv1d layout.

    `width=1` weighs the newest input alone; its state has no columns.

    >>> layer = ShortConvolution(3, 4)
    >>> y, past = layer(torch.zeros(2, 5, 3), torch.zeros(2, 3, 3))
    >>> y.shape, past.shape
    (torch.Size([2, 5, 3]), torch.Size([2, 3, 3]))
    """

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        bound = width**-0.5  # the default of a depthwise torch.nn.Conv1d
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        past: Float[Tensor, "batch past channels"],
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch past channels"]]:
        """The outputs, and the last width - 1 inputs at each row's length."""
        history = torch.cat([past, x], 1)
        y = causal_convolution(history, self.weight[:, 0], self.bias)
        kept = self.width - 1
        if lengths is not None:
            return y, last_elements(history, lengths + kept, kept)
        return y, history[:, history.shape[1] - kept :]


def causal_convolution(
    history: Float[Tensor, "batch past_time channels"],
    weight: Float[Tensor, "channels width"],
    bias: Float[Tensor, " channels"] | None = None,
) -> Float[Tensor, "batch time channels"]:
    """Outputs for all but the first width - 1 columns of `history`, which are the past.

    A sum of `width` shifted products: faster than a grouped Conv1d on a CPU, and no transposes.
    """
    taps = weight.t()
    time = history.shape[1] - len(taps) + 1
    if time == 1:  # decoding: two calls instead of two a tap
        y = (history * taps).sum(1, keepdim=True)
        return y if bias is None else y + bias
    first = history[:, :time]
    y = first * taps[0] if bias is None else torch.addcmul(bias, first, taps[0])
    for j in range(1, len(taps)):
        y = torch.addcmul(y, history[:, j : j + time], taps[j])
    return y
