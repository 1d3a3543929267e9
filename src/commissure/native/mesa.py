"""The Mesa layer's exact solves: one symmetric positive definite system per token and head.

    H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T
    x_t = (H_t + diag(lamb))^-1 q_t                      dof_t = tr(H_t (H_t + diag(lamb))^-1)

    paper            here
    q_t, k_t         q, k        queries and keys
    log gamma_t      g           log of the forget gate, -inf forgets everything
    beta_t           beta        input gate
    Lambda           lamb        regularizer, diagonal
    H_t              h_kk        weighted sum of k k^T
    q*_t             x           solution

The kernel factors as many tokens at once as a vector register has lanes; D^3/3 + 3 D^2 operations per token and head.
In float32, without dof, sixteen tokens share one inverse where that takes fewer: D^3/16 + (n + 1) (2 D^2 + 48 D) with
n applications, about 4 at gamma = .99, n from the product of the gates; to rounding too.  Other tokens, and those whose
condition number may exceed 64, keep a factorization each.
In float32 the state is carried in float64 inside a call, and where the condition number may exceed 64 one step of
iterative refinement with float64 residuals repairs the factorization's rounding.
Source: MesaNet, arXiv 2506.05233, section 2 and appendix D; the direct solver is our own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from commissure.core.errors import InputError
from commissure.native import backend, kernels
from commissure.native.mesa_reference import mesa_solve_reference, singular_system

__all__ = ["mesa_kernel_available", "mesa_solve", "mesa_solve_reference"]

_FLOATS = (torch.float32, torch.float64)


def mesa_kernel_available() -> bool:
    """Whether `mesa_solve` runs in C++; without a compiler at build time it runs its reference."""
    return backend() == "c++"


def mesa_solve(
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
    """The solutions x, the state after the last token and, if asked for, the effective degrees of freedom.

    CPU tensors, all float32 or all float64; any time >= 0; lamb > 0; h_kk symmetric positive semidefinite.  Runs on up
    to `torch.get_num_threads()` threads, with the same bits for any number.  No gradient: see `nn.mesa`.
    Raises InputError for shapes or dtypes that do not fit, DegenerateError naming the first system that is not positive
    definite in this precision.

    >>> q = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)
    >>> gate = torch.zeros(1, 1, 1)
    >>> x, h_kk, _ = mesa_solve(q, q, gate, gate, torch.tensor([[1.0, 4.0]]), torch.zeros(1, 1, 2, 2))
    >>> x.flatten().tolist()
    [3.0, 1.0]
    """
    _check(q, k, g, beta, lamb, h_kk)
    x, h_final, degrees = torch.ops.commissure.mesa_solve(q, k, g, beta, lamb, h_kk, dof)
    return x, h_final, degrees if dof else None


def _check(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor) -> None:
    """Raise InputError naming the first argument that does not fit q."""
    if q.ndim != 4 or q.shape[3] < 1 or q.dtype not in _FLOATS or q.device.type not in ("cpu", "meta"):
        found = (tuple(q.shape), str(q.dtype), q.device.type)
        raise InputError("q", found, "a float32 or float64 CPU tensor [batch, time, heads, dim], dim >= 1")
    batch, time, heads, dim = q.shape
    shapes = {
        "k": (k, (batch, time, heads, dim)),
        "g": (g, (batch, time, heads)),
        "beta": (beta, (batch, time, heads)),
        "lamb": (lamb, (heads, dim)),
        "h_kk": (h_kk, (batch, heads, dim, dim)),
    }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise InputError(name, tuple(value.shape), f"shape {shape}, to fit q {tuple(q.shape)}")
        if value.dtype != q.dtype or value.device != q.device:
            kind = (str(value.dtype), value.device.type)
            raise InputError(name, kind, f"q's dtype and device, {q.dtype}, {q.device}")


_library = torch.library.Library("commissure", "FRAGMENT")
_library.define(
    "mesa_solve(Tensor q, Tensor k, Tensor g, Tensor beta, Tensor lamb, Tensor h_kk, bool dof)"
    " -> (Tensor, Tensor, Tensor)"
)


def _solve(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, dof: bool, clone: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on CPU tensors; dof is empty if it is not wanted."""
    native = kernels()
    if native is None:
        x, h_final, degrees = mesa_solve_reference(q, k, g, beta, lamb, h_kk, dof=dof)
        return x, h_final.clone(), g.new_empty(0) if degrees is None else degrees
    arrays = [v.contiguous() for v in (q, k, g, beta, lamb, h_kk)]
    x, h_final, degrees = _allocate(q, g, h_kk, dof)
    addresses = [v.data_ptr() for v in (*arrays, x, h_final)]
    batch, time, heads, dim = q.shape
    failed = native.mesa_solve(
        *addresses,
        degrees.data_ptr() if dof else 0,
        batch,
        time,
        heads,
        dim,
        q.dtype == torch.float32,
        torch.get_num_threads(),
        clone,
    )
    if failed >= 0:
        raise singular_system(failed // (time * heads), failed // heads % time, failed % heads, q.dtype)
    return x, h_final, degrees


def _allocate(q: Tensor, g: Tensor, h_kk: Tensor, dof: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The results' memory, not filled; also what the operator returns for tensors without data."""
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(q, memory_format=contiguous),
        torch.empty_like(h_kk, memory_format=contiguous),
        torch.empty_like(g, memory_format=contiguous) if dof else g.new_empty(0),
    )


def _fake(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, dof: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(q, g, h_kk, dof)


_library.impl("mesa_solve", _solve, "CPU")
torch.library.register_fake("commissure::mesa_solve", _fake, lib=_library)
