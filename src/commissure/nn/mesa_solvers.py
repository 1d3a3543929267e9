"""Solvers of the Mesa layer's linear systems x_t = (H_t + Lambda)^-1 q_t, one for every element.

    H_t = gamma_t H_{t-1} + beta_t k_t k_t^T,     A_t = H_t + Lambda,     zeta_t = gamma_{c+1} ... gamma_t

- `cholesky`: A_t factored for each t, by the compiled kernel (CPU).
- `cg`: conjugate gradients on all elements side by side, A_t applied in chunks without forming it (paper, algorithm 1).
- `block_rls`: where gates are close to 1, conjugate gradients preconditioned by the exact inverses of
  M_t = zeta_t (H_c + sum_i (beta_i / zeta_i) k_i k_i^T + c0 Lambda), which one factorization a chunk gives for all t;
  the spectrum of M_t^-1 A_t lies between 1 and 1 / (zeta_t c0), so that the gates alone say how many iterations are
  needed (none without forgetting).  Elsewhere H is small and plain `cg` converges fast: chosen per head and chunk.
- `sequential`: one dense factorization after the other, for every device and dtype.

Method: von Oswald et al., arXiv 2506.05233, section 3 and appendix D; block_rls is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from commissure.core.errors import DegenerateError
from commissure.native.mesa import mesa_solve, mesa_solve_reference
from commissure.nn.linear_attention import Segment, chunk_states, cut, decays_of, from_chunks, to_chunks

__all__ = ["CGOptions", "Solution", "solve_block_rls", "solve_cg", "solve_cholesky", "solve_sequential"]

# Chunks of block_rls: a D x D factorization each, so not too short; the gates' product over one sets the number of
# iterations, so not too long.
BLOCK = 32
# Above this product of a chunk's gates the preconditioned iteration (at most 12 steps in single precision) is faster
# than plain conjugate gradients, whose condition number grows as 1 / (1 - gamma).
LEAST_PRODUCT = math.exp(-2.0)
# Rows that still iterate are copied together once a quarter has stopped: a copy costs about what one step does.
LEAVING = 0.75


class CGOptions(NamedTuple):
    """How conjugate gradients run: elements in a chunk, iterations, relative residual to stop at, first guess."""

    chunk_size: int = 64
    max_steps: int = 30
    eps: float = 0.0
    init: str = "diag"


class System(NamedTuple):
    """The systems (H_t + Lambda) x_t = q_t, all in one dtype."""

    q: Float[Tensor, "batch time heads dim"]
    k: Float[Tensor, "batch time heads dim"]
    g: Float[Tensor, "batch time heads"]
    beta: Float[Tensor, "batch time heads"]
    lamb: Float[Tensor, "heads dim"]
    h_kk: Float[Tensor, "batch heads dim dim"]


class Solution(NamedTuple):
    """x, the last H, and the iterations of each element (None: direct)."""

    x: Float[Tensor, "batch time heads dim"]
    h_kk: Float[Tensor, "batch heads dim dim"]
    steps: Int[Tensor, "batch time heads"] | None = None
    unconverged: Bool[Tensor, "batch time heads"] | None = None


class Operator(NamedTuple):
    """p -> (H_t + Lambda) p in chunks: rows are (chunk, batch, head)."""

    keys: Float[Tensor, "rows time dim"]
    written: Float[Tensor, "rows time dim"]
    states: Float[Tensor, "rows dim dim"]
    gates: Float[Tensor, "rows time"]
    start: Float[Tensor, "rows time 1"]
    within: Float[Tensor, "rows time time"]
    lamb: Float[Tensor, "rows 1 dim"]

    def take(self, rows: Tensor) -> Operator:
        """The operator of some rows."""
        return Operator(*(part.index_select(0, rows) for part in self))

    def apply(self, p: Float[Tensor, "rows time dim"], scratch: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """A p, into `out`."""
        scores, decayed = scratch
        torch.bmm(p, self.written.mT, out=scores).mul_(self.within)
        torch.bmm(torch.mul(p, self.start, out=decayed), self.states, out=out)
        return out.baddbmm_(scores, self.keys).addcmul_(p, self.lamb)

    def diagonal(self) -> Float[Tensor, "rows time dim"]:
        """The diagonal of each A_t."""
        own = torch.bmm(self.within, self.written * self.keys)
        return own.addcmul_(self.start, self.states.diagonal(dim1=1, dim2=2)[:, None]).add_(self.lamb)


def solve_cholesky(system: System, options: CGOptions) -> Solution:
    """One factorization for each element, by the compiled kernel."""
    return _direct(mesa_solve, system)


def solve_sequential(system: System, options: CGOptions) -> Solution:
    """One dense factorization after the other."""
    return _direct(mesa_solve_reference, system)


def solve_triton(system: System, options: CGOptions) -> Solution:
    """Conjugate gradients by the Triton kernels, each element to its own relative residual."""
    from commissure.native.mesa_triton import mesa_triton_solve

    init = cast(Literal["diag", "zero", "query"], options.init)
    found = mesa_triton_solve(*system, eps=options.eps, max_steps=options.max_steps, init=init)
    return Solution(found.x, found.h_kk, found.cg_steps.long())


def solve_cg(system: System, options: CGOptions) -> Solution:
    """Conjugate gradients of every element side by side, to a fixed count or to a relative residual."""

    def solve(operator: Operator, b: Tensor) -> Rows:
        return conjugate_gradients(operator, b, first_guess(operator, b, options.init), options.max_steps, options.eps)

    return _by_segments(system, options.chunk_size, solve)


def solve_block_rls(system: System, options: CGOptions) -> Solution:
    """To rounding: preconditioned by the block's own inverses where gates are near 1, plain CG where they are not."""
    return _by_segments(system, min(options.chunk_size, BLOCK), _hybrid)


