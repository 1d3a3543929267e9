"""Gated linear attention, the operator under every linear mixer here: chunkwise, with a backward written by hand.

    S_t = gamma_t S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t,    zeta_ti = gamma_{i+1} ... gamma_t

With c a chunk's start, o_t = zeta_tc S_c^T q_t + sum_{c < i <= t} zeta_ti beta_i (q_t . k_i) v_i: dense products inside
a chunk, one state between chunks.  The chunks are taken a segment at a time, small enough for the cache; a segment's
first state is kept for the backward, the states of its chunks are computed again there, so memory is O(T D).

On a CPU, `native.linear_attention`, where it is built, does the same in chunks of 16 and keeps the first state only.

The backward, with e_t the gradient of o_t and R_t = sum_{s >= t} zeta_st q_s e_s^T + zeta_Tt R_T that of S_t:

    dq_t = S_t e_t,    dk_t = beta_t R_t v_t,    dv_t = beta_t R_t^T k_t,    dbeta_t = k_t^T R_t v_t,    dS_0 = R_0
    dg_s = gamma_s <R_s, S_{s-1}>,  summed over the pairs i < s <= t so that nothing cancels between chunks

| paper | here |
|---|---|
| log gamma, beta | `g`, `beta` |
| S, key-major (D, Dv) | `state` |
| zeta_tc, zeta_ei (e the chunk's end), zeta_ti, zeta_ec | `Decays.start`, `.end`, `.within`, `.total` |

Yang et al., arXiv 2312.06635, section 4 (chunkwise form); names and layout of flash-linear-attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from commissure.core.errors import InputError
from commissure.core.first_order import first_order_only
from commissure.native.linear_attention import (
    linear_attention,
    linear_attention_backward,
    linear_attention_kernel_available,
    linear_attention_reference,
)

__all__ = ["gated_linear_attention", "gated_linear_attention_reference"]

# exp(-1024) is zero in double precision: gates below it forget everything, and are counted instead of summed, so that
# the sums around them keep their digits and -inf never meets -inf.
FORGOTTEN = -1024.0
# Elements of one (batch, heads, time, dim) tensor in a segment: a dozen such tensors are worked on together, on a CPU
# they should stay in its second-level cache, a GPU wants long launches.
CPU_SEGMENT, GPU_SEGMENT = 2**17, 2**24


class Segment(NamedTuple):
    """Time steps [start, stop), a whole number of chunks of length `chunk`."""

    start: int
    stop: int
    chunk: int

    @property
    def n_chunks(self) -> int:
        """How many chunks."""
        return (self.stop - self.start) // self.chunk


class Decays(NamedTuple):
    """Products of gates in each chunk, chunks in the order (chunk, batch, head)."""

    start: Float[Tensor, "chunks time"]
    end: Float[Tensor, "chunks time"]
    within: Float[Tensor, "chunks time time"]
    total: Float[Tensor, "n_chunks rows 1 1"]


def gated_linear_attention(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None = None,
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """Outputs and final state; g = log gamma <= 0 (-inf forgets everything before), beta = 1 where None.

    Any length, zero included.  Half-precision inputs are computed in float32: outputs in `v`'s dtype, the state in
    float32 (float64 for float64).  `chunk_size` trades O(chunk) against O(dim) work an element and changes no result;
    the compiled kernel has its own.

    >>> one = torch.ones(1, 3, 1, 1)
    >>> o, state = gated_linear_attention(one, one, one, torch.full((1, 3, 1), 0.5).log())
    >>> o.flatten().tolist(), state.item()
    ([1.0, 1.5, 1.75], 1.75)
    """
    check_shapes(q, k, v, g, beta, initial_state)
    if chunk_size < 1:
        raise InputError("chunk_size", chunk_size, "an integer >= 1")
    if initial_state is None:
        batch, _, heads, dim = q.shape
        initial_state = q.new_zeros(batch, heads, dim, v.shape[3], dtype=compute_dtype(q, k, v))
    o, final_state = _GatedLinearAttention.apply(q, k, v, g, beta, initial_state, chunk_size)
    return o, final_state


def gated_linear_attention_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None = None,
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """The recurrence itself, differentiated by autograd; `chunk_size` is ignored."""
    if initial_state is None:
        batch, _, heads, dim = q.shape
        initial_state = q.new_zeros(batch, heads, dim, v.shape[3])
    return linear_attention_reference(q, k, v, g, beta, initial_state)


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial_state: Tensor | None = None
) -> None:
    """Raise `InputError` unless the tensors belong together."""
    if q.ndim != 4:
        raise InputError("q", tuple(q.shape), "shape (batch, time, heads, dim)")
    batch, time, heads, dim = q.shape
    if k.shape != q.shape:
        raise InputError("k", tuple(k.shape), f"shape {tuple(q.shape)}, as q")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or v.shape[3] < 1:
        raise InputError("v", tuple(v.shape), f"shape ({batch}, {time}, {heads}, value_dim >= 1)")
    for name, gate in (("g", g), ("beta", beta)):
        if gate is not None and gate.shape != (batch, time, heads):
            raise InputError(name, tuple(gate.shape), f"shape ({batch}, {time}, {heads}): one number a head")
    shape = (batch, heads, dim, v.shape[3])
    if initial_state is not None and initial_state.shape != shape:
        raise InputError("initial_state", tuple(initial_state.shape), f"shape {shape}, key-major")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where there is one, float32 for everything else: no state is kept in half precision."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def runs_native(device: torch.device) -> bool:
    """Whether the compiled kernel computes on this device."""
    return device.type == "cpu" and linear_attention_kernel_available()


class _GatedLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        initial_state: Tensor,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        native = runs_native(q.device)
        o, states, final_state = attend(q, k, v, g, beta, initial_state, chunk_size=chunk_size, native=native)
        ctx.save_for_backward(q, k, v, g, beta, states)
        ctx.options, ctx.state_dtype = {"chunk_size": chunk_size, "native": native}, initial_state.dtype
        return o, final_state

    @staticmethod
    @first_order_only("gated_linear_attention", "gated_linear_attention_reference")
    def backward(ctx: Any, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, states = ctx.saved_tensors
        grads = attend_backward(q, k, v, g, beta, states, d_o, d_final, **ctx.options)
        d_beta = None if beta is None else grads.beta.to(beta.dtype)
        d_state = grads.initial_state.to(ctx.state_dtype)
        return (
            grads.q.to(q.dtype),
            grads.k.to(k.dtype),
            grads.v.to(v.dtype),
            grads.g.to(g.dtype),
            d_beta,
            d_state,
            None,
        )


class Gradients(NamedTuple):
    """Gradients of one gated linear attention, in the dtype of the computation."""

    q: Float[Tensor, "batch time heads dim"]
    k: Float[Tensor, "batch time heads dim"]
    v: Float[Tensor, "batch time heads value_dim"]
    g: Float[Tensor, "batch time heads"]
    beta: Float[Tensor, "batch time heads"]
    initial_state: Float[Tensor, "batch heads dim value_dim"]


@torch.no_grad()
def attend(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    initial_state: Float[Tensor, "batch heads dim value_dim"],
    *,
    chunk_size: int,
    native: bool,
) -> tuple[
    Float[Tensor, "batch time heads value_dim"],
    Float[Tensor, "segments rows dim value_dim"],
    Float[Tensor, "batch heads dim value_dim"],
]:
    """Outputs, the states before each segment and the last state, without autograd; `native`: by the kernel."""
    dtype = compute_dtype(q, k, v)
    if native:
        o, final_state = linear_attention(*in_dtype(dtype, q, k, v, g, beta, initial_state))
        return o.to(v.dtype), initial_state.flatten(0, 1)[None], final_state
    if v.shape[1] == 1:
        return _attend_once(q, k, v, g, beta, initial_state, dtype)
    pieces = cut(v.shape, q.shape[3], chunk_size, v.device)
    states = _state_buffer(initial_state, len(pieces), dtype)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    with torch.autocast(v.device.type, enabled=False):
        for number, piece in enumerate(pieces):
            queries, keys, values = (to_chunks(x, piece, dtype) for x in (q, k, v))
            if beta is not None:
                keys.mul_(to_chunks(beta, piece, dtype)[:, :, None])
            decays = decays_of(g, piece, dtype)
            scores = torch.bmm(queries, keys.mT).mul_(decays.within)
            starts = chunk_states(keys.mul_(decays.end[:, :, None]), values, decays, states[number])
            states[number + 1] = starts[-1]
            mixed = torch.bmm(queries.mul_(decays.start[:, :, None]), starts[:-1].flatten(0, 1))
            from_chunks(mixed.baddbmm_(scores, values), piece, o)
    return o, states[:-1], states[-1].view(initial_state.shape).clone()


@torch.no_grad()
def states_of(
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    initial_state: Float[Tensor, "batch heads dim value_dim"],
    *,
    chunk_size: int,
    native: bool,
) -> Float[Tensor, "segments rows dim value_dim"]:
    """The states before each segment, as `attend` returns them."""
    if native:
        return initial_state.flatten(0, 1)[None]
    dtype = compute_dtype(k, v)
    pieces = cut(v.shape, k.shape[3], chunk_size, v.device)
    states = _state_buffer(initial_state, len(pieces), dtype)
    with torch.autocast(v.device.type, enabled=False):
        for number, piece in enumerate(pieces):
            keys, values = to_chunks(k, piece, dtype), to_chunks(v, piece, dtype)
            if beta is not None:
                keys.mul_(to_chunks(beta, piece, dtype)[:, :, None])
            decays = decays_of(g, piece, dtype, within=False)
            states[number + 1] = chunk_states(keys.mul_(decays.end[:, :, None]), values, decays, states[number])[-1]
    return states[:-1]


@torch.no_grad()
def attend_backward(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"],
    beta: Float[Tensor, "batch time heads"] | None,
    states: Float[Tensor, "segments rows dim value_dim"],
    d_o: Float[Tensor, "batch time heads value_dim"],
    d_final: Float[Tensor, "batch heads dim value_dim"],
    *,
    chunk_size: int,
    native: bool,
) -> Gradients:
    """Gradients from those of the outputs and of the final state; `states` as `attend` made them."""
    dtype = compute_dtype(q, k, v)
    if native:
        first = states[0].view(d_final.shape)
        return Gradients(*linear_attention_backward(*in_dtype(dtype, q, k, v, g, beta, first, d_o, d_final)))
    grads = Gradients(
        q=torch.empty_like(q, dtype=dtype, memory_format=torch.contiguous_format),
        k=torch.empty_like(k, dtype=dtype, memory_format=torch.contiguous_format),
        v=torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format),
        g=torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format),
        beta=torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format),
        initial_state=torch.empty_like(d_final, dtype=dtype, memory_format=torch.contiguous_format),
    )
    d_state = d_final.to(dtype).flatten(0, 1)
    pieces = cut(v.shape, q.shape[3], chunk_size, v.device)
    for number in reversed(range(len(pieces))):
        parts = segment_backward(q, k, v, g, beta, states[number], d_o, d_state, pieces[number])
        d_state = parts.initial_state
        for part, whole in zip(parts[:5], grads[:5], strict=True):
            from_chunks(part, pieces[number], whole)
    grads.initial_state.copy_(d_state.view(d_final.shape))
    return grads


def in_dtype(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, *states: Tensor
) -> list[Any]:
    """The kernel's operands; gates keep float64's digits."""
    gates = [g.double(), None if beta is None else beta.to(dtype)]
    return [q.to(dtype), k.to(dtype), v.to(dtype), *gates, *(x.to(dtype) for x in states)]


def cut(shape: tuple[int, ...], dim: int, chunk_size: int, device: torch.device, scale: int = 1) -> list[Segment]:
    """Segments of whole chunks, and what is left of the time as one shorter chunk."""
    batch, time, heads, value_dim = shape
    chunk = min(chunk_size, max(time, 1))
    budget = scale * CPU_SEGMENT if device.type == "cpu" else GPU_SEGMENT
    length = chunk * max(1, budget // max(1, batch * heads * chunk * max(dim, value_dim)))
    whole = time // chunk * chunk
    pieces = [Segment(start, min(start + length, whole), chunk) for start in range(0, whole, length)]
    return pieces + [Segment(whole, time, time - whole)] * (whole < time)


def to_chunks(x: Shaped[Tensor, "batch time heads *dim"], piece: Segment, dtype: torch.dtype) -> Tensor:
    """A segment of `x` as (chunk batch heads, time, *dim), a copy in `dtype`."""
    view = in_chunks(x, piece)
    return torch.empty(view.shape, dtype=dtype, device=x.device).copy_(view).flatten(0, 2)


def from_chunks(chunks: Tensor, piece: Segment, out: Shaped[Tensor, "batch time heads *dim"]) -> None:
    """Write chunks back into their segment of `out`."""
    view = in_chunks(out, piece)
    view.copy_(chunks.view(view.shape))


def in_chunks(x: Shaped[Tensor, "batch time heads *dim"], piece: Segment) -> Tensor:
    """A view of a segment of `x`, (chunk, batch, heads, time, *dim)."""
    return x[:, piece.start : piece.stop].unflatten(1, (piece.n_chunks, piece.chunk)).movedim(1, 0).movedim(3, 2)


def decays_of(
    g: Float[Tensor, "batch time heads"], piece: Segment, dtype: torch.dtype, *, within: bool = True
) -> Decays:
    """Products of gates from differences of double-precision sums of logarithms, of each chunk alone."""
    sums, seen = log_sums(to_chunks(g, piece, torch.float64))
    start, end = sums.exp(), (sums[:, -1:] - sums).exp_()
    if seen is not None:
        start.masked_fill_(seen > 0, 0.0)
        end.masked_fill_(seen < seen[:, -1:], 0.0)
    pairs = products_within(sums, seen, dtype) if within else sums.new_zeros(0)
    factors = start[:, -1].to(dtype).view(piece.n_chunks, -1, 1, 1)
    return Decays(start.to(dtype), end.to(dtype), pairs, factors)


def log_sums(g: Float[Tensor, "chunks time"]) -> tuple[Float[Tensor, "chunks time"], Int[Tensor, "chunks time"] | None]:
    """Sums of logarithms of gates from each chunk's start, and the gates so far that forget all (None: none does)."""
    resets = g <= FORGOTTEN
    if not bool(resets.any()):
        return g.cumsum(-1), None
    return g.masked_fill(resets, 0.0).cumsum(-1), resets.cumsum(-1)


