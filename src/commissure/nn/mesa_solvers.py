"""Solvers of the Mesa layer's linear systems x_t = (H_t + Lambda)^-1 q_t, one for every element.

    H_t = gamma_t H_{t-1} + beta_t k_t k_t^T,     A_t = H_t + Lambda,     zeta_t = gamma_{c+1} ... gamma_t

- `cholesky`: to rounding by the compiled kernel (CPU): A_t factored for each t, or, where that takes fewer operations,
  the form of `block_rls` below in chunks of sixteen.
- `cg`: conjugate gradients on all elements side by side, A_t applied in chunks without forming it (paper, algorithm 1).
- `block_rls`: where gates are close to 1, Chebyshev's semi-iteration preconditioned by the exact inverses of
  M_t = zeta_t (H_c + sum_i (beta_i / zeta_i) k_i k_i^T + c0 Lambda), which one factorization a chunk gives for all t;
  the spectrum of M_t^-1 A_t lies between 1 and 1 / (zeta_t c0), so that the gates alone say how many iterations are
  needed (none without forgetting).  Elsewhere H is small and plain `cg` converges fast: chosen per head and chunk.
- `sequential`: one dense factorization after the other, for every device and dtype.

Method: von Oswald et al., arXiv 2506.05233, section 3 and appendix D; block_rls is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from commissure.core.errors import DegenerateError
from commissure.native.mesa import mesa_solve, mesa_solve_reference
from commissure.nn.linear_attention import (
    Segment,
    chunk_states,
    cut,
    decays_of,
    from_chunks,
    log_sums,
    products_within,
    to_chunks,
)

__all__ = ["CGOptions", "Solution", "solve_block_rls", "solve_cg", "solve_cholesky", "solve_sequential"]

# Chunks of block_rls: a D x D factorization each, so not too short; the gates' product over one sets the number of
# iterations, so not too long.
BLOCK = 32
# Largest matrix whose Cholesky factor LAPACK inverts faster than products of its halves do.
LEAF = 16
# Numbers of one (rows, time, dim) tensor that the hybrid works on together on a CPU: so few operations a token that
# calls of ten microseconds count, as many that a few tensors still share a second-level cache.  Its segments are longer
# than others', so that one head of a few fills such a group: all of one method, and in place.
TOGETHER, SEGMENTS = 2**16, 2
# Rows that take nearly as many steps as the longest of their group run to its end: cheaper than putting them in order.
SIMILAR = 0.75
# Relative error (in energy) and residual at which the hybrid stops: the error of a float32 output stays below 1e-5.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 2.0**-52}
# Above this product of a chunk's gates the preconditioned iteration (at most 10 steps in single precision) is faster
# than plain conjugate gradients, whose condition number grows as 1 / (1 - gamma).
LEAST_PRODUCT = math.exp(-2.0)
# Rows that still iterate are copied together once half have stopped: a copy costs about what one step does.
LEAVING = 0.5


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


class Chunks(NamedTuple):
    """What is known of some chunks: rows are (chunk, batch, head), `logs` log gates, `states` H before each."""

    keys: Float[Tensor, "rows time dim"]
    beta: Float[Tensor, "rows time"]
    logs: Float[Tensor, "rows time"]
    start: Float[Tensor, "rows time"]
    states: Float[Tensor, "rows dim dim"]
    lamb: Float[Tensor, "rows dim"]

    def take(self, rows: slice | Int[Tensor, " some"]) -> Chunks:
        """Some rows; of a slice, the numbers themselves."""
        return Chunks(*(part[rows] for part in self))

    def operator(self) -> Operator:
        """p -> (H_t + Lambda) p."""
        weights = products_within(*log_sums(self.logs), self.keys.dtype).mul_(self.beta[:, None])
        return Operator(self.keys, self.states, self.start[:, :, None], weights, self.lamb[:, None])


class Operator(NamedTuple):
    """p -> (H_t + Lambda) p; `weights` of the keys up to each time are zeta_ti beta_i."""

    keys: Float[Tensor, "rows time dim"]
    states: Float[Tensor, "rows dim dim"]
    start: Float[Tensor, "rows time 1"]
    weights: Float[Tensor, "rows time time"]
    lamb: Float[Tensor, "rows 1 dim"]

    def take(self, rows: Int[Tensor, " some"]) -> Operator:
        """The operator of some rows."""
        return Operator(*(part.index_select(0, rows) for part in self))

    def apply(self, p: Float[Tensor, "rows time dim"], scratch: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        """A p, into `out`."""
        scores, decayed = scratch
        torch.bmm(p, self.keys.mT, out=scores).mul_(self.weights)
        torch.bmm(torch.mul(p, self.start, out=decayed), self.states, out=out)
        return out.baddbmm_(scores, self.keys).addcmul_(p, self.lamb)

    def diagonal(self) -> Float[Tensor, "rows time dim"]:
        """The diagonal of each A_t."""
        own = torch.bmm(self.weights, self.keys.square())
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

    def solve(chunks: Chunks, b: Tensor) -> Rows:
        operator = chunks.operator()
        x = first_guess(operator, b, options.init)
        r = b - operator.apply(x, _scratch(b), torch.empty_like(b))
        return conjugate_gradients(operator, x, r, options.max_steps, options.eps)

    return _by_segments(system, options.chunk_size, solve)


def solve_block_rls(system: System, options: CGOptions) -> Solution:
    """To rounding: preconditioned by the block's own inverses where gates are near 1, plain CG where they are not."""
    return _by_segments(system, min(options.chunk_size, BLOCK), _hybrid, SEGMENTS)


