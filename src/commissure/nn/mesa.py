"""The Mesa layer: linear attention whose values are read with the exact solution of a ridge regression at every step.

    Phi_t = argmin_Phi 1/2 sum_{i <= t} zeta_ti beta_i |v_i - Phi k_i|^2 + 1/2 tr(Phi Lambda Phi^T),  o_t = Phi_t q_t
    H_t = gamma_t H_{t-1} + beta_t k_t k_t^T,   G_t = gamma_t G_{t-1} + beta_t v_t k_t^T,   x_t = (H_t + Lambda)^-1 q_t
    o_t = G_t x_t

so that Lambda does not decay (a rank-one update of the inverse would solve another problem).  With e_t the gradient
of o_t, u_t = G_t^T e_t and a second solve y_t = (H_t + Lambda)^-1 u_t, the gradients are dq_t = y_t, dLambda =
-sum_t y_t * x_t, those of the linear attention sum_t e_t^T G_t x_t, and minus those of sum_t y_t^T H_t x_t: exact
where x is, for every solver, from q, k, v, g, beta, lamb and x alone.

| paper | here |
|---|---|
| q*_t | `x` |
| log gamma_t, beta_t, Lambda | `g`, `beta`, `lamb` |
| H_t, G_t^T | `MesaState.h_kk`, `.h_kv` |
| b_gamma | `forget_cap`: gamma (1 - (1 - b_gamma) beta^2), which bounds the condition number of H + Lambda |

von Oswald et al., arXiv 2506.05233, section 2, appendix D (chunks, backward), appendix E and G.5 (parametrization).
Names and layout of flash-linear-attention.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from commissure.core.errors import CommissureWarning, InputError
from commissure.core.first_order import first_order_only
from commissure.core.mixer import select
from commissure.native.linear_attention import linear_attention
from commissure.native.mesa import mesa_kernel_available, mesa_solve, mesa_solve_reference, mesa_step
from commissure.native.mesa_gradients import mesa_gradients
from commissure.nn.decay import exempt
from commissure.nn.heads import FORGET_BIAS, ConvState, HeadInputs, HeadOutput, gate_projection, head_sizes
from commissure.nn.linear_attention import (
    attend,
    attend_backward,
    compute_dtype,
    cut,
    in_chunks,
    runs_native,
    segment_backward,
    states_of,
)
from commissure.nn.mesa_checks import (
    HALF,
    caller_level,
    check_cg,
    check_gram,
    check_operands,
    check_state,
    sequence_bounds,
)
from commissure.nn.mesa_solvers import (
    CGOptions,
    Solution,
    System,
    relative_residual,
    solve_block_rls,
    solve_cg,
    solve_cholesky,
    solve_sequential,
    solve_triton,
)
from commissure.nn.padding import check_sequence, check_step, valid, zero_padding

__all__ = [
    "MesaConvergenceWarning",
    "MesaInfo",
    "MesaLayer",
    "MesaLayerState",
    "MesaOutput",
    "MesaState",
    "mesa_attention",
]

SOLVERS = {
    "block_rls": solve_block_rls,
    "cg": solve_cg,
    "cholesky": solve_cholesky,
    "sequential": solve_sequential,
    "triton": solve_triton,
}


class MesaConvergenceWarning(CommissureWarning):
    """Conjugate gradients reached their last step before the residual asked for."""


class MesaState(NamedTuple):
    """What the layer remembers: sum zeta beta k k^T (symmetric, positive semidefinite) and sum zeta beta k v^T."""

    h_kk: Float[Tensor, "batch heads dim dim"]
    h_kv: Float[Tensor, "batch heads dim value_dim"]


class MesaInfo(NamedTuple):
    """Of each element: iterations (0: direct), |q - (H + Lambda) x| / |q|, and tr H (H + Lambda)^-1."""

    cg_steps: Int[Tensor, "batch time heads"]
    residual: Float[Tensor, "batch time heads"]
    dof: Float[Tensor, "batch time heads"]


class MesaOutput(NamedTuple):
    """Outputs, the state after the last element, and `MesaInfo` where it was asked for."""

    output: Float[Tensor, "batch time heads value_dim"]
    state: MesaState
    info: MesaInfo | None


class Options(NamedTuple):
    """Solvers of the forward and of the backward, and how they run."""

    solver: str
    backward_solver: str
    cg: CGOptions
    return_info: bool = False


def mesa_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"],
    lamb: Float[Tensor, "heads dim"],
    *,
    initial_state: MesaState | None = None,
    cu_seqlens: Int[Tensor, " sequences_plus_1"] | None = None,
    chunk_size: int = 64,
    solver: str = "auto",
    max_cg_steps: int = 30,
    cg_eps: float = 0.0,
    cg_init: str = "diag",
    backward_solver: str | None = None,
    return_info: bool = False,
) -> MesaOutput:
    """Outputs of the Mesa layer; g = log gamma <= 0 (-inf forgets everything), beta in [0, 1], lamb > 0.

    `solver` is "cholesky" (compiled, CPU), "block_rls" (exact, torch alone, any device), "cg" (the paper's: at most
    `max_cg_steps`, or until |r| <= cg_eps |r_0|, from `cg_init` "diag", "zero" or "query"), "sequential" (a loop),
    "triton" ("cg" as GPU kernels, never run on a GPU yet, hence not in "auto"), or "auto": cholesky where it can run,
    else block_rls.  The backward solves with `backward_solver` (default the same).
    `cu_seqlens` [N + 1] cuts the one row of a batch of 1 into N sequences, with N rows of states.  Half-precision
    inputs are computed in float32 and outputs cast back; states are float32, or float64 for float64.

    Raises InputError for shapes, NaN, values out of range (naming the first), an h_kk that is not symmetric and
    positive semidefinite; warns `MesaConvergenceWarning` where cg_eps > 0 was not reached.

    >>> k, gate = torch.eye(2).view(1, 2, 1, 2), torch.zeros(1, 2, 1)  # orthonormal keys: recall v beta / (beta + lamb)
    >>> v = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    >>> mesa_attention(k, k, v, gate, gate + 1, torch.ones(1, 2)).output.flatten()
    tensor([1.5000, 2.5000])
    """
    check_cg(chunk_size, max_cg_steps, cg_eps, cg_init)
    check_operands(q, k, v, g, beta, lamb)
    forward, backward = solver_for(solver, q.device), solver_for(backward_solver or solver, q.device)
    options = Options(forward, backward, CGOptions(chunk_size, max_cg_steps, cg_eps, cg_init), return_info)
    batch, time, heads, dim = q.shape
    bounds = None if cu_seqlens is None else sequence_bounds(cu_seqlens, batch, time)
    rows = batch if bounds is None else len(bounds) - 1
    state = zero_state(rows, heads, dim, v.shape[3], device=q.device, dtype=compute_dtype(q, k, v))
    if initial_state is not None:
        state = _checked(initial_state, state)
    if bounds is None:
        return attend_mesa(q, k, v, g, beta, lamb, state, options)
    return _attend_packed((q, k, v, g, beta), lamb, state, bounds, options)


def solver_for(name: str, device: torch.device) -> str:
    """The solver that runs: "auto" resolved, an unknown or impossible one refused.

    >>> solver_for("auto", torch.device("cuda"))
    'block_rls'
    """
    if name == "auto":
        return "cholesky" if device.type == "cpu" and mesa_kernel_available() else "block_rls"
    if name not in SOLVERS:
        raise InputError("solver", name, f"one of auto, {', '.join(sorted(SOLVERS))}")
    if name == "cholesky" and device.type != "cpu":
        raise InputError("solver", name, f"another one on {device}", "the kernel runs on the CPU; pass solver='auto'")
    if name == "triton":
        from commissure.native.mesa_triton import check_triton

        check_triton("solver", name, device)
    return name


def zero_state(
    batch: int, heads: int, dim: int, value_dim: int, *, device: torch.device | str, dtype: torch.dtype
) -> MesaState:
    """Nothing seen."""
    return MesaState(
        torch.zeros(batch, heads, dim, dim, device=device, dtype=dtype),
        torch.zeros(batch, heads, dim, value_dim, device=device, dtype=dtype),
    )


def _checked(given: MesaState, like: MesaState) -> MesaState:
    """A state in the dtype of the computation, symmetric and positive semidefinite; `InputError` where it is not."""
    parts = zip(MesaState._fields, given, like, strict=True)
    h_kk, h_kv = (check_state(name, x, empty.shape, empty.dtype, empty.device) for name, x, empty in parts)
    return MesaState(check_gram(h_kk, given.h_kk.dtype), h_kv)


def attend_mesa(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, lamb: Tensor, state: MesaState, options: Options
) -> MesaOutput:
    """`mesa_attention` of one batch without checks."""
    operands = (q, k, v, g, beta, lamb, *state)
    if q.shape[1] == 1 and options.solver == "cholesky" and not (options.return_info or _is_differentiated(operands)):
        dtype = compute_dtype(q, k, v)
        cast = [x if x.dtype == dtype else x.to(dtype) for x in operands]
        o, *last = mesa_step(*[x.squeeze(1) for x in cast[:5]], *cast[5:])
        return MesaOutput(o.unsqueeze(1).to(v.dtype), MesaState(*last), None)
    o, h_kk, h_kv, *info = _MesaAttention.apply(q, k, v, g, beta, lamb, *state, options)
    return MesaOutput(o, MesaState(h_kk, h_kv), MesaInfo(*info) if options.return_info else None)


def _is_differentiated(operands: tuple[Tensor, ...]) -> bool:
    """Whether anything here may have a derivative, backward or forward."""
    if torch.is_inference_mode_enabled():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return True
    return any(unpack_dual(x).tangent is not None for x in operands)


def _attend_packed(
    sequences: tuple[Tensor, ...], lamb: Tensor, state: MesaState, bounds: list[int], options: Options
) -> MesaOutput:
    """Sequences of a packed row, in batches of lengths between two powers of two so that padding at most doubles them.

    Padding writes nothing (beta = 0) and forgets nothing (g = 0).
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    groups: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(max(length - 1, 0).bit_length() if length else -1, []).append(number)
    device, places, outputs = lamb.device, [], []
    for numbers in groups.values():
        count = torch.tensor([lengths[n] for n in numbers], device=device)
        first = torch.tensor([bounds[n] for n in numbers], device=device)
        is_real = valid(count, int(count.max()))
        index = (first[:, None] + torch.arange(is_real.shape[1], device=device)).where(is_real, 0)
        q, k, v, g, beta = (x[0][index] for x in sequences)
        g, beta = (gate.masked_fill(~is_real[:, :, None], 0.0) for gate in (g, beta))
        rows = torch.tensor(numbers, device=device)
        outputs.append((attend_mesa(q, k, v, g, beta, lamb, select(state, rows), options), is_real))
        places.append((index[is_real], rows))
    back = torch.cat([place for place, _ in places]).argsort()
    rows = torch.cat([row for _, row in places]).argsort()
    output = torch.cat([out.output[real] for out, real in outputs])[back][None]
    last = MesaState(*(torch.cat(parts)[rows] for parts in zip(*(out.state for out, _ in outputs), strict=True)))
    if not options.return_info:
        return MesaOutput(output, last, None)
    infos = zip(*([part[real] for part in out.info or ()] for out, real in outputs), strict=True)
    return MesaOutput(output, last, MesaInfo(*(torch.cat(parts)[back][None] for parts in infos)))


