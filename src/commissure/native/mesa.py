"""The Mesa layer's exact solves: one symmetric positive definite system per token and head.

    H_t = exp(g_t) H_{t-1} + beta_t k_t k_t^T            G_t = exp(g_t) G_{t-1} + beta_t k_t v_t^T
    x_t = (H_t + diag(lamb))^-1 q_t                      dof_t = tr(H_t (H_t + diag(lamb))^-1)
    o_t = G_t^T x_t

    paper            here
    q_t, k_t         q, k        queries and keys
    log gamma_t      g           log of the forget gate, -inf forgets everything
    beta_t           beta        input gate
    Lambda           lamb        regularizer, diagonal
    H_t              h_kk        weighted sum of k k^T
    G_t^T            h_kv        weighted sum of k v^T, of `mesa_step` alone
    q*_t             x           solution

`mesa_solve` solves, `mesa_step` makes one whole step of decoding: output and both states in one call.  The kernel
factors as many systems at once as a vector register has lanes: D^3/3 + 3 D^2 operations a token and head.  In float32,
without dof, sixteen tokens share one inverse where that takes fewer: D^3/16 + (n + 1) (2 D^2 + 48 D) with n
applications, about 4 at gamma = .99, n from the product of the gates; to rounding too.  Other tokens, and those whose
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
from commissure.native.mesa_reference import mesa_solve_reference, mesa_step_reference, singular_system

__all__ = ["mesa_kernel_available", "mesa_solve", "mesa_solve_reference", "mesa_step", "mesa_step_reference"]

_FLOATS = (torch.float32, torch.float64)


def mesa_kernel_available() -> bool:
    """Whether the doors run in C++; without a compiler at build time they run their references."""
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
    _check(q, "batch, time, heads, dim", k=k, g=g, beta=beta, lamb=lamb, h_kk=h_kk)
    x, h_final, degrees = torch.ops.commissure.mesa_solve(q, k, g, beta, lamb, h_kk, dof)
    return x, h_final, degrees if dof else None


def mesa_step(
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
    """The output of one new token and both states after it; those given are not changed.

    Any value_dim >= 1; as `mesa_solve` of one token in everything else.

    >>> k, v, gate = torch.eye(2)[None, :1], torch.tensor([[[3.0]]]), torch.zeros(1, 1)
    >>> o, h_kk, h_kv = mesa_step(
    ...     k, k, v, gate, gate + 1, torch.ones(1, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 1)
    ... )
    >>> o, h_kk.flatten(), h_kv.flatten()
    (tensor([[[1.5000]]]), tensor([1., 0., 0., 0.]), tensor([3., 0.]))
    """
    _check(q, "batch, heads, dim", k=k, v=v, g=g, beta=beta, lamb=lamb, h_kk=h_kk, h_kv=h_kv)
    o, h_kk, h_kv = torch.ops.commissure.mesa_step(q, k, v, g, beta, lamb, h_kk, h_kv)
    return o, h_kk, h_kv


def _check(q: Tensor, axes: str, **others: Tensor) -> None:
    """Raise InputError naming the first argument that does not fit q, whose axes are `axes`."""
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != axes.count(",") + 1 or shape[-1] < 1 or dtype not in _FLOATS or device.type not in ("cpu", "meta"):
        found = (tuple(shape), str(dtype), device.type)
        raise InputError("q", found, f"a float32 or float64 CPU tensor [{axes}], dim >= 1")
    batch, *_, heads, dim = shape
    gates, state = shape[:-1], (batch, heads, dim)
    fitting = {"k": shape, "g": gates, "beta": gates, "lamb": (heads, dim), "h_kk": (*state, dim)}
    if (v := others.get("v")) is not None:
        if v.shape[:-1] != gates or v.ndim != len(shape) or v.shape[-1] < 1:
            raise InputError("v", tuple(v.shape), f"shape {(*gates, 'value_dim >= 1')}, to fit q {tuple(shape)}")
        fitting |= {"v": v.shape, "h_kv": (*state, v.shape[-1])}
    for name, value in others.items():
        if value.shape != fitting[name]:
            raise InputError(name, tuple(value.shape), f"shape {tuple(fitting[name])}, to fit q {tuple(shape)}")
        if value.dtype != dtype or value.device != device:
            raise InputError(name, (str(value.dtype), value.device.type), f"q's dtype and device, {dtype}, {device}")


_library = torch.library.Library("commissure", "FRAGMENT")
_library.define(
    "mesa_solve(Tensor q, Tensor k, Tensor g, Tensor beta, Tensor lamb, Tensor h_kk, bool dof)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "mesa_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor lamb, Tensor h_kk, Tensor h_kv)"
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


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    lamb: Tensor,
    h_kk: Tensor,
    h_kv: Tensor,
    clone: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on CPU tensors."""
    native = kernels()
    if native is None:
        return mesa_step_reference(q, k, v, g, beta, lamb, h_kk, h_kv)
    arrays = [x.contiguous() for x in (q, k, v, g, beta, lamb, h_kk, h_kv)]
    results = _empty(q, k, v, g, beta, lamb, h_kk, h_kv)
    batch, heads, dim = q.shape
    failed = native.mesa_step(
        *[x.data_ptr() for x in arrays],
        *[x.data_ptr() for x in results],
        batch,
        heads,
        dim,
        v.shape[2],
        q.dtype == torch.float32,
        torch.get_num_threads(),
        clone,
    )
    if failed >= 0:
        raise singular_system(failed // heads, 0, failed % heads, q.dtype)
    return results


def _empty(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, h_kv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for a step's results, not filled; also what the operator returns for tensors without data."""
    contiguous = torch.contiguous_format
    o, h_kk, h_kv = (torch.empty_like(x, memory_format=contiguous) for x in (v, h_kk, h_kv))
    return o, h_kk, h_kv


def _fake(
    q: Tensor, k: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, h_kk: Tensor, dof: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(q, g, h_kk, dof)


_library.impl("mesa_solve", _solve, "CPU")
_library.impl("mesa_step", _step, "CPU")
torch.library.register_fake("commissure::mesa_solve", _fake, lib=_library)
torch.library.register_fake("commissure::mesa_step", _empty, lib=_library)