def relative_residual(
    x: Float[Tensor, "batch time heads dim"], system: System, chunk_size: int
) -> Float[Tensor, "batch time heads"]:
    """|q - A x| / |q|; 0 where q = 0."""
    q = system.q
    ax, state = torch.empty_like(q), system.h_kk.flatten(0, 1)
    for piece in cut(q.shape, q.shape[3], chunk_size, q.device):
        chunks, state = _chunks(system, state, piece)
        p = to_chunks(x, piece, q.dtype)
        from_chunks(chunks.operator().apply(p, _scratch(p), torch.empty_like(p)), piece, ax)
    scale = _size(q)
    size = torch.linalg.vector_norm(q / scale, dim=-1)
    missing = torch.linalg.vector_norm(ax.sub_(q).div_(scale), dim=-1)
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


def conjugate_gradients(operator: Operator, x: Tensor, r: Tensor, max_steps: int, eps: float) -> Rows:
    """Algorithm 1 on every element at once, from x with residual r, both in place: stop where |r| <= eps |r_0|.

    Chunks that have stopped leave the batch.  Divisions are guarded by the smallest normal number alone: an additive
    constant would stop the convergence.  It must be far below |r_0|^2, hence right-hand sides of size 1.
    """
    tiny = torch.finfo(x.dtype).tiny
    scratch, s = _scratch(r), torch.empty_like(r)
    p, delta = r.clone(), _dot(r, r, scratch)
    goal = (eps * eps * delta).clamp_(min=tiny)
    active = delta > tiny
    steps = torch.zeros(r.shape[:2], dtype=torch.int64, device=r.device)
    found, rows = Rows(x, steps, active), torch.arange(len(r), device=r.device)
    for _ in range(max_steps):
        operator.apply(p, scratch, s)
        curvature = _dot(p, s, scratch)
        alpha = torch.where(active & (curvature > tiny), delta / curvature, 0.0)[:, :, None]
        x.addcmul_(p, alpha)
        r.addcmul_(s, alpha, value=-1.0)
        steps.add_(active)
        before, delta = delta, _dot(r, r, scratch)
        active.logical_and_(delta > goal)
        torch.addcmul(r, p, torch.where(active, delta / before, 0.0)[:, :, None], out=p)
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


