"""DeltaNet and Gated DeltaNet: a linear memory that erases what a key held before it writes there.

    S_t = gamma_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t        (gamma = 1: DeltaNet)

One gradient step a token on |S^T k - v|^2 / 2, with step size beta.  When to use: more keys than one additive memory
tells apart, at nearly its cost; where the best memory of all that was seen is worth a solve a token, use Mesa.

In a chunk that starts at c the state is S_t = zeta_tc S_c + sum_{i <= t} zeta_ti k_i u_i^T with

    u_t = beta_t (v_t - zeta_tc S_c^T k_t - sum_{c < i < t} zeta_ti (k_i . k_t) u_i),      zeta_ti = gamma_{i+1..t}

a unit triangular system (I + L) U = beta (V - zeta K S_c).  With X = (I + L)^-1 (the UT transform), W = X beta zeta K,
all chunks are prepared at once and the states between them follow S_e = (zeta_ec I - K_e^T W) S_c + K_e^T X beta V, K_e
the keys decayed to the chunk's end.  The entries of X are products of contractions, none above 1, so the inverse is as
accurate as a solve.  The backward, written by hand, is the same system transposed: with R_t the gradient of S_t,

    (I + L^T) dU = P^T dO + K_e R_e,    dv_t = beta_t du_t,    R_c = (zeta_ec I - W^T K_e) R_e + (zeta Q - W^T P^T)^T dO

where P holds zeta_ti (q_t . k_i).  Saved: the inputs and one state a segment, O(T D).

| paper | here |
|---|---|
| log alpha (2412.06464) | `g` |
| T, W, U | `inverse`, `erased`, `written` |
| S, key-major (D, Dv) | `state` |

Yang et al., arXiv 2406.06484, section 3 (WY representation, UT transform); Yang, Kautz & Hatamizadeh, arXiv 2412.06464,
section 3 (gates).  One scalar gate a head, sigmoid(a_proj x), as in arXiv 2506.05233, appendix E.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from commissure.core.errors import InputError
from commissure.core.first_order import first_order_only
from commissure.nn.heads import FORGET_BIAS, ConvState, HeadInputs, HeadOutput, gate_projection, head_sizes
from commissure.nn.linear_attention import (
    Decays,
    Segment,
    check_shapes,
    compute_dtype,
    cut,
    decays_of,
    from_chunks,
    to_chunks,
)
from commissure.nn.mesa_checks import check_values, input_gate, log_gate
from commissure.nn.padding import check_sequence, check_step, zero_padding

__all__ = ["DeltaNet", "DeltaNetState", "GatedDeltaNet", "delta_rule", "delta_rule_reference"]


# The inverse costs O(chunk^2) an element: on a CPU 32 beat 64 at every head_dim measured (16, 32, 64), by up to 1.6.
CHUNK = 32


class DeltaNetState(NamedTuple):
    """The convolution's last inputs and the memory, keys by values, never in half precision."""

    conv: ConvState
    memory: Float[Tensor, "batch heads head_dim value_dim"]