def relative_residual(
    x: Float[Tensor, "batch time heads dim"], system: System, chunk_size: int
) -> Float[Tensor, "batch time heads"]:
    """|q - A x| / |q|; 0 where q = 0."""
    q = system.q
    ax, state = torch.empty_like(q), system.h_kk.flatten(0, 1)
    for piece in cut(q.shape, q.shape[3], chunk_size, q.device):
        operator, state = _operator(system, state, piece)
        p = to_chunks(x, piece, q.dtype)
        from_chunks(operator.apply(p, _scratch(p), torch.empty_like(p)), piece, ax)
    size = torch.linalg.vector_norm(q, dim=-1)
    missing = torch.linalg.vector_norm(ax.sub_(q), dim=-1)
    return torch.where(size > 0, missing / size, 0.0)


class Rows(NamedTuple):
    """The answer for some rows of chunks."""

    x: Float[Tensor, "rows time dim"]
    steps: Int[Tensor, "rows time"]
    unconverged: Bool[Tensor, "rows time"]

    def put(self, rows: Int[Tensor, " some"], *parts: Tensor) -> Rows:
        """Write the answer for some of the rows; parts that are these tensors themselves are in place already."""
        for whole, part in zip(self, parts, strict=True):
            if part is not whole:
                whole.index_copy_(0, rows, part)
        return self


def first_guess(operator: Operator, b: Tensor, init: str) -> Tensor:
    """Where the iteration starts: b over the diagonal (paper), zero, or b itself (zero steps: linear attention)."""
    if init == "diag":
        return b / operator.diagonal()
    return torch.zeros_like(b) if init == "zero" else b.clone()


def conjugate_gradients(operator: Operator, b: Tensor, x: Tensor, max_steps: int, eps: float) -> Rows:
    """Algorithm 1 on every element at once: stop where |r| <= eps |r_0|; chunks that have stopped leave the batch.

    Divisions are guarded by the smallest normal number alone: an additive constant would stop the convergence.
    """
    tiny = torch.finfo(b.dtype).tiny
    scratch, s = _scratch(b), torch.empty_like(b)
    r = b - operator.apply(x, scratch, s)
    p, delta = r.clone(), _dot(r, r, scratch)
    goal = (eps * eps * delta).clamp_(min=tiny)
    active = delta > tiny
    steps = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    found, rows = Rows(x, steps, active), torch.arange(len(b), device=b.device)
    for _ in range(max_steps):
        operator.apply(p, scratch, s)
        curvature = _dot(p, s, scratch)
        alpha = torch.where(active & (curvature > tiny), delta / curvature, 0.0)[:, :, None]
        x.addcmul_(p, alpha)
        r.addcmul_(s, alpha, value=-1.0)
        steps.add_(active)
        before, delta = delta, _dot(r, r, scratch)
        active.logical_and_(delta > goal)
        p.mul_(torch.where(active, delta / before, 0.0)[:, :, None]).add_(r)
        if eps == 0.0:
            continue
        alive = active.any(1)
        n_alive = int(alive.sum())
        if n_alive == 0:
            break
        if n_alive <= LEAVING * len(alive):
            found.put(rows, x, steps, active)
            kept = alive.nonzero()[:, 0]
            operator, scratch, s = operator.take(kept), _scratch(p[:n_alive]), s[:n_alive]
            x, r, p, delta, goal = (t[kept] for t in (x, r, p, delta, goal))
            steps, active, rows = steps[kept], active[kept], rows[kept]
    return found.put(rows, x, steps, active)


