"""What a model does without some directions of a site: its states projected, inside its forward pass.

    x -> m + (x - m) (I - U U')     remove the top k          x -> m + (x - m) U U'      keep the top k alone

with m the mean and U the first k eigenvectors of the covariance that a trace of the site collected.

    with ablate_subspace(model, "layers.3", traced.accumulators["layers.3", "all", "raw"].moments, remove_top=10):
        evaluate(model)

arXiv 2509.23024, table 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from commissure.core.errors import InputError
from commissure.core.moments import Moments, covariance

__all__ = ["ablate_subspace", "project"]


def project(
    x: Float[Tensor, "*samples dim"], moments: Moments, *, remove_top: int | None = None, keep_top: int | None = None
) -> Float[Tensor, "*samples dim"]:
    """`x` around the mean without its top directions, or with them alone; exactly one of the two numbers is given.

    >>> from commissure.core.moments import measure
    >>> rows = torch.tensor([[2.0, 0.5], [-2.0, 0.5], [0.0, 1.5], [0.0, -0.5]])
    >>> project(rows, measure(rows), remove_top=1).tolist()
    [[0.0, 0.5], [0.0, 0.5], [0.0, 1.5], [0.0, -0.5]]
    """
    mean, kept = _projector(moments, remove_top, keep_top)
    if x.shape[-1:] != mean.shape:
        raise InputError("x", tuple(x.shape), f"shape (..., {len(mean)}), as the moments")
    wide = x.double() - mean.to(x.device)
    return (mean.to(x.device) + wide @ kept.to(x.device)).to(x.dtype)


@contextmanager
def ablate_subspace(
    model: nn.Module, site: str, moments: Moments, *, remove_top: int | None = None, keep_top: int | None = None
) -> Iterator[None]:
    """Within the block the output of module `site` (of several, the first) is `project`ed."""
    modules = dict(model.named_modules())
    if site not in modules or not site:
        raise InputError("site", site, f"the name of a module, such as {', '.join([*modules][1:4])}")
    _projector(moments, remove_top, keep_top)

    def change(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return project(output, moments, remove_top=remove_top, keep_top=keep_top)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (project(output[0], moments, remove_top=remove_top, keep_top=keep_top), *output[1:])
        raise InputError(f"output of {site}", type(output).__name__, "a tensor, or a tuple that begins with one")

    hook = modules[site].register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


def _projector(moments: Moments, remove_top: int | None, keep_top: int | None) -> tuple[Tensor, Tensor]:
    """Mean, and the projection on what is kept."""
    dim = len(moments.mean)
    if (remove_top is None) == (keep_top is None):
        raise InputError("remove_top", (remove_top, keep_top), "either remove_top or keep_top")
    name, k = ("remove_top", remove_top) if keep_top is None else ("keep_top", keep_top)
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= dim:
        raise InputError(name, k, f"an integer from 0 to {dim}")
    top = torch.linalg.eigh(covariance(moments)).eigenvectors[:, dim - k :]
    on_top = top @ top.T
    return moments.mean, on_top if keep_top is not None else torch.eye(dim, dtype=on_top.dtype) - on_top