def products_within(
    sums: Float[Tensor, "chunks time"], seen: Int[Tensor, "chunks time"] | None, dtype: torch.dtype
) -> Float[Tensor, "chunks time time"]:
    """zeta_ti of i <= t in each chunk, 0 elsewhere, from `log_sums`."""
    pairs = (sums[:, :, None] - sums[:, None, :]).to(dtype).exp_().tril_()  # above the diagonal exp may be infinite
    return pairs if seen is None else pairs.masked_fill_(seen[:, :, None] != seen[:, None, :], 0.0)


def chunk_states(
    keys_to_end: Float[Tensor, "chunks time dim"],
    values: Float[Tensor, "chunks time value_dim"],
    decays: Decays,
    first: Float[Tensor, "rows dim value_dim"],
) -> Float[Tensor, "n_chunks_plus_1 rows dim value_dim"]:
    """The state before each chunk of a segment and after the last; keys times beta times their decay to the end."""
    n_chunks, rows = decays.total.shape[:2]
    states = first.new_empty(n_chunks + 1, rows, *first.shape[1:])
    states[0] = first
    torch.bmm(keys_to_end.mT, values, out=states[1:].flatten(0, 1))
    parts = states.unbind()
    for state, following, factor in zip(parts, parts[1:], decays.total, strict=False):
        following.addcmul_(state, factor)
    return states