def _direct(solve: Callable[..., tuple[Tensor, Tensor, Tensor | None]], system: System) -> Solution:
    """A direct solver's answer; NaN where the system is, as for every other operation, instead of its error."""
    try:
        x, last, _ = solve(*system)
    except DegenerateError:
        q, k, g, beta, lamb, h_kk = system
        lost = ~(k.isfinite().all(-1) & beta.isfinite()) | g.isnan()
        lost[:, :1] |= ~(lamb.isfinite().all(-1) & h_kk.isfinite().all(-1).all(-1))[:, None]
        lost = lost.cumsum(1) > 0
        if not bool(lost.any()):
            raise
        k, g, beta = k.masked_fill(lost[..., None], 0), g.masked_fill(lost, 0), beta.masked_fill(lost, 0)
        x, last, _ = solve(q, k, g, beta, lamb.nan_to_num(1.0, 1.0), h_kk.nan_to_num(0.0, 0.0, 0.0))
        x.masked_fill_(lost[..., None], torch.nan)
        last.masked_fill_(lost[:, -1, :, None, None], torch.nan)
    return Solution(x, last)


def _hybrid(operator: Operator, b: Tensor) -> Rows:
    """Rows by the number of preconditioned iterations their gates ask for; -1 stands for plain conjugate gradients."""
    needed = _iterations(operator.within[:, -1, 0], b.dtype)
    steps = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    answer = Rows(torch.empty_like(b), steps, torch.zeros_like(steps, dtype=torch.bool))
    for count in needed.unique().tolist():
        rows = (needed == count).nonzero()[:, 0]
        part, part_b = (operator, b) if len(rows) == len(b) else (operator.take(rows), b[rows])
        if count >= 0:
            x, taken = _block_rls(part, part_b, count)
            answer.x.index_copy_(0, rows, x)
            answer.steps[rows] = taken
            continue
        found = conjugate_gradients(
            part, part_b, first_guess(part, part_b, "diag"), 2 * b.shape[2] + 50, torch.finfo(b.dtype).eps
        )
        answer.put(rows, *found)
    return answer


def _iterations(product: Float[Tensor, " rows"], dtype: torch.dtype) -> Int[Tensor, " rows"]:
    """Preconditioned iterations after which the error is below rounding, rounded up to a few values; or -1.

    From the first guess M^-1 b the error falls at least as 2 (kappa - 1) rho^n with rho = (sqrt kappa - 1) /
    (sqrt kappa + 1), where kappa = product^-1/2 bounds the condition number of M^-1 A and `product` is that of the
    chunk's gates but its first.
    """
    kappa = product.double().clamp(min=LEAST_PRODUCT).rsqrt()
    rho = (kappa.sqrt() - 1) / (kappa.sqrt() + 1)
    count = (torch.finfo(dtype).eps / (2 * (kappa - 1))).log() / rho.log()
    count = torch.where(kappa - 1 <= torch.finfo(dtype).eps, 0.0, count.ceil()).clamp(min=0).nan_to_num()
    grid = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48], device=product.device)
    count = grid[torch.bucketize(count, grid)]
    return torch.where(product >= LEAST_PRODUCT, count, -1)


def _block_rls(operator: Operator, b: Tensor, count: int) -> tuple[Tensor, int]:
    """x and its steps, at most `count`, of preconditioned CG, in the coordinates where H_c + c0 Lambda is the identity.

    There A = M + w E, with w = 1 / zeta - c0 and E = L0^-1 L0^-T; M^-1 is causal linear attention with keys F, and M p
    follows from the recurrence of p itself, so that a step costs what one of plain conjugate gradients does.
    """
    zeta = operator.within[:, :, :1]
    c0 = zeta[:, -1:].rsqrt()
    root = operator.lamb.sqrt()
    start = (operator.states * operator.start[:, :1]).div_(root * root.mT)
    start.diagonal(dim1=1, dim2=2).add_(c0[:, 0])
    inverse = _inverse_of_lower(torch.linalg.cholesky_ex(start).L)
    keys = torch.bmm(operator.keys / root * (operator.gates[:, :, None] / zeta).sqrt_(), inverse.mT)
    gram = torch.bmm(keys, keys.mT)
    gram.diagonal(dim1=1, dim2=2).add_(1.0)
    factor = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, keys, upper=False)

    def precondition(r: Tensor) -> Tensor:
        return torch.baddbmm(r, torch.bmm(r, factor.mT).tril_(), factor, alpha=-1.0)

    b = torch.bmm(b / (root * zeta), inverse.mT)
    x = precondition(b)
    if count:
        e, w = torch.bmm(inverse, inverse.mT), zeta.reciprocal() - c0
        count = _preconditioned_steps(x, b, e, w, precondition, count)
    return torch.bmm(x, inverse).div_(root), count