def _hybrid(chunks: Chunks, b: Tensor) -> Rows:
    """Rows whose gates ask for the same number of preconditioned iterations together; plain iterations for the rest."""
    needed = _iterations(chunks.logs[:, 1:].sum(1).exp_(), b.dtype)
    steps = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
    answer = Rows(b, steps, torch.zeros_like(steps, dtype=torch.bool))
    at_once = max(1, TOGETHER // b[0].numel()) if b.device.type == "cpu" else len(b)
    order = needed.argsort(descending=True, stable=True)
    direct, plain = order.tensor_split([int((needed > 0).sum())])
    for rows in direct.split(at_once) if len(direct) else ():
        counts = needed[rows]
        if counts[-1] >= SIMILAR * counts[0]:
            rows, counts = rows.sort().values, counts[:1].expand_as(counts)
        where = _slice(rows)
        for part, x in _block_rls(chunks.take(where), b[where], counts):
            answer.x[_slice(rows[part])] = x
        answer.steps[where] = counts[:, None] - 1
    for rows in plain.split(at_once) if len(plain) else ():
        where, most = _slice(rows), 2 * b.shape[2] + 50
        r, operator = b[where], chunks.take(where).operator()
        found = conjugate_gradients(operator, torch.zeros_like(r), r, most, TOLERANCE[b.dtype])
        for whole, some in zip(answer, found, strict=True):
            whole[where] = some
    return answer


def _slice(rows: Int[Tensor, " some"]) -> slice | Int[Tensor, " some"]:
    """Rows at equal distances, such as one head's, as a slice: no copy."""
    numbers = rows.tolist()
    step = max(1, numbers[1] - numbers[0]) if len(numbers) > 1 else 1
    even = range(numbers[0], numbers[-1] + 1, step)
    return slice(even.start, even.stop, step) if numbers == list(even) else rows


def _iterations(product: Float[Tensor, " rows"], dtype: torch.dtype) -> Int[Tensor, " rows"]:
    """Applications of M^-1 after which the error is below `TOLERANCE`; 0: too many.

    The error falls as 2 rho^n with rho = (sqrt kappa - 1) / (sqrt kappa + 1), where kappa = product^-1/2 bounds the
    condition number of M^-1 A and `product` is that of the chunk's gates but its first.
    """
    kappa = product.double().clamp(min=LEAST_PRODUCT).rsqrt()
    rho = (kappa.sqrt() - 1) / (kappa.sqrt() + 1)
    count = (math.log(TOLERANCE[dtype] / 2) / rho.log()).ceil().clamp(min=1).nan_to_num()
    return torch.where(product >= LEAST_PRODUCT, count, 0).long()


def _block_rls(
    chunks: Chunks, b: Float[Tensor, "rows time dim"], counts: Int[Tensor, " rows"]
) -> Iterator[tuple[slice, Tensor]]:
    """x by Chebyshev's semi-iteration from zero on (N + w Lambda) x = b / zeta; the operands are overwritten.

    N = M / zeta = H_c + c0 Lambda + sum_i (beta_i / zeta_i) k_i k_i^T and w = 1 / zeta - c0, so that A - M is diagonal.
    With P = (H_c + c0 Lambda)^-1 and L L^T = I + K P K^T, N_t^-1 = P - sum_{i <= t} f_i f_i^T for all t, where
    F = L^-1 K P: causal linear attention.  The spectrum of N^-1 (N + w Lambda) lies between 1 and 1 + w / c0.
    `counts` are the applications of N^-1, not increasing, so that rows that are done are the last ones.
    """
    chunks.logs[:, 0] = 0.0  # the first gate is in the state: zeta from there
    zeta = chunks.logs.cumsum(1).exp_().to(b.dtype)[:, :, None]
    c0, lamb = zeta[:, -1:].rsqrt(), chunks.lamb[:, None]
    state = chunks.states.mul_(chunks.start[:, :1, None])
    state.diagonal(dim1=1, dim2=2).addcmul_(c0[:, 0], chunks.lamb)
    root = _inverse_factor(state)
    inverse = torch.bmm(root.mT, root)
    del root
    keys = chunks.keys.mul_((chunks.beta[:, :, None] / zeta).sqrt_())
    factor = torch.bmm(keys, inverse)
    gram = torch.bmm(keys, factor.mT)
    gram.diagonal(dim1=1, dim2=2).add_(1.0)
    factor = torch.bmm(_inverse_factor(gram), factor)
    r, x, before = torch.empty_like(b), torch.empty_like(b), torch.zeros_like(b)

    def add_solved(out: Tensor, share: float) -> Tensor:
        """share out + N^-1 r: a factor a token commutes with N^-1."""
        scores = torch.bmm(r, factor.mT, out=gram).tril_()
        return out.baddbmm_(r, inverse, beta=share).baddbmm_(scores, factor, alpha=-1.0)

    b.div_(zeta)
    w = zeta.reciprocal() - c0
    twice_center, square = w / c0 + 2, (0.5 * w / c0).square_()
    diagonal, tau = w * lamb, 2 / twice_center
    torch.mul(b, tau, out=r)
    add_solved(x, 0.0)
    ends = counts.tolist()
    for step in range(1, ends[0]):
        n = sum(end > step for end in ends)
        if n < len(x):
            yield slice(n, len(x)), x[n:]
            live = (inverse, factor, gram, b, twice_center, square, diagonal, r, tau, x, before)
            inverse, factor, gram, b, twice_center, square, diagonal, r, tau, x, before = (t[:n] for t in live)
        last, tau = tau, torch.addcmul(twice_center, square, tau, value=-1.0).reciprocal_()
        push, pull = 2 * tau, square * tau * last
        torch.addcmul(b, diagonal, x, value=-1.0, out=r).mul_(push)
        before.mul_(-pull).addcmul_(x, 1 + pull - push)
        x, before = add_solved(before, 1.0), x
    yield slice(0, len(x)), x


def _inverse_factor(
    matrices: Float[Tensor, "rows dim dim"], out: Tensor | None = None
) -> Float[Tensor, "rows dim dim"]:
    """The inverse of the lower Cholesky factor, by halves: products, three times as fast as batched factorizations.

    `out` is zero above the diagonal.  Halves of the inverse itself would be less work, and lose two digits where every
    key is the same.
    """
    dim = matrices.shape[1]
    out = torch.zeros_like(matrices, memory_format=torch.contiguous_format) if out is None else out
    if dim <= LEAF:
        eye = torch.eye(dim, dtype=matrices.dtype, device=matrices.device)
        return out.copy_(torch.linalg.solve_triangular(torch.linalg.cholesky_ex(matrices).L, eye, upper=False))
    half = dim // 2
    upper = _inverse_factor(matrices[:, :half, :half], out[:, :half, :half])
    below = torch.bmm(matrices[:, half:, :half], upper.mT)
    rest = torch.baddbmm(matrices[:, half:, half:], below, below.mT, alpha=-1.0)
    lower = _inverse_factor(rest, out[:, half:, half:])
    torch.neg(torch.bmm(torch.bmm(lower, below), upper), out=out[:, half:, :half])
    return out


def _by_segments(system: System, chunk_size: int, solve: Callable[[Chunks, Tensor], Rows], scale: int = 1) -> Solution:
    """Solve a segment after the other, from each one's first state, for right-hand sides of largest element 1."""
    q, h_kk = system.q, system.h_kk
    x = torch.empty_like(q, memory_format=torch.contiguous_format)
    steps = torch.zeros(q.shape[:3], dtype=torch.int64, device=q.device)
    unconverged = torch.zeros_like(steps, dtype=torch.bool)
    state = h_kk.flatten(0, 1)
    for piece in cut(q.shape, q.shape[3], chunk_size, q.device, scale):
        chunks, state = _chunks(system, state, piece)
        b = to_chunks(q, piece, q.dtype)
        size = _size(b)
        found = solve(chunks, b.div_(size))
        found.x.mul_(size)
        for part, whole in zip(found, (x, steps, unconverged), strict=True):
            from_chunks(part, piece, whole)
    return Solution(x, state.view(h_kk.shape), steps, unconverged)


def _chunks(
    system: System, state: Float[Tensor, "rows dim dim"], piece: Segment
) -> tuple[Chunks, Float[Tensor, "rows dim dim"]]:
    """The chunks of a segment that begins in `state`, and the state after it."""
    dtype, lamb = system.k.dtype, system.lamb
    keys, beta = to_chunks(system.k, piece, dtype), to_chunks(system.beta, piece, dtype)
    decays = decays_of(system.g, piece, dtype, within=False)
    states = chunk_states(keys * (beta * decays.end)[:, :, None], keys, decays, state)
    penalties = lamb.expand(piece.n_chunks, system.k.shape[0], *lamb.shape).flatten(0, 2)
    logs = to_chunks(system.g, piece, torch.float64)
    return Chunks(keys, beta, logs, decays.start, states[:-1].flatten(0, 1), penalties), states[-1]


def _size(b: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows 1"]:
    """The largest absolute element of each vector, 1 for zero: squares of b / size are far from under- and overflow."""
    size = b.abs().amax(-1, keepdim=True)
    return size.masked_fill_(size == 0, 1.0)


def _scratch(p: Float[Tensor, "rows time dim"]) -> tuple[Tensor, Tensor]:
    """Room for scores and for one more operand."""
    return p.new_empty(p.shape[0], p.shape[1], p.shape[1]), torch.empty_like(p)


def _dot(a: Tensor, b: Tensor, scratch: tuple[Tensor, Tensor]) -> Float[Tensor, "rows time"]:
    return torch.mul(a, b, out=scratch[1]).sum(-1)