def _attend_once(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial_state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend` for one element, as in decoding: the recurrence, in a quarter of the time."""
    states = _state_buffer(initial_state, 1, dtype)
    with torch.autocast(v.device.type, enabled=False):
        before, after = states[0], states[1]
        queries, keys, values = (x.to(dtype).flatten(0, 2)[:, None] for x in (q, k, v))
        keys = keys if beta is None else keys * beta.to(dtype).reshape(-1, 1, 1)
        torch.mul(before, g.to(dtype).exp().reshape(-1, 1, 1), out=after)
        after.baddbmm_(keys.mT, values)
        o = torch.bmm(queries, after).view(v.shape).to(v.dtype)
        return o, states[:1], after.view(initial_state.shape).clone()


def _state_buffer(initial_state: Tensor, n_segments: int, dtype: torch.dtype) -> Tensor:
    first = initial_state.flatten(0, 1)
    states = torch.empty(n_segments + 1, *first.shape, dtype=dtype, device=first.device)
    states[0] = first
    return states


def segment_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    first: Float[Tensor, "rows dim value_dim"],
    d_o: Tensor,
    d_last: Float[Tensor, "rows dim value_dim"],
    piece: Segment,
) -> Gradients:
    """Gradients inside one segment, in chunks, from those of its outputs and of its last state."""
    dtype = compute_dtype(q, k, v)
    with torch.autocast(v.device.type, enabled=False):
        chunks = Chunks(*(to_chunks(x, piece, dtype) for x in (q, k, v, d_o)))
        gates = None if beta is None else to_chunks(beta, piece, dtype)
        return _chunks_backward(chunks, gates, decays_of(g, piece, dtype), first, d_last)


class Chunks(NamedTuple):
    """A segment's operands, chunk by chunk."""

    q: Float[Tensor, "chunks time dim"]
    k: Float[Tensor, "chunks time dim"]
    v: Float[Tensor, "chunks time value_dim"]
    d_o: Float[Tensor, "chunks time value_dim"]


def _chunks_backward(chunks: Chunks, beta: Tensor | None, decays: Decays, first: Tensor, d_last: Tensor) -> Gradients:
    q, k, v, d_o = chunks
    to_start, to_end = decays.start[:, :, None], decays.end[:, :, None]
    written = k if beta is None else k * beta[:, :, None]
    states = chunk_states(written * to_end, v, decays, first)
    d_states = _state_gradients(q * to_start, d_o, decays, d_last)
    starts, d_ends = states[:-1].flatten(0, 1), d_states[1:].flatten(0, 1)
    d_scores = torch.bmm(d_o, v.mT).mul_(decays.within)
    d_q = torch.bmm(d_o, starts.mT).mul_(to_start).baddbmm_(d_scores, written)
    # Of beta k and beta v first: both share the rest with the gradient of beta.
    d_k = torch.bmm(v, d_ends.mT).mul_(to_end)
    leaving = (d_k * written).sum(-1)
    d_k.baddbmm_(d_scores.mT, q)
    d_beta = (d_k * k).sum(-1)
    scores = torch.bmm(q, k.mT, out=d_scores).mul_(decays.within)
    d_v = torch.bmm(k, d_ends).mul_(to_end).baddbmm_(scores.mT, d_o)
    entering = d_beta if beta is None else d_beta * beta
    if beta is not None:
        d_k.mul_(beta[:, :, None])
        d_v.mul_(beta[:, :, None])
    # Pairs i < s <= t: inside the chunk and from its start (reverse sums), to its end (forward sums), and through it.
    inside = (q * d_q).sum(-1).sub_(entering).add_(leaving)
    through = (states[:-1] * d_states[1:]).sum((2, 3)).mul_(decays.total[:, :, 0, 0]).flatten()
    d_g = inside.flip(-1).cumsum(-1).flip(-1).add_(leaving.cumsum(-1).sub_(leaving)).add_(through[:, None])
    return Gradients(d_q, d_k, d_v, d_g, d_beta, d_states[0])


def _state_gradients(
    queries_from_start: Tensor, d_o: Tensor, decays: Decays, d_last: Tensor
) -> Float[Tensor, "n_chunks_plus_1 rows dim value_dim"]:
    """The gradient of the state before each chunk and after the last."""
    n_chunks, rows = decays.total.shape[:2]
    d_states = d_last.new_empty(n_chunks + 1, rows, *d_last.shape[1:])
    d_states[-1] = d_last
    torch.bmm(queries_from_start.mT, d_o, out=d_states[:-1].flatten(0, 1))
    for number in reversed(range(n_chunks)):
        d_states[number].addcmul_(d_states[number + 1], decays.total[number])
    return d_states
