"""What the predictors and samplers accept: sizes, an environment, tensors of integers and of real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from types import EllipsisType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from commissure.core.errors import InputError
from commissure.metahmm.environment import MetaHMM
from commissure.metahmm.inputs import whole

__all__ = ["checked_counts", "checked_environment", "checked_tensor"]


def checked_counts(argument: str, values: Sequence[int]) -> tuple[int, ...]:
    """One number >= 1 or more.

    >>> checked_counts("factor_sizes", [4, 2])
    (4, 2)
    """
    if not isinstance(values, (list, tuple, range, np.ndarray)) or not len(values):
        raise InputError(argument, values, "a sequence of integers >= 1, not empty")
    return tuple(whole(f"{argument}[{i}]", value, 1) for i, value in enumerate(values))


def checked_environment(env: MetaHMM) -> MetaHMM:
    """`env`, a MetaHMM."""
    if not isinstance(env, MetaHMM):
        raise InputError("env", type(env).__name__, "a MetaHMM")
    return env


def checked_tensor(
    argument: str,
    values: Tensor,
    axes: tuple[str | int | EllipsisType, ...],
    *,
    kind: Literal["integers", "real numbers"] = "integers",
    below: int | None = None,
) -> Tensor:
    """`values` with these axes: names of any size, numbers as they are, `...` in front for any more.

    Integers of any width come back as int64, all within [0, below); real numbers are finite.

    >>> checked_tensor("tokens", torch.tensor([[1, 2]], dtype=torch.int32), ("batch", "time"), below=3)
    tensor([[1, 2]])
    """
    allowed = f"a tensor of {kind}, shape ({', '.join('...' if axis is ... else str(axis) for axis in axes)})"
    if not isinstance(values, Tensor):
        raise InputError(argument, type(values).__name__, allowed, "pass torch.as_tensor of it")
    named = axes[1:] if axes[:1] == (...,) else axes
    sizes = values.shape[max(0, values.ndim - len(named)) :]
    has_axes = values.ndim == len(axes) or (len(named) < len(axes) and values.ndim >= len(named))
    if not has_axes or any(isinstance(a, int) and a != size for a, size in zip(named, sizes, strict=True)):
        raise InputError(argument, tuple(values.shape), allowed)
    is_real = values.dtype.is_floating_point
    if values.dtype == torch.bool or values.dtype.is_complex or is_real != (kind == "real numbers"):
        raise InputError(argument, values.dtype, allowed)
    if is_real:
        if not bool(values.isfinite().all()):
            raise InputError(argument, float(values[~values.isfinite()][0]), "finite numbers")
        return values
    if below is not None and values.numel() and (int(values.min()) < 0 or int(values.max()) >= below):
        raise InputError(argument, (int(values.min()), int(values.max())), f"all within [0, {below})")
    return values.long()