class DeltaNet(nn.Module):
    """One DeltaNet layer as a sequence mixer: write strength sigmoid(b_proj x), one number a head.

    `heads` defaults to dim // 64 (at least 1), `head_dim` to dim // heads, `value_dim` to `head_dim`; `chunk_size` is
    the length of the parallel form's pieces and changes no result.

    >>> layer = DeltaNet(8, heads=2)
    >>> y, state = layer(torch.zeros(1, 3, 8))
    >>> y.shape, state.memory.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 4, 4]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        chunk_size: int = CHUNK,
    ) -> None:
        super().__init__()
        heads, head_dim = head_sizes(dim, heads, head_dim)
        if chunk_size < 1:
            raise InputError("chunk_size", chunk_size, "an integer >= 1")
        self.dim, self.chunk_size = dim, chunk_size
        self.inputs = HeadInputs(dim, heads=heads, head_dim=head_dim, value_dim=value_dim, conv_size=conv_size)
        self.b_proj = gate_projection(dim, heads)
        self.output = HeadOutput(dim, heads=heads, value_dim=self.inputs.value_dim)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DeltaNetState:
        """Nothing seen: zeros."""
        conv = self.inputs.init_state(batch_size, device=device, dtype=dtype)
        shape = (batch_size, self.inputs.heads, self.inputs.head_dim, self.inputs.value_dim)
        return DeltaNetState(conv, conv.keys.new_zeros(shape, dtype=compute_dtype(conv.keys)))

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: DeltaNetState
    ) -> tuple[Float[Tensor, "batch dim"], DeltaNetState]:
        """One element in, one out: the recurrence."""
        check_step(x_t, self.dim, state)
        x = x_t[:, None]
        q, k, v, conv = self.inputs(x, state.conv)
        o, memory = delta_rule_reference(q, k, v, self.log_forget(x), self.b_proj(x).sigmoid(), state.memory)
        return self.output(o)[:, 0], DeltaNetState(conv, memory)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: DeltaNetState | None = None,
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], DeltaNetState]:
        """A whole stretch by chunks."""
        check_sequence(x, self.dim, state, lengths)
        state = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        x = zero_padding(x, lengths)
        q, k, v, conv = self.inputs(x, state.conv, lengths=lengths)
        # With beta = 0 and g = 0 the memory stays as it is, so padding needs nothing else.
        g, beta = self.log_forget(x), zero_padding(self.b_proj(x).sigmoid(), lengths)
        g = None if g is None else zero_padding(g, lengths)
        o, memory = _delta_rule(q, k, v, g, beta, state.memory, self.chunk_size)
        return self.output(o), DeltaNetState(conv, memory)

    def log_forget(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time heads"] | None:
        """Logarithm of the forget gate; None: DeltaNet has none."""
        return None


class GatedDeltaNet(DeltaNet):
    """One Gated DeltaNet layer: DeltaNet whose memory also decays, by sigmoid(a_proj x), one number a head.

    >>> layer = GatedDeltaNet(8, heads=2, value_dim=3)
    >>> layer(torch.zeros(1, 3, 8))[1].memory.shape
    torch.Size([1, 2, 4, 3])
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int = 4,
        chunk_size: int = CHUNK,
    ) -> None:
        super().__init__(
            dim, heads=heads, head_dim=head_dim, value_dim=value_dim, conv_size=conv_size, chunk_size=chunk_size
        )
        self.a_proj = gate_projection(dim, self.inputs.heads, bias=FORGET_BIAS)

    def log_forget(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time heads"]:
        """log sigmoid(a_proj x)."""
        return F.logsigmoid(self.a_proj(x))


def delta_rule(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"] | None,
    beta: Float[Tensor, "batch time heads"],
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    *,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """Outputs and final state; keys no longer than 1, beta in [0, 1], g = log gamma <= 0 (None: 0; -inf forgets all).

    Any length, zero included.  Half-precision inputs are computed in float32: outputs in `v`'s dtype, the state in
    float32 (float64 for float64).  `chunk_size` changes no result.  Raises InputError for shapes, NaN, and gates out of
    range (naming the first).

    >>> one, zero = torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1)
    >>> delta_rule(one, one, 2 * one, zero, zero + 0.5)[0].flatten().tolist()
    [1.0, 1.5, 1.75]
    """
    g = beta.new_zeros(q.shape[:3]) if g is None else g
    check_shapes(q, k, v, g, beta, initial_state)
    if chunk_size < 1:
        raise InputError("chunk_size", chunk_size, "an integer >= 1")
    state = _empty_memory(q, v) if initial_state is None else initial_state
    finite = {"q": q, "k": k, "v": v, "initial_state": state}
    check_values(finite, {"g": log_gate(g), "beta": input_gate(beta)})
    return _delta_rule(q, k, v, g, beta, state, chunk_size)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, state: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """`delta_rule` without checks."""
    g = beta.new_zeros(q.shape[:3]) if g is None else g
    if q.shape[1] == 1:  # decoding: one element needs no chunks
        return delta_rule_reference(q, k, v, g, beta, state)
    return _DeltaRule.apply(q, k, v, g, beta, state, chunk_size)


def delta_rule_reference(
    q: Float[Tensor, "batch time heads dim"],
    k: Float[Tensor, "batch time heads dim"],
    v: Float[Tensor, "batch time heads value_dim"],
    g: Float[Tensor, "batch time heads"] | None,
    beta: Float[Tensor, "batch time heads"],
    initial_state: Float[Tensor, "batch heads dim value_dim"] | None = None,
    *,
    chunk_size: int = CHUNK,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads dim value_dim"]]:
    """The recurrence itself, differentiated by autograd; `chunk_size` is ignored."""
    g = beta.new_zeros(q.shape[:3]) if g is None else g
    check_shapes(q, k, v, g, beta, initial_state)
    state = _empty_memory(q, v) if initial_state is None else initial_state
    kept, dtype = v.dtype, compute_dtype(v)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        key = k[:, t, :, :, None]
        error = v[:, t, :, None] - key.mT @ state
        state = state + beta[:, t, :, None, None] * key * error
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)).to(kept), state


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(v)
        pieces = cut(v.shape, q.shape[3], chunk_size, v.device)
        state = state.to(dtype).flatten(0, 1)
        states, o = [state], torch.empty_like(v, memory_format=torch.contiguous_format)
        with torch.autocast(v.device.type, enabled=False):
            for piece in pieces:
                part = _prepare(k, v, g, beta, piece, dtype)
                starts = _states(part.transitions, part.gains, states[-1])
                queries = to_chunks(q, piece, dtype)
                scores = torch.bmm(queries, part.keys.mT).mul_(part.decays.within)
                written = torch.baddbmm(part.written, part.erased, starts[:-1].flatten(0, 1), alpha=-1)
                mixed = torch.bmm(queries.mul_(part.decays.start[:, :, None]), starts[:-1].flatten(0, 1))
                from_chunks(mixed.baddbmm_(scores, written), piece, o)
                states.append(starts[-1])
        ctx.save_for_backward(q, k, v, g, beta, *states[:-1])
        ctx.pieces = pieces  # type: ignore[attr-defined]
        return o, states[-1].unflatten(0, (v.shape[0], v.shape[2])).clone()

    @staticmethod
    @first_order_only("delta_rule", "delta_rule_reference")
    def backward(ctx: FunctionCtx, d_o: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, beta, *states = ctx.saved_tensors  # type: ignore[attr-defined]
        dtype = compute_dtype(v)
        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, g, beta))
        d_state = d_final.to(dtype).flatten(0, 1)
        with torch.autocast(v.device.type, enabled=False):
            for piece, first in zip(ctx.pieces[::-1], states[::-1], strict=True):  # type: ignore[attr-defined]
                part = _prepare(k, v, g, beta, piece, dtype)
                chunks = (to_chunks(q, piece, dtype), to_chunks(v, piece, dtype), to_chunks(d_o, piece, dtype))
                *gradients, d_state = _segment_backward(*chunks, part, first, d_state)
                for gradient, whole in zip(gradients, grads, strict=True):
                    from_chunks(gradient, piece, whole)
        return (*grads, d_state.view_as(d_final).to(d_final.dtype), None)