class _MesaAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        lamb: Tensor,
        h_kk: Tensor,
        h_kv: Tensor,
        options: Options,
    ) -> tuple[Tensor | None, ...]:
        dtype = compute_dtype(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            system = System(*(t.to(dtype) for t in (q, k, g, beta, lamb, h_kk)))
            solution = _solve(options.solver, system, options.cg)
            native = _runs_native(options.solver, q.device)
            o, _, h_kv_last = attend(solution.x, k, v, g, beta, h_kv, chunk_size=options.cg.chunk_size, native=native)
            info = _info(solution.x, solution.steps, system, options.cg.chunk_size) if options.return_info else ()
            ctx.mark_non_differentiable(*info)
        ctx.save_for_backward(k, v, g, beta, lamb, solution.x, h_kk, h_kv)
        ctx.options, ctx.dtypes = options, [t.dtype for t in (q, k, v, g, beta, lamb, h_kk, h_kv)]
        last = h_kk.to(dtype, copy=True) if q.shape[1] == 0 else solution.h_kk
        return o, last, h_kv_last, *info

    @staticmethod
    @first_order_only("mesa_attention", "mesa_attention_reference")
    def backward(ctx: Any, d_o: Tensor, d_h_kk: Tensor, d_h_kv: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_o.device.type, enabled=False):
            grads = _backward(ctx.saved_tensors, d_o, d_h_kk, d_h_kv, ctx.options)
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None


def _backward(
    saved: tuple[Tensor, ...], d_o: Tensor, d_h_kk: Tensor, d_h_kv: Tensor, options: Options
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, g, beta, lamb, h_kk and h_kv by implicit differentiation."""
    k, v, g, beta, lamb, x, h_kk, h_kv = saved
    if _runs_native(options.backward_solver, k.device):
        return _backward_native(saved, d_o, d_h_kk, d_h_kv, options)
    how: Any = {"chunk_size": options.cg.chunk_size, "native": False}
    states = states_of(k, v, g, beta, h_kv, **how)
    u, d_k, d_v, d_g, d_beta, d_h_kv = attend_backward(x, k, v, g, beta, states, d_o, d_h_kv, **how)
    y = _solve(options.backward_solver, System(u, *(t.to(x.dtype) for t in (k, g, beta, lamb, h_kk))), options.cg).x
    del u
    d_lamb = (x * y).sum((0, 1)).neg_()
    # Minus the gradients of sum_t y_t^T H_t x_t, where k is key and value; segment by segment, onto what is there.
    states = states_of(k, k, g, beta, h_kk, **how)
    d_state = -d_h_kk.to(x.dtype).flatten(0, 1)
    pieces = cut(k.shape, k.shape[3], options.cg.chunk_size, k.device)
    for number in reversed(range(len(pieces))):
        piece = pieces[number]
        parts = segment_backward(x, k, k, g, beta, states[number], y, d_state, piece)
        d_state = parts.initial_state
        for part, whole in ((parts.k, d_k), (parts.v, d_k), (parts.g, d_g), (parts.beta, d_beta)):
            view = in_chunks(whole, piece)
            view.sub_(part.view(view.shape))
    d_state = d_state.view(h_kk.shape)
    return y, d_k, d_v, d_g, d_beta, d_lamb, (d_state + d_state.mT).mul_(-0.5), d_h_kv


def _backward_native(
    saved: tuple[Tensor, ...], d_o: Tensor, d_h_kk: Tensor, d_h_kv: Tensor, options: Options
) -> tuple[Tensor, ...]:
    """`_backward` by the kernels; u is an attention too, from the values to the keys."""
    dtype = saved[5].dtype
    k, v, g, beta, lamb, x, h_kk, h_kv = (part.to(dtype) for part in saved)
    d_o, d_h_kk, d_h_kv = (part.to(dtype) for part in (d_o, d_h_kk, d_h_kv))
    exact = saved[2].double()
    u, _ = linear_attention(d_o, v, k, exact, beta, h_kv.mT)
    y = _solve(options.backward_solver, System(u, k, g, beta, lamb, h_kk), options.cg).x
    return y, *mesa_gradients(x, y, k, v, exact, beta, lamb, h_kk, h_kv, d_o, d_h_kk, d_h_kv)


def _runs_native(solver: str, device: torch.device) -> bool:
    """The compiled attention goes with the compiled solver; the others are of torch alone, on every device."""
    return solver == "cholesky" and runs_native(device)


def _solve(solver: str, system: System, options: CGOptions) -> Solution:
    """Solve, and say where an iteration did not get there."""
    solution = SOLVERS[solver](system, options)
    missed = solution.unconverged
    if missed is None or (solver == "cg" and options.eps == 0.0) or not bool(missed.any()):
        return solution
    first = tuple(missed.nonzero()[0].tolist())
    goal = f"cg_eps={options.eps:g} in max_cg_steps={options.max_steps}" if solver == "cg" else "rounding"
    warnings.warn(
        f"{solver} did not reach {goal} at {int(missed.sum())} of {missed.numel()} elements, the first at "
        f"(batch, time, head) = {first}; take more steps, a larger lamb, or solver='auto'",
        MesaConvergenceWarning,
        stacklevel=caller_level(),
    )
    return solution


def _info(x: Tensor, steps: Tensor | None, system: System, chunk_size: int) -> MesaInfo:
    """Iterations, relative residual, and degrees of freedom (by a direct solve, whatever gave x)."""
    if steps is None:
        steps = torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
    direct = mesa_solve if x.device.type == "cpu" else mesa_solve_reference
    _, _, dof = direct(*system, dof=True)
    assert dof is not None
    return MesaInfo(steps, relative_residual(x, system, chunk_size), dof)


class MesaLayerState(NamedTuple):
    """The convolutions' last inputs, and the memory."""

    conv: ConvState
    memory: MesaState


class MesaLayer(nn.Module):
    """The Mesa layer as a sequence mixer: projections, short convolutions, gates, solve, norm.

    gamma = sigmoid(W_a x + b_a), beta = sigmoid(W_b x + b_b), Lambda = lambda_lower_bound + softplus(theta), a number a
    head and key dimension, `lambda_init` at first.  `forget_cap` b turns gamma into gamma (1 - (1 - b) beta^2), which
    keeps H + Lambda well conditioned (None: off).  `solver`, `max_cg_steps`, `cg_eps` and `cg_init` are those of
    `mesa_attention` and may be set at any time; no parameter depends on them.  `lambda_params` (theta) is
    exempt from weight decay.

    >>> layer = MesaLayer(8, heads=2)
    >>> y, state = layer(torch.zeros(1, 3, 8))
    >>> y.shape, state.memory.h_kk.shape, state.conv.keys.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 4, 4]), torch.Size([1, 3, 8]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        silu: bool = True,
        output_norm: bool = True,
        lambda_init: float = 1.0,
        lambda_lower_bound: float = 0.25,
        forget_cap: float | None = 0.9975,
        forget_bias: float = FORGET_BIAS,
        solver: str = "auto",
        max_cg_steps: int = 30,
        cg_eps: float = 0.0,
        cg_init: str = "diag",
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        value_dim = head_dim if value_dim is None else value_dim
        if lambda_lower_bound < 0 or not math.isfinite(lambda_lower_bound):
            raise InputError("lambda_lower_bound", lambda_lower_bound, "a finite number >= 0")
        if not lambda_lower_bound < lambda_init < math.inf:
            raise InputError("lambda_init", lambda_init, f"a finite number > lambda_lower_bound = {lambda_lower_bound}")
        if forget_cap is not None and not 0.0 < forget_cap <= 1.0:
            raise InputError("forget_cap", forget_cap, "a number in (0, 1], or None for no cap")
        check_cg(1, max_cg_steps, cg_eps, cg_init)
        solver_for(solver, torch.device("cpu"))
        self.dim, self.heads, self.head_dim, self.value_dim = dim, heads, head_dim, value_dim
        self.lambda_lower_bound, self.forget_cap = lambda_lower_bound, forget_cap
        self.solver, self.max_cg_steps, self.cg_eps, self.cg_init = solver, max_cg_steps, cg_eps, cg_init
        self.inputs = HeadInputs(
            dim, heads=heads, head_dim=head_dim, value_dim=value_dim, conv_size=conv_size, silu=silu
        )
        self.a_proj = gate_projection(dim, heads, bias=forget_bias)
        self.b_proj = gate_projection(dim, heads)
        excess = lambda_init - lambda_lower_bound
        theta = excess + math.log(-math.expm1(-excess))  # the inverse of softplus
        self.lambda_params = nn.Parameter(torch.full((heads * head_dim,), theta))
        exempt(self, ["lambda_params"])
        self.output = HeadOutput(dim, heads=heads, value_dim=value_dim, norm=output_norm)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MesaLayerState:
        """Nothing seen; the memory is float32 for half precision."""
        device, dtype = device or self.lambda_params.device, dtype or self.lambda_params.dtype
        memory = zero_state(
            batch_size,
            self.heads,
            self.head_dim,
            self.value_dim,
            device=device,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        return MesaLayerState(self.inputs.init_state(batch_size, device=device, dtype=dtype), memory)

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: MesaLayerState
    ) -> tuple[Float[Tensor, "batch dim"], MesaLayerState]:
        """One element in, one out."""
        check_step(x_t, self.dim, state)
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MesaLayerState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MesaLayerState]:
        """A whole stretch."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        q, k, v, g, beta, lamb, conv = self.project(x, state, lengths)
        forward = solver_for(self.solver, x.device)
        options = Options(forward, forward, CGOptions(64, self.max_cg_steps, self.cg_eps, self.cg_init))
        memory = state.memory
        if any(part.dtype in HALF for part in memory):
            memory = _checked(memory, self.init_state(x.shape[0], device=x.device, dtype=x.dtype).memory)
        mixed = attend_mesa(q, k, v, g, beta, lamb, memory, options)
        return self.output(mixed.output), MesaLayerState(conv, mixed.state)

    def project(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MesaLayerState | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, ConvState]:
        """The arguments of `mesa_attention` (q, k, v, g, beta, lamb), and the convolutions' state after them."""
        x = zero_padding(x, lengths)
        q, k, v, conv = self.inputs(x, None if state is None else state.conv, lengths=lengths)
        g, beta = F.logsigmoid(self.a_proj(x)), torch.sigmoid(self.b_proj(x))
        if self.forget_cap is not None:
            g = g + torch.log1p((self.forget_cap - 1.0) * beta.square())
        if lengths is not None:
            is_padding = ~valid(lengths, x.shape[1])[:, :, None]
            g, beta = g.masked_fill(is_padding, 0.0), beta.masked_fill(is_padding, 0.0)
        lamb = self.lambda_lower_bound + F.softplus(self.lambda_params)
        return q, k, v, g, beta, lamb.view(self.heads, self.head_dim), conv
