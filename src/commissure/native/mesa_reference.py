"""The Mesa layer's solves and its step with torch's dense factorization: slow, differentiable."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import DegenerateError

__all__ = ["mesa_solve_reference", "mesa_step_reference", "singular_system"]


def mesa_solve_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    *,
    dof: bool = False,
) -> tuple[
    Float[Tensor, "batch time heads dim"],
    Float[Tensor, "batch heads dim dim"],
    Float[Tensor, "batch time heads"] | None,
]:
    """`mesa_solve` written down as its definition; results in the dtype of `q`.

    All of it in float64: in single precision a running H loses its digits, one rounding a token.

    >>> one = torch.ones(1, 1, 1)
    >>> x, h_kk, dof = mesa_solve_reference(
    ...     one[..., None], one[..., None], -one, one, one[0], one[..., None], dof=True
    ... )
    >>> [round(float(v), 4) for v in (x, h_kk, dof)]
    [0.4223, 1.3679, 0.5777]
    """
    dtype = q.dtype
    q, k, g, beta, lamb, h_kk = (given.double() for given in (q, k, g, beta, lamb, h_kk))
    decay, regularizer = g.exp(), torch.diag_embed(lamb)
    solutions, degrees = [], []
    for t in range(q.shape[1]):
        outer = k[:, t, :, :, None] * k[:, t, :, None, :]
        h_kk = decay[:, t, :, None, None] * h_kk + beta[:, t, :, None, None] * outer
        factor, info = torch.linalg.cholesky_ex(h_kk + regularizer)
        is_bad = (info != 0) | ~torch.isfinite(factor).all(-1).all(-1)
        if is_bad.any():
            batch, head = is_bad.nonzero()[0].tolist()
            raise singular_system(batch, t, head, torch.float64)
        solutions.append(torch.cholesky_solve(q[:, t, :, :, None], factor)[..., 0])
        if dof:
            degrees.append(torch.cholesky_solve(h_kk, factor).diagonal(dim1=-2, dim2=-1).sum(-1))
    x = torch.stack(solutions, 1) if solutions else torch.zeros_like(q)
    if not dof:
        return x.to(dtype), h_kk.to(dtype), None
    return x.to(dtype), h_kk.to(dtype), (torch.stack(degrees, 1) if degrees else torch.zeros_like(g)).to(dtype)


def mesa_step_reference(
    q: Float[Tensor, "batch heads dim"],
    k: Float[Tensor, "batch heads dim"],
    v: Float[Tensor, "batch heads value_dim"],
    g: Float[Tensor, "batch heads"],
    beta: Float[Tensor, "batch heads"],
    lamb: Float[Tensor, "heads dim"],
    h_kk: Float[Tensor, "batch heads dim dim"],
    h_kv: Float[Tensor, "batch heads dim value_dim"],
) -> tuple[
    Float[Tensor, "batch heads value_dim"],
    Float[Tensor, "batch heads dim dim"],
    Float[Tensor, "batch heads dim value_dim"],
]:
    """`mesa_step` the way the paper puts it: the ridge regression's whole map Phi, applied to the query.

    >>> one = torch.ones(1, 1)
    >>> o, h_kk, h_kv = mesa_step_reference(
    ...     *(one[..., None],) * 3, -one, one, one, one[..., None, None], 2 * one[..., None, None]
    ... )
    >>> [round(float(x), 4) for x in (o, h_kk, h_kv)]
    [0.733, 1.3679, 1.7358]
    """
    decay, strength = g.exp()[..., None, None], beta[..., None, None]
    h_kk = decay * h_kk + strength * torch.einsum("bhd,bhe->bhde", k, k)
    h_kv = decay * h_kv + strength * torch.einsum("bhd,bhe->bhde", k, v)
    factor, info = torch.linalg.cholesky_ex(h_kk + torch.diag_embed(lamb))
    is_bad = (info != 0) | ~torch.isfinite(factor).all(-1).all(-1)
    if is_bad.any():
        batch, head = is_bad.nonzero()[0].tolist()
        raise singular_system(batch, 0, head, h_kk.dtype)
    phi = torch.cholesky_solve(h_kv, factor)
    return torch.einsum("bhde,bhd->bhe", phi, q), h_kk, h_kv


def singular_system(batch: int, time: int, head: int, dtype: torch.dtype) -> DegenerateError:
    """The error of both twins."""
    more_precise = "" if dtype == torch.float64 else "use float64, "
    return DegenerateError(
        f"H + diag(lamb) is not positive definite in {str(dtype).removeprefix('torch.')} at batch {batch}, "
        f"time {time}, head {head}: raise lamb there, {more_precise}or check that g <= 0, beta >= 0, k is finite and "
        "h_kk positive semidefinite"
    )