def _inverse_of_lower(factor: Float[Tensor, "rows dim dim"]) -> Float[Tensor, "rows dim dim"]:
    """The inverse of lower triangular matrices by halves: products, twice as fast as substitutions."""
    dim = factor.shape[1]
    if dim <= 16:
        return torch.linalg.solve_triangular(
            factor, torch.eye(dim, dtype=factor.dtype, device=factor.device), upper=False
        )
    half = dim // 2
    upper, lower = _inverse_of_lower(factor[:, :half, :half]), _inverse_of_lower(factor[:, half:, half:])
    inverse = torch.zeros_like(factor)
    inverse[:, :half, :half], inverse[:, half:, half:] = upper, lower
    inverse[:, half:, :half] = torch.bmm(torch.bmm(lower, factor[:, half:, :half]), upper).neg_()
    return inverse


def _preconditioned_steps(
    x: Tensor, b: Tensor, e: Tensor, w: Tensor, precondition: Callable[[Tensor], Tensor], count: int
) -> int:
    """Conjugate gradients on (M + w E) x = b from x = M^-1 b, in place; how many of at most `count` it took.

    They end where r^T M^-1 r <= eps^2 b^T M^-1 b everywhere: the error's energy by that of x, to the factor kappa.
    """
    info = torch.finfo(x.dtype)
    goal = (b * x).sum(-1, keepdim=True).mul_(info.eps**2).clamp_(min=info.tiny)
    r = torch.bmm(x, e).mul_(w).neg_()
    p = precondition(r)
    m_p, delta = r.clone(), (r * p).sum(-1, keepdim=True)
    for step in range(1, count + 1):
        a_p = torch.bmm(p, e).mul_(w).add_(m_p)
        curvature = (p * a_p).sum(-1, keepdim=True)
        alpha = torch.where(curvature > info.tiny, delta / curvature, 0.0)
        x.addcmul_(p, alpha)
        if step == count:
            break
        r.addcmul_(a_p, alpha, value=-1.0)
        z = precondition(r)
        before, delta = delta, (r * z).sum(-1, keepdim=True)
        if bool((delta <= goal).all()):
            return step
        ratio = torch.where(before > info.tiny, delta / before, 0.0)
        p.mul_(ratio).add_(z)
        m_p.mul_(ratio).add_(r)
    return count


def _by_segments(system: System, chunk_size: int, solve: Callable[[Operator, Tensor], Rows]) -> Solution:
    """Solve a segment after the other, from each one's first state."""
    q, h_kk = system.q, system.h_kk
    x = torch.empty_like(q, memory_format=torch.contiguous_format)
    steps = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    unconverged = torch.zeros_like(steps, dtype=torch.bool)
    state = h_kk.flatten(0, 1)
    for piece in cut(q.shape, q.shape[3], chunk_size, q.device):
        operator, state = _operator(system, state, piece)
        for part, whole in zip(solve(operator, to_chunks(q, piece, q.dtype)), (x, steps, unconverged), strict=True):
            from_chunks(part, piece, whole)
    return Solution(x, state.view(h_kk.shape), steps, unconverged)


def _operator(
    system: System, state: Float[Tensor, "rows dim dim"], piece: Segment
) -> tuple[Operator, Float[Tensor, "rows dim dim"]]:
    """The operator of a segment that begins in `state`, and the state after it."""
    dtype, lamb = system.k.dtype, system.lamb
    keys, gates = to_chunks(system.k, piece, dtype), to_chunks(system.beta, piece, dtype)
    decays = decays_of(system.g, piece, dtype)
    written = keys * gates[:, :, None]
    states = chunk_states(written * decays.end[:, :, None], keys, decays, state)
    penalties = lamb.expand(piece.n_chunks, system.k.shape[0], *lamb.shape).reshape(-1, 1, lamb.shape[1])
    starts = states[:-1].flatten(0, 1)
    return Operator(keys, written, starts, gates, decays.start[:, :, None], decays.within, penalties), states[-1]


def _scratch(p: Float[Tensor, "rows time dim"]) -> tuple[Tensor, Tensor]:
    """Room for scores and for one more operand."""
    return p.new_empty(p.shape[0], p.shape[1], p.shape[1]), torch.empty_like(p)


def _dot(a: Tensor, b: Tensor, scratch: tuple[Tensor, Tensor]) -> Float[Tensor, "rows time"]:
    return torch.mul(a, b, out=scratch[1]).sum(-1)