class _Part(NamedTuple):
    """What forward and backward of a segment share, chunks in the order (chunk, batch, head); header for symbols."""

    keys: Float[Tensor, "chunks time dim"]
    beta: Float[Tensor, "chunks time 1"]
    decays: Decays
    strict: Float[Tensor, "chunks time time"]  # zeta_ti (k_t . k_i), i < t
    inverse: Float[Tensor, "chunks time time"]
    erased: Float[Tensor, "chunks time dim"]
    written: Float[Tensor, "chunks time value_dim"]  # with an empty start state
    transitions: Float[Tensor, "n_chunks rows dim dim"]
    gains: Float[Tensor, "n_chunks rows dim value_dim"]


def _prepare(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, piece: Segment, dtype: torch.dtype) -> _Part:
    """The UT transform of every chunk of a segment."""
    keys, values = to_chunks(k, piece, dtype), to_chunks(v, piece, dtype)
    strength = to_chunks(beta, piece, dtype)[:, :, None]
    decays = decays_of(g, piece, dtype)
    strict = torch.bmm(keys, keys.mT).mul_(decays.within).tril_(-1)
    eye = torch.eye(piece.chunk, dtype=dtype, device=k.device).expand_as(strict)
    # The solver reads the strict triangle alone and takes the diagonal as ones.
    inverse = torch.linalg.solve_triangular(strict * strength, eye, upper=False, unitriangular=True)
    weighted = inverse * strength.mT
    erased = torch.bmm(weighted, keys * decays.start[:, :, None])
    written = torch.bmm(weighted, values)
    to_end = (keys * decays.end[:, :, None]).mT
    shape = piece.n_chunks, len(keys) // piece.n_chunks
    transitions = torch.bmm(to_end, erased).neg_().unflatten(0, shape)
    transitions.diagonal(dim1=2, dim2=3).add_(decays.total[..., 0])
    gains = torch.bmm(to_end, written).unflatten(0, shape)
    return _Part(keys, strength, decays, strict, inverse, erased, written, transitions, gains)


