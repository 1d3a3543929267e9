"""A backward written by hand gives first derivatives only, and says so before it gives wrong second ones.

With create_graph=True autograd differentiates what a backward returns.  It sees no path from there to the operands it
cannot follow, and takes their part of the second derivative as zero: an error only where the cotangent needs one too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from commissure.core.errors import InputError

__all__ = ["first_order_only"]


def first_order_only(operator: str, reference: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a `backward`: `InputError` where its result would be differentiated again (create_graph=True)."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def checked(ctx: Any, *cotangents: Any) -> Any:
            if torch.is_grad_enabled():  # within a backward: exactly where create_graph is true
                allowed = f"False: the backward of {operator} is written by hand and cannot be differentiated"
                raise InputError("create_graph", True, allowed, f"take second derivatives of {reference}")
            return backward(ctx, *cotangents)

        return checked

    return decorate