def _states(transitions: Tensor, gains: Tensor, first: Tensor) -> Float[Tensor, "n_chunks_plus_1 rows dim value_dim"]:
    """S_{c+1} = transition_c S_c + gain_c: the state before each chunk and after the last."""
    states = first.new_empty(len(gains) + 1, *first.shape)
    states[0] = first
    for number, (transition, gain) in enumerate(zip(transitions, gains, strict=True)):
        torch.baddbmm(gain, transition, states[number], out=states[number + 1])
    return states


def _segment_backward(
    q: Tensor, v: Tensor, d_o: Tensor, part: _Part, first: Tensor, d_last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, beta and the first state, from d_o and that of the last state."""
    keys, beta, decays = part.keys, part.beta, part.decays
    to_start, to_end = decays.start[:, :, None], decays.end[:, :, None]
    states = _states(part.transitions, part.gains, first)
    starts = states[:-1].flatten(0, 1)
    written = torch.baddbmm(part.written, part.erased, starts, alpha=-1)
    scores = torch.bmm(q, keys.mT).mul_(decays.within)
    d_written = torch.bmm(scores.mT, d_o)
    # The gradients of the states, from the last chunk to the first.
    d_gains = torch.bmm((q * to_start).mT, d_o).baddbmm_(part.erased.mT, d_written, alpha=-1).view_as(part.gains)
    d_states = _states(part.transitions.mT.flip(0), d_gains.flip(0), d_last).flip(0)
    d_ends = d_states[1:].flatten(0, 1)
    d_written = torch.bmm(part.inverse.mT, d_written.baddbmm_(keys * to_end, d_ends))
    # u = beta (v - what the memory held at k): as a reader of the memory, k is a query with cotangent -beta du.
    held = torch.bmm(keys * to_start, starts).baddbmm_(part.strict, written)
    d_beta = (d_written * (v - held)).sum(-1)
    d_v = d_written * beta
    # Pairs (i written, t read) with i < t; i = t, which no gate touches, is added last, so that nothing cancels there.
    d_scores = torch.bmm(d_o, written.mT).mul_(decays.within).tril_(-1)
    d_strict = torch.bmm(d_v, written.mT).mul_(decays.within).tril_(-1)
    d_q = torch.bmm(d_o, starts.mT).mul_(to_start).baddbmm_(d_scores, keys)
    d_reader = torch.bmm(d_v, starts.mT).mul_(to_start).baddbmm_(d_strict, keys)
    leaving = torch.bmm(written, d_ends.mT).mul_(to_end)
    d_writer = torch.bmm(d_scores.mT, q).baddbmm_(d_strict.mT, keys, alpha=-1)
    # The gate of step s acts on every pair with i < s <= t: pairs inside the chunk and from its start (reverse sums),
    # to its end (forward sums), and the state that passes through.
    inside = (q * d_q).sum(-1) - (keys * (d_reader + d_writer)).sum(-1)
    ends = (keys * leaving).sum(-1)
    through = (states[:-1] * d_states[1:]).sum((2, 3)).mul_(decays.total[:, :, 0, 0]).flatten()
    d_g = inside.flip(-1).cumsum(-1).flip(-1).add_(ends.cumsum(-1)).sub_(ends).add_(through[:, None])
    own = (d_o * written).sum(-1, keepdim=True)
    d_k = d_writer.add_(leaving).sub_(d_reader).addcmul_(own, q)
    return d_q.addcmul_(own, keys), d_k, d_v, d_g, d_beta, d_states[0]


def _empty_memory(q: Tensor, v: Tensor) -> Float[Tensor, "batch heads dim value_dim"]:
    batch, _, heads, dim = q.shape
    return q.new_zeros(batch, heads, dim, v.shape[3], dtype=compute_dtype(v))
